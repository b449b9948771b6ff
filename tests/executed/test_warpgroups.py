"""Products of a warpgroup: element types, majors and swizzles, and what scale-d says."""

import ml_dtypes
import numpy as np
import pytest

from numflash.runtime.errors import UnsupportedError
from numflash.simulator import SimulationError
from tests.executed.by_hand import run

N = 32
TYPES = {
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "tf32": np.dtype(np.float32),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_SWIZZLE = {0: 0, 128: 1, 64: 2, 32: 3}
_ROOM = 8192
_CHUNK = 16


def placed(matrix: np.ndarray, major: str, swizzle: int) -> tuple[np.ndarray, int]:
    """(bytes of shared memory that hold a matrix (rows, k), its descriptor without address).

    Element after element, as the PTX ISA draws canonical layouts (9.7.15.5.1).
    """
    n_rows, k = matrix.shape
    item = matrix.itemsize
    room = np.zeros(_ROOM, np.uint8)
    for r in range(n_rows):
        for i in range(k):
            inner, outer, per_chunk = (i, r, _CHUNK // item) if major == "k" else (r, i, 8)
            if swizzle:
                # Slabs of rows as long as the swizzle; a slab has all outer indices.
                n_outer = n_rows if major == "k" else k
                slab, column = divmod(inner * item, swizzle)
                change = outer // (128 // swizzle) % (swizzle // _CHUNK)
                column = (column // _CHUNK ^ change) * _CHUNK + column % _CHUNK
                place = (slab * n_outer + outer) * swizzle + column
                leading, stride = n_outer * swizzle, 8 * swizzle
            else:
                # Blocks of eight chunks: the chunks of one block column follow each other.
                chunk, within = divmod(inner, per_chunk)
                n_outer = n_rows if major == "k" else k
                block = (chunk * -(-n_outer // 8) + outer // 8) * 128
                place = block + outer % 8 * _CHUNK + within * item
                along_outer, along_inner = 128, -(-n_outer // 8) * 128
                leading, stride = (
                    (along_inner, along_outer) if major == "k" else (along_outer, along_inner)
                )
            room[place : place + item] = np.frombuffer(matrix[r, i].tobytes(), np.uint8)
    return room, leading >> 4 << 16 | stride >> 4 << 32 | _SWIZZLE[swizzle] << 62


def _d_index(n: int):
    """Row and column of element i of the accumulator of thread t, (128, n / 2)."""
    t, i = np.arange(128)[:, None], np.arange(n // 2)
    row = t // 32 * 16 + t % 32 // 4 + 8 * (i // 2 % 2)
    return row, 8 * (i // 4) + 2 * (t % 4) + i % 2


def multiplied(
    type_: str,
    a_major="k",
    b_major="k",
    swizzle=128,
    sums="f32",
    a_in_registers=False,
    change=0,
    noise=0,
):
    """(1 + a b as the executor has it, a b of float64).

    `change` are bits of the descriptor of a, `noise` is written over words of both operands.
    """
    dtype = TYPES[type_]
    k = 32 // dtype.itemsize
    rng = np.random.default_rng(1)
    a, b = (rng.integers(-4, 5, (rows, k)).astype(dtype) for rows in (64, N))
    a_room, a_constant = placed(a, a_major, swizzle)
    b_room, b_constant = placed(b, b_major, swizzle)
    if a_in_registers:
        t, i, h = np.arange(128)[:, None, None], np.arange(4)[:, None], np.arange(k // 8)
        rows = t // 32 * 16 + t % 32 // 4 + 8 * (i % 2) + 0 * h
        columns = k // 8 * (t % 4) + h + k // 2 * (i // 2)
        fragments = np.ascontiguousarray(a[rows, columns]).view(np.uint8)
        a_room[: fragments.size] = fragments.reshape(-1)
    for room in (a_room, b_room):
        room.view(np.uint32)[...] |= noise
    x = np.concatenate([a_room, b_room, np.zeros(_ROOM, np.uint8)])
    n_registers = N // 2 if sums == "f32" else N // 4
    one = "0x3f800000" if sums == "f32" else "0x3c003c00"
    d = [f"%d{i}" for i in range(n_registers)]
    majors = {"tf32": "", "e4m3": ""}.get(type_, f", {int(b_major == 'mn')}")
    if majors and not a_in_registers:
        majors = f", {int(a_major == 'mn')}{majors}"
    copies = "".join(
        f"ld.global.v4.u32 {{%r5, %r6, %r7, %r8}}, [%rd5+{2048 * i}];"
        f"st.shared.v4.u32 [%r4+{2048 * i}], {{%r5, %r6, %r7, %r8}};"
        for i in range(2 * _ROOM // 2048)
    )
    body = f"""
    .shared .align 1024 .b8 room[{2 * _ROOM}];
    .reg .b32 %d<{n_registers}>;
    mul.wide.u32 %rd4, %r1, 16;
    add.s64 %rd5, %rd1, %rd4;
    shl.b32 %r2, %r1, 4;
    mov.u32 %r3, room;
    add.u32 %r4, %r2, %r3;
    {copies}
    fence.proxy.async.shared::cta;
    bar.sync 0;
    shr.u32 %r7, %r3, 4;
    cvt.u64.u32 %rd6, %r7;
    or.b64 %rd7, %rd6, {a_constant ^ change};
    add.s64 %rd8, %rd6, {_ROOM // 16};
    or.b64 %rd8, %rd8, {b_constant};
    ld.global.v4.u32 {{%r5, %r6, %r7, %r8}}, [%rd5];
    {"".join(f"mov.b32 {x}, {one};" for x in d)}
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n{N}k{k}.{sums}.{type_}.{type_} {{{", ".join(d)}}}, \
{"{%r5, %r6, %r7, %r8}" if a_in_registers else "%rd7"}, %rd8, 1, 1, 1{majors};
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    mul.wide.u32 %rd4, %r1, {4 * n_registers};
    add.s64 %rd5, %rd1, %rd4;
    {"".join(f"st.global.b32 [%rd5+{2 * _ROOM + 4 * i}], {x};" for i, x in enumerate(d))}"""
    run(body, x=x, block=128)
    out = x[2 * _ROOM :][: 128 * 4 * n_registers].view("f4" if sums == "f32" else "f2")
    result = np.zeros((64, N))
    result[_d_index(N)] = out.reshape(128, N // 2)
    return result, a.astype("f8") @ b.astype("f8").T


@pytest.mark.parametrize("swizzle", [128, 64, 32, 0])
@pytest.mark.parametrize("type_", ["f16", "tf32", "e4m3"])
def test_k_major_operands(type_, swizzle):
    got, expected = multiplied(type_, swizzle=swizzle)
    np.testing.assert_array_equal(got, 1 + expected)


@pytest.mark.parametrize("swizzle", [128, 64, 32, 0])
@pytest.mark.parametrize("a_major, b_major", [("mn", "k"), ("k", "mn"), ("mn", "mn")])
def test_mn_major_operands(a_major, b_major, swizzle):
    got, expected = multiplied("bf16", a_major, b_major, swizzle)
    np.testing.assert_array_equal(got, 1 + expected)


@pytest.mark.parametrize("type_", ["f16", "tf32", "e4m3"])
def test_an_operand_in_registers(type_):
    got, expected = multiplied(type_, swizzle=64, a_in_registers=True)
    np.testing.assert_array_equal(got, 1 + expected)


@pytest.mark.parametrize("a_in_registers", [False, True])
def test_sums_of_float16(a_in_registers):
    got, expected = multiplied("f16", sums="f16", a_in_registers=a_in_registers)
    np.testing.assert_array_equal(got, 1 + expected)


@pytest.mark.parametrize("a_in_registers", [False, True])
def test_tf32_ignores_low_bits(a_in_registers):
    """The lowest 13 of a float32; of zeros they are subnormal numbers, which tf32 has none of."""
    got, expected = multiplied("tf32", a_in_registers=a_in_registers, noise=0x1FFF)
    np.testing.assert_array_equal(got, 1 + expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"change": 1 << 49}, "line .*operand a has base offset 1"),
        ({"change": 7}, "line .*operand a begins in the last chunk of a row"),
        ({"change": 0x2000}, "line .*operand a of wgmma.* lie outside"),
    ],
)
def test_a_descriptor_must_make_sense(options, message):
    with pytest.raises(SimulationError, match=message):
        multiplied("f16", **options)


def test_another_swizzle_is_another_matrix():
    got, expected = multiplied("f16", change=3 << 62)
    assert (got != 1 + expected).any()


# Whether the accumulator counts


def squares(
    *products: str, before: str = "", fence="fence.proxy.async.shared::cta;"
) -> np.ndarray:
    """What a warpgroup has in its accumulators of n = 8 after these products of ones by ones."""
    first, _, second = fence.partition("|")
    body = f"""
    .shared .align 1024 .b8 a[8192];
    .reg .b32 %d<4>; .reg .pred %adds;
    shl.b32 %r2, %r1, 6;
    mov.u32 %r3, a;
    add.u32 %r4, %r2, %r3;
    mov.u32 %r5, 0;
    mov.b32 %r6, 0x3c003c00;
FILL:
    st.shared.u32 [%r4], %r6;
    add.u32 %r4, %r4, 4;
    add.u32 %r5, %r5, 1;
    setp.lt.u32 %p1, %r5, 16;
    @%p1 bra FILL;
    {first}
    bar.sync 0;
    {second}
    shr.u32 %r7, %r3, 4;
    cvt.u64.u32 %rd4, %r7;
    or.b64 %rd5, %rd4, {1 << 16 | 64 << 32 | 1 << 62};
    mov.b32 %d0, 0x41200000; mov.b32 %d1, %d0; mov.b32 %d2, %d0; mov.b32 %d3, %d0;
    {before}
    wgmma.fence.sync.aligned;
    {" ".join(products)}
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    st.global.b32 [%rd3], %d3;"""
    return run(body, x=np.zeros(128, np.float32), block=128)


def product(scale_d: str, opcode="m64n8k16.f32.f16.f16", more=", 1, 1, 0, 0") -> str:
    return (
        f"wgmma.mma_async.sync.aligned.{opcode} {{%d0, %d1, %d2, %d3}}, %rd5, %rd5, {scale_d}"
        f"{more};"
    )


def test_a_predicate_says_whether_a_product_adds():
    holds, fails = "setp.eq.u32 %adds, %r5, 16;", "setp.ne.u32 %adds, %r5, 16;"
    assert (squares(product("%adds"), before=holds) == 10 + 16).all()
    assert (squares(product("%adds"), before=fails) == 16).all()
    assert (squares(product("1"), product("%adds"), before=fails) == 16).all()
    assert (squares(product("!%adds"), product("1"), before=fails) == 10 + 32).all()
    with pytest.raises(SimulationError, match="scale-d differs from lane to lane"):
        squares(product("%adds"), before="and.b32 %r8, %r1, 31; setp.lt.u32 %adds, %r8, 8;")


@pytest.mark.parametrize(
    "fence, seen",
    [
        ("fence.proxy.async.shared::cta;|", True),
        ("|fence.proxy.async.shared::cta;", True),
        ("fence.proxy.async;|", True),
        ("fence.proxy.async.shared::cluster;|", True),
        ("|@%p1 fence.proxy.async;", False),
        ("fence.proxy.async.global;|", False),
        ("|", False),
    ],
)
def test_stores_are_fenced_by_writers_or_readers(fence, seen):
    """Triton has the reader fence, after the barrier; CUTLASS the writer, before it."""
    if seen:
        assert (squares(product("0"), fence=fence) == 16).all()
    else:
        with pytest.raises(SimulationError, match=r"line .*wgmma.*without a fence_proxy_async"):
            squares(product("0"), fence=fence)


@pytest.mark.parametrize(
    "statement, error, message",
    [
        (product("1", more=""), ValueError, "has 4 operands; it takes 8"),
        (product("1", more=", 1, 1"), ValueError, "has 6 operands; it takes 8"),
        (product("1", "m64n8k8.f32.tf32.tf32"), ValueError, "has 8 operands; it takes 6"),
        (product("1", "m64n8k16.f16.bf16.bf16"), UnsupportedError, "with these operands"),
        (product("1", "m64n8k16.f16.f16.f16"), UnsupportedError, "2 registers are expected, the"),
        (product("1", "m64n8k16.f32.f16.bf16"), UnsupportedError, "does not know wgmma"),
        (product("1", more=", 1, -1, 0, 0"), UnsupportedError, "with these operands"),
        (product("1", more=", 1, 1, %r6, 0"), UnsupportedError, "with these operands"),
        (
            product("1", "m64n12k16.f32.f16.f16"),
            UnsupportedError,
            "there is no wgmma of float16 with n",
        ),
    ],
)
def test_what_is_wrong_with_a_product_names_its_line(statement, error, message):
    with pytest.raises(error, match=message) as caught:
        squares(statement)
    assert "line 36: " in str(caught.value)
