"""Attention and its gradients on rows of one rank, as schedules ask for it."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from numflash.api.attention import attention, attention_backward
from numflash.api.varlen import attention_varlen, attention_varlen_backward
from numflash.distributed.arrays import Arrays
from numflash.distributed.pairs import Call, Pack, packs

# Options that make a score depend on its position or its head.
BY_POSITION = ("alibi_slopes", "dropout_p", "bias", "mask", "score_mod", "mask_mod")


class Part(NamedTuple):
    """What one call gave.

    Attributes:
        q, k: (begin, end) of the rows that it covers, in the arrays that it was given.
        is_own: as of its `Call`s.
        results: out and lse, or gradients by name. Rows that no call of several documents has
            are 0, and their lse -inf.
    """

    q: tuple[int, int]
    k: tuple[int, int]
    is_own: bool
    results: Any


class LocalCalls:
    """The calls of one rank, with the options of one problem.

    All arrays are (batch, tokens, heads, head_dim), lse and delta (batch, heads, tokens).
    """

    def __init__(self, options: dict[str, Any], arrays: Arrays):
        """Bind options.

        Args:
            options: those of `attention` that hold for the whole problem, without causal and
                window_size. `alibi_slopes` and `sinks` are those of all heads of the problem.
            arrays: of the operands.
        """
        self._options = {name: x for name, x in options.items() if _is_given(x)}
        self._arrays = arrays
        self.by_position = any(name in self._options for name in BY_POSITION)
        self._has_origin = self.by_position or "sinks" in self._options

    def shape_of(self, option: str) -> tuple[int, ...]:
        """The shape of an array among the options."""
        return tuple(self._options[option].shape)

    def forward(
        self, calls: tuple[Call, ...], q, k, v, first_head: int = 0, *, float32: bool
    ) -> Iterator[Part]:
        """out and lse of each call; `first_head` is the number of the first query head."""
        more: dict[str, Any] = {"return_lse": True}
        if float32 and self._arrays.dtype_of(q) != "float32":
            more["out_dtype"] = "float32"
        for pack, options in self._asked(calls, q, first_head, in_backward=False):
            rows, keys = _rows_of(pack, q, k)
            if len(pack.calls) == 1:
                operands = (x[:, slice(*at)] for x, at in ((q, rows), (k, keys), (v, keys)))
                results = attention(*operands, **options, **more)
            else:
                operands, where = (x[0] for x in (q, k, v)), self._records(pack)
                results = attention_varlen(*operands, **where, **options, **more)
                results = tuple(x[None] for x in results)
            yield Part(rows, keys, pack.calls[0].is_own, results)
            # The next call takes the memory.
            del results

    def backward(
        self,
        calls: tuple[Call, ...],
        operands: dict[str, Any],
        first_head: int = 0,
        wrt: tuple[str, ...] = ("q", "k", "v"),
    ) -> Iterator[Part]:
        """Gradients, float32, of each call.

        Args:
            calls: which.
            operands: dout, q, k, v, out or delta, lse, and dlse if there is one.
            first_head: as of `forward`.
            wrt: as of `attention_backward`. Gradients of sinks and alibi_slopes come only of the
                calls that have them.
        """
        q, k = operands["q"], operands["k"]
        given = {name: x for name, x in operands.items() if x is not None}
        for pack, options in self._asked(calls, q, first_head, in_backward=True):
            rows, keys = _rows_of(pack, q, k)
            names = tuple(x for x in wrt if x in ("q", "k", "v") or x in options)
            if not names:
                continue
            single = len(pack.calls) == 1
            cut = {name: _cut(name, x, rows, keys, single) for name, x in given.items()}
            cut["lse"] = self._arrays.contiguous(cut["lse"])
            first = [cut.pop(x, None) for x in ("dout", "q", "k", "v", "out", "lse")]
            more = {**cut, "wrt": names, **options}
            if self._arrays.dtype_of(q) != "float32":
                more["grad_dtype"] = "float32"
            if single:
                found = attention_backward(*first, **more)
            else:
                found = attention_varlen_backward(*first, **self._records(pack), **more)
                of_tokens = ("q", "k", "v")
                found = [
                    x[None] if y in of_tokens else x for x, y in zip(found, names, strict=True)
                ]
            results = dict(zip(names, found, strict=True))
            yield Part(rows, keys, pack.calls[0].is_own, results)
            # The next call takes the memory.
            del results, found

    def _asked(
        self, calls: tuple[Call, ...], q, first_head: int, in_backward: bool
    ) -> Iterator[tuple[Pack, dict[str, Any]]]:
        """The calls, put together where that is possible, and the options of each."""
        for pack in packs(calls, self.by_position or q.shape[0] != 1):
            options = dict(self._options)
            if in_backward:
                for name in ("batch_invariant", "max_rel_error"):
                    options.pop(name, None)
            if not pack.calls[0].is_own:
                options.pop("sinks", None)
            options["window_size"] = tuple(-1 if x is None else x for x in pack.window)
            if len(pack.calls) == 1:
                (call,) = pack.calls
                row, column = call.origin
                options["causal_align"], options["shift"] = "top_left", call.shift
                if self._has_origin:
                    options["origin"] = row, column, first_head
                    if self.by_position:
                        options["shift"] = row - column
            else:
                options["shift"] = pack.offset
            yield pack, options

    def _records(self, pack: Pack) -> dict[str, Any]:
        """Where the sequences of several calls begin and end."""
        return dict(zip(_NAMES, _on_device(self._arrays, pack), strict=True))


_NAMES = ("starts_q", "seqlens_q", "starts_k", "seqlens_k")


@lru_cache(maxsize=4096)
def _on_device(arrays: Arrays, pack: Pack) -> tuple[Any, ...]:
    """starts_q, seqlens_q, starts_k, seqlens_k of a pack, on the device: copied there once."""
    sides = [[call.q for call in pack.calls], [call.k for call in pack.calls]]
    found = []
    for rows in sides:
        found.append(np.array([begin for begin, _ in rows], np.int32))
        found.append(np.array([end - begin for begin, end in rows], np.int32))
    return tuple(map(arrays.from_host, found))


def _rows_of(pack: Pack, q, k) -> tuple[tuple[int, int], tuple[int, int]]:
    if len(pack.calls) == 1:
        return pack.calls[0].q, pack.calls[0].k
    return (0, q.shape[1]), (0, k.shape[1])


def _cut(name: str, x, rows: tuple[int, int], keys: tuple[int, int], single: bool):
    """What a call gets of an operand of its backward."""
    if not single:
        return x[0]
    if name in ("lse", "delta", "dlse"):
        return x[:, :, slice(*rows)]
    return x[:, slice(*(keys if name in ("k", "v") else rows))]


def _is_given(option) -> bool:
    """Whether an option says something: a default would be the same for every call."""
    return option is not None and option is not False and not _is_nothing(option)


def _is_nothing(option) -> bool:
    return isinstance(option, int | float | tuple) and option in (0, ())
