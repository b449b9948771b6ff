"""A run on a GPU: tasks for `bench.measuring.supervisor`, a line for each result, a record.

The record is written again after every task, so that an interrupted run leaves what it had.
"""

import signal
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from bench.measuring import supervisor
from bench.peers import methods as peers
from bench.points.points import KVCACHE, Point
from bench.records import record
from bench.records.entries import is_measured, is_right
from tuner.measuring.clocks import ClockLog

BUDGET_MS = 1500.0
NO_GPU = "There is no NVIDIA GPU here (nvidia-smi finds none): nothing is measured."
_BY_BYTES = ("decode", KVCACHE)


class Session:
    """One run: measures, prints and records.

    Attributes:
        record: what has been found so far.
        path: where it is written.
        no_device: why no device could be opened; None if one could.
    """

    def __init__(self, machine: dict, direction: str, kind: str, out: Path, device: int):
        self.device, self.no_device = device, None
        self.record = {
            **machine,
            "kind": kind,
            "direction": direction,
            "ceilings": {},
            "points": [],
            "host_microseconds": {},
            "clocks_before": record.clocks(device),
        }
        self.path = record.reserve(self.record, out)
        self._start, self._tasks, self._done = time.monotonic(), 0, 0

    def run(self, tasks: list[dict], deadline: float) -> None:
        """Measure `tasks` until `deadline`; a signal to stop ends the run with its record."""
        self._tasks, self._done = len(tasks), 0
        settings = {"device": self.device, "deadline": deadline, "budget_ms": BUDGET_MS}
        restore = raise_on_termination()
        try:
            with clock_log(self.device) as log:
                self.no_device = supervisor.run(
                    tasks,
                    settings,
                    on_result=lambda task, result: self._note(task, result, log),
                )
        except KeyboardInterrupt:
            self.record["stopped"] = "interrupted"
            print("interrupted", flush=True)
        finally:
            restore()
            self.record["left_out"] = self._tasks - self._done
            self.record["seconds"] = round(time.monotonic() - self._start, 1)
            self.record["clocks_after"] = record.clocks(self.device)
            record.save(self.record, self.path)

    def _note(self, task: dict, result: dict, log: ClockLog) -> None:
        """Put a task's result into the record, write it, and print a line."""
        self._done += 1
        if task["kind"] == "point":
            entry = {**task["point"], **result, **clocks_of(result, log)}
            self.record["points"].append(entry)
            text = line_of(entry)
        else:
            name = {"host": "host_microseconds"}.get(task["kind"], task["kind"])
            self.record[name] = result
            text = f"{task['kind']}: {_brief(result)}"
        record.save(self.record, self.path)
        seconds = time.monotonic() - self._start
        print(f"[{self._done}/{self._tasks} {seconds:4.0f} s] {text}", flush=True)

    def measured(self, kind: str | None = None) -> list[dict]:
        """The points that were measured, of one kind or of all."""
        entries = [e for e in self.record["points"] if is_measured(e)]
        return [e for e in entries if kind is None or e["kind"] == kind]


def point_tasks(chosen: list[Point], names: list[str]) -> list[dict]:
    """Tasks that measure these methods on these points."""
    return [{"kind": "point", "point": p.as_dict(), "peers": names} for p in chosen]


def clock_log(device: int) -> closing[ClockLog]:
    """The log of a GPU's clock and power at times of time.time(), for as long as it is entered."""
    return closing(ClockLog(str(device), time.time))


def clocks_of(result: dict, log: ClockLog) -> dict:
    """`sm_clock_mhz` and `power_w` while a result was "timed"; empty where that is not known."""
    reading = log.between(*result["timed"]) if result.get("timed") else None
    return {} if reading is None else reading._asdict()


def line_of(entry: dict) -> str:
    """A point that was measured, in one line."""
    point = Point.from_dict(entry)
    if "failed" in entry:
        return f"{point}: failed: {entry['failed']}"
    parts = []
    for name, method in entry["methods"].items():
        if "median_ms" in method:
            number = method["gbps"] if point.kind in _BY_BYTES else method["tflops"]
            wrong = "" if is_right(method) else " WRONG"
            parts.append(f"{name} {number:.0f}{wrong}")
        elif method["status"] != "unavailable":
            parts.append(f"{name} {method['status']}")
    unit = "GB/s" if point.kind in _BY_BYTES else "TFLOP/s"
    ours = entry["methods"].get(peers.OURS, {})
    check = ours.get("check", {}).get("outcome", ours.get("status", "-"))
    return f"{point} [{unit}; numflash {check}]: {', '.join(parts)}"


def _brief(result: dict) -> str:
    parts = []
    for name, value in result.items():
        if isinstance(value, dict):
            known = (value[key] for key in ("median_us", "of_copy", "reason") if key in value)
            value = next(known, "-")
        text = f"{value:.3g}" if isinstance(value, float) else str(value)[:60]
        parts.append(f"{name} {text}")
    return ", ".join(parts)


def raise_on_termination() -> Callable[[], None]:
    """Turn SIGTERM into KeyboardInterrupt; a function that undoes it."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # outside the main thread
        return lambda: None
    return lambda: signal.signal(signal.SIGTERM, previous)
