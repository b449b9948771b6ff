"""What calls on sequences with lengths of their own ask of the driver, which is stubbed."""

import struct

import numpy as np
import pytest

import numflash
from numflash.runtime.mode import SIMULATED
from tests.support.fake_gpu import HKV, D, H

pytestmark = pytest.mark.skipif(SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM unset")

TOKENS_Q, TOKENS_K, SEQUENCES = 90, 120, 3
MINUS_INFINITY = struct.unpack("<I", struct.pack("<f", -np.inf))[0]


def arrays_of(gpu):
    q = gpu.array((TOKENS_Q, H, D))
    k, v = (gpu.array((TOKENS_K, HKV, D)) for _ in "kv")
    ends = [gpu.array((SEQUENCES + 1,), "int32") for _ in "qk"]
    return q, k, v, *ends


def test_a_forward_is_two_fills_and_two_launches(gpu):
    given = arrays_of(gpu)
    out, lse = numflash.attention_varlen(*given, return_lse=True, causal=True)
    assert (out.shape, lse.shape) == ((TOKENS_Q, H, D), (H, TOKENS_Q))
    assert [run.family for run in gpu.driver.launches] == ["schedule", "forward"]
    fills = {each.pointer: each for each in gpu.driver.sets}
    zeros, rest = fills[out.data.ptr], fills[lse.data.ptr]
    assert (zeros.value, zeros.count * zeros.itemsize) == (0, TOKENS_Q * H * D * 2)
    assert (rest.value, rest.itemsize, rest.count) == (MINUS_INFINITY, 4, TOKENS_Q * H)
    schedule, forward = gpu.driver.launches
    assert schedule.grid == (1, 1, 1)
    assert schedule.arguments["lengths.q.cumulative"] == given[3].data.ptr
    assert schedule.arguments["lengths.k.bound"] == TOKENS_K
    assert forward.arguments["shape.records"] == schedule.arguments["lists"]
    assert forward.arguments["shape.statistics_head"] == TOKENS_Q


def test_a_backward_makes_its_lists_in_one_launch(gpu):
    q, k, v, *ends = arrays_of(gpu)
    lse = gpu.array((H, TOKENS_Q), "float32")
    gradients = numflash.attention_varlen_backward(q, q, k, v, q, lse, *ends, causal=True)
    runs = {run.family: run for run in gpu.driver.launches}
    assert list(runs) == ["schedule", "delta", "backward-dkdv", "backward-dq"]
    assert runs["schedule"].grid == (2, 1, 1)
    lists = {
        runs[family].arguments["shape.records"] for family in ("backward-dkdv", "backward-dq")
    }
    assert len(lists) == 2
    assert runs["schedule"].arguments["lists"] in lists
    filled = {each.pointer: each.count for each in gpu.driver.sets}
    assert [filled[g.data.ptr] for g in gradients] == [
        g.dtype.itemsize * np.prod(g.shape) for g in gradients
    ]
    assert {each.value for each in gpu.driver.sets} == {0}


def test_one_kernel_for_all_gradients_knows_the_places_of_tiles(hopper):
    q, k, v, *ends = arrays_of(hopper)
    lse = hopper.array((H, TOKENS_Q), "float32")
    config = {"backward": "sm90-m64n64w4s1"}
    numflash.attention_varlen_backward(q, q, k, v, q, lse, *ends, config=config)
    runs = {run.family: run for run in hopper.driver.launches}
    assert list(runs) == ["schedule", "delta", "backward", "reduce-dq"]
    one, reduction = runs["backward"].arguments, runs["reduce-dq"].arguments
    assert one["shape.records"] != reduction["shape.records"]
    for name in ("shape.tiles_before", "dq_sums"):
        assert one[name] == reduction[name]
    most = (TOKENS_Q + SEQUENCES * 63) // 64
    assert one["shape.most_tiles"] == reduction["shape.most_tiles"] == most
    # Numbers of tiles stand behind the records, of 8 words each, and a header of 8.
    assert one["shape.tiles_before"] == reduction["shape.records"] + 4 * 8 * (1 + most)
    assert runs["reduce-dq"].grid == (most * H, 1, 1)
    assert runs["backward"].grid == ((TOKENS_K + SEQUENCES * 63) // 64 * HKV, 1, 1)
    zeros = {each.pointer: each for each in hopper.driver.sets}[one["turns"]]
    # The places that blocks have drawn, and a turn of each tile.
    assert (zeros.value, zeros.count * zeros.itemsize) == (0, 4 * (1 + most * H))


def test_out_of_the_caller_is_not_filled(gpu):
    given = arrays_of(gpu)
    out = gpu.array((TOKENS_Q, H, D))
    numflash.attention_varlen(*given, out=out)
    assert out.data.ptr not in {each.pointer for each in gpu.driver.sets}


@pytest.mark.parametrize("padded", [False, True])
def test_a_warm_call_can_be_captured(gpu, padded):
    """Nothing is loaded, allocated by the driver or waited for, and no geometry has a length."""

    def call():
        if padded:
            q, k = gpu.array((SEQUENCES, 40, H, D)), gpu.array((SEQUENCES, 50, HKV, D))
            lengths = {
                name: gpu.array((SEQUENCES,), "int32") for name in ("seqlens_q", "seqlens_k")
            }
            out, lse = numflash.attention(q, k, k, return_lse=True, **lengths)
            numflash.attention_backward(q, q, k, k, out, lse, **lengths)
            return
        q, k, v, *ends = arrays_of(gpu)
        out, lse = numflash.attention_varlen(q, k, v, *ends, return_lse=True)
        numflash.attention_varlen_backward(q, q, k, v, out, lse, *ends)

    call()
    first = [(run.family, run.grid, run.smem_bytes) for run in gpu.driver.launches]
    assert gpu.driver.loaded_lazily == []
    gpu.driver.calls.clear()
    gpu.driver.launches.clear()
    call()
    assert [(run.family, run.grid, run.smem_bytes) for run in gpu.driver.launches] == first
    assert {call[0] for call in gpu.driver.calls} == {"cuLaunchKernel", "cuMemsetAsync"}


def test_all_work_is_on_the_streams_of_the_caller(gpu):
    given = arrays_of(gpu)
    numflash.attention_varlen(*given, stream=0x77)
    assert {run.stream for run in gpu.driver.launches} == {0x77}
    assert {each.stream for each in gpu.driver.sets} == {0x77}


def test_a_schedule_is_renewed_on_the_stream_of_the_caller(gpu):
    given = arrays_of(gpu)
    schedule = numflash.plan_varlen(*given[3:])
    numflash.attention_varlen(*given, schedule=schedule)
    gpu.driver.launches.clear()
    schedule.renew(stream=0x77)
    assert [(run.family, run.stream) for run in gpu.driver.launches] == [("schedule", 0x77)]


@pytest.mark.parametrize("heads", [1, 8])
def test_warmup_leaves_nothing_to_load(gpu, heads):
    numflash.warmup(head_dim=D, varlen=True, backward=True, seqlen_q=30, seqlen_k=40)
    loaded = len(gpu.driver.kernels)
    q, k, v = (gpu.array((n, heads, D)) for n in (TOKENS_Q, TOKENS_K, TOKENS_K))
    ends = [gpu.array((SEQUENCES + 1,), "int32") for _ in "qk"]
    out, lse = numflash.attention_varlen(q, k, v, *ends, return_lse=True)
    numflash.attention_varlen_backward(q, q, k, v, out, lse, *ends)
    assert gpu.driver.kernels[loaded:] == []
    assert loaded
