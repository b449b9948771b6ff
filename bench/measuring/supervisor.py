"""Gives tasks to `bench.measuring.worker` and outlives it: a crash or a hang costs one point.

A worker that dies or falls silent is replaced. The method that ran last is left out of the task in
which it did so, with its reason; a task that dies outside any method is given up.
"""

import sys
import time
from collections.abc import Callable

from bench.records.checks import ROOT, child_environment
from tuner.measuring.child import Child, DeviceUnavailableError, FailedError

# Compiling for a point is the longest that a worker may be silent.
HANG_SECONDS = 150
# To begin with, a library that was never read from disk takes longer than a task may be silent.
_START_SECONDS = 60
# Of a device that has worked: a process that was killed on it may not have left it yet.
_RETRIES, _RETRY_SECONDS = 3, 2
_BROKE, _SILENT, _DIED = "broke the device", "no sign of life", "the process"
DEATHS = (_BROKE, _SILENT, _DIED)
"""What the reason of a task begins with that took its worker with it."""
_GRACE_SECONDS = 3


def run(
    tasks: list[dict],
    settings: dict,
    *,
    on_result: Callable[[dict, dict], None],
    command: list[str] | None = None,
    clock: Callable[[], float] = time.monotonic,
    spend: Callable[[float], None] | None = None,
    hang_seconds: float | None = None,
    environment: dict[str, str] | None = None,
) -> str | None:
    """Run tasks in worker processes until done or until settings["deadline"].

    Args:
        tasks: each {"kind": ...} and what the kind needs; "index" and "exclude" are added here.
            One that says how long it takes ("expected_s") is skipped if that no longer fits.
        settings: "device", "deadline" (of `clock`), "budget_ms", and what kinds need beside.
        on_result: told each task and its result as they come; {"failed": reason} if it has none.
        command: runs a worker; `bench.measuring.worker` by default.
        clock: seconds; another than time.monotonic is of a rehearsal.
        spend: of such a clock, told how long a task that was done takes.
        hang_seconds: how long a worker that is ready may be silent.
        environment: of the workers, beside `checks.child_environment`.

    Returns:
        Why no device could be opened; None if one could.
    """
    worker = _Worker(
        command or worker_command("bench.measuring.worker", str(settings["device"])),
        child_environment() | (environment or {}),
        HANG_SECONDS if hang_seconds is None else hang_seconds,
    )
    try:
        for index, task in enumerate(tasks):
            began, task = clock(), {"exclude": {}, **task, "index": index}
            left, expected_s = settings["deadline"] - began, task.get("expected_s", 0)
            if left < 0:
                break
            if expected_s > left:
                skipped = f"it takes about {expected_s:.0f} s, {left:.0f} s were left"
                on_result(task, {"skipped": skipped})
                continue
            # A worker counts seconds that pass.
            result = worker.run(task, {**settings, "deadline": time.monotonic() + left})
            if result is None:
                break
            if "failed" not in result and expected_s:
                if spend is not None:
                    spend(expected_s)
                result = {**result, "seconds": round(clock() - began, 1)}
            on_result(task, result)
    except DeviceUnavailableError as error:
        return None if clock() > settings["deadline"] else str(error)
    finally:
        worker.close()
    return None


def worker_command(module: str, *arguments: str) -> list[str]:
    """A command that runs a module as a worker; no file of the working folder passes for one."""
    return [sys.executable, "-P", "-m", module, *arguments]


class _Worker:
    """The process that runs tasks, which is replaced when it has died."""

    def __init__(self, command: list[str], environment: dict[str, str], hang_seconds: float):
        self._command, self._environment = command, environment
        self._hang_seconds, self._retries = hang_seconds, _RETRIES
        self._child: Child | None = None
        # What the child has begun and done, and whether any has begun something.
        self._num_done, self._has_worked = 0, False

    def run(self, task: dict, settings: dict) -> dict | None:
        """The result of a task; None if the deadline came first.

        What kills a worker is added to the task's "exclude", and the rest is tried again.

        Raises:
            DeviceUnavailableError: there is no device.
        """
        until = settings["deadline"] + _GRACE_SECONDS
        while True:
            child, begun = self._started(until), []
            try:
                reply = child.ask(
                    self._hang_seconds,
                    until=until,
                    on_note=begun.append,
                    do="task",
                    task=task,
                    settings=settings,
                )
            except FailedError as error:
                failure = error
            else:
                self._num_done += 1
                return reply["done"]
            finally:
                self._has_worked |= bool(begun)
            if child.is_alive:
                self._num_done += 1
                return {"failed": failure.reason}
            if time.monotonic() >= until:
                return None
            reason, method = self._reason(failure), begun[-1] if begun else None
            if method is not None and method not in task["exclude"]:
                task["exclude"][method] = reason
            elif begun or not self._num_done:
                return {"failed": reason}
            # Else it died of what it had done before.

    def close(self) -> None:
        """End the process, if there is one."""
        if self._child is not None:
            self._child.close()
        self._child, self._num_done = None, 0

    def _reason(self, failure: FailedError) -> str:
        """Why the process is gone; begins with one of `DEATHS`."""
        if failure.outcome == "timeout":
            return f"{_SILENT} for {self._hang_seconds:g} s"
        return f"{_BROKE}: {failure.reason}" if failure.outcome == "failed" else failure.reason

    def _started(self, until: float) -> Child:
        while self._child is None or not self._child.is_alive:
            self.close()
            limit_s = min(max(self._hang_seconds, _START_SECONDS), until - time.monotonic())
            try:
                self._child = Child(self._command, self._environment, max(limit_s, 0), ROOT)
            except DeviceUnavailableError:
                if not self._has_worked or not self._retries:
                    raise
                self._retries -= 1
                time.sleep(_RETRY_SECONDS)
        return self._child
