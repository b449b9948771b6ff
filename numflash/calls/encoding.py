"""The driver's encoding of tensor maps."""

import ctypes
from collections.abc import Callable
from functools import cache

from numflash.problem.tensor_maps import MAP_ALIGNMENT, MAP_BYTES, TensorLayout

# CUtensorMapDataType, CUtensorMapSwizzle and CUtensorMapL2promotion of cuda.h.
_DTYPES = {"uint8": 0, "float16": 6, "float32": 7, "bfloat16": 9}
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_L2_PROMOTIONS = {128: 2, 256: 3}
_INTERLEAVE_NONE = _OUT_OF_BOUNDS_ZERO = 0
_FIRST_CUDA = 12000
_ADDRESSES = 2**64


def encoder(driver, layout: TensorLayout) -> Callable[[int], bytes]:
    """A function that encodes the map of a tensor of this layout, as the driver does, by address.

    The address is the tensor's. A ragged map begins below it, where nothing is read: the driver
    asks for the alignment only.

    Args:
        driver: `cuda.bindings.driver`, initialised.
        layout: one without a `misfit`.

    Raises:
        RuntimeError: the driver is too old. The function raises it where the driver refuses.
    """
    encode_tiled, rank = _encode_tiled(driver), len(layout.extents)
    kind = _DTYPES[layout.dtype], rank
    tile = (
        (ctypes.c_uint64 * rank)(*layout.extents),
        (ctypes.c_uint64 * (rank - 1))(*layout.strides),
        (ctypes.c_uint32 * rank)(*layout.box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        _INTERLEAVE_NONE,
        _SWIZZLES[layout.swizzle_bytes],
        _L2_PROMOTIONS[layout.l2_bytes],
        _OUT_OF_BOUNDS_ZERO,
    )

    def encode(pointer: int) -> bytes:
        room = ctypes.create_string_buffer(MAP_BYTES + MAP_ALIGNMENT)
        address, first = aligned(room), (pointer - layout.shift_bytes) % _ADDRESSES
        status = encode_tiled(address, *kind, first, *tile)
        if status:
            raise RuntimeError(
                f"cuTensorMapEncodeTiled reports error {status} for {layout} at {pointer:#x}"
            )
        return ctypes.string_at(address, MAP_BYTES)

    return encode


def aligned(room: ctypes.Array) -> int:
    """The first address in a buffer at which a map may lie."""
    return -(-ctypes.addressof(room) // MAP_ALIGNMENT) * MAP_ALIGNMENT


_POINTER, _ENUM = ctypes.c_void_p, ctypes.c_int
_PROTOTYPE = ctypes.CFUNCTYPE(
    _ENUM,
    *(_POINTER, _ENUM, ctypes.c_uint32, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
    *(_ENUM, _ENUM, _ENUM, _ENUM),
)


@cache
def _encode_tiled(driver) -> Callable[..., int]:
    """The driver's cuTensorMapEncodeTiled.

    cuda-bindings wraps it, but lets Python's allocator place the result, 16 bytes aligned, where
    the driver wants 64 (cuda-python pull request 1692).
    """
    status, address, *_ = driver.cuGetProcAddress(b"cuTensorMapEncodeTiled", _FIRST_CUDA, 0)
    if status or not int(address):
        raise RuntimeError("the CUDA driver has no cuTensorMapEncodeTiled: it is older than 12.0")
    return _PROTOTYPE(int(address))
