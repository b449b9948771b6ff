"""A child process that answers requests, and the watchdog over it.

Requests and replies are lines of JSON (see `channel`). A child that does not answer in time is
killed with all processes it has started; one that dies is reported with its last words.
"""

import json
import math
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_EXIT_SECONDS = 2.0
_TAIL_BYTES = 2000
_TAIL_CHARACTERS = 300


class DeviceUnavailableError(RuntimeError):
    """No child could be started that has a device to measure on."""


class FailedError(Exception):
    """A request failed.

    Attributes:
        outcome: as in `records.FAILURES`.
        reason: why.
    """

    def __init__(self, outcome: str, reason: str):
        super().__init__(f"{outcome}: {reason}")
        self.outcome, self.reason = outcome, reason


class Child:
    """A running child.

    Attributes:
        device: what the child says of its device.
    """

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        limit_s: float,
        folder: Path | None = None,
    ):
        """Start it and wait until it is ready.

        Args:
            command: to run.
            environment: of the process.
            limit_s: seconds it may take to be ready.
            folder: to run in; that of this process by default.

        Raises:
            DeviceUnavailableError: it is not ready in time, or has no device.
        """
        self._number = 0
        self._stderr = _new_file()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=environment,
                cwd=folder,
                # A group of its own, to be killed as one, which Ctrl-C does not reach.
                start_new_session=True,
            )
        except OSError as error:
            self._stderr.close()
            raise DeviceUnavailableError(f"cannot run {command[0]}: {error}") from error
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()
        try:
            hello = self._wait("start", limit_s, "hello", "no_device")
        except FailedError as error:
            raise DeviceUnavailableError(error.reason) from error
        except BaseException:
            self.close()
            raise
        if "no_device" in hello:
            self.close()
            raise DeviceUnavailableError(str(hello["no_device"]))
        self.device: dict[str, Any] = hello["hello"]

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def ask(
        self,
        limit_s: float,
        *,
        until: float = math.inf,
        on_note: Callable[[Any], None] | None = None,
        **request,
    ) -> dict:
        """Send a request and wait for its reply.

        Args:
            limit_s: seconds it may take; with `on_note`, seconds from one note to the next.
            until: when it is given up at the latest, as of time.monotonic().
            on_note: told each note that the child sends before its reply.
            request: what to do.

        Raises:
            FailedError: it failed, took too long, or the child died. `is_alive` says whether the
                child can go on.
        """
        self._number += 1
        with suppress(OSError):  # `_wait` finds that a child is gone
            line = json.dumps({"id": self._number, **request}) + "\n"
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        reply = self._wait(str(request.get("do")), limit_s, "id", until=until, on_note=on_note)
        if reply.get("broken"):
            self.close()
        if "failed" in reply:
            raise FailedError(reply["failed"], str(reply.get("reason", "")))
        return reply

    def close(self) -> None:
        """Kill it and whatever it started."""
        if hasattr(os, "killpg"):
            # The leader may be gone and leave others behind.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        with suppress(OSError):
            self._process.stdin.close()
        self._stderr.close()

    def _wait(
        self,
        what: str,
        limit_s: float,
        *keys: str,
        until: float = math.inf,
        on_note: Callable[[Any], None] | None = None,
    ) -> dict:
        """The next message that has one of the keys, and the id of the last request.

        Lines that are no messages are skipped: a library may have printed them before the worker
            began.
        """
        deadline = min(time.monotonic() + limit_s, until)
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self.close()
                reason = f"{what} took longer than {limit_s:g} s; killed"
                raise FailedError("timeout", reason) from None
            if line is None:
                reason = self._last_words()
                self.close()
                raise FailedError("launch_failed", reason)
            try:
                message = json.loads(line)
            except ValueError:
                continue
            if not isinstance(message, dict) or message.get("id", self._number) != self._number:
                continue
            if on_note is not None and "note" in message:
                on_note(message["note"])
                deadline = min(time.monotonic() + limit_s, until)
            elif any(key in message for key in keys):
                return message

    def _last_words(self) -> str:
        """The reason why a child that has closed its output ended."""
        try:
            status = self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            how = "the process closed its output"
        else:
            how = f"the process died of {_signal_name(-status)}" if status < 0 else ""
            how = how or f"the process ended with exit status {status}"
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - _TAIL_BYTES))
        words = " ".join(self._stderr.read().decode(errors="replace").split())
        return f"{how}: {words[-_TAIL_CHARACTERS:]}" if words else how

    def _read(self, output) -> None:
        with output:
            for line in output:
                self._lines.put(line)
        self._lines.put(None)


def _new_file():
    """A file without a name; one that forgets its content where the disk is full."""
    try:
        return tempfile.TemporaryFile()
    except OSError:
        return open(os.devnull, "w+b")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
