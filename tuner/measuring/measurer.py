"""Measuring configs on a GPU, in a child process that may hang or crash.

The child (`worker`) checks a config before its time counts. The limits here are those of the
watchdog: exceeding one costs the config a record, and the child its life. Processes that share
a GPU measure one at a time, under a lock in the cache directory.
"""

import logging
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numflash.problem.classes import ProblemClass
from numflash.selection.entries import DeviceKey

from ..records import Record
from .child import Child, DeviceUnavailableError, FailedError
from .clocks import ClockLog
from .device_lock import device_lock

_log = logging.getLogger("numflash")


class Measurer(Protocol):
    """A source of times for the search."""

    def measure(
        self, problem: ProblemClass, config: str, stop: Callable[[list[float]], bool]
    ) -> Record:
        """Check and time a config.

        Args:
            problem: the class it is tuned for.
            config: its string form.
            stop: told the samples so far, in milliseconds; True gives the config up as "slow".

        Returns:
            Its record, "measured", "slow" or the failure; a config's errors are never raised.
        """

    def remeasure(
        self, problem: ProblemClass, configs: list[str], rounds: int
    ) -> dict[str, list[float]]:
        """Time configs in turn: in every round each one once, in random order.

        Returns:
            Config -> milliseconds, one for each round; none of a config that failed.
        """


# Where a child finds this package, under whichever name, although nothing may be installed.
_BESIDE = str(Path(__file__).parents[2])


@dataclass(frozen=True)
class Limits:
    """Limits of a child's time, and the number of measurements.

    A call is chosen such that a good kernel takes no more than a few seconds (`worker`), and these
    leave room for one that is several times slower: a kernel beyond them hangs, or has lost
    anyway. Only where a single group of heads takes longer, as of 64 heads of 131072 tokens in
    float32, may every config of a class be a "timeout". Of launches that take more than budget_ms
    / min_repeats there are min_repeats samples.

    Attributes:
        start_s: until a child is ready.
        prepare_s: to compile, check and warm up a config.
        sample_s: for one sample.
        min_repeats, max_repeats: samples of a config.
        budget_ms: of kernel time for the samples of a config, which chooses their number.
    """

    start_s: float = 120.0
    prepare_s: float = 180.0
    sample_s: float = 30.0
    min_repeats: int = 5
    max_repeats: int = 25
    budget_ms: float = 500.0

    def repeats(self, warm_ms: float) -> int:
        """Samples of a config whose warm-up took `warm_ms`."""
        fits = self.budget_ms / max(warm_ms, 1e-3)
        return int(min(max(fits, self.min_repeats), self.max_repeats))


class DeviceMeasurer:
    """Measures on a GPU of this machine. A `Measurer`, and a context manager.

    The child is started when it is first needed, and replaced when it has died.
    """

    def __init__(
        self,
        ordinal: int = 0,
        *,
        expected: DeviceKey | None = None,
        limits: Limits | None = None,
        command: list[str] | None = None,
        seed: int = 0,
    ):
        """Nothing is started yet.

        Args:
            ordinal: of the CUDA device.
            expected: the device that it must be, since a child reads CUDA_VISIBLE_DEVICES again;
                None takes any.
            limits: of the watchdog.
            command: that runs a child; `tuner/measuring/worker.py` by default.
            seed: of the order in which `remeasure` goes.
        """
        self.limits = limits or Limits()
        self._expected = expected
        # Without -P a file of the working folder could pass for a module that the child imports.
        self._command = command or [
            sys.executable,
            "-P",
            "-m",
            f"{__package__}.worker",
            str(ordinal),
        ]
        self._order = random.Random(seed)
        self._child: Child | None = None
        self._clocks: ClockLog | None = None
        self._batch_heads: dict[ProblemClass, int] = {}

    def __enter__(self) -> "DeviceMeasurer":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """End the child, if there is one."""
        child, self._child = self._child, None
        clocks, self._clocks = self._clocks, None
        if child is not None:
            child.close()
        if clocks is not None:
            clocks.close()

    def device(self) -> dict[str, Any]:
        """`name`, `arch`, `num_sms` and `bus` of the GPU. Raises DeviceUnavailableError."""
        return dict(self._started().device)

    def measure(self, problem, config, stop) -> Record:
        """As `Measurer.measure`. Raises DeviceUnavailableError."""
        samples: list[float] = []
        clock = None
        with self._locked():
            begun = time.monotonic()
            outcome, reason = "measured", ""
            try:
                self._drop()
                warm_ms = self._prepare(problem, config)
                timed = time.monotonic()
                repeats = self.limits.repeats(warm_ms)
                while len(samples) < repeats:
                    samples.append(self._sample(config))
                    if len(samples) < repeats and stop(list(samples)):
                        outcome = "slow"
                        reason = f"stopped after {len(samples)} of {repeats} repeats"
                        break
                reading = self._clocks.between(timed, time.monotonic())
                clock = reading and reading.sm_clock_mhz
                reason = "; ".join(filter(None, [reason, self._note(problem)]))
            except FailedError as error:
                outcome, reason = error.outcome, error.reason
            seconds = time.monotonic() - begun
        return Record(
            config,
            outcome,
            reason,
            samples_ms=tuple(samples),
            batch_heads=self._batch_heads.get(problem),
            clock_mhz=clock,
            seconds=seconds,
            finished=time.time(),
        )

    def remeasure(self, problem, configs, rounds) -> dict[str, list[float]]:
        """As `Measurer.remeasure`. Raises DeviceUnavailableError."""
        samples: dict[str, list[float]] = {config: [] for config in configs}
        with self._locked():
            self._drop()
            alive = self._prepare_all(problem, list(samples))
            for _ in range(rounds):
                for config in self._order.sample(alive, len(alive)):
                    if config not in alive:
                        continue
                    try:
                        samples[config].append(self._sample(config))
                    except FailedError as error:
                        _log.warning("%s failed when measured again: %s", config, error)
                        alive.remove(config)
                        if not self._child.is_alive:
                            alive = self._prepare_all(problem, alive)
        return {config: times if config in alive else [] for config, times in samples.items()}

    def _prepare_all(self, problem: ProblemClass, configs: list[str]) -> list[str]:
        """Prepare configs next to each other in one child; returns those that succeeded."""
        ready, waiting = [], list(configs)
        while ready or waiting:
            if not self._child.is_alive:
                self._started()
                ready, waiting = [], ready + waiting
            if not waiting:
                break
            config = waiting.pop(0)
            try:
                self._prepare(problem, config)
                ready.append(config)
            except FailedError as error:
                _log.warning("%s failed when measured again: %s", config, error)
        return ready

    def _drop(self) -> None:
        """Let the child forget the kernels it has prepared, or replace it."""
        try:
            self._child.ask(self.limits.sample_s, do="drop")
        except FailedError:
            self._started()

    def _prepare(self, problem: ProblemClass, config: str) -> float:
        """Milliseconds of a warm-up. Raises FailedError."""
        reply = self._child.ask(
            self.limits.prepare_s, do="prepare", problem=str(problem), config=config
        )
        self._batch_heads[problem] = reply["batch_heads"]
        return reply["warm_ms"]

    def _sample(self, config: str) -> float:
        """Milliseconds of one launch. Raises FailedError."""
        return self._child.ask(self.limits.sample_s, do="time", config=config)["ms"]

    def _note(self, problem: ProblemClass) -> str:
        batch_heads = self._batch_heads[problem]
        if batch_heads == problem.batch_heads:
            return ""
        return f"batch x heads was {batch_heads}, by memory and time"

    def _started(self) -> Child:
        if self._child is None or not self._child.is_alive:
            self.close()
            environment = {**os.environ, "NUMFLASH_TUNED": "0"}
            for name in ("NUMFLASH_AUTOTUNE", "NUMFLASH_CAPTURE"):
                environment.pop(name, None)
            folders = environment.get("PYTHONPATH"), _BESIDE
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
            child = Child(self._command, environment, self.limits.start_s)
            if self._expected is not None:
                found = DeviceKey(*(child.device[name] for name in ("name", "arch", "num_sms")))
                if found != self._expected:
                    child.close()
                    raise DeviceUnavailableError(
                        f"the child that measures has {found}, not {self._expected}; has "
                        "CUDA_VISIBLE_DEVICES changed since this process began to use CUDA?"
                    )
            self._child = child
            self._clocks = ClockLog(str(child.device["bus"]))
        return self._child

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """A child is running, and no other process measures on its device."""
        device = self._started().device
        with device_lock(f"{socket.gethostname()}-{device['bus']}"):
            self._started()
            yield


__all__ = ["DeviceMeasurer", "DeviceUnavailableError", "Limits", "Measurer"]
