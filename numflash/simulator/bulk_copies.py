"""Bulk copies: tiles that arrive late, and tiles that are read late.

A load holds 0xFF bytes in its place until it arrives, and nothing else may write there: in some
blocks it arrives as soon as a thread waits for it, in others at random, in others only when no
thread can run. A store's tile must stay as it is until its thread has waited; it reaches global
memory when the block ends, or when its thread has waited for that.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from numflash.simulator.engine import current_thread
from numflash.simulator.errors import SimulationError
from numflash.simulator.mbarriers import Mbarrier, Mbarriers
from numflash.simulator.memory import POISON
from numflash.simulator.parts import Part
from numflash.simulator.proxies import AsyncProxy
from numflash.simulator.tensor_maps import SimulatedTensorMap

_ALIGNMENT = 128
# The probability that a load arrives when its barrier is waited for, and at any other time.
_HASTE = ((1.0, 0.0), (0.5, 0.25), (0.0, 0.0))


@dataclass(eq=False, slots=True)
class _Load:
    tensor_map: SimulatedTensorMap
    coordinates: tuple[int, ...]
    address: int
    barrier: Mbarrier


@dataclass(eq=False, slots=True)
class _Store:
    tensor_map: SimulatedTensorMap
    coordinates: tuple[int, ...]
    chunks: np.ndarray
    content: np.ndarray


@dataclass(eq=False, slots=True)
class _Stores:
    """The stores of a thread that it has not waited for."""

    issued: list[_Store] = field(default_factory=list)
    committed: list[_Store] = field(default_factory=list)


class BulkCopies(Part):
    """The bulk copies of a block."""

    def __init__(self, block):
        super().__init__(block)
        self._chunks = block.shared.bytes.reshape(-1, 16)
        self._mbarriers, self._proxy = block.part(Mbarriers), block.part(AsyncProxy)
        self._loads: list[_Load] = []
        self._stores: dict[int, _Stores] = defaultdict(_Stores)
        self._read: list[_Store] = []
        self._when_waited, self._any_time = _HASTE[int(block.random() * len(_HASTE))]

    def load(self, target, offset, tensor_map, barriers, index, coordinates) -> None:
        """Begin to copy a tile to element `offset` of `target`."""
        coordinates, address = self._place("a bulk load", target, offset, tensor_map, coordinates)
        barrier = self._mbarriers.find(barriers, index)
        if not barrier.visible_to_copies:
            raise SimulationError(
                f"a bulk load: {barrier} was initialised without a fence_mbarrier_init after it"
            )
        n_bytes = tensor_map.n_bytes
        self._proxy.begin_arrival("a bulk load", address, n_bytes)
        self.block.shared.bytes[address : address + n_bytes] = POISON
        self._loads.append(_Load(tensor_map, coordinates, address, barrier))
        self._perhaps_deliver()

    def wait(self, barriers, index, parity) -> None:
        """Wait for an mbarrier, for which loads may arrive meanwhile."""
        self._perhaps_deliver()
        self._mbarriers.wait(barriers, index, parity, self._hasten)

    def test(self, barriers, index, parity) -> bool:
        """Whether a wait for an mbarrier would return now; loads may arrive before."""
        self._perhaps_deliver()
        return self._mbarriers.test(barriers, index, parity, self._hasten)

    def store(self, tensor_map, coordinates, source, offset) -> None:
        """Begin to copy the tile at element `offset` of `source`."""
        coordinates, address = self._place("a bulk store", source, offset, tensor_map, coordinates)
        chunks = tensor_map.chunks(address)
        self._proxy.check("a bulk store", chunks)
        store = _Store(tensor_map, coordinates, chunks, self._chunks[chunks])
        self._stores[current_thread().index].issued.append(store)

    def commit(self) -> None:
        """Make a group of the stores that the running thread issued."""
        stores = self._stores[current_thread().index]
        stores.committed += stores.issued
        stores.issued = []

    def wait_for_reads(self) -> None:
        """The committed stores of the running thread have read shared memory."""
        stores = self._stores[current_thread().index]
        for store in stores.committed:
            if (self._chunks[store.chunks] != store.content).any():
                raise SimulationError(
                    f"the tile of a bulk store to {store.coordinates} changed after the store "
                    "was issued: a barrier before it, or a wait before the next write, is missing"
                )
        self._read += stores.committed
        stores.committed = []

    def wait_for_writes(self) -> None:
        """The committed stores of the running thread are in global memory."""
        stores = self._stores[current_thread().index].committed
        self.wait_for_reads()
        for store in stores:
            self._read.remove(store)
            store.tensor_map.write(store.coordinates, store.content)

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
            for kind, left in (("committed", stores.issued), ("waited for", stores.committed)):
                if left:
                    raise SimulationError(
                        f"{ended} and thread {thread} has not {kind} its bulk store to "
                        f"{left[0].coordinates}"
                    )
        for store in self._read:
            store.tensor_map.write(store.coordinates, store.content)

    def _place(self, what, array, offset, tensor_map, coordinates):
        if not isinstance(tensor_map, SimulatedTensorMap):
            raise SimulationError(f"{what}: {type(tensor_map).__name__} is no tensor map")
        if tensor_map.rank != len(coordinates):
            raise SimulationError(
                f"{what} of {len(coordinates)} dimensions with a tensor map of {tensor_map.rank}"
            )
        address = self.block.shared.address(array, offset)
        self.block.shared.check_range(what, address, tensor_map.n_bytes, _ALIGNMENT)
        return tuple(int(c) for c in coordinates), address

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
