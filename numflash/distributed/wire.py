"""Keys and values as they travel: in their own numbers, or in 8 bits.

A buffer holds the keys and values of some tokens, tokens outermost, so that a run of tokens is
contiguous and is sent from its place to its place. Methods know `Wire` alone:

    wire = wire_of(problem.wire, k, v)
    buffer = wire.new(tokens)
    wire.fill(buffer, begin, k, v)              # own tokens; what travels in 8 bits is quantised
    wire.spans(tokens, begin, end)              # bytes of a run, to be sent or to be filled
    k, v = wire.unpack(buffer)                  # as operands of attention
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

from numflash.api.quantize import dequantize_fp8, quantize_fp8
from numflash.configs import padded_fp8_head_dim
from numflash.distributed.arrays import Arrays, Bundle, Places, by_rank, places_in_bundle
from numflash.distributed.layouts import Layout
from numflash.problem.fp8 import Fp8Array, Fp8Recipe
from numflash.runtime.errors import UnsupportedError

FORMAT = "e4m3"
WHY_NOT_FP8 = 'scales would depend on who holds which tokens; wire="e4m3" quantises at the owner'
WHY_NOT_AUTO = (
    "it decides on the device, by each rank's own numbers, and what travels must be known on the "
    "host before, the same on all ranks"
)
_ROTATED_STEP = 64


class Wire(Protocol):
    """How keys and values of one set of heads travel.

    Attributes:
        is_exact: whether what arrives is what was sent off, and not rounded.
        tokens_per_scale: a row at a multiple of so many tokens shares a scale with none before it.
    """

    is_exact: bool
    tokens_per_scale: int

    def new(self, tokens: int, *, zeroed: bool = False) -> Bundle:
        """A buffer for the keys and values of so many tokens; its `memory` is one message."""

    def fill(self, buffer: Bundle, begin: int, k, v) -> None:
        """Put own tokens into a buffer.

        Args:
            buffer: of `new`.
            begin: the row of the first of them.
            k: (batch, tokens, heads, head_dim).
            v: (batch, tokens, heads, head_dim_v).
        """

    def dealt(self, ranks: int, k, v) -> Bundle:
        """A new buffer with own tokens once for each rank, of the heads that it computes with.

        Each rank has `rows_of_a_rank` in it, one after the other.

        Args:
            ranks: how many share the heads evenly; they are as many as the heads, or a multiple or
                divisor of that.
            k, v: as of `fill`, but of all heads.
        """

    def spans(self, tokens: int, begin: int, end: int) -> list[slice]:
        """Which bytes of a buffer's `memory` rows begin to end are, in it for so many tokens.

        So many messages travel for them.
        """

    def messages(self, buffer: Bundle, begin: int, end: int) -> list:
        """The memory of rows begin to end, in flat arrays of bytes: views of the buffer."""

    def unpack(self, buffer: Bundle) -> tuple[Any, Any]:
        """k and v of all rows: (batch, tokens, heads, head_dim or head_dim_v)."""

    def rounded(self, k, v) -> tuple[Any, Any]:
        """k and v as those who receive them see them."""


@dataclass(frozen=True)
class _Keys:
    """The keys and values of some heads: library and device, sizes, and dtype."""

    arrays: Arrays
    batch: int
    heads: int
    head_dim: int
    head_dim_v: int
    dtype: str

    @classmethod
    def of(cls, k, v) -> "_Keys":
        arrays = Arrays.of(k, "k")
        batch, _, heads, head_dim = k.shape
        return cls(arrays, batch, heads, head_dim, v.shape[3], arrays.dtype_of(k))

    def new(self, places: Places, zeroed: bool) -> Bundle:
        buffer = self.arrays.bundle_at(places)
        if zeroed:
            buffer.memory[...] = 0
        return buffer


class OwnNumbers:
    """Keys and values that travel as they are: (tokens, batch, heads, head_dim + head_dim_v)."""

    is_exact, tokens_per_scale = True, 1

    def __init__(self, keys: _Keys):
        self._keys = keys
        self._places, self.spans = _remembered(self._places, self.spans)

    def new(self, tokens, *, zeroed=False):
        """See `Wire`."""
        return self._keys.new(self._places(tokens), zeroed)

    def fill(self, buffer, begin, k, v):
        """See `Wire`."""
        rows = buffer["kv"][begin : begin + k.shape[1]].swapaxes(0, 1)
        rows[..., : self._keys.head_dim] = k
        rows[..., self._keys.head_dim :] = v

    def dealt(self, ranks, k, v):
        """See `Wire`."""
        buffer = self.new(ranks * k.shape[1])
        rows = _of_ranks(buffer["kv"], ranks)
        _deal(rows[..., : self._keys.head_dim], k)
        _deal(rows[..., self._keys.head_dim :], v)
        return buffer

    def spans(self, tokens, begin, end):
        """See `Wire`."""
        return _spans(self._places(tokens), {"kv": slice(begin, end)})

    def messages(self, buffer, begin, end):
        """See `Wire`."""
        return [buffer.memory[x] for x in self.spans(len(buffer["kv"]), begin, end)]

    def unpack(self, buffer):
        """See `Wire`; views of the buffer."""
        rows = buffer["kv"].swapaxes(0, 1)
        return rows[..., : self._keys.head_dim], rows[..., self._keys.head_dim :]

    def rounded(self, k, v):
        """See `Wire`."""
        return k, v

    def _places(self, tokens: int) -> Places:
        x = self._keys
        shape = tokens, x.batch, x.heads, x.head_dim + x.head_dim_v
        return places_in_bundle((("kv", (shape, x.dtype)),))


class Codes:
    """Keys and values that travel as e4m3 codes with scales, quantised by their owner.

    The owner, too, computes with what it has quantised: so a result does not depend on who owns
    which tokens.
    """

    is_exact = False

    def __init__(self, keys: _Keys, recipe: Fp8Recipe, in_codes: bool):
        """See `wire_of`."""
        self._keys, self._recipe, self._in_codes = keys, recipe, in_codes
        # Of a row that is rotated all columns count, also those that are padding.
        dim = keys.head_dim
        self._columns_k = padded_fp8_head_dim(dim) if recipe.hadamard else dim
        self.tokens_per_scale = recipe.block if recipe.granularity == "block" else 1
        self._places, self.spans = _remembered(self._places, self.spans)

    def new(self, tokens, *, zeroed=False):
        """See `Wire`."""
        return self._keys.new(self._places(tokens), zeroed)

    def fill(self, buffer, begin, k, v):
        """See `Wire`."""
        tokens = k.shape[1]
        if not tokens:
            return
        rows = buffer["codes"][begin : begin + tokens]
        scales = buffer["scales"][self._scales(begin, begin + tokens)]
        for i, (columns, codes, of_rows) in enumerate(self._quantised(k, v)):
            rows[..., columns] = codes.swapaxes(0, 1)
            scales[..., i] = of_rows.swapaxes(0, 1)

    def dealt(self, ranks, k, v):
        """See `Wire`."""
        tokens = k.shape[1]
        buffer = self.new(ranks * rows_of_a_rank(self, tokens))
        if tokens:
            rows = _of_ranks(buffer["codes"], ranks)[:, :tokens]
            scales = _of_ranks(buffer["scales"], ranks)
            for i, (columns, codes, of_rows) in enumerate(self._quantised(k, v)):
                _deal(rows[..., columns], codes)
                _deal(scales[..., i], of_rows)
        return buffer

    def _quantised(self, k, v) -> Iterator[tuple[slice, Any, Any]]:
        """Of k and v their columns, codes (batch, tokens, heads, columns), and scales."""
        columns = slice(0, self._columns_k), slice(self._columns_k, None)
        width = self._columns_k, self._keys.head_dim_v
        for i, (x, recipe) in enumerate(((k, self._recipe), (v, self._recipe_of_v))):
            found = quantize_fp8(x, recipe.granularity, recipe.block, recipe.hadamard, recipe.seed)
            yield columns[i], found.data[..., : width[i]], found.descale.swapaxes(1, 2)

    def spans(self, tokens, begin, end):
        """See `Wire`."""
        rows = {"codes": slice(begin, end), "scales": self._scales(begin, end)}
        return _spans(self._places(tokens), rows)

    def messages(self, buffer, begin, end):
        """See `Wire`."""
        return [buffer.memory[x] for x in self.spans(len(buffer["codes"]), begin, end)]

    def unpack(self, buffer):
        """See `Wire`: in the dtype of the keys, or with `in_codes` as `CodedRows`."""
        rows, x = buffer["codes"].swapaxes(0, 1), self._keys
        recipes = self._recipe, self._recipe_of_v
        columns = rows[..., : self._columns_k], rows[..., self._columns_k :]
        dims, found = (x.head_dim, x.head_dim_v), []
        for i, (recipe, codes, dim) in enumerate(zip(recipes, columns, dims, strict=True)):
            scales = buffer["scales"][..., i].swapaxes(0, 1).swapaxes(1, 2)
            shape = (*codes.shape[:3], dim)
            codes = self._filled_up(codes)
            whole = Fp8Array(codes, x.arrays.contiguous(scales), recipe, shape, x.dtype)
            found.append(CodedRows(whole) if self._in_codes else dequantize_fp8(whole))
        return tuple(found)

    def rounded(self, k, v):
        """See `Wire`."""
        buffer = self.new(k.shape[1])
        self.fill(buffer, 0, k, v)
        return self.unpack(buffer)

    def _places(self, tokens: int) -> Places:
        x, scales = self._keys, -(-tokens // self.tokens_per_scale)
        codes = tokens, x.batch, x.heads, self._columns_k + x.head_dim_v
        scales = (scales, x.batch, x.heads, 2), "float32"
        return places_in_bundle((("codes", (codes, "uint8")), ("scales", scales)))

    @property
    def _recipe_of_v(self) -> Fp8Recipe:
        """Scores stay as they are if q and k are rotated; V has nothing to be rotated with."""
        return replace(self._recipe, hadamard=False)

    def _scales(self, begin: int, end: int) -> slice:
        return slice(begin // self.tokens_per_scale, -(-end // self.tokens_per_scale))

    def _filled_up(self, codes):
        """The codes as kernels read them: rows padded with zeros, at multiples of 16 bytes."""
        columns = codes.shape[3]
        padded = padded_fp8_head_dim(columns)
        if columns == padded and not (self._columns_k + self._keys.head_dim_v) % 16:
            return codes
        whole = self._keys.arrays.zeros((*codes.shape[:3], padded), "uint8")
        whole[..., :columns] = codes
        return whole


def rows_of_a_rank(wire: Wire, tokens: int) -> int:
    """Of a buffer in which each rank has rows for so many tokens: no scale is shared."""
    return -(-tokens // wire.tokens_per_scale) * wire.tokens_per_scale


def _of_ranks(rows, ranks: int):
    """(rows of all ranks, ...) as (ranks, rows, ...)."""
    return rows.reshape((ranks, rows.shape[0] // ranks, *rows.shape[1:]))


def _deal(of_ranks, whole) -> None:
    """Fill (ranks, tokens, batch, heads of a rank, ...) from (batch, tokens, heads, ...)."""
    ranks, heads = of_ranks.shape[0], whole.shape[2]
    # Neighbouring ranks may have the same head.
    groups = min(ranks, heads)
    shared = of_ranks.reshape((groups, ranks // groups, *of_ranks.shape[1:]))
    shared[...] = by_rank(whole, groups)[:, None]


def _remembered(*functions: Callable) -> list[Callable]:
    """Functions of a wire that find again what they found for as many tokens."""
    return [lru_cache(maxsize=256)(each) for each in functions]


def _spans(places: Places, rows: dict[str, slice]) -> list[slice]:
    """The bytes of rows of each array of a bundle."""
    found = []
    for name, memory, (_, shape) in places[1]:
        row = (memory.stop - memory.start) // max(1, shape[0])
        begin, end = rows[name].start, rows[name].stop
        found.append(slice(memory.start + begin * row, memory.start + end * row))
    return found


class CodedRows:
    """An `Fp8Array` of which x[:, begin:end] is one of some rows.

    begin is a multiple of the tokens that share a scale.

    Attributes:
        whole: all rows.
        shape: of the array that was quantised.
    """

    def __init__(self, whole: Fp8Array):
        self.whole, self.shape = whole, whole.shape

    def __getitem__(self, key: tuple[slice, slice]) -> Fp8Array:
        begin, end, _ = key[1].indices(self.shape[1])
        x, step = self.whole, 1
        if x.recipe.granularity == "block":
            step = x.recipe.block
        if begin % step:
            raise ValueError(
                f"rows of codes can be cut at multiples of {step} tokens, which share a scale, "
                f"got {begin}"
            )
        scales = x.descale[:, :, begin // step : -(-end // step)]
        shape = (self.shape[0], end - begin, *self.shape[2:])
        return replace(x, data=x.data[:, begin:end], descale=scales, shape=shape)


def wire_of(wire: str | Fp8Recipe | None, k, v, *, in_codes: bool = False) -> Wire:
    """How the keys and values of these heads travel.

    Args:
        wire: as of `recipe_of`.
        k: (batch, tokens, heads, head_dim), CuPy's, PyTorch's or in the simulator NumPy's; of the
            heads that travel together.
        v: (batch, tokens, heads, head_dim_v).
        in_codes: whether `unpack` leaves codes to be multiplied in 8 bits. Otherwise it gives
            numbers of the dtype of k, which kernels of 16 bits multiply, with queries that are
            not rounded.
    """
    keys, recipe = _Keys.of(k, v), recipe_of(wire, k.shape[3])
    return OwnNumbers(keys) if recipe is None else Codes(keys, recipe, in_codes)


def recipe_of(wire: str | Fp8Recipe | None, head_dim: int) -> Fp8Recipe | None:
    """How keys and values are quantised before they travel.

    Args:
        wire: None: they travel in their own numbers. "e4m3": a scale for each token and head, and
            keys are rotated if no more columns travel because of that. A recipe of the caller's
            own.
        head_dim: of the keys.

    Raises:
        TypeError: none of these.
        ValueError: another name, or a recipe by which a scale would depend on who owns a token.
    """
    if wire is None:
        return None
    if isinstance(wire, Fp8Recipe):
        if wire.granularity not in ("token", "block"):
            raise ValueError(
                'wire must have a scale for each "token" or "block" of tokens: with one for each '
                f"{wire.granularity!r} a number would depend on who owns which tokens"
            )
        return wire
    if not isinstance(wire, str):
        kind = type(wire).__name__
        raise TypeError(f'wire must be None, "{FORMAT}" or an Fp8Recipe, got {wire!r} ({kind})')
    if wire != FORMAT:
        raise ValueError(f'wire must be None, "{FORMAT}" or an Fp8Recipe, got {wire!r}')
    return Fp8Recipe("token", hadamard=head_dim % _ROTATED_STEP == 0)


def expect_precision(function: str, precision: str | None, wire, backward: bool) -> None:
    """Check that a function can have a precision over several ranks. Raises UnsupportedError."""
    if precision == "auto":
        raise UnsupportedError(
            f"{function} takes no precision='auto': {WHY_NOT_AUTO}; say precision=\"fp8\" with "
            "wire, or neither"
        )
    if precision == "fp8" and wire is None:
        raise UnsupportedError(
            f"{function} takes no precision={precision!r}: {WHY_NOT_FP8}, and "
            'precision="fp8" then multiplies these codes'
        )
    if precision == "fp8" and backward:
        raise UnsupportedError(
            f"{function} has no precision='fp8' in a backward: it takes gradients in 16 bits, of "
            "the numbers that codes of keys and values stand for"
        )


def expect_method_of_codes(method: str | tuple[str, str]) -> None:
    """Check the method of precision="fp8". Raises UnsupportedError."""
    if method == "heads":
        raise UnsupportedError(
            'precision="fp8" over several ranks is for what gathers or sends round keys and '
            f"values, also across groups; got method={method!r}"
        )


def expect_layout_for(wire: str | Fp8Recipe | None, layout: Layout) -> None:
    """Check that tokens that share a scale lie on one rank, one after the other.

    Raises:
        TypeError, ValueError: as `recipe_of`; ValueError: a segment begins within a block.
    """
    recipe = recipe_of(wire, _ROTATED_STEP)
    if recipe is None or recipe.granularity == "token":
        return
    for rank in range(layout.ranks):
        for rows, place in zip(layout.rows(rank), layout.places(rank), strict=True):
            if rows[0] % recipe.block or place[0] % recipe.block:
                raise ValueError(
                    f"with wire={wire!r} {recipe.block} tokens share a scale, and segments must "
                    f"begin at multiples of {recipe.block}; rank {rank} has one that begins at "
                    f"token {place[0]}, its row {rows[0]}. Make the layout with "
                    f"multiple={recipe.block} (documents of other lengths need "
                    'Fp8Recipe("token"), a scale for each token)'
                )
