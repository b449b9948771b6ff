"""The mask over tiles: which are computed, the work of each tile of rows, the walk of a block."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from numflash.configs import implementation_of
from numflash.functions.program import Program
from numflash.selection.layout import EDGE, EMPTY, WHOLE, Tiling, tile_kinds

from ..asked import Asked, Kernel, NotShownError
from ..numbers import Number
from .laid import Laid, laid

MOST_SQUARES = 48
"""Rows and columns of squares that are drawn; of larger masks a square stands for several."""
FIRST_STEPS, LAST_STEPS = 12, 28
"""Of a walk of more than MOST_STEPS steps, those at its begin and at its end are shown."""
MOST_STEPS = 44
_CHOSEN = 0.6


@dataclass(frozen=True)
class Walk:
    """The walk of one block.

    Attributes:
        row_tile: the number of its tile of rows.
        first, last: its rows: tokens, or with heads that are packed, rows of all of them.
        units: who computes which rows: (name, first row, last row).
        tiles: the tiles of columns that it visits, in order.
        kinds: (units, tiles) uint8: EMPTY (skipped), EDGE (masked) or WHOLE.
        shown: the places in `tiles` that are drawn; -1 stands for those left out.
        part, parts: which share of all tiles of the row it is, of how many.
        counts: how many of each kind, by "whole", "masked" and "skipped".
    """

    row_tile: Number
    first: Number
    last: Number
    units: Sequence[tuple[str, int, int]]
    tiles: np.ndarray
    kinds: np.ndarray
    shown: Sequence[int]
    part: Number
    parts: Number
    counts: dict[str, Number]


@dataclass(frozen=True)
class MaskFacts:
    """The mask of a kernel over its tiles.

    Attributes:
        owns_keys: whether blocks own keys and walk over queries: rows are keys then.
        row_tile, column_tile: rows and columns of a tile.
        row_tiles, column_tiles: how many there are.
        pack: heads whose rows share a tile.
        squares: uint8 of at most 48 x 48: EMPTY or WHOLE where all tiles of a square are.
        step: tiles of rows and of columns that a square stands for.
        whole, masked, empty: tiles of each kind.
        work: of each tile of rows, the tiles that it visits.
        most, mean, imbalance: of `work`: the largest, the mean, and their ratio.
        walk: of one block; None where no block has anything to do.
        notes: what is drawn, where that is not all.
    """

    owns_keys: bool
    row_tile: Number
    column_tile: Number
    row_tiles: Number
    column_tiles: Number
    pack: Number
    squares: np.ndarray
    step: tuple[int, int]
    whole: Number
    masked: Number
    empty: Number
    work: Number
    most: Number
    mean: Number
    imbalance: Number
    walk: Walk | None
    notes: Sequence[str]


def find(asked: Asked, kernel: Kernel) -> MaskFacts:
    """The facts of a kernel's mask.

    Raises:
        NotShownError: there are no rows or no columns.
    """
    found = laid(asked, kernel)
    kinds, tiling = found.kinds, found.tiling
    if not kinds.size:
        raise NotShownError("there are no scores, so there is no mask to draw")
    step = tuple(-(-n // MOST_SQUARES) for n in kinds.shape)
    work = (kinds != EMPTY).sum(axis=1)
    counts = {kind: Number(int((kinds == kind).sum()), "counted") for kind in (WHOLE, EDGE, EMPTY)}
    most, mean = int(work.max()), float(work.mean())
    return MaskFacts(
        owns_keys=found.owns_keys,
        row_tile=Number(tiling.row_tile, "chosen"),
        column_tile=Number(tiling.column_tile, "chosen"),
        row_tiles=Number(tiling.row_tiles, "counted"),
        column_tiles=Number(tiling.column_tiles, "counted"),
        pack=Number(tiling.pack, "chosen"),
        squares=gathered(kinds, step),
        step=step,
        whole=counts[WHOLE],
        masked=counts[EDGE],
        empty=counts[EMPTY],
        work=Number(work, "counted", "tiles"),
        most=Number(most, "counted", "tiles"),
        mean=Number(mean, "counted", "tiles"),
        imbalance=Number(most / mean if mean else 1.0, "counted"),
        walk=_walk(kernel, found) if most else None,
        notes=_notes(asked, found),
    )


def gathered(kinds: np.ndarray, step: tuple[int, int]) -> np.ndarray:
    """Squares of step[0] x step[1] tiles: EMPTY or WHOLE where all of them are, else EDGE."""
    rows, columns = (-(-n // each) for n, each in zip(kinds.shape, step, strict=True))
    found = kinds
    for least in (True, False):
        missing = rows * step[0] - kinds.shape[0], columns * step[1] - kinds.shape[1]
        padded = np.pad(kinds, [(0, n) for n in missing], mode="edge")
        padded = padded.reshape(rows, step[0], columns, step[1])
        extreme = padded.min(axis=(1, 3)) if least else padded.max(axis=(1, 3))
        found = extreme if least else np.where(found == extreme, extreme, EDGE)
    return found.astype(np.uint8)


def _walk(kernel: Kernel, found: Laid) -> Walk:
    """Of the tile of rows at six tenths of those that have any work."""
    kinds, tiling = found.kinds, found.tiling
    busy = np.flatnonzero((kinds != EMPTY).any(axis=1))
    row = int(busy[int(_CHOSEN * len(busy))])
    shares = found.shares(row)
    part = len(shares) // 2
    tiles = shares[part]
    first = row * tiling.row_tile
    units = _units(kernel, tiling, first)
    of_units = np.repeat(kinds[row : row + 1, tiles], len(units), axis=0)
    if len(units) > 1:
        size = tiling.row_tile // len(units)
        fine = tile_kinds(tiling._replace(row_tile=size))[:, tiles]
        for at, (_, begin, _) in enumerate(units):
            of_units[at] = np.minimum(of_units[at], fine[begin // size])
            # A block that a block mask keeps in part is masked for all.
            of_units[at] = np.where(fine[begin // size] == EMPTY, EMPTY, of_units[at])
    shown = list(range(len(tiles)))
    if len(tiles) > MOST_STEPS:
        shown = [*shown[:FIRST_STEPS], -1, *shown[-LAST_STEPS:]]
    names = {"whole": WHOLE, "masked": EDGE, "skipped": EMPTY}
    return Walk(
        Number(row, "counted"),
        Number(first, "counted"),
        Number(min(first + tiling.row_tile, tiling.rows) - 1, "counted"),
        units,
        tiles,
        of_units,
        shown,
        Number(part, "counted"),
        Number(len(shares), "counted"),
        {name: Number(int((of_units == kind).sum()), "counted") for name, kind in names.items()},
    )


def _units(kernel: Kernel, tiling: Tiling, first: int) -> list[tuple[str, int, int]]:
    """Who masks by itself: a warpgroup of Hopper's forward; elsewhere all warps together."""
    config, last = kernel.config, min(first + tiling.row_tile, tiling.rows) - 1
    groups = getattr(config, "num_warpgroups", 1)
    if config.family != "forward" or not implementation_of(config).needs_maps or groups == 1:
        warps = getattr(config, "num_warps", 1)
        return [("1 warp" if warps == 1 else f"{warps} warps", first, last)]
    rows = tiling.row_tile // groups
    begins = [first + n * rows for n in range(groups)]
    return [
        (f"warpgroup {n}", begin, min(begin + rows - 1, last))
        for n, begin in enumerate(begins)
        if begin <= last
    ]


def _notes(asked: Asked, found: Laid) -> list[str]:
    notes, text = list(found.notes), asked.problem.program
    if text and asked.problem.blocks is None and Program.parse(text).keep is not None:
        notes.append(
            "a function is asked about each score of a tile that is visited; a block mask would "
            "pass over tiles in which it keeps none"
        )
    return notes
