"""The timer and the clock, with array libraries that only note what they are asked."""

import sys

import pytest

from tests.support.fake_libraries import FakeCupy, FakeTorch
from tuner.measuring import gpu
from tuner.measuring.clocks import ClockLog, Reading


@pytest.mark.parametrize("library, fake", [("cupy", FakeCupy), ("torch", FakeTorch)])
def test_the_timer_times_the_launch_alone_after_half_a_millisecond_of_fills(
    monkeypatch, library, fake
):
    fake = fake()
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, library, fake)
    device = gpu.open_gpu(3)
    assert (device.ordinal, fake.events[0]) == (3, "device 3")
    fake.events.clear()
    buffer = device._buffer
    launch = buffer.fill if library == "cupy" else lambda value: buffer.zero_()
    assert device.time(lambda: [launch(0), launch(0)]) == 0.25
    assert fake.events == [*["fill"] * 4, "record", "fill", "fill", "record", "wait"]


def test_without_a_library_both_reasons_are_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RuntimeError, match=r"CuPy: .*cupy.*; PyTorch: .*torch"):
        gpu.open_gpu(0)


def test_clocks_of_the_time_that_was_measured(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")  # no nvidia-smi
    log = ClockLog("0000:01:00.0")
    assert log.between(0, 9) is None
    lines = "300, 80.0", "1900, 600.5", "[N/A], [N/A]", "1980, 700.5", "400, [N/A]", ""
    for when, line in zip((1.0, 2.0, 2.1, 2.2, 3, 3.1), lines, strict=True):
        log.add(when, line + "\n")
    assert log.between(1.9, 2.5) == Reading(1940, 650.5)
    assert log.between(2.3, 2.31) == Reading(1980, 700.5)
    assert log.between(2.9, 3.5) == Reading(400, None)
    assert log.between(1.9, 3.5) == Reading(1900, 650.5), "what has no power has a clock"
    assert log.between(5, 6) is None
    log.close()
