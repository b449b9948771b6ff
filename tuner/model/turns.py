"""How long blocks wait for their turns to add to dQ, by playing them through.

A block owns keys and walks over tiles of queries upwards. It may add dQ of a tile when the block
before it in the tile's order has, and its buffer of dQ is free again a while after. Blocks start
in the order of their numbers, each on the first SM that is free, and wait only for blocks that
have started earlier; so each can be played to its end before the next.

Two orders of keys are known: "last first", in which blocks of a causal mask are at different tiles
at any moment, and "first first". Blocks that begin at different tiles under a full mask, as in
FlashAttention-3, hardly wait: for them nothing is played.
"""

import heapq
import itertools
from functools import lru_cache

ORDERS = ("last first", "first first")
_MOST_VISITS = 60_000
"""Tiles that are played, of whole heads."""
_AFTER = 0.15
"""Part of a tile that is left when its buffer of dQ is wanted. Assumed."""


@lru_cache(maxsize=1024)
def clocks_of(
    walks: tuple[tuple[int, int], ...],
    repeats: int,
    heads: int,
    sms: int,
    order: str,
    tile: float,
    around: float,
    turn: float,
    complete: float,
    until_free: float,
    buffers: int,
    in_flight: int = 1,
) -> float:
    """Clocks until the last block is done.

    Args:
        walks: (first tile, behind the last one) of each block of keys of a head, keys upwards.
        repeats: heads of queries that each block walks over.
        heads: of keys.
        sms: blocks that run at once.
        order: one of ORDERS, in which blocks start and add.
        tile: clocks of a tile.
        around: clocks of a block beside its tiles.
        turn: from the start of a block's addition to that of the next block's.
        complete: from there until the block may add its next tile.
        until_free: from there until its buffer is free again.
        buffers: of dQ.
        in_flight: heads whose blocks start in turn.
    """
    visits = repeats * sum(end - first for first, end in walks)
    played = min(heads, max(2 * in_flight, _MOST_VISITS // max(1, visits) // 2 * 2))
    free = [0.0] * sms
    blocks = walks[::-1] if order == "last first" else walks
    last, half = max(end for _, end in walks), 0.0
    for begin in range(0, played, in_flight):
        if begin <= played // 2:
            half, halfway = sum(free), begin
        together = range(min(in_flight, played - begin))
        ready = [[0.0] * (repeats * last) for _ in together]
        for (first, end), head in itertools.product(blocks, together):
            turns = ready[head]
            done = heapq.heappop(free) + around / 2
            added, empty = done, [done] * buffers
            visited = (h + m for h in range(0, repeats * last, last) for m in range(first, end))
            for number, m in enumerate(visited):
                done = max(done + tile, empty[number % buffers] + _AFTER * tile)
                start = max(done, added, turns[m])
                turns[m], added = start + turn, start + complete
                empty[number % buffers] = start + until_free
            heapq.heappush(free, max(done, added) + around / 2)
    # What is not played takes as long as the second half of what is.
    of_a_head = (sum(free) - half) / sms / (played - halfway)
    return max(free) + (heads - played) * of_a_head
