"""Which SM runs each block, and when: the blocks of a launch played through, event by event.

Blocks begin in the order of their numbers, each on the SM with the most room: at first each SM
gets one, then each a second, as many as fit. Later a block that ends makes room for the next.
Blocks that share an SM slow each other down while both are there, and no longer. Persistent blocks
stay, and go through places of their own.

Source: Gilman et al., "Demystifying the placement policies of the NVIDIA GPU thread block
scheduler for concurrent kernels" (2020), for the SM with the most room.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from numflash.selection.layout import persistent_walks

from .grid import Grid

MOST_PLAYED = 50_000
"""Blocks that are played. Of more it is the first and the last waves."""
_WAVES = 3
# Rounding leaves less than this part of a block.
_NOTHING = 1e-9

Clocks = Callable[[float, int], float]
"""(tiles, together) -> clocks of a block that shares its SM with so many, itself counted, for as
long as it runs."""


class Schedule(NamedTuple):
    """What runs where and when, each an array with an element for each block, or place, played.

    Attributes:
        number: of the block or place; all, or of very many those of the first and last waves.
        sm, slot: where it runs. An SM has as many slots as blocks fit.
        start, end: when it runs, in clocks.
    """

    number: np.ndarray
    sm: np.ndarray
    slot: np.ndarray
    start: np.ndarray
    end: np.ndarray

    @property
    def clocks(self) -> float:
        """When the last one is done; 0 if there is none."""
        return float(self.end.max(initial=0.0))


def dispatched(
    tiles: np.ndarray,
    clocks: Clocks,
    num_sms: int,
    resident: int,
    most_played: int = MOST_PLAYED,
    start: float = 0.0,
) -> Schedule:
    """The schedule of blocks that begin in order, each on the SM that has room first.

    Of more than `most_played` blocks the first and the last three waves are played. Those between
    take what they take on average, on all SMs.

    Args:
        tiles: (blocks,) tiles that each block walks over, in the order of their numbers.
        clocks: of a block.
        num_sms: SMs of the GPU.
        resident: blocks that fit on one at once.
        most_played: see above; fewer than six waves are all played.
        start: when the first ones begin.

    Example:
        >>> dispatched(np.array([3, 2, 1]), lambda tiles, _: 10.0 * tiles, 2, 1).end.tolist()
        [30.0, 20.0, 30.0]
    """
    wave, number, between = num_sms * resident, np.arange(len(tiles)), 0.0
    end_of_first, begin_of_last = _WAVES * wave, len(tiles) - _WAVES * wave
    if len(tiles) > max(most_played, 2 * _WAVES * wave):
        counts = np.bincount(tiles[end_of_first:begin_of_last])
        each = ((count, clocks(n, resident)) for n, count in enumerate(counts.tolist()) if count)
        between = sum(count * spent for count, spent in each) / wave
        number = np.delete(number, slice(end_of_first, begin_of_last))
    waiting = iter(number.tolist())
    found = _played(tiles, clocks, [waiting] * wave, num_sms, start)
    later = np.where(found.number >= begin_of_last, between, 0.0)
    return found._replace(start=found.start + later, end=found.end + later)


def persistent(
    tiles: np.ndarray, clocks: Clocks, num_sms: int, resident: int, start: float = 0.0
) -> Schedule:
    """The schedule of places that persistent blocks go through, a block in each slot.

    Args:
        tiles: (places,) tiles of each place, in order.
        clocks: of a place.
        num_sms: SMs of the GPU.
        resident: blocks on each.
        start: clocks from a block's beginning to its first place.
    """
    walks = persistent_walks(len(tiles), num_sms * resident)
    return _played(tiles, clocks, [iter(walk.tolist()) for walk in walks], num_sms, start)


def closed_form(grid: Grid, num_sms: int, resident: int, clocks: Clocks) -> float:
    """About when the last block is done if the longest begin first; nothing is played.

    At least the work of an SM and the longest block, which shares its SM for as long as the others
    last and then has it for itself. And, since some slot must take k of them, k of the first
    (k - 1) slots + 1 blocks.

    Args:
        grid: the blocks.
        num_sms: SMs of the GPU.
        resident: blocks that fit on one at once.
        clocks: of a block.
    """
    blocks, slots, walks = grid.blocks, num_sms * resident, grid.walks
    waves, all_share = -(-blocks // slots), clocks(walks.most, resident)
    if waves == 1 and walks.is_even:
        return all_share
    balanced = blocks / num_sms * clocks(grid.mean_tiles, resident) / resident
    longest = balanced + max(0.0, 1 - balanced / all_share) * clocks(walks.most, 1)
    if waves == 1:
        return min(longest, all_share)
    # Beyond so many waves the rest of the last one no longer matters.
    k = np.arange(1, min(waves, 64))
    firsts = walks.tiles[k * slots // grid.heads]
    best = int(np.argmax((k + 1) * (firsts + 1)))
    k, tiles = int(k[best]), float(firsts[best])
    in_last = resident if k + 1 < waves else -(-(blocks - k * slots) // num_sms)
    crowded = k * clocks(tiles, resident) + clocks(tiles, in_last)
    return max(longest, crowded)


def _played(
    tiles: np.ndarray,
    clocks: Clocks,
    queues: list[Iterator[int]],
    num_sms: int,
    start: float,
) -> Schedule:
    """Play the numbers that each slot takes from its queue, slot by slot of all SMs."""
    of_number, costs = tiles.tolist(), {}
    # Of each SM its blocks: [part that is left, tiles, slot, since, number].
    running: list[list[list]] = [[] for _ in range(num_sms)]
    last_change, due, found = [start] * num_sms, [], []

    def cost(n: int, together: int) -> float:
        if (n, together) not in costs:
            costs[n, together] = clocks(n, together)
        return costs[n, together]

    def fill(free: list[tuple[int, int]], now: float) -> None:
        """Have blocks begin in free (SM, slot), each where the fewest run."""
        room = [(len(running[sm]), sm, slot) for sm, slot in free]
        heapq.heapify(room)
        while room:
            there, sm, slot = heapq.heappop(room)
            if there < len(running[sm]):
                heapq.heappush(room, (len(running[sm]), sm, slot))
            elif (number := next(queues[slot * num_sms + sm], None)) is not None:
                running[sm].append([1.0, of_number[number], slot, now, number])

    def plan(sm: int, now: float) -> None:
        last_change[sm], here = now, running[sm]
        if here:
            left = min(each[0] * cost(each[1], len(here)) for each in here)
            heapq.heappush(due, (now + max(0.0, left), sm))

    def end(sm: int, now: float) -> Iterator[tuple[int, int]]:
        """The (SM, slot) of the blocks that have nothing left."""
        here, passed = running[sm], now - last_change[sm]
        for each in here:
            each[0] -= passed / cost(each[1], len(here))
        running[sm] = [each for each in here if each[0] > _NOTHING]
        for left, _, slot, since, number in here:
            if left <= _NOTHING:
                found.append((number, sm, slot, since, now))
                yield sm, slot

    fill([(sm, slot) for slot in range(len(queues) // num_sms) for sm in range(num_sms)], start)
    for sm in range(num_sms):
        plan(sm, start)
    while due:
        # Nothing but its own blocks changes what an SM does next, so that each plan still holds.
        now, sm = heapq.heappop(due)
        sms = [sm]
        while due and due[0][0] <= now * (1 + _NOTHING):
            sms.append(heapq.heappop(due)[1])
        fill([each for sm in sms for each in end(sm, now)], now)
        for sm in sms:
            plan(sm, now)
    return _in_order(found)


def _in_order(found: Iterable[tuple]) -> Schedule:
    columns = list(zip(*sorted(found), strict=True)) or [()] * len(Schedule._fields)
    kinds = (np.int64,) * 3 + (np.float64,) * 2
    return Schedule(*(np.array(x, kind) for x, kind in zip(columns, kinds, strict=True)))
