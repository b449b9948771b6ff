"""`python -m bench balance`: how evenly the schedule of sequences of any lengths loads the SMs.

Counted from the list of tiles that `numflash.reference` makes, word for word as the kernel does,
and dealt as persistent kernels take it: to and fro over the SMs, the heads of a tile one after the
other. The work of a tile is the tiles of keys that it sees, and one for its own rows. Nothing here
is measured. No order helps where one tile is more than an SM's share: there its keys are split.
"""

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from bench.tables.tables import markdown
from numflash.problem.sequences import ListShape
from numflash.reference.sequences import (
    BEGIN,
    END,
    HEADER_WORDS,
    RECORD_WORDS,
    Extents,
    lists_of,
)
from numflash.selection.layout import taken_by

NUM_SMS = 132
HEADS = (8, 32)
"""Heads that have tiles of their own; where grouped heads are packed, key-value heads."""
TILE_M = TILE_N = 128
OWN_WORK = 1
"""Work of a tile besides its keys, in tiles of keys."""
LEAST, SHARES_PER_SM = 4, 4
"""Of splits: tiles of keys, at least; and so many more records than tiles at most."""
CONSTANT = 16
"""Tiles of keys in the splits of results that do not depend on a batch."""
COLUMNS = ("lengths", "tiles", "largest tile", "whole", "split", "splits of 2048")
_WORST = ("largest tile", "whole", "split", "splits of 2048")


class Case(NamedTuple):
    """Sequences: of queries, with the rows of packed heads, and of keys."""

    rows_q: np.ndarray
    seqlens_k: np.ndarray


class Dealt(NamedTuple):
    """A list dealt to the SMs, as multiples of the mean work of an SM.

    Attributes:
        busiest: the work of the busiest SM.
        largest: that of the largest tile.
        tiles: number of tiles, of all heads.
    """

    busiest: float
    largest: float
    tiles: int


def cases() -> dict[str, Case]:
    """The papers' lengths, equal ones, uneven ones, long-tailed draws; and decoding."""
    rng = np.random.default_rng(0)

    def drawn(count: int) -> np.ndarray:
        return np.exp(rng.normal(6.0, 1.1, count)).astype(int).clip(8, 16384)

    found = {
        f"papers: {16384 // n} x {n}": np.full(16384 // n, n)
        for n in (512, 1024, 2048, 4096, 8192, 16384)
    }
    found["powers of two, 8 to 8192"] = 2 ** np.arange(3, 14)
    found["one of 15000 among 60 of 64"] = np.array([15000, *[64] * 60])
    found |= {f"long-tailed, {n}, draw {x}": drawn(n) for n in (16, 64, 300) for x in "abc"}
    decoded = {
        "decoding: 1 x 131072": np.array([131072]),
        "decoding: 4 x 32768": np.full(4, 32768),
        "decoding: long-tailed, 16": drawn(16),
        "decoding: long-tailed, 64": drawn(64),
        "decoding: one of 100000 among 30": np.array([100000, *drawn(30)]),
    }
    prefilled = {name: Case(n, n) for name, n in found.items()}
    return prefilled | {name: Case(np.full(len(n), 4), n) for name, n in decoded.items()}


def works_of(case: Case, causal: bool, **splits) -> np.ndarray:
    """The work of each record of a list, in its order."""
    extents = [
        Extents(np.cumsum(n) - n, np.asarray(n, np.int64), False)
        for n in (case.rows_q, case.seqlens_k)
    ]
    band = {"hi": 0, "aligned": 1} if causal else {}
    made = lists_of(*extents, ListShape(TILE_M, TILE_N, **band, **splits))
    records = made.tiles[HEADER_WORDS:].reshape(-1, RECORD_WORDS)
    return (records[:, END] - records[:, BEGIN]).clip(0) + OWN_WORK


def dealt(works: np.ndarray, heads: int, num_sms: int = NUM_SMS) -> Dealt:
    """Records dealt in order, as persistent blocks take them.

    Args:
        works: of the records of one head.
        heads: whose tiles come one after the other.
        num_sms: that take them.
    """
    of_all = np.repeat(works, heads)
    loads = np.bincount(taken_by(len(of_all), num_sms), of_all, num_sms)
    mean = loads.mean()
    return Dealt(float(loads.max() / mean), float(of_all.max() / mean), len(of_all))


def rows() -> Iterator[dict[str, Any]]:
    """A row for each case, number of heads and mask."""
    for name, case in cases().items():
        for heads in HEADS:
            for causal in (False, True) if "decoding" not in name else (True,):
                found = dealt(works_of(case, causal), heads)
                shares = SHARES_PER_SM * NUM_SMS // heads
                parts = works_of(case, causal, least=LEAST, shares=shares)
                constant = works_of(case, causal, least=CONSTANT)
                yield {
                    "lengths": name,
                    "heads": heads,
                    "mask": "causal" if causal else "",
                    "tiles": found.tiles,
                    "largest tile": found.largest,
                    "whole": found.busiest,
                    "split": dealt(parts, heads).busiest,
                    "splits of 2048": dealt(constant, heads).busiest,
                }


def table() -> str:
    """The table in docs/sequences.md: of each number the worst of all draws, heads and masks."""
    worst: dict[str, dict[str, Any]] = {}
    for row in rows():
        name = row["lengths"].partition(", draw")[0]
        kept = worst.setdefault(name, row | {"lengths": name})
        kept |= {column: max(kept[column], row[column]) for column in _WORST}
        kept["tiles"] = min(kept["tiles"], row["tiles"])

    def text(value) -> str:
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    lines = ([text(row[column]) for column in COLUMNS] for row in worst.values())
    return markdown(COLUMNS, lines)


def add_command(commands) -> None:
    """Add `balance` to the commands of `python -m bench`."""
    parser = commands.add_parser("balance", help=__doc__.splitlines()[0])
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    print(table())
    return 0
