"""Block masks made: tiles of a function, of FlexAttention's lists or of the caller, as lists."""

from collections.abc import Callable
from typing import Any

from numflash.calls.launch import Launcher
from numflash.configs import MaskListsConfig, MaskScatterConfig, MaskTilesConfig, Traits
from numflash.kernels.arguments import given_of
from numflash.kernels.masks.arguments import BlockSizes, RowLists, TileFlags
from numflash.problem.block_masks import Blocks
from numflash.problem.problem import num_blocks
from numflash.runtime.arrays import ArrayLibrary
from numflash.runtime.views import ArrayView, Operand, contiguous_strides

Launch = Callable[[int], None]
# Kernels of flags and lists are the same for all problems.
_TRAITS = Traits("float16", 32, 32)


class Room:
    """Where results are allocated: a library and a device."""

    def __init__(self, library: ArrayLibrary, device: int):
        self.device, self._library = device, library

    def empty(self, shape: tuple[int, ...], dtype: str) -> Operand:
        """A new contiguous array."""
        return self._library.operand(self._library.empty(shape, dtype, self.device))


def tiles_of_function(
    program: str, given: tuple, blocks: Blocks, seqlens: tuple[int, int], room: Room
) -> Callable[[dict[str, Operand]], tuple[Operand, Operand, list[Launch]]]:
    """Make ready: (operands of the function) -> flags of blocks (kept, full), and launches.

    The flags are (batch, heads, rows, columns), a byte each.
    """
    traits = Traits("float16", 32, 32, program=program, blocks=blocks.size)
    config = MaskTilesConfig()
    arguments = {"sizes": _sizes(blocks, seqlens), "given": given_of(program)(*given)}
    launcher = _launcher(config, traits, room, blocks.count, arguments)

    def bind(operands: dict[str, Operand]) -> tuple[Operand, Operand, list[Launch]]:
        kept, full = (room.empty(_shape(blocks), "uint8") for _ in range(2))
        return kept, full, _bound(launcher, operands | {"kept": kept, "full": full})

    return bind


def tiles_of_lists(views: dict[str, ArrayView], blocks: Blocks, room: Room):
    """Make ready: (operands of FlexAttention's lists) -> as `tiles_of_function`.

    Args:
        views: of kv_num_blocks and kv_indices, and of full_kv_num_blocks and full_kv_indices if
            there are such.
        blocks: of the mask.
        room: for the results.
    """
    has_whole = "full_kv_indices" in views

    def lists(prefix: str) -> RowLists:
        counts, indices = f"{prefix}kv_num_blocks", f"{prefix}kv_indices"
        steps = *views[counts].strides, *views[indices].strides
        return RowLists(counts, indices, *steps, views[indices].shape[3])

    partial = lists("")
    arguments = {
        "partial": partial,
        "whole": lists("full_") if has_whole else partial,
        "sizes": _sizes(blocks, (0, 0)),
        "has_whole": int(has_whole),
    }
    rows = blocks.batch * blocks.heads * blocks.rows
    launcher = _launcher(MaskScatterConfig(), _TRAITS, room, rows, arguments)

    def bind(operands: dict[str, Operand]) -> tuple[Operand, Operand, list[Launch]]:
        kept, full = (room.empty(_shape(blocks), "uint8") for _ in range(2))
        return kept, full, _bound(launcher, operands | {"kept": kept, "full": full})

    return bind


def lists_of_tiles(
    blocks: Blocks, kept: tuple[int, ...], full: tuple[int, ...] | None, room: Room
) -> Callable[[Operand, Operand | None], tuple[tuple[Any, ...], list[Launch]]]:
    """Make ready: (kept, full) -> entries, counts, and both of keys; and launches.

    Args:
        blocks: of the mask.
        kept, full: strides of the flags; without `full` no block is.
        room: for the results.
    """
    launchers = []
    for of_keys in (False, True):
        batch, heads, rows, columns = _shape(blocks)
        if of_keys:
            rows, columns = columns, rows
        arguments = {
            "kept": _flags("kept", kept, of_keys),
            "full": _flags("full", full or kept, of_keys),
            "sizes": BlockSizes(batch, heads, rows, columns, 0, 0),
            "has_full": int(full is not None),
        }
        launcher = _launcher(MaskListsConfig(), _TRAITS, room, batch * heads * rows, arguments)
        launchers.append((launcher, (batch, heads, rows, columns)))

    def bind(kept: Operand, full: Operand | None) -> tuple[tuple[Any, ...], list[Launch]]:
        results, launches = [], []
        for launcher, shape in launchers:
            entries, counts = room.empty(shape, "int32"), room.empty(shape[:3], "int32")
            operands = {"kept": kept, "full": full or kept, "entries": entries, "counts": counts}
            launches += _bound(launcher, operands)
            results += entries.array, counts.array
        return tuple(results), launches

    return bind


def contiguous_flags(blocks: Blocks) -> tuple[int, ...]:
    """The strides of flags that were allocated here."""
    return contiguous_strides(_shape(blocks))


def _shape(blocks: Blocks) -> tuple[int, int, int, int]:
    return blocks.batch, blocks.heads, blocks.rows, blocks.columns


def _sizes(blocks: Blocks, seqlens: tuple[int, int]) -> BlockSizes:
    return BlockSizes(*_shape(blocks), *seqlens)


def _flags(name: str, strides: tuple[int, ...], of_keys: bool) -> TileFlags:
    batch, head, row, column = strides
    return TileFlags(name, batch, head, *((column, row) if of_keys else (row, column)))


def _launcher(config, traits: Traits, room: Room, warps: int, arguments: dict) -> Launcher | None:
    """A kernel with a warp for each of so many blocks or lists; None if there are none."""
    if not warps:
        return None
    grid = num_blocks("the block mask", warps, 1, config.block_rows)
    launcher = Launcher(config, traits, room.device, grid, arguments)
    launcher.build()
    return launcher


def _bound(launcher: Launcher | None, operands: dict[str, Operand]) -> list[Launch]:
    return [] if launcher is None else [launcher.bind(operands)]
