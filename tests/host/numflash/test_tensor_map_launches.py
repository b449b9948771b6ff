"""Tensor maps in launches: what arrives, grids and splits, and that each is encoded once."""

import threading
import time
import timeit
from collections import Counter

import numpy as np
import pytest

import numflash
from numflash.calls import launch
from numflash.configs import Traits, parse_config
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.mode import SIMULATED
from tests.support import fake_gpu
from tests.support.fake_gpu import EncodedMap
from tests.support.tensor_map_calls import B, D, H, S, on_the_gpu

FLOAT16, BFLOAT16 = 6, 9
FORCED = "sm90-m64n64w4s1"


# What arrives in a launch


def maps_of(run) -> dict[str, EncodedMap]:
    return {name: value for name, value in run.arguments.items() if name.endswith("_map")}


@on_the_gpu
def test_a_config_says_how_much_the_l2_cache_fetches(hopper):
    q = hopper.array((B, 128, H, D), "float16")
    for text in ("sm90-m64n128w4s2-overlap", "sm90-m64n128w4s2-l128-overlap"):
        numflash.attention(q, q, q, config={"forward": text})
    usual, fewer = map(maps_of, hopper.driver.launches)
    assert {map_.l2_promotion for map_ in usual.values()} == {3}
    assert {map_.l2_promotion for map_ in fewer.values()} == {2}
    for name in ("q_map", "k_map", "v_map"):
        assert fewer[name] == usual[name]._replace(l2_promotion=2)


@on_the_gpu
@pytest.mark.parametrize("dtype, number", [("float16", FLOAT16), ("bfloat16", BFLOAT16)])
def test_maps_arrive_by_value_next_to_the_other_arguments(hopper, dtype, number):
    q, k, v = (hopper.array(s, dtype) for s in ((B, S, H, D), (B, 70, 2, D), (B, 70, 2, 96)))
    out, lse = numflash.attention(q, k, v, softmax_scale=0.25, return_lse=True)
    (run,) = hopper.driver.launches
    config = parse_config("forward", run.config)
    assert config.implementation == "sm90"
    rest = (1, 1, 1, 1), 0, 3, 3, 0
    assert maps_of(run) == {
        "q_map": EncodedMap(
            number,
            q.data.ptr,
            (D, 1, S, H, B),
            (128, 2 * H * D, 2 * D, 2 * S * H * D),
            (64, 1, 64, 1, 1),
            (1, *rest[0]),
            *rest[1:],
        ),
        "k_map": EncodedMap(
            number,
            k.data.ptr,
            (D, 70, 2, B),
            (256, 128, 256 * 70),
            (64, config.tile_n, 1, 1),
            *rest,
        ),
        "v_map": EncodedMap(
            number,
            v.data.ptr,
            (96, 70, 2, B),
            (384, 192, 384 * 70),
            (64, config.tile_n, 1, 1),
            *rest,
        ),
        "out_map": EncodedMap(
            number,
            out.data.ptr,
            (96, 1, S, H, B),
            (192, 2 * H * 96, 192, 2 * S * H * 96),
            (64, 1, 64, 1, 1),
            (1, *rest[0]),
            *rest[1:],
        ),
    }
    unasked = "scores.features."
    others = {
        name: run.arguments[name]
        for name in run.arguments
        if name not in maps_of(run) and not name.startswith(unasked)
    }
    assert others == {
        "out": out.data.ptr,
        "in_fp8": 0,
        "lse": lse.data.ptr,
        "out.split": 0,
        "out.batch": S * H * 96,
        "out.row": H * 96,
        "out.head": 96,
        "shape.batch_size": B,
        "shape.seqlen_q": S,
        "shape.seqlen_k": 70,
        "shape.num_heads_q": H,
        "shape.group_size": 4,
        "mask.lo": -S,
        "mask.hi": 70,
        "scores.shift": 70 - S,
        "layout.pack": 1,
        "layout.num_splits": 1,
        "layout.heads_in_flight": B * H,
        "scores.scale": 0.25,
        "shape.head_dim": D,
        "shape.head_dim_v": 96,
        "scores.softmax_scale": others["scores.scale"],
    }
    assert run.block == (config.num_threads, 1, 1)
    assert run.smem_bytes == config.smem_bytes(Traits.parse(run.traits))


@on_the_gpu
def test_maps_of_codes_are_of_bytes(hopper):
    q, k, v = (hopper.array(s) for s in ((B, S, H, D), (B, 170, 2, D), (B, 170, 2, 80)))
    out = numflash.attention(q, k, v, precision="fp8")
    run = hopper.driver.launches[-1]
    assert run.config == "fp8-sm90-m128n128w8s2-overlap-pingpong-persistent"
    maps, rest = maps_of(run), ((1, 1, 1, 1), 0, 3, 3, 0)
    assert {name: each[0] for name, each in maps.items()} == {
        "q_map": 0,
        "k_map": 0,
        "v_map": 0,
        "out_map": FLOAT16,
    }
    assert maps["q_map"][2:5] == ((D, 1, S, H, B), (D, H * D, D, S * H * D), (128, 1, 64, 1, 1))
    assert maps["k_map"][2:] == ((D, 170, 2, B), (2 * D, D, 340 * D), (128, 128, 1, 1), *rest)
    # Padded to 128 columns and 192 tokens.
    assert maps["v_map"][2:] == (
        (192, 128, 2, B),
        (192, 192 * 128, 2 * 192 * 128),
        (128, 128, 1, 1),
        *rest,
    )
    assert maps["out_map"][1:3] == (out.data.ptr, (80, 1, S, H, B))


@on_the_gpu
def test_maps_of_sequences_begin_below_their_arrays(hopper):
    q, k, starts = (
        hopper.array((200, H, D)),
        hopper.array((300, 2, D)),
        hopper.array((5,), "int32"),
    )
    out = numflash.attention_varlen(q, k, k, starts, starts, config={"forward": FORCED})
    run = hopper.driver.launches[-1]
    maps = maps_of(run)
    row = 2 * H * D
    assert maps["q_map"][1:4] == (
        q.data.ptr - 200 * row,
        (D, 1, 200, H, 201),
        (2 * D, row, 2 * D, row),
    )
    assert maps["out_map"] == maps["q_map"]._replace(pointer=out.data.ptr - 200 * row)
    assert maps["k_map"][1:5] == (
        k.data.ptr - 300 * 4 * D,
        (D, 300, 2, 301),
        (4 * D, 2 * D, 4 * D),
        (64, 64, 1, 1),
    )
    assert [run.arguments[f"layout.between.{name}"] for name in ("q", "k", "v", "out")] == [0] * 4
    # Of a padded batch, the rows of an entry and those between it and the next.
    q, k, v = (
        hopper.array((B, S, H, D)),
        hopper.array((B, 70, 2, D)),
        hopper.array((2 * B, 70, 2, D)),
    )
    seqlens = hopper.array((B,), "int32")
    numflash.attention(q, k, v[::2], seqlens_k=seqlens, config={"forward": FORCED})
    run = hopper.driver.launches[-1]
    between = [run.arguments[f"layout.between.{name}"] for name in ("q", "k", "v", "out")]
    assert between == [S, 70, 140, S]
    assert run.arguments["v_map"].pointer == v.data.ptr - 70 * 4 * D
    assert run.arguments["v_map"].extents == (D, 70, 2, 140 * (B - 1) + 70 + 1)


@on_the_gpu
def test_layouts_slices_and_given_results_are_described_as_they_are(hopper):
    whole = hopper.array((B, S, 3, H, D))
    q, k, v = (whole[:, :, i] for i in range(3))
    out = hopper.array((B, S, 2, H, D))[:, :, 1]
    assert numflash.attention(q, k, v, out=out) is out
    run = hopper.driver.launches[-1]
    assert run.arguments["k_map"].pointer == whole.data.ptr + 2 * H * D
    assert run.arguments["k_map"].strides == (6 * H * D, 2 * D, 6 * S * H * D)
    assert run.arguments["out_map"].pointer == out.data.ptr
    assert run.arguments["out_map"].strides[1] == 4 * H * D
    q, k, v = (hopper.array((B, H, S, D)) for _ in range(3))
    numflash.attention(q, k, v, layout="bhsd")
    run = hopper.driver.launches[-1]
    for name in ("k_map", "v_map"):
        assert run.arguments[name].extents == (D, S, H, B)
        assert run.arguments[name].strides == (2 * D, 2 * S * D, 2 * H * S * D)
    assert run.arguments["q_map"].strides[1] == run.arguments["out_map"].strides[1] == 2 * D
    for shape in ((S, H, D), (S, D)):
        x = hopper.array(shape)
        numflash.attention(x, x, x)
        assert hopper.driver.launches[-1].arguments["k_map"].extents[:2] == (D, S)
    assert {run.config[:4] for run in hopper.driver.launches} == {"sm90"}


@on_the_gpu
def test_a_copied_operand_is_described_where_the_copy_is(hopper):
    q, spread = hopper.array((B, S, H, D)), hopper.array((B, S, H, 2 * D))[..., ::2]
    numflash.attention(q, q, spread)
    described = hopper.driver.launches[-1].arguments["v_map"]
    assert described.pointer != spread.data.ptr
    assert described.strides == (2 * H * D, 2 * D, 2 * S * H * D)


@on_the_gpu
def test_rows_that_are_not_padded_have_no_kernel_of_their_own(hopper):
    whole = hopper.array((B, S, H, 64))
    x = whole[..., :60]
    numflash.attention(x, x, x, out=hopper.array((B, S, H, 64))[..., :60])
    numflash.attention(whole, whole, whole)
    first, second = hopper.driver.launches
    assert first.arguments["q_map"].extents[0] == first.arguments["out_map"].extents[0] == 60
    assert (first.config, first.traits) == (second.config, second.traits)


@on_the_gpu
@pytest.mark.parametrize(
    "spoil",
    [
        lambda gpu: {"q": gpu.array((B, S, H, D), offset_bytes=8)},
        lambda gpu: {"k": gpu.array((B, S, H, D + 1))[..., :D]},
        lambda gpu: {"v": gpu.array((B, S, H, D))[:, ::-1]},
        lambda gpu: {"out": gpu.array((B, S, H, D + 4))[..., :D]},
        lambda gpu: {"k": gpu.array((B, 0, H, D)), "v": gpu.array((B, 0, H, D))},
    ],
    ids=["address", "stride", "backwards", "out", "no-keys"],
)
def test_what_cannot_be_described_runs_on_sm80(hopper, spoil):
    arrays = {name: hopper.array((B, S, H, D)) for name in "qkv"}
    numflash.attention(**arrays)
    assert hopper.driver.launches[-1].config.startswith("sm90-")
    encoded, arrays = len(hopper.driver.maps), arrays | spoil(hopper)
    numflash.attention(**arrays)
    assert hopper.driver.launches[-1].config.startswith("sm80-")
    assert len(hopper.driver.maps) == encoded
    with pytest.raises(UnsupportedError, match="cannot be described to bulk copies: it"):
        numflash.attention(**arrays, config=FORCED)


@on_the_gpu
def test_nothing_is_encoded_where_nothing_is_computed(hopper):
    none, x = hopper.array((0, S, H, D)), hopper.array((B, S, H, D))
    numflash.attention(none, none, none, config=FORCED)
    numflash.attention(hopper.array((B, 0, H, D)), x, x)
    assert hopper.driver.maps == hopper.driver.launches == []


# The grid, packed heads, splits


@on_the_gpu
@pytest.mark.parametrize(
    "config, batch, blocks",
    [
        ("sm90-m64n64w4s1", 100, 2 * H * 100),
        ("sm90-m64n64w4s1-persistent", 100, 132),
        ("sm90-m64n64w4s1-persistent", 1, 2 * H),
        ("sm90-m64n64w4s1b2-persistent", 100, 2 * 132),
        # 64 + 3 x 160 + 3 x 160 rows of 128 bytes and the results do not fit twice.
        ("sm90-m64n160w4s3b2-persistent", 100, 132),
        ("sm90-m128n64w8s1x3-persistent", 4, 3 * H * 4),
        ("sm90-m128n64w8s1x30-persistent", 4, 132),
    ],
)
def test_persistent_kernels_have_as_many_blocks_as_fit_at_once(hopper, config, batch, blocks):
    q = hopper.array((batch, S, H, D))
    numflash.attention(q, q, q, config=config)
    assert hopper.driver.launches[0].grid == (blocks, 1, 1)


@on_the_gpu
def test_heads_are_packed_where_they_divide_the_rows_of_a_warpgroup(hopper):
    q, k = hopper.array((B, 30, 16, D)), hopper.array((B, 30, 2, D))
    numflash.attention(q, k, k)
    run = hopper.driver.launches[-1]
    assert run.config.startswith("sm90-") and run.arguments["layout.pack"] == 8
    assert run.arguments["q_map"].extents == run.arguments["out_map"].extents == (D, 8, 30, 2, B)
    assert run.arguments["q_map"].box == (64, 8, 8, 1, 1)
    # Three do not.
    q = hopper.array((B, 30, 6, D))
    numflash.attention(q, k, k)
    run = hopper.driver.launches[-1]
    assert run.config.startswith("sm80-") and run.arguments["layout.pack"] == 3
    numflash.attention(q, k, k, config=FORCED)
    run = hopper.driver.launches[-1]
    assert run.arguments["layout.pack"] == 1 and run.arguments["q_map"].extents == (D, 1, 30, 6, B)
    with pytest.raises(UnsupportedError, match="the 3 query heads of a group cannot be packed"):
        numflash.attention(q, k, k, config=FORCED + "-packed")


@on_the_gpu
def test_a_split_forward_writes_parts_and_is_given_some_map(hopper):
    q, k = hopper.array((B, S, H, 40)), hopper.array((B, 500, H, 40))
    v = hopper.array((B, 500, H, 56))
    for _ in range(2):
        out = numflash.attention(q, k, v, config="sm90-m64n64w4s1x2")
        forward, combine = hopper.driver.launches[-2:]
        assert (forward.family, combine.family) == ("forward", "combine")
        assert forward.arguments["out"] == combine.arguments["parts"] != out.data.ptr
        assert combine.arguments["out"] == out.data.ptr
        assert forward.arguments["out_map"] == forward.arguments["q_map"]
        assert forward.arguments["out.split"] == B * S * H * 64
        assert forward.grid == (2 * 2 * H * B, 1, 1)
    assert len(hopper.driver.maps) == 4


# Encoded once


@on_the_gpu
def test_maps_are_encoded_once_for_each_address(hopper):
    q, out = hopper.array((B, S, H, D)), hopper.array((B, S, H, D))
    first = numflash.plan(q, q, q, out=out)
    assert len(hopper.driver.maps) == 4 and hopper.driver.launches == []
    for _ in range(3):
        first.launch()
        numflash.attention(q, q, q, out=out)
    assert len(hopper.driver.maps) == 4
    other = hopper.array((B, S, H, D))
    for _ in range(3):
        numflash.attention(q, other, q, out=out)
    assert len(hopper.driver.maps) == 5
    pointers = [run.arguments["k_map"].pointer for run in hopper.driver.launches]
    assert pointers == [q.data.ptr] * 6 + [other.data.ptr] * 3
    # Another layout at the same address is another map.
    numflash.attention(q[:, :90], q, q, out=out[:, :90])
    assert hopper.driver.launches[-1].arguments["q_map"].extents[2] == 90


@on_the_gpu
def test_only_so_many_maps_are_remembered(hopper):
    q, out = hopper.array((1, S, 1, D)), hopper.array((1, S, 1, D))
    arrays = [hopper.array((1, S, 1, D)) for _ in range(launch._MAX_MAPS + 1)]
    for k in arrays:
        numflash.attention(q, k, q, out=out)
    encoded = len(hopper.driver.maps)
    assert encoded == len(arrays) + 3
    numflash.attention(q, arrays[-1], q, out=out)
    assert len(hopper.driver.maps) == encoded
    numflash.attention(q, arrays[0], q, out=out)
    assert len(hopper.driver.maps) == encoded + 1


@on_the_gpu
@pytest.mark.parametrize("current", [1, None], ids=["another-device", "no-context"])
def test_maps_are_encoded_in_the_context_of_the_device(hopper, current):
    q = hopper.array((B, S, H, D))
    hopper.driver.device = current
    numflash.attention(q, q, q)
    contexts = [call[1] for call in hopper.driver.calls if call[0] == "cuCtxPushCurrent"]
    assert contexts == [0xC0] * 6  # loading, four maps and the launch
    assert hopper.driver.device is current


@on_the_gpu
def test_threads_do_not_mix_their_maps(hopper, monkeypatch):
    launch_kernel = fake_gpu.Driver.cuLaunchKernel

    def slow(driver, *arguments):
        threading.Event().wait(1e-3)  # other threads run before the arguments are read
        return launch_kernel(driver, *arguments)

    monkeypatch.setattr(fake_gpu.Driver, "cuLaunchKernel", slow)
    q = hopper.array((B, S, H, D))
    plans = [numflash.plan(q, q, q) for _ in range(4)]
    threads = [threading.Thread(target=lambda p=p: [p.launch() for _ in range(5)]) for p in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mapped = Counter(run.arguments["out_map"].pointer for run in hopper.driver.launches)
    assert mapped == {plan.out.data.ptr: 5 for plan in plans}
    for run in hopper.driver.launches:
        assert run.arguments["out_map"].pointer == run.arguments["out"]


@on_the_gpu
def test_warmup_compiles_what_attention_will_launch_on_hopper(hopper, compiled):
    for number, head_dim in enumerate((128, 100), 1):
        numflash.warmup("bfloat16", head_dim)
        assert len(compiled) == number
        q = hopper.array((16, 512, 8, head_dim), "bfloat16")
        numflash.attention(q, q, q)
        assert list(compiled) == hopper.driver.kernels
    assert [kernel.split("|")[1][:4] for kernel in compiled] == ["sm90", "sm80"]


@on_the_gpu
def test_warmup_compiles_one_kernel_for_gradients_and_two_on_hopper(hopper, compiled):
    """How many blocks there are says which of them a call takes."""
    numflash.warmup("bfloat16", D, backward=True)
    ahead = list(compiled)
    for batch in (1, 200):
        q = hopper.array((batch, 1024, 4, D), "bfloat16")
        numflash.attention_backward(q, q, q, q, q, hopper.array((batch, 4, 1024), "float32"))
    assert list(compiled) == ahead
    families = {kernel.split("|")[0] for kernel in hopper.driver.kernels}
    assert {"backward", "reduce-dq", "backward-dkdv", "backward-dq"} <= families


@on_the_gpu
def test_a_warm_call_with_maps_costs_little_host_time(hopper, monkeypatch):
    q, out = hopper.array((B, S, H, D)), hopper.array((B, S, H, D))
    numflash.attention(q, q, q, out=out)
    status = (fake_gpu.OK,)
    monkeypatch.setattr(fake_gpu.Driver, "cuLaunchKernel", lambda self, *_: status)
    plan = numflash.plan(q, q, q, out=out)
    # 25 and 8 microseconds on a quiet machine, 4 times that here.
    for call, promised in ((lambda: numflash.attention(q, q, q, out=out), 25), (plan.launch, 8)):
        taken = timeit.repeat(call, number=200, repeat=10, timer=time.process_time)
        assert min(taken) / 200 * 1e6 < 4 * promised


# The simulator


@pytest.mark.skipif(not SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM=1")
def test_the_simulator_is_given_the_array_and_the_layout(monkeypatch):
    from numflash import simulator
    from numflash.kernels.kernel import Kernel
    from numflash.ptx import TensorMap, f32, i32
    from numflash.runtime.views import Operand, Pointer

    def kernel(out: Pointer(f32), q_map: TensorMap, out_map: TensorMap, n: i32):
        pass

    given = []
    monkeypatch.setattr(simulator, "launch", lambda *arguments: given.append(arguments))
    monkeypatch.setattr(
        simulator, "SimulatedTensorMap", lambda *arguments: arguments, raising=False
    )
    layouts = {"q": object(), "out": object()}
    arrays = {name: np.zeros(4, np.float32) for name in ("q", "out")}
    operands = {name: Operand(0, array) for name, array in arrays.items()}
    maps = {f"{name}_map": launch.Mapped(name, layout) for name, layout in layouts.items()}
    arguments = {**maps, "n": 3}
    bound = launch.SimulatedLaunch(Kernel("forward", kernel, 32, 0), 7, arguments)
    bound.bind(operands)(0)
    (function, grid, threads, (_, q_map, out_map, n), smem, _, cluster) = given[0]
    assert cluster == 1
    assert (function, grid, threads, smem, n) == (kernel, 7, 32, 0, 3)
    assert q_map[0] is arrays["q"] and q_map[1] is layouts["q"]
    assert out_map[0] is arrays["out"] and out_map[1] is layouts["out"]
