"""A block of an executed kernel: its warps, its memory, and the order of its warps.

The order is random and a seed repeats it, as in `numflash.simulator`: in some blocks warps go
side by side, in others one runs far ahead; in some one falls behind all others. Parts of the
simulator's blocks (copies, mbarriers, products) find here what they ask of a block.
"""

import random
import re
from collections.abc import Iterator

import numpy as np

from numflash.executor.memory import Memory, Region
from numflash.executor.program import Program
from numflash.executor.together import NamedBarrier
from numflash.executor.warps import Warp
from numflash.simulator import engine
from numflash.simulator.errors import DeadlockError
from numflash.simulator.parts import Part

# Pieces that a warp executes before another may: a block has one of them.
_TURNS = (1, 16, 1024)
# The probability that a block has a warp that runs only when no other can.
_LAGGARDS = 0.5
# Pieces after which a warp that makes nothing happen may be one that waits for the laggard.
_SPINS = 4096
# The share of `try_wait`s that give up although they could wait.
_FAILS = 1 / 32
# A block in which nothing happens is asked again so often, with `try_wait` giving up.
_PATIENCE = 8
_SHARED_START = 1024


class Block:
    """One block of a launch.

    Attributes:
        number, position, grid, extents: its place, how many there are, and its threads; x, y, z.
        writes, patience: the launch's.
        size: threads.
        parts, shared, random, seed, elected_lane, blocks_per_sm, blockIdx: as those of
            `simulator.engine.Block`.
        tensor_maps: by their address.
        counts: executions of each piece by warps, where a profile is wanted.
        max_steps: pieces that a warp may execute while nothing happens in the block.
    """

    def __init__(self, launch, number: int, position: tuple[int, int, int]):
        program: Program = launch.program
        self.number, self.writes, self.patience = number, launch.writes, launch.patience
        self.program, self.position, self.blockIdx = program, position, position
        self.grid, self.extents, self.size = launch.grid, launch.block, launch.num_threads
        self.blocks_per_sm, self.seed = launch.blocks_per_sm, launch.seed
        self.counts, self.traffic = launch.counts, launch.traffic
        self.max_steps = launch.max_steps
        self.random = random.Random(f"{self.seed} {position}").random
        self.elected_lane = random.Random(f"lane {self.seed}").randrange(32)
        self.shared = program.shared_memory()
        self.words, self.mbarriers = self.shared_as(np.uint32), self.shared_as(np.uint64)
        visible = self.shared.bytes[_SHARED_START : program.shared_end]
        self.memory = Memory(
            launch.regions,
            Region("shared memory", _SHARED_START, visible),
            Region("the parameters", 0, launch.parameters, writeable=False),
            launch.constants,
        )
        self.tensor_maps = launch.tensor_maps
        self.parts: dict[type, Part] = {}
        self.barriers: dict[int, NamedBarrier] = {}
        self.cluster_barrier, self.cluster_arrivals = NamedBarrier(), {}
        self.events, self.fences, self._may_fail = 0, 0, False
        self.warps = [Warp(self, i, program) for i in range(-(-self.size // 32))]
        self.threads = [thread for warp in self.warps for thread in warp.threads]
        self.turn = _TURNS[int(self.random() * len(_TURNS))]
        fate = random.Random(f"laggard {self.seed} {position}")
        has_laggard = fate.random() < _LAGGARDS
        self.laggard = self.warps[fate.randrange(len(self.warps))] if has_laggard else None

    @property
    def live_threads(self) -> int:
        """Threads of warps that have not returned, whole warps."""
        return 32 * sum(bool(warp.groups) for warp in self.warps)

    def shared_as(self, type_) -> np.ndarray:
        """All of shared memory as elements of a type."""
        return self.shared.bytes.view(type_)

    def mbarrier_index(self, address: int) -> int:
        """The element of `mbarriers` at an address. Raises ValueError."""
        if address % 8 or not 0 <= address < self.shared.bytes.size:
            raise ValueError(f"there can be no mbarrier at shared address {address:#x}")
        return address // 8

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
        """Let waiting warps look again."""
        self.events += 1

    def may_fail(self) -> bool:
        """Whether a `try_wait` that could wait gives up instead."""
        if self._may_fail:
            self._may_fail = False
            return True
        return self.random() < _FAILS

    def run(self) -> Iterator[bool | None]:
        """Run every warp to its end, and after each turn of one say what it did.

        True for one that only looked at memory, None for one that could not go on.

        Raises:
            DeadlockError: warps wait and none can run; or one goes on and on, and nothing happens.
            SimulationError: what the hardware leaves undefined.
            IndexError, ValueError: an address outside every array, or a misaligned one.
        """
        outer = engine._running
        try:
            yield from self._run_warps()
            for part in self.parts.values():
                part.finish()
        except DeadlockError:
            raise
        except Exception as error:
            self._say_where(error)
            raise
        finally:
            engine.become(outer)

    def _run_warps(self) -> Iterator[bool | None]:
        waiting: set[Warp] = set()
        most = min(_SPINS, self.max_steps // 2)
        seen, patience, looks = self.events, _PATIENCE, False
        while live := [warp for warp in self.warps if warp.groups]:
            ready = [warp for warp in live if warp not in waiting]
            if ready:
                # Who looks at memory must not hold up the warp that falls behind.
                relents = looks and self.random() < engine.RELENTING
                late = None if relents else self.laggard
                others = [w for w in ready if w is not late and w.steps <= most]
                others = others or ready
                warp = others[int(self.random() * len(others))]
                done = warp.run(self.turn)
                looks = warp.looked
                if not done:
                    waiting.add(warp)
                if self.events != seen:
                    waiting.clear()
                    seen, patience = self.events, _PATIENCE
                    for each in live:
                        each.steps = 0
                elif looks:
                    # Copies arrive, too, where no warp does anything else.
                    if all(w.looked or w in waiting for w in live) and self._advance():
                        waiting.clear()
                else:
                    warp.steps += done
                    if warp.steps > self.max_steps:
                        raise DeadlockError(self._who_spins(warp))
                yield looks if done else None
                continue
            waiting.clear()
            if self._advance():
                continue
            if not patience:
                raise DeadlockError(self.who_waits_where())
            patience -= 1
            self._may_fail = True

    def _advance(self) -> bool:
        """Let a part make progress that no warp makes; whether there was any."""
        return any(part.advance() for part in list(self.parts.values()))

    def _say_where(self, error: Exception) -> None:
        """Put the statement that failed before an error's message, block and seed behind it."""
        statement, trace = None, error.__traceback__
        while trace is not None:
            code = trace.tb_frame.f_code
            statement = self.program.statement_at(code.co_filename, trace.tb_lineno) or statement
            trace = trace.tb_next
        if statement is not None:
            message = error.args[0] if error.args else type(error).__name__
            error.args = (f"{statement}: {message}",)
        error.add_note(f"in block {self.position}; {self._replay()}")

    def _replay(self) -> str:
        return f"seed {self.seed} (NUMFLASH_SIM_SEED={self.seed} repeats this order)"

    def _who_spins(self, warp: Warp) -> str:
        return (
            f"warp {warp.number} has executed {warp.steps} pieces of the program while nothing "
            "happened in its block: no barrier, no copy, no atomic operation that changed memory. "
            "A loop waits for what never comes, perhaps from a later block (blocks run one after "
            "the other, unless they acquire and release); one that only takes its time needs a "
            "larger max_steps\n"
            f"{self.who_waits_where()}"
        )

    def who_waits_where(self) -> str:
        """The message of a deadlock."""
        lines = [f"deadlock in block {self.position}; {self._replay()}"]
        for warp in self.warps:
            for group in warp.groups:
                statement = self.program.pieces[group.piece][0]
                who = _ranges(32 * warp.number + np.flatnonzero(group.mask))
                lines.append(f"  threads {who} at {statement}")
                if group.waits_for:
                    lines.append(f"    wait for {group.waits_for}")
        for part in self.parts.values():
            lines += part.report()
        return "\n".join(lines)


def _ranges(numbers) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    text = ", ".join(str(n) for n in numbers)
    if len(numbers) > 1 and numbers[-1] - numbers[0] + 1 == len(numbers):
        return f"{numbers[0]}-{numbers[-1]}"
    return re.sub(r"\s+", " ", text)
