"""A plan of the tuner's run: the work ahead, and about how long it takes.

The time comes from kernels that were compiled here: those of earlier trials, and some of the
defaults, which are compiled in any case.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..records import Record
from ..space.configs import Space
from .pool import CompilePool
from .progress import format_duration


@dataclass(frozen=True)
class Plan:
    """Classes to tune.

    Attributes:
        device: name of the device.
        sizes: trials of each class when it is done.
        done: trials of each class that earlier runs have made.
        compile_ms: to compile a kernel here; None if nothing was compiled yet.
        jobs: kernels that are compiled at once.
        seconds: after which the run ends; None if it ends with its trials.
        measures: whether configs are measured, too.
    """

    device: str
    sizes: Sequence[int]
    done: Sequence[int]
    compile_ms: float | None
    jobs: int
    seconds: float | None
    measures: bool

    @property
    def left(self) -> int:
        """Trials to come."""
        return sum(max(0, size - done) for size, done in zip(self.sizes, self.done, strict=True))

    def __str__(self):
        classes = "1 class" if len(self.sizes) == 1 else f"{len(self.sizes)} classes"
        said = f"{classes} of problems on {self.device}, {_trials(sum(self.sizes))}"
        if len(self.sizes) > 1:
            few, many = min(self.sizes), max(self.sizes)
            said += f", {few} each" if few == many else f", {few} to {many} each"
        if any(self.done):
            said += f"; {self.left:,} are left"
        return f"{said}: {self._time()}"

    def _time(self) -> str:
        if not self.left:
            return "nothing is left to try"
        bounds = []
        if self.compile_ms is not None:
            seconds = self.left * self.compile_ms / 1000 / self.jobs
            bounds.append(
                f"up to about {format_duration(seconds)}, if all are compiled, which takes "
                f"{self.compile_ms / 1000:.1f} s a kernel, {self.jobs} at once"
                f"{'; measuring comes on top' if self.measures else ''}"
            )
        if self.seconds is not None:
            bounds.append(f"{format_duration(self.seconds)} by --time-budget")
        return ", or ".join(bounds) or "how long that takes shows when a kernel is compiled"


def _trials(count: int) -> str:
    return "1 trial" if count == 1 else f"{count:,} trials"


def compile_time(
    spaces: Sequence[Space], earlier: Sequence[Record], pool: CompilePool, jobs: int
) -> float | None:
    """Milliseconds that compiling a kernel takes, on average; None if that cannot be told.

    Args:
        spaces: the defaults of some are compiled for it, about two for each process: nothing is
            said until they are.
        earlier: records of earlier trials; kernels from a cache do not count.
        pool: compiles.
        jobs: its processes.

    Raises:
        NoCompilerError: compiler processes cannot be started.
    """
    some = spaces[:: max(1, len(spaces) // (2 * jobs))]
    futures = {pool.submit(space.default, space.problem.traits) for space in some}
    found = [future.result().resources for future in futures]
    found += [record.resources for record in earlier]
    times = [each.compile_ms for each in found if each is not None and each.compile_ms > 0]
    return statistics.fmean(times) if times else None
