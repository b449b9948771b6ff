"""Ragged tensor maps: bulk copies end where a sequence does, and nothing else leaves its array."""

import numpy as np
import pytest

from numflash.problem.problem import as_tensor
from numflash.problem.tensor_maps import TensorLayout
from numflash.ptx import (
    EVICT_NORMAL,
    cp_async_bulk_commit_group,
    cp_async_bulk_tensor_4d,
    cp_async_bulk_tensor_4d_store,
    cp_async_bulk_wait_group_read,
    cuda,
    fence_proxy_async,
    mbarrier_arrive_expect_tx,
    mbarrier_wait_parity,
    u32,
)
from numflash.runtime.arrays import library_of
from numflash.simulator import SimulatedTensorMap, SimulationError
from tests.support.bulk_copy_kernels import begin, run

HEADS, COLUMNS, ROWS = 4, 64, 16


def described(array, layout="bshd"):
    return as_tensor("x", library_of(array, "x").view(array, "x"), layout)


def packed(tokens):
    """(1, tokens, HEADS, COLUMNS) numbers that are all different from those of neighbours."""
    shape = 1, tokens, HEADS, COLUMNS
    return (np.arange(1, np.prod(shape) + 1) % 2039).astype(np.float16).reshape(shape)


def keys_at(layout, column, head, seqlen, first, row):
    """Coordinates of row `row` of a sequence in K or V."""
    return column, layout.shift - seqlen + row, head, first + seqlen


def read(map, coordinates):
    """A tile as (rows, columns), without its swizzle: `read` gives it in order."""
    map.check(coordinates)
    tile = map.read(coordinates).reshape(-1).view(np.float16)
    return tile.reshape(-1, map.layout.box[0])


# Sequences that are one behind the other


@pytest.mark.parametrize("first, seqlen", [(0, 16), (0, 21), (16, 5), (21, 1), (22, 0), (22, 18)])
def test_loads_end_with_their_sequence(first, seqlen):
    """Its neighbours are NaN: nothing of them arrives."""
    x = packed(40)
    own = x[0, first : first + seqlen].copy()
    x[...] = np.nan
    x[0, first : first + seqlen] = own
    layout = TensorLayout.of_ragged_keys(described(x), ROWS)
    map = SimulatedTensorMap(x, layout)
    for head in range(HEADS):
        for row in range(0, 48, ROWS):
            got = read(map, keys_at(layout, 0, head, seqlen, first, row))
            expected = np.zeros((ROWS, COLUMNS), np.float16)
            inside = own[row : row + ROWS, head]
            expected[: len(inside)] = inside
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("pack", [1, 2, 4])
def test_loads_of_packed_heads_end_with_their_sequence(pack):
    x, first, seqlen = packed(90), 3, 70
    own = x[0, first : first + seqlen].copy()
    x[...] = np.nan
    x[0, first : first + seqlen] = own
    layout = TensorLayout.of_ragged_queries(described(x), pack)
    map = SimulatedTensorMap(x, layout)
    tokens = 64 // pack
    for head in range(HEADS // pack):
        for token in range(0, 96, tokens):
            at = 0, 0, layout.shift - seqlen + token, head, first + seqlen
            expected = np.zeros((tokens, pack, COLUMNS), np.float16)
            inside = own[token : token + tokens, head * pack : (head + 1) * pack]
            expected[: len(inside)] = inside
            np.testing.assert_array_equal(read(map, at), expected.reshape(64, COLUMNS))


def test_stores_leave_out_what_is_behind_their_sequence():
    x, first, seqlen = packed(90), 3, 70
    before = x.copy()
    layout = TensorLayout.of_ragged_queries(described(x), 2)
    map = SimulatedTensorMap(x, layout)
    tile = np.full((64, COLUMNS), -1, np.float16).view(np.uint8).reshape(-1, 16)
    map.write((0, 0, layout.shift - seqlen + 64, 1, first + seqlen), tile)
    written = x == -1
    expected = np.zeros(x.shape, bool)
    expected[0, first + 64 : first + seqlen, 2:] = True
    np.testing.assert_array_equal(written, expected)
    assert (x[~written] == before[~written]).all()


def test_a_padded_batch_ends_with_the_sequence_of_its_entry():
    whole = packed(2 * 3 * 24).reshape(3, 48, HEADS, COLUMNS)
    x = whole[:, :24]  # with gaps between entries
    own, whole[1, 5:12] = whole[1, 5:12].copy(), np.nan
    whole[...], whole[1, 5:12] = np.nan, own
    layout = TensorLayout.of_ragged_keys(described(x), ROWS)
    got = read(SimulatedTensorMap(x, layout), keys_at(layout, 0, 3, 7, 48 + 5, 0))
    np.testing.assert_array_equal(got[:7], own[:, 3])
    assert not got[7:].any()


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_a_page_ends_with_the_sequence_and_one_that_is_not_there_is_zeros(layout):
    x = packed(6 * 16).reshape(6, 16, HEADS, COLUMNS)
    own = x[4, :5].copy()
    x[...] = np.nan
    x[4, :5] = own
    if layout == "bhsd":
        x = np.ascontiguousarray(x.swapaxes(1, 2))
    described_layout = TensorLayout.of_pages(described(x, layout), ROWS)
    map = SimulatedTensorMap(x, described_layout)
    got = read(map, (*keys_at(described_layout, 0, 2, 5, 0, 0), 4))
    np.testing.assert_array_equal(got[:5], own[:, 2])
    assert not got[5:].any()
    for page in (6, -1, 2**31 - 1):
        assert not read(map, (*keys_at(described_layout, 0, 2, 5, 0, 0), page)).any()


def test_a_tile_beyond_two_to_the_31st():
    rows = 2**22 + 40
    # Untouched pages cost nothing.
    x = np.zeros((1, rows, HEADS, 2 * COLUMNS), np.float16)
    assert x.nbytes > 2**32
    own = packed(20)[0]
    x[0, -21:-1, :, :COLUMNS] = own
    layout = TensorLayout.of_ragged_keys(described(x), ROWS)
    map = SimulatedTensorMap(x, layout)
    got = read(map, keys_at(layout, 0, 2, 20, rows - 21, 8))
    np.testing.assert_array_equal(got[:12], own[8:, 2])
    assert not got[12:].any()


# What is refused


def copied_by(kind, coordinates, layout_of, x):
    """Run a kernel that copies a tile."""

    def kernel(map):
        smem, barriers = begin()
        for i in range(cuda.threadIdx.x, 512, 32):
            smem[i] = u32(1)
        fence_proxy_async()
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            if kind == "load":
                mbarrier_arrive_expect_tx(barriers, 0, 2048)
                cp_async_bulk_tensor_4d(smem, 0, map, barriers, 0, EVICT_NORMAL, *coordinates)
            else:
                cp_async_bulk_tensor_4d_store(map, *coordinates, smem, 0)
                cp_async_bulk_commit_group()
                cp_async_bulk_wait_group_read()
        if kind == "load":
            mbarrier_wait_parity(barriers, 0, 0)

    layout = layout_of(described(x), ROWS)
    run(kernel, SimulatedTensorMap(x, layout), smem=8192)


PLACES = {
    "below": ((0, 10, 0, 5), "begins with row -25, x"),
    "inside": ((0, 30, 0, 20), None),
    "the last rows": ((0, 24, 0, 24), None),
    "one below": ((0, 39, 0, 0), "begins with row -1, x"),
    "behind the sequence": ((0, 40, 0, 0), None),
    "behind the array": ((0, 0, 0, 41), None),
    "another head": ((0, 0, 4, 0), None),
}


@pytest.mark.parametrize("kind", ["load", "store"])
@pytest.mark.parametrize("coordinates, message", PLACES.values(), ids=PLACES)
def test_a_tile_of_rows_outside_the_array_is_refused(kind, coordinates, message):
    """What lies outside the dimensions is the unit's to leave out; what lies inside it copies."""
    x = packed(40)
    if message is None:
        copied_by(kind, coordinates, TensorLayout.of_ragged_keys, x)
        return
    with pytest.raises(SimulationError, match=message):
        copied_by(kind, coordinates, TensorLayout.of_ragged_keys, x)


def test_rows_of_another_head_are_refused():
    """By heads the rows before the first are those of another head: in the array, and wrong."""
    x = np.ascontiguousarray(packed(40).swapaxes(1, 2))
    layout = TensorLayout.of_ragged_keys(described(x, "bhsd"), ROWS)
    map = SimulatedTensorMap(x, layout)
    with pytest.raises(SimulationError, match=r"begins with row -6, x \+ y - 40, of its array"):
        map.check((0, 24, 1, 10))


def test_both_dimensions_step_by_a_row():
    layout = TensorLayout(
        *("float16", (64, 8, 1, 9), (128, 128, 256), (64, 8, 1, 1)), row_axes=(1, 3)
    )
    with pytest.raises(ValueError, match="dimensions 1 and 3 must both step by a row"):
        SimulatedTensorMap(np.zeros((8, 64), np.float16), layout)


def test_a_ragged_map_of_more_rows_than_its_array_is_refused():
    layout = TensorLayout.of_ragged_keys(described(packed(41)), ROWS)
    with pytest.raises(ValueError, match="a tensor map leaves its array"):
        SimulatedTensorMap(packed(40), layout)
