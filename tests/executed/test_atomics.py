"""`atom` and `red`: every operation and type, lanes that meet and lanes that do not."""

from collections import Counter

import ml_dtypes
import numpy as np
import pytest

from numflash.runtime.errors import UnsupportedError
from tests.executed.by_hand import run

BF16 = ml_dtypes.bfloat16


def _add16(held, x):
    return (held.astype("f4") + x.astype("f4")).astype(held.dtype)


# Opcode without its head -> element type, elements of a register, what is there first, what the
# lanes give, and what one of them makes of both.
CASES = {
    "global.add.u32": ("u4", 1, 7, range(32), lambda o, x: o + x),
    "global.relaxed.gpu.add.s32": ("i4", 1, -7, range(-9, 23), lambda o, x: o + x),
    "shared.inc.u32": ("u4", 1, 3, [5] * 32, lambda o, x: 0 if o >= x else o + 1),
    "global.dec.u32": ("u4", 1, 3, [5] * 32, lambda o, x: x if o == 0 or o > x else o - 1),
    "global.acq_rel.sys.min.s32": ("i4", 1, 3, range(-16, 16), min),
    "shared::cta.max.u32": ("u4", 1, 3, range(32), max),
    "global.and.b32": ("u4", 1, 2**32 - 1, [~(1 << i) % 2**32 for i in range(32)], np.bitwise_and),
    "global.or.b64": ("u8", 1, 0, [1 << 2 * i for i in range(32)], np.bitwise_or),
    "shared.xor.b32": ("u4", 1, 9, range(32), np.bitwise_xor),
    "global.release.cta.exch.b32": ("u4", 1, 99, range(32), lambda o, x: x),
    "global.exch.b64": ("u8", 1, 2**60, range(32), lambda o, x: x),
    "add.u64": ("u8", 1, 2**40, range(32), lambda o, x: o + x),
    "global.max.s64": ("i8", 1, -(2**40), range(-16, 16), max),
    "global.relaxed.cluster.add.f32": ("f4", 1, 0.5, range(32), lambda o, x: o + x),
    "shared::cluster.add.f64": ("f8", 1, 0.1, np.arange(32) / 3, lambda o, x: o + x),
    "global.add.noftz.f16": ("f2", 1, 0.5, np.arange(32) / 3, _add16),
    "global.add.noftz.f16x2": ("f2", 2, 0.5, np.arange(64) / 3, _add16),
    "shared.add.noftz.bf16x2": (BF16, 2, 0.5, np.arange(64) / 3, _add16),
}


def _place(opcode: str) -> tuple[str, str]:
    """(an address that the opcode takes, what to do before)."""
    if "shared" not in opcode:
        return "%rd1", ""
    return "room", "ld.global.b64 %rd4, [%rd1]; st.shared.b64 [room], %rd4; bar.sync 0;"


def _executed(head: str, opcode: str, dtype, per_register: int, first, given, *more: str):
    """(what lanes got, what is there in the end) of lanes that all name the same element."""
    dtype = np.dtype(dtype)
    size = dtype.itemsize * per_register
    x = np.zeros(1024, np.uint8)
    x[:size].view(dtype)[:] = first
    x[256 : 256 + 32 * size].view(dtype)[:] = np.array(given).astype(dtype)
    register = {2: "%h", 4: "%r", 8: "%rd"}[size]
    place, before = _place(opcode)
    result = f"{register}8, " if head == "atom" else ""
    body = f"""
    {before}
    mul.wide.u32 %rd2, %r1, {size};
    add.s64 %rd3, %rd1, %rd2;
    ld.global.b{8 * size} {register}7, [%rd3+256];
    mov.b{8 * size} {register}8, 0;
    {head}.{opcode} {result}[{place}], {"".join(f"{m}, " for m in more)}{register}7;
    st.global.b{8 * size} [%rd3+512], {register}8;
    bar.sync 0;
    {"ld.shared.b64 %rd4, [room]; st.global.b64 [%rd1], %rd4;" if before else ""}"""
    run(body, x=x, declares=".shared .align 8 .b8 room[8];")
    return x[512 : 512 + 32 * size].view(dtype).reshape(32, -1), x[:size].view(dtype)


@pytest.mark.parametrize("opcode", CASES)
def test_lanes_that_meet_come_one_after_the_other(opcode):
    dtype, per_register, first, given, makes = CASES[opcode]
    got, last = _executed("atom", opcode, dtype, per_register, first, given)
    given = np.array(given).astype(dtype).reshape(32, per_register)
    # Whatever their order, each lane finds what another left, but one what was there first.
    for column in range(per_register):
        with np.errstate(over="ignore"):
            left = [
                np.dtype(dtype).type(makes(held, x))
                for held, x in zip(got[:, column], given[:, column], strict=True)
            ]
        found = Counter([*got[:, column].tolist(), last[column].item()])
        assert found == Counter([np.dtype(dtype).type(first).item(), *(x.item() for x in left)])


@pytest.mark.parametrize("opcode", [name for name in CASES if "exch" not in name])
def test_red_does_the_same_and_gives_nothing(opcode):
    dtype, per_register, first, given, makes = CASES[opcode]
    opcode = opcode.replace("acq_rel", "release")
    _, last = _executed("red", opcode, dtype, per_register, first, given)
    expected = np.full(per_register, first, dtype)
    for x in np.array(given).astype(dtype).reshape(32, per_register):
        with np.errstate(over="ignore"):
            expected = [
                np.dtype(dtype).type(makes(o, y)) for o, y in zip(expected, x, strict=True)
            ]
    # The order of floats shows in their last bits.
    few = {"f2": 2**-8, BF16: 2**-5}.get(dtype, 1e-6)
    np.testing.assert_allclose(last.astype("f8"), np.array(expected).astype("f8"), rtol=few)


def test_compare_and_swap():
    """Lane after lane takes its turn: each swaps its own number for the next."""
    body = """
    mov.u32 %r2, 0;
AGAIN:
    add.u32 %r3, %r1, 1;
    atom.global.relaxed.gpu.cas.b32 %r4, [%rd1], %r1, %r3;
    setp.ne.u32 %p1, %r4, %r1;
    @%p1 bra AGAIN;
    st.global.u32 [%rd3+128], %r4;"""
    x = run(body)
    assert x[0] == 32 and x[32:].tolist() == list(range(32))


@pytest.mark.parametrize(
    "opcode, n_registers, dtype, register",
    [
        ("global.add.v2.f32", 2, "f4", "f"),
        ("global.relaxed.gpu.add.v4.f32", 4, "f4", "f"),
        ("add.noftz.v4.f16x2", 4, "f2", "r"),
        ("global.max.noftz.v2.bf16x2", 2, BF16, "r"),
        ("global.add.noftz.v8.f16", 8, "f2", "h"),
    ],
)
def test_vectors(opcode, n_registers, dtype, register):
    """All lanes but the last at elements of their own, and those of lane 0 once more."""
    dtype = np.dtype(dtype)
    n = n_registers * (2 if "x2" in opcode else 1)
    n_bytes = n * dtype.itemsize
    rng = np.random.default_rng(0)
    x = rng.integers(-8, 9, 2 * 32 * n).astype(dtype)
    registers = ", ".join(f"%{register}{i}" for i in range(2, 2 + n_registers))
    size = n_bytes // n_registers
    loads = "".join(
        f"ld.global.b{8 * size} %{register}{2 + i}, [%rd5+{i * size}];" for i in range(n_registers)
    )
    body = f"""
    setp.eq.u32 %p1, %r1, 31;
    selp.u32 %r15, 0, %r1, %p1;
    mul.wide.u32 %rd4, %r1, {n_bytes};
    add.s64 %rd5, %rd1, %rd4;
    add.s64 %rd5, %rd5, {32 * n_bytes};
    mul.wide.u32 %rd6, %r15, {n_bytes};
    add.s64 %rd7, %rd1, %rd6;
    {loads}
    red.{opcode} [%rd7], {{{registers}}};"""
    before = x.copy().reshape(2, 32, n)
    run(body, x=x.view("u4"))
    combine = np.maximum if "max" in opcode else np.add
    expected = combine(before[0], before[1])
    expected[31] = before[0, 31]
    expected[0] = combine(expected[0], before[1, 31])
    np.testing.assert_array_equal(x.reshape(2, 32, n)[0].astype("f4"), expected.astype("f4"))


def test_the_order_of_lanes_is_that_of_the_seed():
    body = "atom.global.exch.b32 %r2, [%rd1], %r1;"
    last = [int(run(body, seed=seed)[0]) for seed in range(16)]
    assert len(set(last)) > 4
    assert last == [int(run(body, seed=seed)[0]) for seed in range(16)]


@pytest.mark.parametrize("space, expected", [("global", 0), ("shared", 3)])
def test_sums_in_global_memory_flush_subnormal_numbers(space, expected):
    """PTX ISA 9.7.13.6; 16-bit floats do not, as .noftz says."""
    tiny = np.float32(2.0**-149)
    first = tiny
    _, last = _executed("red", f"{space}.add.f32", "f4", 1, first, [2 * tiny] + [0] * 31)
    assert last.view("u4")[0] == expected
    # The difference of normal numbers may be subnormal.
    first, other = np.float32(1.5 * 2.0**-126), np.float32(-(2.0**-126))
    got, last = _executed("atom", f"{space}.add.f32", "f4", 1, first, [other] * 2 + [0] * 30)
    left = {float(first), 0.0, -(2.0**-126)}
    if space == "shared":
        left = {float(first), 2.0**-127, -(2.0**-127)}
    assert {*map(float, got[:, 0]), float(last[0])} == left
    tiny = np.float16(2.0**-24)
    _, last = _executed("red", f"{space}.add.noftz.f16", "f2", 1, tiny, [2 * tiny] + [0] * 31)
    assert last.view("u2")[0] == 3


@pytest.mark.parametrize(
    "statement, message",
    [
        ("atom.global.add.u32 [%rd3], %r2;", "atom.global.add.u32 has 2 operands; it takes 3"),
        ("red.global.add.u32 [%rd3], %r2, %r3;", "has 3 operands; it takes 2"),
        ("atom.global.cas.b32 %r2, [%rd3], %r3;", "has 3 operands; it takes 4"),
        ("red.global.add.f32 %rd3, %f2;", r"wants \[an address\] before its values"),
        ("red.global.add.f32 [%rd3], {%f1, %f2};", "wants 1 registers, there are 2"),
        ("red.global.add.v4.f32 [%rd3], {%f1, %f2};", "wants 4 registers, there are 2"),
        ("red.global.add.v4.u32 [%rd3], {%r1, %r2, %r3, %r4};", "vectors are floats in global"),
        ("red.shared.add.v2.f32 [%r2], {%f1, %f2};", "vectors are floats in global memory"),
        ("red.global.add.f16x2 [%rd3], %r2;", ".add.f16x2 needs .noftz"),
        ("red.global.add.noftz.f32 [%rd3], %f2;", ".add.f32 has no .noftz"),
        ("red.global.and.u32 [%rd3], %r2;", "there is no .and of .u32"),
        ("red.global.min.f32 [%rd3], %f2;", "there is no .min of .f32"),
        ("red.global.inc.s32 [%rd3], %r2;", "there is no .inc of .s32"),
        ("red.global.acquire.gpu.add.u32 [%rd3], %r2;", "know red.*: .acquire"),
        ("red.global.mul.u32 [%rd3], %r2;", "does not know red.global.mul.u32: .mul"),
        ("red.global.add.v2.f32 [%rd1+4], {%f1, %f2};", "8-byte access to global .*misaligned"),
        ("red.global.add.u32 [%rd1+256], %r2;", "line 13: .*outside every array"),
    ],
)
def test_what_is_wrong_names_its_line(statement, message):
    with pytest.raises((UnsupportedError, ValueError, IndexError), match=message) as caught:
        run(statement)
    assert "line 13: " in str(caught.value)
