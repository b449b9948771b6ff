"""The steps of a kernel whose warps all do the same, to be compared with its program.

`record_block` listens to the first warp of each block: to its copies and their groups, to barriers
of the block, and to what it reads and writes in shared memory. `difference` goes through a
program with it. A product is told by the tiles that it reads.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numflash_tuner.pipeline.steps import (
    Arrived,
    Commit,
    Copy,
    Load,
    Multiply,
    Program,
    Step,
    Sync,
    Work,
)

from numflash.simulator.async_copies import AsyncCopies
from numflash.simulator.engine import Thread, current_thread
from numflash.simulator.memory import SharedMemory
from tests.support.program_order import FIRST_BYTE, Memory


@dataclass
class BlockRecord:
    """What was heard of each block: (verb, what it is about) one after another.

    Attributes:
        name: of the kernel's function.
        memory: its shared memory.
    """

    name: str
    memory: Memory
    _blocks: dict[object, list[tuple]] = field(default_factory=dict)

    @property
    def blocks(self) -> list[list[tuple]]:
        """By block."""
        return list(self._blocks.values())

    def note(self, *told) -> None:
        """The running thread does something; again and again is once."""
        block = current_thread().block
        if block.kernel.__name__ == self.name:
            heard = self._blocks.setdefault(block, [])
            if not heard or heard[-1] != told or told[0] in ("commit", "arrived", "sync"):
                heard.append(told)

    def is_first(self) -> bool:
        """Whether the running thread is the block's first."""
        return current_thread().index == 0


class _Heard(np.ndarray):
    """Shared memory that tells a record what the first thread of a block touches."""

    record: BlockRecord

    def __getitem__(self, key):
        self._tell(key)
        return np.asarray(self)[key]

    def __setitem__(self, key, value):
        self._tell(key)
        np.asarray(self)[key] = value

    def _tell(self, key):
        # Instructions of a warp give the places of all lanes: they are heard by themselves.
        if not isinstance(key, np.ndarray) and self.record.is_first():
            first = key.start if isinstance(key, slice) else key
            place = self.record.memory.place(FIRST_BYTE + int(first) * self.itemsize)
            self.record.note("touch", place, "by a lane")


def record_block(monkeypatch, name: str, memory: Memory, by_lanes: bool) -> BlockRecord:
    """Listen to a kernel; the record fills while it runs.

    Args:
        monkeypatch: what ends it.
        name: of the kernel's function.
        memory: its shared memory.
        by_lanes: whether lanes touch shared memory by themselves, not by `cp.async` and
            `ldmatrix` only. Whether they read or write is not told then.
    """
    heard = BlockRecord(name, memory)
    issue, commit, wait = AsyncCopies.issue, AsyncCopies.commit, AsyncCopies.wait
    sync_block, collective, array = Thread.sync_block, Thread.collective, SharedMemory.array

    def heard_issue(self, array, offset, *more):
        if heard.is_first():
            heard.note("copy", memory.place(self.block.shared.address(array, offset)))
        issue(self, array, offset, *more)

    def heard_commit(self):
        if heard.is_first():
            heard.note("commit")
        commit(self)

    def heard_wait(self, pending):
        if heard.is_first():
            heard.note("arrived", pending)
        wait(self, pending)

    def heard_sync(self, *args):
        if self.index == 0:
            heard.note("sync", "block")
        return sync_block(self, *args)

    def heard_collective(self, name, size, payload, together):
        if self.index == 0 and name.startswith("ldmatrix"):
            _, source, offset = payload
            heard.note("read", memory.place(self.block.shared.address(source, offset)), name)
        return collective(self, name, size, payload, together)

    def heard_array(self, shape, dtype, alignment=None, *, site):
        found = array(self, shape, dtype, alignment, site=site)
        if shape == 0 and not isinstance(found, _Heard):
            found = self._typed[found.dtype] = found.view(_Heard)
            found.record = heard
        return found

    monkeypatch.setattr(AsyncCopies, "issue", heard_issue)
    monkeypatch.setattr(AsyncCopies, "commit", heard_commit)
    monkeypatch.setattr(AsyncCopies, "wait", heard_wait)
    monkeypatch.setattr(Thread, "sync_block", heard_sync)
    monkeypatch.setattr(Thread, "collective", heard_collective)
    if by_lanes:
        monkeypatch.setattr(SharedMemory, "array", heard_array)
    return heard


def difference(program: Program, role: str, heard: list[tuple]) -> str | None:
    """The first step that was not heard, or what was heard behind the last; None if all is alike.

    Args:
        program: of the block.
        role: of all its warps.
        heard: what was; of tiles that the program does not name nothing counts.
    """
    steps = [step for step in program.roles[role]() if not isinstance(step, Work)]
    read = {name for step in steps if isinstance(step, Multiply) for name, _ in step.operands}
    named = read | set(program.buffers)
    left = [x for x in heard if x[0] not in ("copy", "touch") or x[1][0] in named]
    for number, step in enumerate(steps):
        count = _count(step, left)
        if count == 0:
            return f"step {number}, {step}, is not heard, but {left[:6]}"
        left = left[count:]
    return f"behind the last step is heard {left[:6]}" if left else None


def _count(step: Step, heard: list[tuple]) -> int:
    """How much of what is heard belongs to a step."""
    if isinstance(step, Copy | Load):
        verb = "copy" if isinstance(step, Copy) else "touch"
        return _leading(heard, lambda x: x[:2] == (verb, (step.name, step.buffer)))
    if isinstance(step, Multiply):
        return _count_reads(step, heard)
    told = {Commit: ("commit",), Arrived: ("arrived", *step), Sync: ("sync", *step)}[type(step)]
    return int(heard[:1] == [told])


def _count_reads(step: Multiply, heard: list[tuple]) -> int:
    operands = {operand for operand in step.operands if operand[0] != "registers"}
    mode = heard[0][-1] if heard else None
    count = _leading(
        heard, lambda x: x[0] in ("read", "touch") and x[1] in operands and x[-1] == mode
    )
    return count if {x[1] for x in heard[:count]} == operands else 0


def _leading(heard: list[tuple], belongs: Callable[[tuple], bool]) -> int:
    return next((i for i, x in enumerate(heard) if not belongs(x)), len(heard))
