"""Every tile of rows has its place, and blocks that walk through the places have as much to do."""

import ast
import inspect
import re

import numpy as np
import pytest

from numflash.configs import Traits, parse_config
from numflash.kernels.arguments import Mask, Shape
from numflash.ptx import i32, u32
from numflash.selection.geometry import heads_of_a_bundle
from numflash.selection.layout import Launch, Tiling, taken_by
from numflash.selection.layout import places as places_of
from numflash.tiles import addresses, division, sequences
from numflash.tiles import blocks as blocks_of_tiles
from numflash.tiles.blocks import make_block_place, make_place_of_keys, make_place_of_queries
from numflash.tiles.sequences import (
    last_of,
    seen_from_keys,
    sequence_of_all,
    tiles_seen,
    tiles_seen_whole,
)

NUM_SMS, L2_BYTES = 132, 50 * 2**20


def places(tile_m, seqlen_q, num_heads, pack, num_splits, heads_in_flight):
    """The answer of `block_place` for each place."""
    locate, rows = make_block_place(tile_m), i32(seqlen_q * pack)
    count = -(-seqlen_q * pack // tile_m) * (num_heads // pack) * num_splits
    grid = rows, i32(num_heads), i32(pack), i32(num_splits), i32(heads_in_flight)
    return [tuple(map(int, locate(u32(place), grid))) for place in range(count)]


@pytest.mark.parametrize("heads_in_flight", [1, 2, 3, 8])
@pytest.mark.parametrize(("pack", "num_splits"), [(1, 1), (4, 1), (1, 3), (2, 2)])
def test_every_tile_has_one_place(pack, num_splits, heads_in_flight):
    found = places(64, 300, 8, pack, num_splits, heads_in_flight)
    rows = range(0, 300 * pack, 64)
    expected = {(m, h, s) for m in rows for h in range(0, 8, pack) for s in range(num_splits)}
    assert len(found) == len(expected) and set(found) == expected


def test_the_last_bundle_goes_from_the_last_rows_to_the_first_and_others_to_and_fro():
    found = places(64, 256, 5, 1, 1, 2)
    by_bundle = [[m for m, h, _ in found if h // 2 == bundle] for bundle in range(3)]
    assert by_bundle[2] == [192, 128, 64, 0]
    assert by_bundle[1] == sorted(by_bundle[1]) and by_bundle[0] == by_bundle[1][::-1]


@pytest.mark.parametrize("seqlen", [512, 1024, 2048, 4096, 8192, 16384])
@pytest.mark.parametrize(
    ("head_dim", "text"), [(64, "m192n128w12s2"), (128, "m128n128w8s2"), (256, "m128n80w8s2")]
)
def test_causal_walks_are_even(head_dim, text, seqlen):
    """No block has more than a tenth above the mean, in the FlashAttention papers' grid."""
    config = parse_config("forward", f"sm90-{text}-persistent")
    heads = 16384 // seqlen * 2048 // head_dim
    fits = L2_BYTES // 2 // (seqlen * 4 * head_dim)
    in_flight = heads_of_a_bundle(config, fits, heads, NUM_SMS, 1)
    tiling = Tiling(seqlen, seqlen, config.tile_m, config.tile_n, -seqlen, 0)
    found = places_of(Launch(tiling, "in bundles", heads, in_flight=in_flight))
    # Tiles of keys that a tile of rows sees, and two for its beginning and end.
    loads = np.bincount(taken_by(len(found), NUM_SMS), found.tiles + 2, NUM_SMS)
    assert max(loads) < 1.1 * np.mean(loads)


def test_bundles_are_of_one_size_and_as_large_as_memory_allows():
    config = parse_config("forward", "sm90-m128n128w8s2-persistent")
    assert heads_of_a_bundle(config, 3, 16, 132, 1) == 16
    assert heads_of_a_bundle(config, 6, 32, 132, 1) == 16
    assert heads_of_a_bundle(config, 50, 256, 132, 1) == 43
    assert heads_of_a_bundle(config, 3, 1000, 132, 8) == 167
    assert heads_of_a_bundle(config, 0, 5, 1, 1) == 1
    # Blocks of other kernels do not walk.
    other = parse_config("forward", "sm80-m128n64w4s1")
    assert heads_of_a_bundle(other, 3, 16, 132, 1) == 3
    assert heads_of_a_bundle(other, 0, 16, 132, 1) == 1


TRAITS = Traits("float16", 64, 64)
SHAPE = Shape(*map(i32, (300, 200, 6, 3, 64, 64, 2)))


@pytest.mark.parametrize("tile", [16, 64, 512])
def test_each_tile_of_a_head_is_one_block_s(tile):
    """Of queries the last come first, of keys the first, each of all heads that take turns."""
    of_queries, of_keys = make_place_of_queries(tile, TRAITS), make_place_of_keys(tile, TRAITS)
    queries = [(b, h, m) for m in range(0, 300, tile)[::-1] for b in range(2) for h in range(6)]
    found = [of_queries(u32(number), SHAPE, None) for number in range(len(queries))]
    assert [(p.batch, p.head, p.start) for p in found] == queries
    assert all(p.head_kv == p.head // 3 and p.split == 0 for p in found)
    keys = [(b, h, n) for n in range(0, 200, tile) for b in range(2) for h in range(2)]
    found = [of_keys(u32(number), SHAPE, None) for number in range(len(keys))]
    assert [(p.batch, p.head_kv, p.start) for p in found] == keys
    assert all(p.head == p.head_kv * 3 for p in found)


@pytest.mark.parametrize(("lo", "hi"), [(-300, 200), (-300, -100), (-130, -90), (3, 40), (70, 50)])
def test_tiles_that_are_seen_and_seen_whole_are_those_of_the_mask(lo, hi):
    """Of the keys that tiles of queries see, and of the queries that see tiles of keys."""
    sequence = sequence_of_all(SHAPE, Mask(i32(lo), i32(hi)))
    distances = np.arange(200) - np.arange(300)[:, None]
    band = (distances >= lo) & (distances <= hi)
    for rows, tile in ((64, 16), (16, 64), (48, 32)):
        for mask, side in ((band, sequence), (band.T, seen_from_keys(sequence))):
            for first in range(0, len(mask), rows):
                last = last_of(i32(first), rows, i32(side.seqlen_q))
                seen = mask[first : first + rows]
                assert last == first + len(seen) - 1
                keys = tiles_seen(i32(first), last, tile, side)
                whole = tiles_seen_whole(i32(first), last, tile, side)
                for n in range(-(-mask.shape[1] // tile)):
                    of_tile = seen[:, n * tile : (n + 1) * tile]
                    assert (keys.begin <= n < keys.end) or not of_tile.any()
                    is_whole = of_tile.shape[1] == tile and of_tile.all()
                    assert (whole.first <= n * tile <= whole.last) == is_whole
                seen_tiles = range(keys.begin, keys.end)
                if seen.any():
                    assert seen[:, seen_tiles[0] * tile : (seen_tiles[0] + 1) * tile].any()
                    assert seen[:, seen_tiles[-1] * tile :].any()


def test_what_the_simulator_remembers_knows_numbers_only():
    """A function_of_numbers that reads where it runs, or memory, would give an old answer."""
    functions = [
        node
        for module in (addresses, blocks_of_tiles, division, sequences)
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.FunctionDef)
    ]
    remembered = [
        function
        for function in functions
        if "function_of_numbers" in map(ast.unparse, function.decorator_list)
    ]
    assert len(remembered) > 10
    unsure = {
        function.name
        for function in functions
        if re.search(r"\bcuda\.|\bmov_|\.data\b|\[", "".join(map(ast.unparse, function.body)))
    }
    assert {"walk", "next_place"} <= unsure
    for function in remembered:
        names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
        assert function.name not in unsure and not names & unsure, function.name
