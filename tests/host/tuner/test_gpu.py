"""The timer and the clock, with array libraries that only note what they are asked."""

import sys
import types

import pytest

from tuner.measuring import gpu
from tuner.measuring.clocks import ClockLog, Reading


class _FakeCupy:
    """As much of CuPy as `CupyGpu` needs; the clock ticks at every fill."""

    def __init__(self):
        self.events, self.now = [], 0.0
        fake = self

        class Buffer:
            def fill(self, value):
                fake.events.append("fill")
                fake.now += 0.125

        class Event:
            def record(self):
                fake.events.append("record")
                self.at = fake.now

            def synchronize(self):
                fake.events.append("wait")

        class Device:
            def __init__(self, ordinal):
                fake.events.append(f"device {ordinal}")

            def use(self):
                pass

        self.empty = lambda shape, dtype: Buffer()
        self.cuda = types.SimpleNamespace(
            Device=Device, Event=Event, get_elapsed_time=lambda begin, end: end.at - begin.at
        )


class _FakeTorch:
    """As much of PyTorch as `TorchGpu` needs, on the same clock."""

    uint8 = None

    def __init__(self):
        fake = _FakeCupy()
        self.events, buffer = fake.events, fake.empty(0, "u1")
        self.empty = lambda size, dtype, device: types.SimpleNamespace(
            zero_=lambda: buffer.fill(0)
        )
        self.device = lambda kind, ordinal: (kind, ordinal)

        class Event(fake.cuda.Event):
            def __init__(self, enable_timing):
                assert enable_timing

            def elapsed_time(self, end):
                return end.at - self.at

        self.cuda = types.SimpleNamespace(Event=Event, set_device=fake.cuda.Device)


@pytest.mark.parametrize("library, fake", [("cupy", _FakeCupy), ("torch", _FakeTorch)])
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
    assert log.between(5, 6) is None
    log.close()
