"""A block of an executed kernel: its warps and its memory.

Parts of the simulator's blocks (copies, mbarriers, products) find here what they ask of a block.
"""

import math
import random
import re

import numpy as np

from numflash.executor.memory import RANK_BYTES, Memory, Region
from numflash.executor.program import Program
from numflash.executor.together import NamedBarrier
from numflash.executor.warps import Warp
from numflash.simulator.clusters import Member
from numflash.simulator.errors import SimulationError
from numflash.simulator.parts import Part

# The share of `try_wait`s that give up although they could wait.
_FAILS = 1 / 32
_SHARED_START = 1024


class Block:
    """One block of a launch.

    Attributes:
        cluster, rank: that it is of, and its place there.
        number: its place in the launch.
        position, grid, extents: its place, how many there are, and its threads; x, y, z.
        writes, patience: the launch's.
        size: threads.
        parts, shared, random, seed, elected_lane, blocks_per_sm, blockIdx: as those of
            `simulator.engine.Block`.
        window: where its shared memory begins in that of the cluster.
        tensor_maps: by their address.
        counts: executions of each piece by warps, where a profile is wanted.
        has_begun, has_ended: whether a warp has executed anything, and all have returned.
    """

    def __init__(self, launch, cluster, rank: int, position: tuple[int, int, int]):
        program: Program = launch.program
        self.cluster, self.rank = cluster, rank
        self.number = cluster.number * math.prod(program.entry.cluster) + rank
        self.writes, self.patience = launch.writes, launch.patience
        self.program, self.position, self.blockIdx = program, position, position
        self.grid, self.extents, self.size = launch.grid, launch.block, launch.num_threads
        self.blocks_per_sm, self.seed = launch.blocks_per_sm, launch.seed
        self.counts, self.traffic = launch.counts, launch.traffic
        self.random = random.Random(f"{self.seed} {position}").random
        self.elected_lane = random.Random(f"lane {self.seed}").randrange(32)
        self.shared = program.shared_memory()
        self.words, self.mbarriers = self.shared_as(np.uint32), self.shared_as(np.uint64)
        visible = self.shared.bytes[_SHARED_START : program.shared_end]
        self.window = rank * RANK_BYTES
        self.memory = Memory(
            launch.regions,
            Region("shared memory", self.window + _SHARED_START, visible),
            Region("the parameters", 0, launch.parameters, writeable=False),
            launch.constants,
            self.reach,
        )
        self.tensor_maps = launch.tensor_maps
        self.parts: dict[type, Part] = {}
        self.barriers: dict[int, NamedBarrier] = {}
        self.fences, self.has_begun, self.has_ended = 0, False, False
        self.warps = [Warp(self, i, program) for i in range(-(-self.size // 32))]
        self.threads = [thread for warp in self.warps for thread in warp.threads]

    @property
    def live(self) -> int:
        """Threads of warps that have not returned, whole warps."""
        return 32 * sum(bool(warp.groups) for warp in self.warps)

    def reach(self, rank: int) -> Region | None:
        """The shared memory of a rank of the cluster; None where there is no such.

        Raises SimulationError where its block has not begun, or has ended.
        """
        if not 0 <= rank < len(self.cluster.blocks):
            return None
        block = self.part(Member).peer("an access to shared memory", rank)
        if not block.has_begun:
            raise SimulationError(
                f"the shared memory of block {block.position}, which has not begun yet: a "
                "barrier.cluster before is missing"
            )
        return block.memory.shared

    def whose(self, address: int, what: str) -> "Block":
        """The block in whose shared memory an address is, to which `what` is done.

        Raises SimulationError where there is none, or it has ended.
        """
        rank = address // RANK_BYTES
        return self if rank == self.rank else self.part(Member).peer(what, rank)

    def shared_as(self, type_) -> np.ndarray:
        """All of shared memory as elements of a type."""
        return self.shared.bytes.view(type_)

    def mbarrier_index(self, address: int) -> int:
        """The element of `mbarriers` at an address. Raises IndexError, ValueError."""
        offset = self.offset(address)
        if offset % 8:
            raise ValueError(f"there can be no mbarrier at shared address {address:#x}")
        return offset // 8

    def offset(self, address: int) -> int:
        """Where the byte at an address is in the block's own `shared`. Raises IndexError."""
        offset = address - self.window
        if not 0 <= offset < self.shared.bytes.size:
            raise IndexError(
                f"shared address {address:#x} lies outside the block's {self.memory.shared}"
            )
        return offset

    def part(self, kind: type[Part]) -> Part:
        """The block's one `kind`."""
        part = self.parts.get(kind)
        if part is None:
            part = self.parts[kind] = kind(self)
        return part

    def wake(self, thread) -> None:
        """Threads that wait ask again by themselves."""

    def only_polls(self) -> bool:
        """No thread runs within another's instruction."""
        return True

    def step_aside(self, idle: bool) -> bool:
        """Warps take turns after each piece of a program by themselves."""
        return False

    def something_happened(self) -> None:
        """Let waiting warps look again, those of other blocks of the cluster, too."""
        self.cluster.something_happened()

    def may_fail(self) -> bool:
        """Whether a `try_wait` that could wait gives up instead."""
        return self.cluster.may_fail() or self.random() < _FAILS

    def finish(self) -> None:
        """All warps have returned: nobody can reach the block's memory any more.

        Raises SimulationError where a copy, or something else, is left over.
        """
        self.has_ended = True
        for part in self.parts.values():
            part.finish()

    def who_waits(self) -> list[str]:
        """Lines of a deadlock's message: which threads wait where, and for what."""
        lines = []
        for warp in self.warps:
            for group in warp.groups:
                statement = self.program.pieces[group.piece][0]
                who = _ranges(32 * warp.number + np.flatnonzero(group.mask))
                lines.append(f"  threads {who} at {statement}")
                if group.waits_for:
                    lines.append(f"    wait for {group.waits_for}")
        for part in self.parts.values():
            lines += part.report()
        return lines


def _ranges(numbers) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    text = ", ".join(str(n) for n in numbers)
    if len(numbers) > 1 and numbers[-1] - numbers[0] + 1 == len(numbers):
        return f"{numbers[0]}-{numbers[-1]}"
    return re.sub(r"\s+", " ", text)
