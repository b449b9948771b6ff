"""Calls on 8-bit floats of which one thing is wrong, on NumPy's arrays: a table."""

from dataclasses import replace

import ml_dtypes
import numpy as np

from numflash import UnsupportedError
from numflash.problem.fp8 import Fp8Array, Fp8Recipe
from numflash.runtime.views import numpy_dtype

PLAIN, TOKENS = Fp8Recipe(hadamard=False), Fp8Recipe("token", hadamard=False)
TURNED = Fp8Recipe(seed=1)


def zeros(*shape, dtype="float16"):
    """An array."""
    return np.zeros(shape, numpy_dtype(dtype))


def in_8_bits(shape, recipe=PLAIN, transposed=False, **changed) -> Fp8Array:
    """An `Fp8Array` of zeros, with attributes of its own."""
    batch, seqlen, heads, head_dim = shape
    padded = -(-head_dim // 64) * 64
    stored = (batch, seqlen, heads, padded)
    if transposed:
        stored = (batch, heads, padded, -(-seqlen // 64) * 64)
    descale = np.ones(recipe.descale_shape(batch, heads, seqlen), np.float32)
    data = np.zeros(stored, np.uint8)
    right = Fp8Array(data, descale, recipe, shape, "float16", transposed=transposed)
    return replace(right, **changed)


QS, KS, VS = (2, 9, 4, 80), (2, 11, 2, 80), (2, 11, 2, 48)
Q, K, V = (zeros(*shape) for shape in (QS, KS, VS))
Q8, K8, V8 = (in_8_bits(shape) for shape in (QS, KS, VS))
FORWARD = {"q": Q, "k": K, "v": V, "precision": "fp8"}
ARRAYS = {"q": Q, "k": K8, "v": V8}
CODES = {name: zeros(*x.shape, dtype="uint8") for name, x in (("q", Q), ("k", K), ("v", V))}
SCALES = {f"{name}_descale": np.ones((2, 2), np.float32) for name in "qkv"}
OWN = CODES | SCALES
E5M2 = ml_dtypes.float8_e5m2
UNALIGNED = np.zeros((2, 2, 64, 72), np.uint8)[..., :64]
SPREAD = np.ones((2, 2, 22), np.float32)[..., ::2]

# name: (the call, what is different from it, the error, what the message must contain)
BAD_CALLS = {
    # Recipes and precisions
    "fp8-alone": (
        FORWARD,
        {"precision": None, "fp8": PLAIN},
        ValueError,
        'fp8 says how to quantise with precision="fp8"; precision is None',
    ),
    "fp8-and-tf32": (
        {name: zeros(*x.shape, dtype="float32") for name, x in (("q", Q), ("k", K), ("v", V))},
        {"precision": "tf32", "fp8": PLAIN},
        ValueError,
        "precision is 'tf32'",
    ),
    "fp8-name": (
        FORWARD,
        {"fp8": "token"},
        TypeError,
        "fp8 must be an Fp8Recipe, got 'token' (str",
    ),
    "fp8-dict": (FORWARD, {"fp8": {"block": 64}}, TypeError, "fp8 must be an Fp8Recipe", "dict"),
    "fp8-class": (FORWARD, {"fp8": Fp8Recipe}, TypeError, "fp8 must be an Fp8Recipe", "type"),
    "precision-name": (FORWARD, {"precision": "fp4"}, ValueError, "precision must be", "'fp4'"),
    "precision-of-arrays": (
        ARRAYS,
        {"precision": "tf32"},
        ValueError,
        "arrays of 8 bits go with precision=\"fp8\", got 'tf32'",
    ),
    "budget-alone": (
        FORWARD,
        {"max_rel_error": 0.1},
        ValueError,
        "max_rel_error goes with precision=\"auto\", got 'fp8'",
    ),
    "budget-without-fp8": (
        FORWARD,
        {"precision": None, "max_rel_error": 0.1},
        ValueError,
        'max_rel_error goes with precision="auto", got None',
    ),
    "decision-alone": (
        FORWARD,
        {"return_decision": True},
        ValueError,
        "return_decision goes with precision=\"auto\", got 'fp8'",
    ),
    "auto-budget-0": (
        FORWARD,
        {"precision": "auto", "max_rel_error": 0.0},
        ValueError,
        "max_rel_error must be positive and finite, got 0.0",
    ),
    "auto-budget-nan": (
        FORWARD,
        {"precision": "auto", "max_rel_error": float("nan")},
        ValueError,
        "max_rel_error must be positive and finite, got nan",
    ),
    "auto-budget-string": (
        FORWARD,
        {"precision": "auto", "max_rel_error": "small"},
        TypeError,
        "max_rel_error must be a real number, got 'small'",
    ),
    "auto-budget-bool": (
        FORWARD,
        {"precision": "auto", "max_rel_error": True},
        TypeError,
        "max_rel_error must be a real number, got True",
    ),
    "auto-arrays": (ARRAYS, {"precision": "auto"}, TypeError, 'precision="auto"', "8", "16 bits"),
    # Arrays of 16 bits
    "q-float32": (
        FORWARD,
        {"q": zeros(*QS, dtype="float32")},
        TypeError,
        'q must be float16 or bfloat16 for precision="fp8", got float32',
    ),
    "v-float64": (FORWARD, {"v": zeros(*VS, dtype="float64")}, TypeError, "v must be", "float64"),
    "k-list": (FORWARD, {"k": [1.0]}, TypeError, "k must be", "list"),
    "rank-1": (FORWARD, {"q": zeros(64)}, ValueError, "q must have 2", "got 1"),
    "ranks-differ": (FORWARD, {"k": zeros(11, 2, 80)}, ValueError, "k must", "as q, 4", "got 3"),
    "batch": (FORWARD, {"k": zeros(3, 11, 2, 80)}, ValueError, "k must have the batch of q, 2"),
    "seqlen-v": (FORWARD, {"v": zeros(2, 12, 2, 48)}, ValueError, "v must have the seqlen of k"),
    "heads": (
        FORWARD,
        {"k": zeros(2, 11, 3, 80), "v": zeros(2, 11, 3, 48)},
        ValueError,
        "heads of q must be a positive multiple",
        "4 and 3",
    ),
    "head-dim": (FORWARD, {"k": zeros(2, 11, 2, 64)}, ValueError, "k must have the head_dim of q"),
    "head-dim-257": (
        FORWARD,
        {"q": zeros(2, 9, 4, 257), "k": zeros(2, 11, 2, 257)},
        UnsupportedError,
        "head_dim of q",
        "at most 256, got 257",
    ),
    "layout": (FORWARD, {"layout": "sbhd"}, ValueError, "layout must be one of", "'sbhd'"),
    "negative-scale": (
        FORWARD,
        {"softmax_scale": -1.0},
        UnsupportedError,
        "no forward kernel runs",
        "softmax_scale is not positive",
    ),
    "unknown-option": (FORWARD, {"granularity": "token"}, TypeError, "granularity"),
    # Fp8Arrays
    "descale-twice": (
        ARRAYS,
        {"k_descale": np.ones((2, 2), np.float32)},
        ValueError,
        "k is an Fp8Array with scales of its own: no k_descale",
    ),
    "layout-of-array": (
        ARRAYS,
        {"k": replace(K8, layout="bhsd")},
        ValueError,
        "k was quantised with layout 'bhsd', the call says 'bshd'",
    ),
    "e5m2": (ARRAYS, {"v": replace(V8, format="e5m2")}, UnsupportedError, "v is e5m2", "e4m3"),
    "k-transposed": (
        ARRAYS,
        {"k": in_8_bits(KS, transposed=True)},
        ValueError,
        "k must have head_dim innermost; only v may be transposed",
    ),
    "q-transposed": (
        ARRAYS,
        {"q": in_8_bits(QS, transposed=True)},
        ValueError,
        "q must have head_dim innermost",
    ),
    "v-rotated": (
        ARRAYS,
        {"v": in_8_bits(VS, TURNED)},
        ValueError,
        "v must not be rotated: quantize it with hadamard=False",
    ),
    "data-shape": (
        ARRAYS,
        {"k": replace(K8, data=zeros(2, 11, 2, 80, dtype="uint8"))},
        ValueError,
        "k.data must have shape (2, 11, 2, 128), got (2, 11, 2, 80)",
    ),
    "data-of-other-tokens": (
        ARRAYS,
        {"k": replace(K8, shape=(2, 12, 2, 80)), "v": in_8_bits((2, 12, 2, 48))},
        ValueError,
        "k.data must have shape (2, 12, 2, 128), got (2, 11, 2, 128)",
    ),
    "data-transposed-shape": (
        ARRAYS,
        {"v": replace(in_8_bits(VS, transposed=True), data=V8.data)},
        ValueError,
        "v.data must have shape (2, 2, 64, 64), got (2, 11, 2, 64)",
    ),
    "data-dtype": (
        ARRAYS,
        {"k": replace(K8, data=K8.data.view(np.int8))},
        TypeError,
        "k",
        "int8",
    ),
    "data-unaligned": (
        ARRAYS,
        {"v": replace(in_8_bits(VS, transposed=True), data=UNALIGNED)},
        ValueError,
        "v.data must lie at multiples of 16 bytes, got strides",
    ),
    "descale-shape": (
        ARRAYS,
        {"k": replace(K8, descale=np.ones((2, 2, 11), np.float32))},
        ValueError,
        "k.descale must have shape (2, 2, 1), got (2, 2, 11)",
    ),
    "descale-dtype": (
        ARRAYS,
        {"v": replace(V8, descale=np.ones((2, 2, 1)))},
        TypeError,
        "v.descale must be float32, got float64",
    ),
    "descale-spread": (
        ARRAYS,
        {"k": replace(in_8_bits(KS, TOKENS), descale=SPREAD)},
        ValueError,
        "k.descale must have a contiguous last axis, got strides",
    ),
    "shape-of-array": (
        ARRAYS,
        {"v": in_8_bits((2, 12, 2, 48))},
        ValueError,
        "v must have the seqlen of k, 11, got 12",
    ),
    "rotated-apart": (
        ARRAYS,
        {"q": in_8_bits(QS, TURNED)},
        ValueError,
        "q and k must be rotated by the same signs",
        "q is rotated with seed 1, k is not rotated",
    ),
    "rotated-by-others": (
        ARRAYS,
        {"k": in_8_bits(KS, TURNED), "fp8": Fp8Recipe(seed=2)},
        ValueError,
        "q is rotated with seed 2, k is rotated with seed 1",
    ),
    "rotated-array-and-codes": (
        ARRAYS,
        {"k": in_8_bits(KS, TURNED), "q": CODES["q"], "q_descale": SCALES["q_descale"]},
        ValueError,
        "q is not rotated, k is rotated with seed 1",
    ),
    # Codes of the caller's own
    "codes-alone": (CODES, {}, TypeError, "q", "uint8"),
    "codes-for-fp8": (CODES, {"precision": "fp8"}, TypeError, "q has 8 bits", "q_descale"),
    "codes-without-one": (
        OWN,
        {"v_descale": None},
        TypeError,
        "v has 8 bits: give its scales as v_descale",
    ),
    "codes-in-16-bits": (
        OWN,
        {"k": K},
        TypeError,
        "k must be codes of 8 bits where k_descale is given, got float16",
    ),
    "codes-e5m2": (OWN, {"k": CODES["k"].view(E5M2)}, UnsupportedError, "k is e5m2"),
    "codes-int8": (OWN, {"k": CODES["k"].view(np.int8)}, TypeError, "k must be", "int8"),
    "descale-list": (OWN, {"k_descale": [[1.0] * 2] * 2}, TypeError, "k_descale must be", "list"),
    "descale-number": (OWN, {"q_descale": 1.0}, TypeError, "q_descale must be", "float"),
    "descale-float64": (
        OWN,
        {"k_descale": np.ones((2, 2))},
        TypeError,
        "k_descale must be float32, got float64",
    ),
    "descale-rank": (
        OWN,
        {"k_descale": np.ones(2, np.float32)},
        ValueError,
        "k_descale must have shape (batch, heads of k) = (2, ...), got (2,)",
    ),
    "descale-batch": (
        OWN,
        {"v_descale": np.ones((3, 2), np.float32)},
        ValueError,
        "v_descale must have shape (batch, heads of k) = (2, ...), got (3, 2)",
    ),
    "descale-heads": (
        OWN,
        {"k_descale": np.ones((2, 3), np.float32)},
        ValueError,
        "k_descale must have 2 heads, as many as k, got 3",
    ),
    "descale-heads-of-q": (
        OWN,
        {"v_descale": np.ones((2, 4), np.float32)},
        ValueError,
        "v_descale must have 2 heads, as many as k, got 4",
    ),
    "codes-and-recipe": (OWN, {"precision": "tf32"}, ValueError, "8 bits", "got 'tf32'"),
    # Results
    "out-dtype": (
        FORWARD,
        {"out": zeros(2, 9, 4, 48, dtype="bfloat16")},
        TypeError,
        "out must be float16, got bfloat16",
    ),
    "out-shape": (
        FORWARD,
        {"out": zeros(2, 9, 4, 64)},
        ValueError,
        "out must have shape (2, 9, 4, 48), got (2, 9, 4, 64)",
    ),
    "out-of-codes": (
        OWN,
        {"out": zeros(2, 9, 4, 48, dtype="float32")},
        TypeError,
        "out must be bfloat16, got float32",
    ),
    "out-overlaps": (
        FORWARD | {"v": Q[:, :, :2, :48].repeat(2, 1)[:, :11]},
        {"out": Q[..., :48]},
        ValueError,
        "out must not overlap q",
    ),
    # Configs
    "config-of-16-bits": (
        FORWARD,
        {"config": "sm80-m64n64w4s1"},
        UnsupportedError,
        "config sm80-m64n64w4s1 cannot run this forward: it has no 8-bit floats",
    ),
    "config-of-8-bits": (
        FORWARD,
        {"precision": None, "config": "fp8-sm80-m64n64w4s1"},
        UnsupportedError,
        "config fp8-sm80-m64n64w4s1 cannot run this forward: it computes on 8-bit floats",
    ),
    "config-of-newer-gpus": (
        FORWARD,
        {"config": "fp8-sm89-m64n64w4s1"},
        UnsupportedError,
        "its instructions begin with sm_89, this GPU is sm_80",
    ),
    "config-text": (
        FORWARD,
        {"config": "fp8-m64"},
        ValueError,
        "config must look like",
        "fp8-m64",
    ),
    "config-half": (
        FORWARD,
        {"config": "fp8-sm80-m64n64w4s1-half"},
        ValueError,
        "sm80 multiplies as float16 anyway",
    ),
    "config-narrow": (
        FORWARD,
        {"config": "fp8-sm89-m64n32w4s1"},
        ValueError,
        "tile_n of",
        "must be a multiple of 64",
    ),
}
