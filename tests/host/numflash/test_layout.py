"""The host's places are those that the kernels' own functions compute from a block's number."""

import itertools
from dataclasses import replace
from functools import partial
from itertools import chain

import numpy as np
import pytest

from numflash.configs import Traits, parse_config
from numflash.kernels.arguments import BundledShape, Mask, RaggedShape, Shape
from numflash.kernels.mma.backward import place_in_heads
from numflash.problem.problem import AttentionProblem
from numflash.problem.sequences import ListShape
from numflash.ptx import i32, u32
from numflash.reference.sequences import Extents, lists_of
from numflash.selection import layout
from numflash.selection.layout import Launch, Tiling, launch_of, places, tile_kinds
from numflash.tiles import blocks
from numflash.tiles.sequences import (
    last_of,
    make_sequence_of,
    make_whole_keys,
    seen_from_keys,
    sequence_of_all,
    tiles_seen,
)
from numflash.tiles.steps import make_keys_of
from numflash.tiles.wgmma.turns_of_blocks import make_place_of_last_keys

DENSE = Traits("float16", 64, 64)
RAGGED = Traits("float16", 64, 64, ragged=True)
# Edges that begin or end a tile, or are one off.
BANDS = {
    "full": (-(2**30), 2**30),
    "causal": (-(2**30), -31),
    "window": (-62, -2),
    "wider window": (-65, 31),
    "none": (400, 500),
}
SIZES = [(300, 200), (33, 513), (1, 130), (64, 0), (128, 256)]
HEADS, GROUP, BATCH = 8, 4, 2


def rows_of(found):
    """(first row, head, split, begin, end) of each place."""
    columns = found.start, found.head, found.split, found.begin, found.end
    return list(zip(*(x.tolist() for x in columns), strict=True))


def numbers(place, begin, end, heads=HEADS):
    """The same of a kernel's `Place`; a walk without tiles ends where it begins."""
    begin = int(begin)
    end = max(begin, int(end))
    return int(place.start), int(place.batch * heads + place.head), int(place.split), begin, end


def problem_of(q, k, band, heads=HEADS, group=GROUP, batch=BATCH):
    """An `AttentionProblem`."""
    lo, hi = BANDS[band]
    heads_kv = heads // group
    return AttentionProblem(batch, q, k, heads, heads_kv, 64, 64, "float16", 0.1, lo, hi, 0)


def shape_and_mask(problem):
    """The records of kernels."""
    sizes = problem.seqlen_q, problem.seqlen_k, problem.num_heads_q, problem.group_size
    shape = Shape(*map(i32, (*sizes, 64, 64, problem.batch)))
    return shape, Mask(i32(problem.band_lo), i32(problem.band_hi))


def walk_over(place, rows, tile, sequence):
    """The tiles of `tile` that a kernel without splits walks over from a tile of `rows`."""
    last = last_of(place.start, rows, sequence.seqlen_q)
    return tiles_seen(place.start, last, tile, sequence)


FORWARDS = ["sm80-m64n32w4s2", "sm80-m16n64w1s1x3", "sm80-m128n16w4s1x2", "sm90-m64n128w4s2"]


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("text", FORWARDS)
def test_forward_places(text, band):
    config = parse_config("forward", text)
    place_of, keys_of = blocks.make_place_of(config.tile_m, DENSE), make_keys_of(config, DENSE)
    for (q, k), pack, in_flight in itertools.product(SIZES, (1, 4), (1, 3)):
        problem = problem_of(q, k, band)
        shape, mask = shape_and_mask(problem)
        grid = blocks.Grid(
            i32(q * pack), i32(HEADS * BATCH), i32(pack), i32(config.num_splits), i32(in_flight)
        )
        found = places(launch_of(config, problem, pack, in_flight))
        expected, sequence = [], sequence_of_all(shape, mask)
        for number in range(len(found)):
            place = place_of(u32(number), grid, shape, mask)
            expected.append(numbers(place, *keys_of(place, grid, sequence, mask)))
        assert rows_of(found) == expected
        assert found.block.tolist() == list(range(len(found)))
        tiles = itertools.product(
            range(0, q * pack, config.tile_m),
            range(0, HEADS * BATCH, pack),
            range(config.num_splits),
        )
        assert sorted(row[:3] for row in expected) == sorted(tiles)


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize(
    ("family", "text"),
    [("forward", "m32n64w4"), ("backward-dq", "m64n32w4"), ("backward-dq", "sm90-m64n128w4s2")],
)
def test_places_of_queries(family, text, band):
    config = parse_config(family, text)
    place_of = blocks.make_place_of_queries(config.tile_m, DENSE)
    for q, k in SIZES:
        problem = problem_of(q, k, band)
        shape, mask = shape_and_mask(problem)
        found, expected = places(launch_of(config, problem)), []
        for number in range(len(found)):
            place = place_of(u32(number), shape, mask)
            walk = walk_over(place, config.tile_m, config.tile_n, sequence_of_all(shape, mask))
            expected.append(numbers(place, *walk))
        assert rows_of(found) == expected and found.repeats == 1
        assert len(set(expected)) == -(-q // config.tile_m) * HEADS * BATCH


def fused_place_of(config, shape):
    """place_of(number): the tiles of a block of the backward in one kernel on `mma`."""
    tiles, splits = -(-int(shape.seqlen_k) // config.tile_n), config.num_splits

    def places_of(number):
        split, head_kv, batch = place_in_heads(u32(number), i32(splits), i32(HEADS // GROUP))
        for n_block in range(split, tiles, splits):
            start = i32(n_block * config.tile_n)
            yield blocks.Place(start, i32(head_kv * GROUP), head_kv, batch, split)

    return places_of


def of_keys(config, shape, mask, in_flight):
    """places_of(number): the places of a block that owns keys, by the kernels' functions."""
    if config.family == "backward" and not hasattr(config, "dq_buffers"):
        return fused_place_of(config, shape)
    if config.family == "backward":
        place_of = make_place_of_last_keys(config.tile_n, DENSE)
        shape = BundledShape(*shape, i32(in_flight))
    else:
        place_of = blocks.make_place_of_keys(config.tile_n, DENSE)
    if not getattr(config, "apart", False):
        return lambda number: [place_of(u32(number), shape, mask)]
    # The first of two blocks computes dV.
    return lambda number: [place_of(u32(number // 2), shape, mask)._replace(split=i32(number % 2))]


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("backward-dkdv", "m32n64w4"),
        ("backward-dkdv", "sm80-m32n64w4s1"),
        ("backward-dkdv", "sm80-m32n64w4s1-apart"),
        ("backward-dkdv", "sm90-m64n128w8s2"),
        ("backward", "sm80-m32n64w4s1x3"),
        ("backward", "sm90-m64n128w8s2"),
    ],
)
def test_places_of_keys(family, text, band):
    config = parse_config(family, text)
    for (q, k), in_flight in itertools.product(SIZES, (1, 3)):
        problem = problem_of(q, k, band)
        shape, mask = shape_and_mask(problem)
        found, expected, of_blocks = places(launch_of(config, problem, 1, in_flight)), [], []
        places_of = of_keys(config, shape, mask, in_flight)
        sequence = seen_from_keys(sequence_of_all(shape, mask))
        for number in range(int(found.block.max(initial=-1)) + 1):
            for place in places_of(number):
                walk = walk_over(place, config.tile_n, config.tile_m, sequence)
                expected.append(numbers(place, *walk))
                of_blocks.append(number)
        assert rows_of(found) == expected and found.block.tolist() == of_blocks
        assert found.repeats == GROUP
        apart = 1 + getattr(config, "apart", False)
        heads = HEADS // GROUP * BATCH
        assert len(set(expected)) == len(expected) == -(-k // config.tile_n) * heads * apart


@pytest.mark.parametrize("family", ["backward-dq", "backward-dkdv"])
def test_heads_take_turns_in_bundles_of_which_only_the_first_has_fewer(family):
    config, traits = parse_config(family, "sm80-m64n64w4s1"), Traits("float16", 256, 256)
    # Of 16 heads of queries, or 4 of keys, three have room in a bundle.
    problem = replace(problem_of(2500, 2500, "causal"), head_dim=256, head_dim_v=256)
    shape, mask = shape_and_mask(problem)
    found = places(launch_of(config, problem))
    by_keys = family == "backward-dkdv"
    make = blocks.make_place_of_keys if by_keys else blocks.make_place_of_queries
    place_of = make(64, traits)
    at = [place_of(u32(number), shape, mask) for number in range(len(found))]
    assert [(int(p.start), int(p.batch * HEADS + p.head)) for p in at] == list(
        zip(found.start.tolist(), found.head.tolist(), strict=True)
    )
    heads, tiles = (found.head // (GROUP if by_keys else 1)).tolist(), 40
    assert heads[:tiles] == [0] * tiles and heads[tiles:] == [
        head
        for first in range(1, max(heads), 3)
        for _ in range(tiles)
        for head in range(first, first + 3)
    ]
    start = found.start[tiles::3].reshape(-1, tiles)
    assert (np.diff(start, axis=1) == (64 if by_keys else -64)).all()


@pytest.mark.parametrize(
    ("by_keys", "pack", "least"), [(False, 1, 0), (False, 4, 0), (False, 1, 2), (True, 1, 0)]
)
def test_places_of_lists(by_keys, pack, least):
    q, k = (np.array(x, np.int64) for x in ((33, 0, 200, 1), (100, 70, 513, 0)))
    extents = (Extents(np.cumsum(x) - x, x, False) for x in (q, k))
    tiles = lists_of(*extents, ListShape(64, 32, pack, by_keys, -200, 0, 1, least)).tiles
    heads, shape = HEADS // (GROUP if by_keys else pack), [i32(0)] * len(RaggedShape._fields)
    shape = RaggedShape(*shape)._replace(
        records=tiles, num_heads_q=i32(HEADS), group_size=i32(GROUP), aligned=i32(1)
    )
    mask, grid = Mask(i32(-200), i32(0)), blocks.Grid(*map(i32, (0, 0, pack, 1, 1)))
    if by_keys:
        place_of = blocks.make_place_of_keys(64, RAGGED)
        found = layout.listed_places(tiles, heads, GROUP, GROUP)
    else:
        place_of = partial(blocks.make_place_of(64, RAGGED), grid=grid)
        found = layout.listed_places(tiles, heads, pack)
    expected = []
    for number in range(len(found)):
        place = place_of(u32(number), shape=shape, mask=mask)
        expected.append(numbers(place, *place.tiles))
        sequence = make_sequence_of(RAGGED)(place, shape, mask)
        assert place.start < (sequence.seqlen_k if by_keys else sequence.seqlen_q * pack)
    assert rows_of(found) == expected and len(set(expected)) == len(expected) > 0
    assert blocks.make_is_idle(RAGGED)(u32(len(found)), i32(heads), shape)


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize(("rows", "tile", "pack"), [(64, 16, 1), (48, 32, 3), (16, 128, 4)])
def test_kinds_are_those_of_the_mask_and_of_the_kernels(rows, tile, pack, band):
    lo, hi = BANDS[band]
    for q, k in SIZES:
        tiling = Tiling(q * pack, k, rows, tile, lo, hi, pack)
        distances = np.arange(k) - np.repeat(np.arange(q), pack)[:, None]
        seen, found = (distances >= lo) & (distances <= hi), tile_kinds(tiling)
        assert found.shape == (tiling.row_tiles, tiling.column_tiles)
        shape, mask = shape_and_mask(problem_of(q, k, band))
        sequence = sequence_of_all(shape, mask)
        grid = blocks.Grid(*map(i32, (q * pack, 1, pack, 1, 1)))
        whole_keys = make_whole_keys(tile, rows)
        for m, n in np.ndindex(found.shape):
            part = seen[m * rows : (m + 1) * rows, n * tile : (n + 1) * tile]
            is_whole = part.shape[1] == tile and part.all()
            assert (found[m, n] == layout.WHOLE) == is_whole
            assert found[m, n] != layout.EMPTY or not part.any()
            whole = whole_keys(i32(m * rows), grid, sequence)
            assert is_whole == (whole.first <= n * tile <= whole.last)


def test_persistent_blocks_take_every_place_once_as_the_kernels_do(monkeypatch):
    for count, num_blocks in ((5, 1), (7, 2), (3, 3), (2, 4), (23, 5), (0, 3), (1000, 132)):
        monkeypatch.setattr(blocks, "mov_nctaid_x", lambda n=num_blocks: u32(n))
        grid = blocks.Grid(*map(i32, (count * 64, 1, 1, 1, 1)))
        walk = blocks.make_walk(64, DENSE)
        walks = [found.tolist() for found in layout.persistent_walks(count, num_blocks)]
        assert len(walks) == num_blocks and sorted(chain(*walks)) == list(range(count))
        for number, found in enumerate(walks):
            monkeypatch.setattr(blocks, "mov_ctaid_x", lambda x=number: u32(x))
            place, num_places = walk(grid, None)
            expected = []
            while place < num_places:
                expected.append(int(place))
                place = blocks.next_place(place, u32(len(expected) % 2))
            assert found == expected


def test_a_kernel_without_tiles_has_no_order():
    with pytest.raises(ValueError, match="blocks of delta own no tiles"):
        layout.order_of(parse_config("delta", "w4"))


def test_a_launch_of_plain_numbers():
    launch = Launch(Tiling(256, 256, 128, 64, -256, 0), "last queries first", 2)
    found = places(launch)
    assert found.head.tolist() == [0, 0, 1, 1] and found.start.tolist() == [128, 0, 128, 0]
    assert found.tiles.tolist() == [4, 2, 4, 2] and len(found) == 4
