"""The benchmark's device: the tuner's timer, with array libraries that only note what they do."""

import sys
from contextlib import contextmanager

import pytest

from bench.measuring import device as devices
from bench.points.interleave import Method
from tests.support.fake_libraries import FakeCupy, FakeTorch


@pytest.fixture(params=["torch", "cupy"])
def library(request, monkeypatch):
    """The name and the fake of a library; there is no other."""
    fake = {"torch": FakeTorch, "cupy": FakeCupy}[request.param]()
    fake.__name__ = request.param
    fake.set_float32_matmul_precision = lambda how: None
    for name in ("torch", "cupy"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, request.param, fake)
    return request.param, fake


def test_a_method_is_timed_alone_and_within_its_context(library):
    name, fake = library
    device = devices.open_device(3)
    assert (type(device).__name__.lower(), device.ordinal) == (f"{name}device", 3)
    fake.events.clear()

    @contextmanager
    def context():
        fake.events.append("enter")
        yield
        fake.events.append("leave")

    method = Method("m", device._fill, context)
    assert device.time_method(method) == 0.125
    timed = ["record", "fill", "record", "wait"]
    assert fake.events == ["enter", *["fill"] * 4, *timed, "leave"]


def test_ceilings_by_hand(library, monkeypatch):
    name, _ = library
    device = devices.open_device(0)

    class Matrix:
        """A product takes two ticks of the clock, a quarter of a millisecond."""

        def __getitem__(self, index):
            return self

        def __matmul__(self, other):
            device._fill()
            device._fill()

    asked = []
    monkeypatch.setattr(device, "normal", lambda *what: asked.append(what) or Matrix())
    monkeypatch.setattr(device, "copy", lambda size: device._fill)
    monkeypatch.setattr(device, "describe", lambda: {"num_sms": 132})
    found = device.ceilings()
    dtype = {"torch": "bfloat16", "cupy": "float16"}[name]
    assert asked == [((1, 8192, 8192), dtype, seed) for seed in (0, 1)]
    assert found == {
        "matmul_tflops": pytest.approx(2 * 8192**3 / 0.25e-3 / 1e12),
        "matmul": f"{dtype}, 8192 x 8192 x 8192, {name}",
        "copy_gbps": pytest.approx(2 * 2**30 / 0.125e-3 / 1e9),
        "copy": f"1073741824 bytes, read and written, {name}",
        "num_sms": 132,
    }


def test_without_a_library_both_reasons_are_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RuntimeError, match=r"PyTorch: .*torch.*; CuPy: .*cupy"):
        devices.open_device(0)
