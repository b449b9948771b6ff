"""A recorded exhaustive run, and a measurer that answers from it: searching without a GPU.

A recording is a file of JSON: the device, the problem class, the compilers, and the record of
every config of the space. `Replay` draws its times from those recorded, and counts the seconds
that the measurements would have taken.
"""

import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

from numflash.problem.classes import ProblemClass
from numflash.runtime.files import replace_file

from ..records import FAILURES, Record

SCHEMA = 1
"""Version of the file format."""


@dataclass(frozen=True)
class Recording:
    """An exhaustive run.

    Attributes:
        device: the measured one: name, arch, num_sms.
        problem: the class.
        compilers: package -> version.
        records: config -> its record.
    """

    device: dict[str, Any]
    problem: ProblemClass
    compilers: dict[str, str]
    records: dict[str, Record]

    @property
    def best(self) -> Record:
        """The record with the lowest measured time. Raises ValueError if there is none."""
        timed = filter(_has_times, self.records.values())
        best = min(timed, key=lambda record: record.time_ms, default=None)
        if best is None:
            raise ValueError(f"the recording of {self.problem} holds no time")
        return best

    @property
    def seconds(self) -> float:
        """The seconds that all its trials took."""
        return sum(record.seconds for record in self.records.values())


def save(
    path: str | os.PathLike,
    device: Any,
    problem: ProblemClass,
    records: dict[str, Record],
    compilers: dict[str, str] | None = None,
) -> None:
    """Write a recording; the file appears complete or not at all.

    Args:
        path: the file.
        device: a dictionary, or a dataclass such as `numflash.selection.store.DeviceKey`.
        problem: the class.
        records: config -> its record.
        compilers: package -> version; those installed by default.

    Raises:
        OSError: it cannot be written.
        ValueError: a record is another config's.
    """
    if compilers is None:
        from numflash.machine_code.compiler import versions

        compilers = versions()
    for config, record in records.items():
        if record.config != config:
            raise ValueError(f"the record of {config} is one of {record.config}")
    content = {
        "schema": SCHEMA,
        "device": asdict(device) if is_dataclass(device) else dict(device),
        "problem": str(problem),
        "compilers": compilers,
        "records": {config: json.loads(record.to_json()) for config, record in records.items()},
    }
    replace_file(Path(path), json.dumps(content, indent=1) + "\n")


def load(path: str | os.PathLike) -> Recording:
    """Read a recording.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none, or of another version.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"its schema is {content['schema']!r}, this is {SCHEMA}")
        records = {
            config: Record.from_json(json.dumps(record))
            for config, record in content["records"].items()
        }
        wrong = [config for config, record in records.items() if record.config != config]
        if wrong:
            raise ValueError(f"the record of {wrong[0]} is one of {records[wrong[0]].config}")
        problem = ProblemClass.parse(content["problem"])
        return Recording(dict(content["device"]), problem, dict(content["compilers"]), records)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a recording of measurements: {error!r}") from error


class Replay:
    """Answers from a recording. A `measure.Measurer`.

    Attributes:
        recording: with the answers.
        seconds: that the measurements so far would have taken.
    """

    def __init__(self, recording: Recording, seed: int = 0):
        """The same seed gives each config the same samples, in whatever order configs come."""
        self.recording, self.seconds = recording, 0.0
        self._seed = seed
        self._random: dict[str, random.Random] = {}

    def measure(
        self, problem: ProblemClass, config: str, stop: Callable[[list[float]], bool]
    ) -> Record:
        """As `Measurer.measure`; a config that was not recorded is "invalid".

        Raises:
            ValueError: the recording is of another problem class.
        """
        self._expect(problem)
        recorded = self.recording.records.get(config)
        if recorded is None:
            return Record(config, "invalid", "it is not in the recording", finished=time.time())
        if not _has_times(recorded):
            self.seconds += recorded.seconds
            return replace(recorded, finished=time.time())
        samples: list[float] = []
        outcome, reason = "measured", ""
        while len(samples) < len(recorded.samples_ms):
            samples.append(self._draw(recorded))
            if len(samples) < len(recorded.samples_ms) and stop(list(samples)):
                outcome = "slow"
                reason = f"stopped after {len(samples)} of {len(recorded.samples_ms)} repeats"
                break
        seconds = _preparation_seconds(recorded) + sum(samples) / 1000
        self.seconds += seconds
        return replace(
            recorded,
            outcome=outcome,
            reason=reason,
            samples_ms=tuple(samples),
            seconds=seconds,
            finished=time.time(),
        )

    def remeasure(
        self, problem: ProblemClass, configs: list[str], rounds: int
    ) -> dict[str, list[float]]:
        """As `Measurer.remeasure`. Raises ValueError as `measure`."""
        self._expect(problem)
        samples = {}
        for config in configs:
            recorded = self.recording.records.get(config)
            samples[config] = []
            if recorded is not None and _has_times(recorded):
                samples[config] = [self._draw(recorded) for _ in range(rounds)]
                self.seconds += _preparation_seconds(recorded) + sum(samples[config]) / 1000
        return samples

    def _draw(self, recorded: Record) -> float:
        """One of the recorded samples."""
        generator = self._random.setdefault(
            recorded.config, random.Random(f"{self._seed} {recorded.config}")
        )
        return generator.choice(recorded.samples_ms)

    def _expect(self, problem: ProblemClass) -> None:
        if problem != self.recording.problem:
            raise ValueError(f"the recording is of {self.recording.problem}, not of {problem}")


def _has_times(record: Record) -> bool:
    return record.outcome not in FAILURES and bool(record.samples_ms)


def _preparation_seconds(record: Record) -> float:
    """The seconds that a trial took besides the timed launches."""
    return max(0.0, record.seconds - sum(record.samples_ms) / 1000)
