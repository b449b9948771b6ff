"""Methods of the FP8 accuracy study: how each computes attention, in NumPy.

The FP8 recipes are the specification itself, `numflash.reference`. What it does not define is
here: FlashAttention's loop over tiles of keys, whose P is relative to the maximum of the row so
far. float16 uses it with P in float16, and so does the comparison of two units of P: the
specification has it relative to the largest of each tile.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bench.fp8_accuracy.inputs import Input
from numflash import reference
from numflash.configs.formats import FORMATS
from numflash.problem.fp8 import Fp8Recipe
from numflash.reference.fp8 import P_SCALE_LOG2

BLOCK = Fp8Recipe("block", 128, hadamard=True)
FULL = Fp8Recipe("token", hadamard=True)
TILE_N = 128
"""Keys per tile of the loops here. Those of the specification have 64."""
SPECIFICATION, NUMPY, KERNELS = "specification", "numpy", "kernels"
"""Engines of a result: `numflash.reference`, `tiled_attention`, or the kernels on a GPU."""


@dataclass(frozen=True)
class Method:
    """A way to compute attention.

    Attributes:
        name: in records.
        label: in tables.
        engine: SPECIFICATION or NUMPY.
        paper: the RMSE in Table 3 of FlashAttention-3; None if it is not there.
        recipe: of its FP8; None in float16.
        fills_range: whether the largest number becomes the largest code, as is usual, in the place
            of the specification's 256.
        order: of the tiles where P is relative to the row's maximum so far: "forwards" or
            "backwards".
    """

    name: str
    label: str
    engine: str
    paper: float | None = None
    recipe: Fp8Recipe | None = None
    order: str | None = None
    fills_range: bool = False


METHODS = (
    Method("float16-naive", "float16, each step rounded", SPECIFICATION, 3.2e-4),
    Method("float16", "float16, FlashAttention", NUMPY, 1.9e-4, order="forwards"),
    Method(
        "fp8-tensor",
        "FP8, a scale per tensor (amax / 448)",
        SPECIFICATION,
        2.4e-2,
        Fp8Recipe("tensor", hadamard=False),
        fills_range=True,
    ),
    Method(
        "fp8-block",
        "FP8, block scales, no Hadamard",
        SPECIFICATION,
        2.4e-2,
        Fp8Recipe("block", 128, hadamard=False),
    ),
    Method(
        "fp8-hadamard",
        "FP8, Hadamard, no block scales",
        SPECIFICATION,
        9.3e-3,
        Fp8Recipe("tensor", hadamard=True),
    ),
    Method("fp8-both", "FP8, block scales, Hadamard", SPECIFICATION, 9.1e-3, BLOCK),
    Method("fp8-full", "FP8, full: token scales, Hadamard", SPECIFICATION, None, FULL),
    Method("fp8-forwards", "block, running maximum", NUMPY, None, BLOCK, "forwards"),
    Method("fp8-backwards", "block, running, last key first", NUMPY, None, BLOCK, "backwards"),
)
BY_NAME = {method.name: method for method in METHODS}
TRUTH = "truth"
"""The name under which `Study` has attention in float64, of what was not rounded to float16 yet.

It is what the paper compares with: the float16 rows of its table are mostly that rounding."""

_Quantised = tuple[list[np.ndarray], list[np.ndarray], int]


class Study:
    """One draw of an input with what its methods need: arrays, and codes when first asked for."""

    def __init__(self, case: Input, draw: int):
        self.exact = case.arrays(draw)
        self.q, self.k, self.v = (x.astype(np.float16) for x in self.exact)
        self.softmax_scale = case.head_dim**-0.5
        self._quantised: dict[Fp8Recipe, _Quantised] = {}

    def quantised(self, recipe: Fp8Recipe, fills_range: bool = False) -> _Quantised:
        """Codes and scales (batch, heads, n) of q, k and v, and the tokens of a scale.

        `fills_range` is for a scale per tensor that is not rotated.
        """
        if recipe not in self._quantised:
            codes, scales = [], []
            for x, turned in ((self.q, True), (self.k, True), (self.v, False)):
                found, descale = reference.quantize_fp8(
                    x, recipe.granularity, recipe.block, recipe.hadamard and turned, recipe.seed
                )
                if fills_range:
                    e4m3 = FORMATS["e4m3"]
                    descale = descale * np.float32(e4m3.peak / e4m3.largest)
                    found = np.zeros_like(found)
                    found[..., : x.shape[-1]] = e4m3.encode(x.astype(np.float32) / descale.item())
                codes.append(found)
                scales.append(np.broadcast_to(descale, (len(x), x.shape[2], descale.shape[2])))
            block = 1 if recipe.granularity == "token" else recipe.block
            self._quantised[recipe] = codes, scales, block
        return self._quantised[recipe]

    def out(self, name: str, entry: int, head: int, first: int, end: int) -> np.ndarray:
        """Attention of some queries of one head by a method; (end - first, head_dim).

        Args:
            name: of the method, or TRUTH.
            entry, head: which of the batch, and which of the heads.
            first, end: queries; `first` is a multiple of the recipes' blocks.

        Returns:
            float16, as kernels return it; the truth is float64.
        """
        rows, all_keys = (entry, slice(first, end), head), (entry, slice(None), head)
        if name == TRUTH:
            q, k, v = self.exact
            return reference.attention(q[rows], k[all_keys], v[all_keys])[0]
        q, k, v = self.q[rows], self.k[all_keys], self.v[all_keys]
        method = BY_NAME[name]
        if method.recipe is None and method.engine == SPECIFICATION:
            out = reference.naive(q, k, v, precision="float16")[0]
        elif method.recipe is None:
            out = tiled_attention(q, k, v, self.softmax_scale, _to_float16, dtype=np.float32)
        else:
            codes, scales, block = self.quantised(method.recipe, method.fills_range)
            q, k, v = codes[0][rows], codes[1][all_keys], codes[2][all_keys]
            qs, ks, vs = (scale[entry, head][None, None] for scale in scales)
            if qs.shape[2] > 1:
                qs = qs[:, :, first // block : -(-end // block)]
            out = self._attend(method, (q, k, v), (qs, ks, vs), block)
        return out[:, : self.v.shape[-1]].astype(np.float16)

    def _attend(self, method: Method, codes, scales, block: int) -> np.ndarray:
        if method.order is None:
            return reference.attention_of_codes(
                *codes, *scales, blocks=(block,) * 3, softmax_scale=self.softmax_scale
            )[0]
        # A tile has one scale of V, which P then need not hold.
        numbers = (
            reference.dequantize_fp8(x, scale, x.shape[-1], block)
            for x, scale in zip(codes, scales, strict=True)
        )
        backwards = method.order == "backwards"
        return tiled_attention(*numbers, self.softmax_scale, _to_e4m3, backwards=backwards)


def tiled_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    softmax_scale: float,
    round_p: Callable[[np.ndarray], np.ndarray],
    *,
    backwards: bool = False,
    tile_n: int = TILE_N,
    dtype=np.float64,
) -> np.ndarray:
    """FlashAttention of one head: P is relative to the row's maximum so far.

    Args:
        q: (seqlen_q, head_dim).
        k, v: (seqlen_k, head_dim).
        softmax_scale: of the scores.
        round_p: what P is rounded by, before its product with V; its sum is not.
        backwards: whether the last tile of keys comes first, as in FlashAttention-3.
        tile_n: keys per tile.
        dtype: of everything else.

    Returns:
        (seqlen_q, head_dim) in `dtype`.
    """
    q, k, v = q.astype(dtype), k.astype(dtype), v.astype(dtype)
    row_max = np.full((len(q), 1), -np.inf, dtype)
    row_sum, out = np.zeros_like(row_max), np.zeros((len(q), v.shape[1]), dtype)
    s = q @ k.T * dtype(softmax_scale)
    starts = range(0, len(k), tile_n)
    for first in reversed(starts) if backwards else starts:
        keys = slice(first, first + tile_n)
        new_max = np.maximum(row_max, s[:, keys].max(-1, keepdims=True))
        p = np.exp(s[:, keys] - new_max)
        row_scale = np.exp(row_max - new_max)
        row_sum = row_sum * row_scale + p.sum(-1, keepdims=True)
        out = out * row_scale + round_p(p).astype(dtype) @ v[keys]
        row_max = new_max
    return out / row_sum


def _to_float16(p: np.ndarray) -> np.ndarray:
    return p.astype(np.float16)


def _to_e4m3(p: np.ndarray) -> np.ndarray:
    e4m3 = FORMATS["e4m3"]
    return e4m3.decode(e4m3.encode(p * 2.0**P_SCALE_LOG2)) * 2.0**-P_SCALE_LOG2
