"""Attention and its gradients on rows of one rank, as schedules ask for it."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from numflash.api.attention import attention, attention_backward
from numflash.api.varlen import attention_varlen, attention_varlen_backward
from numflash.distributed.arrays import Arrays
from numflash.distributed.blocks import part_of
from numflash.distributed.pairs import Call, Pack, packs
from numflash.problem.options import OPTIONS
from numflash.selection.choice import split_configs

# Options that make a score depend on its position or its head.
BY_POSITION = (
    "alibi_slopes",
    "dropout_p",
    "bias",
    "mask",
    "block_mask",
    "score_mod",
    "mask_mod",
)
OPERANDS = ("q", "k", "v")
"""Whose gradients have rows; those of options have none."""
OF_DOCUMENT = ("dropout_p", "bias", "mask", "score_mod", "mask_mod")
"""Those that also make it depend on the number of its document, which is its batch entry."""
_DEFAULTS = {option.name: option.default for option in OPTIONS}
_OF_FORWARD = tuple(option.name for option in OPTIONS if not option.in_backward)


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

    def rows_of(self, name: str) -> tuple[int, int]:
        """The rows of the gradient of an operand."""
        return self.k if name in ("k", "v") else self.q


class LocalCalls:
    """The calls of one rank, with the options of one problem.

    All arrays are (batch, tokens, heads, head_dim), lse and delta (batch, heads, tokens).

    Attributes:
        by_position: whether a score depends on its position or its head.
        in_codes: whether forwards multiply in 8 bits.
    """

    def __init__(self, options: dict[str, Any], arrays: Arrays, documents: int = 1):
        """Bind options.

        Args:
            options: those of `attention` that hold for the whole problem, without causal and
                window_size. `alibi_slopes` and `sinks` are those of all heads of the problem.
                `config` may be a dictionary that names kernels of both passes.
            arrays: of the operands.
            documents: of the problem.
        """
        given = {name: x for name, x in options.items() if is_given(name, x)}
        self._arrays, self._options, self._documents = arrays, options, documents
        self._known: dict[tuple, tuple[tuple[Call, ...], tuple[_Made, ...]]] = {}
        self.by_position = any(name in given for name in BY_POSITION)
        # A block mask is cut to rows, keys and heads, and so are its call's arrays of heads.
        self._mask = given.get("block_mask")
        self._has_origin = self._mask is None and (self.by_position or "sinks" in given)
        self._is_numbered = documents > 1 and any(name in given for name in OF_DOCUMENT)
        self.in_codes = given.get("precision") == "fp8"
        of_forward, of_backward = split_configs(given.pop("config", None))
        self._forward = given | ({"config": of_forward} if of_forward else {})
        given = {name: x for name, x in given.items() if name not in _OF_FORWARD}
        self._backward = given | ({"config": of_backward} if of_backward else {})

    def with_options(self, options: dict[str, Any]) -> "LocalCalls":
        """The same calls with more options."""
        return LocalCalls(self._options | options, self._arrays, self._documents)

    def option(self, name: str):
        """The array of the whole problem that wrt calls so, as "sinks", "bias" or "aux0"."""
        if name.startswith(_AUX):
            return self._backward[_AUX][int(name.removeprefix(_AUX))]
        return self._backward[name]

    def forward(
        self,
        calls: tuple[Call, ...],
        q,
        k,
        v,
        first_head: int = 0,
        *,
        float32: bool,
        into=None,
    ) -> Iterator[Part]:
        """out and lse of each call.

        Args:
            calls: which.
            q, k, v: of this rank.
            first_head: the number of the first query head in the whole problem.
            float32: whether out is float32, and not of the dtype of q.
            into: an array for out of all queries, any strides: each call writes its own rows.
        """
        more = {}
        for made in self._made(calls, q, k, first_head, float32=float32):
            at = made.at
            if into is not None:
                more["out"] = into[at["q"]]
            verb = attention_varlen if made.is_packed else attention
            results = verb(q[at["q"]], k[at["k"]], v[at["v"]], **made.options, **more)
            if made.is_packed:
                results = tuple(x[None] for x in results)
            yield Part(made.q, made.k, made.is_own, results)
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
        q, k, contiguous = operands["q"], operands["k"], self._arrays.contiguous
        given = [(name, x) for name, x in operands.items() if x is not None]
        of_all = {} if operands.get("out") is not None else {"out": None}
        for made in self._made(calls, q, k, first_head, float32=True, wrt=wrt):
            names, at = made.options["wrt"], made.at
            cut = {name: x[at[name]] for name, x in given}
            if made.hidden is not None:
                cut["lse"] = cut["lse"] + made.hidden
            cut["lse"] = contiguous(cut["lse"])
            verb = attention_varlen_backward if made.is_packed else attention_backward
            found = verb(**of_all, **cut, **made.options)
            results = dict(zip(names, found, strict=True))
            if made.heads is not None:
                results |= self._of_all_heads(results, made.heads)
            if made.is_packed:
                results |= {name: x[None] for name, x in results.items() if name in OPERANDS}
            yield Part(made.q, made.k, made.is_own, results)
            # The next call takes the memory.
            del results, found

    def _made(
        self,
        calls: tuple[Call, ...],
        q,
        k,
        first_head: int,
        *,
        float32: bool,
        wrt: tuple[str, ...] | None = None,
    ) -> "tuple[_Made, ...]":
        """The calls on such arrays, made once. With `wrt` those of a backward."""
        is_short = float32 and self._arrays.dtype_of(q) != "float32"
        batch, rows, *_ = q.shape
        key = id(calls), batch, rows, k.shape[1], first_head, is_short, wrt
        found = self._known.get(key)
        if found is not None:
            return found[1]
        # Kernels on 8-bit floats know one length for all sequences.
        apart, made = self.in_codes or batch != 1, []
        in_backward = wrt is not None
        of_all = self._backward if in_backward else self._forward
        for asked in _asked(calls, apart, self.by_position, self._has_origin, in_backward):
            options = asked.options(of_all, first_head)
            if in_backward:
                # Whatever is not of tokens is the whole problem's, but for a sink.
                names = tuple(x for x in wrt if x != "sinks" or x in options)
                if not names:
                    continue
                options["wrt"] = names
            else:
                options["return_lse"] = True
            if is_short:
                options["grad_dtype" if in_backward else "out_dtype"] = "float32"
            pack, hidden = asked.pack, None
            of_q, of_k = pack.calls[0].q, pack.calls[0].k
            is_packed = self._is_numbered or len(pack.calls) > 1
            if len(pack.calls) > 1:
                of_q, of_k = (0, rows), (0, k.shape[1])
                if in_backward and "sinks" in names:
                    hidden = _outside(self._arrays, pack, rows)
            if is_packed:
                documents = self._documents if self._is_numbered else None
                lengths = _on_device(self._arrays, pack, of_q[0], of_k[0], documents)
                options |= zip(_NAMES, lengths, strict=True)
            heads = None
            if self._mask is not None:
                heads = first_head, first_head + q.shape[2]
                options |= self._of_part(options, pack.calls[0], heads)
            at = _places(of_q, of_k, 0 if is_packed else slice(None))
            made.append(_Made(of_q, of_k, asked.is_own, is_packed, at, options, hidden, heads))
        # With the calls themselves, so that no others get their number.
        self._known[key] = calls, tuple(made)
        return self._known[key][1]

    def _of_part(
        self, options: dict[str, Any], call: Call, heads: tuple[int, int]
    ) -> dict[str, Any]:
        """The options that a block mask has cut."""
        rows, keys = (
            (first, first + end - begin)
            for first, (begin, end) in zip(call.origin, (call.q, call.k), strict=True)
        )
        found = {name: options[name][..., slice(*heads)] for name in _OF_HEADS if name in options}
        found["block_mask"] = part_of(self._mask, rows, keys, heads)
        return found

    def _of_all_heads(self, results: dict[str, Any], heads: tuple[int, int]) -> dict[str, Any]:
        """Gradients of arrays of heads, which a block mask has cut, with zeros for the others."""
        found = {}
        for name in _OF_HEADS:
            if name in results:
                found[name] = self._arrays.zeros(tuple(self.option(name).shape), "float32")
                found[name][..., slice(*heads)] = results[name]
        return found


_OF_HEADS = ("sinks", "alibi_slopes")
_AUX = "aux"


class _Made(NamedTuple):
    """One call of attention, but for its arrays.

    Attributes:
        q, k, is_own: as of its `Part`.
        is_packed: whether its rows are those of packed documents.
        at: by the name of an operand, what it takes of it: as an index.
        options: of the call, by name.
        hidden: what is added to lse, or None: -inf for rows in no sequence of the call, because of
            all rows with an lse sinks have a gradient.
        heads: (begin, end) of its query heads where a block mask is cut to them, else None.
    """

    q: tuple[int, int]
    k: tuple[int, int]
    is_own: bool
    is_packed: bool
    at: dict[str, Any]
    options: dict[str, Any]
    hidden: Any
    heads: tuple[int, int] | None


def _places(q: tuple[int, int], k: tuple[int, int], entry: int | slice) -> dict[str, tuple]:
    """Rows q and k of each operand, as indices, of a batch entry or of all."""
    rows, keys = slice(*q), slice(*k)
    found = dict.fromkeys(("dout", "q", "out"), (entry, rows))
    found |= dict.fromkeys(("k", "v"), (entry, keys))
    return found | dict.fromkeys(("lse", "delta", "dlse"), (entry, slice(None), rows))


class _Asked(NamedTuple):
    """Calls put together, and the options that only they have."""

    pack: Pack
    own: dict[str, Any]
    place: tuple[int, int] | None
    is_own: bool

    def options(self, of_all: dict[str, Any], first_head: int) -> dict[str, Any]:
        """With the options of all calls."""
        found = {**of_all, **self.own}
        if not self.is_own:
            found.pop("sinks", None)
        if self.place is not None:
            found["origin"] = *self.place, first_head
        return found


@lru_cache(maxsize=4096)
def _asked(
    calls: tuple[Call, ...], apart: bool, by_position: bool, has_origin: bool, in_backward: bool
) -> tuple[_Asked, ...]:
    """The calls, put together where that is possible, and the options of each."""
    found = []
    for pack in packs(calls, apart, by_position):
        for each in _keys_apart(pack) if in_backward else (pack,):
            call, place = each.calls[0], None
            own = {"window_size": tuple(-1 if x is None else x for x in each.window)}
            if by_position or len(each.calls) == 1:
                own |= {"causal_align": "top_left", "shift": call.shift}
                if has_origin:
                    place = call.origin
                if by_position:
                    own["shift"] = call.origin[0] - call.origin[1]
            else:
                own["shift"] = each.offset
                # Of a head; each sequence has positions of its own.
                place = (0, 0) if has_origin else None
            found.append(_Asked(each, own, place, call.is_own))
    return tuple(found)


def _keys_apart(pack: Pack) -> list[Pack]:
    """Packs in which no two calls have the same key: one gradient is made of each row."""
    groups: list[list[Call]] = []
    for call in pack.calls:
        for group in groups:
            if all(call.k[1] <= each.k[0] or each.k[1] <= call.k[0] for each in group):
                group.append(call)
                break
        else:
            groups.append([call])
    return [pack._replace(calls=type(pack.calls)(group)) for group in groups]


_NAMES = ("starts_q", "seqlens_q", "starts_k", "seqlens_k")


@lru_cache(maxsize=4096)
def _on_device(
    arrays: Arrays, pack: Pack, first_q: int, first_k: int, documents: int | None
) -> tuple[Any, ...]:
    """starts_q, seqlens_q, starts_k, seqlens_k of a pack, on the device: copied there once.

    Args:
        arrays: of the operands.
        pack: which.
        first_q, first_k: the rows with which its arrays begin.
        documents: of the problem, where each is the sequence of its number, and those that the
            pack has not are empty; None: the pack's calls are the sequences.
    """
    numbers = [n if documents is None else call.document for n, call in enumerate(pack.calls)]
    found = np.zeros((4, documents or len(pack.calls)), np.int32)
    for n, call in zip(numbers, pack.calls, strict=True):
        (begin_q, end_q), (begin_k, end_k) = call.q, call.k
        found[:, n] = begin_q - first_q, end_q - begin_q, begin_k - first_k, end_k - begin_k
    return tuple(map(arrays.from_host, found))


@lru_cache(maxsize=256)
def _outside(arrays: Arrays, pack: Pack, tokens: int) -> Any:
    """(tokens,) float32 on the device: -inf for rows that no call of a pack has, else 0."""
    found = np.full(tokens, -np.inf, np.float32)
    for call in pack.calls:
        found[slice(*call.q)] = 0
    return arrays.from_host(found)


def is_given(name: str, option) -> bool:
    """Whether an option of `attention` says something else than its default."""
    default = _DEFAULTS[name]
    if option is default:
        return False
    are_alike = isinstance(option, bool) == isinstance(default, bool)
    is_plain = isinstance(option, int | float | str | tuple)
    return not (is_plain and are_alike and option == default)


class Kept:
    """Gradients that stay on this rank, of all steps."""

    _found: dict[str, Any]

    def __init__(self, problem, operands: dict[str, Any], wrt: tuple[str, ...]):
        """Of a `Problem`, its operands, and the names of gradients."""
        self._arrays, self._found = problem.arrays, {}
        wholes = {x: operands[x] if x in OPERANDS else problem.calls.option(x) for x in wrt}
        self._shapes = {name: tuple(x.shape) for name, x in wholes.items()}

    def take(self, part: Part) -> None:
        """Add all that a call gave."""
        for name, gradient in part.results.items():
            self.add(name, part.rows_of(name), gradient)

    def add(self, name: str, rows: tuple[int, int], gradient) -> None:
        """Add to the gradient's rows."""
        if name not in OPERANDS:
            self._found[name] = self.get(name)
            self._found[name] += gradient
        elif name not in self._found and rows == (0, self._shapes[name][1]):
            self._found[name] = gradient
        else:
            self.get(name)[:, slice(*rows)] += gradient

    def get(self, name: str):
        """The gradient, zeros where nothing was added."""
        if name not in self._found:
            self._found[name] = self._arrays.zeros(self._shapes[name], "float32")
        return self._found[name]


def delta_of(arrays: Arrays, operands: dict[str, Any]):
    """All that a backward wants of out and dlse: the row sums of dout * out, less dlse.

    A part of the rows at a time, so that there is no float32 copy of out.

    Args:
        arrays: of the operands.
        operands: dout and out (batch, tokens, heads, head_dim_v), lse and dlse (batch, heads,
            tokens), dlse may be missing; or delta, which is returned.

    Returns:
        (batch, heads, tokens) float32.
    """
    if operands.get("delta") is not None:
        return operands["delta"]
    dout, out, dlse = operands["dout"], operands["out"], operands.get("dlse")
    batch, tokens, heads, head_dim_v = out.shape
    delta = arrays.empty((batch, heads, tokens), "float32")
    rows = max(1, _CHUNK_BYTES // max(1, 4 * batch * heads * head_dim_v))
    for begin in range(0, tokens, rows):
        at = slice(begin, begin + rows)
        product = arrays.astype(dout[:, at], "float32") * arrays.astype(out[:, at], "float32")
        delta[:, :, at] = product.sum(-1).swapaxes(1, 2)
    if dlse is not None:
        delta -= dlse
        # A query without keys has a constant lse.
        delta[operands["lse"] == float("-inf")] = 0
    return delta


_CHUNK_BYTES = 2**24
