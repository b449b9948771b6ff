"""The mask over tiles: which are computed, the work of each tile of rows, the walk of a block."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from numflash.configs import implementation_of
from numflash.functions.program import Program
from numflash.selection.layout import EDGE, EMPTY, WHOLE, Tiling, tiles_seen

from ..asked import Asked, Kernel
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
        work: of each row of squares, the mean number of tiles that a tile of rows visits.
        least, most, mean, imbalance: of all tiles of rows; the last is most / mean.
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
    least: Number
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
    tiling, work, whole = found.tiling, found.work, int(found.whole.sum())
    shape = tiling.row_tiles, tiling.column_tiles
    step = tuple(-(-n // MOST_SQUARES) for n in shape)
    visited, most, mean = int(work.sum()), int(work.max()), float(work.mean())
    first = np.arange(0, shape[0], step[0])
    of_squares = np.add.reduceat(work, first) / np.diff(np.append(first, shape[0]))
    return MaskFacts(
        owns_keys=found.owns_keys,
        row_tile=Number(tiling.row_tile, "chosen"),
        column_tile=Number(tiling.column_tile, "chosen"),
        row_tiles=Number(shape[0], "counted"),
        column_tiles=Number(shape[1], "counted"),
        pack=Number(tiling.pack, "chosen"),
        squares=squares_of(found, step),
        step=step,
        whole=Number(whole, "counted"),
        masked=Number(visited - whole, "counted"),
        empty=Number(shape[0] * shape[1] - visited, "counted"),
        work=Number(of_squares, "counted", "tiles"),
        least=Number(int(work.min()), "counted", "tiles"),
        most=Number(most, "counted", "tiles"),
        mean=Number(mean, "counted", "tiles"),
        imbalance=Number(most / mean if mean else 1.0, "counted"),
        walk=_walk(kernel, found) if most else None,
        notes=_notes(asked, found),
    )


def squares_of(found: Laid, step: tuple[int, int]) -> np.ndarray:
    """Squares of step[0] x step[1] tiles: EMPTY or WHOLE where all of them are, else EDGE."""
    rows = np.arange(0, found.tiling.row_tiles, step[0])
    columns = np.arange(0, found.tiling.column_tiles, step[1])
    if found.kinds is not None:
        least, most = (
            each.reduceat(each.reduceat(found.kinds, rows, axis=0), columns, axis=1)
            for each in (np.minimum, np.maximum)
        )
        return np.where(least == most, least, EDGE).astype(np.uint8)
    ends = np.minimum(columns + step[1], found.tiling.column_tiles)
    seen, extremes = found.seen, (np.minimum, np.maximum, np.maximum, np.minimum)
    # Rows that see nothing have their begin anywhere, and leave no square whole.
    nothing = seen.begin == seen.end
    begin = np.where(nothing, found.tiling.column_tiles, seen.begin)
    end = np.where(nothing, 0, seen.end)
    each = begin, end, seen.whole_begin, seen.whole_end
    begin, end, whole_begin, whole_end = (
        extreme.reduceat(side, rows)[:, None] for extreme, side in zip(extremes, each, strict=True)
    )
    some = (ends > begin) & (columns < end)
    whole = (columns >= whole_begin) & (ends <= whole_end) & some
    return some.astype(np.uint8) + whole


def _walk(kernel: Kernel, found: Laid) -> Walk:
    """Of the tile of rows at six tenths of those that have any work."""
    tiling, busy = found.tiling, np.flatnonzero(found.work)
    row = int(busy[int(_CHOSEN * len(busy))])
    shares = found.shares(row)
    part = len(shares) // 2
    tiles, first = shares[part], row * tiling.row_tile
    units = _units(kernel, tiling, first)
    of_units = np.repeat(found.row(row)[None, tiles], len(units), axis=0)
    if len(units) > 1:
        of_units = np.stack(
            [
                _of_unit(found, of_block, *unit[1:], tiles)
                for of_block, unit in zip(of_units, units, strict=True)
            ]
        )
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


def _of_unit(
    found: Laid, of_block: np.ndarray, first: int, last: int, tiles: np.ndarray
) -> np.ndarray:
    """The kinds of a block's tiles for some of its rows: the band leaves them less."""
    tiling, token = found.tiling, first // found.tiling.pack
    # A tiling that begins at this row: token i of it is token i + `token`.
    rows = last // tiling.pack - token + 1
    alone = tiling._replace(
        rows=rows, row_tile=rows, lo=tiling.lo + token, hi=tiling.hi + token, pack=1
    )
    begin, end, whole_begin, whole_end = (int(each[0]) for each in tiles_seen(alone))
    some = (tiles >= begin) & (tiles < end)
    whole = (tiles >= whole_begin) & (tiles < whole_end)
    of_band = some.astype(np.uint8) + whole
    if found.kinds is None:
        return of_band
    # What a block mask keeps in part is masked for all.
    return np.where(some, np.minimum(of_band, np.maximum(of_block, EDGE)), EMPTY)


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
