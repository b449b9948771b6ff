"""Copies between ranks of one process, in the order that streams of GPUs have work in.

A mark is an event behind all that is on an array's current stream. A copy waits for the marks of
both its sides on a stream of its own, so that neither side's computations wait for it before they
ask for it.
"""

import sys

from numflash.runtime.torch_tensors import is_tensor


class OnHost:
    """NumPy's arrays, and tensors on the CPU: what was called has ended."""

    def mark(self, array) -> None:
        """None: there is nothing to wait for."""

    def wait(self, array, mark) -> None:
        """Nothing: what a mark stands for has ended."""

    def copy(self, into, array, marks) -> None:
        """Fill an array with another of equal shape."""
        into[...] = array


class OnTorch:
    """PyTorch's tensors on CUDA devices."""

    def __init__(self):
        self._cuda, self._streams = sys.modules["torch"].cuda, {}

    def mark(self, array):
        """An event behind the work on the current stream of the array's device."""
        return self._recorded(self._cuda.current_stream(array.device))

    def wait(self, array, mark) -> None:
        """Let what follows on that stream wait for a mark."""
        self._cuda.current_stream(array.device).wait_event(mark)

    def copy(self, into, array, marks):
        """Fill an array with another, behind marks; returns a mark."""
        there, here = self._stream(array.device), self._stream(into.device)
        for mark in marks:
            here.wait_event(mark)
        # PyTorch copies between devices on the current stream of the source's, between waits of
        # each of both streams for the other.
        with self._cuda.stream(there), self._cuda.stream(here):
            into.copy_(array, non_blocking=True)
        return self._recorded(here)

    def _stream(self, device):
        if device not in self._streams:
            self._streams[device] = self._cuda.Stream(device)
        return self._streams[device]

    def _recorded(self, stream):
        event = self._cuda.Event()
        event.record(stream)
        return event


class OnCupy:
    """CuPy's arrays."""

    def __init__(self):
        self._cuda, self._streams = sys.modules["cupy"].cuda, {}

    def mark(self, array):
        """An event behind the work on the current stream of the array's device."""
        return self.mark_of(array.device.id)

    def mark_of(self, device: int):
        """An event behind the work on the current stream of a device."""
        # The number of a default stream means that of the current device.
        with self._cuda.Device(device):
            return self.recorded(self._cuda.get_current_stream(device))

    def wait(self, array, mark) -> None:
        """Let what follows on that stream wait for a mark."""
        self.wait_on(array.device.id, mark)

    def wait_on(self, device: int, mark) -> None:
        """Let what follows on the current stream of a device wait for a mark."""
        with self._cuda.Device(device):
            self._cuda.get_current_stream(device).wait_event(mark)

    def copy(self, into, array, marks):
        """Fill an array with another, behind marks; returns a mark."""
        device = into.device.id
        with self._cuda.Device(device):
            stream = self.stream(device)
            for mark in marks:
                stream.wait_event(mark)
            into.data.copy_from_device_async(array.data, into.nbytes, stream)
            return self.recorded(stream)

    def stream(self, device: int):
        """The stream for copies of the current device, which this must be."""
        if device not in self._streams:
            self._streams[device] = self._cuda.Stream(non_blocking=True)
        return self._streams[device]

    def recorded(self, stream):
        """An event behind the work on a stream of the current device."""
        event = self._cuda.Event(disable_timing=True)
        event.record(stream)
        return event


class Ordering:
    """The ordering of each kind of array, kept for one rank."""

    def __init__(self):
        self._kinds = {}

    def of(self, array) -> OnHost | OnTorch | OnCupy:
        """That of an array."""
        if is_tensor(array):
            kind = OnTorch if array.is_cuda else OnHost
        else:
            is_of_cupy = type(array).__module__.partition(".")[0] == "cupy"
            kind = OnCupy if is_of_cupy else OnHost
        if kind not in self._kinds:
            self._kinds[kind] = kind()
        return self._kinds[kind]
