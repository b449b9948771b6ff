"""A child process that runs tests: `python -P -m bench.records.recording`.

`bench.records.checks` asks it for the ids of tests, or to run some: then it is told of each as it
begins and as it ends, so that a crash or a hang can be laid at its door.
"""

import os
import sys

import pytest

from tuner.measuring.channel import BROKEN, Channel

_OPTIONS = ("-q", "-p", "no:cacheprovider", "-o", "addopts=")


class Collected:
    """A pytest plugin that keeps the ids of what was collected."""

    def pytest_collection_finish(self, session):
        """All tests are known."""
        self.ids = [item.nodeid for item in session.items]


class Recording:
    """A pytest plugin that runs some tests only, and tells of each."""

    def __init__(self, channel: Channel, ids: list[str]):
        self._channel, self._ids = channel, set(ids)

    def pytest_collection_modifyitems(self, items):
        """Keep the tests that were asked for."""
        items[:] = [item for item in items if item.nodeid in self._ids]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid, location):
        """A test begins."""
        self._tell(nodeid, "started", "")

    def pytest_runtest_logreport(self, report):
        """A test has an outcome; leave a process whose GPU context is beyond repair."""
        if report.when == "call" or report.outcome != "passed":
            reason = "" if report.passed else str(report.longrepr)[-1500:]
            self._tell(report.nodeid, report.outcome, reason)
            if report.failed and _context_is_broken():
                os._exit(BROKEN)

    def _tell(self, name: str, outcome: str, reason: str) -> None:
        self._channel.send(note={"id": name, "outcome": outcome, "reason": reason})


def _context_is_broken() -> bool:
    """Whether a kernel's fault has made every further CUDA call of this process fail."""
    try:
        import cupy

        cupy.cuda.Device().synchronize()
    except ImportError:
        return False
    except Exception:
        return True
    return False


def collect(selection: list[str]) -> list[str]:
    """The ids of the tests that options of pytest select."""
    collected = Collected()
    status = pytest.main([*_OPTIONS, "--collect-only", *selection], plugins=[collected])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        sys.exit(f"the tests of {' '.join(selection)} cannot be collected")
    return collected.ids


def run(ids: list[str], channel: Channel) -> None:
    """Run tests, and tell of each."""
    files = sorted({name.split("::")[0] for name in ids})
    pytest.main([*_OPTIONS, *files], plugins=[Recording(channel, ids)])


def main() -> None:
    """Collect or run tests as it is asked, until the parent is gone."""
    channel = Channel()
    channel.send(hello={})
    for request in channel.requests():
        if request["do"] == "collect":
            channel.send(id=request["id"], ids=collect(request["selection"]))
        else:
            run(request["ids"], channel)
            channel.send(id=request["id"])


if __name__ == "__main__":
    main()
