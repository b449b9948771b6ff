"""The GPU's clock and power while something was timed, from nvidia-smi; nothing is set."""

import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

_INTERVAL_MS = 200


class Reading(NamedTuple):
    """Medians over a time: clock in MHz, and power in W, or None where that is not known."""

    sm_clock_mhz: float
    power_w: float | None


class ClockLog:
    """The SM clock and the power several times a second, from a process of its own.

    Where there is no nvidia-smi the log stays empty.
    """

    def __init__(self, gpu: str, now: Callable[[], float] = time.monotonic):
        """Start it.

        Args:
            gpu: its PCI address, as in "0000:3b:00.0", or its number in nvidia-smi's list.
            now: the clock whose times `between` is asked for.
        """
        self._now = now
        self._samples: list[tuple[float, float, float | None]] = []
        command = [
            "nvidia-smi",
            f"--id={gpu}",
            "--query-gpu=clocks.sm,power.draw",
            "--format=csv,noheader,nounits",
            f"--loop-ms={_INTERVAL_MS}",
        ]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError:
            self._process = None
            return
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def add(self, when: float, line: str) -> None:
        """Note a line of nvidia-smi, "1980, 412.3"; one without a clock is ignored."""
        clock, _, power = map(_number, line.partition(","))
        if clock is not None:
            self._samples.append((when, clock, power))

    def between(self, start: float, end: float) -> Reading | None:
        """The medians between two times; None without samples.

        A time shorter than the log's interval is taken to begin an interval before its end.
        """
        start = min(start, end - _INTERVAL_MS / 1000)
        chosen = [sample for sample in list(self._samples) if start <= sample[0] <= end]
        if not chosen:
            return None
        powers = [power for *_, power in chosen if power is not None]
        return Reading(
            statistics.median(clock for _, clock, _ in chosen),
            statistics.median(powers) if powers else None,
        )

    def _read(self, lines) -> None:
        for line in lines:
            self.add(self._now(), line)
        lines.close()


def _number(text: str) -> float | None:
    """The number that a field of nvidia-smi holds; None for "[N/A]"."""
    try:
        return float(text)
    except ValueError:
        return None
