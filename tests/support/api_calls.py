"""Small calls of the public functions, and how their results are compared."""

import numpy as np

import numflash
from numflash import reference
from numflash.configs import parse_config
from numflash.runtime.errors import UnsupportedError
from numflash.selection.rules import Choice

# A ragged tile of queries, two of keys.
PORTABLE = {
    "forward": "m8n8w1",
    "backward-dq": "m8n8w1",
    "backward-dkdv": "m8n8w1",
    "backward-columns": "m8n8w1",
    "delta": "w1",
    "combine": "w2",
}


# A ragged tile of each; of rows of packed heads, too.
TENSOR_CORES = {
    "forward": "sm80-m16n16w1s1",
    "backward-dq": "sm80-m16n16w1s2",
    "backward-dkdv": "sm80-m16n16w1s2",
    "backward-columns": "sm80-m16n16w1s1",
}
FP8_CONFIG = "fp8-sm80-m16n32w1s1"
B, SQ, SK, H, HKV, D, DV = 1, 5, 11, 2, 1, 32, 32
NAN = np.float32(np.nan)


def choose_small(family, traits, limits, *_, **others):
    """float16 on the tensor cores, float32 on the portable kernels; gradients by two kernels."""
    if family == "backward":
        raise UnsupportedError("of one kernel for all gradients there is no small config")
    if traits.fp8:
        return Choice(family, parse_config(family, FP8_CONFIG), traits, "small", ())
    on_tensor_cores = traits.dtype == "float16" and family in TENSOR_CORES
    config = parse_config(family, (TENSOR_CORES if on_tensor_cores else PORTABLE)[family])
    return Choice(family, config, traits, "small", ())


def arrays(rng, batch=B, layout="bshd", dtype=np.float32):
    """q, k, v of the sizes above."""
    q = rng.standard_normal((batch, SQ, H, D)).astype(dtype)
    k = rng.standard_normal((batch, SK, HKV, D)).astype(dtype)
    v = rng.standard_normal((batch, SK, HKV, DV)).astype(dtype)
    if layout == "bhsd":
        q, k, v = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v))
    return q, k, v


def assert_close(got, expected, dtype=np.float32):
    """Equal up to the roundings; a value left out, or read from beside, is far off."""
    assert got.shape == expected.shape
    relative, absolute = (1e-4, 1e-5) if dtype == np.float32 else (1e-2, 1e-2)
    np.testing.assert_allclose(got, expected, rtol=relative, atol=absolute)


def fp8_arrays(rng):
    """Three `Fp8Array`s as attention takes them."""
    q, k, v = arrays(rng, dtype=np.float16)
    rotated = (numflash.quantize_fp8(x, block=16, hadamard=True) for x in (q, k))
    return *rotated, numflash.quantize_fp8(v, block=16, transposed=True)


def codes_with_scales(rng):
    """e4m3 codes of 4 and 2 heads with a scale per head of k, and the scales as options."""
    codes, options = [], {}
    for name, seqlen, heads in (("q", SQ, 4), ("k", SK, 2), ("v", SK, 2)):
        x = rng.standard_normal((B, seqlen, heads, D)).astype(np.float16)
        x[:, :, heads // 2 :] *= 4
        share = x.reshape(B, seqlen, 2, -1)
        share_codes, descale = reference.quantize_fp8(share, "head")
        options[f"{name}_descale"] = np.ascontiguousarray(descale[..., 0])
        codes.append(share_codes[..., : share.shape[-1]].reshape(x.shape).copy())
    return codes, options
