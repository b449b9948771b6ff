"""A caller's options on 8-bit floats: codes, scales, and the allowed error."""

from typing import Any

from numflash.calls.fp8_sources import AllDescribed, Described
from numflash.problem.fp8 import Fp8Array
from numflash.problem.options import AttentionOptions
from numflash.runtime.errors import UnsupportedError

MAX_REL_ERROR = 0.1
"""The error that precision="auto" allows by default."""


def has_fp8(q, k, v) -> bool:
    """Whether some array is an `Fp8Array`."""
    # Spelled out, because every call asks.
    return isinstance(q, Fp8Array) or isinstance(k, Fp8Array) or isinstance(v, Fp8Array)


def descales_of(q_descale, k_descale, v_descale) -> tuple | None:
    """The scales of a call's codes; None where it has none."""
    if q_descale is k_descale is v_descale is None:
        return None
    return q_descale, k_descale, v_descale


def take_apart(
    arrays: dict[str, Any], descales: tuple, options: AttentionOptions
) -> tuple[dict[str, Any], AttentionOptions, AllDescribed]:
    """The arrays of an FP8 call, its options, and what else is to know of each `Fp8Array`.

    Raises:
        ValueError: another precision, or scales of what has its own.
    """
    if options.precision not in (None, "fp8", "auto"):
        raise ValueError(f'arrays of 8 bits go with precision="fp8", got {options.precision!r}')
    described, apart = [], {}
    for (name, array), descale in zip(arrays.items(), descales, strict=True):
        if isinstance(array, Fp8Array):
            if descale is not None:
                raise ValueError(
                    f"{name} is an Fp8Array with scales of its own: no {name}_descale"
                )
            described.append((name, Described.of(array)))
            array, descale = array.data, array.descale
        apart[name] = array
        if descale is not None:
            apart[f"{name}_descale"] = descale
    return apart, options._replace(precision=options.precision or "fp8"), tuple(described)


def with_budget(options: AttentionOptions) -> AttentionOptions:
    """The options with a max_rel_error. Raises ValueError where it has no meaning."""
    budget = options.max_rel_error
    if budget is not None and options.precision != "auto":
        raise ValueError(f'max_rel_error goes with precision="auto", got {options.precision!r}')
    return options._replace(max_rel_error=MAX_REL_ERROR) if budget is None else options


def expect_recipe_is_used(options: AttentionOptions) -> None:
    """Raise ValueError for a recipe of quantisation where nothing is quantised."""
    if options.fp8 is not None and options.precision not in ("fp8", "auto"):
        raise ValueError(
            f'fp8 says how to quantise with precision="fp8"; precision is {options.precision!r}'
        )


def refuse_backward(q, k, v, precision) -> None:
    """Raise UnsupportedError for a backward on 8-bit floats."""
    if precision in ("fp8", "auto") or has_fp8(q, k, v):
        raise UnsupportedError(
            "there is no backward on 8-bit floats. Take gradients in 16 bits: of the arrays that "
            f'were given to precision="{precision or "fp8"}", or of numflash.dequantize_fp8(x) '
            "for each Fp8Array"
        )
