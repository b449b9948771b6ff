"""A cluster: blocks that run together, and the order of all their warps.

The order is random and a seed repeats it, as in `numflash.simulator`: in some clusters warps go
side by side, in others one runs far ahead; in some one falls behind all others, or all of one
block. A kernel that says nothing of clusters has clusters of one block.
"""

import random
from collections.abc import Iterator

from numflash.executor.block import Block
from numflash.executor.warps import Warp
from numflash.simulator import clusters, engine
from numflash.simulator.errors import DeadlockError

# Pieces that a warp executes before another may: a cluster has one of them.
_TURNS = (1, 16, 1024)
# The probability that a cluster has a warp that runs only when no other can, and the share of
# those, where there are several blocks, in which all warps of its block do.
_LAGGARDS, _LATE_BLOCKS = 0.5, 0.5
# Pieces after which a warp that makes nothing happen may be one that waits for the laggard.
_SPINS = 4096
# A cluster in which nothing happens is asked again so often, with `try_wait` giving up.
_PATIENCE = 8


class Cluster:
    """One cluster of a launch.

    Args:
        launch: that it is of.
        number: its place in the order of clusters.
        positions: of its blocks, by rank.

    Attributes:
        blocks: by rank.
        meetings, arrivals: of `barrier.cluster`: how many there have been, and by warp how many
            there were when it arrived, until it has waited.
        events: counts what happens; waiting warps may have waited for it.
    """

    def __init__(self, launch, number: int, positions: list[tuple[int, int, int]]):
        self.number, self.program, self.seed = number, launch.program, launch.seed
        self.max_steps = launch.max_steps
        self.events, self._may_fail = 0, False
        self.meetings, self.arrivals = 0, {}
        self.blocks = [
            Block(launch, self, rank, position) for rank, position in enumerate(positions)
        ]
        clusters.Cluster(self.blocks)  # as the simulator's parts know it
        self.warps = [warp for block in self.blocks for warp in block.warps]
        self._block = first = self.blocks[0]  # that runs, or was the last to
        self.random = first.random
        self.turn = _TURNS[int(self.random() * len(_TURNS))]
        fate = random.Random(f"laggard {self.seed} {first.position}")
        self.laggards = ()
        if fate.random() < _LAGGARDS:
            late = self.warps[fate.randrange(len(self.warps))]
            whole = len(self.blocks) > 1 and fate.random() < _LATE_BLOCKS
            self.laggards = tuple(late.block.warps) if whole else (late,)

    def something_happened(self) -> None:
        """Let waiting warps look again."""
        self.events += 1

    def who_has_not_come(self) -> list[Warp]:
        """The warps that the barrier waits for: those that have returned are none of them."""
        live = (warp for warp in self.warps if warp.groups)
        return [warp for warp in live if self.arrivals.get(warp) != self.meetings]

    def has_met(self, number: int) -> bool:
        """Whether all have come to the meeting of this number.

        Blocks see then what the others have done to global memory.
        """
        if number == self.meetings and not self.who_has_not_come():
            self.meetings += 1
            self.something_happened()
            if writes := self.blocks[0].writes:
                writes.meet([block.number for block in self.blocks])
        return number < self.meetings

    def may_fail(self) -> bool:
        """Whether a `try_wait` must give up, so that its loop looks again; once."""
        may_fail, self._may_fail = self._may_fail, False
        return may_fail

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
                # Who looks at memory must not hold up the warps that fall behind.
                relents = looks and self.random() < engine.RELENTING
                late = () if relents else self.laggards
                others = [w for w in ready if w not in late and w.steps <= most]
                others = others or ready
                warp = others[int(self.random() * len(others))]
                done = self._run(warp)
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

    def _run(self, warp: Warp) -> int:
        """A turn of a warp, and the end of its block where that was the last: pieces executed."""
        self._block = block = warp.block
        block.has_begun = True
        done = warp.run(self.turn)
        if not warp.groups and not any(each.groups for each in block.warps):
            block.finish()
        return done

    def _advance(self) -> bool:
        """Let a part of a block make progress that no warp makes; whether there was any."""
        blocks = self.blocks
        if len(blocks) > 1:
            blocks = sorted(blocks, key=lambda block: self.random())
        for block in blocks:
            if not block.has_ended:
                self._block = block
                if any(part.advance() for part in list(block.parts.values())):
                    return True
        return False

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
        error.add_note(f"in block {self._block.position}; {self._replay()}")

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
        lines = []
        for block in self.blocks:
            if not block.has_ended:
                lines.append(f"deadlock in block {block.position}; {self._replay()}")
                lines += block.who_waits()
        return "\n".join(lines)
