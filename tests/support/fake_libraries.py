"""Array libraries that only note what they are asked, on a clock that ticks at every fill."""

import types


class FakeCupy:
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


class FakeTorch:
    """As much of PyTorch as `TorchGpu` needs, on the same clock."""

    uint8 = None

    def __init__(self):
        fake = FakeCupy()
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
