"""Features: the parts of attention besides products, masks and softmax, a row each.

A row of `FEATURES` is all that the host knows of a feature. Kernels call the function of the same
name in `tiles.features` at one of these hooks:

    score(s, i, j, args) -> (s, ds)          the final score, and its derivative
    finish(row_max, row_sum, args) -> ...    at the end of a row: further parts of its sum
    weigh(row, column, args) -> ...          which P become 0 once a row has its sum

Rules, tables, commands and the tuner go through the rows and name none. Features apply in the
order of the table, which is that of their names in the string form of `Traits`. It stands beside
`Traits`, which hold features in configs; options, problems and the reference build on both.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from numpy import float32 as f32
from numpy import int32 as i32
from numpy import int64 as i64
from numpy import uint32 as u32

from numflash.runtime.philox import ALIGNMENT, key_of, random_bits
from numflash.runtime.views import ArrayView, FromHead, Pointer

MAX_FLOAT32 = (2 - 2**-23) * 2.0**127


def expect_real(name: str, value) -> None:
    """Check a number that kernels take as float32. Raises TypeError, ValueError."""
    if isinstance(value, bool) or not isinstance(value, Real):
        kind = type(value).__name__
        raise TypeError(f"{name} must be a real number, got {value!r} ({kind})")
    # Comparing also spares integers that no float can hold.
    if not -MAX_FLOAT32 <= value <= MAX_FLOAT32:
        raise ValueError(f"{name} must be finite in float32, got {value}")


def expect_nothing(name: str, value) -> None:
    """Accept any value: others check it."""


class Asked(NamedTuple):
    """The problem's sizes, scale and device, and a call's arrays, by which a row reads an option.

    Attributes:
        batch, num_heads_q, softmax_scale, device: of the problem.
        views: of the options that are arrays, by name.
        origin: the numbers of its first row, column and head in a larger problem, whose heads
            arrays then have; None where they are its own.
    """

    batch: int
    num_heads_q: int
    softmax_scale: float
    device: Any
    views: Mapping[str, ArrayView] = {}
    origin: tuple[int, int, int] | None = None

    @property
    def first_head(self) -> int | None:
        """The number of its first head in arrays of a larger problem's heads; None without."""
        return None if self.origin is None else self.origin[2]


class Beside(NamedTuple):
    """A further option that a feature reads: its name, its default, and a value to time with.

    It is a number, or an array of the caller's, which kernels read.
    """

    name: str
    default: Any
    example: Any


class Gradient(NamedTuple):
    """The gradient of a feature's option, a sum of shares of each row of queries.

    Attributes:
        shares: in NumPy the share of each (batch, head, query). Of an end: (lse, product, value)
            -> shares, with `product` that of dO and O, less the gradient of lse. Of a score:
            (ds, i, j) -> shares, with `ds` the gradient of the score that the feature gives.
        family: the kernels that leave the shares; `shared.array_sums` adds them up.
        is_default: whether `attention_backward` returns it unless `wrt` says otherwise.
    """

    shares: Callable
    family: str
    is_default: bool = False


@dataclass(frozen=True)
class Feature:
    """One feature.

    Attributes:
        name: in `Traits.features` and their string form; of the function in `tiles.features`; and
            of the switch of commands, "--name".
        title: in messages and help.
        hook: at which kernels call it.
        option: the option of `numflash.attention` that asks for it.
        default: the option's value where the feature is not asked for.
        check: (option's name, value) raises TypeError or ValueError for values no call may have.
        is_array: the option is an array of the caller's, which kernels read.
        record: the record of its arguments; a pointer's value is the option's name.
        read: (option's value, an array as its view; `Asked`) -> the record, or raises.
        reference: of a score: (s, value, i, j) -> (s, ds) in NumPy, of s (batch, head, query, key)
            and in its dtype; i and j are places of queries and keys, (query, 1) and (key,). Of
            an end: (row_max, row_sum, value) -> (row_max, row_sum, kept), (batch, head, query, 1).
            Of weights: (shape, origin, value, the values of the options beside it) -> float64
            factors of P (batch, head, query, key); origin has the first row, column and head.
        gradient: that of the option, which is an array of heads; None if it has none.
        example: num_heads_q -> a value to time and check kernels with.
        unit: record -> the divisor of scores when the function gets them: products are scaled
            in any case, so that this costs nothing. Only of the first feature.
        bends: the derivative of a score is not 1, so that the backward must keep it.
        of_a_head: the heads' own value that kernels keep for all rows of a tile, so that heads
            cannot share a tile. None if they can.
        beside: further options that the feature reads.
        numbers: (the option's value, the values of those beside it) -> by name, the numbers that a
            launch fills in, so that a call with others is made ready by the same; raises for
            values that no call may have. The record has the names. Empty where the feature is not
            asked for. None of a feature whose record has all of its numbers.
        in_8_bits: forwards on 8-bit floats have it.
    """

    name: str
    title: str
    hook: str
    option: str
    record: type
    read: Callable[[Any, Asked], Any]
    reference: Callable
    example: Callable[[int], Any]
    default: Any = None
    check: Callable[[str, Any], None] = expect_nothing
    is_array: bool = False
    unit: Callable[[Any], float] = lambda record: 1.0
    bends: bool = False
    of_a_head: str | None = None
    gradient: Gradient | None = None
    beside: tuple[Beside, ...] = ()
    numbers: Callable[..., dict[str, float]] | None = None
    in_8_bits: bool = True

    def is_asked(self, value) -> bool:
        """Whether an option's value asks for the feature."""
        return value is not None if self.is_array else bool(value)

    @property
    def absent(self) -> Any:
        """The record where the feature is not compiled in and nothing reads it."""
        kinds = self.record.__annotations__.values()
        return self.record(*(None if isinstance(kind, Pointer) else 0 for kind in kinds))


def expect_of_heads(
    name: str, view: ArrayView, asked: Asked, by_batch: bool = False
) -> str | FromHead:
    """Check values of heads, or by batch entry and head; the pointer to the first of the call's.

    Raises TypeError, ValueError.
    """
    if view.dtype != "float32":
        raise TypeError(f"{name} must be float32, got {view.dtype}")
    if view.device != asked.device:
        raise ValueError(
            f"{name} must lie on the device of q, {asked.device}, got device {view.device}"
        )
    first, heads = asked.first_head, asked.num_heads_q
    leading = ((), (asked.batch,)) if by_batch else ((),)
    if first is None:
        if view.shape not in [(*batch, heads) for batch in leading]:
            shapes = " or ".join(
                f"({asked.batch}, {heads})" if b else f"({heads},)" for b in leading
            )
            raise ValueError(f"{name} must have shape {shapes}, got {view.shape}")
        return name
    if view.shape[:-1] not in leading or view.shape[-1:] < (first + heads,):
        shapes = " or ".join(f"({asked.batch}, heads)" if b else "(heads,)" for b in leading)
        raise ValueError(
            f"{name} must have shape {shapes} with at least {first + heads} heads, origin's "
            f"{first} and {heads} of q, got {view.shape}"
        )
    return FromHead(name, first)


class Softcap(NamedTuple):
    """The bound of scores."""

    cap: f32


def _expect_softcap(name: str, value) -> None:
    expect_real(name, value)
    if value < 0:
        raise ValueError(f"{name} must be positive, or 0 for none, got {value}")


def _read_softcap(value: float, asked: Asked) -> Softcap:
    if abs(asked.softmax_scale) / value > MAX_FLOAT32:
        raise ValueError(
            f"softcap must not be so small that softmax_scale / softcap overflows float32, got "
            f"{value} with softmax_scale {asked.softmax_scale}"
        )
    return Softcap(float(value))


def _softcap(s, value, i, j):
    cap = s.dtype.type(value)
    bent = np.tanh(s / cap)
    return bent * cap, 1 - bent * bent


class Alibi(NamedTuple):
    """Slopes (batch, num_heads_q) and their strides in elements."""

    slopes: Pointer(f32)
    batch: i64
    head: i64


def _read_alibi(slopes: ArrayView, asked: Asked) -> Alibi:
    pointer = expect_of_heads("alibi_slopes", slopes, asked, by_batch=True)
    return Alibi(pointer, *(0, *slopes.strides)[-2:])


def _alibi(s, value, i, j):
    slopes = np.broadcast_to(np.asarray(value).astype(s.dtype), s.shape[:2])[:, :, None, None]
    return s - slopes * np.abs(i - j).astype(s.dtype), s.dtype.type(1)


def _shares_of_slopes(ds, i, j):
    return -(ds * np.abs(i - j).astype(ds.dtype)).sum(-1)


def _example_of_slopes(num_heads_q: int) -> np.ndarray:
    head = np.arange(1, num_heads_q + 1, dtype=np.float32)
    return 2 ** (-8 * head / num_heads_q)


class Sinks(NamedTuple):
    """A logit for each query head, (num_heads_q,), and its stride in elements."""

    data: Pointer(f32)
    head: i64


def _read_sinks(sinks: ArrayView, asked: Asked) -> Sinks:
    return Sinks(expect_of_heads("sinks", sinks, asked), sinks.strides[0])


def _sinks(row_max, row_sum, value):
    sinks = np.asarray(value).astype(row_max.dtype)[None, :, None, None]
    top = np.maximum(row_max, sinks)
    # -inf - -inf would be NaN: of a row without keys, and a sink that is none.
    shift = np.where(np.isneginf(top), row_max.dtype.type(0), top)
    kept = np.exp(row_max - shift)
    return top, row_sum * kept + np.exp(sinks - shift), kept


def _shares_of_sinks(lse, product, value):
    sinks = np.asarray(value).astype(lse.dtype)[None, :, None]
    # A row that sees no key and has no sink has no weight.
    share = np.where(np.isneginf(lse), lse.dtype.type(0), lse)
    return -np.exp(sinks - share) * product


class Dropout(NamedTuple):
    """Which weights are dropped, and the factor of the others.

    A weight is dropped if its 16 random bits, shifted left by 16, are below `limit` as an unsigned
    number. The seed is `low` and `high`, or where `words` is not 0 what `seed` points to: so many
    words of 32 bits. `log2_scale` is the logarithm of the factor. Random bits are those of the
    caller's rows, columns and heads, of which the first are `row`, `column` and `head`; rows and
    columns are multiples of 16.
    """

    seed: Pointer(u32)
    words: i32
    low: i32
    high: i32
    limit: i32
    scale: f32
    log2_scale: f32
    row: i32
    column: i32
    head: i32


_SEED_WORDS = {"int32": 1, "int64": 2, "uint64": 2}
_STEPS = 2**16
_NO_NUMBERS: dict[str, float] = {}


def _expect_dropout(name: str, value) -> None:
    expect_real(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {value}")
    if steps_dropped(value) == _STEPS:
        raise ValueError(
            f"{name} must stay below 1 when it is rounded to a multiple of 2**-16, got {value}"
        )


def steps_dropped(dropout_p: float) -> int:
    """The values of 16 random bits below which weights are dropped."""
    return round(_STEPS * float(dropout_p))


def _expect_seed(name: str, value) -> None:
    if value is None:
        raise ValueError(f"dropout_p needs a {name}: an integer, or a device array of one")
    if isinstance(value, bool | str | Real) and not is_seed_number(value):
        kind = type(value).__name__
        raise TypeError(
            f"{name} must be an integer or a device array of one, got {value!r} ({kind})"
        )
    if is_seed_number(value) and not -(2**63) <= value < 2**64:
        raise ValueError(f"{name} must have at most 64 bits, got {value}")


def is_seed_number(value) -> bool:
    """Whether a seed is a number, not an array."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _read_dropout(dropout_p: float, asked: Asked) -> Dropout:
    view, words = asked.views.get("seed"), 0
    if view is not None:
        if view.dtype not in _SEED_WORDS:
            raise TypeError(f"seed must be int64, int32 or uint64, got {view.dtype}")
        if math.prod(view.shape) != 1:
            raise ValueError(f"seed must be an array of one element, got shape {view.shape}")
        if view.device != asked.device:
            raise ValueError(
                f"seed must lie on the device of q, {asked.device}, got device {view.device}"
            )
        words = _SEED_WORDS[view.dtype]
    row, column, head = asked.origin or (0, 0, 0)
    for name, value in (("row", row), ("column", column)):
        if value % ALIGNMENT:
            raise ValueError(
                f"origin must have a {name} that is a multiple of {ALIGNMENT} with dropout_p, "
                f"whose random bits belong to so many {name}s, got {value}"
            )
    return Dropout("seed" if words else None, words, *_NUMBERS_OF_DROPOUT, row, column, head)


_NUMBERS_OF_DROPOUT = (
    "dropout_low",
    "dropout_high",
    "dropout_limit",
    "dropout_scale",
    "dropout_log2_scale",
)


def _numbers_of_dropout(dropout_p: float, seed) -> dict[str, float]:
    if seed is None and type(dropout_p) is float and dropout_p == 0.0:
        return _NO_NUMBERS
    _expect_dropout("dropout_p", dropout_p)
    if dropout_p == 0:
        return _NO_NUMBERS
    _expect_seed("seed", seed)
    key, steps = key_of(int(seed) if is_seed_number(seed) else 0), steps_dropped(dropout_p)
    low, high, limit = (word - (word >> 31 << 32) for word in (*key, steps << 16))
    scale = _STEPS / (_STEPS - steps)
    return dict(zip(_NUMBERS_OF_DROPOUT, (low, high, limit, scale, math.log2(scale)), strict=True))


def _dropout(shape, origin, value, seed):
    steps = steps_dropped(value)
    bits = random_bits(shape, int(np.asarray(seed).reshape(())), origin)
    return np.where(bits >= steps, _STEPS / (_STEPS - steps), 0.0)


FEATURES = (
    Feature(
        "softcap",
        "soft capping",
        "score",
        "softcap",
        Softcap,
        _read_softcap,
        _softcap,
        example=lambda num_heads_q: 30.0,
        default=0.0,
        check=_expect_softcap,
        unit=lambda record: record.cap,
        bends=True,
    ),
    Feature(
        "alibi",
        "ALiBi",
        "score",
        "alibi_slopes",
        Alibi,
        _read_alibi,
        _alibi,
        example=_example_of_slopes,
        is_array=True,
        of_a_head="ALiBi slopes",
        gradient=Gradient(_shares_of_slopes, "backward-rows"),
    ),
    Feature(
        "sinks",
        "attention sinks",
        "finish",
        "sinks",
        Sinks,
        _read_sinks,
        _sinks,
        example=lambda num_heads_q: np.linspace(-2, 4, num_heads_q, dtype=np.float32),
        is_array=True,
        gradient=Gradient(_shares_of_sinks, "delta", is_default=True),
    ),
    Feature(
        "dropout",
        "dropout",
        "weigh",
        "dropout_p",
        Dropout,
        _read_dropout,
        _dropout,
        example=lambda num_heads_q: 0.125,
        default=0.0,
        check=_expect_dropout,
        of_a_head="random bits",
        beside=(Beside("seed", None, 1),),
        numbers=_numbers_of_dropout,
        in_8_bits=False,
    ),
)
BY_NAME = {row.name: row for row in FEATURES}

Features = NamedTuple("Features", [(row.name, row.record) for row in FEATURES])
Features.__doc__ = "The arguments of all features, by name: a kernel reads those that it has."
ABSENT = Features(*(row.absent for row in FEATURES))
"""The records where no feature is compiled in."""
NO_FEATURES = Features(*[None] * len(FEATURES))
"""The values of a problem that asks for none."""


def rows_of(names: tuple[str, ...]) -> tuple[Feature, ...]:
    """The rows with these names."""
    return tuple(BY_NAME[name] for name in names)


def with_gradient(names: tuple[str, ...], family: str | None = None) -> tuple[Feature, ...]:
    """Of the rows with these names those with a gradient, whose shares `family` leaves."""
    rows = [row for row in rows_of(names) if row.gradient is not None]
    return tuple(row for row in rows if family in (None, row.gradient.family))


def default_gradients(names: tuple[str, ...]) -> tuple[str, ...]:
    """What `attention_backward` returns gradients of by default, with these features."""
    rows = [row for row in with_gradient(names) if row.gradient.is_default]
    return "q", "k", "v", *(row.option for row in rows)
