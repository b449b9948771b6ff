"""The pipes between a parent and its child: notes, prints, faults that stay, lost parents."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tuner.measuring.channel import BROKEN
from tuner.measuring.child import Child, FailedError

# A child whose requests say how it ends; it needs no package that is installed.
_PROGRAM = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from tuner.measuring import channel as channels
channels._ORPHAN_SECONDS = 0.2
channel = channels.Channel()

class Device:
    is_broken = False
    def describe(self):
        return {{"name": "a device"}}
    def synchronize(self):
        if self.is_broken:
            raise RuntimeError("it stays broken")
    def release(self):
        pass

device = Device()

def answer(what, seconds=0.0):
    print("a kernel prints", flush=True)
    for number in range(4):
        channel.send(note=number)
        time.sleep(seconds)
    device.is_broken = what == "break"
    if what in ("break", "fail"):
        raise ValueError("no")
    return {{"what": what}}

def failure(error, request):
    return request["what"], str(error)

channels.serve(channel, device, {{"answer": answer}}, failure)
"""
_COMMAND = [sys.executable, "-S", "-c", _PROGRAM]


@pytest.fixture
def child():
    child = Child(_COMMAND, dict(os.environ), 20)
    yield child
    child.close()


def test_notes_come_before_the_reply_and_prints_are_none(child):
    assert child.device == {"name": "a device"}
    notes = []
    reply = child.ask(20, on_note=notes.append, do="answer", what="a")
    assert (reply["what"], notes) == ("a", [0, 1, 2, 3])
    assert child.ask(20, do="answer", what="b")["what"] == "b", "nobody need listen"


def test_notes_prolong_a_limit_but_not_the_end(child):
    notes = []
    child.ask(0.9, on_note=notes.append, do="answer", what="a", seconds=0.3)
    assert len(notes) == 4
    began = time.monotonic()
    with pytest.raises(FailedError, match="timeout"):
        child.ask(9, until=began + 0.45, on_note=notes.append, do="answer", what="a", seconds=0.3)
    assert time.monotonic() - began < 5 and not child.is_alive


def test_without_a_listener_notes_prolong_nothing(child):
    with pytest.raises(FailedError, match="timeout"):
        child.ask(0.5, do="answer", what="a", seconds=0.3)


def test_a_failure_costs_the_request_only(child):
    with pytest.raises(FailedError, match="fail: no"):
        child.ask(20, do="answer", what="fail")
    assert child.is_alive and child.ask(20, do="answer", what="a")["what"] == "a"


def _serving(request, **options):
    """A child that was sent a request and cannot outlive the test."""
    child = subprocess.Popen(
        _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    )
    watchdog = threading.Timer(20, child.kill)
    watchdog.start()
    child.stdin.write(request + "\n")
    child.stdin.flush()
    return child, watchdog


def test_a_fault_that_stays_ends_the_child():
    request = '{"id": 1, "do": "answer", "what": "break"}'
    child, watchdog = _serving(request, stderr=subprocess.PIPE)
    with child:
        last = child.stdout.readlines()[-1]
        assert child.wait() == BROKEN
        assert "a kernel prints" in child.stderr.read()
    watchdog.cancel()
    assert last == '{"id": 1, "broken": true, "failed": "break", "reason": "no"}\n'


def test_a_child_without_a_parent_ends_in_the_middle_of_a_kernel():
    child, watchdog = _serving('{"id": 1, "do": "answer", "what": "a", "seconds": 60}')
    with child:
        child.stdout.readline()
        child.stdin.close()
        assert child.wait() == 1
    watchdog.cancel()
