"""Two ways to shared memory: the threads' own loads and stores, and the asynchronous proxy.

Bulk copies and `wgmma` see what a thread has stored only after a `fence.proxy.async` on the way
from the store to them: of the thread that stored, after its store, or of the one that copies or
multiplies, after the barrier by which it knows of the store. What they touch without one is an
error. Known are the stores made by instructions (`st_shared_*`, `stmatrix_x4`), not those of array
elements.

Either side is enough: PTX ISA 9.7.13.4 (`fence`) has this fence "take effect within a single
thread" and compose "with other forms of synchronization according to the rules of the Memory
Consistency Model", and 9.7.9.25.2 (Async Proxy) names no side. The rules with fences are written
out in NVIDIA's formal model (Lustig, Cooksey, Giroux: Mixed-Proxy Extensions for the NVIDIA PTX
Memory Consistency Model, ISCA 2022; `alloy/ptx.als` of github.com/NVlabs/mixedproxy): a generic
store precedes an access through another proxy where a fence of that proxy stands anywhere between
them in base causality order, "proxy fence for dst" in `proxy_preserved_cause_base`, if only it is
executed in the thread block of the access. CUTLASS fences in the writers, Triton in the readers.

That last condition leaves one side for what a thread of another block of the cluster has stored:
its own fence is in the wrong thread block ("the proxy fence must also be inserted in the same CTA
where the non-generic access is taking place", section 5.4), and the reader must execute one, after
the cluster's barrier. Only the executor runs such stores: `ptx/` has no instruction of them.

Whether a barrier stands between the store and a reader's fence is not followed. Where it is
missing, some order of threads has the store come after the fence, and that is found.
"""

from collections.abc import Iterable

import numpy as np

from numflash.simulator.engine import Thread, current_thread
from numflash.simulator.errors import SimulationError
from numflash.simulator.parts import Part

_CLEAN, _ARRIVING, _FROM_OUTSIDE = 0, 0xFFFF, 0xFFFE


class AsyncProxy(Part):
    """The state of each word of shared memory, as the asynchronous proxy sees it."""

    def __init__(self, block):
        super().__init__(block)
        # Clean, the destination of a copy under way, stored by another block, or 1 + the thread
        # whose store is not fenced; and how many fences there had been in the block by then.
        self._words = np.zeros(block.shared.bytes.size // 4, np.uint16)
        self._times = np.zeros(self._words.size, np.int64)
        self._unfenced: dict[int, list[slice]] = {}
        # By thread: how many fences there had been with its last one.
        self._fenced: dict[int, int] = {}
        # Threads that have seen global memory by an acquire since their last fence for it.
        self._acquired: set[int] = set()

    def fence(self, thread: Thread) -> None:
        """What `thread` has stored is visible from here on; and to it, what is stored by now."""
        thread.stores.clear()
        self.block.fences += 1
        self._fenced[thread.index] = self.block.fences
        for words in self._unfenced.pop(thread.index, ()):
            own = self._words[words]
            own[own == thread.index + 1] = _CLEAN

    def acquire(self, thread: Thread) -> None:
        """`thread` has seen what others have done to global memory; its copies do not yet."""
        self._acquired.add(thread.index)

    def fence_global(self, thread: Thread) -> None:
        """Copies of `thread` see global memory as it does."""
        self._acquired.discard(thread.index)

    def check_global(self, what: str) -> None:
        """Raise SimulationError unless `what` of the running thread sees what it has acquired."""
        thread = current_thread().index
        if thread in self._acquired:
            raise SimulationError(
                f"{what} of thread {thread}, which has acquired from another block, without a "
                "fence_proxy_async_global in between"
            )

    def begin_arrival(self, what: str, address: int, n_bytes: int, threads=None) -> None:
        """A copy of `threads`, see `check`, will write n_bytes at `address`, a multiple of 16."""
        chunks = slice(address // 16, (address + n_bytes) // 16)
        self.check(what, chunks, threads)
        self._words.reshape(-1, 4)[chunks] = _ARRIVING

    def end_arrival(self, address: int, n_bytes: int) -> None:
        """The copy has written them."""
        self._look_at_stores()
        self._words[address // 4 : (address + n_bytes) // 4] = _CLEAN

    def check(self, what: str, chunks, threads: Iterable[int] | None = None) -> None:
        """Raise SimulationError unless `what` may touch these 16-byte chunks of shared memory.

        `threads` execute it: the running one by default, none where it is of another block.
        """
        self._look_at_stores()
        states = self._words.reshape(-1, 4)[chunks]
        if not states.any():
            return
        if (states == _ARRIVING).any():
            raise SimulationError(
                f"{what} touches bytes to which a bulk copy is still under way: a wait for its "
                "mbarrier, or for an empty buffer, is missing"
            )
        threads = [current_thread().index] if threads is None else threads
        seen = min((self._fenced.get(thread, 0) for thread in threads), default=0)
        unseen = (states != _CLEAN) & (self._times.reshape(-1, 4)[chunks] >= seen)
        if not unseen.any():
            return
        if (states[unseen] == _FROM_OUTSIDE).any():
            raise SimulationError(
                f"{what} touches what another block of the cluster stored to shared memory "
                "without a fence_proxy_async of its own after the barrier: one of the other block "
                "counts for nothing here"
            )
        writer = int(states[unseen].flat[0]) - 1
        raise SimulationError(
            f"{what} touches what thread {writer} stored to shared memory without a "
            "fence_proxy_async of that thread after it, or of its own after the barrier"
        )

    def store_from_outside(self, first: int, n_words: int) -> None:
        """A thread of another block of the cluster has stored these words.

        Raises SimulationError where a copy to them is under way.
        """
        self._look_at_stores()
        words = slice(first, first + n_words)
        self._refuse_arriving("a thread of another block", words)
        self._words[words], self._times[words] = _FROM_OUTSIDE, self.block.fences

    def _look_at_stores(self) -> None:
        address = self.block.shared.address
        for thread in self.block.threads:
            if not thread.stores:
                continue
            ranges = self._unfenced.setdefault(thread.index, [])
            for array, first, n_words, fences in thread.stores:
                word = address(array, first) // 4
                ranges.append(slice(word, word + n_words))
                self._refuse_arriving(f"thread {thread.index}", ranges[-1])
                self._words[ranges[-1]] = thread.index + 1
                times = self._times[ranges[-1]]
                np.maximum(times, fences, out=times)
            thread.stores.clear()

    def _refuse_arriving(self, who: str, words: slice) -> None:
        if (self._words[words] == _ARRIVING).any():
            raise SimulationError(
                f"{who} stored to shared address {4 * words.start:#x} while a bulk copy was under "
                "way to it"
            )
