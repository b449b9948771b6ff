"""Copies between ranks of one process on GPUs: behind what they need, before what needs them.

Kernels are functions that streams get to late: they sleep first.
"""

import threading
import time

import numpy as np
import pytest

from numflash.distributed.communicators.local import local
from tests.host.numflash.distributed.test_agreement import on_ranks
from tests.support import fake_streams

DEVICES = pytest.mark.parametrize("devices", [(0, 0), (0, 1), (1, 1)], ids=str)
LATE = 0.1


@pytest.fixture(params=["cupy", "torch"])
def fake(request, monkeypatch):
    """(name, GPUs, module) of a library."""
    return request.param, *fake_streams.install(monkeypatch, request.param)


def array_on(fake, device, size):
    """(An array of 0, its memory)."""
    name, gpus, module = fake
    memory = np.zeros(size, "uint8")
    if name == "torch":
        return module.Tensor(memory, device), memory
    with gpus.on(device):
        array = module.asarray(memory)
    return array, array.view(np.ndarray)


@DEVICES
@pytest.mark.parametrize("late", ["sender", "receiver", "both"])
def test_messages_wait_for_kernels_and_kernels_for_messages(fake, devices, late):
    """A late kernel writes what is sent, another reads what came, and a third writes again."""
    _, gpus, _ = fake

    def work(comm):
        device, other = devices[comm.rank], 1 - comm.rank
        stream = gpus.current(device) if comm.rank == 0 else fake_streams.Stream(gpus, device)
        (sent, memory), (into, filled) = (array_on(fake, device, 4) for _ in range(2))
        seen, is_late = [], late == "both" or (late == "sender") == (comm.rank == 0)

        def write(value, memory):
            time.sleep(LATE * is_late)
            memory[:] = value

        with gpus.within(stream):
            stream.put(lambda: write(5 + comm.rank, memory))
            stream.put(lambda: write(77, filled))  # what is there before must not come later
            wait = comm.exchange([(sent, other)], [(into, other)], "step")
            began = time.monotonic()
            wait()
            assert not is_late or time.monotonic() - began < LATE  # nobody waits for a GPU
            stream.put(lambda: seen.append(filled.tolist()))
            stream.put(lambda: write(99, memory))  # and what follows must not be sent
        with gpus.on(device):
            stream.synchronize()
        return seen

    assert on_ranks(2, work, local(2, timeout=10.0)) == [[[6] * 4], [[5] * 4]]


@DEVICES
def test_computation_after_a_post_does_not_wait_for_the_message(fake, devices):
    """A message is behind what is posted before it only, so that it travels under computation."""
    _, gpus, _ = fake
    gate, order = threading.Event(), []

    def work(comm):
        device = devices[comm.rank]
        stream = fake_streams.Stream(gpus, device)
        (sent, _), (into, _) = (array_on(fake, device, 4) for _ in range(2))
        with gpus.within(stream):
            if comm.rank == 0:
                stream.put(lambda: gate.wait(5))  # of what it sends
                comm.exchange([(sent, 1)], [], "step")()
            else:
                wait = comm.exchange([], [(into, 0)], "step")
                stream.put(lambda: (order.append("computed"), gate.set()))
                wait()
                stream.put(lambda: order.append("read"))
        with gpus.on(device):
            stream.synchronize()
        return True

    on_ranks(2, work, local(2, timeout=10.0))
    assert order == ["computed", "read"]


def test_arrays_are_gathered_in_the_order_of_streams(monkeypatch):
    gpus, cupy = fake_streams.install(monkeypatch, "cupy")

    def work(comm):
        stream = fake_streams.Stream(gpus, comm.rank % 2)
        with gpus.on(comm.rank % 2), gpus.within(stream):
            array = cupy.asarray(np.zeros((2, 2), "float32"))
            memory = array.view(np.ndarray)
            stream.put(lambda: (time.sleep(LATE), memory.fill(1.5 + comm.rank)))
            whole = comm.all_gather(array, "step")
            return cupy.asnumpy(whole)[:, 1, 1].tolist()

    assert on_ranks(3, work, local(3, timeout=10.0)) == [[1.5, 2.5, 3.5]] * 3
