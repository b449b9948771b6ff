"""CuPy and PyTorch on GPUs that are threads: a stream does its work later, in its own order.

Arrays are NumPy's. What is put on a stream runs when its thread gets there, so that work which
waits for nothing sees what was there before. NCCL's ranks are threads of this process.
"""

import ctypes
import itertools
import queue
import sys
import threading
import types
from contextlib import contextmanager

import numpy as np

SECONDS = 20.0


class Token(threading.Event):
    """What an event stands for since it was last recorded."""

    def pause(self):
        """Wait, but not for ever."""
        assert self.wait(SECONDS), "a stream waits for ever"


class Gpus:
    """Streams of some devices, by number; each thread has a current device and current streams."""

    def __init__(self):
        self.of_thread = threading.local()
        self.by_pointer, self.numbers = {}, itertools.count(1)
        self.default = {}
        self.lock = threading.Lock()

    @property
    def device(self) -> int:
        """The current one."""
        return getattr(self.of_thread, "device", 0)

    @contextmanager
    def on(self, device: int):
        """Make a device the current one."""
        before, self.of_thread.device = self.device, device
        try:
            yield
        finally:
            self.of_thread.device = before

    def current(self, device: int) -> "Stream":
        """The current stream of a device."""
        found = self._streams().get(device)
        if found is not None:
            return found
        with self.lock:
            if device not in self.default:
                self.default[device] = Stream(self, device, is_default=True)
            return self.default[device]

    def _streams(self) -> dict:
        if not hasattr(self.of_thread, "streams"):
            self.of_thread.streams = {}
        return self.of_thread.streams

    @contextmanager
    def within(self, stream: "Stream"):
        """Make a stream the current one of its device."""
        streams = self._streams()
        before = streams.get(stream.device)
        streams[stream.device] = stream
        try:
            yield
        finally:
            streams[stream.device] = before


class Stream:
    """Work in order, by a thread of its own."""

    def __init__(self, gpus: Gpus, device: int, is_default: bool = False):
        self.gpus, self.device, self.is_default = gpus, device, is_default
        self.ptr = 0 if is_default else next(gpus.numbers)
        gpus.by_pointer[device, self.ptr] = self
        self._work: queue.Queue = queue.Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while True:
            self._work.get()()

    def put(self, work):
        """Have some work done."""
        self._work.put(work)

    def wait_event(self, event):
        """What follows comes after an event."""
        # 0 is the default stream of whatever device is the current one.
        assert not self.is_default or self.gpus.device == self.device
        if event.token is not None:
            self.put(event.token.pause)

    def is_capturing(self):
        """Never."""
        return False

    def synchronize(self):
        """Wait until all is done."""
        event = Event()
        event.record(self)
        event.synchronize()


class Event:
    """An event of either library."""

    def __init__(self, disable_timing=True):
        self.token = None

    def record(self, stream):
        """Stand for all that is on a stream now."""
        assert not stream.is_default or stream.gpus.device == stream.device
        self.token = Token()
        stream.put(self.token.set)

    @property
    def done(self):
        """Whether it has come to pass."""
        return self.token.is_set()

    def synchronize(self):
        """Wait for it."""
        self.token.pause()


class CuPyArray(np.ndarray):
    """An array of CuPy's; what is assigned to it is assigned on the current stream."""

    gpus: Gpus
    device_id = 0

    def __array_finalize__(self, other):
        self.device_id = getattr(other, "device_id", 0)

    @property
    def device(self):
        """With its number as `id`."""
        return types.SimpleNamespace(id=self.device_id)

    @property
    def data(self):
        """Its memory."""
        address = self.__array_interface__["data"][0]
        return types.SimpleNamespace(ptr=address, copy_from_device_async=self._copy, array=self)

    def _copy(self, source, n_bytes, stream):
        assert n_bytes == self.nbytes == source.array.nbytes
        into, array = self.view(np.ndarray), source.array.view(np.ndarray)
        stream.put(lambda: np.copyto(into, array))

    def __setitem__(self, where, value):
        into = self.view(np.ndarray)
        value = value.view(np.ndarray) if isinstance(value, np.ndarray) else value
        put = np.ndarray.__setitem__
        self.gpus.current(self.device_id).put(lambda: put(into, where, value))


CuPyArray.__module__ = "cupy"


class NcclError(RuntimeError):
    """CuPy's."""


class Hub:
    """What the ranks of a group of NCCL share."""

    def __init__(self, size: int):
        self.size = size
        pairs = [(a, b) for a in range(size) for b in range(size)]
        self.mail = {pair: queue.Queue() for pair in pairs}
        self.gathered = {pair: queue.Queue() for pair in pairs}


class NcclCommunicator:
    """CuPy's, as far as numflash calls it."""

    def __init__(self, gpus: Gpus, hub: Hub, rank: int, device: int):
        self._gpus, self._hub, self._rank, self._device = gpus, hub, rank, device
        self.aborted, self.error, self.groups = threading.Event(), None, []

    def device_id(self):
        """Of its GPU."""
        return self._device

    def rank_id(self):
        """Of this rank."""
        return self._rank

    def size(self):
        """How many ranks there are."""
        return self._hub.size

    def check_async_error(self):
        """Raise the error that a test has set."""
        if self.error:
            raise NcclError(self.error)

    def abort(self):
        """End what waits."""
        self.aborted.set()

    def send(self, pointer, count, kind, peer, stream):
        """One of a group."""
        self._add("send", pointer, count, kind, peer, stream)

    def recv(self, pointer, count, kind, peer, stream):
        """One of a group."""
        self._add("recv", pointer, count, kind, peer, stream)

    def allGather(self, source, target, count, kind, stream):
        """By messages of another kind."""
        assert kind == "uint8"
        mail, stream = self._hub.gathered, self._gpus.by_pointer[self._device, stream]
        targets = [_memory(target + n * count, count) for n in range(self._hub.size)]

        def run():
            for peer in range(self._hub.size):
                mail[self._rank, peer].put(_memory(source, count).copy())
            for peer, into in enumerate(targets):
                self._take(mail[peer, self._rank], into)

        stream.put(run)

    def _add(self, verb, pointer, count, kind, peer, stream):
        assert kind == "uint8" and self._gpus.device == self._device
        if self.aborted.is_set():
            raise NcclError("NCCL_ERROR_INVALID_ARGUMENT")
        self._gpus.of_thread.group.append((self, verb, _memory(pointer, count), peer, stream))

    def post(self, operations):
        """Put the operations of a group on their stream."""
        self.groups.append(len(operations))
        mail, stream = self._hub.mail, self._gpus.by_pointer[self._device, operations[0][-1]]

        def run():
            for _, verb, memory, peer, _ in operations:
                if verb == "send":
                    mail[self._rank, peer].put(memory.copy())
            for _, verb, memory, peer, _ in operations:
                if verb == "recv":
                    self._take(mail[peer, self._rank], memory)

        stream.put(run)

    def _take(self, box, into):
        while not self.aborted.is_set():
            try:
                into[:] = box.get(timeout=0.01)
                return
            except queue.Empty:
                continue


def _memory(pointer, count):
    return np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(pointer))


def fake_cupy(gpus: Gpus) -> types.ModuleType:
    """A module `cupy`, with `cupy.cuda.nccl`."""
    cupy = types.ModuleType("cupy")
    cupy.ndarray = type("ndarray", (CuPyArray,), {"gpus": gpus, "__module__": "cupy"})

    def made(array):
        found = array.view(cupy.ndarray)
        found.device_id = gpus.device
        return found

    def asnumpy(array):
        gpus.current(array.device_id).synchronize()
        return np.array(array.view(np.ndarray))

    cupy.empty = lambda shape, dtype: made(np.full(shape, 99, dtype))
    cupy.asarray = lambda array: made(np.array(array))
    cupy.ascontiguousarray = lambda array: array
    cupy.asnumpy = asnumpy

    class Device:
        def __init__(self, device):
            self.device = device

        def use(self):
            gpus.of_thread.device = self.device

        def __enter__(self):
            self.before = gpus.device
            self.use()

        def __exit__(self, *_):
            gpus.of_thread.device = self.before

    def group_start():
        gpus.of_thread.group = []

    def group_end():
        group = gpus.of_thread.group
        if group:
            group[0][0].post(group)

    nccl = types.SimpleNamespace(
        NCCL_UINT8="uint8", NcclError=NcclError, groupStart=group_start, groupEnd=group_end
    )
    cupy.cuda = types.SimpleNamespace(
        Device=Device,
        Event=Event,
        Stream=lambda non_blocking: Stream(gpus, gpus.device),
        get_current_stream=gpus.current,
        nccl=nccl,
    )
    return cupy


def fake_torch(gpus: Gpus) -> types.ModuleType:
    """A module `torch`, whose tensors are of uint8 and on CUDA devices."""
    torch = types.ModuleType("torch")

    class Tensor:
        is_cuda = True

        def __init__(self, array, device):
            self.array, self.device, self.nbytes = array, device, array.nbytes

        def copy_(self, other, non_blocking):
            assert non_blocking
            # PyTorch copies on the current stream of the source's device.
            there, here = gpus.current(other.device), gpus.current(self.device)
            before, behind = Event(), Event()
            with gpus.on(self.device):
                before.record(here)
            with gpus.on(other.device):
                there.wait_event(before)
                there.put(lambda: np.copyto(self.array, other.array))
                behind.record(there)
            with gpus.on(self.device):
                here.wait_event(behind)

    class EventOfTorch(Event):
        def record(self, stream):
            with gpus.on(stream.device):
                super().record(stream)

    class StreamOfTorch(Stream):
        """Knows its device by itself."""

    def current_stream(device):
        stream = gpus.current(device)
        return types.SimpleNamespace(
            wait_event=lambda event: _waited(gpus, stream, event),
            put=stream.put,
            device=device,
            gpus=gpus,
            is_default=stream.is_default,
        )

    torch.Tensor = Tensor
    torch.cuda = types.SimpleNamespace(
        Event=EventOfTorch,
        Stream=lambda device: StreamOfTorch(gpus, device),
        current_stream=current_stream,
        stream=gpus.within,
    )
    return torch


def _waited(gpus, stream, event):
    with gpus.on(stream.device):
        stream.wait_event(event)


def install(monkeypatch, name: str):
    """A fake "cupy" or "torch" in place of the library; returns (its GPUs, the module)."""
    gpus = Gpus()
    module = {"cupy": fake_cupy, "torch": fake_torch}[name](gpus)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("numflash.distributed.arrays.SIMULATED", False)
    return gpus, module
