"""The block engine: one CUDA block as greenlets on one OS thread.

A simulated thread runs until it has to wait for others, at a barrier or in a collective warp
instruction; then the engine resumes a ready thread, chosen at random from a seeded generator.
Which warp, and which lane, is first past a barrier therefore varies, as on hardware, and a kernel
that forgot a barrier computes something else. In some blocks warps go side by side, in others one
runs far ahead; in some a warp falls behind all others. The same seed repeats the same order.

Everything that waits is built from `Block.park` and `Block.wake`; `Meeting` is the usual reason
to wait. When no thread can run and some still wait, `DeadlockError` says who waits where.

Numba's own simulator has one OS thread per CUDA thread and no warp instructions.
"""

import random
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass, field

from greenlet import getcurrent

from numflash.simulator.errors import DeadlockError, SimulationError
from numflash.simulator.memory import SharedMemory
from numflash.simulator.parts import Part
from numflash.simulator.seed import SEED
from numflash.simulator.stacks import STACKS
from numflash.simulator.waiting import who_waits

WARP_SIZE = 32
# The share of steps at which the engine turns to another warp: always, so that warps go side by
# side, or so seldom that one runs far ahead of the others, until a barrier stops it. A block has
# one of these shares.
_RESTLESSNESS = (1.0, 1 / 64, 1 / 2048)
# The probability that a block has a warp that runs only when no other can.
_LAGGARDS = 0.5
# So often may threads look at memory, one after the other, while no thread does anything else.
_POLLS = 2048
RELENTING = 1 / 16
"""The probability that what falls behind, a warp or a block, runs while a thread polls."""

_running: "Thread | None" = None


def current_thread() -> "Thread":
    """The simulated thread that is running. Raises RuntimeError outside a kernel."""
    if _running is None:
        raise RuntimeError("this call is only possible inside a simulated kernel")
    return _running


def become(thread) -> None:
    """Make `thread` the running one: for `numflash.executor`, whose threads run no Python."""
    global _running
    _running = thread


def note_store(array, first: int, n_words: int) -> None:
    """The running thread, if any does, has stored words to shared memory."""
    if _running is not None:
        _running.stores.append((array, first, n_words, _running.block.fences))


@dataclass(slots=True)
class Meeting:
    """Threads that wait for each other at one barrier or in one collective instruction."""

    name: str
    expected: int
    together: Callable | None = None
    # (index, thread, payload) of those who came, and who of them waits.
    arrived: list[tuple] = field(default_factory=list)
    waiting: list["Thread"] = field(default_factory=list)


class Patience:
    """Counts looks of threads at memory since anything else happened; `most` are allowed."""

    def __init__(self, num_blocks: int = 1):
        self.polls, self.most = 0, _POLLS * num_blocks


class Thread:
    """One simulated CUDA thread: its place in the block, and how it meets others.

    `greenlet` is what it runs on, None before it has begun and after it has returned.
    """

    __slots__ = (
        "block",
        "index",
        "lane",
        "warp",
        "threadIdx",
        "greenlet",
        "result",
        "stores",
    )

    def __init__(self, block: "Block", index: int, position):
        self.block = block
        self.index = index
        self.lane = index % WARP_SIZE
        self.warp = index // WARP_SIZE
        self.threadIdx = position
        self.greenlet = None
        self.result = None
        # (array, first word, words, fences of the block before) of stores to shared memory since
        # the thread's last fence.
        self.stores: list[tuple] = []

    def sync_block(
        self, name: str = "syncthreads", payload=None, together: Callable | None = None
    ):
        """Wait for every thread of the block that has not returned."""
        block = self.block
        return block.meet(self, ("block", name), name, block.live, payload, together)

    def sync_named(self, barrier: int, count: int, wait: bool = True):
        """`bar.sync barrier, count`, or `bar.arrive` where `wait` is false."""
        if count % WARP_SIZE or not 0 < count <= 1024 or not 0 < barrier < 16:
            raise SimulationError(
                f"named barrier {barrier} with {count} threads: the number must be 1 to 15 (0 is "
                "syncthreads), the count a multiple of 32"
            )
        name = f"named barrier {barrier}"
        self.block.meet(self, ("named", barrier), name, count, None, None, wait)

    def collective(self, name: str, size: int, payload, together: Callable):
        """Do something once for the `size` consecutive threads this one belongs to.

        `together` gets their payloads in thread order and returns one result for each.
        """
        group = self.index // size
        expected = min(size, self.block.size - group * size)
        key = ("collective", name, size, group)
        return self.block.meet(self, key, name, expected, payload, together)

    def warp_collective(self, name: str, mask: int, payload, together: Callable):
        """Do something once for the lanes of this warp that `mask` names."""
        mask &= 0xFFFFFFFF
        if not mask >> self.lane & 1:
            raise SimulationError(f"{name}: lane {self.lane} is not in its own mask {mask:#010x}")
        expected = (mask & self.block.live_lanes[self.warp]).bit_count()
        key = ("warp", name, self.warp, mask)
        return self.block.meet(self, key, name, expected, payload, together)


class Block:
    """One thread block: its threads, its shared memory, and who waits for whom.

    Attributes:
        writes: what blocks have written in this launch, where several run together.
    """

    writes = None

    def __init__(
        self,
        kernel: Callable,
        positions: list,
        block_idx,
        dynamic_smem_bytes: int,
        blocks_per_sm: int = 1,
    ):
        self.kernel = kernel
        self.blocks_per_sm = blocks_per_sm
        self.blockIdx = block_idx
        self.seed = SEED.value
        self.random = random.Random(f"{self.seed} {tuple(block_idx)}").random
        # The lane that elect.sync elects: always the same one.
        self.elected_lane = random.Random(f"lane {self.seed}").randrange(WARP_SIZE)
        self.shared = SharedMemory(dynamic_smem_bytes)
        self.size = self.live = len(positions)
        self.threads = [Thread(self, i, position) for i, position in enumerate(positions)]
        self.live_lanes = [
            (1 << min(WARP_SIZE, self.size - first)) - 1
            for first in range(0, self.size, WARP_SIZE)
        ]
        # The threads that can run, by warp.
        self.ready: list[list[Thread]] = [
            self.threads[first : first + WARP_SIZE] for first in range(0, self.size, WARP_SIZE)
        ]
        self.num_ready = self.size
        self.favourite, self.laggard = 0, None
        fate = random.Random(f"laggard {self.seed} {tuple(block_idx)}")
        if fate.random() < _LAGGARDS:
            self.laggard = self.ready[fate.randrange(len(self.ready))]
        self.restlessness = _RESTLESSNESS[int(self.random() * len(_RESTLESSNESS))]
        self.meetings: dict[tuple, Meeting] = {}
        self.parts: dict[type, Part] = {}
        self._first: Thread | None = None  # to begin before any other goes on
        self.pollers: list[Thread] = []  # look at memory again and again, and are ready
        self.patience = Patience()
        self.fences = 0  # of the asynchronous proxy, of all threads
        self.scheduler = None

    def part(self, kind: type[Part]) -> Part:
        """The block's one `kind`."""
        part = self.parts.get(kind)
        if part is None:
            part = self.parts[kind] = kind(self)
        return part

    def run(self, *args) -> None:
        """Run every thread to its end.

        Raises:
            DeadlockError: threads wait and none can run.
            SimulationError: a kernel ended before work that it had begun.
            Exception: what a thread raised, with a note that names thread, block and seed.
        """
        global _running
        outer, self.scheduler = _running, getcurrent()
        try:
            self._run_ready_threads(args)
            if self.live:
                raise DeadlockError(self.who_waits_where())
            self._finish()
        finally:
            self._end_waiting_threads()
            _running = outer

    def _run_ready_threads(self, args: tuple) -> None:
        global _running
        # NumPy keeps its floating-point error settings in the context: threads have those of the
        # launch.
        context = copy_context()
        try:
            # Threads hand over to each other. Control comes back when one has returned, when one
            # is to begin, and when all that are left wait: for each other, or for a copy.
            while self._someone_can_run():
                _running = thread = self._first or self._pick()
                self._first = None
                if thread.greenlet is None:
                    thread.greenlet = STACKS.take(context)
                    returned = thread.greenlet.switch(self.kernel, args)
                else:
                    returned = thread.greenlet.switch()
                if returned:
                    self._returned(_running)
        except Exception as error:
            error.add_note(
                f"in thread {tuple(_running.threadIdx)} of block {tuple(self.blockIdx)}; "
                f"{self._replay()}"
            )
            raise

    def _finish(self) -> None:
        try:
            for part in self.parts.values():
                part.finish()
        except SimulationError as error:
            error.add_note(self._replay())
            raise

    def _someone_can_run(self) -> bool:
        while not self.num_ready and self.live:
            if not self.advance():
                break
        return self.num_ready > 0

    def advance(self) -> bool:
        """Let a part make progress that no thread makes; whether one did."""
        return any(part.advance() for part in self.parts.values())

    def _pick(self) -> Thread:
        """A random ready thread of the favoured warp."""
        random, ready = self.random, self.ready[self.favourite]
        if not ready or ready is self.laggard or random() < self.restlessness:
            ready = self._warp()
            self.favourite = ready[0].warp
        # As `_take`, which every step would call.
        pick = int(random() * len(ready))
        ready[pick], ready[-1] = ready[-1], ready[pick]
        self.num_ready -= 1
        return ready.pop()

    def _take(self, ready: list[Thread]) -> Thread:
        """A random one of these ready threads, taken out in constant time."""
        pick = int(self.random() * len(ready))
        ready[pick], ready[-1] = ready[-1], ready[pick]
        self.num_ready -= 1
        return ready.pop()

    def _warp(self) -> list[Thread]:
        """The ready threads of a random warp; of the laggard only where there are no others."""
        warps, laggard = self.ready, self.laggard
        if len(warps) == 1:
            return warps[0]
        # Where many are ready one of two guesses is.
        for _ in range(2):
            warp = warps[int(self.random() * len(warps))]
            if warp and warp is not laggard:
                return warp
        warps = [warp for warp in warps if warp and warp is not laggard]
        return warps[int(self.random() * len(warps))] if warps else laggard

    def wake(self, thread: Thread) -> None:
        """Let a parked thread go on, at a time of the engine's choice."""
        self.ready[thread.warp].append(thread)
        self.num_ready += 1

    def park(self) -> None:
        """Suspend the running thread until it has been woken and is chosen."""
        global _running
        if self.num_ready:
            following = self._pick()
            if following.greenlet is not None:
                _running = following
                following.greenlet.switch()
                return
            # Only the scheduler begins a thread: who begins one lends it part of its own stack.
            self.wake(following)
        self.scheduler.switch()

    def poll(self) -> None:
        """Let others run before the running thread looks at memory again.

        Raises DeadlockError where threads have looked often, and none did anything else.
        """
        thread, patience = current_thread(), self.patience
        idle = self.only_polls()
        patience.polls = patience.polls + 1 if idle else 0
        self.pollers.append(thread)
        if patience.polls > patience.most:
            raise DeadlockError(self._who_polls(thread))
        self.step_aside(idle)
        self.pollers.remove(thread)

    def only_polls(self) -> bool:
        """Whether the threads that can run, but for the running one, only look at memory."""
        if self.num_ready > len(self.pollers):
            return False
        return not self.advance()

    def others_only_poll(self, idle: bool) -> bool:
        """Whether all but the running thread do; `idle` is whether they do in this block."""
        return idle

    def step_aside(self, idle: bool) -> bool:
        """Let another thread run first; whether there is one. `idle` is what `only_polls` says."""
        global _running
        if not self.num_ready:
            return False
        # Who polls must not hold up the warp that falls behind: it may be the one that writes.
        relents = self.laggard and self.random() < RELENTING
        following = self._take(self.laggard if relents else self._warp())
        self.wake(_running)
        if following.greenlet is None:
            self._first = following
            self.scheduler.switch()
        else:
            _running = following
            following.greenlet.switch()
        return True

    def meet(self, thread, key, name, expected, payload, together, wait: bool = True):
        """Arrive at the meeting `key`; the last of `expected` threads ends it for all."""
        meeting = self.meetings.get(key)
        if meeting is None:
            meeting = self.meetings[key] = Meeting(name, expected, together)
        elif meeting.expected != expected:
            if key[0] == "named":
                raise SimulationError(
                    f"{name}: one thread counts {meeting.expected} threads, another {expected}"
                )
            meeting.expected = expected
        arrived = meeting.arrived
        arrived.append((thread.index, thread, payload))
        if wait:
            meeting.waiting.append(thread)
        if len(arrived) == expected:
            self._complete(key, meeting)
        if wait:
            self.park()
            return thread.result
        return None

    def _complete(self, key, meeting: Meeting) -> None:
        del self.meetings[key]
        if meeting.together is None:
            for thread in meeting.waiting:
                self.wake(thread)
            return
        meeting.arrived.sort()  # by index, which no two share
        results, ready = meeting.together([each[2] for each in meeting.arrived]), self.ready
        for (_, thread, _), result in zip(meeting.arrived, results, strict=True):
            thread.result = result
            ready[thread.warp].append(thread)
        self.num_ready += len(meeting.arrived)

    def _returned(self, thread: Thread) -> None:
        """A thread returned: barriers of its block and its warp no longer wait for it.

        Named barriers do, and so do collective instructions, which need every thread.
        """
        STACKS.give_back(thread.greenlet)
        thread.greenlet = None
        self.live -= 1
        self.live_lanes[thread.warp] &= ~(1 << thread.lane)
        for key, meeting in list(self.meetings.items()):
            if key[0] == "block":
                meeting.expected = self.live
            elif key[0] == "warp" and key[2] == thread.warp:
                meeting.expected = (key[3] & self.live_lanes[thread.warp]).bit_count()
            else:
                continue
            if len(meeting.arrived) == meeting.expected:
                self._complete(key, meeting)
        for part in self.parts.values():
            part.returned(thread)

    def _end_waiting_threads(self) -> None:
        """After a failure: unwind the threads that wait, so that they close what they opened."""
        global _running
        for warp in self.ready:
            warp.clear()
        self.num_ready = 0
        for thread in self.threads:
            if thread.greenlet:
                _running = thread
                thread.greenlet.throw()

    def _replay(self) -> str:
        return f"simulator seed {self.seed} (NUMFLASH_SIM_SEED={self.seed} repeats this order)"

    def _who_polls(self, thread: Thread) -> str:
        return (
            f"thread {thread.index} looks again and again at what nobody writes: all others do, "
            f"too, or wait, or have returned\n{self.who_waits_where()}"
        )

    def who_waits_where(self) -> str:
        """The message of a deadlock."""
        returned = self.size - self.live
        lines = [
            f"deadlock in block {tuple(self.blockIdx)}: {self.live} of {self.size} threads wait, "
            f"{returned} have returned; {self._replay()}"
        ]
        for meeting in self.meetings.values():
            lines.append(
                f"  {meeting.name}: {len(meeting.arrived)} of {meeting.expected} threads came"
            )
            lines += who_waits(meeting.waiting)
        if self.pollers:
            lines.append("  memory that another thread, or block, is to write")
            lines += who_waits(self.pollers)
        for part in self.parts.values():
            lines += part.report()
        return "\n".join(lines)
