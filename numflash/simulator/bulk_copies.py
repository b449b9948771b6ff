"""Bulk copies: tiles that arrive late, and tiles that are read late.

A tile is what a tensor map and coordinates name, or consecutive bytes (`Span`). A load holds 0xFF
bytes in its place until it arrives, and nothing else may write there: in some blocks it does as
soon as someone waits for it, in others at random, in others only when no thread can run. A store's
tile must stay as it is until its thread has waited; it reaches global memory when its thread has
waited for that, or when the block ends, or after it has been read, whichever comes first in this
block. A store may reduce: `combine(held, given)` says what it makes of two elements.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from numflash.simulator.engine import current_thread
from numflash.simulator.errors import SimulationError
from numflash.simulator.mbarriers import Mbarrier, Mbarriers
from numflash.simulator.memory import POISON
from numflash.simulator.parts import Part
from numflash.simulator.proxies import AsyncProxy
from numflash.simulator.tensor_maps import SimulatedTensorMap

# The probability that a load arrives when its barrier is waited for, and at any other time.
_HASTE = ((1.0, 0.0), (0.5, 0.25), (0.0, 0.0))
# Times at most that others run while a thread waits for its stores: where blocks run together,
# where they do not, and where others only look at memory.
_LINGERING, _LINGERING_ALONE, _LINGERING_FOR_POLLS = 4096, 64, 16
_ROUNDS = 32


class Span:
    """Consecutive bytes of global memory, a multiple of 16, as a tensor map without coordinates.

    Args:
        content: the bytes.
        dtype: of the elements, where a store reduces.
    """

    rank, alignment = 0, 16

    def __init__(self, content: np.ndarray, dtype=np.uint8):
        if content.size % 16:
            raise ValueError(f"a bulk copy of {content.size} bytes, which is no multiple of 16")
        self.content, self.n_bytes, self.dtype = content, content.size, np.dtype(dtype)

    @property
    def extent(self) -> tuple[int, int]:
        """The address in global memory, and the number of bytes."""
        return self.content.__array_interface__["data"][0], self.n_bytes

    def chunks(self, address: int) -> np.ndarray:
        """Where in shared memory the bytes are, as chunk numbers."""
        return np.arange(address // 16, (address + self.n_bytes) // 16)

    def check(self, coordinates: tuple) -> None:
        """All the bytes lie in their array: who made them has seen to it."""

    def read(self, coordinates: tuple) -> np.ndarray:
        """The bytes, (chunks, 16)."""
        return self.content.reshape(-1, 16)

    def write(self, coordinates: tuple, chunks: np.ndarray, combine: Callable | None) -> None:
        """Write the bytes, or combine the elements with those that are there."""
        given = chunks.reshape(-1)
        if combine is not None:
            held = self.content.view(self.dtype)
            given = combine(held, given.view(self.dtype)).view(np.uint8)
        self.content[:] = given


@dataclass(eq=False, slots=True)
class _Load:
    tensor_map: SimulatedTensorMap | Span
    coordinates: tuple[int, ...]
    address: int
    barrier: Mbarrier


@dataclass(eq=False, slots=True)
class _Store:
    tensor_map: SimulatedTensorMap | Span
    coordinates: tuple[int, ...]
    chunks: np.ndarray
    content: np.ndarray
    combine: Callable | None
    # What the block had acquired when the store was issued, where blocks run together.
    seen: np.ndarray | None
    is_read: bool = False


@dataclass(eq=False, slots=True)
class _Stores:
    """The stores of a thread: those of no group yet, and the groups that are not written."""

    issued: list[_Store] = field(default_factory=list)
    groups: list[list[_Store]] = field(default_factory=list)


class BulkCopies(Part):
    """The bulk copies of a block."""

    def __init__(self, block):
        super().__init__(block)
        self._chunks = block.shared.bytes.reshape(-1, 16)
        self._mbarriers, self._proxy = block.part(Mbarriers), block.part(AsyncProxy)
        self._loads: list[_Load] = []
        self._stores: dict[int, _Stores] = defaultdict(_Stores)
        self._when_waited, self._any_time = _HASTE[int(block.random() * len(_HASTE))]

    def load(self, target, offset, tensor_map, barriers, index, coordinates, blocks=None) -> None:
        """Begin to copy a tile to element `offset` of `target`.

        In each of `blocks` of the cluster, the own one by default, to the same address: it arrives
        in each at a time of its own, and an mbarrier of each counts it.
        """
        coordinates, address = self._place("a bulk load", target, offset, tensor_map, coordinates)
        counted_at = self.block.shared.address(barriers, index)
        self._proxy.check_global("a bulk load")
        for block in blocks or (self.block,):
            copies = block.part(BulkCopies)
            barrier = copies._mbarriers.find_at(counted_at, index)
            copies._begin(_Load(tensor_map, coordinates, address, barrier), block is self.block)

    def _begin(self, load: _Load, is_own: bool) -> None:
        """Begin a load into this block; whether the block itself has issued it."""
        if not load.barrier.visible_to_copies:
            raise SimulationError(
                f"a bulk load: {load.barrier} was initialised without a fence_mbarrier_init after "
                "it"
            )
        n_bytes = load.tensor_map.n_bytes
        threads = None if is_own else ()
        self._proxy.begin_arrival("a bulk load", load.address, n_bytes, threads)
        self.block.shared.bytes[load.address : load.address + n_bytes] = POISON
        self._loads.append(load)
        self._perhaps_deliver()

    def wait(self, barriers, index, parity) -> None:
        """Wait for an mbarrier, for which loads may arrive meanwhile."""
        self._perhaps_deliver()
        self._mbarriers.wait(barriers, index, parity, self._hasten)

    def test(self, barriers, index, parity) -> bool:
        """Whether a wait for an mbarrier would return now; loads may arrive before."""
        self._perhaps_deliver()
        return self._mbarriers.test(barriers, index, parity, self._hasten)

    def store(self, tensor_map, coordinates, source, offset, combine=None) -> None:
        """Begin to copy the tile at element `offset` of `source`, or to reduce by `combine`."""
        coordinates, address = self._place("a bulk store", source, offset, tensor_map, coordinates)
        chunks = tensor_map.chunks(address)
        self._proxy.check("a bulk store", chunks)
        self._proxy.check_global("a bulk store")
        writes = self.block.writes
        seen = writes.seen_by(self.block.number) if writes else None
        store = _Store(tensor_map, coordinates, chunks, self._chunks[chunks], combine, seen)
        self._stores[current_thread().index].issued.append(store)

    def commit(self) -> None:
        """Make a group of the stores that the running thread issued."""
        stores = self._stores[current_thread().index]
        stores.groups.append(stores.issued)
        stores.issued = []

    def wait_for_reads(self, pending: int = 0) -> None:
        """All groups of the running thread but the newest `pending` have read shared memory."""
        groups = self._stores[current_thread().index].groups
        for group in groups[: max(0, len(groups) - pending)]:
            for store in group:
                self._read(store)

    def wait_for_writes(self, pending: int = 0) -> None:
        """All groups of the running thread but the newest `pending` are in global memory."""
        self.wait_for_reads(pending)
        groups = self._stores[current_thread().index].groups
        arriving = max(0, len(groups) - pending)
        for group in groups[:arriving]:
            for store in group:
                self._write(store)
        del groups[:arriving]

    def linger(self) -> None:
        """Let others run before stores are over: not at all, at random, or as long as they can.

        As late as loads arrive in this block.
        """
        late, looks, block = 1 - self._when_waited, 0, self.block
        for _ in range(_LINGERING if block.writes else _LINGERING_ALONE):
            # Who looks meanwhile at what this thread is going to write does not wait in vain.
            block.patience.polls = 0
            idle = block.only_polls()
            if block.random() >= late or not block.step_aside(idle):
                break
            looks = looks + 1 if block.others_only_poll(idle) else 0
            if looks == _LINGERING_FOR_POLLS:
                break

    def rounds(self) -> int:
        """How often the executor lets others run before stores are over: see `linger`."""
        late, rounds = 1 - self._when_waited, 0
        while rounds < _ROUNDS and self.block.random() < late:
            rounds += 1
        return rounds

    def check_written(self, what: str) -> None:
        """Raise SimulationError where stores of the running thread are not in global memory."""
        stores = self._stores[current_thread().index]
        for store in [*stores.issued, *(store for group in stores.groups for store in group)]:
            raise SimulationError(
                f"{what} of thread {current_thread().index}, whose bulk store to "
                f"{store.coordinates} is under way: a cp_async_bulk_wait_group is missing"
            )

    def advance(self) -> bool:
        """Let a load arrive."""
        if self._loads:
            self._deliver(self._loads[int(self.block.random() * len(self._loads))])
            return True
        return False

    def finish(self) -> None:
        """Refuse copies that were not waited for; write what stores have read."""
        ended = f"block {tuple(self.block.blockIdx)} ended"
        for load in self._loads:
            raise SimulationError(
                f"{ended} with a bulk load of the tile at {load.coordinates} under way to shared "
                f"address {load.address:#x}, which {load.barrier} counts"
            )
        for thread, stores in self._stores.items():
            unread = [store for group in stores.groups for store in group if not store.is_read]
            for kind, left in (("committed", stores.issued), ("waited for", unread)):
                if left:
                    raise SimulationError(
                        f"{ended} and thread {thread} has not {kind} its bulk store to "
                        f"{left[0].coordinates}"
                    )
        for stores in self._stores.values():
            for group in stores.groups:
                for store in group:
                    self._write(store)

    def _write(self, store: _Store) -> None:
        """A store reaches global memory."""
        if self.block.writes and (extent := store.tensor_map.extent):
            tell = self.block.writes.add if store.combine else self.block.writes.store
            tell(self.block.number, *extent, store.seen)
        store.tensor_map.write(store.coordinates, store.content, store.combine)

    def _read(self, store: _Store) -> None:
        """A store reads its tile, which must be as it was when the store was issued."""
        if not store.is_read and (self._chunks[store.chunks] != store.content).any():
            raise SimulationError(
                f"the tile of a bulk store to {store.coordinates} changed after the store was "
                "issued: a barrier before it, or a wait before the next write, is missing"
            )
        store.is_read = True

    def _place(self, what, array, offset, tensor_map, coordinates):
        if not isinstance(tensor_map, SimulatedTensorMap | Span):
            raise SimulationError(f"{what}: {type(tensor_map).__name__} is no tensor map")
        if tensor_map.rank != len(coordinates):
            raise SimulationError(
                f"{what} of {len(coordinates)} dimensions with a tensor map of {tensor_map.rank}"
            )
        address = self.block.shared.address(array, offset)
        self.block.shared.check_range(what, address, tensor_map.n_bytes, tensor_map.alignment)
        coordinates = tuple(int(c) for c in coordinates)
        tensor_map.check(coordinates)
        return coordinates, address

    def _perhaps_deliver(self) -> None:
        if self._loads and self._any_time and self.block.random() < self._any_time:
            self.advance()

    def _hasten(self, barrier: Mbarrier) -> None:
        if self.block.random() < self._when_waited:
            for load in [load for load in self._loads if load.barrier is barrier]:
                self._deliver(load)

    def _deliver(self, load: _Load) -> None:
        tensor_map = load.tensor_map
        self._loads.remove(load)
        self._proxy.end_arrival(load.address, tensor_map.n_bytes)
        target = self.block.shared.bytes[load.address : load.address + tensor_map.n_bytes]
        if (target != POISON).any():
            raise SimulationError(
                f"shared memory from {load.address:#x} on was written while a bulk load of the "
                f"tile at {load.coordinates} was under way to it: which of them is last is not "
                "known"
            )
        self._chunks[tensor_map.chunks(load.address)] = tensor_map.read(load.coordinates)
        self._mbarriers.deliver(load.barrier, tensor_map.n_bytes)
