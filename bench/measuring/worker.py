"""The child process that measures: reads tasks from a file, writes what it finds to a journal.

`python -m bench.worker TASKS JOURNAL`. A journal line is written before anything that can take
the process down, so that `bench.measuring.supervisor` knows what to leave out next time.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from bench.first_light import tasks as first_light
from bench.first_light.rehearsal import FakeClock, SimulatedDevice
from bench.measuring import measure, quantize
from bench.measuring.device import Device, open_device
from bench.peers import methods as peers
from bench.points.points import Point

BROKEN = 3


class Journal:
    """Lines of JSON, each on disk before the next thing happens."""

    def __init__(self, file: TextIO):
        self._file = file

    def write(self, **line: Any) -> None:
        """Append a line."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def run_tasks(device: Device, tasks: list[dict], settings: dict, journal: Journal) -> None:
    """Run the tasks until done or until the deadline.

    A task that says how long it takes ("expected_s") is skipped if that no longer fits. Without
    the process that reads the journal nothing more is begun.
    """
    clock = FakeClock(settings["clock"]) if settings.get("clock") else time.monotonic
    parent = os.getppid()
    for task in tasks:
        left = settings["deadline"] - clock()
        if left < 0 or os.getppid() != parent:
            break
        index = task["index"]
        expected_s = task.get("expected_s", 0)
        if expected_s > left:
            skipped = f"it takes about {expected_s:.0f} s, {left:.0f} s were left"
            journal.write(task=index, done={"skipped": skipped})
            continue

        def begin(method: str | None, index=index) -> None:
            journal.write(task=index, begin=method)

        begin(None)
        # What a task is told is in seconds that pass.
        told = {**settings, "deadline": time.monotonic() + left}
        try:
            found = _run_task(device, task, told, begin)
        except measure.BrokenDeviceError:
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            measure.expect_working(device, reason)
            journal.write(task=index, failed=reason)
        else:
            if settings.get("clock"):
                clock.spend(expected_s)
            if expected_s:
                found = {**found, "seconds": round(left - settings["deadline"] + clock(), 1)}
            journal.write(task=index, done=found)
    journal.write(end=True)


def _run_task(device: Device, task: dict, settings: dict, begin) -> dict:
    kind = task["kind"]
    if kind == "ceilings":
        return device.ceilings()
    if kind in first_light.KINDS:
        return first_light.run(device, task, settings, begin)
    exclude = task["exclude"]
    if kind == "host":
        names = [name for name in task["peers"] if name not in exclude]
        return measure.host_microseconds(device, names, begin)
    if kind == "quantize":
        return quantize.measure(device, begin, exclude, settings["budget_ms"])
    point = Point.from_dict(task["point"])
    result = measure.measure_point(
        device,
        point,
        task["peers"],
        exclude=exclude,
        begin=begin,
        deadline=settings["deadline"],
        budget_ms=settings["budget_ms"],
    )
    begin(peers.OURS)
    return {**result, "kernel": measure.kernels_of(device, point)}


def main(tasks: str, journal: str) -> int:
    """Run the tasks of a file; 3 if the device is broken and the process of no further use."""
    settings = json.loads(Path(tasks).read_text())
    with open(journal, "a") as file:
        lines = Journal(file)
        try:
            is_rehearsal = settings.get("rehearsal", False)
            device = SimulatedDevice() if is_rehearsal else open_device(settings["device"])
        except RuntimeError as error:
            lines.write(no_device=str(error))
            return 1
        lines.write(library=device.library)
        try:
            run_tasks(device, settings["tasks"], settings, lines)
        except measure.BrokenDeviceError as error:
            lines.write(broken=str(error))
            # The context is beyond repair: nothing that runs at exit could succeed.
            file.flush()
            os._exit(BROKEN)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
