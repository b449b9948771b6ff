"""Calls and plans: results, launches and kept memory, with libraries and the driver stubbed."""

import gc
import sys
import threading
import time
import timeit
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import numflash
from numflash.runtime.mode import SIMULATED
from tests.host.numflash.test_launch_stubbed import stream_with, strides
from tests.support import fake_gpu
from tests.support.fake_gpu import DV, SK, SQ, B, D, H

pytestmark = pytest.mark.skipif(SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM unset")


def test_nothing_is_launched_for_empty_results(gpu, qkv):
    _, k, v = qkv
    none = gpu.array((0, SQ, H, D))
    out, lse = numflash.attention(none, none, none, return_lse=True)
    assert (out.shape, lse.shape) == ((0, SQ, H, D), (0, H, SQ))
    out, lse = numflash.attention(gpu.array((B, 0, H, D)), k, v, return_lse=True)
    assert (out.shape, lse.shape) == ((B, 0, H, DV), (B, H, 0))
    assert numflash.plan(none, none, none).launch().shape == none.shape
    numflash.attention_backward(none, none, none, none, none, gpu.array((0, H, SQ), "float32"))
    assert gpu.driver.calls == []


def test_zeros_are_written_where_there_is_no_key(gpu):
    q, none = gpu.array((B, SQ, H, D)), gpu.array((B, 0, H, D))
    out, lse = numflash.attention(q, none, none, return_lse=True)
    assert [run.family for run in gpu.driver.launches] == ["forward"]
    gpu.driver.launches.clear()
    _, dk, _ = numflash.attention_backward(out, q, none, none, out, lse)
    assert [run.family for run in gpu.driver.launches] == ["delta", "backward-dq"]
    assert dk.shape == none.shape
    # And no query: dK and dV are zeros.
    gpu.driver.launches.clear()
    lse = gpu.array((B, H, 0), "float32")
    numflash.attention_backward(none, none, q, q, none, lse)
    assert [run.family for run in gpu.driver.launches] == ["backward-dkdv"]


def test_cupy_arrays_give_cupy_arrays(gpu, qkv):
    out, lse = numflash.attention(*qkv, return_lse=True)
    assert type(out) is type(lse) is gpu.cupy.ndarray
    assert (out.shape, out.dtype) == ((B, SQ, H, DV), np.float16)
    assert (lse.shape, lse.dtype) == ((B, H, SQ), np.float32)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_torch_tensors_give_torch_tensors_from_torchs_pool_and_stream(gpu, dtype):
    q, k, v = (gpu.tensor((B, s, H, D), dtype, ("cuda", 1)) for s in (SQ, SK, SK))
    gpu.driver.device = 1
    out, lse = numflash.attention(q, k, v, return_lse=True)
    assert isinstance(out, gpu.torch.Tensor) and isinstance(lse, gpu.torch.Tensor)
    assert out.dtype is getattr(gpu.torch, dtype) and lse.dtype is gpu.torch.float32
    assert out.device.index == lse.device.index == 1
    assert gpu.torch.allocations == [(0x6000, 1)] * 2 and gpu.cupy.allocations == []
    (run,) = gpu.driver.launches
    assert (run.stream, run.arguments["q"]) == (0x6000, q.data_ptr())
    numflash.attention(q, k, v, stream=0xABC0)
    assert gpu.torch.allocations[2:] == [(0xABC0, 1)] * 2
    assert gpu.driver.launches[-1].stream == 0xABC0


def test_arrays_of_other_libraries_are_seen_through_cupy_and_given_back(gpu):
    class Namespace:
        @staticmethod
        def from_dlpack(array):
            return Foreign(array)

    class Foreign:
        def __init__(self, seen):
            self.seen = seen

        def __dlpack_device__(self):
            return 2, 0

        def __dlpack__(self):
            return self.seen

        def __array_namespace__(self):
            return Namespace

    q = Foreign(gpu.array((B, SQ, H, D)))
    for _ in range(2):
        out, lse = numflash.attention(q, q, q, return_lse=True)
        assert isinstance(out, Foreign) and isinstance(lse, Foreign)
        assert gpu.driver.launches[-1].arguments["q"] == q.seen.data.ptr
        assert gpu.driver.launches[-1].arguments["out"] == out.seen.data.ptr


def test_cuda_array_interface_alone_is_enough(gpu):
    class Foreign:
        __cuda_array_interface__ = None

        def __init__(self, seen):
            self.as_cupy = seen

    q = Foreign(gpu.array((B, SQ, H, D)))
    out = numflash.attention(q, q, q)
    assert type(out) is gpu.cupy.ndarray
    assert gpu.driver.launches[-1].arguments["q"] == q.as_cupy.data.ptr


@pytest.mark.parametrize("current", [1, None], ids=["another-device", "no-context"])
def test_another_current_context_is_put_aside_for_the_launch(gpu, qkv, current):
    gpu.driver.device = current
    numflash.attention(*qkv)
    assert gpu.driver.calls[-3:] == [
        ("cuCtxPushCurrent", 0xC0),
        ("cuLaunchKernel", gpu.driver.kernels[0]),
        ("cuCtxPopCurrent",),
    ]


def test_results_lie_on_the_device_of_the_inputs(gpu):
    q = gpu.array((B, SQ, H, D), device=1)
    spread = gpu.array((B, SQ, H, 2 * D), device=1)[..., ::2]
    out, lse = numflash.attention(q, q, spread, return_lse=True, stream=0xABC0)
    assert out.data.device_id == lse.data.device_id == 1
    assert gpu.cupy.allocations == [(0xABC0, 1)] * 3
    assert gpu.cupy.current.device == 0
    numflash.attention(q, q, q)
    assert gpu.driver.launches[-1].stream == 0x5000
    assert ("cuCtxPushCurrent", 0xC1) in gpu.driver.calls


@pytest.mark.parametrize("current", [0, 1])
def test_a_driver_error_has_the_drivers_name_and_leaves_the_context_alone(gpu, qkv, current):
    gpu.driver.device = current
    gpu.driver.launch_status = fake_gpu.Status(2)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        numflash.attention(*qkv)
    names = [name for name, *_ in gpu.driver.calls]
    # The one for loading, the other for the launch.
    assert names.count("cuCtxPushCurrent") == names.count("cuCtxPopCurrent") == 2 * current
    assert gpu.driver.device == current


def test_the_driver_is_asked_for_nothing_but_launches_once_a_kernel_is_loaded(gpu, qkv):
    numflash.attention(*qkv)
    gpu.driver.calls.clear()
    numflash.attention(*qkv)
    assert [name for name, *_ in gpu.driver.calls] == ["cuLaunchKernel"]
    # The stub has no synchronisation at all: to ask for one is an error.
    with pytest.raises(AttributeError):
        gpu.driver.cuStreamSynchronize  # noqa: B018
    with pytest.raises(AttributeError):
        gpu.cupy.cuda.Stream  # noqa: B018


def test_another_shape_does_not_find_the_launch_of_the_first(gpu, qkv):
    q, k, v = qkv
    numflash.attention(q, k, v)
    numflash.attention(q[:, : SQ // 2], k, v)
    numflash.attention(q, k, v, causal=True)
    first, second, third = gpu.driver.launches
    assert (first.arguments["shape.seqlen_q"], second.arguments["shape.seqlen_q"]) == (SQ, SQ // 2)
    assert first.arguments["mask.hi"] != third.arguments["mask.hi"]


def test_out_is_written_in_place(gpu, qkv):
    whole = gpu.array((B, SQ, 3, DV, H))
    out = whole.transpose(0, 1, 4, 2, 3)[..., 1, :]
    assert out.shape == (B, SQ, H, DV) and strides(out)[-1] == H
    with pytest.raises(ValueError, match="out must have a contiguous last axis"):
        numflash.attention(*qkv, out=out)
    out = gpu.array((B, SQ, 3, H, DV))[:, :, 1]
    for array in (out, gpu.array(out.shape)):
        assert numflash.attention(*qkv, out=array) is array
        run = gpu.driver.launches[-1]
        assert run.arguments["out"] == array.data.ptr
        assert run.arguments["out.row"] == strides(array)[1]


def test_a_plan_repeats_its_launch_with_the_same_addresses(gpu, qkv):
    plan = numflash.plan(*qkv, causal=True)
    assert gpu.driver.launches == []
    numflash.attention(*qkv, causal=True)  # the same kernel, with other results
    allocations = len(gpu.cupy.allocations)
    assert plan.launch() is plan.out
    assert plan.launch(stream=stream_with(ptr=0xABC0)) is plan.out
    other, first, second = gpu.driver.launches
    assert first.arguments == second.arguments
    assert first.arguments["out"] == plan.out.data.ptr != other.arguments["out"]
    assert first.arguments["lse"] == plan.lse.data.ptr
    assert (first.stream, second.stream) == (0x5000, 0xABC0)
    assert len(gpu.cupy.allocations) == allocations
    assert plan.kernel == f"forward {first.config} float16-d64-dv96-vec"
    assert numflash.plan(*qkv, stream=0xABC0).launch() is not plan.out
    assert gpu.driver.launches[-1].stream == 0xABC0


def test_a_plan_keeps_its_arrays_alive(gpu):
    def keepers():
        gc.collect()
        return sum(isinstance(x, gpu.cupy.ndarray) for x in gc.get_objects())

    before = keepers()
    plan = numflash.plan(*(gpu.array((B, SK, H, D)) for _ in range(3)))
    assert keepers() - before == 5
    del plan
    assert keepers() == before


def test_threads_do_not_mix_their_arguments(gpu, qkv, monkeypatch):
    launch_kernel = fake_gpu.Driver.cuLaunchKernel

    def slow(driver, *arguments):
        time.sleep(1e-3)  # other threads run before the arguments are read
        return launch_kernel(driver, *arguments)

    monkeypatch.setattr(fake_gpu.Driver, "cuLaunchKernel", slow)
    plans = [numflash.plan(*qkv) for _ in range(4)]
    threads = [threading.Thread(target=lambda p=p: [p.launch() for _ in range(5)]) for p in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    launched = Counter(run.arguments["out"] for run in gpu.driver.launches)
    assert launched == {plan.out.data.ptr: 5 for plan in plans}
    lse_of = {plan.out.data.ptr: plan.lse.data.ptr for plan in plans}
    for run in gpu.driver.launches:
        assert run.arguments["lse"] == lse_of[run.arguments["out"]]


# The walk of a call


def visits(room: str, call) -> list[str]:
    """The functions by which a call enters a room of numflash, in order."""
    folder, depth, found = str(Path(numflash.__file__).parent / room), 0, []

    def note(frame, event, _):
        nonlocal depth
        if event in ("call", "return") and frame.f_code.co_filename.startswith(folder):
            if event == "call" and depth == 0:
                found.append(frame.f_code.co_name)
            depth += 1 if event == "call" else -1

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("config", [None, "sm80-m64n64w4s1x2", {"combine": "w8"}])
def test_a_call_selects_once_and_an_equal_one_not_at_all(hopper, config):
    few, many = hopper.array((1, 1, H, D)), hopper.array((1, 65536, H, D))
    out, lse = numflash.attention(few, many, many, return_lse=True)

    def forward():
        numflash.attention(few, many, many, config=config, causal=True)

    def backward():
        numflash.attention_backward(out, few, many, many, out, lse)

    # One kernel makes these gradients, and the heads whose blocks take turns are counted once.
    for call, counted in ((forward, []), (backward, ["heads_of_backward"])):
        # `generation` tells whether what is ready is still what would be selected.
        assert visits("selection", call) == ["generation", "select", *counted]
        assert visits("selection", call) == ["generation"]


@pytest.mark.parametrize(("precision", "forwards"), [("fp8", 1), ("auto", 2)])
def test_a_call_on_8_bit_floats_selects_once_for_each_forward(hopper, precision, forwards):
    q = hopper.array((B, SQ, H, D))
    found = visits("selection", lambda: numflash.attention(q, q, q, precision=precision))
    assert found == ["generation", *["select"] * forwards]


# Host time of this process alone: the machine may be busy. The limits leave room for a slow one.
PROMISED_CALL_US, PROMISED_LAUNCH_US, ROOM = 25, 8, 4


def _microseconds(call) -> float:
    return min(timeit.repeat(call, number=200, repeat=10, timer=time.process_time)) / 200 * 1e6


@pytest.fixture
def silent(gpu, monkeypatch):
    """The fake machine with a driver that does not even record."""
    status = (fake_gpu.OK,)
    monkeypatch.setattr(fake_gpu.Driver, "cuLaunchKernel", lambda self, *_: status)
    return gpu


def test_a_warm_call_costs_little_host_time(silent, qkv):
    numflash.attention(*qkv)
    assert _microseconds(lambda: numflash.attention(*qkv)) < ROOM * PROMISED_CALL_US


def test_a_planned_launch_costs_little_host_time(silent, qkv):
    assert _microseconds(numflash.plan(*qkv).launch) < ROOM * PROMISED_LAUNCH_US
