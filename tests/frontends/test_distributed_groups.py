"""What a group of torch.distributed is asked, in one process; two are in `..._gloo_faults`."""

import sys
import types

import numpy as np
import pytest

from numflash import UnsupportedError
from numflash.distributed import CommunicatorError, of_torch

torch = pytest.importorskip("torch", reason="needs torch")
dist = pytest.importorskip("torch.distributed")


@pytest.fixture
def group():
    """A process group of one rank."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    device = torch.device("cuda", 1)
    is_cuda = True

    @classmethod
    def of(cls, size):
        """Of so many bytes."""
        return torch.Tensor._make_subclass(cls, torch.zeros(size, dtype=torch.uint8))


class Asked:
    """In place of torch.distributed: what it is asked, and works that are already over."""

    isend, irecv = "send", "receive"

    def __init__(self, is_coalesced, error=None):
        self.is_coalesced, self.error, self.groups, self.waits = is_coalesced, error, [], []

    def P2POp(self, verb, tensor, peer, group):
        """One operation."""
        return verb, tensor.nbytes, peer

    def batch_isend_irecv(self, operations):
        """A work for each, or one for all as NCCL has."""
        self.groups.append(operations)
        return [self] * (1 if self.is_coalesced else len(operations))

    def wait(self, *timeout):
        """Of a work."""
        self.waits.append(timeout)
        if self.error:
            raise RuntimeError(self.error)


@pytest.fixture
def third_of_four(group, monkeypatch):
    """Makes a communicator of rank 2 of 4, which is another number outside of its group."""

    def made(asked, backends="cpu:gloo,cuda:nccl", **more):
        monkeypatch.setattr(dist, "get_rank", lambda group: 2)
        monkeypatch.setattr(dist, "get_world_size", lambda group: 4)
        monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [3, 5, 7, 9])
        monkeypatch.setattr(dist, "get_backend_config", lambda group: backends)
        comm = of_torch(group, **more)
        comm._dist = asked
        return comm

    return made


def test_peers_are_ranks_of_the_group(third_of_four):
    asked = Asked(is_coalesced=False)
    comm = third_of_four(asked)
    arrays = [np.zeros(n, "uint8") for n in range(4)]
    assert (comm.rank, comm.size) == (2, 4)
    sends = [(arrays[3], 1), (arrays[0], 0), (arrays[1], 3)]
    comm.exchange(sends, [(arrays[2], 0), (arrays[0], 1)], "step")()
    assert asked.groups == [[("send", 3, 5), ("send", 1, 9), ("receive", 2, 3)]]
    assert len(asked.waits) == 3
    comm.exchange([], [(arrays[0], 1)], "nothing")()
    assert len(asked.groups) == 1


def test_only_waits_that_block_anyway_get_a_time(third_of_four):
    """NCCL's would block the host."""
    asked = Asked(is_coalesced=True)
    comm = third_of_four(asked, timeout=5.0)
    comm.exchange([(OnGpu.of(3), 0)], [(OnGpu.of(3), 1)], "step")()
    assert asked.waits == [()]
    comm.exchange([(np.zeros(3, "uint8"), 0)], [], "step")()
    (limit,) = asked.waits[1]
    assert 4 < limit.total_seconds() <= 5


def test_the_one_work_of_many_messages_names_them_all(third_of_four):
    comm = third_of_four(Asked(is_coalesced=True, error="watchdog"))
    wait = comm.exchange([(OnGpu.of(3), 0)], [(OnGpu.of(4), 1)], "step 2")
    with pytest.raises(CommunicatorError) as error:
        wait()
    expected = "step 2: 3 bytes to rank 0, 4 bytes from rank 1: did not come through: watchdog"
    assert str(error.value) == expected
    for call in (wait, lambda: comm.exchange([], [], "next"), lambda: comm.agree("text")):
        with pytest.raises(
            CommunicatorError, match="cannot be used any more after a fault: step 2"
        ):
            call()


def test_gloo_is_asked_for_nothing_on_gpus(third_of_four):
    comm = third_of_four(Asked(False), "cpu:gloo,cuda:gloo")
    for work in (
        lambda: comm.exchange([(OnGpu.of(3), 0)], [], "step"),
        lambda: comm.exchange([], [(OnGpu.of(3), 0)], "step"),
    ):
        with pytest.raises(UnsupportedError) as error:
            work()
        assert str(error.value) == (
            "step: the process group moves no tensors on cuda:1; it has gloo for cpu, gloo for "
            "cuda, and gloo moves messages on the CPU only"
        )


def test_a_device_without_a_back_end(group):
    meta = torch.zeros(3, dtype=torch.uint8, device="meta")
    with pytest.raises(UnsupportedError, match="moves no tensors on meta"):
        of_torch(group).all_gather(meta, "step")


def test_groups_that_are_none(group):
    comm = of_torch()
    assert (comm.rank, comm.size, comm.agree("text")) == (0, 1, None)
    assert comm.all_gather(np.ones((2, 2), "float16"), "step").tolist() == [[[1, 1], [1, 1]]]
    with pytest.raises(TypeError, match="group must be a ProcessGroup"):
        of_torch(types.SimpleNamespace())
    with pytest.raises(ValueError, match="group must have this process as a member"):
        of_torch(dist.GroupMember.NON_GROUP_MEMBER)
    with pytest.raises(ValueError, match="timeout must be positive"):
        of_torch(timeout=0.0)


def test_without_torch_distributed_there_is_no_group(monkeypatch):
    with pytest.raises(UnsupportedError, match="there is no process group"):
        of_torch()
    monkeypatch.setitem(sys.modules, "torch.distributed", None)
    with pytest.raises(UnsupportedError, match="there is no process group"):
        of_torch()
