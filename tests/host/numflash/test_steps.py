"""The steps of a walk are the tiles that the band and a list of blocks leave, in order."""

import itertools

import numpy as np
import pytest

from numflash.configs import Traits, parse_config
from numflash.kernels.arguments import BlockLists, BlockMask, Mask
from numflash.ptx import i32
from numflash.tiles.blocks import Grid, Place
from numflash.tiles.sequences import Keys, Sequence
from numflash.tiles.steps import make_keys_of, make_steps_of, make_tile_at

RNG = np.random.default_rng(3)


def mask_of_tiles(tiles, full):
    """The record of a kernel's mask, for boolean (heads, rows, columns)."""
    heads, rows, columns = tiles.shape
    entries = np.full(tiles.shape, -1, np.int32)
    for place in itertools.product(range(heads), range(rows)):
        found = np.flatnonzero(tiles[place])
        entries[place][: len(found)] = 2 * found + full[place][found]
    counts = tiles.sum(-1, dtype=np.int32)
    lists = BlockLists(
        entries.ravel(), counts.ravel(), i32(0), i32(rows if heads > 1 else 0), i32(columns)
    )
    return BlockMask(i32(-(2**30)), i32(2**30), lists)


def walked(traits, tile, mask, head, start, seen, by_keys=False):
    """(tile, is_full) of each step."""
    place = i32(0), i32(head), i32(start)
    begin, end = make_steps_of(traits, tile, by_keys)(mask, *place, Keys(*map(i32, seen)))
    at = make_tile_at(traits, tile, by_keys)
    found = [at(mask, i32(step)) for step in range(begin, end)]
    return [(int(n), bool(is_full)) for n, is_full in found]


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize(("blocks", "tile"), [((32, 48), 16), ((48, 32), 16), ((64, 64), 64)])
def test_steps_are_the_tiles_of_listed_blocks_within_the_band(blocks, tile, by_keys):
    traits = Traits("float16", 32, 32, blocks=blocks)
    own, other = blocks[::-1] if by_keys else blocks
    per_block = other // tile
    for density in (0, 0.1, 0.5, 1):
        tiles = RNG.random((2, 3, 7)) < density
        full = tiles & (RNG.random(tiles.shape) < 0.5)
        mask, most = mask_of_tiles(tiles, full), 7 * per_block
        for head, row in itertools.product(range(2), range(3)):
            for begin, end in itertools.combinations_with_replacement(range(most + 1), 2):
                wanted = [
                    (n, bool(full[head, row, n // per_block]))
                    for n in range(begin, end)
                    if tiles[head, row, n // per_block]
                ]
                start = row * own + own // 2
                assert walked(traits, tile, mask, head, start, (begin, end), by_keys) == wanted


def test_a_band_that_leaves_nothing_leaves_no_steps():
    traits, tiles = Traits("float16", 32, 32, blocks=(16, 16)), np.ones((1, 2, 4), bool)
    mask = mask_of_tiles(tiles, tiles)
    assert walked(traits, 16, mask, 0, 0, (3, 1)) == walked(traits, 16, mask, 0, 0, (4, 0)) == []


def test_without_blocks_steps_are_tiles():
    traits, mask = Traits("float16", 32, 32), Mask(i32(-9), i32(9))
    assert walked(traits, 16, mask, 0, 0, (2, 5)) == [(2, False), (3, False), (4, False)]


def test_splits_share_the_steps_of_a_list():
    traits = Traits("float16", 32, 32, blocks=(64, 32))
    config = parse_config("forward", "sm80-m32n16w1s1x3")
    tiles = np.array([[[0, 1, 1, 0, 1, 0, 0]]], bool)
    mask = mask_of_tiles(tiles, tiles)
    sequence = Sequence(*map(i32, (64, 7 * 32, 0, 0, -(2**20), 2**20, 0)))
    keys_of, at = make_keys_of(config, traits), make_tile_at(traits, 16)
    for splits in (2, 3, 5):
        grid = Grid(*map(i32, (64, 1, 1, splits, 1)))
        places = [Place(*map(i32, (0, 0, 0, 0, split))) for split in range(splits)]
        parts = [keys_of(place, grid, sequence, mask) for place in places]
        found = [int(at(mask, i32(n))[0]) for part in parts for n in range(*part)]
        assert found == [2, 3, 4, 5, 8, 9]
        assert max(end - begin for begin, end in parts) == -(-6 // splits)


def test_traits_know_which_tiles_divide_blocks():
    traits = Traits("float16", 64, 64, blocks=(128, 96))
    assert str(traits) == "float16-d64-dv64-vec-blocks128x96"
    assert Traits.parse(str(traits)) == traits
    assert traits.torn(128, 96) is traits.torn(64, 32) is None
    assert (
        traits.torn(192, 96) == "its tiles of 192 queries do not divide block_mask's blocks of 128"
    )
    assert "tiles of 64 keys" in traits.torn(64, 64)
    assert Traits("float16", 64, 64).torn(192, 80) is None
    for wrong in ((128,), (0, 128), (128, -16)):
        with pytest.raises(ValueError, match="blocks must be"):
            Traits("float16", 64, 64, blocks=wrong)
