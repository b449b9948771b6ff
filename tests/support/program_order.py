"""The steps that a kernel's roles take in the simulator, to be compared with their programs.

`record` listens where all waits, arrivals and products of the simulator meet, so that kernels need
not know of it. What a role does is told by one of its threads, a product by the warp that this
thread is in. Barriers that only the warps of one warpgroup share are left out, as is all work
that waits for nobody. `block_order` does the same for kernels whose warps share their work.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest

from numflash_tuner.pipeline.steps import (
    Arrive,
    Begin,
    Claim,
    Fetch,
    Fill,
    Program,
    Release,
    Send,
    Sync,
    Until,
    Wait,
    Work,
)

from numflash.simulator import warpgroup
from numflash.simulator.bulk_copies import BulkCopies
from numflash.simulator.engine import Thread, current_thread
from numflash.simulator.mbarriers import Mbarriers

Told = tuple
"""A step as it is compared: its verb and what it is about."""
FIRST_BYTE = 1024
"""The address of the dynamic part of shared memory."""


class Memory:
    """Which tile of a kernel lies where in shared memory.

    Args:
        offsets, words: of each tile, in words.
        buffers: of a tile, where it has more than one.
    """

    def __init__(
        self, offsets: Mapping[str, int], words: Mapping[str, int], buffers: Mapping[str, int]
    ):
        self._places = sorted((offsets[x], words[x], x, buffers.get(x, 1)) for x in words)

    def place(self, address: int) -> tuple[str, int]:
        """(tile, buffer) at a byte of shared memory."""
        word = (address - FIRST_BYTE) // 4
        found = bisect_right(self._places, (word, 2**40)) - 1
        first, words, name, buffers = self._places[found]
        return name, (word - first) // (words // buffers)


@dataclass
class Kernel:
    """What the simulator's numbers mean in a kernel.

    Attributes:
        name: of its function.
        channels: name -> (channel, buffers).
        barriers: number of a named barrier -> its name.
        memory: its shared memory.
        roles: warp -> role; others are not listened to.
    """

    name: str
    channels: Mapping[str, tuple[object, int]]
    barriers: Mapping[int, str]
    memory: Memory
    roles: Mapping[int, str]

    def verb(self, index: int, arrives: bool, n_bytes: int) -> Told:
        """What an arrival or a wait at an mbarrier means."""
        for name, (channel, buffers) in self.channels.items():
            for first, is_full in ((channel.full, True), (channel.empty, False)):
                if 0 <= index - first < buffers:
                    verbs = {
                        (False, True): "wait",
                        (False, False): "claim",
                        (True, True): "fetch" if n_bytes else "fill",
                        (True, False): "release",
                    }
                    return verbs[arrives, is_full], name, index - first
        raise AssertionError(f"mbarrier {index} is of no channel")


@dataclass
class Record:
    """What was heard: for each block, in the order of the launch, the steps of each role."""

    kernel: Kernel
    _blocks: dict[object, dict[str, list[Told]]] = field(default_factory=dict)
    _operands: dict[tuple, list] = field(default_factory=dict)

    @property
    def blocks(self) -> list[dict[str, list[Told]]]:
        """Role -> steps, of each block."""
        return list(self._blocks.values())

    def note(self, *told) -> None:
        """The running thread's role takes a step, if it has one."""
        thread = current_thread()
        role = self.role()
        if role is not None:
            steps = self._blocks.setdefault(thread.block, {})
            steps.setdefault(role, []).append(told)

    def speaks(self) -> bool:
        """Whether the running thread is the one that speaks for its role."""
        return current_thread().lane == 0 or self.role() in ("producer", "adder")

    def operands(self) -> list[tuple[str, int]]:
        """Of the products that the running warp has issued since it committed some."""
        thread = current_thread()
        return self._operands.setdefault((thread.block, thread.warp), [])

    def role(self) -> str | None:
        """That of the running thread; None where nobody listens to it."""
        thread = current_thread()
        heard = thread.block.kernel.__name__ == self.kernel.name
        return self.kernel.roles.get(thread.warp) if heard else None


def record(monkeypatch, kernel: Kernel) -> Record:
    """Listen to a kernel of warpgroups; the record fills while it runs."""
    heard = Record(kernel)

    def hear(owner, name: str, before=None, after=None) -> None:
        """Let `before` and `after` hear the arguments of each call of a function."""
        function = getattr(owner, name)

        def listening(*args, **more):
            if before is not None:
                before(*args, **more)
            result = function(*args, **more)
            if after is not None:
                after(*args, **more)
            return result

        monkeypatch.setattr(owner, name, listening)

    def arrives(barriers, array, index, n_bytes=0):
        if heard.speaks() and heard.role():
            heard.note(*kernel.verb(int(index), True, int(n_bytes)))

    def has_waited(copies, barriers, index, parity):
        if heard.speaks() and heard.role():
            heard.note(*kernel.verb(int(index), False, 0))

    def names(descriptors):
        heard.operands().append(kernel.memory.place((int(descriptors[0]) & 0x3FFF) << 4))

    def commits():
        heard.note("begin", *dict.fromkeys(heard.operands()))
        heard.operands().clear()

    def meets(thread, barrier, count, wait=True):
        if thread.lane == 0 and barrier in kernel.barriers:
            heard.note("sync" if wait else "arrive", kernel.barriers[barrier])

    hear(Mbarriers, "arrive", before=arrives)
    hear(BulkCopies, "wait", after=has_waited)
    hear(warpgroup, "shared_a", before=lambda descriptors, *_: names(descriptors))
    hear(warpgroup, "register_a", before=lambda *_: heard.operands().append(("registers", 0)))
    hear(warpgroup, "multiply", before=lambda acc, a, descriptors, *_: names(descriptors))
    hear(warpgroup, "commit", before=commits)
    hear(warpgroup, "wait", after=lambda acc, pending: heard.note("until", pending))
    hear(Thread, "sync_named", before=meets)
    return heard


_VERBS = {
    Claim: "claim",
    Fetch: "fetch",
    Fill: "fill",
    Wait: "wait",
    Release: "release",
    Until: "until",
    Sync: "sync",
    Arrive: "arrive",
}


def difference(heard: Record, programs: list[Program]) -> str | None:
    """Where the kernel's blocks first differ from their programs; None if nowhere."""
    if len(heard.blocks) != len(programs):
        return f"{len(heard.blocks)} blocks instead of {len(programs)}"
    for block, (steps, program) in enumerate(zip(heard.blocks, programs, strict=True)):
        for role in [*program.roles, *(steps.keys() - program.roles.keys())]:
            mine = list(_told(program.roles[role]())) if role in program.roles else []
            pairs = zip_longest(steps.get(role, ()), mine)
            for number, (one, other) in enumerate(pairs):
                if one != other:
                    where = f"block {block}, {role}, step {number}"
                    return f"{where}: the kernel has {one}, its program {other}"
    return None


def _told(steps: Iterator) -> Iterator[Told]:
    for step in steps:
        if isinstance(step, Begin):
            yield "begin", *step.operands
        elif not isinstance(step, Work | Send):
            yield _VERBS[type(step)], *step[:2]
