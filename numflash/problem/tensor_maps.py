"""Tensor maps: the description of a tensor for bulk copies, and the tensors that have one.

A map is 128 opaque bytes that the driver makes of a `TensorLayout` and an address. It is encoded
on the host, and no device is asked. Tensors that no map can describe are left to kernels without
bulk copies: `misfit` says why, and nothing here raises for it.

A *ragged* map describes sequences of any lengths, one after the other in the rows of an array. It
has two dimensions x and y that both step by a row, x of `bound` elements, and begins `bound` rows
below the array: (x, y) is row x + y - bound. Where a sequence of `seqlen` rows begins at row
`first`, its row i is

    x = bound - seqlen + i        y = first + seqlen

so that x leaves the tensor exactly where i leaves the sequence. Bulk copies themselves then end a
sequence: loads give zeros behind it, stores leave out what is not its own.
"""

from dataclasses import dataclass, replace

from numflash.configs import SLAB_BYTES, WARPGROUP_ROWS
from numflash.problem.problem import Tensor

MAP_BYTES = 128
"""Bytes of an encoded map, and of a kernel parameter that holds one."""
MAP_ALIGNMENT = 64
"""Alignment in bytes that the driver requires of a map's address."""
_UNIT = 16
_MAX_REACH = 2**40
_MAX_EXTENT = 2**32
# Coordinates are signed numbers of 32 bits.
_MAX_ROWS = 2**31 - 1
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
        row_axes: of a ragged map the dimensions x and y; else none.
    """

    dtype: str
    extents: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle_bytes: int = 128
    l2_bytes: int = 256
    row_axes: tuple[int, ...] = ()

    @property
    def shift(self) -> int:
        """Rows below the array at which the map begins: `bound`; 0 unless it is ragged."""
        return self.extents[self.row_axes[0]] if self.row_axes else 0

    @property
    def shift_bytes(self) -> int:
        """Bytes below the array at which the map begins."""
        return self.shift * self.strides[self.row_axes[1] - 1] if self.row_axes else 0

    @classmethod
    def of_keys(cls, tensor: Tensor, rows: int) -> "TensorLayout":
        """K or V as {head_dim, seqlen, heads, batch}, in tiles of `rows` rows of 128 bytes."""
        batch, seqlen, heads, columns = tensor.shape
        by_batch, by_row, by_head, _ = tensor.strides
        extents, strides = (columns, seqlen, heads, batch), (by_row, by_head, by_batch)
        return cls._of(tensor, extents, strides, (rows, 1, 1))

    @classmethod
    def of_transposed_values(cls, tensor: Tensor, shares: int = 1) -> "TensorLayout":
        """Codes of V, (batch, heads, head_dim, seqlen), as {seqlen, head_dim, heads, batch}.

        A tile is all of head_dim in rows of 128 bytes, or one of so many shares of it.
        """
        batch, heads, columns, seqlen = tensor.shape
        by_batch, by_head, by_column, _ = tensor.strides
        extents, strides = (seqlen, columns, heads, batch), (by_column, by_head, by_batch)
        return cls._of(tensor, extents, strides, (columns // shares, 1, 1))

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
    def of_ragged_keys(cls, tensor: Tensor, rows: int) -> "TensorLayout":
        """Sequences in K or V as {head_dim, x, heads, y}, in tiles of `rows` rows of 128 bytes.

        `bound` is the tensor's seqlen: of packed sequences all tokens, of a padded batch the
        length of an entry. In y the entry counts `rows_between_entries` for each one before it.
        """
        _, num_rows, heads, columns = (packed := _as_packed(tensor)).shape
        _, by_row, by_head, _ = packed.strides
        extents = columns, tensor.shape[1], heads, num_rows + 1
        return cls._of(tensor, extents, (by_row, by_head, by_row), (rows, 1, 1), (1, 3))

    @classmethod
    def of_ragged_queries(cls, tensor: Tensor, pack: int) -> "TensorLayout":
        """Sequences in Q or the result as {head_dim, pack, x, heads / pack, y}.

        A tile is as `of_queries` has it; `bound` and y are as in `of_ragged_keys`.
        """
        _, num_rows, heads, columns = (packed := _as_packed(tensor)).shape
        _, by_row, by_head, _ = packed.strides
        extents = columns, pack, tensor.shape[1], heads // pack, num_rows + 1
        strides = by_head, by_row, pack * by_head, by_row
        return cls._of(tensor, extents, strides, (pack, WARPGROUP_ROWS // pack, 1, 1), (2, 4))

    @classmethod
    def of_pages(cls, tensor: Tensor, rows: int) -> "TensorLayout":
        """Pages of K or V, (pages, page_size, heads, head_dim), as {head_dim, x, heads, y, page}.

        In tiles of `rows` rows of 128 bytes, of one page each. `bound` is page_size: a page that
        is not full ends where its sequence does. A page that there is not is outside the tensor.
        """
        pages, page_size, heads, columns = tensor.shape
        by_page, by_row, by_head, _ = tensor.strides
        if page_size == 1:
            by_row = _legal(tensor)
        extents = columns, page_size, heads, page_size + 1, pages
        strides = by_row, by_head, by_row, by_page
        return cls._of(tensor, extents, strides, (rows, 1, 1, 1), (1, 3))

    @classmethod
    def _of(cls, tensor: Tensor, extents, strides, rows, row_axes=()) -> "TensorLayout":
        itemsize = tensor.view.itemsize
        # The stride of a dimension of one element is never used.
        in_bytes = tuple(
            (stride if extents[axis] > 1 or axis in row_axes else _legal(tensor)) * itemsize
            for axis, stride in enumerate(strides, 1)
        )
        box = SLAB_BYTES // itemsize, *rows
        return cls(tensor.view.dtype, extents, in_bytes, box, row_axes=row_axes)


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


def ragged_misfit(tensor: Tensor) -> str | None:
    """Why no ragged map can describe a tensor, however its heads are packed; None if one can.

    A padded batch must be the rows of one array, with gaps between entries.
    """
    if 0 in tensor.shape:
        return "it is empty"
    by_batch, by_row = tensor.strides[0], _row_stride(tensor)
    itemsize = tensor.view.itemsize
    if by_row <= 0:
        return f"its row stride of {by_row * itemsize} bytes is not positive"
    if tensor.shape[0] > 1 and (by_batch < 0 or by_batch % by_row):
        return (
            f"its batch stride of {by_batch * itemsize} bytes is not a multiple of its row stride "
            f"of {by_row * itemsize}, so that its sequences are not rows of one array"
        )
    packed = _as_packed(tensor)
    if packed.shape[1] > _MAX_ROWS:
        return f"it is {packed.shape[1]} rows long, more than {_MAX_ROWS}"
    return misfit(packed)


def paged_misfit(tensor: Tensor, given: tuple[str, ...]) -> str | None:
    """Why no map of pages can describe K or V; None if one can. `given` is `Lengths.given`."""
    if "starts_k" in given:
        return "its sequences begin within a page"
    if tensor.shape[1] > 1 and tensor.strides[1] <= 0:
        return f"its row stride of {tensor.strides[1]} elements is not positive"
    return misfit(tensor)


def torn_pages(page_size: int, rows: int) -> str | None:
    """Why tiles of so many keys are not boxes of whole pages; None if they are.

    Rows of eight are swizzled alike, so that a box may begin at each multiple of eight.
    """
    if page_size % rows == 0 or (rows % page_size == 0 and page_size % 8 == 0):
        return None
    return (
        f"a tile of {rows} keys and pages of {page_size} do not divide each other in boxes of a "
        "multiple of 8 keys, and kernels on mma gather rows"
    )


def rows_between_entries(tensor: Tensor) -> int:
    """Rows of a ragged map's array from a batch entry to the next; 0 where there is one entry.

    The tensor has no `ragged_misfit`.
    """
    return tensor.strides[0] // _row_stride(tensor) if tensor.shape[0] > 1 else 0


def _as_packed(tensor: Tensor) -> Tensor:
    """The rows of all batch entries as one entry; there are rows between that are of none."""
    batch, seqlen, heads, columns = tensor.shape
    by_row = _row_stride(tensor)
    between = tensor.strides[0] // by_row if batch > 1 else 0
    shape = 1, (batch - 1) * between + seqlen, heads, columns
    return replace(tensor, shape=shape, strides=(0, by_row, *tensor.strides[2:]))


def _row_stride(tensor: Tensor) -> int:
    """Elements from a row to the next; of sequences of one row that is the next entry."""
    (batch, seqlen, _, _), (by_batch, by_row, _, _) = tensor.shape, tensor.strides
    if seqlen > 1:
        return by_row
    return by_batch if batch > 1 and by_batch else _legal(tensor)


def _legal(tensor: Tensor) -> int:
    """A stride in elements that the driver accepts, where none is ever taken."""
    itemsize = tensor.view.itemsize
    return -(-tensor.shape[-1] * itemsize // _UNIT) * _UNIT // itemsize
