"""The objects at addresses that the lanes of a warp name, as bodies ask for them."""

import numpy as np

from numflash.simulator.engine import current_thread
from numflash.simulator.errors import SimulationError


class SharedAddresses:
    """Each lane's element of shared memory: the whole of it, and an index."""

    def __init__(self, warp, addresses, type_, size: int):
        self.array, self.addresses, self.size = warp.block.shared_as(type_), addresses, size
        self.region, self.window = warp.memory.shared, warp.block.window

    def __getitem__(self, lane):
        return self.array

    def index(self, lanes):
        """The indices of these lanes' elements. Raises IndexError, ValueError."""
        addresses = self.addresses[lanes]
        for address in addresses.tolist():
            if address % self.size:
                raise ValueError(
                    f"shared address {address:#x} is not a multiple of {self.size} bytes"
                )
            if not self.region.start <= address <= self.region.end - self.size:
                raise IndexError(
                    f"shared address {address:#x} lies outside the block's {self.region}"
                )
        return (addresses - self.window) // self.size


class GlobalAddress:
    """A lane's address in global memory, as a pointer whose element 0 is there."""

    def __init__(self, memory, address):
        self.memory, self.address = memory, int(address)

    def block(
        self, offset: int, n_bytes: int, alignment: int | None = None, access: str = "load"
    ) -> np.ndarray:
        """The n_bytes there, aligned to as many by default. Raises IndexError, ValueError."""
        alignment = alignment or n_bytes
        if self.address % alignment:
            raise ValueError(
                f"{n_bytes} bytes at global address {self.address:#x} are misaligned: it is no "
                f"multiple of {alignment}"
            )
        region = self.memory.find("global", self.address, n_bytes)
        block = current_thread().block
        if access != "none" and block.writes:
            getattr(block.writes, access)(block.number, self.address, n_bytes)
        return region.bytes[self.address - region.start :][:n_bytes]


class TensorMaps:
    """The tensor map at each lane's address."""

    def __init__(self, known: dict, addresses):
        self.known, self.addresses = known, addresses

    def __getitem__(self, lane):
        address = int(self.addresses[lane])
        if address not in self.known:
            raise SimulationError(f"there is no tensor map at {address:#x}")
        return self.known[address]
