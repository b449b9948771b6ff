"""A pytest plugin that records each test as it begins and ends (`-p bench.recording`).

What a child process of `bench.records.checks` got done is in the file even if the process dies.
"""

import json
import os
from pathlib import Path

import pytest

_recording: list[str] = []


def pytest_addoption(parser):
    """Add the plugin's options."""
    group = parser.getgroup("numflash")
    group.addoption("--record", help="append each test's start and outcome to this JSONL file")
    group.addoption("--only-ids", help="run only the tests whose ids this file lists")


def pytest_configure(config):
    """Remember where to record."""
    if path := config.getoption("--record"):
        _recording.append(path)


def pytest_collection_modifyitems(config, items):
    """Keep the tests that were asked for."""
    if path := config.getoption("--only-ids"):
        wanted = set(Path(path).read_text().splitlines())
        items[:] = [item for item in items if item.nodeid in wanted]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logstart(nodeid, location):
    """Record that a test begins, so that a crash or a hang can be laid at its door."""
    _record(nodeid, "started", "")


def pytest_runtest_logreport(report):
    """Record a test's outcome; leave a process whose GPU context is beyond repair."""
    if report.when == "call" or report.outcome != "passed":
        reason = "" if report.passed else str(report.longrepr)[-1500:]
        _record(report.nodeid, report.outcome, reason)
        if report.failed and _context_is_broken():
            os._exit(3)


def _record(nodeid: str, outcome: str, reason: str) -> None:
    if _recording:
        with open(_recording[0], "a") as file:
            file.write(json.dumps({"id": nodeid, "outcome": outcome, "reason": reason}) + "\n")


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
