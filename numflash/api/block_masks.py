"""Block masks: `create_block_mask`, `BlockMask.from_tiles`, FlexAttention's, and `show_mask`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from numflash.calls import block_masks as making
from numflash.calls.block_masks import Room
from numflash.problem.block_masks import (
    NUMBER,
    Blocks,
    ListedBlocks,
    arrays_of_aux,
    block_size_of,
    blocks_of,
    blocks_of_sequences,
)
from numflash.problem.options import AttentionOptions, kind_of
from numflash.problem.programs import Extent, keeps_everything, program_of_mask
from numflash.runtime.arrays import (
    current_array,
    library_of,
    on_stream,
    stream_address,
    to_numpy,
)
from numflash.runtime.torch_tensors import without_gradient
from numflash.runtime.views import ArrayView, Operand

EMPTY, PARTIAL, FULL = range(3)
"""Kinds of blocks in `BlockMask.tiles`."""
_SIGNS = "\N{MIDDLE DOT}\N{LIGHT SHADE}\N{FULL BLOCK}"
_NAMES_OF_LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")


class BlockMask(ListedBlocks):
    """Which blocks of queries and keys attention computes; `create_block_mask` makes it.

    Given to `attention` and `attention_backward` as `block_mask=`. It holds lists of the blocks
    that are not empty, by rows and by columns, and the function that decides within blocks that
    are partly kept.

    Example:
        >>> import numpy as np, numflash
        >>> tiles = np.array([[True, False], [True, True]])
        >>> mask = numflash.BlockMask.from_tiles(tiles, block_size=16)
        >>> mask.shape, mask.tiles()[0, 0].tolist()
        ((1, 1, 32, 32), [[2, 0], [2, 2]])
    """

    @classmethod
    def from_tiles(
        cls,
        tiles,
        full=None,
        *,
        block_size: int | tuple[int, int] = 128,
        seqlen_q: int | None = None,
        seqlen_k: int | None = None,
        mask_mod: Callable | None = None,
        aux: tuple = (),
        stream=None,
    ) -> "BlockMask":
        """The block mask of a boolean array.

        Args:
            tiles: (batch, heads, rows, columns) or (rows, columns), boolean: the blocks of queries
                and keys that are computed. Batch and heads may be 1 for all. Any strides.
            full: likewise, the blocks in which mask_mod keeps every key; None: with a mask_mod no
                block, without all.
            block_size: queries and keys of a block, a multiple of 16.
            seqlen_q, seqlen_k: of the sequences; None takes any that so many blocks cover.
            mask_mod, aux: which keys a query sees in the other blocks, as for `attention`.
            stream: a CUDA stream, or its address, to allocate and launch on; None is the current
                one of the array library of tiles.

        Raises:
            TypeError: no boolean arrays.
            ValueError: shapes that do not fit together, a block size that tiles do not divide.
        """
        size, arrays, views = block_size_of(block_size), {"tiles": tiles}, {}
        if full is not None:
            arrays["full"] = full
        for name, array in arrays.items():
            views[name] = view = library_of(array, name).view(array, name)
            if view.dtype != "bool":
                raise TypeError(f"{name} must be boolean, got {view.dtype}")
            if len(view.shape) not in (2, 4):
                raise ValueError(
                    f"{name} must have shape (batch, heads, rows, columns) or (rows, columns), "
                    f"got {view.shape}"
                )
        shape, device = views["tiles"].shape, views["tiles"].device
        if full is not None and (views["full"].shape, views["full"].device) != (shape, device):
            raise ValueError(
                f"full must have the shape and device of tiles, {shape} on {device}, got "
                f"{views['full'].shape} on {views['full'].device}"
            )
        batch, heads, rows, columns = shape if len(shape) == 4 else (1, 1, *shape)
        blocks = blocks_of(size, rows, columns, batch, heads)
        seqlens = _seqlens(blocks, seqlen_q, seqlen_k)
        strides = {n: (0,) * (4 - len(v.strides)) + tuple(v.strides) for n, v in views.items()}
        of_full = strides.get("full", strides["tiles"] if mask_mod is None else None)

        def flags(operands: dict[str, Operand], room: Room):
            kept = operands["tiles"]
            return kept, operands.get("full", kept), [], (strides["tiles"], of_full)

        return _made(cls, flags, arrays, device, blocks, seqlens, stream, mask_mod, aux)

    @classmethod
    def from_flex_attention(cls, block_mask, *, aux: tuple = (), stream=None) -> "BlockMask":
        """The block mask that an object of FlexAttention's class `BlockMask` stands for.

        Args:
            block_mask: with the fields kv_num_blocks, kv_indices, full_kv_num_blocks,
                full_kv_indices, BLOCK_SIZE, mask_mod and seq_lengths. Its lists by columns are
                not read: they are made again of those by rows.
            aux: what its mask_mod gets besides the four numbers.
            stream: as for `from_tiles`.

        A count above a list's length, and an index that is no block, are passed over on the
        device: nothing outside the arrays is touched, and nothing is waited for to raise an error.

        Raises:
            TypeError, ValueError: fields of wrong kinds or shapes.
        """
        size = block_size_of(tuple(_field(block_mask, "BLOCK_SIZE")))
        arrays = {name: getattr(block_mask, name, None) for name in _NAMES_OF_LISTS}
        arrays = {name: array for name, array in arrays.items() if array is not None}
        views = {n: library_of(x, n).view(x, n) for n, x in arrays.items()}
        blocks = _blocks_of_lists(views, size)
        seqlens = getattr(block_mask, "seq_lengths", None)
        seqlens = _seqlens(blocks, *(seqlens or (None, None)))
        device = views["kv_indices"].device

        def flags(operands: dict[str, Operand], room: Room):
            bind = making.tiles_of_lists(views, blocks, room)
            strides = making.contiguous_flags(blocks)
            return *bind(operands), (strides, strides)

        mask_mod = getattr(block_mask, "mask_mod", None)
        if mask_mod is not None and not aux and keeps_everything(mask_mod):
            mask_mod = None
        made = _made(cls, flags, arrays, device, blocks, seqlens, stream, mask_mod, aux)
        return replace(made, is_of_function=True)

    def tiles(self) -> np.ndarray:
        """(batch, heads, rows, columns) int8 on the host: 0 empty, 1 partly kept, 2 full."""
        _, rows, columns, batch, heads = self.blocks
        entries, counts = to_numpy(self.entries), to_numpy(self.counts)
        found = np.full((batch, heads, rows, columns), EMPTY, np.int8)
        listed = np.arange(columns) < counts[..., None]
        *place, _ = np.nonzero(listed)
        of_lists = entries[listed]
        found[(*place, of_lists >> 1)] = np.where(of_lists & 1, FULL, PARTIAL)
        return found

    def sparsity(self) -> float:
        """The share of blocks that are empty, in percent."""
        total = self.blocks.count
        return 100 * (1 - float(to_numpy(self.counts).sum()) / total) if total else 0.0

    def dense(self, seqlen_q: int | None = None, seqlen_k: int | None = None) -> np.ndarray:
        """(batch, heads, seqlen_q, seqlen_k) boolean on the host: which keys each query sees.

        Args:
            seqlen_q, seqlen_k: of the sequences, where the mask was made for whole blocks.
        """
        (block_m, block_n), *_ = self.blocks
        seqlen_q, seqlen_k = self.seqlens or (seqlen_q, seqlen_k)
        tiles = self.tiles().repeat(block_m, 2).repeat(block_n, 3)[:, :, :seqlen_q, :seqlen_k]
        if self.mask_mod is None:
            return tiles != EMPTY
        aux = _on_host(self.aux)
        kept = _asked(self.mask_mod, aux, *map(np.arange, tiles.shape))
        return (tiles == FULL) | ((tiles == PARTIAL) & kept)


def create_block_mask(
    mask_mod: Callable,
    batch: int | None,
    heads: int | None,
    seqlen_q: int,
    seqlen_k: int,
    block_size: int | tuple[int, int] = 128,
    aux: tuple = (),
    *,
    like=None,
    stream=None,
) -> BlockMask:
    """The block mask of a function, made on the device without an array (seqlen_q, seqlen_k).

    Args:
        mask_mod: mask_mod(batch, head, q_idx, kv_idx, *aux) -> boolean, as for `attention`.
        batch, heads: as many masks are made; 1 or None where all batch entries, or heads, have
            the same.
        seqlen_q, seqlen_k: of q and k.
        block_size: queries and keys of a block, one number or two, multiples of 16. Kernels whose
            tiles do not divide it are not chosen.
        aux: arrays, and numbers, that the function gets.
        like: an array, as q, whose device and library the lists have; None: those of aux, else
            PyTorch's or CuPy's current device.
        stream: a CUDA stream, or its address, to allocate and launch on; None is the current one
            of that library.

    Returns:
        For `attention(..., block_mask=)`, which needs no mask_mod then: it is in here. Blocks of
        which the function keeps nothing cost neither copies nor products; in blocks of which it
        keeps all it is not asked.

    Raises:
        TypeError: an argument of a wrong type; a function that cannot be traced.
        ValueError: a block size that is no multiple of 16, numbers out of range.
        UnsupportedError: more blocks than lists can have.

    The function is asked once for each query and key. Memory: 8 bytes a block and head for lists
    by rows and columns, and 2 while they are made.

    Example:
        >>> import numpy as np, numflash
        >>> def causal(b, h, q_idx, kv_idx):
        ...     return q_idx >= kv_idx
        >>> mask = numflash.create_block_mask(causal, 1, 1, 64, 64, block_size=16)
        >>> mask.sparsity()
        37.5
    """
    if not callable(mask_mod):
        raise TypeError(f"mask_mod must be a function, got {mask_mod!r} ({kind_of(mask_mod)})")
    size = block_size_of(block_size)
    batch, heads = (1 if n is None else n for n in (batch, heads))
    blocks = blocks_of_sequences(size, seqlen_q, seqlen_k, batch, heads)
    arrays = arrays_of_aux(aux)
    views = {n: library_of(x, n).view(x, n) for n, x in arrays.items()}
    first = next(iter(arrays.values())) if like is None and arrays else without_gradient(like)
    if first is None:
        first = current_array("create_block_mask needs like=, an array as q")
    device = library_of(first, "like").view(first, "like").device
    extent = Extent(batch, heads, seqlen_q, seqlen_k, device)
    program, given = program_of_mask(mask_mod, aux, views, extent)

    def flags(operands: dict[str, Operand], room: Room):
        bind = making.tiles_of_function(program, given, blocks, (seqlen_q, seqlen_k), room)
        strides = making.contiguous_flags(blocks)
        return *bind(operands), (strides, strides)

    arrays = {"like": first, **arrays}
    seqlens = seqlen_q, seqlen_k
    made = _made(BlockMask, flags, arrays, device, blocks, seqlens, stream, mask_mod, aux)
    return replace(made, is_of_function=True)


def show_mask(
    mask,
    *,
    batch: int = 0,
    head: int = 0,
    seqlen_q: int | None = None,
    seqlen_k: int | None = None,
    block_size: int | tuple[int, int] = 128,
    aux: tuple = (),
    limit: int = 64,
) -> None:
    """Print a mask block by block: full, partly kept, or empty.

    Args:
        mask: a `BlockMask`, FlexAttention's, or a mask_mod.
        batch, head: whose mask.
        seqlen_q, seqlen_k, block_size, aux: of a mask_mod, which is asked on the host.
        limit: characters of a line, at most; of larger masks one stands for several blocks.

    Example:
        >>> import numflash
        >>> numflash.show_mask(lambda b, h, q, k: q >= k, seqlen_q=48, seqlen_k=48, block_size=16)
        batch 0, head 0: 3 x 3 blocks of 16 x 16, 3 full, 3 partly kept, 3 empty (33 %)
        ░··
        █░·
        ██░
    """
    if isinstance(mask, ListedBlocks) or is_flex_attention(mask):
        mask = own(mask)
        places = min(batch, mask.blocks.batch - 1), min(head, mask.blocks.heads - 1)
        if (batch, head) != (places[0] or batch, places[1] or head):
            raise ValueError(
                f"the mask has {mask.blocks.batch} batch entries and {mask.blocks.heads} heads, "
                f"asked for {batch} and {head}"
            )
        size, tiles = mask.block_size, mask.tiles()[places]
    elif callable(mask):
        if seqlen_q is None or seqlen_k is None:
            raise TypeError("show_mask needs seqlen_q and seqlen_k for a mask_mod")
        size = block_size_of(block_size)
        blocks_of_sequences(size, seqlen_q, seqlen_k, 1, 1)
        tiles = _tiles_on_host(mask, aux, (batch, head), (seqlen_q, seqlen_k), size)
    else:
        raise TypeError(f"mask must be a BlockMask or a mask_mod, got {mask!r} ({kind_of(mask)})")
    rows, columns = tiles.shape
    count = [int((tiles == kind).sum()) for kind in range(3)]
    share = 100 * count[EMPTY] / max(1, tiles.size)
    title = (
        f"batch {batch}, head {head}: {rows} x {columns} blocks of {size[0]} x {size[1]}, "
        f"{count[FULL]} full, {count[PARTIAL]} partly kept, {count[EMPTY]} empty ({share:.0f} %)"
    )
    several = max(1, -(-columns // limit), -(-rows // limit))
    if several > 1:
        title += f"; a sign stands for {several} x {several}"
    lines = ["".join(_SIGNS[kind] for kind in row) for row in _gathered(tiles, several)]
    print("\n".join([title, *lines]))


def is_flex_attention(value) -> bool:
    """Whether an object has the fields of FlexAttention's BlockMask."""
    return not isinstance(value, ListedBlocks) and all(
        hasattr(value, name) for name in (*_NAMES_OF_LISTS[:2], "BLOCK_SIZE")
    )


def own(value, stream=None):
    """A block mask of FlexAttention's as one of ours, read again; anything else as it is."""
    if not is_flex_attention(value):
        return value
    return BlockMask.from_flex_attention(value, stream=stream)


def with_own_block_mask(options: AttentionOptions, stream=None) -> AttentionOptions:
    """Options whose block mask is ours."""
    if options.block_mask is None or isinstance(options.block_mask, ListedBlocks):
        return options
    return options._replace(block_mask=own(options.block_mask, stream))


def _made(
    kind: type,
    flags: Callable,
    arrays: dict[str, Any],
    device: int,
    blocks: Blocks,
    seqlens: tuple[int, int] | None,
    stream,
    mask_mod: Callable | None,
    aux: tuple,
) -> BlockMask:
    """Flags of blocks become lists; `flags` are (kept, full, launches, strides of both)."""
    if mask_mod is not None and not callable(mask_mod):
        raise TypeError(f"mask_mod must be a function, got {mask_mod!r} ({kind_of(mask_mod)})")
    first = next(iter(arrays.values()))
    operands = {name: library_of(x, name).glance(x)[0] for name, x in arrays.items()}
    library = library_of(first, "tiles")
    room = Room(library, device)

    def work(stream: int) -> tuple:
        kept, full, launches, strides = flags(operands, room)
        lists, more = making.lists_of_tiles(blocks, *strides, room)(kept, full)
        for launch in (*launches, *more):
            launch(stream)
        return tuple(library.hand_back(each, first, stream) for each in lists)

    address = None if stream is None else stream_address(stream)
    lists = on_stream(work, address, device, arrays, operands)
    return kind(blocks, seqlens, *lists, mask_mod, tuple(aux))


def _seqlens(blocks: Blocks, seqlen_q, seqlen_k) -> tuple[int, int] | None:
    """Sequences that so many blocks cover. Raises TypeError, ValueError."""
    if seqlen_q is None and seqlen_k is None:
        return None
    if seqlen_q is None or seqlen_k is None:
        raise ValueError("seqlen_q and seqlen_k go together: give both, or neither")
    wanted = blocks_of_sequences(blocks.size, seqlen_q, seqlen_k, blocks.batch, blocks.heads)
    if wanted != blocks:
        raise ValueError(
            f"seqlens {seqlen_q} and {seqlen_k} have {wanted.rows} x {wanted.columns} blocks of "
            f"{blocks.size[0]} x {blocks.size[1]}, the mask has {blocks.rows} x {blocks.columns}"
        )
    return int(seqlen_q), int(seqlen_k)


def _field(block_mask, name: str):
    value = getattr(block_mask, name, None)
    if value is None:
        raise TypeError(f"block_mask must have the field {name}, as FlexAttention's has")
    return value if isinstance(value, tuple | list) else (value, value)


def _blocks_of_lists(views: dict[str, ArrayView], size: tuple[int, int]) -> Blocks:
    """The blocks of FlexAttention's lists, checked. Raises TypeError, ValueError."""
    if "kv_num_blocks" not in views or "kv_indices" not in views:
        raise TypeError("block_mask must have the fields kv_num_blocks and kv_indices")
    if ("full_kv_num_blocks" in views) != ("full_kv_indices" in views):
        raise ValueError("full_kv_num_blocks and full_kv_indices go together: give both, or none")
    device = views["kv_indices"].device
    shape = views["kv_num_blocks"].shape
    for name, view in views.items():
        wanted = 4 if name.endswith("indices") else 3
        if view.dtype != "int32":
            raise TypeError(f"{name} must be int32, got {view.dtype}")
        if len(view.shape) != wanted or view.shape[:3] != shape:
            raise ValueError(
                f"{name} must have {wanted} dimensions that begin with (batch, heads, rows) = "
                f"{tuple(shape)}, got shape {tuple(view.shape)}"
            )
        if view.device != device:
            raise ValueError(f"{name} must lie on device {device}, got device {view.device}")
    batch, heads, rows = shape
    return blocks_of(size, rows, views["kv_indices"].shape[3], batch, heads)


def _on_host(aux) -> list:
    return [each if isinstance(each, NUMBER) else to_numpy(each) for each in aux]


def _asked(mask_mod: Callable, aux, batch, heads, queries, keys) -> np.ndarray:
    """A function asked about numbers, as NumPy arrays: (batch, heads, queries, keys)."""
    kept = mask_mod(*np.ix_(batch, heads, queries, keys), *aux)
    shape = len(batch), len(heads), len(queries), len(keys)
    return np.broadcast_to(np.asarray(kept), shape).astype(bool)


def _tiles_on_host(mask_mod, aux, place, seqlens, size) -> np.ndarray:
    aux = _on_host(aux)
    (seqlen_q, seqlen_k), (block_m, block_n) = seqlens, size
    columns = range(0, seqlen_k, block_n)
    found = np.full((-(-seqlen_q // block_m), len(columns)), EMPTY, np.int8)
    for row in range(len(found)):
        queries = np.arange(row * block_m, min(seqlen_q, (row + 1) * block_m))
        kept = _asked(mask_mod, aux, [place[0]], [place[1]], queries, np.arange(seqlen_k))[0, 0]
        for column, first in enumerate(columns):
            of_block = kept[:, first : first + block_n]
            found[row, column] = FULL if of_block.all() else PARTIAL if of_block.any() else EMPTY
    return found


def _gathered(tiles: np.ndarray, several: int) -> np.ndarray:
    """Blocks of blocks: full or empty where all of them are."""
    if several == 1:
        return tiles
    rows, columns = tiles.shape
    found = np.full((-(-rows // several), -(-columns // several)), PARTIAL, np.int8)
    for row, column in np.ndindex(found.shape):
        of_sign = tiles[row * several :, column * several :][:several, :several]
        if (of_sign == of_sign[0, 0]).all():
            found[row, column] = of_sign[0, 0]
    return found
