"""Clusters: blocks that are resident together, meet, and reach each other's shared memory.

What a block does to another one happens there: an mbarrier counts its arrivals, and bulk copies
check, poison and deliver the bytes of its own shared memory, as if it had begun them. Only the
fence of who stores them counts for those: the thread that copies is in another block.

`barrier.cluster` counts the threads that have not returned, as PTX has it (ISA 9.7.13.3). That a
block has ended while others come to the barrier is an error all the same, as is a thread that
returns between its arrival and its wait: both leave the barrier without a meaning. What it makes
visible is for blocks as a whole, as in `simulator.writes`. Arrivals at another block's mbarriers
make nothing visible there but themselves: a wait's scope is its own block.
"""

from numflash.simulator.engine import Block, Thread, current_thread
from numflash.simulator.errors import SimulationError
from numflash.simulator.mbarriers import Mbarriers
from numflash.simulator.parts import Part
from numflash.simulator.waiting import who_waits

MOST_BLOCKS = 8
"""Blocks of a cluster on every GPU that has clusters, without asking for more."""


class Cluster:
    """The blocks of a cluster by rank, and the barrier of all their threads.

    Attributes:
        phase: how often the barrier has let threads go.
        arrived: how many threads have arrived since.
        waiting: those of them that wait.
    """

    def __init__(self, blocks: list[Block]):
        self.blocks = blocks
        self.phase = self.arrived = 0
        self.waiting: list[Thread] = []
        # A block alone becomes a member when it asks.
        for rank, block in enumerate(blocks if len(blocks) > 1 else ()):
            block.parts[Member] = Member(block, self, rank)

    @property
    def size(self) -> int:
        """How many blocks it has."""
        return len(self.blocks)

    @property
    def expected(self) -> int:
        """How many threads the barrier waits for."""
        return sum(block.live for block in self.blocks)

    def let_go_if_complete(self) -> None:
        """End the barrier's phase if all threads have arrived."""
        if self.arrived < self.expected:
            return
        self.phase += 1
        self.arrived = 0
        if writes := self.blocks[0].writes:
            writes.meet([block.number for block in self.blocks])
        woken, self.waiting = self.waiting, []
        for thread in woken:
            thread.block.wake(thread)


class Member(Part):
    """A block's place in its cluster; of its own, with rank 0, where it is launched without."""

    def __init__(self, block: Block, cluster: Cluster | None = None, rank: int = 0):
        super().__init__(block)
        self.cluster = cluster or Cluster([block])
        self.rank = rank
        # By thread: the phase of the barrier in which it has arrived and for which it waits later.
        self._phases: dict[int, int] = {}

    def arrive(self) -> None:
        """The running thread arrives at the cluster's barrier."""
        thread, cluster = current_thread().index, self.cluster
        if thread in self._phases:
            raise SimulationError(
                f"barrier_cluster_arrive of thread {thread} again, without a "
                "barrier_cluster_wait in between"
            )
        for block in cluster.blocks:
            self._refuse_ended("barrier_cluster_arrive", block)
        self._phases[thread] = cluster.phase
        cluster.arrived += 1
        cluster.let_go_if_complete()

    def wait(self) -> None:
        """The running thread waits for all threads of the cluster."""
        thread, cluster = current_thread(), self.cluster
        phase = self._phases.get(thread.index)
        if phase is None:
            raise SimulationError(
                f"barrier_cluster_wait of thread {thread.index} without a barrier_cluster_arrive "
                "before it"
            )
        if cluster.phase == phase:
            cluster.waiting.append(thread)
            self.block.park()
        del self._phases[thread.index]

    def arrive_remote(self, array, index: int, rank: int) -> None:
        """Arrive at what the block of a rank has at the address of element `index` of `array`."""
        block = self.peer("mbarrier_arrive_remote", rank)
        address = self.block.shared.address(array, index)
        mbarriers = block.part(Mbarriers)
        mbarriers.arrive_at(mbarriers.find_at(address, index))

    def of_mask(self, what: str, mask: int) -> list[Block]:
        """The blocks whose bits are set in `mask`. Raises SimulationError."""
        if not mask:
            raise SimulationError(f"{what} to no block: its mask is 0")
        return [self.peer(what, rank) for rank in range(mask.bit_length()) if mask >> rank & 1]

    def peer(self, what: str, rank: int) -> Block:
        """The block of a rank, to which `what` is done. Raises SimulationError."""
        blocks = self.cluster.blocks
        if not 0 <= rank < len(blocks):
            raise SimulationError(
                f"{what} to the block of rank {rank}: the cluster of block "
                f"{tuple(self.block.blockIdx)} has ranks up to {len(blocks) - 1}"
            )
        self._refuse_ended(what, blocks[rank])
        return blocks[rank]

    def returned(self, thread: Thread) -> None:
        """A thread has returned: the barrier does not wait for it."""
        cluster, ended = self.cluster, not self.block.live
        if thread.index in self._phases:
            raise SimulationError(
                "returned after a barrier_cluster_arrive without its barrier_cluster_wait"
            )
        if not cluster.arrived:
            return
        if ended:
            raise SimulationError(
                f"block {tuple(self.block.blockIdx)} ended while {cluster.arrived} threads of its "
                "cluster have come to barrier_cluster_arrive: all blocks must"
            )
        cluster.let_go_if_complete()

    def report(self) -> list[str]:
        """The threads that wait for the cluster's barrier."""
        waiting = [thread for thread in self.cluster.waiting if thread.block is self.block]
        if not waiting:
            return []
        came = f"{self.cluster.arrived} of {self.cluster.expected} threads of the cluster came"
        return [f"  barrier_cluster_wait: {came}", *who_waits(waiting)]

    def _refuse_ended(self, what: str, block: Block) -> None:
        if not block.live:
            raise SimulationError(
                f"{what} of block {tuple(self.block.blockIdx)}, when block "
                f"{tuple(block.blockIdx)} of its cluster has ended: a cluster barrier before "
                "blocks end is missing, or not all come to it"
            )
