"""Configs and traits: string forms, what is refused, shared memory, defaults that fit."""

import itertools

import pytest

from numflash.configs import (
    DTYPES,
    FAMILIES,
    BackwardDkDvConfig,
    BackwardDqConfig,
    DeltaConfig,
    ForwardConfig,
    Traits,
    accumulators_per_thread,
    default_config,
    padded_head_dim,
)
from numflash.devices import ARCHITECTURES

HEAD_DIMS = range(32, 257, 32)
TILED = ("forward", "backward-dq", "backward-dkdv")
SMEM_SIZES = sorted({a.max_smem_per_block for a in ARCHITECTURES.values()})


def all_traits():
    """Every combination of head dims; shared memory depends on nothing else."""
    return [Traits("float16", d, dv) for d, dv in itertools.product(HEAD_DIMS, HEAD_DIMS)]


# String forms


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_round_trips_through_its_string(family):
    texts = ["w1", "w8", "w32"] if family == "delta" else ["m64n32w4", "m16n16w2", "m128n128w8"]
    for text in texts:
        config = FAMILIES[family].parse(text)
        assert str(config) == text
        assert FAMILIES[family].parse(str(config)) == config
        assert config.family == family


def test_traits_round_trip_through_their_string():
    flags = itertools.product([False, True], repeat=3)
    for dtype, (softcap, alibi, vectorized) in itertools.product(DTYPES, flags):
        traits = Traits(dtype, 64, 256, softcap=softcap, alibi=alibi, vectorized=vectorized)
        assert Traits.parse(str(traits)) == traits
    assert str(Traits("float16", 64, 96, softcap=True)) == "float16-d64-dv96-softcap-vec"


def test_different_configs_and_traits_have_different_strings():
    configs = [ForwardConfig(m, n, w) for m in (16, 32) for n in (16, 32) for w in (1, 2)]
    assert len(set(map(str, configs))) == len(configs)
    traits = [
        Traits("float16", 32, 32, s, a, v) for s, a, v in itertools.product([0, 1], repeat=3)
    ]
    assert len(set(map(str, traits))) == len(traits)


@pytest.mark.parametrize(
    "text",
    ["", "m64n32", "m64n32w4x", "64x32x4", "m-64n32w4", "w4", "M8n8w1", "m064n32w4", "m0n8w1"],
)
@pytest.mark.parametrize("family", TILED)
def test_a_wrong_config_string_is_refused(family, text):
    with pytest.raises(ValueError, match=f"{family} config must look like") as error:
        FAMILIES[family].parse(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("text", ["", "8", "w", "w8x", "m64n32w4", "w-1", "w08", "w0"])
def test_a_wrong_delta_string_is_refused(text):
    with pytest.raises(ValueError, match="delta config must look like w8"):
        DeltaConfig.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "float16",
        "float16-d64",
        "float16-64-64",
        "float16-d64-dv64-fast",
        "float16-d64-dv64-vec-fast",
        "float16-d64-dv64-",
        "float16-d64-dv64vec",
        "float16-d064-dv64",
        "float16-d64-dv64-vec-softcap",
        "float16-d64-dv64-vec-vec",
    ],
)
def test_wrong_traits_strings_are_refused(text):
    with pytest.raises(ValueError, match="traits must look like") as error:
        Traits.parse(text)
    assert repr(text) in str(error.value)


# Values


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((0, 32, 4), ["tile_m of ForwardConfig must be positive", "got 0"]),
        ((64, -8, 4), ["tile_n of ForwardConfig must be positive", "got -8"]),
        ((64, 32, 0), ["num_warps of ForwardConfig must be positive", "got 0"]),
        ((24, 32, 4), ["tile_m = 24", "multiple of 4 x num_warps"]),
        ((64, 12, 4), ["the other tile (12)", "of 8"]),
        ((132, 8, 33), ["at most 32 warps"]),
    ],
)
def test_wrong_tiles_are_refused(arguments, words):
    with pytest.raises(ValueError) as error:
        ForwardConfig(*arguments)
    for word in words:
        assert word in str(error.value)


def test_the_row_tile_of_the_dkdv_kernel_is_tile_n():
    with pytest.raises(ValueError, match="tile_n = 24"):
        BackwardDkDvConfig(32, 24, 4)
    config = BackwardDkDvConfig(8, 16, 4)
    assert (config.row_tile, config.column_tile, config.block_rows) == (16, 8, 16)
    config = BackwardDqConfig(16, 8, 4)
    assert (config.row_tile, config.column_tile, config.block_rows) == (16, 8, 16)


@pytest.mark.parametrize("num_warps", [0, -1, 33])
def test_wrong_warps_of_delta_are_refused(num_warps):
    with pytest.raises(ValueError, match=f"num_warps .* 1 to 32, got {num_warps}"):
        DeltaConfig(num_warps)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("float64", 32, 32), ["dtype must be one of", "'float64'"]),
        (("float16", 33, 32), ["head_dim of a kernel", "got 33"]),
        (("float16", 32, 0), ["head_dim_v of a kernel", "got 0"]),
        (("float16", 288, 32), ["head_dim of a kernel", "up to 256", "got 288"]),
        (("float16", -32, 32), ["head_dim of a kernel", "got -32"]),
    ],
)
def test_wrong_traits_are_refused(arguments, words):
    with pytest.raises(ValueError) as error:
        Traits(*arguments)
    for word in words:
        assert word in str(error.value)


def test_head_dims_are_padded_to_the_next_multiple_of_32():
    padded = {1: 32, 31: 32, 32: 32, 33: 64, 80: 96, 128: 128, 255: 256, 256: 256}
    assert {head_dim: padded_head_dim(head_dim) for head_dim in padded} == padded
    for head_dim in range(1, 257):
        Traits("float32", padded_head_dim(head_dim), 32)


# Shared memory


@pytest.mark.parametrize(
    "config, expected_floats",
    [
        # Rows of head_dim floats are padded by 4, rows of scores to an odd multiple of 8.
        (ForwardConfig(64, 32, 4), 64 * 100 + 32 * 100 + 32 * 68 + 64 * 40),
        (BackwardDqConfig(64, 32, 4), (64 + 32) * 100 + (64 + 32) * 68 + 64 * 40),
        (BackwardDqConfig(16, 8, 4), (16 + 8) * 100 + (16 + 8) * 68 + 16 * 8),
        (BackwardDkDvConfig(64, 32, 4), (64 + 32) * 100 + (64 + 32) * 68 + 32 * 72),
        (DeltaConfig(8), 0),
    ],
    ids=str,
)
def test_smem_bytes_are_those_computed_by_hand(config, expected_floats):
    assert config.smem_bytes(Traits("float16", 96, 64)) == 4 * expected_floats


@pytest.mark.parametrize("family", TILED)
def test_shared_tiles_follow_each_other_and_begin_16_byte_aligned(family):
    for traits, smem in itertools.product(all_traits(), SMEM_SIZES):
        config = default_config(family, traits, smem)
        layout = config.smem_layout(traits)
        rows = {"q": config.tile_m, "do": config.tile_m, "k": config.tile_n, "v": config.tile_n}
        rows["p"] = config.row_tile
        columns = {"q": traits.head_dim, "do": traits.head_dim_v}
        columns |= {"k": traits.head_dim, "v": traits.head_dim_v, "p": config.column_tile}
        end = 0
        for name in sorted(layout.offsets, key=layout.offsets.get):
            assert layout.offsets[name] == end
            assert layout.offsets[name] % 4 == 0 and layout.pitches[name] % 4 == 0
            assert layout.pitches[name] >= columns[name]
            end += rows[name] * layout.pitches[name]
        assert end * 4 == layout.smem_bytes


# Defaults


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_config_fits_every_gpu(family, arch):
    limit = ARCHITECTURES[arch].max_smem_per_block
    for traits in all_traits():
        config = default_config(family, traits, limit)
        assert config.smem_bytes(traits) <= limit, f"{config} {traits}"
        assert config.num_threads <= 1024


@pytest.mark.parametrize("family", TILED)
def test_the_default_config_leaves_registers_for_its_operands(family):
    for traits, smem in itertools.product(all_traits(), SMEM_SIZES):
        config = default_config(family, traits, smem)
        # 255 registers a thread; a row of operands and the addresses need about 100 of them.
        assert accumulators_per_thread(config, traits) <= 144, f"{config} {traits}"


def test_accumulators_are_those_counted_by_hand():
    traits = Traits("float16", 64, 96)
    # 16 rows a warp = 4 a thread; 4 score columns; 8 and 12 output columns.
    assert accumulators_per_thread(ForwardConfig(64, 32, 4), traits) == 4 * 4 + 4 * 12
    assert accumulators_per_thread(BackwardDqConfig(64, 32, 4), traits) == 2 * 16 + 4 * 8
    assert accumulators_per_thread(BackwardDkDvConfig(32, 64, 4), traits) == 2 * 16 + 4 * 20


@pytest.mark.parametrize("family", TILED)
def test_more_shared_memory_never_means_a_smaller_tile(family):
    for traits in all_traits():
        configs = [default_config(family, traits, smem) for smem in SMEM_SIZES]
        sizes = [config.tile_m * config.tile_n for config in configs]
        assert sizes == sorted(sizes)


def test_an_unknown_family_is_refused():
    with pytest.raises(
        ValueError, match=r"kernel family must be one of forward, .* got 'sideways'"
    ):
        default_config("sideways", Traits("float16", 32, 32), 65536)
