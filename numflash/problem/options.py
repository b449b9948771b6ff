"""AttentionOptions: the options of an attention call, each said once."""

import math
from collections import namedtuple
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from operator import attrgetter
from typing import Any

import numpy as np

from numflash.configs.features import FEATURES, Feature, expect_nothing, expect_real
from numflash.functions.identity import key_of
from numflash.functions.trace import describe
from numflash.problem.block_masks import NUMBER, ListedBlocks, expect_block_mask
from numflash.problem.fp8 import Fp8Recipe

LAYOUTS = ("bshd", "bhsd")
ALIGNMENTS = ("bottom_right", "top_left")
PRECISIONS = ("tf32", "fp8", "auto")
# Positions are 32-bit in kernels.
_MAX_SHIFT = 2**30


def expect_one_of(name: str, value, choices: Iterable[str]) -> None:
    """Check a string. Raises TypeError, ValueError."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {value!r} ({kind_of(value)})")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def kind_of(value) -> str:
    """The name of a value's type."""
    return type(value).__name__


def _expect_scale(name: str, value) -> None:
    if value is not None:
        expect_real(name, value)


def _expect_bool(name: str, value) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} ({kind_of(value)})")


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
    expect_one_of(name, value, LAYOUTS)


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
    """An option of `numflash.attention`.

    Attributes:
        name: of the parameter.
        default: its value where a call does not give it.
        check: (name, value) raises TypeError or ValueError for values that no call may have.
            `problem.describe` or the choice of kernels check it together with others.
        is_array: whether it is an array of the caller's, which kernels read, or may be one.
    """

    name: str
    default: Any
    check: Callable[[str, Any], None] = expect_nothing
    is_array: bool = False


def _of_feature(row: Feature) -> list[Option]:
    beside = [Option(each.name, each.default, is_array=True) for each in row.beside]
    return [Option(row.option, row.default, row.check, row.is_array), *beside]


OPTIONS = (
    Option("softmax_scale", None, _expect_scale),
    Option("causal", False, _expect_bool),
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
    Option("layout", "bshd", _expect_layout),
    Option("precision", None, _expect_precision),
    Option("config", None),
    Option("fp8", None, _expect_recipe),
    Option("max_rel_error", None, _expect_error),
    Option("out_dtype", None),
)
"""In the order of the fields of `AttentionOptions`."""
ARRAY_OPTIONS = tuple(option.name for option in OPTIONS if option.is_array)
_INTEGERS = int, np.integer

_Options = namedtuple(
    "_Options",
    [option.name for option in OPTIONS],
    defaults=[option.default for option in OPTIONS],
)


# Types in an option's key: numbers, and types that no other type is equal to.
_SCALARS = tuple(row.option for row in FEATURES if not row.is_array and row.numbers is None)
_NUMBERS = attrgetter("softmax_scale", "causal", "shift", "max_rel_error", *_SCALARS)
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
        """The options that a caller gave by name.

        Args:
            function: that was called, for the message.
            given: by name.
            others: further options of the function, which it has taken out of `given`.

        Raises:
            TypeError: no call has such an option.
        """
        unknown = sorted(set(given) - {*cls._fields, *others})
        if unknown:
            takes = ", ".join([*others, *cls._fields])
            raise TypeError(
                f"{function} got unknown options: {', '.join(unknown)}; it takes {takes}"
            )
        return cls(**given)

    def arrays(self) -> dict[str, Any]:
        """The caller's arrays among the options, by name; those of `aux` are aux0, aux1, ..."""
        given = {name: getattr(self, name) for name in ARRAY_OPTIONS}
        # A seed may also be a number.
        found = {n: x for n, x in given.items() if x is not None and not isinstance(x, _INTEGERS)}
        if isinstance(self.aux, tuple | list):
            of_aux = {f"aux{n}": each for n, each in enumerate(self.aux)}
            found |= {name: each for name, each in of_aux.items() if not isinstance(each, NUMBER)}
        if isinstance(self.block_mask, ListedBlocks):
            found |= self.block_mask.arrays()
        return found

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
        return values, kinds, config, origin, words, blocks, *self._key_of_functions()

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
