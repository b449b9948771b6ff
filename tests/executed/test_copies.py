"""Copies that pass by the registers, in every form that compilers write."""

import ml_dtypes
import numpy as np
import pytest

import numflash
from numflash.problem.tensor_maps import TensorLayout
from numflash.runtime.errors import UnsupportedError
from numflash.simulator import SimulatedTensorMap, SimulationError
from tests.executed.by_hand import module, run

# Lane i names bytes 16 i of x and of `room`.
_OWN_16 = """
    .shared .align 128 .b8 room[512];
    mul.wide.u32 %rd4, %r1, 16;
    add.s64 %rd5, %rd1, %rd4;
    shl.b32 %r2, %r1, 4;
    mov.u32 %r3, room;
    add.u32 %r4, %r2, %r3;"""
_BACK = "ld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r4]; st.global.v4.u32 [%rd5], {%r5,%r6,%r7,%r8};"


def copied(statement: str, wait="cp.async.commit_group; cp.async.wait_group 0;", before=""):
    """x, 16 bytes a lane, after a copy to shared memory, which was all 0xAA, and back."""
    x = np.arange(1, 513, dtype=np.uint16).view(np.uint8)[: 512 * 1].copy()
    fill = "mov.u32 %r9, 0xAAAAAAAA; st.shared.v4.u32 [%r4], {%r9, %r9, %r9, %r9};"
    given = x.copy().reshape(32, 16)
    run("\n".join([_OWN_16, fill, before, statement, wait, _BACK]), x=x)
    return given, x.reshape(32, 16)


@pytest.mark.parametrize(
    "opcode, size",
    [
        ("cp.async.cg.shared.global", 16),
        ("cp.async.cg.shared::cta.global.L2::256B", 16),
        ("cp.async.ca.shared.global", 4),
        ("cp.async.ca.shared::cta.global", 8),
        ("cp.async.ca.shared.global.L2::128B", 16),
    ],
)
@pytest.mark.parametrize("of_source", ["", ", 0", ", %r10", ", %p2"])
def test_copies_of_threads(opcode, size, of_source):
    """Of the source all bytes are read, none, as many as a register says, or all but where p2."""
    before = f"rem.u32 %r10, %r1, {size + 1}; setp.lt.u32 %p2, %r1, 5;"
    given, got = copied(f"{opcode} [%r4], [%rd5], {size}{of_source};", before=before)
    read = {
        "": np.full(32, size),
        ", 0": np.zeros(32, int),
        ", %r10": np.arange(32) % (size + 1),
        ", %p2": np.where(np.arange(32) < 5, 0, size),
    }[of_source]
    expected = np.full((32, 16), 0xAA, np.uint8)
    expected[:, :size] = np.where(np.arange(size) < read[:, None], given[:, :size], 0)
    np.testing.assert_array_equal(got, expected)


def test_a_hint_with_an_operand_changes_nothing():
    before = "mov.b64 %rd6, 1;"
    statement = "cp.async.cg.shared.global.L2::cache_hint [%r4], [%rd5], 16, 16, %rd6;"
    given, got = copied(statement, before=before)
    np.testing.assert_array_equal(got, given)


@pytest.mark.parametrize("wait, arrived", [("all", True), ("group 0", True), ("group 7", False)])
def test_waits_of_threads(wait, arrived):
    commit = "" if wait == "all" else "cp.async.commit_group;"
    statement = "cp.async.cg.shared.global [%r4], [%rd5], 16;"
    waits = f"{commit} cp.async.wait_{wait}; {_BACK} cp.async.wait_group 0;"
    given, got = copied(statement, wait=waits.replace(_BACK, ""))
    np.testing.assert_array_equal(got, given)
    x = np.arange(512, dtype=np.uint16).view(np.uint8)[:512].copy()
    given = x.copy()
    run("\n".join([_OWN_16, statement, waits]), x=x)
    assert (x == (given if arrived else 0xFF)).all()


@pytest.mark.parametrize(
    "statement, message",
    [
        ("cp.async.ca.shared.global [%r4], [%rd5], 12;", "copies 4, 8, 16 bytes, not 12"),
        ("cp.async.cg.shared.global [%r4], [%rd5], 8;", "copies 16 bytes, not 8"),
        ("cp.async.cg.shared.global [%r4], [%rd5], %r3;", "wants a number, not"),
        ("cp.async.ca.shared.global [%r4], [%rd5];", "has 2 operands; it takes 3 or 4"),
        ("cp.async.ca.shared.global [%r4], [%rd5], 8, 9;", "9 bytes of the source to 8 of the"),
        ("cp.async.ca.shared.global [%r4+4], [%rd5], 8;", "is not a multiple of 8 bytes"),
        (
            "cp.async.ca.shared.global [%r4], [%rd5+4], 8;",
            "are misaligned: it is no multiple of 8",
        ),
        ("cp.async.ca.shared.global [%r4], [%rd5+512], 8;", "outside every array"),
        ("cp.async.ca.shared.global [%r4+512], [%rd5], 8;", "outside the block's shared memory"),
        ("cp.async.ca.global.shared [%rd5], [%r4], 8;", "does not know cp.async.ca.global"),
        ("cp.async.wait_group %r2;", "wants a number, not"),
    ],
)
def test_what_is_wrong_with_a_copy_names_its_line(statement, message):
    with pytest.raises((ValueError, IndexError, UnsupportedError), match=message) as caught:
        run(_OWN_16 + "\n" + statement, x=np.zeros(128, np.uint32))
    assert "line 20: " in str(caught.value)


# Bulk copies without a tensor map

_BARRIER = """
    .shared .align 8 .b8 barrier[8];
    mov.u32 %r11, barrier;
    setp.eq.u32 %p1, %r1, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r11], 1;
    @%p1 fence.mbarrier_init.release.cluster;
    bar.sync 0;"""
_WAIT = """
AGAIN:
    mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r11], 0;
    @!%p3 bra AGAIN;"""


@pytest.mark.parametrize(
    "statement",
    [
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd1], %r12, "
        "[%r11];",
        "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes.L2::cache_hint [%r3], "
        "[%rd1], 512, [%r11], %rd6;",
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%r3], [%rd1], 512, [%r11], %h1;",
    ],
)
def test_consecutive_bytes_to_shared_memory(statement):
    body = f"""{_OWN_16} {_BARRIER}
    mov.b64 %rd6, 0; mov.u32 %r12, 512; mov.b16 %h1, 1;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r11], 512;
    @%p1 {statement}
    {_WAIT}
    xor.b32 %r2, %r2, 496;
    add.u32 %r4, %r2, %r3;
    {_BACK}"""
    x = np.arange(128, dtype=np.uint32)
    expected = x.reshape(32, 4)[::-1].copy()
    np.testing.assert_array_equal(run(body, x=x).reshape(32, 4), expected)


def stored(*statements: str, dtype, held, given):
    """512 bytes of global memory that hold `held` after stores of `given`, from shared memory."""
    x = np.concatenate([np.asarray(held, dtype), np.asarray(given, dtype)]).view(np.uint32)
    body = f"""{_OWN_16}
    ld.global.v4.u32 {{%r5, %r6, %r7, %r8}}, [%rd5+512];
    st.shared.v4.u32 [%r4], {{%r5, %r6, %r7, %r8}};
    fence.proxy.async.shared::cta;
    bar.sync 0;
    setp.eq.u32 %p1, %r1, 0;
    {" ".join(f"@%p1 {statement}" for statement in statements)}
    @%p1 cp.async.bulk.commit_group;
    @%p1 cp.async.bulk.wait_group.read 0;"""
    return run(body, x=x).view(dtype)[: 512 // np.dtype(dtype).itemsize]


def test_consecutive_bytes_to_global_memory():
    store = "cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r3], 256;"
    got = stored(store, dtype="u4", held=np.zeros(128), given=np.arange(128))
    assert got.tolist() == [*range(64), *[0] * 64]


def _halves(function):
    return lambda held, x: function(held.astype("f4"), x.astype("f4")).astype(held.dtype)


@pytest.mark.parametrize(
    "operation, dtype, makes",
    [
        ("add.f32", "f4", np.add),
        ("add.f64", "f8", np.add),
        ("add.noftz.f16", "f2", _halves(np.add)),
        ("add.noftz.bf16", ml_dtypes.bfloat16, _halves(np.add)),
        ("max.f16", "f2", _halves(np.maximum)),
        ("add.u32", "u4", np.add),
        ("min.s32", "i4", np.minimum),
        ("max.u64", "u8", np.maximum),
        ("inc.u32", "u4", lambda held, x: np.where(held >= x, 0, held + 1)),
        ("and.b32", "u4", np.bitwise_and),
        ("or.b64", "u8", np.bitwise_or),
        ("xor.b32", "u4", np.bitwise_xor),
    ],
)
def test_bulk_reductions(operation, dtype, makes):
    rng = np.random.default_rng(0)
    n = 512 // np.dtype(dtype).itemsize
    held, given = (rng.integers(0, 99, n).astype(dtype) for _ in range(2))
    reduce = f"cp.reduce.async.bulk.global.shared::cta.bulk_group.{operation} [%rd1], [%r3], 512;"
    got = stored(reduce, reduce, dtype=dtype, held=held, given=given)
    expected = makes(makes(held, given), given)
    np.testing.assert_array_equal(got.astype("f8"), expected.astype("f8"))


@pytest.mark.parametrize("pending", [0, 1, 2])
@pytest.mark.parametrize("way", ["", ".read"])
def test_groups_of_bulk_stores_that_are_waited_for(pending, way):
    """Of three groups all but the newest `pending` are written, or with .read have been read."""
    parts = [f"cp.async.bulk.global.shared::cta.bulk_group [%rd1+{64 * i}], [%r3+{64 * i}], 64;"
             for i in range(3)]  # fmt: skip
    body = f"""{_OWN_16}
    mov.u32 %r9, 7;
    st.shared.v4.u32 [%r4], {{%r9, %r9, %r9, %r9}};
    fence.proxy.async.shared::cta;
    bar.sync 0;
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra END;
    {" cp.async.bulk.commit_group; ".join(parts)} cp.async.bulk.commit_group;
    cp.async.bulk.wait_group{way} {pending};
    ld.global.u32 %r5, [%rd1]; ld.global.u32 %r6, [%rd1+64]; ld.global.u32 %r7, [%rd1+128];
    st.global.v2.u32 [%rd1+256], {{%r5, %r6}}; st.global.u32 [%rd1+264], %r7;
    mov.u32 %r9, 8;
    st.shared.u32 [%r3+{64 * (2 - pending)}], %r9;
    cp.async.bulk.wait_group 0;
    ld.global.u32 %r5, [%rd1];
    st.global.u32 [%rd1+268], %r5;
END:"""
    x = run(body, x=np.zeros(128, np.uint32))
    written = 0 if way else 3 - pending
    assert x[64:67].tolist() == [7] * written + [0] * (3 - written)
    assert x[67] == 7 and (x[:48] == 7).all()
    if pending:
        # What a group that was not waited for still reads must not change.
        late = body.replace(f"[%r3+{64 * (2 - pending)}]", f"[%r3+{64 * (3 - pending)}]")
        with pytest.raises(SimulationError, match="changed after the store was issued"):
            run(late, x=np.zeros(128, np.uint32))


@pytest.mark.parametrize(
    "statement, message",
    [
        ("cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r3];", "2 operands; it takes 3"),
        ("cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r3], 24;", "no multiple of 16"),
        ("cp.async.bulk.global.shared::cta.bulk_group [%rd1+8], [%r3], 16;", "no multiple of 16"),
        ("cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r3+8], 16;", "multiple of 16 byt"),
        ("cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r3], 528;", "outside every array"),
        (
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd1], 16;",
            "has 3 operands; it takes 4",
        ),
        (
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd1], 16, "
            "[%r3+8];",
            "mbarrier_init has not made it one",
        ),
        (
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
            "[%r3], [%rd1], 16, [%r3+8], 3;",
            "to the block of rank 1: the cluster of block .* has ranks up to 0",
        ),
        (
            "cp.reduce.async.bulk.global.shared::cta.bulk_group.min.f32 [%rd1], [%r3], 16;",
            "there is no .min of .f32",
        ),
        (
            "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f16 [%rd1], [%r3], 16;",
            "needs .noftz",
        ),
        ("cp.async.bulk.wait_group %r2;", "wants a number, not"),
        ("cp.async.bulk.wait_group;", "has 0 operands; it takes 1"),
    ],
)
def test_what_is_wrong_with_a_bulk_copy_names_its_line(statement, message):
    errors = (ValueError, IndexError, UnsupportedError, SimulationError)
    with pytest.raises(errors, match=message) as caught:
        run(_OWN_16 + "\n" + statement, x=np.zeros(128, np.uint32))
    assert "line 20: " in str(caught.value)


# Tiles of tensors

_PARAMETERS = ".param .u64 x, .param .u32 n, .param .align 64 .b8 map[128]"
_MAP = """
    mov.b32 %r5, map;
    cvt.u64.u32 %rd4, %r5;
    cvta.param.u64 %rd5, %rd4;
    mov.u32 %r6, 0;"""
_ONES = """
    .shared .align 128 .b8 room[128];
    mov.u32 %r2, room;
    shl.b32 %r3, %r1, 2;
    add.u32 %r4, %r2, %r3;
    mov.u32 %r9, 7;
    st.shared.u32 [%r4], %r9;
    fence.proxy.async.shared::cta;
    bar.warp.sync -1;
    setp.eq.u32 %p1, %r1, 0;"""


def with_map(body: str, x: np.ndarray, layout: TensorLayout) -> np.ndarray:
    arguments = [x, 0, SimulatedTensorMap(x, layout)]
    numflash.run_ptx(module(body, _PARAMETERS), None, 1, 32, arguments)
    return x


@pytest.mark.parametrize("way", ["", ".read"])
def test_bulk_stores_are_over_or_have_only_read(way):
    body = f"""{_ONES} {_MAP}
    @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd5, {{%r6, %r6}}], [%r2];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group{way} 0;
    bar.warp.sync -1;
    ld.global.u32 %r7, [%rd3];
    st.global.u32 [%rd3+128], %r7;"""
    x = np.zeros((2, 32), np.float32)
    with_map(body, x, TensorLayout("float32", (32, 1), (128,), (32, 1)))
    stored, seen = x.view(np.uint32)
    # Only who waits for writes may read them; otherwise they come as late as they can.
    assert (stored == 7).all() and (seen == (0 if way else 7)).all()


@pytest.mark.parametrize(
    "operation, dtype, makes",
    [
        ("add", "float32", lambda held, x: held + x),
        ("add", "float16", lambda held, x: held + x),
        ("min", "bfloat16", np.minimum),
    ],
)
def test_reductions_of_tiles(operation, dtype, makes):
    """A tile over the edge of its tensor: what lies outside is not touched."""
    type_ = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    width = 128 // type_.itemsize
    ones = np.float32(1).tobytes() if dtype == "float32" else np.full(2, 1, type_).tobytes()
    body = f"""{_ONES.replace("mov.u32 %r9, 7", f"mov.b32 %r9, {int.from_bytes(ones, 'little')}")}
    {_MAP}
    mov.u32 %r6, {width // 2};
    mov.u32 %r7, 1;
    @%p1 cp.reduce.async.bulk.tensor.2d.global.shared::cta.{operation}.tile.bulk_group \
[%rd5, {{%r6, %r7}}], [%r2];
    @%p1 cp.async.bulk.commit_group;
    @%p1 cp.async.bulk.wait_group 0;"""
    x = np.arange(3 * width).reshape(3, width).astype(type_)
    expected = x.copy()
    expected[1, width // 2 :] = makes(expected[1, width // 2 :], type_.type(1))
    with_map(body, x, TensorLayout(dtype, (width, 3), (128,), (width, 1)))
    np.testing.assert_array_equal(x.astype("f4"), expected.astype("f4"))


@pytest.mark.parametrize("multicast", ["", ".multicast::cluster"])
def test_tiles_of_one_dimension(multicast):
    """Loaded from element 5 on, over the end of the tensor, and stored from element 16 on."""
    body = f"""{_ONES} {_MAP} {_BARRIER}
    mov.u32 %r6, 5; mov.u32 %r7, 48; mov.b16 %h1, 1;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r11], 128;
    @%p1 cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes{multicast} \
[%r2], [%rd5, {{%r6}}], [%r11]{", %h1" if multicast else ""};
    {_WAIT}
    @%p1 cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [%rd5, {{%r7}}], [%r2];
    @%p1 cp.async.bulk.commit_group;
    @%p1 cp.async.bulk.wait_group.read 0;"""
    x = np.arange(1, 65, dtype=np.float32)
    layout = TensorLayout("float32", (60,), (), (32,), 0)
    expected = [*range(1, 49), *range(6, 18), *range(61, 65)]
    assert with_map(body, x, layout).tolist() == expected


@pytest.mark.parametrize(
    "statement, message",
    [
        (
            "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%rd5, {%r6}], "
            "[%r2];",
            "wants 2 coordinates, there are 1",
        ),
        (
            "cp.reduce.async.bulk.tensor.2d.global.shared::cta.mul.bulk_group "
            "[%rd5, {%r6, %r6}], [%r2];",
            "there is no .mul of .f32",
        ),
        (
            "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%rd5, {%r6, %r6}], [%r2];",
            "with these operands",
        ),
        (
            "cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [%rd1, {%r6}], [%r2];",
            "there is no tensor map at",
        ),
    ],
)
def test_what_is_wrong_with_a_tile_names_its_line(statement, message):
    x = np.zeros((2, 32), np.float32)
    layout = TensorLayout("float32", (32, 1), (128,), (32, 1))
    with pytest.raises((ValueError, UnsupportedError, SimulationError), match=message) as caught:
        with_map(f"{_ONES}{_MAP}\n{statement}", x, layout)
    assert "line 27: " in str(caught.value)
