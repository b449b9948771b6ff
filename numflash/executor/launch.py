"""A grid of blocks of an executed kernel: its arguments as bytes, and the order of its blocks."""

import math
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from numflash.executor.cluster import Cluster
from numflash.executor.memory import PARAMETER_WINDOW, array_region
from numflash.executor.program import Program
from numflash.executor.text import Parameter, shortened
from numflash.problem.tensor_maps import MAP_BYTES
from numflash.simulator import engine
from numflash.simulator.engine import Patience
from numflash.simulator.errors import DeadlockError
from numflash.simulator.resident import Order, num_resident, who_has_not_begun
from numflash.simulator.tensor_maps import SimulatedTensorMap
from numflash.simulator.writes import Writes

# The share of warps' turns after which another block goes on.
_RESTLESSNESS = (1.0, 1 / 8, 1 / 64)
# What a cluster that has ended gives.
_ENDED = object()
# Bodies ask for the running thread, which is one of the process.
_one_launch = threading.RLock()
MAX_STEPS = 300_000
"""Pieces of a warp while nothing happens: some ten seconds of a loop that spins."""
# Blocks of a cluster, where the launch allows more than the 8 of every GPU.
_MAX_CLUSTER = 16
_FLOATS = {"f32": np.float32, "f64": np.float64}


class Traffic:
    """Bytes that lanes load from and store to each memory space."""

    def __init__(self):
        self.bytes: Counter[tuple[str, str]] = Counter()

    def loaded(self, space: str, n_bytes: int, mask) -> None:
        """Lanes of a mask, all for None, have loaded n_bytes each."""
        self.bytes["load", space] += n_bytes * (32 if mask is None else int(mask.sum()))

    def stored(self, space: str, n_bytes: int, mask) -> None:
        """Lanes of a mask, all for None, have stored n_bytes each."""
        self.bytes["store", space] += n_bytes * (32 if mask is None else int(mask.sum()))


class Launch:
    """A program with its extents and arguments.

    Args:
        program: that every block executes.
        grid, block: extents, three integers each.
        arguments: one for each parameter: see `numflash.run_ptx`.
        seed: of the order of warps.
        blocks_per_sm: blocks that share the registers of an SM.
        profiled: whether pieces and bytes are counted.
        names: of the arguments, for messages.
        max_steps: pieces of the program that a warp may execute while nothing happens.

    Raises:
        TypeError, ValueError: arguments that are none of the parameters'.
    """

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence,
        seed: int,
        blocks_per_sm: int = 1,
        profiled: bool = False,
        names: Sequence[str] | None = None,
        max_steps: int = MAX_STEPS,
    ):
        self.program, self.grid, self.block = program, grid, block
        self.num_threads = block[0] * block[1] * block[2]
        self.seed, self.blocks_per_sm, self.max_steps = seed, blocks_per_sm, max_steps
        self.counts = [0] * len(program.pieces) if profiled else None
        self.traffic = Traffic() if profiled else None
        self.constants = program.constants()
        self.tensor_maps: dict[int, SimulatedTensorMap] = {}
        self.regions = []
        parameters = program.entry.parameters
        if len(arguments) != len(parameters):
            raise TypeError(
                f"the entry (line {program.entry.line}) has {len(parameters)} parameters, "
                f"{len(arguments)} arguments are given"
            )
        names = names or [f"argument {number}" for number in range(len(arguments))]
        end = max([p.offset + p.n_bytes for p in parameters], default=0)
        self.parameters = np.zeros(-(-end // 16) * 16, np.uint8)
        for name, parameter, argument in zip(names, parameters, arguments, strict=True):
            content = self._content(name, parameter, argument)
            self.parameters[parameter.offset :][: len(content)] = np.frombuffer(content, np.uint8)

    def run(self) -> None:
        """Run all clusters, one after the other or several together: see `simulator.resident`.

        Raises ValueError where the grid has no blocks or no whole clusters, and what `Cluster.run`
        does.
        """
        if 0 in self.grid:
            raise ValueError(
                f"a grid of {self.grid} blocks: the driver refuses a launch without blocks"
            )
        clusters, talks = self._clusters(), self.program.talks
        positions = list(chain.from_iterable(clusters))
        resident = max(1, num_resident(talks, len(positions), self.seed) // len(clusters[0]))
        self.writes = Writes(positions) if talks else None
        self.patience = Patience(resident)
        # Kernels compute with infinities on purpose; NumPy would warn of each.
        with _one_launch, np.errstate(all="ignore"):
            if resident > 1 or talks:
                self._run_together(clusters, resident)
                return
            for number, positions in enumerate(clusters):
                for _ in Cluster(self, number, positions).run():
                    pass

    def _clusters(self) -> list[list[tuple[int, int, int]]]:
        """The positions of each cluster's blocks, by rank. Raises ValueError."""
        extents, line = self.program.entry.cluster, self.program.entry.line
        if not 1 <= math.prod(extents) <= _MAX_CLUSTER:
            raise ValueError(
                f"the entry (line {line}) has clusters of {extents} blocks (.reqnctapercluster); "
                f"there are those of 1 to {_MAX_CLUSTER}"
            )
        if any(n % extent for n, extent in zip(self.grid, extents, strict=True)):
            raise ValueError(
                f"the grid of {self.grid} blocks has no whole clusters: the entry (line {line}) "
                f"wants {extents} blocks in each (.reqnctapercluster)"
            )
        firsts = _positions([range(0, n, m) for n, m in zip(self.grid, extents, strict=True)])
        ranks = _positions([range(extent) for extent in extents])
        return [[tuple(map(sum, zip(first, r, strict=True))) for r in ranks] for first in firsts]

    def _run_together(self, clusters: list, most: int) -> None:
        order, patience, num_begun = (
            Order(len(clusters), self.seed, _RESTLESSNESS),
            self.patience,
            0,
        )
        turns: dict[Cluster, Iterator] = {}  # of those that are resident
        cluster, looked, outer = None, False, engine._running
        try:
            while turns or num_begun < len(clusters):
                while num_begun < len(clusters) and len(turns) < most:
                    begun = Cluster(self, num_begun, clusters[num_begun])
                    turns[begun] = begun.run()
                    num_begun += 1
                if cluster is None or looked or order.random() < order.restlessness:
                    # A loop that looks at memory in another way must not hold up who writes, too.
                    cluster = order.choose(list(turns), True)
                done = next(turns[cluster], _ENDED)
                looked = done is True
                if looked:
                    patience.polls += 1
                    if patience.polls > patience.most:
                        raise DeadlockError(self._who_looks(turns, clusters, num_begun, most))
                elif done is not None:
                    patience.polls = 0
                if done is _ENDED:
                    del turns[cluster]
                    cluster = None
        finally:
            for left in turns.values():
                left.close()
            engine.become(outer)

    @staticmethod
    def _who_looks(resident, clusters: list, num_begun: int, most: int) -> str:
        """The message of a deadlock of blocks that wait for each other."""
        positions, size = list(chain.from_iterable(clusters)), len(clusters[0])
        return "\n".join(
            [
                "threads look again and again at what nobody writes: all others do, too, or wait, "
                "or have returned",
                *(cluster.who_waits_where() for cluster in resident),
                *who_has_not_begun(positions, num_begun * size, most * size),
            ]
        )

    def _content(self, name: str, parameter: Parameter, argument) -> bytes:
        """The bytes of an argument."""
        type_, n_bytes = parameter.type, parameter.n_bytes
        what = (
            f"{name} for {shortened(parameter.name)} (line {parameter.line}), a parameter of "
            f"{n_bytes} bytes (.{type_}),"
        )
        if isinstance(argument, SimulatedTensorMap):
            if n_bytes != MAP_BYTES:
                raise TypeError(f"{what} is a tensor map, which has {MAP_BYTES} bytes")
            self.tensor_maps[PARAMETER_WINDOW + parameter.offset] = argument
            return bytes(n_bytes)
        if isinstance(argument, np.ndarray):
            return self._pointer(name, what, parameter, argument)
        if isinstance(argument, tuple):
            argument = b"".join(self._part(name, what, part) for part in argument)
        if isinstance(argument, bytes | bytearray):
            if len(argument) != n_bytes:
                raise ValueError(f"{what} has {len(argument)} bytes")
            return bytes(argument)
        if argument is None and n_bytes == 8 and type_ not in _FLOATS:
            return bytes(8)
        if type_ in _FLOATS:
            if isinstance(argument, bool) or not isinstance(
                argument, int | float | np.integer | np.floating
            ):
                raise TypeError(f"{what} must be a number, got {type(argument).__name__}")
            return np.array(argument, _FLOATS[type_]).tobytes()
        if isinstance(argument, np.floating) and argument.nbytes == n_bytes:
            return argument.tobytes()
        if isinstance(argument, bool) or not isinstance(argument, int | np.integer):
            raise TypeError(
                f"{what} must be an integer or an array, got {type(argument).__name__}"
            )
        return _integer_bytes(what, n_bytes, int(argument))

    def _pointer(self, name: str, what: str, parameter: Parameter, array: np.ndarray) -> bytes:
        if parameter.n_bytes != 8 or parameter.type in _FLOATS:
            raise TypeError(f"{what} is an array, whose address has 8 bytes")
        return self._address(name, what, array)

    def _part(self, name: str, what: str, part) -> bytes:
        """The bytes of a member of a structure."""
        if isinstance(part, np.ndarray):
            return self._address(name, what, part)
        if isinstance(part, np.generic) and not part.dtype.hasobject:
            return part.tobytes()
        if isinstance(part, bytes | bytearray):
            return bytes(part)
        raise TypeError(
            f"{what} has a member of type {type(part).__name__}; members are arrays, NumPy's "
            "numbers and bytes"
        )

    def _address(self, name: str, what: str, array: np.ndarray) -> bytes:
        if array.dtype.hasobject:
            raise TypeError(f"{what} is an array of Python objects")
        self.regions.append(array_region(name, array))
        return array.__array_interface__["data"][0].to_bytes(8, "little")


def _positions(ranges: Sequence[range]) -> list[tuple[int, int, int]]:
    """All (x, y, z) of three ranges, x running fastest."""
    return [(x, y, z) for z in ranges[2] for y in ranges[1] for x in ranges[0]]


def _integer_bytes(what: str, n_bytes: int, value: int) -> bytes:
    # Compilers declare signed parameters as unsigned: either is taken.
    low, high = -(1 << 8 * n_bytes - 1), (1 << 8 * n_bytes) - 1
    if not low <= value <= high:
        raise ValueError(f"{what} must lie between {low} and {high}, got {value}")
    return (value & high).to_bytes(n_bytes, "little")
