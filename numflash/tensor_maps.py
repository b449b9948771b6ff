"""Tensor maps: what bulk copies must know of a tensor, and which tensors have one."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorLayout:
    """All of a tensor map but the address.

    Attributes:
        dtype: of the elements: "float16", "bfloat16", "float32" or "uint8".
        extents: elements in each dimension, the fastest first; one to five.
        strides: bytes from an element to the next, for every dimension but the first.
        box: elements of a tile in each dimension.
        swizzled: whether tiles are swizzled in rows of 128 bytes.
    """

    dtype: str
    extents: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzled: bool = True
