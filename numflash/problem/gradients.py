"""The gradients that a backward call returns, and what it is given for them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from numflash.configs.features import FEATURES, default_gradients, with_gradient
from numflash.problem.array_gradients import ArrayGradient
from numflash.problem.options import kind_of

_OPERANDS = ("q", "k", "v")
NAMES = (*_OPERANDS, *(row.option for row in FEATURES if row.gradient is not None))
"""All that a backward has gradients of, where a call has it, besides arrays that scores read."""
_ARRAYS = re.compile(r"bias|aux\d+", re.ASCII)


@dataclass(frozen=True)
class Gradients:
    """The gradients that a backward call returns.

    Attributes:
        wrt: what they are of, by name and in order: q, k, v, and options.
        arrays: of those the ones that the program reads.
        dlse: whether lse has a gradient of its own.
        delta: whether the product of dO and O is the caller's.
        float32_out: whether O is float32 where q, k and v have fewer bits.
        in_float32: whether dq, dk and dv are.
    """

    wrt: tuple[str, ...] = _OPERANDS
    arrays: tuple[ArrayGradient, ...] = ()
    dlse: bool = False
    delta: bool = False
    float32_out: bool = False
    in_float32: bool = False

    @classmethod
    def of(
        cls,
        features: tuple[str, ...],
        wrt=None,
        arrays: Mapping[str, ArrayGradient | Exception] | None = None,
        **given: bool,
    ) -> "Gradients":
        """The gradients of a call with these features; `wrt` is the caller's, None the default.

        Args:
            features: their names.
            wrt: what the caller wants gradients of.
            arrays: bias and aux0, aux1, ... of the call; of what has no gradient the error.
            given: the other attributes.

        Raises:
            TypeError: wrt is no tuple of names, or names a number or an array of integers.
            ValueError: a name that is none, is said twice, or of what the call does not have.
        """
        if wrt is None:
            return cls(default_gradients(features), **given)
        if not isinstance(wrt, tuple | list) or not all(isinstance(name, str) for name in wrt):
            rule = 'wrt must be a tuple of names, as in ("q", "k")'
            raise TypeError(f"{rule}, got {wrt!r} ({kind_of(wrt)})")
        arrays = arrays or {}
        found = [name for name, each in arrays.items() if isinstance(each, ArrayGradient)]
        there = (*_OPERANDS, *(row.option for row in with_gradient(features)), *found)
        if not wrt:
            raise ValueError(f"wrt must name something of {', '.join(there)}, got {wrt!r}")
        for i, name in enumerate(wrt):
            if name not in NAMES and not _ARRAYS.fullmatch(name):
                names = ", ".join([*NAMES, "bias", "aux0, aux1, ..."])
                raise ValueError(f"wrt must name gradients of {names}, got {name!r}")
            if isinstance(arrays.get(name), Exception):
                raise arrays[name]
            if name not in there:
                raise ValueError(
                    f"wrt names {name!r}, which this call does not have; it has gradients of "
                    f"{', '.join(there)}"
                )
            if name in wrt[:i]:
                raise ValueError(f"wrt must name each gradient once, got {name!r} twice")
        of_arrays = tuple(arrays[name] for name in wrt if name in arrays)
        return cls(tuple(wrt), of_arrays, **given)

    def options_of(self, family: str, features: tuple[str, ...]) -> tuple[str, ...]:
        """Of the options, with these features, those whose gradient begins with this family."""
        rows = with_gradient(features, family)
        return tuple(row.option for row in rows if row.option in self.wrt)

    def needs(self, family: str, features: tuple[str, ...]) -> bool:
        """Whether a family of kernels makes one of the gradients, or begins it."""
        of_operands = {"backward-dq": ("q",), "backward-dkdv": ("k", "v")}
        made = of_operands.get(family) or self.options_of(family, features)
        return any(name in self.wrt for name in made)
