"""Tensor maps: the description of a tensor for bulk copies, and the tensors that have one.

A map is 128 opaque bytes that the driver makes of a `TensorLayout` and an address. It is encoded
on the host, and no device is asked. Tensors that no map can describe are left to kernels without
bulk
copies: `misfit` says why, and nothing here raises for it.
"""

from dataclasses import dataclass

from numflash.configs import SLAB_BYTES, WARPGROUP_ROWS
from numflash.problem.problem import Tensor

MAP_BYTES = 128
"""Bytes of an encoded map, and of a kernel parameter that holds one."""
MAP_ALIGNMENT = 64
"""Alignment in bytes that the driver requires of a map's address."""
_UNIT = 16
_MAX_REACH = 2**40
_MAX_EXTENT = 2**32
# Axes of a `Tensor`, in the order in which they are looked at; and of one with tokens innermost.
_AXES = {"row": 1, "head": 2, "batch": 0}
_TRANSPOSED_AXES = {"column": 2, "head": 1, "batch": 0}


@dataclass(frozen=True)
class TensorLayout:
    """All of a tensor map but the address.

    Attributes:
        dtype: of the elements: "float16", "bfloat16", "float32" or "uint8".
        extents: elements in each dimension, the fastest first; one to five.
        strides: bytes from an element to the next, for every dimension but the first.
        box: elements of a tile in each dimension.
        swizzle_bytes: rows of tiles in which 16-byte chunks are swizzled: 128, 64 or 32, or 0.
        l2_bytes: bytes that the L2 cache fetches at once: 128 or 256.
    """

    dtype: str
    extents: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle_bytes: int = 128
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
        # The stride of a dimension of one element is never used: any legal one will do.
        legal = -(-extents[0] * itemsize // _UNIT) * _UNIT
        in_bytes = tuple(
            stride * itemsize if extent > 1 else legal
            for extent, stride in zip(extents[1:], strides, strict=True)
        )
        return cls(tensor.view.dtype, extents, in_bytes, (SLAB_BYTES // itemsize, *rows))


def misfit(tensor: Tensor, is_transposed: bool = False) -> str | None:
    """Why no map can describe a tensor, however its heads are packed; None if one can.

    With `is_transposed` the tensor is (batch, heads, head_dim, seqlen). Tiles may be larger than
    the tensor.
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
