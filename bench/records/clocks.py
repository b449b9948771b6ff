"""What the GPU's clock and power were while something was timed, as nvidia-smi reports them."""

import statistics
import subprocess
import threading
import time

_INTERVAL_MS = 200


class ClockLog:
    """SM clock and power several times a second, from a process of its own; nothing is set.

    A context manager. Where there is no nvidia-smi the log stays empty.
    """

    def __init__(self, device: int):
        self._device = device
        self._samples: list[tuple[float, float, float]] = []
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "ClockLog":
        command = [
            "nvidia-smi",
            f"--id={self._device}",
            "--query-gpu=clocks.sm,power.draw",
            "--format=csv,noheader,nounits",
            f"--loop-ms={_INTERVAL_MS}",
        ]
        try:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError:
            return self
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def _read(self, lines) -> None:
        for line in lines:
            self.add(time.time(), line)

    def add(self, when: float, line: str) -> None:
        """Note a line of nvidia-smi, "1980, 412.3"; anything else is ignored."""
        try:
            clock, power = map(float, line.split(","))
        except ValueError:
            return
        self._samples.append((when, clock, power))

    def between(self, start: float, end: float) -> dict:
        """Median clock and power between two times of time.time(); nothing without samples."""
        chosen = [sample for sample in list(self._samples) if start <= sample[0] <= end]
        if not chosen:
            return {}
        _, clock, power = map(statistics.median, zip(*chosen, strict=True))
        return {"sm_clock_mhz": clock, "power_w": power}
