"""Problems that run on Hopper through wgmma, and those left to other kernels."""

import itertools
from dataclasses import replace

import pytest

from numflash.configs import (
    Traits,
    parse_config,
    wgmma,
    wgmma_backward,
)
from numflash.runtime.devices import ARCHITECTURES
from numflash.runtime.errors import UnsupportedError
from numflash.selection.rules import choose, force
from tests.host.numflash.test_dispatch import (
    HEAD_DIMS,
    HOPPER,
    reasons,
)

BOTH = ("softcap", "alibi")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("columns", HEAD_DIMS)
def test_the_forward_on_hopper_is_that_of_wgmma(dtype, columns):
    for traits in (Traits(dtype, columns, 32), Traits(dtype, 32, columns, BOTH, False)):
        choice = choose("forward", traits, HOPPER)
        assert choice.config == wgmma.candidates(traits)[0]
        # The alignment of rows does not matter to bulk copies.
        assert choice.traits == replace(traits, vectorized=True)
        assert reasons(choice)["sm80"] == "wgmma is faster"
        assert list(reasons(choice))[-1] == "portable"
    for limits in ARCHITECTURES.values():
        if limits is not HOPPER:
            assert "sm90" not in str(choose("forward", traits, limits))


@pytest.mark.parametrize("family", ["backward-dq", "backward-dkdv"])
@pytest.mark.parametrize("columns", HEAD_DIMS)
def test_gradients_on_hopper_are_those_of_wgmma(family, columns):
    traits = Traits("bfloat16", columns, columns)
    choice = choose(family, traits, HOPPER)
    assert choice.config == wgmma_backward.candidates(family, traits)[0]
    assert reasons(choice)["sm80"] == "wgmma is faster"
    for limits in ARCHITECTURES.values():
        if limits is not HOPPER:
            assert "sm90" not in str(choose(family, traits, limits))
    # A block that has most of an SM for itself should not be the only one of its rows.
    rows = min(2 * each.block_rows for each in wgmma_backward.candidates(family, traits))
    few = choose(family, traits, HOPPER, rows - 1)
    assert few.config.generation == "sm80"
    assert "rows at a time" in reasons(few)[str(choice.config)]
    assert choose(family, traits, HOPPER, rows).config.generation == "sm90"


@pytest.mark.parametrize("family", ["backward-dq", "backward-dkdv", "backward"])
def test_candidates_for_gradients_by_wgmma_are_chosen_or_take_fewer_registers(family):
    """Those behind the first that fits are for functions that make it spill."""
    for columns, features in itertools.product(HEAD_DIMS, ((), BOTH, ("dropout",))):
        traits = Traits("bfloat16", columns, columns, features)
        configs = wgmma_backward.candidates(family, traits)
        fitting = [c for c in configs if wgmma_backward.misfit(c, traits, HOPPER, 2**30) is None]
        assert fitting or columns > 128 or features, "no kernel"
        if fitting:
            assert choose(family, traits, HOPPER).config == fitting[0]
        kept = [config.registers[1] - config.accumulators_per_thread(traits) for config in fitting]
        assert kept == sorted(kept)


@pytest.mark.parametrize("family", ["backward-dq", "backward-dkdv"])
@pytest.mark.parametrize(
    ("traits", "options", "why"),
    [
        ("float32-d64-dv64-vec-tf32", {}, "of float16 or bfloat16, not of float32"),
        ("float16-d64-dv64-vec", {"positive_scale": False}, "softmax_scale is not positive"),
        ("float16-d64-dv64-vec", {"no_bulk_copies": "k is odd"}, "k is odd"),
    ],
)
def test_gradients_that_wgmma_cannot_compute_fall_to_others(family, traits, options, why):
    choice = choose(family, Traits.parse(traits), HOPPER, **options)
    assert choice.config.implementation != "sm90"
    assert why in reasons(choice)["sm90"]


def test_registers_that_scores_take_make_tiles_narrower():
    bent = Traits("float16", 128, 128, ("softcap",))
    choice = choose("backward-dq", bent, HOPPER)
    assert str(choice.config) == "sm90-m128n64w8s2"
    assert "accumulators" in reasons(choice)["sm90-m128n128w8s2"]


def test_every_candidate_for_wgmma_is_chosen_somewhere_and_fits_with_all_features():
    chosen, shipped = set(), set()
    for columns, rows in itertools.product(HEAD_DIMS, (33, 65, 129, 2**30)):
        traits = Traits("bfloat16", columns, columns, BOTH)
        shipped |= set(wgmma.candidates(traits))
        chosen.add(choose("forward", traits, HOPPER, rows).config)
        for config in wgmma.candidates(traits):
            assert config.smem_bytes(traits) <= HOPPER.max_smem_per_block
            assert wgmma.misfit(config, traits, HOPPER, 2**30) is None
    assert chosen == shipped


@pytest.mark.parametrize(
    ("traits", "options", "why"),
    [
        ("float32-d64-dv64-vec", {}, "of float16 or bfloat16, not of float32"),
        ("float32-d64-dv64-vec-tf32", {}, "of float16 or bfloat16, not of float32"),
        ("float16-d64-dv64-vec", {"positive_scale": False}, "softmax_scale is not positive"),
        ("float16-d64-dv64-vec", {"no_bulk_copies": "k is odd"}, "k is odd"),
    ],
)
def test_what_is_not_for_wgmma_says_so_first(traits, options, why):
    choice = choose("forward", Traits.parse(traits), HOPPER, **options)
    assert choice.config.implementation != "sm90"
    (what, reason), *_ = choice.passed_over
    assert what == "sm90" and why in reason


def test_few_rows_are_left_to_smaller_tiles():
    traits = Traits("float16", 128, 128)
    sizes = {32: "sm80", 33: "sm90-m64", 64: "sm90-m64", 65: "sm90-m128"}
    for rows, tile in sizes.items():
        choice = choose("forward", traits, HOPPER, rows)
        assert str(choice.config).startswith(tile)
    few = reasons(choose("forward", traits, HOPPER, 32))
    assert few["sm90-m64n128w4s2-overlap-persistent"] == "computes 64 rows at a time, there are 32"


@pytest.mark.parametrize(
    ("config", "columns", "why"),
    [
        ("sm90-m128n256w8s2", 128, "needs 295008 bytes of shared memory per block, sm_90a has"),
        ("sm90-m192n192w12s2", 64, "keeps 176 registers of S, P and O a thread, at most 128"),
        ("sm90-m64n64w4s1-packed", 64, "slopes of their own cannot be packed"),
    ],
)
def test_what_is_too_large_for_wgmma_says_so(config, columns, why):
    traits = Traits("float16", columns, columns, features=("alibi",))
    assert why in wgmma.misfit(parse_config("forward", config), traits, HOPPER, 2**30)


def test_parts_of_sequences_are_not_for_wgmma():
    traits = Traits.parse("float16-d64-dv64-vec-ragged")
    assert force("forward", "sm90-m64n64w4s1", traits, HOPPER).config.num_splits == 1
    with pytest.raises(UnsupportedError, match="whole results, and no parts"):
        force("forward", "sm90-m64n64w4s1x2", traits, HOPPER)
    assert force("forward", "sm90-m64n64w4s1x2", replace(traits, ragged=False), HOPPER)


@pytest.mark.parametrize("columns", [64, 128, 192, 256])
def test_codes_on_hopper_are_multiplied_by_wgmma(columns):
    for traits in (
        Traits("float16", columns, 64, fp8=True),
        Traits("float16", 64, columns, vectorized=False, fp8=True),
    ):
        choice = choose("forward", traits, HOPPER)
        assert choice.config == wgmma.candidates(traits)[0]
        assert str(choice.config).startswith("fp8-sm90-") and choice.config.multiplies_codes
        assert choice.traits == replace(traits, vectorized=True)
        assert "mma.sync must make float16" in reasons(choice)["fp8-sm89"]
        for limits in ARCHITECTURES.values():
            if limits is not HOPPER:
                assert "sm90" not in str(choose("forward", traits, limits))


def test_every_candidate_for_codes_is_chosen_somewhere_and_fits():
    chosen, shipped = set(), set()
    features = ((), ("softcap",), ("alibi",), BOTH)
    for columns, rows, bent in itertools.product((64, 128, 192, 256), (33, 65, 2**30), features):
        traits = Traits("bfloat16", columns, columns, bent, fp8=True)
        shipped |= set(wgmma.candidates(traits))
        choice = choose("forward", traits, HOPPER, rows)
        assert choice.config.smem_bytes(traits) <= HOPPER.max_smem_per_block
        chosen.add(choice.config)
    assert chosen == shipped


def test_codes_with_bent_scores_do_not_overlap_where_registers_would_spill():
    plain = Traits("float16", 128, 128, fp8=True)
    assert choose("forward", plain, HOPPER).config.overlap
    for feature in ("softcap", "alibi"):
        choice = choose("forward", replace(plain, features=(feature,)), HOPPER)
        assert not choice.config.overlap
        assert "keeps 208 registers" in "".join(reasons(choice).values())


@pytest.mark.parametrize("key_scales", [False, True])
def test_codes_that_are_not_for_wgmma_say_so_first(key_scales):
    traits = Traits("float16", 128, 128, fp8=True, key_scales=key_scales)
    choice = choose("forward", traits, HOPPER, no_bulk_copies="k is odd")
    assert choice.config.implementation == "fp8" and not choice.config.multiplies_codes
    (what, reason), *_ = choice.passed_over
    assert what == "fp8-sm90" and "k is odd" in reason


@pytest.mark.parametrize("columns", [64, 128, 192, 256])
@pytest.mark.parametrize("features", [(), BOTH])
def test_keys_with_scales_of_their_own_are_for_wgmma(columns, features):
    traits = Traits("float16", columns, columns, features, fp8=True, key_scales=True)
    config = choose("forward", traits, HOPPER).config
    assert config in wgmma.candidates(traits)
    assert config.smem_bytes(traits) <= HOPPER.max_smem_per_block
    # K, and of V the logarithm and the inverse, in float32.
    plain = replace(traits, key_scales=False)
    scales = 3 * 4 * config.stage_n * config.num_stages
    assert config.tiles(traits)["key_scales"] == scales // 4
    if config.o_is_apart(traits) == config.o_is_apart(plain):
        of_barriers = 16 * config.num_stages
        assert config.smem_bytes(traits) == config.smem_bytes(plain) + scales + of_barriers


def test_warps_that_fetch_scales_of_keys_take_registers_of_those_that_multiply():
    keys = Traits("float16", 128, 128, fp8=True, key_scales=True)
    plain = replace(keys, key_scales=False)
    assert choose("forward", plain, HOPPER).config.overlap
    choice = choose("forward", keys, HOPPER)
    assert not choice.config.overlap
    assert "keeps 208 registers of S, P and O a thread, at most 200" in "".join(
        reasons(choice).values()
    )
    expected = {
        "m128n128w8s2": (40, 232),
        "m192n128w12s2": (56, 152),
        "m64n128w4s2": (56, 256),
        "m64n128w4s2b2": (40, 216),
        "m64n128w4s2-fixed": (256, 256),
        "m128n128w8s2-r240": (24, 240),
    }
    for text, registers in expected.items():
        config = parse_config("forward", f"fp8-sm90-{text}")
        assert config.registers_of(keys) == registers
        assert config.registers_of(plain) == config.registers


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_slabs_begin_at_multiples_of_1024_bytes(stages):
    traits = Traits("float16", 64, 64, fp8=True, key_scales=True)
    config = parse_config("forward", f"fp8-sm90-m64n128w4s{stages}-persistent")
    offsets = config.smem_offsets(traits)
    assert [4 * offsets[name] % 1024 for name in "qkvo"] == [0] * 4
    # Four scales are read at once.
    assert 4 * offsets["key_scales"] % 16 == 0


def test_heads_that_a_table_names_run_on_wgmma():
    traits = Traits("float16", 128, 128, fp8=True, selected=True)
    assert choose("forward", traits, HOPPER).config.implementation == "sm90"


def test_few_rows_of_codes_are_left_to_smaller_tiles():
    traits = Traits("float16", 128, 128, fp8=True)
    for rows, tile in {32: "fp8-sm89-", 33: "fp8-sm90-m64", 65: "fp8-sm90-m128"}.items():
        assert str(choose("forward", traits, HOPPER, rows).config).startswith(tile)
