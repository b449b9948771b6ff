"""8-bit arrays: the recipe for one, and its parts. `numflash.calls.quantization` makes them."""

from dataclasses import dataclass
from numbers import Integral
from typing import Any

GRANULARITIES = ("tensor", "head", "block", "token")
TOKEN_STEP = 64
"""Codes with tokens innermost are stored with seqlen padded to a multiple of this."""
MAX_BLOCK = 1024


@dataclass(frozen=True)
class Fp8Recipe:
    """A recipe for quantising q, k and v.

    Attributes:
        granularity: what shares a scale: the whole "tensor", each "head" of each batch entry, each
            "block" of `block` tokens of a head, or each "token" of a head.
        block: tokens that share a scale: a power of two from 16 to 1024.
        hadamard: whether q and k are rotated by a random orthogonal matrix, signs times a
            Walsh-Hadamard transform. Scores stay as they are, and outliers are spread out.
        seed: of the signs, not negative.

    Raises:
        TypeError, ValueError: a value that is none of these.

    Source: FlashAttention-3, arXiv 2407.08608, section 3.3.

    Example:
        >>> import numpy as np, numflash
        >>> x = np.random.default_rng(0).standard_normal((1, 16, 1, 64)).astype("float16")
        >>> recipe = numflash.Fp8Recipe("token")
        >>> out = numflash.attention(x, x, x, precision="fp8", fp8=recipe)
        >>> recipe.num_scales(seqlen=100)
        100
    """

    granularity: str = "block"
    block: int = 128
    hadamard: bool = True
    seed: int = 0

    def __post_init__(self):
        if not isinstance(self.granularity, str):
            raise TypeError(f"granularity must be a string, got {self.granularity!r}")
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"granularity must be one of {', '.join(GRANULARITIES)}, got {self.granularity!r}"
            )
        for name in ("block", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"{name} must be an integer, got {value!r}")
        if not 16 <= self.block <= MAX_BLOCK or self.block & (self.block - 1):
            raise ValueError(
                f"block must be a power of two from 16 to {MAX_BLOCK}, got {self.block}"
            )
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if not isinstance(self.hadamard, bool):
            raise TypeError(f"hadamard must be True or False, got {self.hadamard!r}")

    def num_scales(self, seqlen: int) -> int:
        """Scales along the tokens of one head."""
        if self.granularity == "token":
            return seqlen
        return -(-seqlen // self.block) if self.granularity == "block" else 1

    def descale_shape(self, batch: int, heads: int, seqlen: int) -> tuple[int, int, int]:
        """The shape of the scales of a (batch, seqlen, heads, head_dim) array."""
        if self.granularity == "tensor":
            return 1, 1, 1
        return batch, heads, self.num_scales(seqlen)


@dataclass(frozen=True, eq=False)
class PrecisionDecision:
    """The decision of `precision="auto"`: arrays on the device, filled by its kernels.

    Attributes:
        in_fp8: (batch, num_heads_kv) int32: 1 for key-value heads that were computed in 8 bits.
        estimated_error: (batch, num_heads_kv) float32: the root mean square of the error that 8
            bits would make, relative to that of the result; an estimate from the quantised blocks.

    Example:
        >>> import numpy as np, numflash
        >>> x = np.random.default_rng(0).standard_normal((1, 16, 1, 64)).astype("float16")
        >>> options = {"precision": "auto", "max_rel_error": 0.5, "return_decision": True}
        >>> out, decision = numflash.attention(x, x, x, **options)
        >>> decision.in_fp8.tolist()
        [[1]]
    """

    in_fp8: Any
    estimated_error: Any


@dataclass(frozen=True, eq=False)
class Fp8Array:
    """An array in 8-bit floats: x is about descale * code. `quantize_fp8` makes it.

    Attributes:
        data: uint8 codes, (batch, seqlen, heads, head_dim padded to a multiple of 64) or, where
            `transposed`, (batch, heads, padded head_dim, seqlen padded to a multiple of 64) with
            the tokens in the order of `numflash.reference.tokens_innermost`. Always with all four
            axes. Padding is zero; codes of a longer array may follow the last token, if none is a
            NaN. A multiple of 16 bytes lies between its rows.
        descale: float32 scales, (batch, heads, n), n along the tokens; an extent of 1 is for all.
        recipe: how it was quantised.
        shape: of the array that was quantised.
        dtype: of that array, as in "bfloat16".
        layout: of that array, "bshd" or "bhsd".
        format: "e4m3" or "e5m2".
        transposed: whether tokens are innermost, as the kernels need V.

    Example:
        >>> import numpy as np, numflash
        >>> x = np.random.default_rng(0).standard_normal((1, 16, 1, 64)).astype("float16")
        >>> k8 = numflash.quantize_fp8(x, "token", hadamard=True)
        >>> v8 = numflash.quantize_fp8(x, "token", transposed=True)
        >>> v8.data.shape
        (1, 1, 64, 64)
        >>> out = numflash.attention(x, k8, v8)
    """

    data: Any
    descale: Any
    recipe: Fp8Recipe
    shape: tuple[int, ...]
    dtype: str
    layout: str = "bshd"
    format: str = "e4m3"
    transposed: bool = False
