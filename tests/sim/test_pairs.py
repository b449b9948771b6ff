"""Neighbouring keys read at once: right on every kernel that does, also at the last, odd key."""

import ml_dtypes
import numpy as np
import pytest

import numflash
from numflash import masks
from numflash.calls import ready
from numflash.problem import programs
from tests.support.attention_cases import SMALL_CONFIGS
from tests.support.covering import some
from tests.support.faults import Mutation, load

FP8 = {"precision": "fp8"}
# The GPU, the options that lead to a kernel, head_dim, and whether there are gradients.
KERNELS = {
    "sm80": ("sm_80", {"config": SMALL_CONFIGS["sm80"][1]}, 16, True),
    "sm80-one-backward": ("sm_80", {"config": SMALL_CONFIGS["sm80"][4]}, 16, True),
    "sm90": ("sm_90a", {"config": {"forward": "sm90-m64n32w4s1x2-overlap"}}, 32, False),
    "fp8": ("sm_89", {"config": {"forward": "fp8-sm89-m16n64w1s1"}, **FP8}, 32, False),
    "fp8-sm90": ("sm_90a", {"config": {"forward": "fp8-sm90-m64n64w4s2"}, **FP8}, 32, False),
}
ROWS = 19


def padded(array):
    """The array whose rows begin at even distances, and whose last element is the last of all."""
    *rest, n = array.shape
    pitch = n + n % 2
    room = np.zeros(int(np.prod(rest)) * pitch - pitch + n, array.dtype)
    assert room.__array_interface__["data"][0] % 16 == 0
    steps = [pitch * int(np.prod(rest[axis + 1 :])) for axis in range(len(rest))]
    strides = [array.itemsize * step for step in (*steps, 1)]
    view = np.lib.stride_tricks.as_strided(room, array.shape, strides)
    view[...] = array
    return view


def inputs(head_dim, keys):
    rng = np.random.default_rng(3)
    shapes = (ROWS, 2), (keys, 1), (keys, 1), (ROWS, 2)
    return [rng.standard_normal((1, *x, head_dim)).astype(np.float16) for x in shapes]


def table_of_keys(score, batch, head, q_idx, kv_idx, table, kinds, numbers):
    return score * table[head, kv_idx] + 0.25 * numbers[kv_idx]


def same_kind(batch, head, q_idx, kv_idx, table, kinds, numbers):
    return (kinds[kv_idx] != 2) | (q_idx == kv_idx)


def options_of(name, keys):
    """The options of a case; its first one says how arrays are read."""
    rng = np.random.default_rng(7)

    def normal(*shape, dtype=np.float16):
        return rng.standard_normal(shape).astype(dtype)

    def kept(*shape):
        return rng.random(shape) < 0.7

    return {
        "bias": lambda: {"bias": padded(normal(1, 2, ROWS, keys))},
        "bias of all rows": lambda: {"bias": padded(normal(2, 1, keys, dtype=np.float32))},
        "bias and mask": lambda: {
            "bias": padded(normal(ROWS, keys, dtype=ml_dtypes.bfloat16)),
            "mask": padded(kept(1, 2, ROWS, keys)),
        },
        "after softcap and alibi": lambda: {
            "bias": padded(normal(2, ROWS, keys)),
            "softcap": 2.0,
            "alibi_slopes": np.array([0.5, 0.25], np.float32),
        },
        "aux": lambda: {
            "score_mod": table_of_keys,
            "mask_mod": same_kind,
            "aux": (
                padded(normal(2, keys)),
                rng.integers(0, 4, keys).astype(np.uint8),
                rng.integers(-3, 4, keys).astype(np.int32),
            ),
        },
        "beside what is read one by one": lambda: {
            "bias": padded(normal(2, ROWS, keys)),
            "mask_mod": masks.document,
            "aux": (rng.integers(0, 3, max(keys, ROWS)).astype(np.int64),),
        },
    }[name]()


CASES = (
    "bias",
    "bias of all rows",
    "bias and mask",
    "after softcap and alibi",
    "aux",
    "beside what is read one by one",
)


@pytest.fixture
def read(monkeypatch):
    """The texts of the programs of the calls in a test."""
    texts = []

    def with_pairs(*given):
        texts.append(original(*given))
        return texts[-1]

    original = programs.with_pairs
    monkeypatch.setattr(programs, "with_pairs", with_pairs)
    monkeypatch.setattr(ready, "_ready", {})
    return texts


# Every case on one kernel, with gradients; the others take every second one.
BOTH = [
    (kernel, name)
    for k, kernel in enumerate(KERNELS)
    for n, name in enumerate(CASES)
    if kernel == "sm80" or (n + k) % 2
]


@pytest.mark.parametrize(("kernel", "name"), some(BOTH, every=13))
def test_pairs_are_within_budget(on, read, kernel, name):
    """An odd number of keys, the last of which is alone, and with one kernel an even one."""
    arch, options, head_dim, has_gradients = KERNELS[kernel]
    on(arch)
    keys = 36 if kernel == "sm80-one-backward" else 37
    q, k, v, dout = inputs(head_dim, keys)
    dout = dout if has_gradients else None
    report = numflash.check(q, k, v, dout=dout, **options_of(name, keys), **options)
    assert report.passed, f"\n{report}"
    assert read and all(program.pairs for program in read)


@pytest.mark.parametrize("column", [4, 3])
def test_a_part_that_begins_at_any_key(on, read, column):
    """The share of keys that begin at an even number is read by pairs, of an odd one it is not."""
    on("sm_80")
    q, k, v, _ = inputs(16, 20)
    bias = np.random.default_rng(1).standard_normal((2, ROWS, 20 + column)).astype(np.float32)
    bias = padded(bias)
    config = {"forward": SMALL_CONFIGS["sm80"][1]["forward"]}
    part = numflash.attention(q, k, v, bias=bias, origin=(0, column, 0), config=config)
    assert [bool(program.pairs) for program in read] == [column % 2 == 0]
    whole = numflash.attention(q, k, v, bias=bias[..., column:].copy(), config=config)
    np.testing.assert_allclose(part, whole, rtol=2e-3, atol=2e-3)


FEATURES, PROGRAMS = "numflash.tiles.features", "numflash.tiles.programs"
PAIRS = "numflash.tiles.pairs"
MMA, FORWARD = "numflash.tiles.mma.scores", "numflash.kernels.mma.forward"
FAULTS = {
    "the pair behind the last key": (
        MMA,
        Mutation(
            "left", "left = i32(corner.sequence.seqlen_k - corner.column - c)", "left = i32(2)"
        ),
    ),
    "the last key forgotten": (
        MMA,
        Mutation(
            "left",
            "i32(corner.sequence.seqlen_k - corner.column - c)",
            "i32(corner.sequence.seqlen_k - 1 - corner.column - c)",
        ),
    ),
    "a query behind the last": (
        MMA,
        Mutation("row", 'in (stopped - {"j"}, stopped)', "in (frozenset(), stopped)"),
    ),
    "the second for the first": (
        PROGRAMS,
        Mutation(
            "first", "cvt_f32_f16(u16(pair & u32(0xFFFF)))", "cvt_f32_f16(u16(pair >> u32(16)))"
        ),
    ),
    "an odd key first": (MMA, Mutation("step", "i64(c)\n", "i64(c + 1)\n")),
    "a pair of the row above": (
        MMA,
        Mutation(
            "row",
            "scale_pair(s_acc, slopes, e + 2, r + ROW_STEP, c",
            "scale_pair(s_acc, slopes, e + 2, r, c",
        ),
    ),
}


@pytest.mark.parametrize("name", [None, *FAULTS])
def test_a_fault_is_found(on, monkeypatch, name):
    on("sm_80")
    if name is not None:
        load((PROGRAMS, FEATURES, PAIRS, MMA, FORWARD), *FAULTS[name], monkeypatch)
    q, k, v, _ = inputs(16, 33)
    options = {"config": {"forward": SMALL_CONFIGS["sm80"][1]["forward"]}}
    bias = padded(np.random.default_rng(1).standard_normal((ROWS, 33)).astype(np.float16))
    try:
        passed = numflash.check(q, k, v, bias=bias, **options).passed
    except (IndexError, ValueError) as error:
        assert "bias" in str(error) and name is not None
        passed = False
    assert passed == (name is None)
