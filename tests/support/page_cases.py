"""Calls whose keys lie in pages of a cache, on kernels that gather rows or copy boxes: a table.

All that is no key of a sequence is NaN: the rest of its last page, what is left out before it, and
pages that are nobody's. Behind a sequence's last page its row of the table is garbage.
"""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from numflash import reference
from numflash.calls.ready import bind_forward
from numflash.problem.options import PACKED, AttentionOptions
from tests.support.sequence_cases import cumulative, ints

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
TOLERANCES = {"float16": 3e-3, "bfloat16": 2e-2, "float32": 2e-5, "tf32": 3e-3}
GARBAGE = (-1, 10**6, 2**31 - 1, -(2**31))
CAUSAL = {"causal": True}


class Paged(NamedTuple):
    """A call.

    Attributes:
        config: of the forward; None: the one by rule.
        page: keys of a page.
        keys: of each sequence.
        queries: of all sequences, which are padded, or of each, packed.
        heads: of q, and of k and v.
        head_dims: of q and k, and of v.
        options: of the mask and of features.
        left_out: keys before each sequence, in its first pages; given also where they are 0.
        appended: of the keys those that seqlens_k does not count.
        lost: (sequence, column of the table, what is there) of pages that are none.
        gap: columns of the table that are not the call's.
        aligned: whether the cache is.
        arch: the GPU.
    """

    config: str | None
    page: int
    keys: tuple[int, ...]
    queries: int | tuple[int, ...] = 1
    heads: tuple[int, int] = (2, 1)
    head_dims: tuple[int, int] = (32, 32)
    dtype: str = "float16"
    options: dict[str, Any] = CAUSAL
    left_out: tuple[int, ...] = ()
    appended: int = 0
    lost: tuple[tuple[int, int, int], ...] = ()
    gap: int = 0
    aligned: bool = True
    arch: str = "sm_80"

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.options.get("precision", self.dtype)]

    @property
    def entries(self) -> int:
        return len(self.keys)


class Arrays(NamedTuple):
    """A case's arrays.

    Attributes:
        q, k, v: of the call; k and v are pages.
        options: of the call.
        alone: q, k and v of each sequence by itself.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    options: dict[str, Any]
    alone: list[tuple[np.ndarray, np.ndarray, np.ndarray]]


def arrays_of(case: Paged, seed: int = 0) -> Arrays:
    """The arrays of a case."""
    rng, dtype = np.random.default_rng(seed), DTYPES[case.dtype]
    left_out = case.left_out or (0,) * case.entries
    ends = [first + n for first, n in zip(left_out, case.keys, strict=True)]
    width = max(1, *(-(-end // case.page) for end in ends)) + 1
    count = case.entries * width + 2
    numbers = rng.permutation(count)[: case.entries * width].reshape(case.entries, width)
    k, v = (
        _empty((count, case.page, case.heads[1], d), dtype, case.aligned) for d in case.head_dims
    )
    alone = []
    lengths_q = case.queries
    if isinstance(lengths_q, int):
        lengths_q = (lengths_q,) * case.entries
    for entry, (first, end) in enumerate(zip(left_out, ends, strict=True)):
        keys = np.arange(first, end)
        at = numbers[entry, keys // case.page], keys % case.page
        own = []
        for pages in (k, v):
            rows = rng.standard_normal((len(keys), *pages.shape[2:])).astype(dtype)
            pages[at] = rows
            for sequence, column, _ in case.lost:
                if sequence == entry:
                    rows[keys // case.page == column] = 0
            own.append(rows)
        shape = lengths_q[entry], case.heads[0], case.head_dims[0]
        alone.append((rng.standard_normal(shape).astype(dtype), *own))
        column = -(-end // case.page)
        numbers[entry, column:] = np.resize(np.roll(GARBAGE, entry), width - column)
    for sequence, column, what in case.lost:
        numbers[sequence, column] = what
    table = np.full((case.entries, width + case.gap), 10**6, np.int32)[:, :width]
    table[...] = numbers
    given = {"page_table": table, "cached": True, "appended": case.appended}
    given["seqlens_k"] = ints(*(end - case.appended for end in ends))
    if case.left_out:
        given["starts_k"] = ints(*left_out)
    parts = [q for q, *_ in alone]
    if isinstance(case.queries, int):
        q = np.stack(parts)
    else:
        q = np.concatenate(parts)
        given |= {"cu_seqlens_q": cumulative(case.queries), "layout": PACKED}
    config = case.config and {"forward": case.config}
    return Arrays(q, k, v, {**case.options, **given, "config": config}, alone)


def _empty(shape, dtype, aligned: bool) -> np.ndarray:
    """NaN everywhere; where it is not `aligned` it begins an element later."""
    x = np.full(np.prod(shape) + 16, np.nan, dtype)
    size = x.itemsize
    first = -x.ctypes.data // size % (16 // size) + (0 if aligned else 1)
    return x[first : first + np.prod(shape)].reshape(shape)


def called(q, k, v, options: dict, out=None) -> tuple[np.ndarray, np.ndarray, str]:
    """(out, lse, the kernel) of a call."""
    bound = bind_forward(q, k, v, out, AttentionOptions(**options), None)
    out, lse, _ = bound.launch(bound.stream)
    return out, lse, bound.kernel


def expected_of(case: Paged, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) of a case in float64."""
    own = ("out_dtype", "precision")
    options = {name: x for name, x in case.options.items() if name not in own}
    found = []
    for entry, each in enumerate(arrays.alone):
        if np.ndim(case.options.get("alibi_slopes")) == 2:
            options["alibi_slopes"] = case.options["alibi_slopes"][entry]
        found.append(reference.attention(*each, entry=entry, **options))
    if isinstance(case.queries, int):
        return tuple(np.stack(x) for x in zip(*found, strict=True))
    outs, lses = zip(*found, strict=True)
    return np.concatenate(outs, 0), np.concatenate(lses, 1)


def compare(case: Paged, got, expected) -> None:
    """Fail where out or lse is not within the case's tolerance."""
    np.testing.assert_allclose(got[0].astype(float), expected[0], rtol=0, atol=case.tolerance)
    np.testing.assert_array_equal(np.isneginf(got[1]), np.isneginf(expected[1]))
    seen = ~np.isneginf(expected[1])
    np.testing.assert_allclose(got[1][seen], expected[1][seen], rtol=0, atol=case.tolerance)
