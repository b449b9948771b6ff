"""Attention over ranks on GPUs: threads with streams of their own on one, NCCL over two.

What only a device shows: the order of streams and events. Operands are written late on a rank's
stream, so that a message or a call that does not wait for it has zeros.
"""

import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import numflash
from numflash.distributed import Layout, attention, attention_backward, local, of_cupy
from numflash.runtime.arrays import to_numpy
from tests.support.ranks import on_ranks

ROOT = Path(__file__).parents[2]
SHAPE = 1, 1024, 8, 64
NAMES = "out", "lse", "dq", "dk", "dv"
TOLERANCE = 4e-3


class Cupy:
    """CuPy's arrays and streams."""

    def __init__(self):
        self.cupy = pytest.importorskip("cupy")

    @contextmanager
    def on_a_stream(self, device=0):
        """A rank's own device and stream, at whose end the host waits."""
        with self.cupy.cuda.Device(device), self.cupy.cuda.Stream(non_blocking=True) as stream:
            yield
            stream.synchronize()

    def late(self, array: np.ndarray):
        """The array, written behind other work of the current stream."""
        there, busy = self.cupy.zeros(array.shape, array.dtype), self.cupy.zeros((4096, 4096))
        source = self.cupy.asarray(array)
        for _ in range(20):
            busy += 1
        there[...] = source
        return there


class Torch:
    """PyTorch's tensors and streams."""

    def __init__(self):
        self.torch = pytest.importorskip("torch")
        if not self.torch.cuda.is_available():
            pytest.skip("needs a PyTorch that sees a GPU")

    @contextmanager
    def on_a_stream(self, device=0):
        """As of `Cupy`."""
        cuda = self.torch.cuda
        with cuda.device(device), cuda.stream(cuda.Stream(device)) as _, self.torch.no_grad():
            yield
            cuda.current_stream().synchronize()

    def late(self, array: np.ndarray):
        """As of `Cupy`."""
        source = self.torch.from_numpy(array).cuda()
        there, busy = self.torch.zeros_like(source), self.torch.zeros(4096, 4096, device="cuda")
        for _ in range(20):
            busy += 1
        there.copy_(source)
        return there


@pytest.fixture(params=[Cupy, Torch])
def library(request):
    """Each library that is here, on a GPU."""
    return request.param()


@pytest.fixture(scope="module")
def whole():
    """q, k, v and dout of the whole sequence, on the host; two query heads share a key head."""
    rng = np.random.default_rng(0)
    made = [rng.standard_normal(SHAPE).astype(np.float16) for _ in range(4)]
    for n in (1, 2):
        made[n] = made[n][:, :, ::2].copy()
    return made


@pytest.fixture(scope="module")
def wanted(whole):
    """On one GPU."""
    cupy = pytest.importorskip("cupy")
    q, k, v, dout = map(cupy.asarray, whole)
    out, lse = numflash.attention(q, k, v, causal=True, return_lse=True)
    gradients = numflash.attention_backward(dout, q, k, v, out, lse, causal=True)
    return [to_numpy(x) for x in (out, lse, *gradients)]


def of_rank(library, comm, layout, whole, method, device=0):
    """out, lse and gradients of a rank's tokens, on the host; twice, the second time warm."""
    ranks = {"layout": layout, "comm": comm, "method": method, "causal": True}
    for _ in range(2):
        with library.on_a_stream(device):
            own = (np.ascontiguousarray(layout.shard(x, comm.rank)) for x in whole)
            q, k, v, dout = map(library.late, own)
            out, lse = attention(q, k, v, return_lse=True, **ranks)
            found = out, lse, *attention_backward(dout, q, k, v, out, lse, **ranks)
            found = [to_numpy(x) for x in found]
    return found


def of_all(layout, by_rank):
    """The whole of each result."""
    found = []
    for n, name in enumerate(NAMES):
        axis = 2 if name == "lse" else 1
        order = np.argsort(np.concatenate([layout.indices(r) for r in range(layout.ranks)]))
        found.append(np.concatenate([each[n] for each in by_rank], axis).take(order, axis))
    return found


def expect_close(found, wanted):
    for name, a, b in zip(NAMES, found, wanted, strict=True):
        np.testing.assert_allclose(
            a.astype(np.float32), b.astype(np.float32), TOLERANCE, TOLERANCE, err_msg=name
        )


@pytest.mark.parametrize("method", ["gather", "ring", "heads"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_are_threads_on_one_gpu(library, whole, wanted, method, ranks):
    layout = Layout.zigzag(SHAPE[1], ranks)
    by_rank = on_ranks(ranks, lambda comm: of_rank(library, comm, layout, whole, method))
    expect_close(of_all(layout, by_rank), wanted)


def test_gathering_has_the_bits_of_one_rank(library, whole):
    found = {}
    for ranks in (1, 2, 4):
        layout = Layout.zigzag(SHAPE[1], ranks)
        work = lambda comm: of_rank(library, comm, layout, whole, "gather")  # noqa: B023, E731
        found[ranks] = of_all(layout, on_ranks(ranks, work, local(ranks)))
    for ranks in (2, 4):
        for n in range(2):
            np.testing.assert_array_equal(found[ranks][n], found[1][n], err_msg=NAMES[n])


@pytest.mark.parametrize("method", ["gather", "ring", "heads"])
def test_two_gpus_over_nccl_by_cupy(whole, wanted, method):
    library = Cupy()
    if library.cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    nccl = library.cupy.cuda.nccl
    identity, layout, found = nccl.get_unique_id(), Layout.zigzag(SHAPE[1], 2), {}

    def run(rank):
        with library.cupy.cuda.Device(rank):
            comm = of_cupy(nccl.NcclCommunicator(2, identity, rank), rank=rank, size=2)
            found[rank] = of_rank(library, comm, layout, whole, method, device=rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    expect_close(of_all(layout, [found[0], found[1]]), wanted)


def test_two_gpus_over_nccl_train_as_one_does():
    torch = Torch().torch
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    done = subprocess.run(
        [sys.executable, "examples/train_distributed.py"],
        cwd=ROOT,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
