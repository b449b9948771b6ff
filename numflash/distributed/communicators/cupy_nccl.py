"""CuPy's NcclCommunicator, or the one within its NCCLBackend.

Messages go through a stream of their own, which waits for the arrays' stream by an event, and the
other way round in a wait, so that no host waits for a GPU. NCCL by itself waits for ever: a thread
watches events, and where a message takes too long it aborts the communicator, which ends the
kernels of NCCL that wait. What they should have brought is then garbage, and the next call raises.
"""

import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from numflash.distributed.arrays import Arrays
from numflash.distributed.communicators import (
    Agreed,
    CommunicatorError,
    in_groups,
    texts_that_differ,
)
from numflash.distributed.communicators.ordering import OnCupy

_PAUSE = 0.02
"""Seconds between two looks at an event."""


class _Watched:
    """A group of messages on its way.

    Attributes:
        what: names the step, the peers and the bytes.
        held: arrays that are read or filled.
        ready: the event of what they wait for on this rank.
        done: the event behind them; None while the host posts them, which may wait for peers.
        since: when they could start, in seconds, as far as that was seen.
    """

    def __init__(self, what: str, held: Any, ready: Any):
        self.what, self.held, self.ready = what, held, ready
        self.done: Any = None
        self.since: float | None = time.monotonic()

    def is_over(self) -> bool:
        """Whether all of it has arrived."""
        return self.done is not None and self.done.done

    def late_by(self, timeout: float) -> bool:
        """Whether it has taken longer than that."""
        if self.since is None and self.ready.done:
            self.since = time.monotonic()
        return self.since is not None and time.monotonic() - self.since > timeout

    def posted(self, done: Any) -> None:
        """From now on the GPU is to wait for peers, after its own work."""
        self.since, self.done = None, done


class _Watch:
    """Looks after what is on its way, from a thread of its own; aborts after a fault.

    Nothing is locked: an abort is to end calls of NCCL, too, in which the host waits for a peer.

    Attributes:
        fault: why the communicator cannot be used any more, or None.
    """

    def __init__(self, comm: Any, device: Any, timeout: float | None):
        self.fault: str | None = None
        self._comm, self._device, self._timeout = comm, device, timeout
        self._posted: deque[_Watched] = deque()
        self._some, self._is_over = threading.Event(), False
        self._thread: threading.Thread | None = None

    def add(self, watched: _Watched) -> None:
        """Look after messages."""
        if self._timeout is None:
            return
        self._posted.append(watched)
        self._some.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._is_over = True
        self._some.set()

    def break_off(self, why: str) -> None:
        """Abort the communicator; the first reason stays."""
        if self.fault is None:
            self.fault = why
            self._comm.abort()

    def _look(self) -> None:
        self._device.use()
        while self.fault is None and not self._is_over:
            try:
                watched = self._posted[0]
            except IndexError:
                self._some.wait()
                self._some.clear()
                continue
            try:
                if watched.is_over():
                    self._posted.popleft()
                    continue
                if watched.late_by(self._timeout):
                    self.break_off(f"{watched.what}: not done within {self._timeout:g} s")
                    return
                self._comm.check_async_error()
            except RuntimeError as error:
                self.break_off(f"{watched.what}: {error}")
                return
            time.sleep(_PAUSE)


class CupyNccl:
    """One rank of `of_cupy`; see `Communicator`."""

    def __init__(self, comm: Any, rank: int, size: int, timeout: float | None):
        import cupy

        self.rank, self.size, self.agreed = rank, size, Agreed()
        self._comm, self._nccl, self._cupy = comm, cupy.cuda.nccl, cupy
        self._device = comm.device_id()
        self._ordering = OnCupy()
        self._watch = _Watch(comm, cupy.cuda.Device(self._device), timeout)
        weakref.finalize(self, self._watch.stop)

    def exchange(self, sends, receives, what):
        """See `Communicator`."""
        self._expect_no_fault(what)
        for array, peer in (*sends, *receives):
            self._expect_own(array, what)
            if not 0 <= peer < self.size:
                raise ValueError(f"{what}: no rank {peer} among {self.size}")
        groups = in_groups(sends, receives, self.size)
        done, held = None, [sends, receives]
        if groups:
            ends = [f"{x.nbytes} bytes to rank {peer}" for x, peer in sends if x.nbytes]
            ends += [f"{x.nbytes} bytes from rank {peer}" for x, peer in receives if x.nbytes]
            with self._posting(f"{what}: {', '.join(ends)}", tuple(held)) as (stream, marks):
                for group in groups:
                    self._post(*group, stream)
            done = marks["done"]

        def wait() -> None:
            self._wait(done, what)
            held.clear()  # until here nobody frees what travels

        return wait

    def all_gather(self, array, what):
        """See `Communicator`."""
        self._expect_no_fault(what)
        self._expect_own(array, what)
        arrays = Arrays.of(array, "array")
        whole = arrays.empty((self.size, *array.shape), arrays.dtype_of(array))
        if array.nbytes:
            own = arrays.contiguous(array)
            self._wait(self._gather(own, whole, what), what)
        return whole

    def agree(self, text):
        """See `Communicator`: 32 bytes of each rank, and texts only where those differ."""
        what = "the agreement of ranks"
        self._expect_no_fault(what)
        return texts_that_differ(text, lambda own: self._gather_bytes(own, what))

    def _post(self, sends, receives, stream) -> None:
        """Post one group of messages."""
        kind = self._nccl.NCCL_UINT8
        self._nccl.groupStart()
        try:
            for array, peer in sends:
                self._comm.send(array.data.ptr, array.nbytes, kind, peer, stream.ptr)
            for array, peer in receives:
                self._comm.recv(array.data.ptr, array.nbytes, kind, peer, stream.ptr)
        finally:
            self._nccl.groupEnd()

    def _gather(self, own, whole, what: str):
        """Fill `whole` with the bytes of all ranks; returns the event behind that."""
        name, held = f"{what}: {own.nbytes} bytes from each rank", (own, whole)
        with self._posting(name, held) as (stream, marks):
            kind, pointers = self._nccl.NCCL_UINT8, (own.data.ptr, whole.data.ptr)
            self._comm.allGather(*pointers, own.nbytes, kind, stream.ptr)
        return marks["done"]

    def _gather_bytes(self, own: bytes, what: str) -> list[bytes]:
        """The bytes of all ranks, as many each."""
        with self._cupy.cuda.Device(self._device):
            sent = self._cupy.asarray(np.frombuffer(own, np.uint8))
            whole = self._cupy.empty((self.size, len(own)), np.uint8)
        done = self._gather(sent, whole, what)
        self._wait(done, what)
        done.synchronize()
        self._expect_no_fault(what)
        with self._cupy.cuda.Device(self._device):
            rows = self._cupy.asnumpy(whole)
        return [row.tobytes() for row in rows]

    @contextmanager
    def _posting(self, name: str, held: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The stream of messages, behind the arrays' work, and the events: "done" comes after.

        Raises CommunicatorError for errors of NCCL.
        """
        watch, ordering, marks = self._watch, self._ordering, {}
        with self._cupy.cuda.Device(self._device):
            stream, ready = ordering.stream(self._device), ordering.mark_of(self._device)
            stream.wait_event(ready)
            watched = _Watched(name, held, ready)
            # Events of a graph that is being captured have no state; nobody can watch them.
            if not stream.is_capturing():
                watch.add(watched)
            try:
                yield stream, marks
            except self._nccl.NcclError as error:
                watch.break_off(f"{name}: {error}")
                raise CommunicatorError(watch.fault) from error
            marks["done"] = ordering.recorded(stream)
            watched.posted(marks["done"])

    def _wait(self, done, what: str) -> None:
        """Let what follows on the arrays' stream come after an event."""
        self._expect_no_fault(what)
        if done is not None:
            self._ordering.wait_on(self._device, done)

    def _expect_own(self, array, what: str) -> None:
        if not isinstance(array, self._cupy.ndarray):
            raise TypeError(
                f"{what}: CuPy's NCCL moves CuPy arrays, got "
                f"{type(array).__module__}.{type(array).__qualname__}"
            )
        if array.device.id != self._device:
            raise ValueError(
                f"{what}: arrays must lie on device {self._device}, that of the communicator, got "
                f"one on device {array.device.id}"
            )

    def _expect_no_fault(self, what: str) -> None:
        if (fault := self._watch.fault) is not None:
            raise CommunicatorError(
                f"{what}: the communicator cannot be used any more after a fault: {fault}"
            )


def of_cupy(
    communicator: Any,
    rank: int | None = None,
    size: int | None = None,
    *,
    timeout: float | None = 300.0,
) -> CupyNccl:
    """The communicator of this process, or thread, over CuPy's NCCL.

    Args:
        communicator: a `cupy.cuda.nccl.NcclCommunicator`, or a `cupyx.distributed.NCCLBackend`.
        rank, size: of this process; None: what the communicator says.
        timeout: seconds that messages may take once they can start on this rank. After that the
            communicator is aborted, and the next call raises: until then what did not arrive is
            garbage. None: NCCL waits for ever, and no thread watches. Nobody watches messages of
            a CUDA graph.

    Returns:
        a communicator for CuPy's arrays on the device of the NCCL communicator.

    Raises:
        TypeError: neither of both.
        ValueError: another rank or size than the communicator says; a timeout that is not
            positive.

    Example:
        >>> from numflash.distributed import of_cupy
        >>> try:
        ...     of_cupy("cuda:0")
        ... except TypeError as error:
        ...     print(error)
        communicator must be a NcclCommunicator or a NCCLBackend of CuPy, got 'cuda:0'
    """
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout must be positive or None, got {timeout}")
    comm = getattr(communicator, "_comm", communicator)
    if not all(hasattr(comm, verb) for verb in ("send", "recv", "allGather", "device_id")):
        raise TypeError(
            "communicator must be a NcclCommunicator or a NCCLBackend of CuPy, got "
            f"{communicator!r}"
        )
    given = {"rank": (rank, comm.rank_id()), "size": (size, comm.size())}
    for name, (asked, own) in given.items():
        if asked not in (None, own):
            raise ValueError(f"{name} must be {own}, as of the communicator, got {asked}")
    return CupyNccl(comm, comm.rank_id(), comm.size(), timeout)
