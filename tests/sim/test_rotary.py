"""Rotary embeddings in the simulator, against float64.

Results begin as NaN, and what lies around the inputs is NaN.
"""

import itertools
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

import numflash
from numflash import reference
from numflash.calls import launch, ready
from numflash.calls import rotary as calls
from numflash.configs import RotaryConfig
from numflash.runtime.numpy_arrays import NumPy
from numflash.runtime.views import numpy_dtype
from tests.support.covering import some

ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class Case:
    """A call; `form` is how x lies in memory."""

    shape: tuple[int, ...]
    rotary_dim: int
    dtype: str = "float16"
    tables: str = "float32"
    interleaved: bool = False
    conjugate: bool = False
    offset: int = 0
    layout: str = "bshd"
    form: str = "plain"

    def __str__(self):
        shape = "x".join(map(str, self.shape))
        flags = [name for name in ("interleaved", "conjugate") if getattr(self, name)]
        return "-".join([shape, f"r{self.rotary_dim}", self.dtype, self.tables, *flags, self.form])

    @property
    def options(self) -> dict:
        return {
            "interleaved": self.interleaved,
            "conjugate": self.conjugate,
            "offsets": self.offset,
            "layout": self.layout,
        }

    def arrays(self):
        """(x, cos, sin)."""
        rng = np.random.default_rng(sum(self.shape))
        x = placed(rng.standard_normal(self.shape).astype(numpy_dtype(self.dtype)), self.form)
        seqlen = self.shape[-2] if self.layout == "bhsd" else self.shape[max(0, x.ndim - 3)]
        tables = seqlen + self.offset, self.rotary_dim
        return x, *numflash.rotary_tables(*tables, dtype=self.tables)


def placed(x, form):
    """The same numbers amid NaN, lying in memory in another way."""
    if form == "plain":
        return x
    if form == "spread":
        whole = np.full([2 * n + 1 for n in x.shape[:-1]] + [x.shape[-1] + 16], np.nan, x.dtype)
        view = whole[(*[slice(1, None, 2)] * (x.ndim - 1), slice(8, 8 + x.shape[-1]))]
        view[...] = x
        return view
    if form == "unaligned":
        whole = np.full(x.size + 1, np.nan, x.dtype)
        whole[1:] = x.ravel()
        return whole[1:].reshape(x.shape)
    assert form == "columns"
    whole = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan, x.dtype)
    whole[..., ::2] = x
    return whole[..., ::2]


CASES = [
    Case((2, 5, 3, 64), 64),
    Case((2, 5, 3, 64), 64, interleaved=True),
    Case((1, 7, 5, 128), 64, "bfloat16", interleaved=True, conjugate=True, offset=3),
    Case((1, 7, 5, 128), 64, "bfloat16", "bfloat16", conjugate=True, offset=3),
    Case((1, 33, 1, 32), 32, "float32"),
    Case((1, 33, 1, 40), 24, "float32", interleaved=True, offset=70),
    Case((2, 3, 4, 256), 256, "float16", "float16"),
    Case((1, 3, 9, 256), 32, "float32"),
    Case((1, 23, 2, 96), 96, "bfloat16", interleaved=True),
    # Sizes that no vector divides: pair by pair.
    Case((2, 5, 3, 20), 6),
    Case((2, 5, 3, 20), 20, "float32", interleaved=True),
    Case((1, 5, 2, 1 + 2), 2, "bfloat16", conjugate=True),
    Case((1, 5, 2, 64), 8, "float16", interleaved=True),
    Case((1, 1, 1, 2), 2, "float32"),
    # Layouts, fewer axes, strides.
    Case((2, 3, 5, 64), 48, layout="bhsd", form="spread"),
    Case((2, 5, 3, 64), 64, interleaved=True, form="spread"),
    Case((2, 5, 3, 64), 64, form="unaligned"),
    Case((2, 5, 3, 64), 32, "bfloat16", form="columns"),
    Case((5, 3, 64), 64, "float32", interleaved=True),
    Case((3, 5, 64), 64, "float16", layout="bhsd"),
    Case((5, 64), 16, "float16", form="columns"),
]


VECTORIZED = {0: True, 2: True, 9: False, 12: False, 14: True, 16: False}


@pytest.fixture(autouse=True)
def poisoned_results(monkeypatch):
    """NaN wherever a kernel leaves a result out."""
    monkeypatch.setattr(ready, "_ready", {})
    empty = NumPy.empty

    def poisoned(self, shape, dtype, device):
        array = empty(self, shape, dtype, device)
        array.view(np.uint8)[...] = 0xFF
        return array

    monkeypatch.setattr(NumPy, "empty", poisoned)


@pytest.fixture
def built(monkeypatch):
    """The (config, traits) of each launcher that is made."""
    found = []

    class Launcher(launch.Launcher):
        def __init__(self, config, traits, *rest):
            found.append((config, traits))
            super().__init__(config, traits, *rest)

    monkeypatch.setattr(calls, "Launcher", Launcher)
    return found


def expect_close(got, x, cos, sin, **options):
    """Rounded once, after products in float32; columns behind rotary_dim are bits of x."""
    wanted = reference.apply_rotary(x, cos, sin, **options)
    assert (got.shape, got.dtype) == (x.shape, x.dtype)
    half = cos.shape[1]
    # Of the terms of a row, which may cancel.
    size = np.abs(np.asarray(x, np.float64)[..., : 2 * half]).max(-1, keepdims=True)
    budget = ROUNDING[x.dtype.name] * np.abs(wanted) + 8 * 2.0**-24 * size
    error = np.abs(got.astype(np.float64) - wanted)
    assert (error <= budget).all(), float((error - budget).max())
    np.testing.assert_array_equal(got[..., 2 * half :], x[..., 2 * half :])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_rotated_as_in_float64(case):
    x, cos, sin = case.arrays()
    before = x.copy()
    got = numflash.apply_rotary(x, cos, sin, **case.options)
    expect_close(got, x, cos, sin, **case.options)
    np.testing.assert_array_equal(x, before)


IN_PLACE = [c for c in CASES if c.form != "columns"]


@pytest.mark.parametrize("case", some(IN_PLACE, every=4), ids=str)
def test_in_place_has_the_same_bits(case):
    x, cos, sin = case.arrays()
    wanted = numflash.apply_rotary(x, cos, sin, **case.options)
    assert numflash.apply_rotary(x, cos, sin, out=x, **case.options) is x
    np.testing.assert_array_equal(x, wanted)


@pytest.mark.parametrize(
    ("case", "is_vectorized"),
    [(CASES[i], is_vectorized) for i, is_vectorized in VECTORIZED.items()],
    ids=str,
)
def test_aligned_rows_are_read_16_bytes_at_a_time(built, case, is_vectorized):
    x, cos, sin = case.arrays()
    numflash.apply_rotary(x, cos, sin, **case.options)
    assert [traits.vectorized for _, traits in built] == [is_vectorized]
    assert built[0][0].interleaved is case.interleaved


@pytest.mark.parametrize("which", ["cos", "sin"])
@pytest.mark.parametrize("way", ["unaligned", "rows", "columns"])
def test_tables_may_lie_anyhow(built, which, way):
    x, cos, sin = Case((1, 6, 3, 32), 32).arrays()
    wanted = numflash.apply_rotary(x, cos, sin)
    tables = {"cos": cos, "sin": sin}
    table = tables[which]
    if way == "rows":
        whole = np.full((6, 19), np.nan, np.float32)
        whole[:, :16], tables[which] = table, whole[:, :16]
    else:
        tables[which] = placed(table, way)
    got = numflash.apply_rotary(x, tables["cos"], tables["sin"])
    np.testing.assert_array_equal(got, wanted)
    # Tables without contiguous rows are copied, and so aligned.
    assert [traits.vectorized for _, traits in built] == [True, way == "columns"]


@pytest.mark.parametrize(("form", "is_vectorized"), [("spread", True), ("unaligned", False)])
def test_out_may_lie_anyhow(built, form, is_vectorized):
    x, cos, sin = Case((2, 6, 3, 32), 16).arrays()
    wanted = numflash.apply_rotary(x, cos, sin)
    out = placed(np.zeros_like(x), form)
    whole = out
    while whole.base is not None:
        whole = whole.base
    assert numflash.apply_rotary(x, cos, sin, out=out) is out
    np.testing.assert_array_equal(out, wanted)
    assert np.isnan(whole).sum() == whole.size - out.size
    assert [traits.vectorized for _, traits in built] == [True, is_vectorized]


def test_both_conventions_are_one_rotation_of_other_columns():
    x, cos, sin = Case((1, 6, 3, 32), 32, "float32").arrays()
    halves = numflash.apply_rotary(x, cos, sin)
    order = np.arange(32).reshape(2, 16).T.ravel()
    pairs = numflash.apply_rotary(x[..., order], cos, sin, interleaved=True)
    np.testing.assert_array_equal(pairs, halves[..., order])


@pytest.mark.parametrize("interleaved", [False, True])
def test_conjugate_is_the_gradient(interleaved):
    """Of a loss sum(dout * result), by finite differences: the rotation is linear in x."""
    case = Case((1, 5, 2, 12), 8, "float32", interleaved=interleaved, offset=2)
    x, cos, sin = case.arrays()
    scaled = np.float32(1.5) * cos, np.float32(1.5) * sin  # as YaRN's
    options = {"interleaved": interleaved, "offsets": 2}
    dout = np.random.default_rng(3).standard_normal(x.shape).astype(np.float32)
    dx = numflash.apply_rotary(dout, *scaled, conjugate=True, **options)
    for index in np.ndindex(x.shape):
        step = np.zeros(x.shape)
        step[index] = 0.5
        ends = (reference.apply_rotary(x + s, *scaled, **options) for s in (step, -step))
        difference = np.subtract(*ends)
        assert abs(dx[index] - (dout * difference).sum()) < 1e-5


def test_scores_depend_on_distances_alone():
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 64)).astype(np.float32)
    cos, sin = numflash.rotary_tables(200, 64)

    def score(at_q, at_k):
        rotated = (
            numflash.apply_rotary(x, cos, sin, offsets=n) for x, n in ((q, at_q), (k, at_k))
        )
        return float(np.multiply(*rotated).sum())

    assert score(120, 100) == pytest.approx(score(25, 5), abs=1e-4)
    assert score(120, 100) != pytest.approx(score(26, 5), abs=1e-2)


# Positions


@pytest.mark.parametrize("interleaved", [False, True])
def test_each_batch_entry_has_an_offset(interleaved):
    x, cos, sin = Case((3, 6, 2, 32), 16, offset=20).arrays()
    offsets = np.array([20, 0, 7], np.int32)
    options = {"offsets": offsets, "interleaved": interleaved}
    got = numflash.apply_rotary(x, cos, sin, **options)
    expect_close(got, x, cos, sin, **options)
    one_by_one = [
        numflash.apply_rotary(x[i : i + 1], cos, sin, offsets=int(n), interleaved=interleaved)
        for i, n in enumerate(offsets)
    ]
    np.testing.assert_array_equal(got, np.concatenate(one_by_one))


PACKED = [[0, 9], [0, 4, 9], [0, 1, 1, 1, 8, 9, 9], [0, 0, 0, 9], [0, 2, 3, 4, 5, 6, 7, 8, 9]]


@pytest.mark.parametrize("bounds", PACKED, ids=str)
@pytest.mark.parametrize("layout", some(["bshd", "bhsd"], "bshd"))
def test_sequences_of_a_packed_array_begin_at_their_own_positions(bounds, layout):
    x, cos, sin = Case((9, 3, 32), 32, "float32", offset=9).arrays()
    x = np.ascontiguousarray(x.swapaxes(0, 1)) if layout == "bhsd" else x
    for offsets in (0, 9, np.arange(len(bounds) - 1, dtype=np.int32)):
        options = {"offsets": offsets, "layout": layout}
        options["cu_seqlens"] = np.array(bounds, np.int32)
        got = numflash.apply_rotary(x, cos, sin, **options)
        expect_close(got, x, cos, sin, **options)


def test_tokens_in_no_sequence_are_copied():
    x, cos, sin = Case((9, 3, 32), 16, "float32", offset=9).arrays()
    bounds = np.array([2, 4, 7], np.int32)
    for offset in (0, 9):
        options = {"cu_seqlens": bounds, "offsets": offset}
        got = numflash.apply_rotary(x, cos, sin, **options)
        expect_close(got, x, cos, sin, **options)
        for outside in (slice(0, 2), slice(7, 9)):
            np.testing.assert_array_equal(got[outside], x[outside])
    nobody = numflash.apply_rotary(x, cos, sin, cu_seqlens=np.zeros(1, np.int32))
    np.testing.assert_array_equal(nobody, x)


@pytest.mark.parametrize("out", [False, True], ids=["apart", "in-place"])
def test_positions_outside_the_tables_are_copied_bit_by_bit(out):
    x, cos, sin = Case((4, 6, 2, 32), 32).arrays()
    x[:, :, :, 3], x[:, :, :, 5] = np.inf, -0.0
    offsets = np.array([-3, 3, 2**31 - 1, -(2**31)], np.int32)
    before = x.copy()
    got = numflash.apply_rotary(x, cos, sin, offsets=offsets, out=x if out else None)
    bits, of_x = got.view(np.uint16), before.view(np.uint16)
    np.testing.assert_array_equal(bits[0, :3], of_x[0, :3])
    np.testing.assert_array_equal(bits[1, 3:], of_x[1, 3:])
    np.testing.assert_array_equal(bits[2:], of_x[2:])
    for entry, inside in ((0, slice(3, 6)), (1, slice(0, 3))):
        assert (bits[entry, inside] != of_x[entry, inside]).any()


@pytest.mark.parametrize("seed", range(3))
def test_cu_seqlens_that_mean_nothing_lead_nowhere_else(seed):
    """The simulator refuses a read outside of an array."""
    x, cos, sin = Case((9, 3, 32), 32).arrays()
    words = np.random.default_rng(seed).integers(-(2**31), 2**31, 7).astype(np.int32)
    offsets = np.random.default_rng(seed + 9).integers(-(2**31), 2**31, 6).astype(np.int32)
    for cu_seqlens in (words, words % 12, -(words % 12)):
        got = numflash.apply_rotary(x, cos, sin, cu_seqlens=cu_seqlens)
        assert np.isfinite(got).all()
        got = numflash.apply_rotary(x, cos, sin, cu_seqlens=cu_seqlens, offsets=offsets)
        assert np.isfinite(got).all()


def test_positions_beyond_two_to_the_17th():
    first = 2**17 + 12_345
    x = np.random.default_rng(0).standard_normal((1, 4, 2, 16)).astype(np.float32)
    cos, sin = numflash.rotary_tables(first + 4, 16)
    got = numflash.apply_rotary(x, cos, sin, offsets=first)
    steps = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    angles = (first + np.arange(4))[:, None] * steps
    exact = reference.apply_rotary(x, np.cos(angles), np.sin(angles))
    np.testing.assert_allclose(got, exact, atol=6e-7)
    # Angles in float32, as flash-attn has them, are wrong there by far more.
    narrow = (first + np.arange(4, dtype=np.float32))[:, None] * steps.astype(np.float32)
    there = reference.apply_rotary(x, np.cos(narrow), np.sin(narrow))
    assert np.abs(there - exact).max() > 5e-4


@pytest.mark.parametrize(
    ("which", "axis"),
    [*itertools.product(["x", "out"], [0, 1, 2]), ("cos", 0)],
)
def test_offsets_beyond_two_to_the_31st(which, axis):
    x, cos, sin = Case((2, 2, 2, 16), 16).arrays()
    wanted = numflash.apply_rotary(x, cos, sin)
    arrays = {"x": x, "out": np.empty_like(x), "cos": cos}
    array = arrays[which]
    steps = list(array.strides)
    steps[axis] = array.itemsize * (2**31 + 16)
    room = np.empty(2**31 + 16 + array.size, array.dtype)  # untouched pages cost nothing
    arrays[which] = np.lib.stride_tricks.as_strided(room, array.shape, steps)
    arrays[which][...] = array
    got = numflash.apply_rotary(arrays["x"], arrays["cos"], sin, out=arrays["out"])
    np.testing.assert_array_equal(got, wanted)


# Calls


def test_integer_offsets_share_a_ready_call(built):
    x, cos, sin = Case((1, 1, 2, 32), 32, offset=50).arrays()
    for step in (0, 17, np.int64(50)):
        got = numflash.apply_rotary(x, cos, sin, offsets=step)
        expect_close(got, x, cos, sin, offsets=int(step))
    assert len(built) == 1
    numflash.apply_rotary(x, cos, sin, offsets=np.array([3], np.int32))
    assert len(built) == 2


@pytest.mark.parametrize("shape", [(2, 0, 3, 16), (0, 4, 3, 16), (2, 4, 0, 16)])
def test_nothing_to_rotate(shape):
    cos, sin = numflash.rotary_tables(4, 16)
    x = np.zeros(shape, np.float32)
    assert numflash.apply_rotary(x, cos, sin).shape == shape
    assert numflash.apply_rotary(x, cos, sin, out=x) is x


def test_rotated_q_and_k_of_one_buffer():
    """q and k of a packed (batch, seqlen, 3, heads, head_dim) array, in place, v untouched."""
    qkv = np.random.default_rng(0).standard_normal((2, 5, 3, 2, 32)).astype(np.float16)
    cos, sin = numflash.rotary_tables(5, 32)
    wanted = [numflash.apply_rotary(qkv[:, :, i], cos, sin) for i in range(2)]
    wanted.append(qkv[:, :, 2].copy())
    for i in range(2):
        numflash.apply_rotary(qkv[:, :, i], cos, sin, out=qkv[:, :, i])
    np.testing.assert_array_equal(qkv, np.stack(wanted, 2))


def test_bfloat16_rounds_once_to_nearest_even():
    x, cos, sin = Case((1, 9, 2, 64), 64, "bfloat16").arrays()
    got = numflash.apply_rotary(x, cos, sin)
    exact = numflash.apply_rotary(x.astype(np.float32), cos, sin)
    np.testing.assert_array_equal(got, exact.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("config", ["w1h1", "w2h3-interleaved", "w8h8-narrow", "w4h4"])
def test_every_config_has_the_same_bits(monkeypatch, config):
    config = RotaryConfig.parse(config)
    case = Case((2, 5, 7, 64), 48, interleaved=config.interleaved)
    x, cos, sin = case.arrays()
    tables = [t.astype("float16") if config.narrow else t for t in (cos, sin)]
    wanted = numflash.apply_rotary(x, *tables, **case.options)
    monkeypatch.setattr(calls, "RotaryConfig", lambda **_: config)
    ready._ready.clear()
    np.testing.assert_array_equal(numflash.apply_rotary(x, *tables, **case.options), wanted)
