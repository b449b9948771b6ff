"""Exhaustive runs of the tuner, and searches replayed from them. Needs optuna."""

import os
from concurrent.futures import Future
from pathlib import Path

import optuna

from numflash.problem.classes import ProblemClass
from tuner.measuring.measurer import DeviceMeasurer
from tuner.measuring.replay import Recording, Replay, load, save
from tuner.search.pool import CompilePool, Examined
from tuner.search.search import Search, StoppingRules, make_sampler
from tuner.space import machines
from tuner.space.configs import Space
from tuner.space.target import Target


def exhaust(target: Target, problem: ProblemClass, seconds: float, path: Path) -> str:
    """Measure every feasible config of a class, and record it.

    Args:
        target: a GPU of this machine.
        problem: the class.
        seconds: when to stop; what is not measured by then is not in the recording.
        path: of the recording.

    Returns:
        What was done, in words.
    """
    space, jobs = Space(problem, target.machine), os.cpu_count() or 1
    with (
        DeviceMeasurer(target.ordinal, expected=target.key) as measurer,
        CompilePool(target.key.arch, jobs) as pool,
    ):
        search = Search(
            space,
            _study("grid", 0),
            pool,
            _Patient(measurer),
            StoppingRules(seconds=seconds),
            sampler="grid",
            ahead=2 * jobs,
        )
        search.run(lambda record: None, lambda: None)
    records = {record.config: record for record in search.ledger.records()}
    save(path, target.key, problem, records)
    return f"{len(records)} of {len(space.feasible)} configs of {problem} in {path}"


def replay(path: Path, sampler: str, seed: int, part: float) -> float:
    """Search in a recording for a part of its time.

    Returns:
        How much slower the winner is than the best recorded, as a fraction.

    Raises:
        ValueError: the file is no recording, or of a GPU that is not in the table.
    """
    recording = load(path)
    measurer = Replay(recording, seed)
    search = Search(
        Space(recording.problem, machines.find(recording.device["name"])),
        _study(sampler, seed),
        _Compiled(recording),
        measurer,
        StoppingRules(seconds=part * recording.seconds),
        sampler=sampler,
        clock=lambda: measurer.seconds,
    )
    search.run(lambda record: None, lambda: None)
    _, best = search.winner()
    return recording.records[best.config].time_ms / recording.best.time_ms - 1


def _study(sampler: str, seed: int) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=make_sampler(sampler, seed), direction="minimize")


class _Patient:
    """A measurer that measures slow configs to the end: the witness needs all of them."""

    def __init__(self, measurer: DeviceMeasurer):
        self._measurer = measurer

    def measure(self, problem, config, stop):
        """As `Measurer.measure`, without stopping."""
        return self._measurer.measure(problem, config, lambda samples: False)


class _Compiled:
    """Stands in for a `CompilePool`: what was recorded was compiled."""

    def __init__(self, recording: Recording):
        self._recording = recording

    def submit(self, config, traits) -> "Future[Examined]":
        """The future of a config, already done."""
        recorded = self._recording.records.get(str(config))
        if recorded is None or recorded.resources is None:
            examined = Examined(failure=("invalid", "it is not in the recording"))
        elif recorded.samples_ms:
            examined = Examined(recorded.resources)
        else:
            examined = Examined(failure=(recorded.outcome, recorded.reason))
        future: Future = Future()
        future.set_result(examined)
        return future
