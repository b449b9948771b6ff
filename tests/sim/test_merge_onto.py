"""`merge_onto`: a part of attention merged onto what other keys gave, in place."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

import numflash
from numflash.runtime.errors import UnsupportedError

ELEMENTS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


@dataclass(frozen=True)
class Case:
    """A merge.

    Attributes:
        shape: of out, in the layout.
        dtype: of the part.
        form: "plain"; "rows", of some rows of larger arrays; "wide", heads of a wider array, so
            that rows are not aligned; "backwards", tokens from the last to the first.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    form: str = "plain"
    layout: str = "bshd"

    def __str__(self):
        return "-".join(["x".join(map(str, self.shape)), self.dtype, self.form, self.layout])


CASES = [
    Case((2, 5, 3, 16)),
    Case((1, 9, 2, 128), "float16", "rows"),
    Case((1, 33, 2, 64), "bfloat16", "rows"),
    Case((2, 7, 2, 20), "float16"),
    Case((1, 6, 3, 13), "bfloat16", "wide"),
    Case((1, 5, 2, 256), "float32", "backwards"),
    Case((1, 3, 2, 200), "float16", "wide"),
    Case((2, 3, 5, 32), "float32", "rows", "bhsd"),
    Case((5, 3, 24), "float16"),
    Case((3, 5, 24), "float32", "plain", "bhsd"),
    Case((70, 8), "bfloat16"),
    Case((1, 4, 2, 1), "float32"),
]


def lse_axes(case: Case) -> tuple[int, ...]:
    """The axes of out, but the last, in the order that lse has them in."""
    axes = tuple(range(len(case.shape) - 1))
    if case.layout == "bshd" and len(axes) > 1:
        return (*axes[:-2], axes[-1], axes[-2])
    return axes


def placed(x: np.ndarray, form: str, token_axis: int) -> np.ndarray:
    """x in memory of a form; what surrounds it is NaN."""
    if form == "plain":
        return x
    if form == "backwards":
        return np.flip(np.flip(x, token_axis).copy(), token_axis)
    axis, before, after = (token_axis, 2, 3) if form == "rows" else (x.ndim - 1, 1, 2)
    shape = list(x.shape)
    shape[axis] += before + after
    around = np.full(shape, np.nan, x.dtype)
    inside = np.moveaxis(np.moveaxis(around, axis, 0)[before:-after], 0, axis)
    inside[...] = x
    return inside


def numbers(case: Case):
    """(out, lse, part, part_lse), dense; some queries see no key, on either side or on both."""
    rng = np.random.default_rng(sum(case.shape))
    statistics = tuple(case.shape[axis] for axis in lse_axes(case))
    out = rng.standard_normal(case.shape).astype(np.float32)
    part = rng.standard_normal(case.shape).astype(ELEMENTS[case.dtype])
    lse, part_lse = (4 * rng.standard_normal((2, *statistics))).astype(np.float32)
    blind = rng.integers(0, 4, statistics)
    lse[blind % 2 == 1] = part_lse[blind >= 2] = -np.inf
    back = np.argsort(lse_axes(case))
    # What a query that has seen no key holds does not matter, nor what the part's does.
    out[(blind % 2 == 1).transpose(back)] = np.nan
    part[(blind >= 2).transpose(back)] = np.nan
    return out, lse, part, part_lse


def expected(case: Case, out, lse, part, part_lse):
    """(out, lse) in float64."""
    lse, part_lse = lse.astype(np.float64), part_lse.astype(np.float64)
    whole = np.logaddexp(lse, part_lse)
    safe = np.where(np.isneginf(whole), 0, whole)
    weighed, back = 0, np.argsort(lse_axes(case))
    for rows, row_lse in ((out, lse), (part, part_lse)):
        weight = np.exp(row_lse - safe).transpose(back)[..., None]
        weighed = weighed + np.where(weight == 0, 0, weight * rows.astype(np.float64))
    return weighed, whole


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_part_joins_what_is_there(case):
    dense = numbers(case)
    exact, exact_lse = expected(case, *dense)
    axis = lse_axes(case)[-1]
    out, part = (placed(x, case.form, axis) for x in dense[::2])
    lse = placed(dense[1], "rows" if case.form == "rows" else "plain", dense[1].ndim - 1)
    part_lse = placed(dense[3], "plain" if case.form == "wide" else case.form, lse.ndim - 1)
    base = out.base if case.form in ("rows", "wide") else None
    outside = None if base is None else np.isnan(base).sum() - np.isnan(out).sum()
    given = part.tobytes(), part_lse.tobytes()
    assert numflash.merge_onto(out, lse, part, part_lse, layout=case.layout) is None
    np.testing.assert_allclose(out, exact, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-6, atol=1e-6)
    assert (part.tobytes(), part_lse.tobytes()) == given
    if base is not None:
        while base.base is not None:
            base = base.base
        assert np.isnan(base).sum() == outside, "it wrote outside out"


@pytest.mark.parametrize("apart", [88.0, 89.5, 700.0, 1e30])
def test_numbers_far_apart_do_not_overflow(apart):
    lse = np.array([[[0, apart, -apart]]], np.float32)
    out, part = np.full((1, 3, 1, 8), 2, np.float32), np.full((1, 3, 1, 8), 3, np.float32)
    part_lse = np.zeros((1, 1, 3), np.float32)
    numflash.merge_onto(out, lse, part, part_lse)
    assert out[0, :, 0, 0].tolist() == [2.5, 2, 3]
    np.testing.assert_allclose(lse[0, 0], [np.log(2), apart, 0], rtol=1e-6)


def test_parts_one_after_the_other_are_merge_partials_of_all():
    rng = np.random.default_rng(1)
    outs = rng.standard_normal((5, 1, 6, 2, 32)).astype(np.float32)
    lses = rng.standard_normal((5, 1, 2, 6)).astype(np.float32)
    out, lse = np.empty((1, 6, 2, 32), np.float32), np.full((1, 2, 6), -np.inf, np.float32)
    for part in zip(outs, lses, strict=True):
        numflash.merge_onto(out, lse, *part)
    wanted, wanted_lse = numflash.merge_partials(list(outs), list(lses))
    np.testing.assert_allclose(out, wanted, atol=1e-6)
    np.testing.assert_allclose(lse, wanted_lse, atol=1e-6)
    again = np.full_like(out, np.nan), np.full_like(lse, -np.inf)
    for part in zip(outs, lses, strict=True):
        numflash.merge_onto(*again, *part)
    assert again[0].tobytes() == out.tobytes() and again[1].tobytes() == lse.tobytes()


def test_nan_of_a_part_is_not_lost():
    out, lse = np.ones((1, 2, 1, 4), np.float32), np.zeros((1, 1, 2), np.float32)
    part, part_lse = out.copy(), np.array([[[np.nan, 0]]], np.float32)
    numflash.merge_onto(out, lse, part, part_lse)
    assert np.isnan(out[0, 0]).all() and np.isnan(lse[0, 0, 0])
    assert (out[0, 1] == 1).all() and np.isfinite(lse[0, 0, 1])


def test_nothing_is_merged_where_there_is_nothing():
    for shape in ((0, 4, 2, 8), (1, 0, 2, 8), (1, 4, 0, 8)):
        out = np.zeros(shape, np.float32)
        lse = np.zeros((shape[0], shape[2], shape[1]), np.float32)
        numflash.merge_onto(out, lse, out.copy(), lse.copy())


BAD = {
    "out of 16 bits": (
        {"out": np.zeros((1, 4, 2, 8), np.float16)},
        TypeError,
        "out must be float32",
    ),
    "lse of 16 bits": ({"lse": np.zeros((1, 2, 4), np.float16)}, TypeError, "lse must be float32"),
    "a part of 64 bits": ({"part": np.zeros((1, 4, 2, 8))}, TypeError, "part must have one of"),
    "another part": (
        {"part": np.zeros((1, 3, 2, 8), np.float32)},
        ValueError,
        "part must have shape",
    ),
    "another lse": (
        {"part_lse": np.zeros((1, 4, 2), np.float32)},
        ValueError,
        "part_lse must have shape",
    ),
    "columns apart": (
        {"part": np.zeros((1, 4, 2, 16), np.float32)[..., ::2]},
        ValueError,
        "part must have a contiguous last axis",
    ),
    "read-only": (
        {"out": np.broadcast_to(np.float32(0), (1, 4, 2, 8)).copy()},
        ValueError,
        "out must be writeable",
    ),
    "another layout": ({"layout": "sbhd"}, ValueError, "layout must be"),
    "no dimensions": ({"out": np.zeros(8, np.float32)}, ValueError, "out must have 2 dimensions"),
    "wide": ({"out": np.zeros((1, 4, 2, 264), np.float32)}, UnsupportedError, "at most 256"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls(name):
    changed, error, words = BAD[name]
    given = {
        "out": np.zeros((1, 4, 2, 8), np.float32),
        "lse": np.zeros((1, 2, 4), np.float32),
        "part": np.zeros((1, 4, 2, 8), np.float32),
        "part_lse": np.zeros((1, 2, 4), np.float32),
    } | changed
    if name == "read-only":
        given["out"].flags.writeable = False
    with pytest.raises(error, match=words):
        numflash.merge_onto(**given)


def test_a_part_that_shares_memory_with_out_is_refused():
    memory, lse = np.zeros((1, 6, 2, 8), np.float32), np.zeros((1, 2, 4), np.float32)
    with pytest.raises(ValueError, match="out must not overlap part"):
        numflash.merge_onto(memory[:, :4], lse, memory[:, 2:], lse.copy())
