"""Two ways to shared memory: the threads' own loads and stores, and the asynchronous proxy.

Bulk copies and `wgmma` see the stores of a thread only after that thread's fence; here it is an
error if they touch such bytes before. Only stores made by instructions are known (`st_shared_*`,
`stmatrix_x4`), not those of array elements.
"""

import numpy as np

from numflash.simulator.engine import Thread
from numflash.simulator.errors import SimulationError
from numflash.simulator.parts import Part

_CLEAN, _ARRIVING = 0, 0xFFFF


class AsyncProxy(Part):
    """The state of each word of shared memory, as the asynchronous proxy sees it."""

    def __init__(self, block):
        super().__init__(block)
        # Clean, the destination of a copy under way, or 1 + the thread whose store is not fenced.
        self._words = np.zeros(block.shared.bytes.size // 4, np.uint16)
        self._chunks = self._words.reshape(-1, 4)
        self._unfenced: dict[int, list[slice]] = {}

    def fence(self, thread: Thread) -> None:
        """Make the stores of `thread` visible to the asynchronous proxy."""
        thread.stores.clear()
        for words in self._unfenced.pop(thread.index, ()):
            own = self._words[words]
            own[own == thread.index + 1] = _CLEAN

    def begin_arrival(self, what: str, address: int, n_bytes: int) -> None:
        """A copy will write n_bytes at `address`, a multiple of 16."""
        chunks = slice(address // 16, (address + n_bytes) // 16)
        self.check(what, chunks)
        self._chunks[chunks] = _ARRIVING

    def end_arrival(self, address: int, n_bytes: int) -> None:
        """The copy has written them."""
        self._look_at_stores()
        self._chunks[address // 16 : (address + n_bytes) // 16] = _CLEAN

    def check(self, what: str, chunks) -> None:
        """Raise SimulationError unless `what` may touch these 16-byte chunks of shared memory."""
        self._look_at_stores()
        states = self._chunks[chunks]
        if not states.any():
            return
        if (states == _ARRIVING).any():
            raise SimulationError(
                f"{what} touches bytes to which a bulk copy is still under way: a wait for its "
                "mbarrier, or for an empty buffer, is missing"
            )
        writer = int(states[states != _CLEAN].flat[0]) - 1
        raise SimulationError(
            f"{what} touches what thread {writer} stored to shared memory without a "
            "fence_proxy_async of that thread after it"
        )

    def _look_at_stores(self) -> None:
        address = self.block.shared.address
        for thread in self.block.threads:
            if not thread.stores:
                continue
            ranges = self._unfenced.setdefault(thread.index, [])
            for array, first, n_words in thread.stores:
                word = address(array, first) // 4
                ranges.append(slice(word, word + n_words))
                if (self._words[ranges[-1]] == _ARRIVING).any():
                    raise SimulationError(
                        f"thread {thread.index} stored to shared address {4 * word:#x} while a "
                        "bulk copy was under way to it"
                    )
                self._words[ranges[-1]] = thread.index + 1
            thread.stores.clear()
