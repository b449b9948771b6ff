"""Sums of tensor cores: exact, or cut as published models say that GPUs cut them.

NUMFLASH_SIM_SUMS chooses, for the simulator and for whatever else runs the bodies of `mma` and
`wgmma`: `exact` (the default) rounds a sum of an instruction once, to nearest; `ampere`, `ada` and
`hopper` do as these GPUs. They add few products at a time, and c with them. The terms are aligned
to the largest exponent among them, cut off some bits below it, and added exactly; then the result
is cut to the bits it keeps. The next products take it as their c.

    GPU     instruction          products at a time   bits kept of a term   of the result
    A100    mma, 16 bits, tf32          8, 4                  24                  23
    Ada     mma, 16 bits, tf32          8, 4                  24                  23
            mma, e4m3                    16                   13                  13
    H100    mma, 16 bits, tf32         16, 8                  25                  23
            wgmma, 16 bits, tf32      16, 8                   25                  23
            wgmma, e4m3                  32                   13                  13

For sm_90 the assembler makes two products of float16 of an `mma` of e4m3: first of the even pairs
of k with c = 0, then of the odd ones; c is added at the end, and this sum is rounded to nearest.

Bits are those after the point of the number 1.xxx that an exponent belongs to. The exponent of a
product is the sum of its factors' exponents, and that of a subnormal number the lowest of its
type: neither is adjusted to the value of the product.

Sources: Xie et al., arXiv 2511.10909, whose MMA-Sim was compared bit for bit with ten GPUs;
Khattak and Mikaitis, arXiv 2512.07004; mmaemu, whose model of e4m3 was compared bit for bit with
an H100 PCIe through cuBLAS and with `mma` of an RTX 4060. `tests/sim/test_sums.py` compares this
module with both programs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from numflash.runtime import switches
from numflash.runtime.errors import UnsupportedError

_VARIABLE = "NUMFLASH_SIM_SUMS"
# The exponent of a type's smallest normal number, which its subnormal ones have as well.
_LOWEST = {"float16": -14, "bfloat16": -126, "tf32": -126, "float32": -126, "e4m3": -6}
_EXPONENT_OF_ZERO = -1000


@dataclass(frozen=True)
class Cut:
    """Sums that are cut.

    Attributes:
        products: the number that is added at a time.
        term_bits: bits after the point that a term keeps, at the largest exponent among them.
        result_bits: bits after the point that the result keeps, at its own exponent.
        floor: the largest exponent is at least this.
    """

    products: int
    term_bits: int
    result_bits: int = 23
    floor: int = -133

    def __call__(self, a: np.ndarray, b: np.ndarray, c: np.ndarray, dtype: str) -> np.ndarray:
        """As `add_products`, of finite numbers."""
        exponents_a, exponents_b = _exponents(a, dtype), _exponents(b, dtype)
        for first in range(0, a.shape[1], self.products):
            k = slice(first, first + self.products)
            terms = a[:, k, None] * b[None, k]
            largest = (exponents_a[:, k, None] + exponents_b[None, k]).max(1)
            largest = np.maximum(np.maximum(largest, _exponents(c, "float32")), self.floor)
            c = self._sum(terms, c.astype(np.float64), largest)
        return c

    def _sum(self, terms: np.ndarray, c: np.ndarray, largest: np.ndarray) -> np.ndarray:
        """float32 of c (m, n) and terms (m, products, n), the largest exponent being known."""
        scale = np.ldexp(1.0, self.term_bits - largest)
        # Integers of less than 2 ** 33: float64 adds them exactly, in any order.
        total = np.trunc(terms * scale[:, None]).sum(1) + np.trunc(c * scale)
        total /= scale
        exponent = np.maximum(_exponents(total, "float32"), _LOWEST["float32"])
        scale = np.ldexp(1.0, self.result_bits - exponent)
        with np.errstate(over="ignore"):
            # A sum of nothing is +0.
            return (np.trunc(total * scale) / scale + 0.0).astype(np.float32)


def _exponents(x: np.ndarray, dtype: str) -> np.ndarray:
    """Exponents of numbers of a type; of zeros one that is below all sums of others."""
    exponents = np.maximum(np.frexp(x)[1] - 1, _LOWEST[dtype])
    return np.where(x == 0, _EXPONENT_OF_ZERO, exponents)


def _as_float16(a: np.ndarray, b: np.ndarray, c: np.ndarray, dtype: str) -> np.ndarray:
    """`mma` of e4m3 on sm_90: two of float16, of even and of odd pairs of k, and an addition."""
    odd = np.arange(a.shape[1]) % 4 >= 2
    total = np.zeros(c.shape, np.float32)
    for half in (~odd, odd):
        total = _HOPPER_16(a[:, half], b[half], total, "float16")
    return c + total


_AMPERE_16, _AMPERE_TF32 = Cut(8, 24, floor=-132), Cut(4, 24, floor=-132)
_HOPPER_16, _HOPPER_TF32 = Cut(16, 25), Cut(8, 25)
_AMPERE = {
    ("mma", "float16"): _AMPERE_16,
    ("mma", "bfloat16"): _AMPERE_16,
    ("mma", "tf32"): _AMPERE_TF32,
}
MODELS: dict[str, dict[tuple[str, str], Callable]] = {
    "exact": {},
    "ampere": _AMPERE,
    "ada": _AMPERE | {("mma", "e4m3"): Cut(16, 13, 13, -132)},
    "hopper": {
        ("mma", "float16"): _HOPPER_16,
        ("mma", "bfloat16"): _HOPPER_16,
        ("mma", "tf32"): _HOPPER_TF32,
        ("mma", "e4m3"): _as_float16,
        ("wgmma", "float16"): _HOPPER_16,
        ("wgmma", "bfloat16"): _HOPPER_16,
        ("wgmma", "tf32"): _HOPPER_TF32,
        ("wgmma", "e4m3"): Cut(32, 13, 13),
    },
}
"""Model -> (instruction, type of the operands) -> sum; `exact` has one for all."""


class _Sums:
    """Holds the model's name; tests choose others."""

    def __init__(self):
        self.model = switches.choice(_VARIABLE, tuple(MODELS))


SUMS = _Sums()


def add_products(
    instruction: str,
    dtype: str,
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    to_float16: bool = False,
) -> np.ndarray:
    """c + a b, as NUMFLASH_SIM_SUMS has it.

    Args:
        instruction: "mma" or "wgmma".
        dtype: of a and b: "float16", "bfloat16", "tf32" or "e4m3".
        a: (m, k) float64 that hold numbers of this type.
        b: (k, n), the same.
        c: (m, n) float32.
        to_float16: whether sums are rounded to float16.

    Returns:
        (m, n) float32.

    Raises:
        UnsupportedError: the GPUs of the model have no such instruction, or the model no sums of
            float16.
    """
    with np.errstate(all="ignore"):
        exact = a @ b + c
        if SUMS.model == "exact":
            return (exact.astype(np.float16) if to_float16 else exact).astype(np.float32)
    if to_float16:
        raise UnsupportedError(f"{_VARIABLE}={SUMS.model}: the models have no sums of float16")
    try:
        add = MODELS[SUMS.model][instruction, dtype]
    except KeyError:
        raise UnsupportedError(
            f"{_VARIABLE}={SUMS.model}: these GPUs have no {instruction} of {dtype}"
        ) from None
    finite = np.isfinite(exact)
    if finite.all():
        return add(a, b, c, dtype)
    # A sum with an infinite or NaN term is infinite or NaN, whatever is cut off.
    a, b, c = (np.where(np.isfinite(x), x, 0) for x in (a, b, c))
    return np.where(finite, add(a, b, c, dtype), exact.astype(np.float32))
