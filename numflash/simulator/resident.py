"""Blocks of a grid that run together, as on a GPU: so many are resident, and others wait.

Which block goes on is random and a seed repeats it, as for the threads of a block: in some
launches blocks go side by side, in others one runs far ahead; in some one falls behind all
others. When a block ends the next one begins, in the order of blockIdx.

Most kernels have nothing to do with that, and their blocks run one after the other. Those that say
something to each other (`numflash.ptx.between_blocks`) run with as many resident blocks as the
seed draws; `NUMFLASH_SIM_BLOCKS` is a number for all kernels. The blocks of a cluster begin
together. Where no thread of one can go on, others of its cluster do: before its own copies arrive,
after, or at random.
"""

import random
from collections.abc import Callable, Iterator
from contextvars import copy_context
from types import FunctionType, ModuleType
from weakref import WeakKeyDictionary

from greenlet import getcurrent, greenlet

from numflash.runtime.switches import whole_number
from numflash.simulator import engine
from numflash.simulator.clusters import Cluster
from numflash.simulator.engine import RELENTING, Block, Patience
from numflash.simulator.writes import Writes

SWITCH = "NUMFLASH_SIM_BLOCKS"
_DRAWN = (1, 2, 3, 5, 8)
# The share of a block's waits at which another block goes on.
_RESTLESSNESS = (1.0, 1 / 64, 1 / 2048)
# The probability that a launch has a block that runs only when no other does anything.
_LAGGARDS = 0.5
# The probability that copies of a block that waits arrive before others of its cluster go on.
_HASTE = (0.0, 0.5, 1.0)
_TALK = "numflash.ptx.between_blocks"
_SILENT = ("numflash.simulator", "numflash.ptx", "numpy", "numba", "ml_dtypes")
_talking: WeakKeyDictionary[Callable, bool] = WeakKeyDictionary()


def num_resident(talks: bool, num_blocks: int, seed: int) -> int:
    """How many blocks of a launch run together.

    Args:
        talks: whether blocks say something to each other.
        num_blocks: of the grid.
        seed: draws the number.

    Raises:
        ValueError: NUMFLASH_SIM_BLOCKS is no number from 1 on.
    """
    most = whole_number(SWITCH, 1)
    if most is None:
        most = random.Random(f"blocks {seed}").choice(_DRAWN) if talks else 1
    return min(most, num_blocks)


def talks(kernel: Callable) -> bool:
    """Whether a kernel, or a function that it calls, has an instruction between blocks."""
    try:
        return _talking[kernel]
    except KeyError:
        found = _talking[kernel] = _finds_talk(kernel)
    except TypeError:  # no weak references to it
        found = _finds_talk(kernel)
    return found


def _finds_talk(kernel) -> bool:
    seen, left = set(), [kernel]
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, tuple):
            left += each
        elif isinstance(each, FunctionType):
            if each.__module__ == _TALK:
                return True
            # Functions that are made of a program's text belong to no module.
            if not (each.__module__ or "").startswith(_SILENT):
                left += _named_in(each)
    return False


def _named_in(function: FunctionType) -> Iterator:
    """What a function closes over, and what its code names in its module or in others."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    codes = [function.__code__]
    for code in codes:
        codes += [constant for constant in code.co_consts if type(constant) is type(code)]
        for name in code.co_names:
            found = function.__globals__.get(name)
            yield found
            if isinstance(found, ModuleType):
                yield from (getattr(found, each, None) for each in code.co_names)


def who_has_not_begun(positions: list, num_begun: int, most: int) -> list[str]:
    """The line of a deadlock's message about blocks that there was no room for, if any."""
    if num_begun == len(positions):
        return []
    return [
        f"{len(positions) - num_begun} blocks have not begun, the first is "
        f"{positions[num_begun]}: {most} are resident at a time ({SWITCH})"
    ]


class Order:
    """The order in which the resident blocks of a launch go on.

    Args:
        num_blocks, seed: of the launch.
        shares: of the times at which another block may go on; the launch has one of them.

    Attributes:
        laggard: the block that falls behind, by its number; None where none does.
    """

    def __init__(self, num_blocks: int, seed: int, shares: tuple[float, ...]):
        self.random = random.Random(f"order {seed}").random
        self.restlessness = shares[int(self.random() * len(shares))]
        self.laggard = None
        if self.random() < _LAGGARDS:
            self.laggard = int(self.random() * num_blocks)

    def choose(self, blocks: list, relents: bool):
        """One of these blocks; the one that falls behind only now and then, if one `relents`."""
        if len(blocks) > 1 and not (relents and self.random() < RELENTING):
            others = [block for block in blocks if block.number != self.laggard]
            blocks = others or blocks
        return blocks[int(self.random() * len(blocks))]


class Grid:
    """The blocks of a launch in the simulator, so many at a time.

    Args:
        make: makes the block of a number, given this grid.
        positions: of the blocks, in the order in which they begin.
        num_resident: how many run together.
        seed: of their order.
        cluster: blocks of a cluster, which begin together, more than `num_resident` or not.
    """

    def __init__(
        self, make: Callable, positions: list, num_resident: int, seed: int, cluster: int = 1
    ):
        self._make, self._positions, self._cluster = make, positions, cluster
        self._most = max(num_resident, cluster)
        self._begun = 0
        self.order = Order(len(positions), seed, _RESTLESSNESS)
        self.patience = Patience(self._most)
        self.writes = Writes(positions)
        self.resident: list[ResidentBlock] = []
        self._following: ResidentBlock | None = None

    def run(self) -> None:
        """Run all blocks. Raises what `Block.run` does."""
        self._home, outer = getcurrent(), engine._running
        try:
            while self._admit():
                able = [block for block in self.resident if block.is_able]
                block = self._following or self.order.choose(able or self.resident, False)
                self._following = None
                block.go_on()  # until a block has ended, or one is to begin
        finally:
            for block in self.resident:
                block.end()
            engine.become(outer)

    def _admit(self) -> bool:
        """Let blocks begin where there is room; whether any is left."""
        most = min(self._most, len(self.resident) + len(self._positions) - self._begun)
        while len(self.resident) + self._cluster <= most:
            numbers = range(self._begun, self._begun + self._cluster)
            blocks = [self._make(number, self) for number in numbers]
            for block in blocks:
                block.peers = [each for each in blocks if each is not block]
            Cluster(blocks)
            self._begun += self._cluster
            self.resident += blocks
        return bool(self.resident)

    def begin(self, block: "ResidentBlock", args) -> None:
        """What a block's own greenlet does."""
        block.run(*args)
        self.resident.remove(block)
        self.patience.polls = 0

    def give_way(self, blocks: list["ResidentBlock"], polls: bool) -> None:
        """Let one of these blocks go on, from where another one runs."""
        if not polls:
            self.patience.polls = 0
        following = self.order.choose(blocks, polls)
        if following.has_begun:
            following.go_on()
        else:
            # Only the grid's own greenlet begins a block: who begins one lends it its stack.
            self._following = following
            self._home.switch()

    def who_waits_where(self) -> str:
        """The message of a deadlock: all resident blocks, and those that have not begun."""
        parts = [block.who_waits_in_block() for block in self.resident]
        parts += who_has_not_begun(self._positions, self._begun, self._most)
        return "\n".join(parts)


class ResidentBlock(Block):
    """A block that others run together with.

    Attributes:
        number: its place in the order of blockIdx.
        is_idle: whether its threads do nothing but look at memory, or wait.
        peers: the other blocks of its cluster.
    """

    def __init__(self, number: int, grid: Grid, args, *of_block):
        super().__init__(*of_block)
        self.number, self.grid, self.writes = number, grid, grid.writes
        self.patience = grid.patience
        self.has_begun, self.is_idle = False, False
        self.peers: list[ResidentBlock] = []
        # Whether it has found that no thread of it can go on.
        self._waits = False
        self._haste = random.Random(f"haste {self.seed} {number}").choice(_HASTE)
        self._own = self._point = greenlet(lambda: grid.begin(self, args))
        self._own.gr_context = copy_context()

    def go_on(self) -> None:
        """Switch to where the block gave way, or to its beginning."""
        self.has_begun = True
        self._point.switch()

    @property
    def is_able(self) -> bool:
        """Whether it can go on without other blocks, as far as is known."""
        return not self._waits or self.num_ready > 0

    def end(self) -> None:
        """After a failure in another block: unwind its threads."""
        if self._own:
            self._own.throw()

    def park(self) -> None:
        """See `Block.park`; another block may go on before another thread of this one does."""
        if len(self.grid.resident) > 1 and self.grid.order.random() < self.grid.order.restlessness:
            self.is_idle = False
            self._give_way(self._others(), False)
        super().park()

    def step_aside(self, idle: bool) -> bool:
        """Let another thread of this block run first, or another block; whether there is one."""
        self.is_idle = idle
        turn = len(self.grid.resident) > 1 and (idle or self.random() < 0.5)
        # Where all only look at memory, copies that others wait for are to arrive.
        if turn and self._give_way(self._others(idle), True):
            return True
        return super().step_aside(idle)

    def others_only_poll(self, idle: bool) -> bool:
        """See `Block.others_only_poll`; other blocks, too."""
        others = (block for block in self.grid.resident if block is not self)
        return idle and all(block.is_idle for block in others)

    def who_waits_where(self) -> str:
        """The message of a deadlock: of all blocks, where they wait for each other."""
        if self.pollers:
            return self.grid.who_waits_where()
        return "\n".join(block.who_waits_in_block() for block in [self, *self.peers])

    def who_waits_in_block(self) -> str:
        """The part of that message that is about this block."""
        return super().who_waits_where()

    def _others(self, idle: bool = False) -> list["ResidentBlock"]:
        """The other blocks that can go on, or, for one that is `idle`, all others."""
        others = (block for block in self.grid.resident if block is not self)
        return [block for block in others if idle or block.is_able]

    def _someone_can_run(self) -> bool:
        """See `Block`; where no thread can, another block of the cluster may change that."""
        late = self.peers and self.grid.order.random() >= self._haste
        while not self.num_ready and self.live:
            if late and self._let_peers_go_on():
                late = False
            elif not (self.advance() or self._let_peers_go_on()) and not self._advance_peers():
                break
        return self.num_ready > 0

    def _advance_peers(self) -> bool:
        return any(block.advance() for block in self.peers)

    def _let_peers_go_on(self) -> bool:
        """Let another block of the cluster go on; whether one can."""
        able = [block for block in self.peers if block.live and block.is_able]
        self._waits = self.is_idle = True
        gave_way = self._give_way(able, True)
        self._waits = False
        return gave_way

    def _give_way(self, blocks: list["ResidentBlock"], polls: bool) -> bool:
        """Let one of these blocks go on; whether there is one."""
        if not blocks:
            return False
        thread, self._point = engine.current_thread(), getcurrent()
        self.grid.give_way(blocks, polls)
        engine.become(thread)
        return True
