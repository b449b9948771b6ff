"""The forward over a cache made ready: what is new is appended, then attention reads the cache."""

from dataclasses import replace
from typing import Any, NamedTuple

from numflash.calls.arguments import coded_keys
from numflash.calls.forward import Forward, Launches
from numflash.calls.launch import Fill
from numflash.calls.ready import prepare
from numflash.configs import PrepareConfig, Traits, padded_head_dim
from numflash.kernels.arguments import Tensor
from numflash.kernels.sequences.arguments import AngleTable, AppendSizes, CacheSlots
from numflash.problem.caches import (
    OF_CACHE,
    CacheProblem,
    as_table,
    describe_cache,
    expect_two_caches,
    with_codes,
)
from numflash.problem.options import AttentionOptions, expect_bool
from numflash.problem.problem import expect_writeable, num_blocks
from numflash.runtime.arrays import ArrayLibrary, copy_rows, library_of, on_stream, to_numpy
from numflash.runtime.views import Apart, ArrayView, Operand, contiguous_strides, fresh

# What lengths and pages are read from, on the device.
_NUMBERS = "cache_seqlens", "cache_leftpad", "cache_batch_idx", "page_table"
# Of attention's arrays those that are the caller's by other names.
_RENAMED = {
    "k": "k_cache",
    "v": "v_cache",
    "seqlens_k": "cache_seqlens",
    "starts_k": "cache_leftpad",
}
# What is appended and rotated, by names that attention's arrays do not have.
_NEW = {"q": "q before rotary", "k": "new k", "v": "new v"}
_TABLES = "rotary_cos", "rotary_sin"
_APART = "q", "k_cache", "v_cache", "out"


class Append:
    """What is done besides the list of a call: appending, and rotating q.

    Attributes:
        options, traits: see `calls.sequences.Beside`.
    """

    def __init__(self, problem: CacheProblem, views: dict[str, ArrayView], interleaved: bool):
        """Of a problem with new keys; the views and `interleaved` as in its call."""
        self._problem, self._views, half = problem, views, problem.half
        dtype = problem.q.view.dtype
        dims = (padded_head_dim(each.shape[3]) for each in (problem.k_cache, problem.v_cache))
        of_rows = {"vectorized": problem.vectorized, "codes": problem.codes}
        self.traits = Traits(dtype, *dims, **of_rows)
        narrow = half > 0 and problem.rotary_cos.dtype == dtype != "float32"
        self.options = {"interleaved": interleaved and half > 0, "narrow": narrow}

    def laid_out(self, config: PrepareConfig) -> tuple[int, dict[str, Any]]:
        """See `calls.sequences.Beside`."""
        problem, half, tokens = self._problem, self._problem.half, config.tokens(self.traits)
        q, k, v, cache = problem.q, problem.k, problem.v, problem.k_cache
        entries, seqlen_q, heads, _ = q.shape
        new, heads_kv = problem.seqlen_new, cache.shape[2]

        def blocks_of(what: str, seqlen: int, heads: int) -> int:
            return num_blocks(what, entries * seqlen, -(-heads // config.num_heads), tokens)

        blocks_q = blocks_of("q", seqlen_q, heads) if half else 0
        blocks_new = blocks_of("k", new, heads_kv)
        table, pitch, count, size = None, 0, cache.shape[0], problem.rows
        if problem.pages is not None:
            table, (_, _, pitch, count, size) = "page_table", problem.pages
        rotated, cos, sin = Tensor(None, 0, 0, 0), AngleTable(None, 0), AngleTable(None, 0)
        if half:
            rotated = Tensor("q", *contiguous_strides(q.shape)[:3])
            cos = AngleTable("rotary_cos", problem.rotary_cos.strides[0])
            sin = AngleTable("rotary_sin", problem.rotary_sin.strides[0])
        lengths = "seqlens_k", pitch, count, max(1, size), problem.rows, int(table is not None)
        sizes = AppendSizes(
            blocks_q,
            blocks_new,
            entries * seqlen_q,
            entries * new,
            max(1, seqlen_q),
            max(1, new),
            heads,
            heads_kv,
            cache.shape[3],
            problem.v_cache.shape[3],
            half,
            problem.rotary_cos.shape[0] if half else 0,
            problem.step,
        )
        return blocks_q + 2 * blocks_new, {
            "q": Tensor(_NEW["q"], *q.strides[:3]),
            "rotated_q": rotated,
            "k_new": Tensor(_NEW["k"], *k.strides[:3]),
            "v_new": Tensor(_NEW["v"], *v.strides[:3]),
            "k": self._record_of("k", cache.strides),
            "v": self._record_of("v", problem.v_cache.strides),
            "cos": cos,
            "sin": sin,
            "slots": CacheSlots(table, *lengths),
            "sizes": sizes,
        }

    def _record_of(self, name: str, strides: tuple[int, ...]) -> NamedTuple:
        """The record of a cache that is appended to."""
        if not self._problem.codes:
            return Tensor(name, *strides[:3])
        descale = f"{name}_descale"
        of_descale = self._views[descale].strides if descale in self._views else None
        return coded_keys(name, strides, descale, of_descale)


class CacheForward:
    """A call of `attention_with_kvcache` with its kernels bound to everything but addresses.

    Attributes:
        device: where.
        kernel: which kernel computes the result.
    """

    def __init__(
        self,
        views: dict[str, ArrayView],
        options: AttentionOptions,
        interleaved: bool,
        has_number: bool,
    ):
        """Check, choose and build.

        Args:
            views: of the call's arrays: those of `OF_CACHE`, those among the options, and out.
            options: of attention.
            interleaved: which columns rotary takes for a pair.
            has_number: whether all sequences have one length, a number.

        Raises:
            TypeError, ValueError, UnsupportedError: as `numflash.attention_with_kvcache`.
        """
        views = with_codes(views)
        self._problem = problem = describe_cache(views, options, interleaved)
        self.device = views["q"].device
        self._apart = None
        if "out" in views:
            expect_writeable("out", views["out"])
            self._apart = Apart({name: views[name] for name in _APART})
            self._apart.expect({name: views[name].pointer for name in _APART})
        self._has_number = has_number
        options = options._replace(appended=problem.seqlen_new, cached=True)
        self._append = Append(problem, views, interleaved) if problem.k is not None else None
        self._forward = Forward(self._of_attention(views), options, beside=self._append)
        self.kernel = self._forward.kernel

    @property
    def _rotated_q(self) -> ArrayView:
        q = self._problem.q.view
        return fresh(q.shape, q.dtype, q.device)

    def _of_attention(self, views: dict[str, ArrayView]) -> dict[str, ArrayView]:
        """The views of the call of attention."""
        problem, q = self._problem, views["q"]
        found = {name: views[given] for name, given in _RENAMED.items() if given in views}
        found |= {name: view for name, view in views.items() if name not in OF_CACHE}
        found["q"] = self._rotated_q if problem.half else q
        if self._has_number:
            found["seqlens_k"] = fresh((problem.entries,), "int32", q.device)
        if "page_table" in views:
            found["page_table"] = views["page_table"]
        elif problem.pages is not None:
            found["page_table"] = as_table(views["cache_batch_idx"])
        else:
            # A cache may have more entries than there are sequences.
            for name in "kv":
                view = found[name]
                found[name] = replace(view, shape=(problem.entries, *view.shape[1:]))
        return found

    def bind(
        self, operands: dict[str, Operand], library: ArrayLibrary
    ) -> tuple[Any, Any, Launches]:
        """Allocate; (out, lse, and by family, in order, functions that launch on a stream).

        Args:
            operands: the call's arrays and numbers; cache_seqlens may be a number.
            library: that allocates.
        """
        problem, launches = self._problem, {}
        # Arrays without elements may have any address.
        if self._append is not None and problem.seqlen_new and 0 not in problem.k_cache.shape:
            expect_two_caches(operands["k_cache"].pointer, operands["v_cache"].pointer)
        if self._apart is not None:
            self._apart.expect({name: operands[name].pointer for name in _APART})
        if self._has_number:
            number = operands["cache_seqlens"]
            problem.expect_number(number)
            lengths = library.operand(library.empty((problem.entries,), "int32", self.device))
            operands = operands | {"cache_seqlens": lengths}
            launches["fill cache_seqlens"] = Fill(lengths, number, self.device)
        given = {n: x for n, x in operands.items() if n not in OF_CACHE}
        given |= {n: operands[of] for n, of in _RENAMED.items() if of in operands}
        table = operands.get("page_table", operands.get("cache_batch_idx"))
        if table is not None:
            given["page_table"] = table
        given["q"] = operands["q"]
        if self._append is not None:
            rows = operands | {name: copy_rows(operands[name]) for name in problem.copied}
            given |= {new: rows[name] for name, new in _NEW.items()}
            given |= {name: rows[name] for name in _TABLES if name in rows}
        if problem.half:
            q = self._rotated_q
            given["q"] = library.operand(library.empty(q.shape, q.dtype, self.device))
        out, lse, of_forward = self._forward.bind(given, library)
        return out, lse, launches | of_forward

    def expect_inside(self, numbers: dict) -> None:
        """See `CacheProblem.expect_inside`."""
        self._problem.expect_inside(numbers)


def run_with_cache(
    arrays: dict[str, Any],
    options: AttentionOptions,
    number: int | None,
    interleaved: bool,
    stream,
    check_lengths: bool,
) -> tuple:
    """(out, lse) of a call, as objects of the library of its q.

    Args:
        arrays: by their names in `OF_CACHE`, and out if the caller gives it.
        options: of attention.
        number: the length of all sequences, where it is no array.
        interleaved, stream, check_lengths: of the call.
    """
    expect_bool("check_lengths", check_lengths)
    q, given = arrays["q"], arrays.get("out")
    of_kind = interleaved, number is not None
    ready, operands, stream = prepare(CacheForward, arrays, options, stream, *of_kind)
    if number is not None:
        operands["cache_seqlens"] = number
    library = library_of(q, "q")

    def read(stream: int) -> dict:
        return {name: to_numpy(arrays[name]) for name in _NUMBERS if name in arrays}

    def work(stream: int) -> tuple:
        out, lse, launches = ready.bind(operands, library)
        for launch in launches.values():
            launch(stream)
        out = library.hand_back(out, q, stream) if given is None else given
        return out, library.hand_back(lse, q, stream)

    if check_lengths and number is None:
        ready.expect_inside(on_stream(read, stream, ready.device, arrays, operands))
    return on_stream(work, stream, ready.device, arrays, operands)
