"""Tensor maps: their layouts, which tensors have one, and what the driver is asked for."""

from dataclasses import replace

import pytest

from numflash.calls.encoding import _encode_tiled, encoder
from numflash.problem.problem import Tensor, as_tensor
from numflash.problem.tensor_maps import (
    TensorLayout,
    misfit,
    ragged_misfit,
    rows_between_entries,
)
from numflash.runtime.views import ArrayView, contiguous_strides
from tests.support import fake_gpu
from tests.support.fake_gpu import EncodedMap
from tests.support.tensor_map_calls import B, D, H, S, on_the_gpu

BASE = 0x7F00_0000_0000


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


# Ragged


def test_packed_sequences_are_two_dimensions_of_rows():
    """x of 100 tokens, and y from the map's beginning to behind the last token."""
    x = tensor((1, S, H, D))
    row = 2 * H * D
    keys = TensorLayout.of_ragged_keys(x, 176)
    assert keys == TensorLayout(
        *("float16", (D, S, H, S + 1), (row, 2 * D, row), (64, 176, 1, 1)), row_axes=(1, 3)
    )
    queries = TensorLayout.of_ragged_queries(x, 4)
    assert queries == TensorLayout(
        *("float16", (D, 4, S, H // 4, S + 1), (2 * D, row, 8 * D, row), (64, 4, 16, 1, 1)),
        row_axes=(2, 4),
    )
    for layout in (keys, queries):
        assert (layout.shift, layout.shift_bytes) == (S, S * row)
    assert TensorLayout.of_keys(x, 176).shift == TensorLayout.of_keys(x, 176).shift_bytes == 0


@pytest.mark.parametrize(
    "shape, strides, between",
    [
        ((B, S, H, D), None, S),
        ((B, S, H, D), (5 * S * H * D, 5 * H * D, D, 1), S),
        ((B, S, H, D), (7 * 3 * H * D, 3 * H * D, D, 1), 7),
        ((B, S, H, D), (0, H * D, D, 1), 0),
        ((1, S, H, D), (-7, H * D, D, 1), 0),
        ((B, 1, H, D), (H * D, -7, D, 1), 1),
        ((B, 1, H, D), (0, 0, D, 1), 0),
        ((1, 1, H, D), (5, -7, D, 1), 0),
    ],
)
def test_entries_of_a_batch_are_rows_of_one_array(shape, strides, between):
    x = tensor(shape, strides)
    assert ragged_misfit(x) is None
    assert rows_between_entries(x) == between
    for layout in (TensorLayout.of_ragged_keys(x, 64), TensorLayout.of_ragged_queries(x, 2)):
        assert layout.extents[-1] == (shape[0] - 1) * between + shape[1] + 1
        assert layout.shift == shape[1]
        rows = [layout.strides[axis - 1] for axis in layout.row_axes]
        assert rows[0] == rows[1] > 0 and rows[0] % 16 == 0
        # The last element lies where the tensor has it.
        steps = (2, *layout.strides)
        last = sum((n - 1) * step for n, step in zip(layout.extents, steps, strict=True))
        by_batch, by_row = (2 * n for n in x.strides[:2])
        expected = (shape[0] - 1) * by_batch if shape[0] > 1 else 0
        expected += (shape[1] - 1) * by_row if shape[1] > 1 else 0
        expected += 2 * ((H - 1) * x.strides[2] + D - 1)
        assert last - layout.shift_bytes == expected


def test_a_batch_by_heads_is_ragged_too():
    layout = TensorLayout.of_ragged_keys(tensor((B, H, S, D), layout="bhsd"), 64)
    assert layout.extents == (D, S, H, (B - 1) * H * S + S + 1)
    assert layout.strides == (2 * D, 2 * S * D, 2 * D)


def test_pages_have_a_dimension_of_their_own():
    layout = TensorLayout.of_pages(tensor((40, 16, H, D)), 8)
    row = 2 * H * D
    assert layout == TensorLayout(
        *("float16", (D, 16, H, 17, 40), (row, 2 * D, row, 16 * row), (64, 8, 1, 1, 1)),
        row_axes=(1, 3),
    )
    assert (layout.shift, layout.shift_bytes) == (16, 16 * row)
    assert TensorLayout.of_pages(tensor((3, 1, 1, D), (D, -7, 0, 1)), 1).shift_bytes == 2 * D


RAGGED_REFUSED = {
    "rows before batches": (
        (B, S, H, D),
        (H * D, B * H * D, D, 1),
        "its batch stride of 1024 bytes is not a multiple of its row stride of 2048, so that its",
    ),
    "backwards": ((B, S, H, D), (-S * H * D, H * D, D, 1), "batch stride of -102400 bytes is not"),
    "rows backwards": ((B, S, H, D), (S * H * D, -H * D, D, 1), "row stride of -1024 bytes is no"),
    "row": ((1, S, 1, 33), None, "row stride of 66 bytes is not a multiple of 16"),
    "head": ((1, S, 2, D), (0, 160, 68, 1), "head stride of 136 bytes is not a multiple"),
    "no keys": ((B, 0, H, D), None, "it is empty"),
    "far": ((2, 2, 1, D), (2**38, D, 1, 1), "it is 4294967298 rows long, more than 2147483647"),
    "reach": ((2, 2, 1, D), (2**39, 2**19, 1, 1), "along the row axis reach 2**40 bytes"),
}


@pytest.mark.parametrize("shape, strides, why", RAGGED_REFUSED.values(), ids=RAGGED_REFUSED)
def test_what_is_not_ragged_and_why(shape, strides, why):
    assert why in ragged_misfit(tensor(shape, strides))


# What the driver is asked for


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
@pytest.mark.parametrize(
    "tokens, first",
    [(100, BASE - 100 * 1024), (2**33, BASE - 2**43), (2**37, 2**64 + BASE - 2**47)],
)
def test_a_ragged_map_begins_below_its_array(hopper, tokens, first):
    """Even below address 0: sums of addresses have 64 bits, and copies begin in the array."""
    layout = TensorLayout("float16", (64, tokens, 8, 5), (1024, 128, 1024), (64, 8, 1, 1))
    encoder(hopper.driver, replace(layout, row_axes=(1, 3)))(BASE)
    assert hopper.driver.maps == [
        EncodedMap(6, first, layout.extents, layout.strides, layout.box, (1,) * 4, 0, 3, 3, 0)
    ]


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
