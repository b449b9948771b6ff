"""`quantize_fp8` and `dequantize_fp8`: arrays to 8-bit floats and back."""

from numflash.calls.quantization import Dequantization, Quantization
from numflash.calls.ready import remembered, run
from numflash.problem.fp8 import Fp8Array, Fp8Recipe
from numflash.runtime.arrays import library_of


def quantize_fp8(
    x,
    granularity: str = "block",
    block: int = 128,
    hadamard: bool = False,
    seed: int = 0,
    *,
    format: str = "e4m3",
    transposed: bool = False,
    layout: str = "bshd",
    stream=None,
) -> Fp8Array:
    """An array in 8-bit floats with scales: x is about descale * code.

    Args:
        x: (batch, seqlen, heads, head_dim), float16, bfloat16 or float32. With layout "bhsd" the
            two middle axes are swapped. Three dimensions mean one batch entry, two one head. Any
            strides; only a last axis that is not contiguous is copied. head_dim is 1 to 256.
        granularity: what shares a scale: the whole "tensor", each "head" of each batch entry, each
            "block" of `block` tokens of a head, or each "token" of a head.
        block: tokens that share a scale, a power of two from 16 to 1024.
        hadamard: whether rows are rotated first by a random orthogonal matrix, which spreads
            outliers out: signs times a Walsh-Hadamard transform, of all of head_dim where this,
            padded to a multiple of 64, is a power of two, and of each 64 elements of 192.
        seed: of the signs.
        format: "e4m3" or "e5m2".
        transposed: store codes with the tokens innermost, as attention needs those of V.
        layout: "bshd" or "bhsd", of x. Codes have the layout that `Fp8Array` documents.
        stream: a CUDA stream, or its address, to allocate and launch on; None is the current one
            of the array library of x.

    Returns:
        The codes, and scales of shape (batch, heads, n) with n = 1, seqlen / block rounded up, or
        seqlen; (1, 1, 1) for "tensor". A scale brings the largest finite |x|, at least
        2 ** -100, to 256 in e4m3. Infinities become the largest code, a NaN stays a NaN.

    Raises:
        TypeError: an argument of a wrong type or dtype, or not on a CUDA device.
        ValueError: a wrong number of dimensions, values out of range.
        UnsupportedError: head_dim above 256, an old GPU.

    The kernels are enqueued, not waited for: one pass over x, or two where more tokens share a
    scale than a thread block can hold ("tensor", "head", blocks above 256). Every call gives the
    same bits, those of `numflash.reference.quantize_fp8`.

    Source: FlashAttention-3, arXiv 2407.08608, section 3.3.

    Example:
        >>> import numpy as np, numflash
        >>> x = np.random.default_rng(0).standard_normal((1, 16, 1, 64)).astype("float16")
        >>> x8 = numflash.quantize_fp8(x, "token", hadamard=True)
        >>> x8.data.shape, x8.descale.shape
        ((1, 16, 1, 64), (1, 1, 16))
    """
    recipe = Fp8Recipe(granularity, block, hadamard, seed)
    library = library_of(x, "x")
    operand, identity = library.glance(x)
    options = {"format": format, "transposed": transposed}
    key = (Quantization, identity, layout, recipe, *options.values(), type(transposed))

    def make() -> Quantization:
        return Quantization(library.view(x, "x"), layout, recipe, **options)

    ready = remembered(key, make)
    data, descale = run(ready, {"x": x}, {"x": operand}, stream)
    tensor = ready.tensor
    return Fp8Array(
        data,
        descale,
        recipe,
        tuple(tensor.view.shape),
        tensor.view.dtype,
        layout,
        format,
        transposed,
    )


def dequantize_fp8(x: Fp8Array, dtype: str | None = None, stream=None):
    """The numbers that an array in 8-bit floats stands for.

    Args:
        x: as `quantize_fp8` returns it.
        dtype: "float16", "bfloat16" or "float32"; None is that of the quantised array.
        stream: as for `quantize_fp8`.

    Returns:
        A contiguous array with the shape and layout of the quantised one: code * descale, rotated
        back, in float32 with the bits of `numflash.reference.dequantize_fp8`, rounded to `dtype`.

    Raises:
        TypeError, ValueError, UnsupportedError: as `quantize_fp8`.

    Example:
        >>> import numpy as np, numflash
        >>> x = np.random.default_rng(0).standard_normal((1, 16, 1, 64)).astype("float16")
        >>> x8 = numflash.quantize_fp8(x, "token")
        >>> bool(abs(numflash.dequantize_fp8(x8) - x).max() < 0.07 * abs(x).max())
        True
    """
    if not isinstance(x, Fp8Array):
        raise TypeError(f"x must be an Fp8Array, got {x!r} ({type(x).__name__})")
    dtype = x.dtype if dtype is None else dtype
    library = library_of(x.data, "x.data")
    data, data_identity = library.glance(x.data)
    descale, descale_identity = library_of(x.descale, "x.descale").glance(x.descale)
    traits = x.recipe, tuple(x.shape), x.layout, x.format, x.transposed, dtype
    key = (Dequantization, data_identity, descale_identity, *traits)
    ready = remembered(key, lambda: Dequantization(x, dtype))
    arrays = {"x.data": x.data, "x.descale": x.descale}
    (out,) = run(ready, arrays, {"x.data": data, "x.descale": descale}, stream)
    return out
