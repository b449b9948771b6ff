"""The way from a call to the CUDA driver, with array libraries and the driver stubbed.

What a GPU would be asked to do is read where the driver would read it: the argument block, the
grid, the stream. See `tests.fake_gpu`.
"""

import ctypes
import gc
import math
import sys
import threading
import time
import timeit
import types
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

import numflash
from numflash.api import plans
from numflash.calls import launch
from numflash.configs import Traits, parse_config
from numflash.machine_code import compiler
from numflash.runtime import driver
from numflash.runtime.mode import SIMULATED
from tests.support import fake_gpu

pytestmark = pytest.mark.skipif(SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM unset")

B, SQ, SK, H, HKV, D, DV = 2, 100, 70, 4, 2, 64, 96


@pytest.fixture
def gpu(monkeypatch):
    """A fake Turing."""
    return fake_gpu.install(monkeypatch)


@pytest.fixture
def hopper(monkeypatch):
    """A fake H200."""
    return fake_gpu.install(monkeypatch, (9, 0), num_sms=132, l2_bytes=50 * 2**20)


@pytest.fixture
def qkv(gpu):
    """Contiguous float16 arrays of the sizes above."""
    return gpu.array((B, SQ, H, D)), gpu.array((B, SK, HKV, D)), gpu.array((B, SK, HKV, DV))


def strides(array) -> tuple[int, ...]:
    return tuple(stride // array.dtype.itemsize for stride in array.strides)


@pytest.mark.parametrize("dtype", ["float32", "float16"], ids=["portable", "tensor-cores"])
def test_forward_arguments_arrive_where_the_driver_reads_them(gpu, dtype):
    q, k, v = (gpu.array(s, dtype) for s in ((B, SQ, H, D), (B, SK, HKV, D), (B, SK, HKV, DV)))
    slopes = gpu.array((B, H), "float32")
    out, lse = numflash.attention(
        q,
        k,
        v,
        softmax_scale=0.25,
        causal=True,
        window_size=(11, 5),
        softcap=8.0,
        alibi_slopes=slopes,
        return_lse=True,
    )
    (run,) = gpu.driver.launches
    expected = {
        "q": q.data.ptr,
        "k": k.data.ptr,
        "v": v.data.ptr,
        "out": out.data.ptr,
        "lse": lse.data.ptr,
        "scores.alibi.slopes": slopes.data.ptr,
        "scores.alibi.batch": H,
        "scores.alibi.head": 1,
        "shape.seqlen_q": SQ,
        "shape.seqlen_k": SK,
        "shape.num_heads_q": H,
        "shape.group_size": 2,
        "shape.head_dim": D,
        "shape.head_dim_v": DV,
        "shape.batch_size": B,
        "mask.lo": SK - SQ - 11,
        "mask.hi": SK - SQ,
        "scores.alibi.shift": SK - SQ,
        "scores.scale": 0.25 / 8.0,
        "scores.softcap": 8.0,
        "scores.softmax_scale": 0.25,
    }
    if dtype == "float16":
        # K and V of all heads fit the L2 cache.
        expected |= {"layout.heads_in_flight": B * H}
        expected |= {"layout.pack": 1, "layout.num_splits": 1, "out.split": 0, "in_fp8": 0}
    for name, array in {"q": q, "k": k, "v": v, "out": out}.items():
        batch, row, head, _ = strides(array)
        expected |= {f"{name}.batch": batch, f"{name}.row": row, f"{name}.head": head}
    assert run.arguments == expected
    assert (run.family, run.extra) == ("forward", 0)
    assert run.traits == f"{dtype}-d64-dv96-softcap-alibi-vec"
    config = parse_config("forward", run.config)
    assert config.implementation == ("portable" if dtype == "float32" else "sm80")
    assert run.grid == (math.ceil(SQ / config.tile_m) * H * B, 1, 1)
    assert run.block == (config.num_threads, 1, 1) == (128, 1, 1)
    assert run.smem_bytes == config.smem_bytes(Traits.parse(run.traits))


@pytest.mark.parametrize(
    "config",
    [None, {"backward-dkdv": "m16n16w4", "backward-dq": "m16n16w4"}],
    ids=["tensor-cores", "portable"],
)
def test_backward_runs_delta_before_the_gradients_that_read_it(gpu, qkv, config):
    q, k, v = qkv
    out, lse = numflash.attention(q, k, v, return_lse=True)
    dout = gpu.array(out.shape)
    gpu.driver.launches.clear()
    dq, dk, dv = numflash.attention_backward(dout, q, k, v, out, lse, config=config)
    assert [(g.shape, g.dtype) for g in (dq, dk, dv)] == [(x.shape, x.dtype) for x in qkv]
    delta, dkdv, for_dq = gpu.driver.launches
    assert [run.family for run in gpu.driver.launches] == ["delta", "backward-dkdv", "backward-dq"]
    assert delta.arguments["lse"] == lse.data.ptr
    workspaces = delta.arguments["delta"], delta.arguments["lse_log2"]
    # Both hold a float32 for each row of each head, and neither is anything else.
    assert workspaces[1] - workspaces[0] >= 4 * B * H * SQ
    pointers = [x.data.ptr for x in (*qkv, out, lse, dout, dq, dk, dv)]
    assert not set(workspaces) & set(pointers)
    for run in (dkdv, for_dq):
        assert run.arguments["do"] == dout.data.ptr
        statistics = "statistics" if config else "statistics_log2"
        assert run.arguments[f"{statistics}.delta"] == workspaces[0]
        if config is None:
            assert run.arguments["statistics_log2.lse"] == workspaces[1]
        else:
            assert (run.config, run.arguments["statistics.lse"]) == ("m16n16w4", lse.data.ptr)
        assert run.arguments["scores.alibi.slopes"] == 0
        assert run.arguments["scores.softmax_scale"] == D**-0.5
        assert run.arguments["do.row"] == strides(dout)[1]
    assert delta.arguments["out"] == out.data.ptr
    assert for_dq.arguments["dq"] == dq.data.ptr
    assert (dkdv.arguments["dk"], dkdv.arguments["dv"]) == (dk.data.ptr, dv.data.ptr)
    tile_n = parse_config(dkdv.family, dkdv.config).tile_n
    assert dkdv.grid == (math.ceil(SK / tile_n) * HKV * B, 1, 1)
    tile_m = parse_config(for_dq.family, for_dq.config).tile_m
    assert for_dq.grid == (math.ceil(SQ / tile_m) * H * B, 1, 1)
    assert delta.grid == (math.ceil(SQ / 8) * H * B, 1, 1)


# Packed heads, splits over the keys


def test_heads_of_a_group_are_packed_where_queries_are_few(gpu):
    seqlen_q, heads = 10, 8
    # So few keys that they are not split.
    q, k = gpu.array((B, seqlen_q, heads, D)), gpu.array((B, 20, HKV, D))
    numflash.attention(q, k, k)
    (run,) = gpu.driver.launches
    pack = heads // HKV
    tile_m = parse_config("forward", run.config).tile_m
    assert run.arguments["layout.pack"] == pack
    assert run.arguments["layout.heads_in_flight"] == B * heads // pack
    assert run.grid == (math.ceil(seqlen_q * pack / tile_m) * HKV * B, 1, 1)
    # Slopes differ between the heads; the portable kernels pack nothing.
    numflash.attention(q, k, k, alibi_slopes=gpu.array((heads,), "float32"))
    assert gpu.driver.launches[-1].arguments["layout.pack"] == 1
    assert gpu.driver.launches[-1].grid == (heads * B, 1, 1)
    numflash.attention(q, k, k, config="m16n16w4")
    assert "layout.pack" not in gpu.driver.launches[-1].arguments
    assert gpu.driver.launches[-1].grid == (heads * B, 1, 1)


def assert_split(gpu, forward, combine, num_splits, q, out, lse):
    """Check that a forward wrote parts and `combine` put them together."""
    batch, seqlen_q, heads, _ = q.shape
    rows, row = batch * seqlen_q * heads, 128  # head dims are padded
    assert (forward.family, combine.family) == ("forward", "combine")
    config = parse_config("forward", forward.config)
    assert config.num_splits == forward.arguments["layout.num_splits"] == num_splits
    assert combine.arguments["num_splits"] == num_splits
    pack = forward.arguments["layout.pack"]
    blocks = math.ceil(seqlen_q * pack / config.tile_m) * heads // pack * batch
    assert forward.grid == (num_splits * blocks, 1, 1)
    parts, part_lses = (combine.arguments[name] for name in ("parts", "part_lses"))
    assert (forward.arguments["out"], forward.arguments["lse"]) == (parts, part_lses)
    assert (combine.arguments["out"], combine.arguments["lse"]) == (out.data.ptr, lse.data.ptr)
    # The parts are contiguous float32 with nothing else in their memory.
    assert forward.arguments["out.split"] == rows * row
    assert forward.arguments["out.batch"] == seqlen_q * heads * row
    assert (forward.arguments["out.row"], forward.arguments["out.head"]) == (heads * row, row)
    room = sorted([parts, part_lses, gpu.memory.next])
    assert room[room.index(parts) + 1] - parts >= 4 * num_splits * rows * row
    assert room[room.index(part_lses) + 1] - part_lses >= 4 * num_splits * rows
    batch_stride, row_stride, head_stride, _ = strides(out)
    assert combine.arguments["out.batch"] == batch_stride
    assert (combine.arguments["out.row"], combine.arguments["out.head"]) == (
        row_stride,
        head_stride,
    )
    assert combine.stream == forward.stream


def test_a_query_with_many_keys_is_split_over_the_machine(hopper):
    q, k = hopper.array((1, 1, 8, 120)), hopper.array((1, 65536, 8, 120))
    for stream in (None, 0xABC0):
        hopper.driver.launches.clear()
        hopper.cupy.allocations.clear()
        out, lse = numflash.attention(q, k, k, return_lse=True, stream=stream)
        forward, combine = hopper.driver.launches
        assert forward.grid[0] >= 132
        assert_split(hopper, forward, combine, forward.grid[0] // 8, q, out, lse)
        assert forward.stream == (stream or 0x5000)
        assert hopper.cupy.allocations == [(stream or 0x5000, 0)] * 4


def test_keys_are_split_as_often_as_the_config_says(gpu):
    q, k = gpu.array((B, 6, 4, 100)), gpu.array((B, SK, 2, 100))
    for config, num_splits in (("sm75-m32n16w1s1x3", 3), ("sm75-m32n16w1s1", 1)):
        gpu.driver.launches.clear()
        out, lse = numflash.attention(q, k, k, return_lse=True, config=config)
        if num_splits == 1:
            (forward,) = gpu.driver.launches
            assert forward.arguments["out"] == out.data.ptr
        else:
            assert_split(gpu, *gpu.driver.launches, num_splits, q, out, lse)
        assert gpu.driver.launches[0].config == config


def test_a_plan_of_a_split_forward_repeats_both_launches(gpu):
    q, k = gpu.array((B, 6, 4, 100)), gpu.array((B, SK, 2, 100))
    plan = numflash.plan(q, k, k, config="sm75-m32n16w1s1x3")
    assert plan.kernel == "forward sm75-m32n16w1s1x3 float16-d128-dv128"
    numflash.attention(q, k, k, config="sm75-m32n16w1s1x3")
    allocations = len(gpu.cupy.allocations)
    plan.launch()
    plan.launch(0xABC0)
    _, other, *runs = gpu.driver.launches
    assert [run.family for run in runs] == ["forward", "combine"] * 2
    assert [run.stream for run in runs] == [0x5000] * 2 + [0xABC0] * 2
    assert_split(gpu, *runs[:2], 3, q, plan.out, plan.lse)
    assert [run.arguments for run in runs[:2]] == [run.arguments for run in runs[2:]]
    assert runs[1].arguments["parts"] != other.arguments["parts"]
    assert len(gpu.cupy.allocations) == allocations


# Strides, alignment, layouts


def test_strides_arrive_as_they_are_whatever_their_sign(gpu):
    whole = gpu.array((B, 2 * SK, 3, H, D))
    q, k, v = (whole[:, ::-2, i] for i in range(3))
    numflash.attention(q, k, v)
    (run,) = gpu.driver.launches
    assert run.arguments["q"] == q.data.ptr == whole.data.ptr + 2 * (2 * SK - 1) * 3 * H * D
    assert run.arguments["v.row"] == -2 * 3 * H * D
    assert run.arguments["k.head"] == D
    assert run.arguments["q.batch"] == 2 * SK * 3 * H * D


def test_strides_beyond_32_bits_arrive_whole(gpu):
    q = fake_gpu.CuPyArray(
        (2, 8, 1, 32), np.dtype(np.float16), 0x7F0000000000, (2**40, 2**36, 64, 2)
    )
    numflash.attention(q, q, q)
    (run,) = gpu.driver.launches
    assert (run.arguments["q.batch"], run.arguments["q.row"]) == (2**39, 2**35)


def test_layout_bhsd_swaps_heads_and_rows(gpu):
    q, k, v = (gpu.array((B, H, s, D)) for s in (SQ, SK, SK))
    out = numflash.attention(q, k, v, layout="bhsd")
    (run,) = gpu.driver.launches
    assert (run.arguments["q.row"], run.arguments["q.head"]) == (D, SQ * D)
    assert (run.arguments["out.row"], run.arguments["out.head"]) == (D, SQ * D)
    assert (run.arguments["shape.seqlen_q"], run.arguments["shape.num_heads_q"]) == (SQ, H)
    assert out.shape == (B, H, SQ, D)


@pytest.mark.parametrize("offset_bytes, vectorized", [(0, True), (8, False), (16, True)])
def test_unaligned_rows_are_not_read_16_bytes_at_a_time(gpu, offset_bytes, vectorized):
    q = gpu.array((B, SQ, H, D), offset_bytes=offset_bytes)
    k = gpu.array((B, SQ, H, D))
    numflash.attention(k, k, k)  # the same problem but for the alignment
    numflash.attention(q, k, k)
    assert gpu.driver.launches[-1].traits.endswith("-vec") is vectorized


def test_a_last_axis_that_is_not_contiguous_is_copied(gpu, qkv):
    q, k, _ = qkv
    spread = gpu.array((B, SK, HKV, 2 * DV))[..., ::2]
    for array in (spread, spread):
        numflash.attention(q, k, array)
        run = gpu.driver.launches[-1]
        assert run.arguments["v"] != array.data.ptr
        assert run.arguments["v.row"] == HKV * DV
    assert gpu.driver.launches[0].arguments["v"] != gpu.driver.launches[1].arguments["v"]


def _stream(**attributes):
    return types.SimpleNamespace(**attributes)


class _Protocol:
    def __cuda_stream__(self):
        return 0, 0xABC0


@pytest.mark.parametrize(
    "stream, address",
    [
        (None, 0x5000),
        (0, 0),
        (0xABC0, 0xABC0),
        (_stream(ptr=0xABC0), 0xABC0),
        (_stream(cuda_stream=0xABC0), 0xABC0),
        (_stream(handle=0xABC0), 0xABC0),
        (_stream(handle=ctypes.c_void_p(0xABC0)), 0xABC0),
        (_stream(handle=ctypes.c_void_p(None)), 0),
        (_Protocol(), 0xABC0),
    ],
    ids=["current", "0", "int", "ptr", "cuda_stream", "handle", "c_void_p", "null", "protocol"],
)
def test_the_stream_arrives_and_memory_is_allocated_on_it(gpu, qkv, stream, address):
    numflash.attention(*qkv, stream=stream)
    assert [run.stream for run in gpu.driver.launches] == [address]
    # Memory freed while the kernel runs must not be handed out to another stream.
    assert {on for on, _ in gpu.cupy.allocations} == {address}
    assert gpu.cupy.current.stream == 0x5000


def test_backward_allocates_and_launches_on_the_stream(gpu, qkv):
    out, lse = numflash.attention(*qkv, return_lse=True)
    gpu.driver.launches.clear()
    gpu.cupy.allocations.clear()
    numflash.attention_backward(out, *qkv, out, lse, stream=0xABC0)
    assert [run.stream for run in gpu.driver.launches] == [0xABC0] * 3
    assert gpu.cupy.allocations == [(0xABC0, 0)] * 5


def test_the_current_stream_is_asked_for_in_every_call(gpu, qkv):
    numflash.attention(*qkv)
    gpu.cupy.current.stream = 0x5100
    numflash.attention(*qkv)
    assert [run.stream for run in gpu.driver.launches] == [0x5000, 0x5100]


@pytest.mark.parametrize("head_dim, raised", [(64, False), (128, True)])
def test_shared_memory_above_48_kb_is_asked_for_once(hopper, head_dim, raised):
    gpu = hopper
    q = gpu.array((B, SQ, H, head_dim))
    for _ in range(2):
        numflash.attention(q, q, q, config="sm80-m128n64w4s1")
    smem_bytes = gpu.driver.launches[0].smem_bytes
    assert (smem_bytes > 48 * 1024) is raised
    asked = [call for call in gpu.driver.calls if call[0] == "cuKernelSetAttribute"]
    assert [call[1:3] for call in asked] == [("max dynamic smem", smem_bytes)] * raised


# Loading


def run_everything(gpu):
    """One call of each public function that launches; both GPUs of `gpu` and `hopper` do all."""
    q = gpu.array((B, SQ, H, D))
    out, lse = numflash.attention(q, q, q, return_lse=True)
    numflash.attention_backward(out, q, q, q, out, lse)
    numflash.plan(q, q, q, causal=True).launch()
    few, many = gpu.array((1, 1, H, D)), gpu.array((1, 65536, H, D))
    numflash.attention(few, many, many)
    numflash.dequantize_fp8(numflash.quantize_fp8(q, "head"))
    numflash.attention(q, q, q, precision="fp8")
    numflash.attention(q, q, q, precision="auto")


@pytest.mark.parametrize("current", [0, 1, None], ids=["here", "another-device", "no-context"])
@pytest.mark.parametrize("machine", ["gpu", "hopper"])
def test_every_kernel_is_loaded_before_its_first_launch(request, machine, current):
    driver = request.getfixturevalue(machine).driver
    driver.device = current
    run_everything(request.getfixturevalue(machine))
    assert driver.loaded_lazily == [] and driver.device == current
    assert len(driver.launches) >= 15
    # Once each, into the context of the device that it runs on.
    loads = [call[1] for call in driver.calls if call[0] == "cuFuncLoad"]
    assert sorted(loads) == sorted(driver.kernels)
    assert driver.loaded == {(number, 0) for number, _ in enumerate(driver.kernels, 1)}


def test_shared_memory_is_asked_for_before_a_kernel_is_loaded(hopper):
    q = hopper.array((B, SQ, H, 128))
    numflash.attention(q, q, q)
    names = [name for name, *_ in hopper.driver.calls]
    assert names == ["cuKernelSetAttribute", "cuKernelGetFunction", "cuFuncLoad", "cuLaunchKernel"]


def test_each_device_loads_for_itself(gpu):
    for device in (0, 1):
        q = gpu.array((B, SQ, H, D), device=device)
        numflash.attention(q, q, q)
    assert gpu.driver.loaded == {(1, 0), (2, 1)} and gpu.driver.loaded_lazily == []


def test_a_plan_has_loaded_its_kernels_before_it_is_launched(gpu, qkv):
    numflash.plan(*qkv)
    assert [name for name, *_ in gpu.driver.calls] == ["cuKernelGetFunction", "cuFuncLoad"]


def test_warmup_loads_what_attention_will_launch(gpu, compiled, qkv):
    numflash.warmup("float16", D, DV, backward=True)
    assert len(gpu.driver.loaded) == len(gpu.driver.kernels) == len(compiled) == 4
    gpu.driver.calls.clear()
    out, lse = numflash.attention(*qkv, return_lse=True)
    numflash.attention_backward(out, *qkv, out, lse)
    assert {name for name, *_ in gpu.driver.calls} == {"cuLaunchKernel"}


class OldDriver(fake_gpu.Driver):
    """CUDA 12.3: loads a kernel when its function is asked for."""

    def cuKernelGetFunction(self, kernel):
        status, function = super().cuKernelGetFunction(kernel)
        self.loaded.add((kernel, self.device))
        return status, function

    def cuFuncLoad(self, function):
        # The answer of cuda-bindings for a function that the driver lacks.
        raise RuntimeError("function cuFuncLoad is not found")


class OldBindings(OldDriver):
    @property
    def cuFuncLoad(self):
        raise AttributeError("cuFuncLoad")


@pytest.mark.parametrize("old", [OldDriver, OldBindings])
def test_a_driver_that_cannot_load_a_function_is_asked_for_it(gpu, qkv, old):
    gpu.driver.__class__ = old
    numflash.attention(*qkv)
    names = [name for name, *_ in gpu.driver.calls]
    assert names == ["cuKernelGetFunction", "cuLaunchKernel"]
    assert gpu.driver.loaded_lazily == []


def test_a_kernel_that_cannot_be_loaded_is_tried_again(gpu, qkv):
    gpu.driver.load_status = fake_gpu.Status(2)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        numflash.attention(*qkv)
    assert gpu.driver.launches == []
    gpu.driver.load_status = fake_gpu.OK
    numflash.attention(*qkv)
    assert gpu.driver.loaded_lazily == [] and len(gpu.driver.launches) == 1


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
    assert plan.launch(stream=_stream(ptr=0xABC0)) is plan.out
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


@pytest.fixture
def compiled(monkeypatch):
    """The kernels that `warmup` compiles."""
    compiled = []

    def get_cubin(config, traits, limits):
        compiled.append(f"{config.family}|{config}|{traits}")
        return fake_gpu.fake_get_cubin(config, traits, limits)

    monkeypatch.setattr(plans, "get_cubin", get_cubin)
    return compiled


def test_warmup_compiles_what_attention_will_launch(gpu, compiled, qkv):
    numflash.warmup("float16", D, DV, backward=True)
    out, lse = numflash.attention(*qkv, return_lse=True)
    numflash.attention_backward(out, *qkv, out, lse)
    assert sorted(compiled) == sorted(gpu.driver.kernels)


@pytest.mark.parametrize("precision", [None, "tf32"])
def test_warmup_compiles_for_the_precision_of_the_calls(hopper, compiled, precision):
    numflash.warmup("float32", D, backward=True, precision=precision)
    q = hopper.array((16, 512, 8, D), "float32")
    out, lse = numflash.attention(q, q, q, return_lse=True, precision=precision)
    numflash.attention_backward(out, q, q, q, out, lse, precision=precision)
    assert sorted(compiled) == sorted(hopper.driver.kernels)
    assert any("tf32" in kernel for kernel in compiled) is (precision is not None)


@pytest.mark.parametrize(
    ("bindings", "spills", "said"),
    [("12.9.10", 184, 1), ("12.9.10", 0, 0), ("13.5.0", 184, 0), (None, 184, 0)],
)
def test_what_spills_with_cuda_12_says_so_once(bindings, spills, said, gpu, monkeypatch, caplog):
    def get_cubin(*arguments):
        return replace(fake_gpu.fake_get_cubin(*arguments), spill_store_bytes=spills)

    monkeypatch.setattr(launch, "get_cubin", get_cubin)
    monkeypatch.setattr(compiler, "_version", lambda name: bindings)
    monkeypatch.setattr(compiler, "_warn_once", cache(compiler._warn_once.__wrapped__))
    for length in (SQ, 2 * SQ):
        q = gpu.array((B, length, H, D))
        numflash.attention(q, q, q)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == said
    assert all("forward" in m and "184 bytes" in m and "numflash[cu13]" in m for m in messages)


def test_a_gpu_older_than_turing_is_unsupported(monkeypatch):
    gpu = fake_gpu.install(monkeypatch, capability=(7, 0))
    q = gpu.array((B, SQ, H, D))
    with pytest.raises(numflash.UnsupportedError, match=r"device 0: .*sm_70.*not supported"):
        numflash.attention(q, q, q)


def _bindings(initialise):
    module = types.ModuleType("cuda.bindings")
    module.driver = types.SimpleNamespace(cuInit=initialise)
    return module


def _not_found(flags):
    raise RuntimeError("libcuda.so.1 was not found.")


@pytest.mark.parametrize(
    "bindings, reason",
    [
        (None, "cuda.bindings"),
        (_bindings(_not_found), "libcuda.so.1 was not found. Kernels"),
        (_bindings(lambda flags: (fake_gpu.Status(100),)), "CUDA_ERROR_UNKNOWN"),
    ],
    ids=["not-installed", "not-found", "no-device"],
)
def test_without_a_driver_the_error_says_why_and_what_to_do(monkeypatch, bindings, reason):
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setattr(driver, "open_driver", driver.open_driver.__wrapped__)
    monkeypatch.setattr(plans, "limits_of_device", driver.limits_of_device.__wrapped__)
    with pytest.raises(numflash.UnsupportedError) as error:
        numflash.warmup()
    words = ["the CUDA driver cannot be used", reason, "numflash[cu13]", "NUMBA_ENABLE_CUDASIM=1"]
    for word in words:
        assert word in str(error.value)


# Host time. The promise is for a quiet machine; these limits leave room for a busy one.
PROMISED_CALL_US, PROMISED_LAUNCH_US, ROOM = 25, 8, 4


def _microseconds(call) -> float:
    return min(timeit.repeat(call, number=200, repeat=10)) / 200 * 1e6


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
