"""Configs of quantisation: string forms, geometry, what is refused, what is used."""

import itertools
from dataclasses import replace

import pytest

from numflash.configs import (
    FAMILIES,
    FP8_STEP,
    QUANTIZE_CONFIGS,
    AmaxConfig,
    DequantizeConfig,
    QuantizeConfig,
    Traits,
    parse_config,
    quantize_config,
)
from numflash.problem.fp8 import MAX_BLOCK
from numflash.runtime.devices import ARCHITECTURES

HEAD_DIMS = range(FP8_STEP, 257, FP8_STEP)
BLOCKS = tuple(2**i for i in range(4, MAX_BLOCK.bit_length()))
LEAST_SMEM = min(a.max_smem_per_block for a in ARCHITECTURES.values())


def traits_of(head_dim):
    return Traits("float16", head_dim, head_dim)


TEXTS = {
    "quantize": [
        "sm89-t128w8",
        "sm75-t16w1-hadamard",
        "sm80-t64w4-transposed-e5m2",
        "sm89-t128w8-hadamard-transposed-given-e5m2",
        "sm89-t128w8-token-statistics",
        "sm80-t128w4-transposed-codes",
        "sm89-t64w8-hadamard-measure",
        "sm89-t256w16-hadamard-transposed-token-statistics-e5m2",
    ],
    "amax": ["w1", "w8", "w32"],
    "dequantize": ["sm75-w4", "sm89-w1-hadamard-transposed-e5m2", "sm80-w4-transposed"],
}


@pytest.mark.parametrize("family", TEXTS)
def test_a_config_round_trips_through_its_string(family):
    for text in TEXTS[family]:
        config = parse_config(family, text)
        assert type(config) is QUANTIZE_CONFIGS[family]
        assert str(config) == text
        assert (config.family, config.implementation) == (family, "fp8")
        assert config.num_threads == 32 * config.num_warps
    assert set(QUANTIZE_CONFIGS).isdisjoint(FAMILIES)


def test_the_parts_of_a_string_are_those_of_the_config():
    assert parse_config("quantize", "sm89-t64w2-hadamard-transposed-given-e5m2") == (
        QuantizeConfig("sm89", 64, 2, True, True, "given", format="e5m2")
    )
    assert parse_config("dequantize", "sm80-w2-hadamard") == DequantizeConfig("sm80", 2, True)
    assert parse_config("amax", "w8") == AmaxConfig(8)
    every = [
        QuantizeConfig("sm89", 64, 2, hadamard, transposed, scale, statistics=sums, format=name)
        for hadamard, transposed, scale, sums, name in itertools.product(
            *[(False, True)] * 2, ("block", "token", "given"), (False, True), ("e4m3", "e5m2")
        )
    ]
    assert len({str(config) for config in every}) == len(every) == 48
    assert [QuantizeConfig.parse(str(config)) for config in every] == every


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("quantize", ""),
        ("quantize", "t128w8"),
        ("quantize", "sm89-t128w8-"),
        ("quantize", "sm89-t128w8-transposed-hadamard"),
        ("quantize", "sm89-t128w8-e4m3"),
        ("quantize", "sm89-t128w8-token-given"),
        ("quantize", "sm89-t0128w8"),
        ("quantize", "sm89-t\u0661w8"),
        ("quantize", "sm90-t128w8"),
        ("quantize", "sm89-t128w33"),
        ("quantize", "sm89-t8w1"),
        ("quantize", "sm89-t48w1"),
        ("quantize", "sm89-t512w16"),
        ("quantize", "sm89-t128w8-hadamard-codes"),
        ("quantize", "sm89-t128w8-token-codes"),
        ("quantize", "sm89-t128w8-codes-statistics"),
        ("quantize", "sm89-t128w8-transposed-measure"),
        ("quantize", "sm89-t128w8-given-measure"),
        ("amax", "w0"),
        ("amax", "w33"),
        ("amax", "sm89-w8"),
        ("dequantize", "w4"),
        ("dequantize", "sm90-w4"),
        ("dequantize", "sm89-w64"),
        ("dequantize", "sm89-w4-token"),
    ],
)
def test_what_is_no_config_is_refused(family, text):
    with pytest.raises(ValueError):
        parse_config(family, text)


def test_a_config_has_a_known_scale_and_format():
    for wrong in ({"scale": "row"}, {"format": "e3m4"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            QuantizeConfig("sm89", 64, 2, **wrong)


def test_threads_cover_each_row_of_a_block_once():
    for head_dim, tokens, warps in itertools.product(HEAD_DIMS, (16, 64, 128), (1, 2, 4, 8)):
        for transposed, codes in itertools.product((False, True), repeat=2):
            config = QuantizeConfig("sm89", tokens, warps, transposed=transposed, codes=codes)
            traits = traits_of(head_dim)
            if config.misfit(traits) is not None:
                continue
            lanes, rows = config.lanes(traits), config.rows_per_thread(traits)
            assert head_dim % (lanes * config.columns) == 0
            assert rows * config.num_threads == tokens * lanes
            assert not transposed or rows % 4 == 0
            assert config.elements_per_thread(traits) == rows * head_dim // lanes


@pytest.mark.parametrize(
    ("text", "head_dim", "reason"),
    [
        ("sm89-t128w8", 96, "multiples of 64, not 96"),
        ("sm89-t16w8", 64, "multiples of 1 rows"),
        ("sm89-t64w8-transposed", 64, "multiples of 4 rows"),
        ("sm89-t16w1-transposed", 256, "groups of 16 tokens"),
        ("sm89-t256w16", 256, "own 32768 elements"),
    ],
)
def test_a_config_that_does_not_fit_says_why(text, head_dim, reason):
    assert reason in parse_config("quantize", text).misfit(traits_of(head_dim))


OPTIONS = [
    {"scale": scale, "hadamard": hadamard, "transposed": transposed, "statistics": statistics}
    for scale, hadamard, transposed, statistics in itertools.product(
        ("block", "token", "given"), *[(False, True)] * 3
    )
] + [
    {"codes": True, "transposed": False},
    {"codes": True, "transposed": True},
    {"measure": True, "hadamard": False},
    {"measure": True, "hadamard": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={o[k]}" for k in o))
def test_what_is_used_fits_every_gpu(options):
    blocks = (None, *BLOCKS) if options.get("scale") == "block" else (None,)
    for head_dim, block in itertools.product(HEAD_DIMS, blocks):
        config = quantize_config("sm80", head_dim, block, **options)
        if block is not None and (block > 256 or block * head_dim > 2**15):
            assert config is None
            continue
        traits = traits_of(head_dim)
        assert config.misfit(traits) is None
        assert block in (None, config.block_tokens)
        assert config.num_threads <= 512
        assert config.smem_bytes(traits) <= LEAST_SMEM
        assert all(getattr(config, name) == value for name, value in options.items())
        # Of numbers, which take a register each; of codes four do.
        assert config.elements_per_thread(traits) <= (256 if config.codes else 96)
        # Blocks of tokens that share a scale consist of whole blocks of the maxima's kernel.
        if config.measure:
            assert all(b % config.block_tokens == 0 for b in BLOCKS if b * head_dim > 2**15)


def test_a_tile_has_room_for_its_codes_and_gaps():
    plain = parse_config("quantize", "sm89-t128w8-transposed")
    assert plain.tile_words(traits_of(128)) == 128 * 128 // 4
    small = replace(plain, block_tokens=64)
    assert small.tile_words(traits_of(128)) == (128 + 16) * 64 // 4
    assert replace(plain, transposed=False).tile_words(traits_of(128)) == 0
    assert plain.smem_bytes(traits_of(128)) == 128 * 128 + 3 * 8 * 4
    assert (plain.block_rows, DequantizeConfig("sm80", 4).block_rows) == (128, 32)
