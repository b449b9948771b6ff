"""Calls as they arrive at the CUDA driver, with array libraries and the driver stubbed.

What a GPU would be asked to do is read where the driver would read it: the argument block, the
grid, the stream. See `tests.support.fake_gpu`.
"""

import ctypes
import math
import types

import numpy as np
import pytest

import numflash
from numflash.calls import ready
from numflash.configs import Traits, parse_config
from numflash.configs.features import Dropout
from numflash.runtime.mode import SIMULATED
from tests.support import fake_arrays
from tests.support.fake_gpu import DV, HKV, SK, SQ, B, D, H

pytestmark = pytest.mark.skipif(SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM unset")


def strides(array) -> tuple[int, ...]:
    return tuple(stride // array.dtype.itemsize for stride in array.strides)


@pytest.mark.parametrize("dtype", ["float32", "float16"], ids=["portable", "tensor-cores"])
def test_forward_arguments_arrive_where_the_driver_reads_them(gpu, dtype):
    q, k, v = (gpu.array(s, dtype) for s in ((B, SQ, H, D), (B, SK, HKV, D), (B, SK, HKV, DV)))
    slopes, sinks = gpu.array((B, H), "float32"), gpu.array((H,), "float32")
    out, lse = numflash.attention(
        q,
        k,
        v,
        softmax_scale=0.25,
        causal=True,
        window_size=(11, 5),
        softcap=8.0,
        alibi_slopes=slopes,
        sinks=sinks,
        return_lse=True,
    )
    (run,) = gpu.driver.launches
    expected = {
        "q": q.data.ptr,
        "k": k.data.ptr,
        "v": v.data.ptr,
        "out": out.data.ptr,
        "lse": lse.data.ptr,
        "scores.features.alibi.slopes": slopes.data.ptr,
        "scores.features.alibi.batch": H,
        "scores.features.alibi.head": 1,
        "scores.features.sinks": sinks.data.ptr,
        "scores.features.sinks.head": 1,
        "shape.seqlen_q": SQ,
        "shape.seqlen_k": SK,
        "shape.num_heads_q": H,
        "shape.group_size": 2,
        "shape.head_dim": D,
        "shape.head_dim_v": DV,
        "shape.batch_size": B,
        "mask.lo": SK - SQ - 11,
        "mask.hi": SK - SQ,
        "scores.shift": SK - SQ,
        "scores.scale": 0.25 / 8.0,
        "scores.features.softcap.cap": 8.0,
        "scores.softmax_scale": 0.25,
    }
    # Of a feature that is not asked for.
    absent = {f"scores.features.dropout.{name}": 0 for name in Dropout._fields}
    expected |= absent
    if dtype == "float16":
        # K and V of all heads fit the L2 cache.
        expected |= {"layout.heads_in_flight": B * H}
        expected |= {"layout.pack": 1, "layout.num_splits": 1, "out.split": 0, "in_fp8": 0}
    for name, array in {"q": q, "k": k, "v": v, "out": out}.items():
        batch, row, head, _ = strides(array)
        expected |= {f"{name}.batch": batch, f"{name}.row": row, f"{name}.head": head}
    assert run.arguments == expected
    assert (run.family, run.extra) == ("forward", 0)
    assert run.traits == f"{dtype}-d64-dv96-softcap-alibi-sinks-vec"
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
        assert run.arguments["scores.features.alibi.slopes"] == 0
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


def test_the_gradient_of_sinks_is_added_up_where_the_rows_left_it(gpu, qkv):
    dout, sinks = gpu.array((B, SQ, H, DV)), gpu.array((H,), "float32")
    out, lse = gpu.array((B, SQ, H, DV)), gpu.array((B, H, SQ), "float32")
    *_, dsinks = numflash.attention_backward(dout, *qkv, out, lse, sinks=sinks)
    delta, sums, *_ = gpu.driver.launches
    assert (dsinks.shape, dsinks.dtype) == ((H,), "float32")
    assert (delta.family, sums.family, sums.grid) == ("delta", "array-sums", (H, 1, 1))
    assert "-sinks" in delta.traits and delta.arguments["features.sinks"] == sinks.data.ptr
    left = delta.arguments["row_gradients"]
    assert left == sums.arguments["shares"] != 0
    assert sums.arguments["array_gradient"] == dsinks.data.ptr
    # Nothing of it without sinks.
    gpu.driver.launches.clear()
    assert len(numflash.attention_backward(dout, *qkv, out, lse)) == 3
    assert "array-sums" not in [run.family for run in gpu.driver.launches]
    assert gpu.driver.launches[0].arguments["row_gradients"] == 0


def test_gradients_of_arrays_arrive_where_they_are_asked_for(gpu, qkv):
    """Of a bias that heads share, and of a table: the sums' own strides, and zeros first."""
    dout, bias = gpu.array((B, SQ, H, DV)), gpu.array((B, 1, SQ, SK))
    out, lse = gpu.array((B, SQ, H, DV)), gpu.array((B, H, SQ), "float32")
    table = gpu.array((7, H), "float32")

    def function(score, batch, head, q_idx, kv_idx, table):
        return score + table[kv_idx - q_idx, head]

    dbias, dtable = numflash.attention_backward(
        *(dout, *qkv, out, lse),
        bias=bias,
        score_mod=function,
        aux=(table,),
        wrt=("bias", "aux0"),
    )
    assert (dbias.shape, dbias.dtype) == (bias.shape, bias.dtype)
    assert (dtable.shape, dtable.dtype) == (table.shape, "float32")
    delta, tiles, rows, heads, total, clear, scatter, rounded = gpu.driver.launches
    assert [run.family for run in gpu.driver.launches[1:]] == [
        *("backward-tiles", "backward-rows", "array-sums", "array-sums"),
        *("clear-sums", "backward-scatter", "round-sums"),
    ]
    config = parse_config("backward-tiles", tiles.config)
    num_tiles = math.ceil(SQ / config.tile_m) * math.ceil(SK / config.tile_n)
    assert tiles.grid == (num_tiles * B, 1, 1)
    assert tiles.arguments["array_gradient"] == dbias.data.ptr
    assert tiles.arguments["reduced.kept.batch"] == B
    assert tiles.arguments["reduced.summed.heads"] == H
    assert tiles.arguments["tile_statistics.delta"] == delta.arguments["of_rows.plain"]
    assert "absolute" in rows.traits and "absolute" not in scatter.traits
    assert rows.arguments["row_gradients"] == heads.arguments["shares"]
    assert (heads.grid, total.grid) == ((B * H, 1, 1), (1, 1, 1))
    assert (heads.arguments["reduced.summed.length"], heads.arguments["reduced.head"]) == (SQ, 1)
    assert total.arguments["reduced.summed.heads"] == B * H
    assert heads.arguments["array_gradient"] == total.arguments["shares"]
    fixed = clear.arguments["array_gradient"]
    assert clear.arguments["elements"] == 2 * 7 * H
    assert fixed == scatter.arguments["fixed_sums"] == rounded.arguments["fixed_sums"]
    assert total.arguments["array_gradient"] == rounded.arguments["absolute_sum"]
    assert scatter.arguments["absolute_sum"] == rounded.arguments["absolute_sum"]
    assert rounded.arguments["array_gradient"] == dtable.data.ptr


# Numbers that a launch fills in


def dropout_of(run) -> dict:
    """The arguments of dropout, as the driver reads them."""
    start = "scores.features.dropout."
    return {
        path.removeprefix(start): value
        for path, value in run.arguments.items()
        if path.startswith(start)
    }


def test_a_seed_and_a_share_arrive_with_the_launch_and_make_nothing_ready_again(gpu, qkv):
    q, k, v = qkv
    made = []
    for dropout_p, seed in ((0.25, 1), (0.75, -2), (0.25, 2**64 - 1)):
        gpu.driver.launches.clear()
        out, lse = numflash.attention(
            q, k, v, dropout_p=dropout_p, seed=seed, return_lse=True, causal=True
        )
        numflash.attention_backward(
            out, q, k, v, out, lse, dropout_p=dropout_p, seed=seed, causal=True
        )
        steps, scale = round(65536 * dropout_p), 1 / (1 - dropout_p)
        forward, delta, *backward = gpu.driver.launches
        for run in (forward, *backward):
            assert "-dropout" in run.traits
            found = dropout_of(run)
            log2_scale = found.pop("log2_scale")
            assert math.isclose(log2_scale, math.log2(scale), rel_tol=1e-6)
            assert math.isclose(found.pop("scale"), scale, rel_tol=1e-6)
            low, high = (seed >> shift & 0xFFFFFFFF for shift in (0, 32))
            words = {"low": low, "high": high, "limit": steps << 16}
            assert {n: found.pop(n) & 0xFFFFFFFF for n in words} == words
            assert set(found.values()) == {0}
        assert delta.arguments["features.dropout.log2_scale"] == log2_scale
        made.append(len(ready._ready))
    assert made[0] == made[1] == made[2]


def test_a_seed_on_the_device_is_a_pointer(gpu, qkv):
    for dtype, words in (("int64", 2), ("uint64", 2), ("int32", 1)):
        seed = gpu.array((1,), dtype)
        numflash.attention(*qkv, dropout_p=0.5, seed=seed)
        found = dropout_of(gpu.driver.launches[-1])
        assert (found["seed"], found["words"], found["low"]) == (seed.data.ptr, words, 0)


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
    q = fake_arrays.CuPyArray(
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


def stream_with(**attributes):
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
        (stream_with(ptr=0xABC0), 0xABC0),
        (stream_with(cuda_stream=0xABC0), 0xABC0),
        (stream_with(handle=0xABC0), 0xABC0),
        (stream_with(handle=ctypes.c_void_p(0xABC0)), 0xABC0),
        (stream_with(handle=ctypes.c_void_p(None)), 0),
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


def test_numbers_of_aux_are_filled_in_by_each_launch(gpu, qkv):
    def score_mod(score, batch, head, q_idx, kv_idx, factor, offset):
        return score * factor + offset

    for aux in ((0.5, 3), (-2.0, 2**31 - 1)):
        numflash.attention(*qkv, score_mod=score_mod, aux=aux)
        arguments = gpu.driver.launches[-1].arguments
        assert (arguments["scores.given.a0"], arguments["scores.given.a1"]) == aux
    assert len(ready._ready) == 1
