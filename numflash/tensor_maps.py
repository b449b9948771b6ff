"""Tensor maps: what bulk copies must know of a tensor, and which tensors have one.

A map is 128 opaque bytes that the driver makes of a `TensorLayout` and an address. It is encoded
on the host, and no device is asked. What cannot be described is left to kernels without bulk
copies: `misfit` says why, and nothing here raises for it.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from numflash.configs import SLAB_BYTES, WARPGROUP_ROWS
from numflash.problem import Tensor

MAP_BYTES = 128
"""Size of an encoded map; so large are kernel parameters that hold one."""
MAP_ALIGNMENT = 64
"""What the driver asks of the address of a map, in bytes."""
_UNIT = 16
_MAX_REACH = 2**40
_MAX_EXTENT = 2**32
# Axes of a `Tensor`, in the order in which they are looked at; and of one with tokens innermost.
_AXES = {"row": 1, "head": 2, "batch": 0}
_TRANSPOSED_AXES = {"column": 2, "head": 1, "batch": 0}
# CUtensorMapDataType, CUtensorMapSwizzle and CUtensorMapL2promotion of cuda.h.
_DTYPES = {"uint8": 0, "float16": 6, "float32": 7, "bfloat16": 9}
_SWIZZLE_NONE, _SWIZZLE_128B = 0, 3
_L2_PROMOTIONS = {128: 2, 256: 3}
_INTERLEAVE_NONE = _OUT_OF_BOUNDS_ZERO = 0
_FIRST_CUDA = 12000


@dataclass(frozen=True)
class TensorLayout:
    """All of a tensor map but the address.

    Attributes:
        dtype: of the elements: "float16", "bfloat16", "float32" or "uint8".
        extents: elements in each dimension, the fastest first; one to five.
        strides: bytes from an element to the next, for every dimension but the first.
        box: elements of a tile in each dimension.
        swizzled: whether tiles are swizzled in rows of 128 bytes.
        l2_bytes: which the L2 cache fetches at once: 128 or 256.
    """

    dtype: str
    extents: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzled: bool = True
    l2_bytes: int = 256

    @classmethod
    def of_keys(cls, tensor: Tensor, rows: int) -> "TensorLayout":
        """K or V as {head_dim, seqlen, heads, batch}, in tiles of `rows` rows of 128 bytes."""
        batch, seqlen, heads, columns = tensor.shape
        by_batch, by_row, by_head, _ = tensor.strides
        extents, strides = (columns, seqlen, heads, batch), (by_row, by_head, by_batch)
        return cls._of(tensor, extents, strides, (rows, 1, 1))

    @classmethod
    def of_transposed_values(cls, tensor: Tensor) -> "TensorLayout":
        """Codes of V, (batch, heads, head_dim, seqlen), as {seqlen, head_dim, heads, batch}.

        A tile is all of head_dim in rows of 128 bytes.
        """
        batch, heads, columns, seqlen = tensor.shape
        by_batch, by_head, by_column, _ = tensor.strides
        extents, strides = (seqlen, columns, heads, batch), (by_column, by_head, by_batch)
        return cls._of(tensor, extents, strides, (columns, 1, 1))

    @classmethod
    def of_queries(cls, tensor: Tensor, pack: int) -> "TensorLayout":
        """Q or the result as {head_dim, pack, seqlen, heads / pack, batch}.

        A tile is 64 rows of 128 bytes: the rows of `pack` neighbouring heads, token after token.
        """
        batch, seqlen, heads, columns = tensor.shape
        by_batch, by_row, by_head, _ = tensor.strides
        extents = columns, pack, seqlen, heads // pack, batch
        strides = by_head, by_row, pack * by_head, by_batch
        return cls._of(tensor, extents, strides, (pack, WARPGROUP_ROWS // pack, 1, 1))

    @classmethod
    def _of(cls, tensor: Tensor, extents, strides, rows) -> "TensorLayout":
        itemsize = tensor.view.itemsize
        # What is never stepped over may be anything legal.
        legal = -(-extents[0] * itemsize // _UNIT) * _UNIT
        in_bytes = tuple(
            stride * itemsize if extent > 1 else legal
            for extent, stride in zip(extents[1:], strides, strict=True)
        )
        return cls(tensor.view.dtype, extents, in_bytes, (SLAB_BYTES // itemsize, *rows))


def misfit(tensor: Tensor, is_transposed: bool = False) -> str | None:
    """Why bulk copies cannot be told of a tensor, however its heads are packed; None if they can.

    `is_transposed` tells of (batch, heads, head_dim, seqlen). Tiles may be larger than the tensor.
    Source: CUDA Driver API, cuTensorMapEncodeTiled.
    """
    itemsize = tensor.view.itemsize
    if 0 in tensor.shape:
        return "it is empty"
    if tensor.view.pointer % _UNIT:
        return f"its address {tensor.view.pointer:#x} is not a multiple of {_UNIT}"
    for axis, i in (_TRANSPOSED_AXES if is_transposed else _AXES).items():
        extent, step = tensor.shape[i], tensor.strides[i] * itemsize
        if extent > _MAX_EXTENT:
            return f"its {axis} axis has {extent} elements, more than {_MAX_EXTENT}"
        if extent == 1:
            continue
        if step <= 0:
            return f"its {axis} stride of {step} bytes is not positive"
        if step % _UNIT:
            return f"its {axis} stride of {step} bytes is not a multiple of {_UNIT}"
        # Packed heads are one step.
        if step * extent >= _MAX_REACH:
            return f"its {extent} steps of {step} bytes along the {axis} axis reach 2**40 bytes"
    return None


def encoder(driver, layout: TensorLayout) -> Callable[[int], bytes]:
    """A function that encodes the map of a tensor of this layout, as the driver does, by address.

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
        _SWIZZLE_128B if layout.swizzled else _SWIZZLE_NONE,
        _L2_PROMOTIONS[layout.l2_bytes],
        _OUT_OF_BOUNDS_ZERO,
    )

    def encode(pointer: int) -> bytes:
        room = ctypes.create_string_buffer(MAP_BYTES + MAP_ALIGNMENT)
        address = aligned(room)
        status = encode_tiled(address, *kind, pointer, *tile)
        if status:
            raise RuntimeError(
                f"cuTensorMapEncodeTiled reports error {status} for {layout} at {pointer:#x}"
            )
        return ctypes.string_at(address, MAP_BYTES)

    return encode


def aligned(room: ctypes.Array) -> int:
    """The first address in a buffer that a map may have."""
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
