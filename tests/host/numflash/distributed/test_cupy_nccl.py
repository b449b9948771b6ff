"""CuPy's NCCL as a communicator: on threads that stand for GPUs, with NCCL's ranks among them.

No GPU has run this: what is shown is the order of streams, what NCCL is asked, and the faults.
"""

import gc
import time
import types

import numpy as np
import pytest

from numflash.distributed.agreement import agree
from numflash.distributed.communicators import CommunicatorError
from numflash.distributed.communicators.cupy_nccl import of_cupy
from tests.host.numflash.distributed.test_agreement import on_ranks
from tests.support import fake_streams

LATE = 0.1


class World:
    """Some ranks, one device each, and their communicators."""

    def __init__(self, monkeypatch, size, **options):
        self.gpus, self.cupy = fake_streams.install(monkeypatch, "cupy")
        hub = fake_streams.Hub(size)
        self.nccl = [
            fake_streams.NcclCommunicator(self.gpus, hub, rank, rank) for rank in range(size)
        ]
        self.comms = [of_cupy(each, **options) for each in self.nccl]

    def array(self, *values):
        """A CuPy array of bytes on the current device."""
        return self.cupy.asarray(np.array(values, "uint8"))

    def on_ranks(self, work):
        """Run work on the device of each rank, whose current stream is a new one."""

        def run(comm):
            with self.gpus.on(comm.rank):
                stream = fake_streams.Stream(self.gpus, comm.rank)
                with self.gpus.within(stream):
                    return work(comm, stream)

        return on_ranks(len(self.comms), run, self.comms)


def test_messages_are_behind_kernels_and_before_the_next(monkeypatch):
    world = World(monkeypatch, 3)

    def work(comm, stream):
        sent, into, seen = world.array(0, 0), world.array(0, 0), []
        memory, filled = (x.view(np.ndarray) for x in (sent, into))
        there, back = (comm.rank + 1) % 3, (comm.rank - 1) % 3

        def write(value):
            time.sleep(LATE)
            memory[:] = value

        stream.put(lambda: write(comm.rank + 5))
        wait = comm.exchange([(sent, there)], [(into, back)], "step")
        wait()
        stream.put(lambda: seen.append(filled.tolist()))
        stream.put(lambda: write(99))
        wait()
        stream.synchronize()
        return seen

    assert world.on_ranks(work) == [[[7, 7]], [[5, 5]], [[6, 6]]]


def test_no_host_waits_for_a_gpu(monkeypatch):
    world = World(monkeypatch, 2)

    def work(comm, stream):
        stream.put(lambda: time.sleep(1.0))
        began = time.monotonic()
        sent, into = world.array(1), world.array(0)
        comm.exchange([(sent, 1 - comm.rank)], [(into, 1 - comm.rank)], "step")()
        whole = comm.all_gather(sent, "step")
        took = time.monotonic() - began
        return took, world.cupy.asnumpy(whole).tolist(), into.view(np.ndarray).tolist()

    for took, whole, into in world.on_ranks(work):
        assert took < 0.8 and whole == [[1], [1]] and into == [1]


def test_messages_are_posted_in_groups_of_what_nccl_takes(monkeypatch):
    world = World(monkeypatch, 2)

    def work(comm, stream):
        sent = [world.array(n % 250, comm.rank) for n in range(300)]
        into = [world.array(0, 0) for _ in range(300)]
        nothing = world.array()
        other = 1 - comm.rank
        sends, receives = [(x, other) for x in sent], [(x, other) for x in into]
        comm.exchange([*sends, (nothing, other)], [*receives, (nothing, other)], "many")()
        comm.exchange([(nothing, other)], [(nothing, other)], "none")()
        stream.synchronize()
        return [x.view(np.ndarray).tolist() for x in into]

    found = world.on_ranks(work)
    assert found == [[[n % 250, rank] for n in range(300)] for rank in (1, 0)]
    assert [comm.groups for comm in world.nccl] == [[256, 256, 88]] * 2


def test_texts_are_compared_and_agreements_are_remembered(monkeypatch):
    world = World(monkeypatch, 3)

    def work(comm, stream):
        found = [comm.agree("same"), comm.agree("ä" * (comm.rank + 1))]
        agree(comm, "attention", {"causal": True}, lambda: None)
        try:
            agree(comm, "decode", {"causal": comm.rank == 1}, lambda: None)
        except ValueError as error:
            return found, str(error)

    texts = [None, ["ä", "ää", "äää"]]
    expected = "all ranks must ask for the same: causal: rank 1 has True where ranks 0 and 2 have"
    assert world.on_ranks(work) == [(texts, f"{expected} False")] * 3


def expect_broken(comm, *words):
    """Each call says why."""
    for call in (
        lambda: comm.exchange([], [], "next"),
        lambda: comm.all_gather(None, "next"),
        lambda: comm.agree("next"),
    ):
        with pytest.raises(CommunicatorError) as error:
            call()
        for word in ("cannot be used any more after a fault", *words):
            assert word in str(error.value)


def waited_for(is_so):
    """Wait a while until it is so."""
    end = time.monotonic() + 10
    while not is_so() and time.monotonic() < end:
        time.sleep(0.01)
    return is_so()


def test_a_peer_that_never_comes_ends_in_an_abort(monkeypatch):
    world = World(monkeypatch, 2, timeout=0.3)
    comm, nccl = world.comms[0], world.nccl[0]
    began = time.monotonic()
    wait = comm.exchange([], [(world.array(0, 0, 0), 1)], "ring step 2 of 4")
    wait()
    assert time.monotonic() - began < 0.3 and waited_for(nccl.aborted.is_set)
    world.gpus.current(0).synchronize()  # goes on
    words = "ring step 2 of 4: 3 bytes from rank 1: not done within 0.3 s"
    expect_broken(comm, words)
    with pytest.raises(CommunicatorError, match=words):
        wait()


def test_the_deadline_runs_from_when_messages_can_start(monkeypatch):
    """A long kernel before them is no fault."""
    world = World(monkeypatch, 2, timeout=0.3)

    def work(comm, stream):
        stream.put(lambda: time.sleep(0.7))
        into = world.array(0)
        comm.exchange([(world.array(3), 1 - comm.rank)], [(into, 1 - comm.rank)], "step")()
        stream.synchronize()
        comm.exchange([], [], "next")
        return into.view(np.ndarray).tolist()

    assert world.on_ranks(work) == [[3], [3]]


def test_a_host_that_waits_for_a_peer_within_nccl_is_freed(monkeypatch):
    world = World(monkeypatch, 2, timeout=0.2)
    comm, nccl = world.comms[0], world.nccl[0]

    def post(operations):
        assert nccl.aborted.wait(10)
        raise fake_streams.NcclError("NCCL_ERROR_INTERNAL_ERROR")

    nccl.post = post
    with pytest.raises(
        CommunicatorError, match=r"step: 1 bytes to rank 1: not done within 0\.2 s"
    ):
        comm.exchange([(world.array(1), 1)], [], "step")
    expect_broken(comm, "not done within 0.2 s")


def test_an_agreement_that_nobody_comes_to(monkeypatch):
    world = World(monkeypatch, 2, timeout=0.2)
    with pytest.raises(CommunicatorError, match="32 bytes from each rank: not done within"):
        world.comms[0].agree("text")


def test_errors_of_nccl_are_faults(monkeypatch):
    world = World(monkeypatch, 2, timeout=30.0)
    first, second = world.comms
    first.exchange([], [(world.array(0), 1)], "step")
    world.nccl[0].error = "NCCL_ERROR_SYSTEM_ERROR"
    assert waited_for(world.nccl[0].aborted.is_set)
    expect_broken(first, "step: 1 bytes from rank 1: NCCL_ERROR_SYSTEM_ERROR")
    world.nccl[1].aborted.set()
    with world.gpus.on(1):
        with pytest.raises(CommunicatorError, match="step: 1 bytes to rank 0: NCCL_ERROR_INVALID"):
            second.exchange([(world.array(0), 0)], [], "step")
        expect_broken(second, "NCCL_ERROR_INVALID_ARGUMENT")


def test_a_graph_being_captured_is_not_watched(monkeypatch):
    world = World(monkeypatch, 2, timeout=0.1)
    monkeypatch.setattr(fake_streams.Stream, "is_capturing", lambda self: True)
    world.comms[0].exchange([], [(world.array(0), 1)], "step")()
    time.sleep(0.3)
    assert not world.nccl[0].aborted.is_set()
    world.nccl[0].abort()


def test_no_thread_watches_without_a_deadline_or_after_the_end(monkeypatch):
    world = World(monkeypatch, 1, timeout=None)
    world.comms[0].all_gather(world.array(1), "step")
    assert world.comms[0]._watch._thread is None
    world = World(monkeypatch, 1)
    world.comms[0].all_gather(world.array(1), "step")
    thread = world.comms.pop()._watch._thread
    gc.collect()
    assert waited_for(lambda: not thread.is_alive())


def test_wrong_arrays_and_peers_are_no_faults(monkeypatch):
    world = World(monkeypatch, 2)
    (comm, _), array = world.comms, world.array(1)
    with pytest.raises(
        TypeError, match=r"step: CuPy's NCCL moves CuPy arrays, got numpy\.ndarray"
    ):
        comm.exchange([(np.zeros(1, "uint8"), 1)], [], "step")
    with pytest.raises(ValueError, match="step: no rank 2 among 2"):
        comm.exchange([], [(array, 2)], "step")
    with world.gpus.on(1), pytest.raises(ValueError, match=r"on device 0.*got one on device 1"):
        comm.all_gather(world.array(1), "step")
    comm.exchange([], [], "step")()


def test_what_a_communicator_is_made_of(monkeypatch):
    world = World(monkeypatch, 2)
    backend = types.SimpleNamespace(_comm=world.nccl[1], rank=1)
    for given in (world.nccl[1], backend):
        comm = of_cupy(given, 1, 2)
        assert (comm.rank, comm.size) == (1, 2)
    for more, words in (
        ({"rank": 0}, "rank must be 1"),
        ({"size": 3}, "size must be 2"),
        ({"timeout": 0}, "timeout must be positive"),
    ):
        with pytest.raises(ValueError, match=words):
            of_cupy(world.nccl[1], **more)
    with pytest.raises(TypeError, match="must be a NcclCommunicator or a NCCLBackend"):
        of_cupy(object())
