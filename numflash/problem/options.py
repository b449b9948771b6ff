"""The options of an attention call and of its gradients, each said once.

`AttentionOptions` are those that `attention` takes, `GradientOptions` those that only
`attention_backward` takes.
"""

import math
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from operator import attrgetter
from typing import Any

import numpy as np

from numflash.configs.features import FEATURES, Feature, expect_nothing, expect_real
from numflash.functions.identity import key_of
from numflash.functions.trace import describe
from numflash.problem.block_masks import NUMBER, ListedBlocks, expect_block_mask
from numflash.problem.fp8 import Fp8Recipe
from numflash.problem.sequences import NAMES as OF_SEQUENCES

LAYOUTS = ("bshd", "bhsd")
PACKED = "thd"
"""The layout of sequences that lie one after another: (tokens, heads, head_dim)."""
ALIGNMENTS = ("bottom_right", "top_left")
PRECISIONS = ("tf32", "fp8", "auto")
# Positions are 32-bit in kernels.
_MAX_SHIFT = 2**30


def with_layout(options: dict) -> dict:
    """A caller's options: with cu_seqlens their layout is "thd", unless they say another."""
    packed = any(options.get(f"cu_seqlens_{side}") is not None for side in "qk")
    return {"layout": PACKED, **options} if packed else options


def expect_one_of(name: str, value, choices: Iterable[str]) -> None:
    """Check a string. Raises TypeError, ValueError."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {value!r} ({kind_of(value)})")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def expect_bool(name: str, value) -> None:
    """Check a truth value. Raises TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} ({kind_of(value)})")


def kind_of(value) -> str:
    """The name of a value's type."""
    return type(value).__name__


def _expect_scale(name: str, value) -> None:
    if value is not None:
        expect_real(name, value)


def _expect_alignment(name: str, value) -> None:
    expect_one_of(name, value, ALIGNMENTS)


def _expect_shift(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} ({kind_of(value)})")
    if not -_MAX_SHIFT < value < _MAX_SHIFT:
        raise ValueError(f"{name} must lie between -2**30 and 2**30, got {value}")


def _expect_window(name: str, value) -> None:
    rule = f"{name} must be a pair (left, right) of numbers of tokens, -1 or None for all"
    if not isinstance(value, tuple | list):
        raise TypeError(f"{rule}, got {value!r} ({kind_of(value)})")
    if len(value) != 2:
        raise ValueError(f"{rule}, got {value!r}")
    for side in value:
        if side is None:
            continue
        if isinstance(side, bool) or not isinstance(side, Integral):
            raise TypeError(f"{rule}, got {value!r}")
        if side < -1:
            raise ValueError(f"{rule}, got {value!r}")


def _expect_schedule(name: str, value) -> None:
    # Its class is of the layer of public functions.
    if value is not None and not callable(getattr(value, "bind", None)):
        raise TypeError(f"{name} must be what plan_varlen returns, got {value!r}")


def _expect_appended(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def _expect_num_splits(name: str, value) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer or None, got {value!r} ({kind_of(value)})")
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def _expect_origin(name: str, value) -> None:
    if value is None:
        return
    rule = f"{name} must be three numbers (row, column, head)"
    if not isinstance(value, tuple | list):
        raise TypeError(f"{rule}, got {value!r} ({kind_of(value)})")
    if any(isinstance(number, bool) or not isinstance(number, Integral) for number in value):
        raise TypeError(f"{rule}, got {value!r}")
    if len(value) != 3 or not all(0 <= number < _MAX_SHIFT for number in value):
        raise ValueError(f"{rule} from 0 up to 2**30, got {value!r}")


def _expect_function(name: str, value) -> None:
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function, got {value!r} ({kind_of(value)})")


def _expect_aux(name: str, value) -> None:
    if not isinstance(value, tuple | list):
        raise TypeError(
            f"{name} must be a tuple of the arrays and numbers that functions get, got "
            f"{kind_of(value)}"
        )


def _expect_layout(name: str, value) -> None:
    expect_one_of(name, value, (*LAYOUTS, PACKED))


def _expect_precision(name: str, value) -> None:
    if value is not None:
        expect_one_of(name, value, PRECISIONS)


def _expect_recipe(name: str, value) -> None:
    if value is not None and not isinstance(value, Fp8Recipe):
        raise TypeError(f"{name} must be an Fp8Recipe, got {value!r} ({kind_of(value)})")


def _expect_error(name: str, value) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number, got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


@dataclass(frozen=True)
class Option:
    """An option of `numflash.attention`, or of `numflash.attention_backward`.

    Attributes:
        name: of the parameter.
        default: its value where a call does not give it.
        check: (name, value) raises TypeError or ValueError for values that no call may have.
            `problem.describe` or the choice of kernels check it together with others.
        is_array: whether it is an array of the caller's, which kernels read, or may be one.
        in_backward: of one of `attention`, whether `attention_backward` takes it, too.
    """

    name: str
    default: Any
    check: Callable[[str, Any], None] = expect_nothing
    is_array: bool = False
    in_backward: bool = True


def _of_feature(row: Feature) -> list[Option]:
    beside = [Option(each.name, each.default, is_array=True) for each in row.beside]
    return [Option(row.option, row.default, row.check, row.is_array), *beside]


_CUMULATIVE = "cu_seqlens_q", "cu_seqlens_k"
OPTIONS = (
    Option("softmax_scale", None, _expect_scale),
    Option("causal", False, expect_bool),
    Option("causal_align", "bottom_right", _expect_alignment),
    Option("shift", 0, _expect_shift),
    Option("window_size", (-1, -1), _expect_window),
    *(option for row in FEATURES for option in _of_feature(row)),
    Option("origin", None, _expect_origin),
    Option("bias", None, is_array=True),
    Option("mask", None, is_array=True),
    Option("score_mod", None, _expect_function),
    Option("score_mod_grad", None, _expect_function),
    Option("mask_mod", None, _expect_function),
    Option("aux", (), _expect_aux),
    Option("block_mask", None, expect_block_mask),
    *(Option(name, None, is_array=True) for name in OF_SEQUENCES if name not in _CUMULATIVE),
    Option("layout", "bshd", _expect_layout),
    Option("precision", None, _expect_precision),
    Option("config", None),
    # Not of `numflash.attention_backward`.
    Option("batch_invariant", False, expect_bool, in_backward=False),
    Option("fp8", None, _expect_recipe, in_backward=False),
    Option("max_rel_error", None, _expect_error, in_backward=False),
    Option("out_dtype", None, in_backward=False),
    # Of functions of packed sequences and of caches only.
    *(Option(name, None, is_array=True) for name in _CUMULATIVE),
    Option("schedule", None, _expect_schedule),
    Option("page_table", None, is_array=True),
    Option("appended", 0, _expect_appended),
    Option("cached", False, expect_bool),
    Option("num_splits", None, _expect_num_splits, in_backward=False),
)
"""In the order of the fields of `AttentionOptions`: each function gives the first of them."""
GRADIENT_OPTIONS = (
    Option("dlse", None, is_array=True),
    Option("delta", None, is_array=True),
    Option("wrt", None),
    Option("grad_dtype", None),
)
"""In the order of the fields of `GradientOptions`."""
ARRAY_OPTIONS = tuple(option.name for option in OPTIONS if option.is_array)
_OF_FORWARD = {option.name: option.default for option in OPTIONS if not option.in_backward}
_GRADIENT_ARRAYS = tuple(option.name for option in GRADIENT_OPTIONS if option.is_array)
# A seed may also be a number.
_OR_A_NUMBER = {each.name for row in FEATURES for each in row.beside}
_INTEGERS = int, np.integer


def _fields_of(name: str, options: tuple[Option, ...]):
    names, defaults = zip(*((each.name, each.default) for each in options), strict=True)
    return namedtuple(name, names, defaults=defaults)


_Options = _fields_of("_Options", OPTIONS)
_GradientOptions = _fields_of("_GradientOptions", GRADIENT_OPTIONS)


# Types in an option's key: numbers, and types that no other type is equal to.
_SCALARS = tuple(row.option for row in FEATURES if not row.is_array and row.numbers is None)
_NUMBERS = attrgetter(
    "softmax_scale",
    "causal",
    "shift",
    "max_rel_error",
    "appended",
    "cached",
    "batch_invariant",
    "num_splits",
    *_SCALARS,
)
_WORDS = attrgetter("causal_align", "layout", "precision", "fp8", "out_dtype")
# What finds the numbers of a launch, and the options that it takes.
_FILLED_IN = tuple(
    (row.numbers, attrgetter(row.option, *(each.name for each in row.beside)))
    for row in FEATURES
    if row.numbers is not None
)


class AttentionOptions(_Options):
    """The options of an attention call, one field each, by default as `OPTIONS` says.

    A tuple and no dataclass: every call makes one.
    """

    __slots__ = ()

    @classmethod
    def of(cls, function: str, given: dict, others: tuple[str, ...] = ()) -> "AttentionOptions":
        """Those that a caller gave by name: `options_of` a call without gradients."""
        (options,) = _options_of(function, given, others, cls)
        return options

    def arrays(self) -> dict[str, Any]:
        """The caller's arrays among the options, by name; those of `aux` are aux0, aux1, ..."""
        found = {n: x for n in ARRAY_OPTIONS if (x := getattr(self, n)) is not None}
        for name in _OR_A_NUMBER & found.keys():
            if isinstance(found[name], _INTEGERS):
                del found[name]
        if isinstance(self.aux, tuple | list):
            of_aux = {f"aux{n}": each for n, each in enumerate(self.aux)}
            found |= {name: each for name, each in of_aux.items() if not isinstance(each, NUMBER)}
        if isinstance(self.block_mask, ListedBlocks):
            found |= self.block_mask.arrays()
        return found

    def with_arrays(self, given: Mapping[str, Any]) -> "AttentionOptions":
        """The options with these in the places of their arrays, by the names of `arrays`."""
        more = {name: given[name] for name in ARRAY_OPTIONS if name in given}
        if isinstance(self.aux, tuple | list):
            named = ((f"aux{n}", x) for n, x in enumerate(self.aux))
            more["aux"] = tuple([x if isinstance(x, NUMBER) else given[n] for n, x in named])
        if isinstance(self.block_mask, ListedBlocks):
            more["block_mask"] = self.block_mask.with_arrays(given)
        return self._replace(**more)

    def check(self) -> None:
        """Raise TypeError or ValueError for an option that no call may have."""
        for option, value in zip(OPTIONS, self, strict=True):
            option.check(option.name, value)

    def numbers(self) -> dict[str, float]:
        """By name, the numbers that launches fill in: calls with others are ready, too.

        Raises TypeError, ValueError for values that no call may have.
        """
        found = {}
        for numbers_of, values in _FILLED_IN:
            found |= numbers_of(*values(self))
        if isinstance(self.aux, tuple | list) and self.aux:
            for n, each in enumerate(self.aux):
                if isinstance(each, NUMBER):
                    kind = describe(each, f"aux{n}").kind
                    found[f"aux{n}"] = int(each) if kind == "i32" else float(each)
        return found

    def key(self) -> tuple:
        """A key of a ready call. Arrays are left out: they have keys of their own.

        So are numbers that launches fill in; which of them there are belongs to the key.

        It holds the types of numbers: a call made ready by 1 must not let a wrong True pass.
        Raises TypeError where an option is of a type that no call may have.
        """
        config, origin = self.config, self.origin
        if not isinstance(self.block_mask, ListedBlocks | None):
            raise TypeError("no call may have such a block_mask")
        values = *_NUMBERS(self), *self.window_size
        kinds = *map(type, values), type(self.window_size), type(config)
        if isinstance(config, dict):
            config = tuple(config.items())
        if origin is not None:
            origin = *origin, *map(type, origin)
        words = _WORDS(self)
        blocks = None if self.block_mask is None else self.block_mask.key()
        planned = self.schedule is not None
        return values, kinds, config, origin, words, blocks, planned, *self._key_of_functions()

    def _key_of_functions(self) -> tuple:
        """What functions mean, and the types of the numbers that they get."""
        functions = self.score_mod, self.score_mod_grad, self.mask_mod
        if not isinstance(self.aux, tuple | list):
            raise TypeError("no call may have such an aux")
        if not self.aux and all(each is None for each in functions):
            return ()
        keys = tuple(map(key_of, functions))
        if None in keys:
            raise TypeError("nobody can tell whether these functions mean what they meant before")
        return *keys, *(type(x) if isinstance(x, NUMBER) else None for x in self.aux)

    def of_backward(self, config: dict | None = None) -> "AttentionOptions":
        """Those that the backward of the call takes, with these configs by family."""
        return self._replace(**_OF_FORWARD, config=config)


class SharedOptions(AttentionOptions):
    """Options without arrays that many calls share: what calls ask of them is found once."""

    # Without __slots__, for what is found.

    def arrays(self) -> dict[str, Any]:
        """None."""
        return {}

    def numbers(self) -> dict[str, float]:
        """See `AttentionOptions.numbers`."""
        return self._numbers.copy()

    def key(self) -> tuple:
        """See `AttentionOptions.key`."""
        return self._key

    def of_backward(self, config: dict | None = None) -> AttentionOptions:
        """See `AttentionOptions.of_backward`."""
        return self._of_backward if config is None else super().of_backward(config)

    @cached_property
    def _numbers(self) -> dict[str, float]:
        return super().numbers()

    @cached_property
    def _key(self) -> tuple:
        return super().key()

    @cached_property
    def _of_backward(self) -> AttentionOptions:
        return super().of_backward()


class GradientOptions(_GradientOptions):
    """The options that only a backward has, by default as `GRADIENT_OPTIONS` says.

    `problem.gradients` checks them.
    """

    __slots__ = ()

    def arrays(self) -> dict[str, Any]:
        """The caller's arrays among them, by name."""
        return {n: x for n in _GRADIENT_ARRAYS if (x := getattr(self, n)) is not None}

    def without_arrays(self) -> "GradientOptions":
        """All but the arrays, as a key of ready calls, which has keys of arrays."""
        if isinstance(self.wrt, list):
            return self._replace(wrt=tuple(self.wrt)).without_arrays()
        given = self.arrays()
        return self._replace(**dict.fromkeys(given)) if given else self


def options_of(
    function: str, given: dict, others: tuple[str, ...] = ()
) -> tuple[AttentionOptions, GradientOptions]:
    """The options of a call and of its gradients that a caller gave by name.

    Args:
        function: that was called, for the message.
        given: by name.
        others: further options of the function, which it has taken out of `given`.

    Raises:
        TypeError: no call has such an option.
    """
    options, asked = _options_of(function, given, others, AttentionOptions, GradientOptions)
    return options, asked


def _options_of(function: str, given: dict, others: tuple[str, ...], *kinds: type) -> list:
    names = *others, *(name for kind in kinds for name in kind._fields)
    if unknown := sorted({*given} - {*names}):
        raise TypeError(
            f"{function} got unknown options: {', '.join(unknown)}; it takes {', '.join(names)}"
        )
    given = with_layout(given)
    return [kind(**{n: given[n] for n in kind._fields if n in given}) for kind in kinds]
