"""The layout of the forward over the machine: splits, packed heads, bundles."""

import itertools
from dataclasses import replace

import pytest

from numflash.configs import (
    MmaForwardConfig,
    Traits,
    parse_config,
)
from numflash.configs.features import NO_FEATURES, Alibi
from numflash.problem.problem import AttentionProblem
from numflash.problem.sequences import Lengths, room_of
from numflash.runtime.devices import blocks_per_sm
from numflash.selection.geometry import (
    heads_in_flight,
    num_splits,
    rows_packed,
    tiles_listed,
    with_keys,
    with_splits,
)
from tests.host.numflash.test_dispatch import (
    HOPPER,
)

# Splits over the keys

FORWARD = MmaForwardConfig("sm80", 128, 64, 4, 1)
DECODE = MmaForwardConfig("sm80", 16, 64, 1, 1)
D128 = Traits("float16", 128, 128)


def slots(config, limits, num_sms):
    """Blocks that the machine holds at once, of at most eight warps an SM."""
    fit, _ = blocks_per_sm(limits, config.num_threads, 255, config.smem_bytes(D128))
    return num_sms * max(1, min(fit, 8 // config.num_warps))


@pytest.mark.parametrize("config", [FORWARD, DECODE], ids=str)
@pytest.mark.parametrize("num_sms", [1, 40, 132])
def test_a_grid_that_fills_the_machine_is_not_split(config, num_sms):
    full = slots(config, HOPPER, num_sms)
    for blocks in (full - full // 10, full, full + 1, 2 * full, 100 * full):
        assert num_splits(config, D128, HOPPER, num_sms, blocks, 2**20) == 1


def test_one_query_of_64k_keys_fills_132_sms():
    full = slots(DECODE, HOPPER, 132)
    for heads in (1, 2, 8, 32, 64, 128):
        splits = num_splits(DECODE, D128, HOPPER, 132, heads, 65536)
        # 128 splits are the most; the last wave may be 85 % as full as it could be.
        assert 0.8 * min(128 * heads, full) <= heads * splits <= full, (heads, splits)
        assert heads * splits >= 0.8 * 132


@pytest.mark.parametrize("config", [FORWARD, DECODE], ids=str)
def test_there_are_never_more_splits_than_blocks_of_keys(config):
    for blocks, seqlen_k in itertools.product((1, 3, 17, 100), range(0, 3000, 61)):
        splits = num_splits(config, D128, HOPPER, 132, blocks, seqlen_k)
        num_n_blocks = -(-seqlen_k // config.tile_n)
        assert 1 <= splits <= max(1, num_n_blocks)
        # Few keys are not worth a second kernel.
        if num_n_blocks <= 4:
            assert splits == 1


def test_splits_fill_the_last_wave_or_as_much_of_it_as_any_number_does():
    for blocks, num_sms in itertools.product(range(1, 300, 7), (1, 40, 108, 132)):
        full = slots(DECODE, HOPPER, num_sms)

        def fullness(splits, blocks=blocks, full=full):
            return blocks * splits / (-(-blocks * splits // full) * full)

        splits = num_splits(DECODE, D128, HOPPER, num_sms, blocks, 2**20)
        if blocks >= full:
            assert splits == 1
        elif splits > 1:
            most = 128 * max(1, 4 // DECODE.num_warps)
            others = range(1, min(most, -(-full // blocks)) + 1)
            others = [n for n in others if splits_with_keys(n, 2**20 // 64) == n]
            best = max(map(fullness, others))
            assert fullness(splits) >= 0.85 * best
            assert all(fullness(fewer) < 0.85 * best for fewer in others if fewer < splits)


def splits_with_keys(num_splits, num_n_blocks):
    """The number of splits that begin before the last block, as the kernels deal blocks out."""
    share = -(-num_n_blocks // num_splits)
    return sum(split * share < num_n_blocks for split in range(num_splits))


HOPPERS = parse_config("forward", "sm90-m64n128w4s2")
EIGHT_BITS = parse_config("forward", "fp8-sm90-m64n64w4s2")


@pytest.mark.parametrize("config", [FORWARD, DECODE, HOPPERS, EIGHT_BITS], ids=str)
def test_every_split_has_keys(config):
    traits = replace(D128, fp8=True) if config is EIGHT_BITS else D128
    # Hopper's kernel on 8 bits fetches two tiles of 64 keys at once, and deals these out.
    dealt_out, rounded = 128 if config in (HOPPERS, EIGHT_BITS) else 64, 0
    for blocks, num_n_blocks in itertools.product((1, 2, 5, 16), range(5, 800, 3)):
        seqlen_k = num_n_blocks * dealt_out - 7
        splits = num_splits(config, traits, HOPPER, 132, blocks, seqlen_k)
        assert splits_with_keys(splits, num_n_blocks) == splits, (blocks, num_n_blocks, splits)
        rounded += splits > 1
    assert rounded > 100


@pytest.mark.parametrize("config", [DECODE, HOPPERS], ids=str)
@pytest.mark.parametrize("window", [500, 1024, 5000, 20000])
def test_splits_share_the_keys_that_a_window_shows(config, window):
    n, seqlen_k = config.tile_n, 65536
    for last in range(seqlen_k - 130, seqlen_k, 13):
        bands = {"band_lo": last - window, "band_hi": last}
        seen = replace(problem(batch=1, seqlen_k=seqlen_k), **bands)
        splits = with_splits(config, seen, D128, HOPPER, 132).num_splits
        num_n_blocks = last // n + 1 - (last - window) // n
        empty = splits - splits_with_keys(splits, num_n_blocks)
        # A window that begins with a block of keys covers one block less than others.
        assert empty <= 1, (last, splits, num_n_blocks)
        assert splits > 1 or num_n_blocks <= 9
    unmasked = problem(batch=1, seqlen_k=seqlen_k, band_lo=-1, band_hi=seqlen_k)
    whole = with_splits(config, unmasked, D128, HOPPER, 132)
    assert whole.num_splits == num_splits(config, D128, HOPPER, 132, 2, seqlen_k)


def test_of_109_splits_of_172_blocks_86_had_keys():
    assert (splits_with_keys(109, 172), with_keys(172, 109)) == (86, 86)
    for num_n_blocks, asked in itertools.product(range(1, 200, 7), range(1, 150)):
        n = with_keys(num_n_blocks, asked)
        assert n == splits_with_keys(min(asked, num_n_blocks), num_n_blocks)
        # The longest share is as long as before.
        assert -(-num_n_blocks // n) == -(-num_n_blocks // asked)


def test_a_grid_of_nothing_is_not_split():
    assert num_splits(DECODE, D128, HOPPER, 132, 0, 65536) == 1
    assert num_splits(DECODE, D128, HOPPER, 132, 1, 0) == 1


# Packing and bundles


def problem(**changes) -> AttentionProblem:
    """4 batch entries of 8 query heads that share 2."""
    sizes = {"batch": 4, "seqlen_q": 1, "seqlen_k": 1024, "num_heads_q": 8, "num_heads_kv": 2}
    scalars = {"softmax_scale": 1.0, "band_lo": 0, "band_hi": 0, "shift": 0}
    rest = {"head_dim": 128, "head_dim_v": 64, "dtype": "float16"}
    return AttentionProblem(**{**sizes, **scalars, **rest, **changes})


def test_more_splits_than_a_record_numbers_are_as_many_as_it_does():
    lengths = Lengths(4, 1, 2**20, False, ("seqlens_k",))
    of = problem(seqlen_k=2**20, num_splits=10**6, lengths=lengths)
    listed = tiles_listed(of, replace(DECODE, num_splits=2))
    assert (listed.least, room_of(lengths, listed).least) == (8, 8)


@pytest.mark.parametrize(
    ("changes", "pack"),
    [
        ({}, 4),
        ({"seqlen_q": 32}, 4),
        ({"seqlen_q": 33}, 1),
        ({"num_heads_kv": 8}, 1),
        ({"num_heads_kv": 1}, 8),
        # Each head has a slope of its own.
        ({"features": NO_FEATURES._replace(alibi=Alibi("alibi_slopes", 0, 1))}, 1),
    ],
)
def test_heads_of_a_group_are_packed_where_queries_are_few(changes, pack):
    assert rows_packed(problem(**changes)) == pack


@pytest.mark.parametrize(
    ("changes", "l2_bytes", "heads"),
    [
        # K and V of a head are 1024 x (128 + 64) x 2 = 393216 bytes; 4 query heads share them.
        ({}, 2 * 393216, 4),
        ({}, 2 * 393216 - 1, 1),
        ({}, 5 * 393216, 8),
        ({"num_heads_kv": 8}, 5 * 393216, 2),
        # No more than there are.
        ({}, 2**40, 32),
        ({"seqlen_k": 0}, 0, 1),
        ({"seqlen_k": 0}, 2**20, 32),
        ({"seqlen_k": 2**29}, 2**25, 1),
    ],
)
def test_heads_in_flight_fit_half_the_l2_cache(changes, l2_bytes, heads):
    assert heads_in_flight(problem(**changes), 2, l2_bytes) == heads


def test_heads_of_larger_elements_are_fewer():
    assert heads_in_flight(problem(), 4, 4 * 393216) == 4
    assert heads_in_flight(problem(), 2, 4 * 393216) == 8
