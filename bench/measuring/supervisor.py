"""Runs `bench.measuring.worker` and outlives it: a crash or a hang costs one point.

A worker that dies or falls silent is replaced. The method that ran last is left out of the task in
which it did so, with its reason; a task that dies outside any method is given up.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.records.checks import ROOT, child_environment

# Compiling for a point is the longest that a worker may be silent.
HANG_SECONDS = 150
# To begin with, a library that was never read from disk takes longer than a task may be silent.
_START_SECONDS = 60
# Of a device that has worked: a process that was killed on it may not have left it yet.
_RETRIES, _RETRY_SECONDS = 3, 2
_BROKE, _SILENT, _DIED = "broke the device", "no sign of life", "the process died"
DEATHS = (_BROKE, _SILENT, _DIED)
"""What the reason of a task begins with that took its worker with it."""
_GRACE_SECONDS = 3
_POLL_SECONDS = 0.2


def run(
    tasks: list[dict],
    settings: dict,
    *,
    on_result: Callable[[dict, dict], None],
    command: Callable[[str, str], list[str]] | None = None,
    clock: Callable[[], float] = time.monotonic,
    hang_seconds: float | None = None,
    environment: dict[str, str] | None = None,
) -> str | None:
    """Run tasks in worker processes until done or until settings["deadline"].

    Args:
        tasks: each {"kind": ...} and what the kind needs; "index" and "exclude" are added here.
        settings: "device", "deadline" (of `clock`, which all processes share), "budget_ms".
        on_result: told each task and its result as they come; {"failed": reason} if it has none.
        command: makes a worker's command from the paths of tasks and journal.
        clock: seconds; another than time.monotonic is of a rehearsal.
        hang_seconds: how long a worker that has begun may be silent.
        environment: of the workers, beside `checks.child_environment`.

    Returns:
        Why no device could be opened; None if one could.
    """
    left = {i: {"exclude": {}, **task, "index": i} for i, task in enumerate(tasks)}
    hang_seconds = HANG_SECONDS if hang_seconds is None else hang_seconds
    has_worked, retries = False, _RETRIES
    while left and clock() < settings["deadline"]:
        with tempfile.TemporaryDirectory() as folder:
            child = _Child(Path(folder), list(left.values()), settings, command or _command)

            def finish(index: int, result: dict) -> None:
                on_result(left[index], result)
                del left[index]

            end = child.follow(settings["deadline"], finish, clock, hang_seconds, environment)
        has_worked |= end.has_begun
        if has_worked and not end.has_begun and retries and not end.is_regular:
            retries -= 1
            time.sleep(_RETRY_SECONDS)
            continue
        if end.no_device is not None:
            return end.no_device
        if end.is_regular:
            break
        if end.task is None:
            # It died before its first task: another one would, too. After one, it may not.
            for index in [] if end.has_finished_one else list(left):
                finish(index, {"failed": end.reason})
        elif end.method is None or end.method in left[end.task]["exclude"]:
            finish(end.task, {"failed": end.reason})
        else:
            left[end.task]["exclude"][end.method] = end.reason
    return None


class _End:
    """How a worker ended: what it was doing, and why."""

    def __init__(self):
        self.is_regular, self.has_finished_one, self.no_device = False, False, None
        self.has_begun = False
        self.task: int | None = None
        self.method: str | None = None
        self.reason = ""


class _Child:
    """One worker and its journal."""

    def __init__(self, folder: Path, tasks: list[dict], settings: dict, command):
        self.journal, self.output = folder / "journal.jsonl", folder / "output"
        self.journal.touch()
        (folder / "tasks.json").write_text(json.dumps({**settings, "tasks": tasks}))
        self.command = command(str(folder / "tasks.json"), str(self.journal))
        self.read, self.end = 0, _End()
        self.broken: str | None = None

    def follow(
        self,
        deadline: float,
        finish: Callable[[int, dict], None],
        clock: Callable[[], float],
        hang_seconds: float,
        environment: dict[str, str] | None,
    ) -> _End:
        """Run to the end, handing on the results."""
        last_sign, silent = time.monotonic(), False
        allowed = max(hang_seconds, _START_SECONDS)
        with open(self.output, "w+") as output:
            child = subprocess.Popen(
                self.command, cwd=ROOT, env=child_environment() | (environment or {}),
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
            try:
                while child.poll() is None:
                    time.sleep(_POLL_SECONDS)
                    now = time.monotonic()
                    if self._digest(finish):
                        last_sign, allowed = now, hang_seconds
                    silent = now - last_sign > allowed
                    if silent or clock() > deadline + _GRACE_SECONDS:
                        break
            finally:
                if child.poll() is None:
                    child.kill()
                child.wait()
            output.seek(0)
            tail = " ".join(output.read()[-600:].split())
        self._digest(finish)
        end = self.end
        if not silent and clock() > deadline:
            end.is_regular = True
        if self.broken is not None:
            end.reason = f"{_BROKE}: {self.broken}"
        elif silent:
            end.reason = f"{_SILENT} for {allowed} s"
        else:
            end.reason = f"{_DIED} (exit status {child.returncode}): {tail}"
        return end

    def _digest(self, finish) -> bool:
        """Read what the journal has new; whether there was anything."""
        text = self.journal.read_text()[self.read :]
        complete = text[: text.rfind("\n") + 1]
        self.read += len(complete)
        for line in map(json.loads, complete.splitlines()):
            if "begin" in line:
                self.end.task, self.end.method = line["task"], line["begin"]
                self.end.has_begun = True
            elif "done" in line or "failed" in line:
                finish(line["task"], line.get("done", line))
                self.end.task = self.end.method = None
                self.end.has_finished_one = True
            elif "broken" in line:
                self.broken = line["broken"]
            elif "no_device" in line:
                self.end.no_device = line["no_device"]
            elif "end" in line:
                self.end.is_regular = True
        return bool(complete)


def _command(tasks: str, journal: str) -> list[str]:
    return [sys.executable, "-m", "bench.measuring.worker", tasks, journal]
