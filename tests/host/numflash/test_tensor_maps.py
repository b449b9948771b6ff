"""Tensor maps: which tensors have one, what the driver is asked for, and what arrives in a launch.

The driver is stubbed, down to the C function that encodes maps: see `tests.fake_gpu`.
"""

import threading
import timeit
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import numflash
from numflash.api import plans
from numflash.calls import launch
from numflash.calls.encoding import _encode_tiled, encoder
from numflash.configs import Traits, parse_config
from numflash.problem.problem import Tensor, as_tensor
from numflash.problem.tensor_maps import TensorLayout, misfit
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.mode import SIMULATED
from numflash.runtime.views import ArrayView, contiguous_strides
from tests.support import fake_gpu
from tests.support.fake_gpu import EncodedMap

on_the_gpu = pytest.mark.skipif(SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM unset")
FLOAT16, BFLOAT16 = 6, 9
B, S, H, D = 2, 100, 8, 64
BASE = 0x7F00_0000_0000
FORCED = "sm90-m64n64w4s1"


def tensor(shape, strides=None, dtype="float16", pointer=BASE, layout="bshd"):
    """A tensor with strides in elements, contiguous unless told otherwise."""
    view = ArrayView(pointer, shape, strides or contiguous_strides(shape), dtype, 0)
    return as_tensor("x", view, layout)


# Layouts


def test_keys_come_in_tiles_of_rows():
    layout = TensorLayout.of_keys(tensor((B, S, H, D)), 176)
    assert layout == TensorLayout(
        "float16",
        extents=(D, S, H, B),
        strides=(2 * H * D, 2 * D, 2 * S * H * D),
        box=(64, 176, 1, 1),
    )
    assert layout.swizzle_bytes == 128


def test_queries_come_in_tiles_of_64_rows_of_packed_heads():
    x = tensor((B, S, H, D), dtype="bfloat16")
    assert TensorLayout.of_queries(x, 4) == TensorLayout(
        "bfloat16",
        extents=(D, 4, S, H // 4, B),
        strides=(2 * D, 2 * H * D, 2 * 4 * D, 2 * S * H * D),
        box=(64, 4, 16, 1, 1),
    )
    assert TensorLayout.of_queries(x, 1).extents == (D, 1, S, H, B)
    assert TensorLayout.of_queries(x, 1).strides[1:] == (2 * H * D, 2 * D, 2 * S * H * D)
    assert TensorLayout.of_queries(x, 1).box == (64, 1, 64, 1, 1)


def test_extents_are_those_of_the_tensor_and_boxes_those_of_the_tile():
    for columns in (8, 40, 72, 256):
        layout = TensorLayout.of_keys(tensor((1, 3, 2, columns)), 128)
        assert (layout.extents, layout.box) == ((columns, 3, 2, 1), (64, 128, 1, 1))
    # 128 bytes of what is smaller are more.
    assert TensorLayout.of_keys(tensor((1, 3, 2, 64), dtype="uint8"), 128).box[0] == 128


def test_transposed_values_come_in_tiles_of_all_columns_and_128_tokens():
    """Codes of V, (batch, heads, head_dim, tokens); here every second head of an array."""
    strides = (2 * H * 192 * 448, 2 * 192 * 448, 448, 1)
    view = ArrayView(BASE, (B, H, 192, 448), strides, "uint8", 0)
    values = Tensor("v", view, view.shape, view.strides)
    assert TensorLayout.of_transposed_values(values) == TensorLayout(
        "uint8",
        extents=(448, 192, H, B),
        strides=(448, strides[1], strides[0]),
        box=(128, 192, 1, 1),
    )
    assert misfit(values, is_transposed=True) is None
    odd = replace(values, strides=(*strides[:2], 456, 1))
    why = "its column stride of 456 bytes is not a multiple of 16"
    assert misfit(odd, is_transposed=True) == why


def test_layout_bhsd_and_missing_axes_are_no_obstacle():
    by_heads = TensorLayout.of_keys(tensor((B, H, S, D), layout="bhsd"), 64)
    assert (by_heads.extents, by_heads.strides) == ((D, S, H, B), (128, 128 * S, 128 * S * H))
    assert TensorLayout.of_keys(tensor((S, H, D)), 64).extents == (D, S, H, 1)
    assert TensorLayout.of_keys(tensor((S, D)), 64).extents == (D, S, 1, 1)
    assert TensorLayout.of_keys(tensor((S, D)), 64).strides[0] == 2 * D


@pytest.mark.parametrize("columns, legal", [(64, 128), (60, 128), (1, 16)])
def test_a_stride_that_is_never_taken_is_a_legal_one(columns, legal):
    x = tensor((1, 1, 1, columns), (-7, 0, 3, 1))
    assert misfit(x) is None
    assert TensorLayout.of_keys(x, 64).strides == (legal,) * 3
    assert TensorLayout.of_queries(x, 1).strides == (legal,) * 4


# Which tensors have one


DESCRIBED = {
    "contiguous": ((B, S, H, D), None),
    "sliced rows of 120 bytes": ((B, S, H, 60), (S * H * 64, H * 64, 64, 1)),
    "of a packed qkv": ((B, S, H, D), (3 * S * H * D, 3 * H * D, D, 1)),
    "heads before rows": ((B, S, H, D), (S * H * D, D, S * D, 1)),
    "one of each": ((1, 1, 1, 1), (1, 1, 1, 1)),
    "just below the reach": ((2, 1, 1, D), (2**38 - 8, 1, 1, 1)),
}


@pytest.mark.parametrize("shape, strides", DESCRIBED.values(), ids=DESCRIBED)
def test_what_can_be_described(shape, strides):
    assert misfit(tensor(shape, strides)) is None


REFUSED = {
    "address": ((B, S, H, D), None, BASE + 8, "address 0x7f0000000008 is not a multiple of 16"),
    "row": ((1, S, 1, 33), None, BASE, "row stride of 66 bytes is not a multiple of 16"),
    "head": ((1, S, 2, D), (0, 160, 68, 1), BASE, "head stride of 136 bytes is not a multiple"),
    "batch": ((2, S, 1, D), (1001, 64, 64, 1), BASE, "batch stride of 2002 bytes is not a mult"),
    "backwards": ((B, S, H, D), (S * H * D, -H * D, D, 1), BASE, "row stride of -1024 bytes is n"),
    "broadcast": ((B, S, H, D), (0, H * D, D, 1), BASE, "batch stride of 0 bytes is not positive"),
    "far": ((2, 1, 1, D), (2**38, 1, 1, 1), BASE, "2 steps of 549755813888 bytes along the batch"),
    # Packed, 2**10 heads are one step.
    "far heads": ((1, 1, 2**10, D), (1, 1, 2**29, 1), BASE, "along the head axis reach 2**40"),
    "many": ((2**32 + 1, 1, 1, 8), (8, 8, 8, 1), BASE, "batch axis has 4294967297 elements, more"),
    "no keys": ((B, 0, H, D), None, BASE, "it is empty"),
}


@pytest.mark.parametrize("shape, strides, pointer, why", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_described_and_why(shape, strides, pointer, why):
    assert why in misfit(tensor(shape, strides, pointer=pointer))


# What the driver is asked for


@pytest.fixture
def hopper(monkeypatch):
    """A fake H200."""
    return fake_gpu.install(monkeypatch, (9, 0), num_sms=132, l2_bytes=50 * 2**20)


@on_the_gpu
def test_the_driver_is_told_all_of_a_layout(hopper):
    layout = TensorLayout("bfloat16", (64, 3, 5), (128, 1024), (64, 2, 4))
    encoded = encoder(hopper.driver, layout)(BASE)
    assert len(encoded) == 128
    assert hopper.driver.maps == [
        EncodedMap(9, BASE, (64, 3, 5), (128, 1024), (64, 2, 4), (1, 1, 1), 0, 3, 3, 0)
    ]
    encoder(hopper.driver, replace(layout, dtype="uint8", swizzle_bytes=0))(BASE + 16)
    assert hopper.driver.maps[1][:2] == (0, BASE + 16) and hopper.driver.maps[1].swizzle == 0
    encoder(hopper.driver, replace(layout, l2_bytes=128))(BASE)
    assert hopper.driver.maps[2] == hopper.driver.maps[0]._replace(l2_promotion=2)


@on_the_gpu
def test_what_the_driver_refuses_is_an_error(hopper):
    layout = TensorLayout("float16", (64, 3), (128,), (64, 2))
    hopper.driver.encode_status = 1
    with pytest.raises(RuntimeError, match=r"cuTensorMapEncodeTiled reports error 1 for .*64, 3"):
        encoder(hopper.driver, layout)(BASE)
    hopper.driver.cuGetProcAddress = lambda *_: (fake_gpu.OK, 0, 1)
    _encode_tiled.cache_clear()
    with pytest.raises(RuntimeError, match="it is older than"):
        encoder(hopper.driver, layout)(BASE)


def test_numbers_are_those_of_the_drivers_enumerations():
    driver = pytest.importorskip("cuda.bindings.driver")
    from numflash.calls import encoding

    for name, number in encoding._DTYPES.items():
        kind = f"CU_TENSOR_MAP_DATA_TYPE_{name.upper()}"
        assert getattr(driver.CUtensorMapDataType, kind) == number
    swizzles, promotions = driver.CUtensorMapSwizzle, driver.CUtensorMapL2promotion
    for n_bytes, number in encoding._SWIZZLES.items():
        name = f"{n_bytes}B" if n_bytes else "NONE"
        assert getattr(swizzles, f"CU_TENSOR_MAP_SWIZZLE_{name}") == number
    for n_bytes, number in encoding._L2_PROMOTIONS.items():
        assert getattr(promotions, f"CU_TENSOR_MAP_L2_PROMOTION_L2_{n_bytes}B") == number


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
    others = {name: run.arguments[name] for name in run.arguments if name not in maps_of(run)}
    assert others == {
        "out": out.data.ptr,
        "lse": lse.data.ptr,
        "scores.alibi.slopes": 0,
        "out.split": 0,
        "out.batch": S * H * 96,
        "out.row": H * 96,
        "out.head": 96,
        "scores.alibi.batch": 0,
        "scores.alibi.head": 0,
        "shape.batch_size": B,
        "shape.seqlen_q": S,
        "shape.seqlen_k": 70,
        "shape.num_heads_q": H,
        "shape.group_size": 4,
        "mask.lo": -S,
        "mask.hi": 70,
        "scores.alibi.shift": 70 - S,
        "layout.pack": 1,
        "layout.num_splits": 1,
        "layout.heads_in_flight": B * H,
        "scores.scale": 0.25,
        "scores.softcap": 0.0,
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
def test_warmup_compiles_what_attention_will_launch_on_hopper(hopper, monkeypatch):
    compiled = []

    def get_cubin(config, traits, limits):
        compiled.append(f"{config.family}|{config}|{traits}")
        return fake_gpu.fake_get_cubin(config, traits, limits)

    monkeypatch.setattr(plans, "get_cubin", get_cubin)
    for head_dim in (128, 100):
        numflash.warmup("bfloat16", head_dim)
        q = hopper.array((16, 512, 8, head_dim), "bfloat16")
        numflash.attention(q, q, q)
    assert compiled == hopper.driver.kernels
    assert [kernel.split("|")[1][:4] for kernel in compiled] == ["sm90", "sm80"]


@on_the_gpu
def test_a_warm_call_with_maps_costs_little_host_time(hopper, monkeypatch):
    q, out = hopper.array((B, S, H, D)), hopper.array((B, S, H, D))
    numflash.attention(q, q, q, out=out)
    status = (fake_gpu.OK,)
    monkeypatch.setattr(fake_gpu.Driver, "cuLaunchKernel", lambda self, *_: status)
    plan = numflash.plan(q, q, q, out=out)
    # As in test_launch_stubbed: 25 and 8 microseconds on a quiet machine, 4 times that here.
    for call, promised in ((lambda: numflash.attention(q, q, q, out=out), 25), (plan.launch, 8)):
        assert min(timeit.repeat(call, number=200, repeat=10)) / 200 * 1e6 < 4 * promised


# The simulator


@pytest.mark.skipif(not SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM=1")
def test_the_simulator_is_given_the_array_and_the_layout(monkeypatch):
    from numflash import simulator
    from numflash.kernels.arguments import Pointer
    from numflash.kernels.kernel import Kernel
    from numflash.ptx import TensorMap, f32, i32
    from numflash.runtime.views import Operand

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
    (function, grid, threads, (_, q_map, out_map, n), smem, _) = given[0]
    assert (function, grid, threads, smem, n) == (kernel, 7, 32, 0, 3)
    assert q_map[0] is arrays["q"] and q_map[1] is layouts["q"]
    assert out_map[0] is arrays["out"] and out_map[1] is layouts["out"]
