"""The GPU's clock while something was timed, as nvidia-smi reports it; nothing is set."""

import statistics
import subprocess
import threading
import time

_INTERVAL_MS = 200


class ClockLog:
    """The SM clock several times a second, from a process of its own.

    Where there is no nvidia-smi the log stays empty.
    """

    def __init__(self, bus: str):
        """Start it for the GPU at a PCI address, as in "0000:3b:00.0"."""
        self._samples: list[tuple[float, float]] = []
        command = [
            "nvidia-smi",
            f"--id={bus}",
            "--query-gpu=clocks.sm",
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
        """Note a line of nvidia-smi, "1980", at a time of time.monotonic(); others are ignored."""
        try:
            self._samples.append((when, float(line)))
        except ValueError:
            return

    def between(self, start: float, end: float) -> float | None:
        """Median clock in MHz between two times of time.monotonic(); None without samples.

        A time shorter than the log's interval is taken to begin an interval before its end.
        """
        start = min(start, end - _INTERVAL_MS / 1000)
        clocks = [clock for when, clock in list(self._samples) if start <= when <= end]
        return statistics.median(clocks) if clocks else None

    def _read(self, lines) -> None:
        for line in lines:
            self.add(time.monotonic(), line)
        lines.close()
