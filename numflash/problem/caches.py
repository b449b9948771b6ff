"""A call on a cache of keys and values: what is new in it, and where that goes, checked."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from numflash.configs import DTYPES
from numflash.configs.formats import FORMATS
from numflash.problem.options import AttentionOptions, expect_bool
from numflash.problem.pages import PageTable, page_table_of
from numflash.problem.problem import (
    Tensor,
    as_page,
    expect_contiguous_rows,
    expect_like,
    expect_writeable,
)
from numflash.problem.rotary import expect_tables, has_aligned_rows
from numflash.problem.sequences import expect_list
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.views import ArrayView, fresh

OF_CACHE = (
    "q",
    "k_cache",
    "v_cache",
    "k",
    "v",
    "rotary_cos",
    "rotary_sin",
    "cache_seqlens",
    "cache_leftpad",
    "cache_batch_idx",
    "page_table",
)
"""The arrays of a call that attention by itself does not have by these names."""
CODES = ("uint8", FORMATS["e4m3"].dtype.name)
"""The dtypes of caches of e4m3 codes."""
_DESCALES = ("k_descale", "v_descale")
_COPIED = ("q", "k", "v", "rotary_cos", "rotary_sin")


@dataclass(frozen=True)
class CacheProblem:
    """A call of `attention_with_kvcache`, without what attention itself checks.

    Attributes:
        q, k_cache, v_cache: (batch, seqlen_q, heads, head_dim), and pages or entries of the cache.
        k, v: what is appended; None if nothing is.
        rotary_cos, rotary_sin: the tables; None without rotary.
        half: pairs of columns that are rotated; 0 without rotary.
        step: from the position of a query to that of the next: 1, or 0 where all have the same.
        rows: of the cache, that an entry has.
        pages: the table of pages; None where each entry has its own rows.
        has_leftpad: whether sequences begin behind row 0.
        codes: whether the cache is of e4m3 codes.
        vectorized: whether all rows are read and written 16 bytes at a time.
        copied: arrays whose rows are not contiguous, and must be copied for that.
    """

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor | None
    v: Tensor | None
    rotary_cos: ArrayView | None
    rotary_sin: ArrayView | None
    half: int
    step: int
    rows: int
    pages: PageTable | None
    has_leftpad: bool
    codes: bool
    vectorized: bool
    copied: tuple[str, ...]

    @property
    def entries(self) -> int:
        """Sequences."""
        return self.q.shape[0]

    @property
    def seqlen_new(self) -> int:
        """Keys that each sequence gets."""
        return 0 if self.k is None else self.k.shape[1]

    @property
    def positions_needed(self) -> int:
        """Positions from a sequence's length on that rotary looks up."""
        return max(self.seqlen_new, 1 + self.step * (self.q.shape[1] - 1)) if self.half else 0

    def expect_number(self, length: int) -> None:
        """Check a length that all sequences have. Raises ValueError."""
        new, rows = self.seqlen_new, self.rows
        if not 0 <= length <= rows - new:
            of_new = f"with {new} new keys " if new else ""
            raise ValueError(
                f"cache_seqlens must be at least 0, and {of_new}fit into the {rows} rows that the "
                f"cache has for a sequence, got {length}"
            )
        if self.half and length + self.positions_needed > self.rotary_cos.shape[0]:
            raise ValueError(
                f"rotary_cos must have {length + self.positions_needed} positions for "
                f"cache_seqlens {length}, got {self.rotary_cos.shape[0]}"
            )

    def expect_inside(self, numbers: Mapping[str, np.ndarray]) -> None:
        """Check the numbers themselves, which a caller has read back from the device.

        Args:
            numbers: cache_seqlens, and where the call has them cache_leftpad, cache_batch_idx and
                page_table, on the host.

        Raises:
            ValueError: a sequence leaves the cache or the tables, a page does not exist, or two
                sequences append to one page.
        """
        lengths = np.asarray(numbers["cache_seqlens"], np.int64)
        new, rows = self.seqlen_new, self.rows
        for entry in np.flatnonzero((lengths < 0) | (lengths + new > rows)):
            of_new = f", without the {new} that are new" if new else ""
            raise ValueError(
                f"cache_seqlens must lie within the {rows} rows of the cache{of_new}, got "
                f"{lengths[entry]} for sequence {entry}"
            )
        if self.has_leftpad:
            leftpad = np.asarray(numbers["cache_leftpad"], np.int64)
            for entry in np.flatnonzero((leftpad < 0) | (leftpad > lengths + new)):
                raise ValueError(
                    f"cache_leftpad must lie between 0 and a sequence's length, got "
                    f"{leftpad[entry]} for sequence {entry} of {lengths[entry] + new} rows"
                )
        if self.half:
            positions = self.rotary_cos.shape[0]
            for entry in np.flatnonzero(lengths + self.positions_needed > positions):
                raise ValueError(
                    f"rotary_cos must have a row for each position, got {positions} rows and a "
                    f"token at position {lengths[entry] + self.positions_needed - 1} in sequence "
                    f"{entry}"
                )
        if self.pages is not None:
            self._expect_pages(numbers, lengths)

    def _expect_pages(self, numbers: Mapping[str, np.ndarray], lengths: np.ndarray) -> None:
        name = "page_table" if "page_table" in numbers else "cache_batch_idx"
        table = np.asarray(numbers[name], np.int64).reshape(self.entries, -1)
        pages, new, writes = self.pages, self.seqlen_new, {}
        for entry, length in enumerate(lengths):
            in_use = table[entry, : -(-(length + new) // pages.size)]
            for page in in_use[(in_use < 0) | (in_use >= pages.count)]:
                raise ValueError(
                    f"{name} must name one of the {pages.count} pages of the cache, got {page} "
                    f"for sequence {entry}"
                )
            for page in in_use[length // pages.size :] if new else ():
                other = writes.setdefault(page, entry)
                if other != entry:
                    raise ValueError(
                        f"{name} must not let two sequences append to one page, got page {page} "
                        f"for sequences {other} and {entry}"
                    )


def describe_cache(
    views: Mapping[str, ArrayView], options: AttentionOptions, interleaved: bool
) -> CacheProblem:
    """Check the arrays of a call.

    Args:
        views: by their names in `OF_CACHE`.
        options: of attention.
        interleaved: as for `numflash.attention_with_kvcache`.

    Raises:
        TypeError, ValueError, UnsupportedError: as `numflash.attention_with_kvcache` documents.
    """
    options.check()
    if options.precision in ("fp8", "auto"):
        raise UnsupportedError(
            f"precision must be None or tf32 with a cache, whose numbers are not quantised, got "
            f"{options.precision!r}"
        )
    expect_bool("rotary_interleaved", interleaved)
    q = views["q"]
    if q.dtype not in DTYPES:
        raise TypeError(f"q must have one of the dtypes {', '.join(DTYPES)}, got {q.dtype}")
    for name in ("q", "k_cache", "v_cache", "k", "v"):
        if name in views:
            _expect_array(name, views[name], q, name.endswith("_cache"))
    codes = _expect_codes(views)
    copied = tuple(n for n in _COPIED if n in views and not views[n].has_contiguous_rows)
    rows = dict(views)
    rows |= {n: fresh(views[n].shape, views[n].dtype, views[n].device) for n in copied}
    tensors = {n: as_page(n, rows[n]) for n in ("q", "k_cache", "v_cache", "k", "v") if n in rows}
    pages, of_entry = _expect_cache(views)
    _expect_new(views, of_entry)
    half, step = _expect_rotary(views), 0
    if options.causal or any(side not in (-1, None) for side in options.window_size):
        step = 1
    appends = ("k", "v", "k_cache", "v_cache") if "k" in views else ()
    used = [tensors[name] for name in (*appends, *(("q",) if half else ()))]
    vector = 16 // q.itemsize
    vectorized = all(tensor.is_vectorizable for tensor in used) and half % vector == 0
    tables = [rows.get(name) for name in ("rotary_cos", "rotary_sin")]
    if half:
        vectorized = vectorized and all(map(has_aligned_rows, tables))
    return CacheProblem(
        tensors["q"],
        tensors["k_cache"],
        tensors["v_cache"],
        tensors.get("k"),
        tensors.get("v"),
        *tables,
        half,
        step,
        of_entry,
        pages,
        "cache_leftpad" in views,
        codes,
        vectorized,
        copied,
    )


def expect_two_caches(k_cache: int, v_cache: int) -> None:
    """Check the addresses of caches that are appended to. Raises ValueError."""
    if k_cache == v_cache:
        raise ValueError(
            "k_cache and v_cache must be two arrays where keys and values are appended, got one"
        )


def with_codes(views: Mapping[str, ArrayView]) -> dict[str, ArrayView]:
    """The views, with caches of an 8-bit float for their codes."""
    return {
        name: replace(view, dtype="uint8")
        if name in ("k_cache", "v_cache") and view.dtype in CODES
        else view
        for name, view in views.items()
    }


def _expect_codes(views: Mapping[str, ArrayView]) -> bool:
    """Check caches of codes and their factors; whether they are. Raises TypeError, ValueError."""
    q, k_cache, v_cache = (views[name] for name in ("q", "k_cache", "v_cache"))
    codes = k_cache.dtype in CODES
    if codes != (v_cache.dtype in CODES):
        raise TypeError(
            f"k_cache and v_cache must both be e4m3 codes, or none, got {k_cache.dtype} and "
            f"{v_cache.dtype}"
        )
    if codes and q.dtype == "float32":
        raise TypeError(
            "q must be float16 or bfloat16 where k_cache and v_cache are e4m3 codes, got float32"
        )
    for name in (name for name in _DESCALES if name in views):
        if not codes:
            raise ValueError(
                f"{name} goes with caches of e4m3 codes, got a cache of {k_cache.dtype}"
            )
        expect_like(name, views[name], (q.shape[0], k_cache.shape[2]), "float32", q.device)
    return codes


def _expect_array(name: str, view: ArrayView, q: ArrayView, is_cache: bool) -> None:
    """Check one of q, the caches and what is new. Raises TypeError, ValueError."""
    if view.dtype != q.dtype and not (is_cache and view.dtype in CODES):
        or_codes = f", or e4m3 codes, {' or '.join(CODES)}" if is_cache else ""
        raise TypeError(f"{name} must have the dtype of q, {q.dtype}{or_codes}, got {view.dtype}")
    if len(view.shape) != 4:
        axes = {
            "q": "(batch, seqlen, heads, head_dim)",
            "k": "(batch, new tokens, heads, head_dim)",
            "v": "(batch, new tokens, heads, head_dim)",
        }
        of_cache = "(batch or pages, rows, heads, head_dim)"
        raise ValueError(
            f"{name} must have 4 dimensions {axes.get(name, of_cache)}, got {len(view.shape)}"
        )
    if view.device != q.device:
        raise ValueError(
            f"{name} must lie on the device of q, {q.device}, got device {view.device}"
        )


def _expect_cache(views: Mapping[str, ArrayView]) -> tuple[PageTable | None, int]:
    """Check the caches and what says whose rows are where; (pages, rows of an entry)."""
    q, k_cache, v_cache = (views[name] for name in ("q", "k_cache", "v_cache"))
    entries, _, _, head_dim = q.shape
    if k_cache.shape[3] != head_dim:
        raise ValueError(
            f"k_cache must have the head_dim of q, {head_dim}, got {k_cache.shape[3]}"
        )
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(
            f"v_cache must have the shape of k_cache but for head_dim, {k_cache.shape[:3]}, got "
            f"{v_cache.shape[:3]}"
        )
    for name in ("k_cache", "v_cache"):
        expect_contiguous_rows(name, views[name])
        if "k" in views:
            expect_writeable(name, views[name])
    for name in ("cache_seqlens", "cache_leftpad", "cache_batch_idx"):
        if name not in views:
            continue
        expect_list(name, views[name], q.device)
        if views[name].shape[0] != entries:
            raise ValueError(
                f"{name} must have an element for each of the {entries} sequences of q, got "
                f"{views[name].shape[0]}"
            )
    if "page_table" in views and "cache_batch_idx" in views:
        raise ValueError("page_table and cache_batch_idx cannot be given together")
    table = views.get("page_table")
    if "cache_batch_idx" in views:
        table = as_table(views["cache_batch_idx"])
    if table is None:
        if k_cache.shape[0] < entries:
            raise ValueError(
                f"k_cache must have an entry for each of the {entries} sequences of q, got "
                f"{k_cache.shape[0]}"
            )
        return None, k_cache.shape[1]
    pages = page_table_of(table, k_cache.shape, q.device)
    if pages.entries != entries:
        raise ValueError(
            f"page_table must have a row for each of the {entries} sequences of q, got "
            f"{pages.entries}"
        )
    return pages, pages.width * pages.size


def as_table(batch_idx: ArrayView) -> ArrayView:
    """Entries of a cache as a table of one page each."""
    return replace(batch_idx, shape=(*batch_idx.shape, 1), strides=(*batch_idx.strides, 1))


def _expect_new(views: Mapping[str, ArrayView], rows: int) -> None:
    """Check the new keys and values. Raises ValueError."""
    given = [name for name in ("k", "v") if name in views]
    if len(given) == 1:
        raise ValueError(f"k and v must be given together, got {given[0]} alone")
    if not given:
        return
    q, k = views["q"], views["k"]
    for name in given:
        _, _, heads, head_dim = views[f"{name}_cache"].shape
        wanted = q.shape[0], k.shape[1], heads, head_dim
        expect_like(name, views[name], wanted, q.dtype, q.device)
    if not q.shape[1]:
        raise ValueError("q must have a query for each sequence, with new keys, got 0")
    if k.shape[1] > rows:
        raise ValueError(
            f"k must have at most the {rows} rows that the cache has for a sequence, got "
            f"{k.shape[1]}"
        )


def _expect_rotary(views: Mapping[str, ArrayView]) -> int:
    """Check the tables; pairs of columns that they rotate, 0 without. Raises as describe."""
    given = [name for name in ("rotary_cos", "rotary_sin") if name in views]
    if len(given) == 1:
        raise ValueError(f"rotary_cos and rotary_sin must be given together, got {given[0]} alone")
    if not given:
        return 0
    if "k" not in views:
        raise ValueError(
            "rotary_cos and rotary_sin rotate q and new keys, and need k and v; of a q by itself "
            "apply_rotary rotates the rows"
        )
    return expect_tables(views, views["q"].shape[3], ("q", *given))
