"""How long blocks wait for their turns to add to dQ, by playing them through.

A block owns keys and walks over tiles of queries upwards. It may add dQ of a tile when the block
before it in the tile's order has, and its buffer of dQ is free again a while after. Blocks start
in the order of their numbers, each on the first SM that is free, and wait only for blocks that
have started earlier; so each can be played to its end before the next.

All tiles of a block are played at once. Of tile n of a block that has `buffers` of dQ

    done[n] = max(done[n - 1] + tile, start[n - buffers] + until_free + part of a tile)
    start[n] = max(done[n], start[n - 1] + complete, turn of n)

are sums of steps from earlier tiles, of which the longest counts. A way that goes over j tiles
takes one step of a buffer or as many as there can be, and else steps of one tile: so `start` is
the largest of few running maxima (`_starts`).

Two orders of keys are known: "last first", in which blocks of a causal mask are at different tiles
at any moment, and "first first". Blocks that begin at different tiles under a full mask, as in
FlashAttention-3, hardly wait: for them nothing is played. In a list of tiles, of sequences with
lengths of their own, blocks start and add in the order of the list. With a block mask a block
visits the tiles that its list has, and waits only for blocks whose lists have them, too.

A block is taken to end, or to begin with its next place, when its last tile is added. In truth it
stores dK and dV meanwhile, and a block that draws places goes on. By a model that played this both
are shorter by some 3 % with 512 tokens and by 1 % and less with 4,096 and more, and blocks that
draw gain the same factors.
"""

import heapq
import itertools
from functools import lru_cache

import numpy as np

from .kept import Walk

Walks = tuple[tuple[Walk, ...], ...]
"""Lists of walks, each of all blocks of keys of a head; a list is for as many heads as another."""
ORDERS = ("last first", "first first")
_MOST_BLOCKS = 2_000
"""Blocks that are played, of whole heads."""
_ROUNDED = 0.01
"""Of fewer heads on fewer SMs: by how much of itself the number of SMs may be rounded."""
_AFTER = 0.15
"""Part of a tile that is left when its buffer of dQ is wanted. Assumed."""


@lru_cache(maxsize=1024)
def clocks_of(
    walks: Walks,
    repeats: int,
    heads: int,
    sms: int,
    tile: float,
    around: float,
    turn: float,
    complete: float,
    until_free: float,
    buffers: int,
    in_flight: int = 1,
    begin: float = 0.0,
) -> float:
    """Clocks until the last block is done.

    Args:
        walks: in the order in which blocks start and add; the first heads have the first list. In
            a list of sequences each sequence has tiles of its own.
        repeats: heads of queries that each block walks over.
        heads: of keys.
        sms: blocks that run at once.
        tile: clocks of a tile.
        around: clocks of a block beside its tiles.
        turn: from the start of a block's addition to that of the next block's.
        complete: from there until the block may add its next tile.
        until_free: from there until its buffer is free again.
        buffers: of dQ.
        in_flight: heads whose blocks start in turn.
        begin: when each SM may begin with its first block.
    """
    blocks = len(walks[0])
    if in_flight >= heads and blocks * heads > _MOST_BLOCKS:
        # All heads do the same at once: fewer on as many fewer SMs take as long.
        heads, sms, longer = _fewer(heads, sms, _MOST_BLOCKS // blocks)
        in_flight = heads
    else:
        longer = 1.0
    played = min(heads, max(2 * in_flight, _MOST_BLOCKS // blocks // 2 * 2))
    free = [begin] * sms
    ends = (end for each in walks for walk in each for _, end in walk)
    last, half = max(ends, default=0), 0.0
    visited = [[_tiles(walk) for walk in each] for each in walks]
    for bundle in range(0, played, in_flight):
        if bundle <= played // 2:
            half, halfway = sum(free), bundle
        together = range(min(in_flight, played - bundle))
        turns = np.zeros((len(together), repeats, last))
        for block, head in itertools.product(range(blocks), together):
            done = heapq.heappop(free) + around / 2
            tiles = visited[(bundle + head) * len(walks) // heads][block]
            here = turns[head][:, tiles]
            if here.size:
                start = _starts(here.ravel(), done, tile, complete, until_free, buffers)
                turns[head][:, tiles] = (start + turn).reshape(here.shape)
                done = float(start[-1]) + complete
            heapq.heappush(free, done + around / 2)
    # What is not played takes as long as the second half of what is.
    of_a_head = (sum(free) - half) / sms / (played - halfway)
    return longer * (max(free) + (heads - played) * of_a_head)


def _tiles(walk: Walk) -> slice | np.ndarray:
    """The tiles of a walk as an index of arrays."""
    if len(walk) == 1:
        return slice(*walk[0])
    return np.concatenate([np.arange(*run) for run in walk] or [np.zeros(0, int)])


def _starts(
    turns: np.ndarray,
    begin: float,
    tile: float,
    complete: float,
    until_free: float,
    buffers: int,
) -> np.ndarray:
    """When a block begins to add each of its tiles, with the names of `clocks_of`.

    Args:
        turns: of each tile, when the block before this one is through.
        begin: when the block begins with its first tile.
    """
    number = np.arange(len(turns))
    given = np.maximum(turns, begin + tile * (number + 1))
    # A step from a tile to the next, and of a buffer over as many tiles as there are buffers;
    # only behind a step of a buffer a tile is waited for that is being computed.
    buffer, step = until_free + _AFTER * tile, max(complete, tile)
    found = _largest(given, complete * number)
    later = _largest(given, step * number)[:-buffers] + buffer
    np.maximum(found[buffers:], later, out=found[buffers:])
    if buffer > buffers * step:
        steady = given.copy()
        for first in range(min(buffers, len(turns))):
            of_buffer = given[first::buffers]
            steady[first::buffers] = _largest(of_buffer, buffer * np.arange(len(of_buffer)))
        np.maximum(found, steady, out=found)
        for more in range(1, buffers):
            behind = buffers + more
            later = steady[:-behind] + (buffer + more * step)
            np.maximum(found[behind:], later, out=found[behind:])
    return found


def _largest(given: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The largest of each number and those before it, plus the steps from there."""
    return np.maximum.accumulate(given - steps) + steps


def _fewer(heads: int, sms: int, wanted: int) -> tuple[int, int, float]:
    """(heads, SMs, factor of the time) of at least `wanted` heads on their share of the SMs."""
    for fewer in range(max(1, wanted), heads):
        share = sms * fewer / heads
        if round(share) and abs(round(share) / share - 1) <= _ROUNDED:
            return fewer, round(share), round(share) / share
    return heads, sms, 1.0
