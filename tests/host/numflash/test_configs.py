"""Configs and traits: string forms, what is refused, shared memory, registers."""

import itertools
import re
from dataclasses import replace

import pytest

from numflash.configs import (
    DTYPES,
    FAMILIES,
    MMA_CONFIGS,
    PORTABLE_CONFIGS,
    BackwardDkDvConfig,
    BackwardDqConfig,
    CombineConfig,
    DeltaConfig,
    ForwardConfig,
    MmaBackwardDkDvConfig,
    MmaBackwardDqConfig,
    MmaForwardConfig,
    Sm90ForwardConfig,
    Traits,
    mma_rules,
    padded_head_dim,
    parse_config,
    portable,
)
from numflash.configs.features import BY_NAME
from numflash.runtime.devices import ARCHITECTURES

HEAD_DIMS = range(32, 257, 32)
# Those that compute the scores again for gradients of what these are made of.
OF_SCORES = ("backward-rows", "backward-columns", "backward-tiles", "backward-scatter")
TILED = ("forward", "backward-dq", "backward-dkdv", *OF_SCORES)
BY_ROW = ("delta", "array-sums", "clear-sums", "round-sums", "combine")


def all_traits(dtype="float16"):
    """Every combination of head dims; shared memory depends on nothing but these and the dtype."""
    return [Traits(dtype, d, dv) for d, dv in itertools.product(HEAD_DIMS, HEAD_DIMS)]


# String forms


TEXTS = {
    **{family: ["m64n32w4", "m16n16w2", "m128n128w8"] for family in TILED},
    **{family: ["w1", "w8", "w32"] for family in BY_ROW},
    "combine": ["w2", "w8", "w16"],
}
MMA_TEXTS = ["sm80-m128n64w4s1", "sm75-m32n32w2s3", "sm80-m16n16w1s2-linear"]
FUSED_TEXTS = ["sm80-m64n128w8s1x4", "sm75-m32n32w2s3", "sm80-m16n16w1s2-linear"]
FUSED = ("backward", "reduce-dq")
# Their tiles are not ahead: they have one stage.
OF_ARRAYS = ("backward-columns", "backward-tiles", "backward-scatter")


@pytest.mark.parametrize("family", PORTABLE_CONFIGS)
def test_a_config_round_trips_through_its_string(family):
    for text in TEXTS[family]:
        config = parse_config(family, text)
        assert type(config) is PORTABLE_CONFIGS[family]
        assert str(config) == text
        assert (config.family, config.implementation) == (family, "portable")


@pytest.mark.parametrize("family", MMA_CONFIGS)
def test_a_tensor_core_config_round_trips_through_its_string(family):
    texts = [*MMA_TEXTS, *(text.replace("n32", "n64") for text in MMA_TEXTS)]
    for text in FUSED_TEXTS if family in FUSED else texts:
        if family == "backward-dkdv":
            # Rows and columns change places.
            text = text.replace("m128n64", "m64n128")
        if family in OF_ARRAYS:
            text = re.sub(r"s\d", "s1", text)
        config = parse_config(family, text)
        assert type(config) is MMA_CONFIGS[family]
        assert str(config) == text
        assert (config.family, config.implementation) == (family, "sm80")


def test_the_parts_of_a_tensor_core_string_are_those_of_the_config():
    config = parse_config("forward", "sm80-m128n48w2s3x7-linear")
    assert config == MmaForwardConfig("sm80", 128, 48, 2, 3, 7, swizzled=False)
    assert str(config) == "sm80-m128n48w2s3x7-linear"
    assert str(replace(config, swizzled=True)) == "sm80-m128n48w2s3x7"
    assert (config.m_tiles, config.num_threads, config.block_rows) == (4, 64, 128)


HOPPER_TEXTS = [
    "sm90-m64n80w4s1b2",
    "sm90-m128n176w8s2-overlap-pingpong-persistent",
    "sm90-m192n128w12s3x7-h4-unpacked-r152-overlap-persistent",
    "sm90-m64n64w4s2-packed-persistent",
    "sm90-m128n128w8s2-v3-r232-overlap",
    "sm90-m128n128w8s2-h2-r232-a1-overlap-pingpong",
    "sm90-m64n64w4s2-a1",
    "sm90-m64n128w4s2x2-h2-a1-l128-overlap-persistent-fixed",
    "sm90-m128n128w8s2-r232-l128-pingpong",
    "sm90-m64n128w4s2-fixed",
    "sm90-m128n128w8s2-v3-a1-l128-c2-overlap",
    "sm90-m128n80w8s2-c2-overlap-persistent",
]


@pytest.mark.parametrize("text", HOPPER_TEXTS)
def test_a_config_for_hopper_round_trips_through_its_string(text):
    config = parse_config("forward", text)
    assert type(config) is Sm90ForwardConfig and str(config) == text
    assert (config.family, config.implementation) == ("forward", "sm90")
    for name in ("overlap", "pingpong", "persistent", "fixed"):
        assert getattr(config, name) is (name in text)
    assert config.l2_bytes == (128 if "-l128" in text else 256)
    assert config.arrivals == (1 if "-a1" in text else 4)
    assert config.cluster == (2 if "-c2" in text else 1)
    assert config.block_rows == config.cluster * config.tile_m
    # Splits, packing, order and tensor maps are arguments: the machine code is shared.
    arguments = {"packed": None, "heads_in_flight": 0, "l2_bytes": 256}
    assert config.compiled == replace(config, num_splits=config.compiled.num_splits, **arguments)
    assert config.compiled.num_splits == min(config.num_splits, 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sm90-m64n80w4s1-fast", "a forward config must look like sm90-m128n128w8s2-overlap"),
        ("sm90-m64n80w4s1-persistent-overlap", "a forward config must look like sm90-"),
        ("sm90-m64n64w4s2-v2", "v_stages says how many stages V has where K has others, got 2"),
        ("fp8-sm90-m64n64w4s2-v3", "codes of K and of V have as many stages, got v_stages 3"),
        ("sm90-m128n64w4s1", "tile_m must be 16 x num_warps, 4, 8 or 12 of them"),
        ("sm90-m64n272w4s1", "tile_n must be at most 256"),
        ("sm90-m64n64w4s1-linear", "tiles are always swizzled"),
        ("sm90-m128n64w8s2b2", "two blocks share an SM only with 4 warps"),
        ("sm90-m64n64w4s1-pingpong", "one warpgroup has no turns to take"),
        ("sm90-m128n64w8s1-r244", "consumer_registers must be a multiple of 8"),
        ("sm90-m128n64w8s1-r248", "leave 24 to the warps that copy"),
        ("sm90-m128n64w8s1-a2", "a warpgroup arrives 2 times; it can only do so 1 or 4 times"),
        ("sm90-m128n64w8s1-a4", "a forward config must look like sm90-"),
        ("sm90-m128n64w8s1-a1-r232", "a forward config must look like sm90-"),
        ("sm90-m64n64w4s1-c4", "a cluster has 1 block or 2, not 4"),
        ("sm90-m64n64w4s1-c1", "a forward config must look like sm90-"),
        ("sm90-m64n64w4s1-l64", "the L2 cache fetches 128 or 256 bytes, not 64"),
        ("sm90-m64n64w4s1-l256", "a forward config must look like sm90-"),
        ("sm90-m64n64w4s1-l128-a1", "a forward config must look like sm90-"),
        ("sm90-m64n64w4s1-fixed-overlap", "a forward config must look like sm90-"),
        ("sm90-m128n64w8s1-fixed", "registers are fixed only with 4 warps and one block an SM"),
        ("sm90-m64n64w4s1b2-fixed", "registers are fixed only with 4 warps and one block an SM"),
        ("sm90-m64n64w4s1-r240-fixed", "there is no choice of consumer_registers, got 240"),
        ("fp8-sm90-m128n64w8s1-fixed", "registers are fixed only with 4 warps and one block"),
    ],
)
def test_a_wrong_config_for_hopper_is_refused(text, words):
    with pytest.raises(ValueError) as error:
        parse_config("forward", text)
    assert words in str(error.value)


def test_the_rows_of_a_cluster_are_what_must_fit():
    pairs = parse_config("forward", "sm90-m64n64w4s1-c2")
    blocks = Traits("float16", 64, 64, blocks=(64, 64))
    assert "tiles of 128 queries do not divide" in pairs.misfit(blocks)
    assert pairs.misfit(replace(blocks, blocks=(128, 64))) is None
    assert replace(pairs, cluster=1).misfit(blocks) is None


def test_splits_share_their_machine_code_but_not_with_a_forward_that_is_not_split():
    whole, two, seven = (parse_config("forward", f"sm80-m16n16w1s1{x}") for x in ("", "x2", "x7"))
    assert whole.compiled == whole
    assert seven.compiled == two.compiled == two != whole


def test_traits_round_trip_through_their_string():
    some = [x for n in range(len(BY_NAME) + 1) for x in itertools.combinations(BY_NAME, n)]
    for dtype, features, vectorized in itertools.product(DTYPES, some, [False, True]):
        traits = Traits(dtype, 64, 256, features, vectorized=vectorized)
        assert Traits.parse(str(traits)) == traits
        if dtype == "float32":
            tf32 = replace(traits, tf32=True)
            assert Traits.parse(str(tf32)) == tf32 != traits
    assert str(Traits("float32", 32, 64, tf32=True)) == "float32-d32-dv64-vec-tf32"
    assert str(Traits("float16", 64, 96, ("softcap",))) == "float16-d64-dv96-softcap-vec"


def test_different_configs_and_traits_have_different_strings():
    configs = [ForwardConfig(m, n, w) for m in (16, 32) for n in (16, 32) for w in (1, 2)]
    assert len(set(map(str, configs))) == len(configs)
    traits = [
        Traits("float16", 32, 32, names, v)
        for names, v in itertools.product([(), ("softcap",), ("alibi",), (*BY_NAME,)], [0, 1])
    ]
    assert len(set(map(str, traits))) == len(traits)


WRONG_TILES = [
    "",
    "m64n32",
    "m64n32w4x",
    "64x32x4",
    "m-64n32w4",
    "w4",
    "M8n8w1",
    "m064n32w4",
    "m0n8w1",
    "sm80",
    "sm80-m64n64w4",
    "sm80-m64n64w4s0",
    "sm80-m064n64w4s1",
    "sm80-m64n64w4s1x0",
    "sm80-m64n64w4s1x1",
    "sm80-m64n64w4s1-swizzled",
    "sm80-m64n64w4s1-linearx2",
    "sm80-m64n64w4s1 ",
    "sm80m64n64w4s1",
    "sm-m64n64w4s1",
]


@pytest.mark.parametrize("text", WRONG_TILES)
@pytest.mark.parametrize("family", TILED)
def test_a_wrong_config_string_is_refused(family, text):
    with pytest.raises(ValueError, match=f"{family} config must look like") as error:
        parse_config(family, text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "8", "w", "w8x", "m64n32w4", "w-1", "w08", "w0", "sm80-m64n64w4s1"]
)
@pytest.mark.parametrize("family", BY_ROW)
def test_a_wrong_string_of_a_kernel_by_rows_is_refused(family, text):
    with pytest.raises(ValueError, match=f"{family} config must look like w8") as error:
        parse_config(family, text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("family", ["sideways", "", "Forward", None])
def test_an_unknown_family_is_refused(family):
    with pytest.raises(ValueError, match="kernel family must be one of forward, ") as error:
        parse_config(family, "m64n32w4")
    assert repr(family) in str(error.value)


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
        "float32-d64-dv64-tf32-vec",
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


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("sm90", 64, 64, 4, 1), ["must begin with one of sm75, sm80", "'sm90'"]),
        (("sm80", 0, 64, 4, 1), ["tile_m of MmaForwardConfig must be positive", "got 0"]),
        (("sm80", 64, -16, 4, 1), ["tile_n of MmaForwardConfig must be positive", "got -16"]),
        (("sm80", 64, 64, 0, 1), ["num_warps of MmaForwardConfig must be positive", "got 0"]),
        (("sm80", 64, 64, 4, 0), ["num_stages of MmaForwardConfig must be positive", "got 0"]),
        (("sm80", 64, 64, 4, 1, 0), ["num_splits of MmaForwardConfig must be", "got 0"]),
        (("sm80", 96, 64, 4, 1), ["tile_m = 96", "multiple of 16 x num_warps"]),
        (("sm80", 64, 24, 4, 1), ["the other tile (24)", "of 16"]),
        (("sm80", 528, 64, 33, 1), ["at most 32 warps"]),
        (("sm80", 64, 64, 4, 4), ["at most 3 stages"]),
    ],
    ids=str,
)
def test_wrong_tensor_core_tiles_are_refused(arguments, words):
    with pytest.raises(ValueError) as error:
        MmaForwardConfig(*arguments)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("family", ["backward-dkdv", "backward-dq"])
def test_only_the_forward_is_split(family):
    with pytest.raises(ValueError, match="x2: only forward and backward can be split"):
        parse_config(family, "sm80-m64n64w4s1x2")


def test_the_row_tile_of_the_dkdv_kernel_is_tile_n():
    with pytest.raises(ValueError, match="tile_n = 24"):
        BackwardDkDvConfig(32, 24, 4)
    config = BackwardDkDvConfig(8, 16, 4)
    assert (config.row_tile, config.column_tile, config.block_rows) == (16, 8, 16)
    config = BackwardDqConfig(16, 8, 4)
    assert (config.row_tile, config.column_tile, config.block_rows) == (16, 8, 16)
    with pytest.raises(ValueError, match="tile_n = 48"):
        MmaBackwardDkDvConfig("sm80", 64, 48, 4, 1)
    config = MmaBackwardDkDvConfig("sm80", 16, 128, 4, 1)
    assert (config.row_tile, config.column_tile, config.block_rows) == (128, 16, 128)
    assert config.m_tiles == 2


@pytest.mark.parametrize(
    "config, rule, wrong",
    [
        (DeltaConfig, "1 to 32", (0, -1, 33)),
        (CombineConfig, "2, 4, 8 or 16", (0, -2, 1, 3, 12, 32)),
    ],
)
def test_wrong_warps_of_a_kernel_by_rows_are_refused(config, rule, wrong):
    for num_warps in wrong:
        with pytest.raises(ValueError, match=f"num_warps .* must be {rule}, got {num_warps}"):
            config(num_warps)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("float64", 32, 32), ["dtype must be one of", "'float64'"]),
        (("float16", 33, 32), ["head_dim of a kernel", "got 33"]),
        (("float16", 32, 0), ["head_dim_v of a kernel", "got 0"]),
        (("float16", 288, 32), ["head_dim of a kernel", "up to 256", "got 288"]),
        (("float16", -32, 32), ["head_dim of a kernel", "got -32"]),
        (("bfloat16", 32, 32, (), True, True), ["tf32 is a way", "not bfloat16"]),
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
        # Sixteen rows of head_dim_v = 64, and their weights.
        (CombineConfig(4), 16 * 64 + 16),
        (CombineConfig(16), 16 * 64 + 16),
    ],
    ids=str,
)
def test_smem_bytes_are_those_computed_by_hand(config, expected_floats):
    assert config.smem_bytes(Traits("float16", 96, 64)) == 4 * expected_floats


@pytest.mark.parametrize(
    "config, expected_elements, expected_words",
    [
        # Nothing is padded; the stages' tiles of the walk lie behind each other.
        (MmaForwardConfig("sm80", 128, 64, 4, 1), (128 + 64) * 96 + 64 * 64, 0),
        (MmaForwardConfig("sm80", 128, 64, 4, 2, 9), (128 + 2 * 64) * 96 + 2 * 64 * 64, 0),
        (MmaBackwardDqConfig("sm80", 64, 32, 4, 2), (64 + 2 * 32) * (96 + 64), 0),
        (MmaBackwardDkDvConfig("sm80", 32, 64, 4, 2), (64 + 2 * 32) * (96 + 64), 2 * 2 * 32),
    ],
    ids=str,
)
def test_smem_bytes_of_tensor_core_kernels_are_those_computed_by_hand(
    config, expected_elements, expected_words
):
    for traits in (Traits("bfloat16", 96, 64), Traits("float32", 96, 64, tf32=True)):
        expected = traits.dtype_bytes * expected_elements + 4 * expected_words
        assert config.smem_bytes(traits) == expected
        assert replace(config, swizzled=False).smem_bytes(traits) == expected


@pytest.mark.parametrize("family", TILED)
def test_shared_tiles_follow_each_other_and_begin_16_byte_aligned(family):
    for traits, config in itertools.product(all_traits(), portable.candidates(family)):
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


@pytest.mark.parametrize("family", TILED)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_tensor_core_tiles_follow_each_other_and_begin_in_the_first_bank(family, dtype):
    for traits, config in itertools.product(
        all_traits(dtype), mma_rules.candidates(family, "sm80")
    ):
        tiles, offsets = config.tiles(traits), config.smem_offsets(traits)
        assert list(tiles) == list(offsets)
        end = 0
        for name, words in tiles.items():
            assert offsets[name] == end, (config, traits)
            # The swizzle is that of addresses: it counts rows from a multiple of 32 words.
            if name not in ("lse", "delta"):
                stages = config.num_stages if name in walked(family) else 1
                assert end % 32 == 0 and words // stages % 32 == 0, (config, traits)
            # Pairs of float32 are read at once.
            assert end % 2 == 0
            end += words
        assert end * 4 == config.smem_bytes(traits)


def walked(family):
    """The tiles that come in stages."""
    return ("q", "do") if family == "backward-dkdv" else ("k", "v")


# Registers


def test_accumulators_are_those_counted_by_hand():
    traits = Traits("float16", 64, 96)
    # 16 rows a warp = 4 a thread; 4 score columns; 8 and 12 output columns.
    assert ForwardConfig(64, 32, 4).accumulators_per_thread(traits) == 4 * 4 + 4 * 12
    assert BackwardDqConfig(64, 32, 4).accumulators_per_thread(traits) == 2 * 16 + 4 * 8
    assert BackwardDkDvConfig(32, 64, 4).accumulators_per_thread(traits) == 2 * 16 + 4 * 20


def test_accumulators_of_tensor_core_kernels_are_those_counted_by_hand():
    traits = Traits("float16", 64, 96)
    # 32 rows a warp = 4 a thread, two columns in eight: 8 of 32, 16 of 64 and 24 of 96.
    forward = MmaForwardConfig("sm80", 128, 32, 4, 1)
    assert forward.accumulators_per_thread(traits) == 4 * 8 + 4 * 24
    dq = MmaBackwardDqConfig("sm80", 128, 32, 4, 1)
    assert dq.accumulators_per_thread(traits) == 2 * 4 * 8 + 4 * 16
    dkdv = MmaBackwardDkDvConfig("sm80", 32, 128, 4, 1)
    assert dkdv.accumulators_per_thread(traits) == 2 * 4 * 8 + 4 * (16 + 24)


def test_candidates_are_configs_of_their_family_and_no_two_are_the_same():
    for family in FAMILIES:
        candidates = [*portable.candidates(family)]
        for generation in ("sm75", "sm80"):
            candidates += mma_rules.candidates(family, generation)
        assert {config.family for config in candidates} == {family}
        assert len(set(map(str, candidates))) == len(candidates) > 0
        # Shared memory of the largest is for the largest GPUs, the smallest must do everywhere.
        least = min(a.max_smem_per_block for a in ARCHITECTURES.values())
        for traits in (Traits("float32", 256, 256), Traits("float16", 256, 256)):
            for config in portable.candidates(family)[-1:]:
                assert config.smem_bytes(traits) <= least
