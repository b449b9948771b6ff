"""Ranks to measure on: processes with a GPU each, or threads that share one."""

import os
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from numflash.distributed import local


class Device(Protocol):
    """What a rank computes on."""

    def normal(self, shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        """Random normal numbers, the same for a seed."""

    def synchronize(self) -> None:
        """Wait for everything."""


class Rank(NamedTuple):
    """One rank's place.

    Attributes:
        comm: the ranks.
        device: its own.
        group: their ProcessGroup of torch.distributed, or None.
    """

    comm: Any
    device: Device
    group: Any = None


class Ranks(Protocol):
    """Something that runs ranks.

    Attributes:
        name: in words.
        most: ranks that there can be.
        is_first: whether this process prints and writes.
    """

    name: str
    most: int
    is_first: bool

    def run(self, size: int, work: Callable[[Rank], dict]) -> list[dict]:
        """What `work` returned on each of so many ranks, by rank; empty if this is none of them.

        Raises what a rank of this process raised.
        """

    def is_late(self, deadline: float) -> bool:
        """Whether a deadline of time.monotonic() is over: the first rank's clock tells all."""


class Threads:
    """Ranks that are threads of this process, on one device."""

    is_first, most = True, 8

    def __init__(self, device: Device, name: str, timeout: float = 300.0):
        """Bind a device.

        Args:
            device: of all ranks.
            name: of it.
            timeout: seconds that a rank waits for another.
        """
        self._device, self._timeout = device, timeout
        self.name = f"ranks that take turns on {name}: compute and merges without wires"

    def run(self, size, work):
        """As `Ranks.run`."""
        found: list[dict] = [{}] * size
        errors: list[BaseException] = []

        def on_thread(comm) -> None:
            try:
                found[comm.rank] = work(Rank(comm, self._device))
            except BaseException as error:
                errors.append(error)

        comms = local(size, timeout=self._timeout)
        threads = [threading.Thread(target=on_thread, args=(comm,)) for comm in comms]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return found

    def is_late(self, deadline):
        """As `Ranks.is_late`."""
        return time.monotonic() > deadline


class Processes:
    """Ranks that torchrun has started, each with a GPU; this process is one of them."""

    def __init__(self, device: Device):
        """Join the others, over NCCL."""
        import torch.distributed as dist

        dist.init_process_group("nccl")
        self._dist, self._device = dist, device
        self._groups: dict[int, Any] = {}
        self.most = dist.get_world_size()
        self.is_first = dist.get_rank() == 0
        self.name = f"{self.most} processes over NCCL"

    def run(self, size, work):
        """As `Ranks.run`."""
        from numflash.distributed import of_torch

        if size not in self._groups:
            # A group is made by all ranks of the world.
            self._groups[size] = self._dist.new_group(range(size))
        group, found = self._groups[size], []
        if self._dist.get_rank() < size:
            mine = work(Rank(of_torch(group), self._device, group))
            found = [None] * size
            self._dist.all_gather_object(found, mine, group=group)
        self._dist.barrier()
        return found

    def is_late(self, deadline):
        """As `Ranks.is_late`."""
        said = [time.monotonic() > deadline]
        self._dist.broadcast_object_list(said, src=0)
        return said[0]

    def close(self) -> None:
        """Leave the others."""
        self._dist.destroy_process_group()


def is_under_torchrun() -> bool:
    """Whether torchrun has started this process, one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_rank() -> int:
    """The number of the GPU that torchrun means for this process."""
    return int(os.environ.get("LOCAL_RANK", "0"))
