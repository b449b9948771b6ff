"""Which kernel runs, by which rule, and how the forward is laid over the machine."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

import numflash
from numflash.calls import forward as calls
from numflash.calls import ready
from numflash.configs import (
    FAMILIES,
    BackwardDqConfig,
    MmaConfig,
    MmaForwardConfig,
    Traits,
    accumulators_per_thread,
    mma,
    parse_config,
    portable,
    wgmma,
)
from numflash.problem.problem import AttentionProblem
from numflash.runtime.devices import ARCHITECTURES, blocks_per_sm
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.mode import SIMULATED
from numflash.runtime.views import numpy_dtype
from numflash.selection import choice as selection
from numflash.selection.geometry import (
    heads_in_flight,
    num_splits,
    rows_packed,
    with_keys,
    with_splits,
)
from numflash.selection.rules import choose, force
from tests.support import fake_gpu

HEAD_DIMS = range(32, 257, 32)
TENSOR_CORE_FAMILIES = ("forward", "backward-dkdv", "backward-dq")
RUN = (*TENSOR_CORE_FAMILIES, "delta", "combine")
TURING, AMPERE, ADA, HOPPER = (ARCHITECTURES[f"sm_{n}"] for n in ("75", "80", "89", "90a"))
EXACT = 'float32 is multiplied exactly unless precision="tf32"'
ROWS = (1, 8, 16, 32, 64, 2**30)

each_family = pytest.mark.parametrize("family", TENSOR_CORE_FAMILIES)
each_arch = pytest.mark.parametrize("arch", ARCHITECTURES)


def all_traits(dtype, **options):
    """Every pair of head dims."""
    pairs = itertools.product(HEAD_DIMS, HEAD_DIMS)
    return [Traits(dtype, *pair, **options) for pair in pairs]


def reasons(choice) -> dict[str, str]:
    """Why not, by what."""
    return dict(choice.passed_over)


# What may use the tensor cores


@each_family
@each_arch
def test_float32_is_multiplied_exactly_by_the_portable_kernels(family, arch):
    choice = choose(family, Traits("float32", 64, 64), ARCHITECTURES[arch])
    assert choice.config.implementation == "portable"
    generation = "sm75" if arch == "sm_75" else "sm80"
    assert reasons(choice)[f"{generation} (tensor cores)"] == EXACT
    assert EXACT in str(choice)


@each_family
@each_arch
def test_tf32_is_for_tensor_cores_that_have_it(family, arch):
    traits = Traits("float32", 64, 64, tf32=True)
    choice = choose(family, traits, ARCHITECTURES[arch])
    if arch == "sm_75":
        assert choice.config.implementation == "portable"
        # The portable kernel is that of float32, compiled once for both.
        assert choice.traits == Traits("float32", 64, 64)
        assert reasons(choice)["sm75 (tensor cores)"] == (
            "Turing's tensor cores have float16, not tf32"
        )
    else:
        assert choice.config.implementation == "sm80"
        assert choice.traits == traits
        assert reasons(choice)["portable"] == "tensor cores are faster"


@each_family
@each_arch
def test_16_bit_dtypes_run_on_the_tensor_cores_that_have_them(family, arch):
    for dtype in ("float16", "bfloat16"):
        choice = choose(family, Traits(dtype, 64, 64), ARCHITECTURES[arch])
        if arch == "sm_75" and dtype == "bfloat16":
            assert choice.config.implementation == "portable"
            expected = "Turing's tensor cores have float16, not bfloat16"
            assert reasons(choice)["sm75 (tensor cores)"] == expected
        else:
            assert isinstance(choice.config, MmaConfig)
            generations = {("sm_75", family): "sm75", ("sm_90a", "forward"): "sm90"}
            assert choice.config.generation == generations.get((arch, family), "sm80")
            assert choice.traits == Traits(dtype, 64, 64)


@each_family
@pytest.mark.parametrize("limits", [TURING, AMPERE], ids=lambda limits: limits.arch)
def test_a_scale_that_is_not_positive_is_left_to_the_portable_kernels(family, limits):
    for traits in (Traits("float16", 64, 64), Traits("float32", 64, 64, tf32=True)):
        choice = choose(family, traits, limits, positive_scale=False)
        assert choice.config.implementation == "portable"
        assert not choice.traits.tf32
        if traits.dtype == "float16":
            (why,) = [w for what, w in choice.passed_over if "tensor cores" in what]
            assert why.startswith("softmax_scale is not positive")


def test_kernels_without_products_are_portable_everywhere():
    for family, limits in itertools.product(("delta", "combine"), ARCHITECTURES.values()):
        for traits in (Traits("float16", 64, 64), Traits("float32", 64, 64, tf32=True)):
            choice = choose(family, traits, limits)
            assert choice.config.implementation == "portable" and choice.passed_over == ()
            assert choice.traits == replace(traits, tf32=False)


# Hopper


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("columns", HEAD_DIMS)
def test_the_forward_on_hopper_is_that_of_wgmma(dtype, columns):
    for traits in (Traits(dtype, columns, 32), Traits(dtype, 32, columns, True, True, False)):
        choice = choose("forward", traits, HOPPER)
        assert choice.config == wgmma.candidates(traits)[0]
        # The alignment of rows does not matter to bulk copies.
        assert choice.traits == replace(traits, vectorized=True)
        assert reasons(choice)["sm80"] == "wgmma is faster"
        assert list(reasons(choice))[-1] == "portable"
    for limits in ARCHITECTURES.values():
        if limits is not HOPPER:
            assert "sm90" not in str(choose("forward", traits, limits))
    assert "sm90" not in str(choose("backward-dq", traits, HOPPER))


def test_every_candidate_for_wgmma_is_chosen_somewhere_and_fits_with_all_features():
    chosen, shipped = set(), set()
    for columns, rows in itertools.product(HEAD_DIMS, (33, 65, 129, 2**30)):
        traits = Traits("bfloat16", columns, columns, True, True)
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
        ("float16-d64-dv64-vec-selected", {}, "not those that a table names"),
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
    traits = Traits("float16", columns, columns, alibi=True)
    assert why in wgmma.misfit(parse_config("forward", config), traits, HOPPER, 2**30)


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
    features = itertools.product((False, True), (False, True))
    for columns, rows, bent in itertools.product((64, 128, 192, 256), (33, 65, 2**30), features):
        traits = Traits("bfloat16", columns, columns, *bent, fp8=True)
        shipped |= set(wgmma.candidates(traits))
        choice = choose("forward", traits, HOPPER, rows)
        assert choice.config.smem_bytes(traits) <= HOPPER.max_smem_per_block
        chosen.add(choice.config)
    assert chosen == shipped


def test_codes_with_bent_scores_do_not_overlap_where_registers_would_spill():
    plain = Traits("float16", 128, 128, fp8=True)
    assert choose("forward", plain, HOPPER).config.overlap
    for feature in ("softcap", "alibi"):
        choice = choose("forward", replace(plain, **{feature: True}), HOPPER)
        assert not choice.config.overlap
        assert "keeps 208 registers" in "".join(reasons(choice).values())


@pytest.mark.parametrize(
    ("changes", "options", "why"),
    [
        ({"key_scales": True}, {}, "scales of K or V change within a tile of keys"),
        ({"selected": True}, {}, "not those that a table names"),
        ({}, {"no_bulk_copies": "k is odd"}, "k is odd"),
    ],
)
def test_codes_that_are_not_for_wgmma_say_so_first(changes, options, why):
    traits = replace(Traits("float16", 128, 128, fp8=True), **changes)
    choice = choose("forward", traits, HOPPER, **options)
    assert choice.config.implementation == "fp8" and not choice.config.multiplies_codes
    (what, reason), *_ = choice.passed_over
    assert what == "fp8-sm90" and why in reason


def test_few_rows_of_codes_are_left_to_smaller_tiles():
    traits = Traits("float16", 128, 128, fp8=True)
    for rows, tile in {32: "fp8-sm89-", 33: "fp8-sm90-m64", 65: "fp8-sm90-m128"}.items():
        assert str(choose("forward", traits, HOPPER, rows).config).startswith(tile)


# Which tile


@pytest.mark.parametrize(
    ("limits", "traits", "rows", "config"),
    [
        # 128 + 64 + 64 rows of 256 bytes are 64 KB: two blocks of four warps on an Ampere, ...
        (AMPERE, "float16-d128-dv128-vec", 2**30, "sm80-m128n64w4s1"),
        # ... but one on an Ada with 100 KB, of which 48 KB fit twice.
        (ADA, "float16-d128-dv128-vec", 2**30, "sm80-m128n32w4s1"),
        # A Turing has 64 KB: 32 for each of two.
        (TURING, "float16-d128-dv128-vec", 2**30, "sm75-m64n32w4s1"),
        # Float32 is twice as large.
        (AMPERE, "float32-d64-dv64-vec-tf32", 63, "sm80-m64n64w4s1"),
        (AMPERE, "bfloat16-d64-dv64-vec", 65, "sm80-m128n64w4s1"),
        (AMPERE, "bfloat16-d64-dv64-vec", 64, "sm80-m64n64w4s1"),
        # A tile of 16 rows is the smallest, however few rows there are.
        (HOPPER, "bfloat16-d64-dv64-vec", 1, "sm80-m16n32w1s1"),
        (AMPERE, "float32-d64-dv64-vec", 2**30, "m64n64w4"),
        (AMPERE, "float32-d64-dv64-vec", 32, "m32n32w4"),
        (AMPERE, "float32-d64-dv64-vec", 1, "m16n16w4"),
    ],
    ids=str,
)
def test_forward_tiles_are_those_worked_out_by_hand(limits, traits, rows, config):
    choice = choose("forward", Traits.parse(traits), limits, rows)
    assert str(choice.config) == config, str(choice)


@each_family
@each_arch
def test_tiles_are_less_than_twice_the_rows(family, arch):
    for dtype, rows in itertools.product(("float16", "float32"), ROWS):
        for d in HEAD_DIMS:
            choice = choose(family, Traits(dtype, d, d), ARCHITECTURES[arch], rows)
            if isinstance(choice.config, MmaConfig):
                assert choice.config.block_rows < max(2 * rows, 32)
            elif choice.config != portable.candidates(family)[-1]:
                assert choice.config.block_rows < 2 * rows


@each_family
@pytest.mark.parametrize("limits", [TURING, AMPERE, ADA, HOPPER], ids=lambda limits: limits.arch)
def test_as_many_warps_fit_on_an_sm_as_the_rule_says(family, limits):
    generation = "sm75" if limits is TURING else "sm80"

    def warps_per_sm(config, traits):
        blocks, _ = blocks_per_sm(limits, config.num_threads, 255, config.smem_bytes(traits))
        return blocks * config.num_warps

    for traits, rows in itertools.product(all_traits("float16"), (16, 2**30)):
        choice = choose(family, traits, limits, rows)
        if choice.config.implementation != "sm80":
            continue
        (promised,) = [n for n in mma.WARPS_PER_SM if f" {n} warps" in choice.rule]
        assert warps_per_sm(choice.config, traits) >= promised
        candidates = mma.candidates(family, generation)
        before = candidates[: candidates.index(choice.config)]
        # Each other one has its reason; one before it that lacks room has less than was promised.
        others = [str(config) for config in candidates if config != choice.config]
        listed = [what for what in reasons(choice) if not what.startswith("sm90")]
        assert listed == [*others, "portable"]
        for config in before:
            if "warps per SM" in reasons(choice)[str(config)]:
                assert warps_per_sm(config, traits) < promised


@each_arch
@pytest.mark.parametrize("family", RUN)
def test_what_is_chosen_fits_every_gpu(family, arch):
    limits = ARCHITECTURES[arch]
    for dtype, tf32 in (("float16", False), ("float32", False), ("float32", True)):
        for traits in all_traits(dtype, tf32=tf32):
            choice = choose(family, traits, limits)
            smem_bytes = choice.config.smem_bytes(choice.traits)
            assert smem_bytes <= limits.max_smem_per_block, str(choice)
            assert choice.config.num_threads <= 1024
            # With all registers in use at least one block still fits.
            if isinstance(choice.config, MmaConfig):
                threads, registers = choice.config.num_threads, 255
                if choice.config.implementation == "sm90":
                    registers = 65536 // threads // 8 * 8
                assert blocks_per_sm(limits, threads, registers, smem_bytes)[0] >= 1


@each_family
def test_what_is_chosen_leaves_registers_for_its_operands(family):
    for limits, dtype in itertools.product((TURING, ADA, HOPPER), ("float16", "float32")):
        for traits in all_traits(dtype):
            config = choose(family, traits, limits).config
            # 255 registers a thread. In the portable kernels a row of operands and the addresses
            # need about 100 of them, next to a tensor core's accumulators about 50.
            if isinstance(config, MmaConfig):
                assert config.accumulators_per_thread(traits) <= 200, f"{config} {traits}"
            else:
                assert accumulators_per_thread(config, traits) <= 144, f"{config} {traits}"


@each_family
def test_more_shared_memory_never_means_a_smaller_portable_tile(family):
    by_memory = sorted(ARCHITECTURES.values(), key=lambda limits: limits.max_smem_per_block)
    for traits in all_traits("float32"):
        configs = [choose(family, traits, limits).config for limits in by_memory]
        sizes = [config.tile_m * config.tile_n for config in configs]
        assert sizes == sorted(sizes)


@each_family
def test_every_candidate_is_chosen_somewhere(family):
    """One that never is would be shipped for nothing, and compiled by no test."""
    chosen = set()
    for dtype, options in (("float16", {}), ("float16", {"softcap": True}), ("float32", {})):
        for limits, rows in itertools.product((TURING, AMPERE, ADA, HOPPER), ROWS):
            for traits in all_traits(dtype, **options):
                chosen.add(choose(family, traits, limits, rows).config)
    for rows, traits in itertools.product(ROWS, all_traits("float32", tf32=True)):
        chosen.add(choose(family, traits, AMPERE, rows).config)
    tiles = {str(config).partition("-")[2] for config in chosen if isinstance(config, MmaConfig)}
    candidates = [str(config) for config in mma.candidates(family, "sm80")]
    unused = [text for text in candidates if text.partition("-")[2] not in tiles]
    unused += [str(config) for config in portable.candidates(family) if config not in chosen]
    assert unused == []


@pytest.mark.parametrize("function", [choose, lambda *args: force(args[0], "m64n32w4", *args[1:])])
def test_an_unknown_family_is_refused(function):
    with pytest.raises(ValueError, match=r"kernel family must be one of forward, .* 'sideways'"):
        function("sideways", Traits("float16", 32, 32), AMPERE)


def test_a_choice_says_what_it_passed_over():
    choice = choose("forward", Traits("float16", 128, 128), ADA)
    first, *others = str(choice).splitlines()
    assert first == f"forward: {choice.config} (sm80), {choice.rule}"
    assert others == [f"  not {what}: {why}" for what, why in choice.passed_over]
    assert any("65536 bytes" in line and "m128n64w4s1" in line for line in others)


# Forced


@pytest.mark.parametrize(
    ("config", "traits", "limits"),
    [
        # Rules of speed do not hold: a tile far too large, or one that may spill.
        ("sm80-m128n64w4s1", "float16-d32-dv32-vec", AMPERE),
        ("sm80-m128n64w4s1", "float16-d256-dv256-vec", HOPPER),
        ("sm75-m64n32w4s1", "float16-d64-dv64-vec", AMPERE),
        ("sm80-m64n32w4s3x5-linear", "bfloat16-d64-dv64-vec", AMPERE),
        ("sm80-m64n32w4s1", "float32-d64-dv64-vec-tf32", AMPERE),
        ("m16n16w4", "float16-d64-dv64-vec", AMPERE),
        ("m16n16w4", "float32-d64-dv64-vec-tf32", AMPERE),
    ],
)
def test_a_config_that_can_run_runs(config, traits, limits):
    traits = Traits.parse(traits)
    choice = force("forward", config, traits, limits)
    assert (choice.family, str(choice.config)) == ("forward", config)
    assert choice.rule == "as the caller asks"
    is_mma = isinstance(choice.config, MmaConfig)
    assert choice.traits == (traits if is_mma else replace(traits, tf32=False))
    assert force("forward", choice.config, traits, limits) == choice
    if not is_mma:
        assert force("forward", config, traits, limits, positive_scale=False) == choice


@pytest.mark.parametrize(
    ("config", "traits", "limits", "words"),
    [
        ("sm80-m64n32w4s1", "float32-d64-dv64-vec", AMPERE, [EXACT]),
        (
            "sm80-m64n32w4s1",
            "float16-d64-dv64-vec",
            TURING,
            ["its instructions begin with sm_80, this GPU is sm_75"],
        ),
        ("sm75-m64n32w4s1", "bfloat16-d64-dv64-vec", AMPERE, ["have float16, not bfloat16"]),
        ("sm75-m64n32w4s1", "float32-d64-dv64-vec-tf32", HOPPER, ["have float16, not tf32"]),
        (
            "sm80-m128n64w4s3",
            "float16-d256-dv256-vec",
            HOPPER,
            # (128 + 3 x 64 + 3 x 64) x 512 bytes
            ["it needs 262144 bytes", "head dims 256 and 256", "sm_90a has 232448"],
        ),
        ("sm90-m64n64w4s1", "float16-d64-dv64-vec", AMPERE, ["sm_90a only, this GPU is sm_80"]),
        (
            "sm90-m64n64w4s1",
            "float16-d64-dv64-vec",
            ARCHITECTURES["sm_100"],
            ["wgmma is an instruction of sm_90a only, this GPU is sm_100"],
        ),
        (
            "sm90-m64n64w4s1",
            "float32-d64-dv64-vec-tf32",
            HOPPER,
            ["its products are of float16 or bfloat16, not of float32"],
        ),
        ("sm90-m64n64w4s1", "bfloat16-d64-dv64-selected", HOPPER, ["it computes all heads"]),
        ("sm90-m64n64w4s1", "bfloat16-d64-dv64-vec-fp8", HOPPER, ["it has no 8-bit floats"]),
        ("fp8-sm90-m64n64w4s1", "bfloat16-d64-dv64-vec", HOPPER, ["computes on 8-bit floats"]),
        ("fp8-sm90-m64n64w4s1", "bfloat16-d64-dv64-vec-fp8", ADA, ["sm_90a only"]),
        (
            "fp8-sm90-m64n64w4s1",
            "bfloat16-d64-dv64-vec-fp8-keyscales",
            HOPPER,
            ["scales of K or V change within a tile of keys"],
        ),
        (
            "sm90-m64n64w4s1-packed",
            "bfloat16-d64-dv64-alibi-vec",
            HOPPER,
            ["slopes of their own cannot be packed"],
        ),
        (
            "sm90-m128n256w8s2",
            "float16-d128-dv128-vec",
            HOPPER,
            # (128 + 2 x 256 + 2 x 256) x 256 bytes, and barriers
            ["it needs 295008 bytes", "head dims 128 and 128", "sm_90a has 232448"],
        ),
        (
            "m64n64w4",
            "float16-d256-dv256-vec",
            TURING,
            # (3 x 64 rows of 260 floats + 64 of 72) x 4 bytes
            ["it needs 218112 bytes", "head dims 256 and 256", "sm_75 has 65536"],
        ),
    ],
)
def test_a_config_that_cannot_run_is_refused_with_the_rule(config, traits, limits, words):
    with pytest.raises(UnsupportedError) as error:
        force("forward", config, Traits.parse(traits), limits)
    for word in [f"config {config} cannot run this forward: ", *words]:
        assert word in str(error.value)


def test_a_forced_tensor_core_config_needs_a_positive_scale():
    for config, limits in (("sm80-m64n32w4s1", AMPERE), ("sm90-m64n64w4s1", HOPPER)):
        with pytest.raises(UnsupportedError, match="softmax_scale is not positive"):
            force("forward", config, Traits("float16", 64, 64), limits, False)


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ("m64n32", ValueError, ["a forward config must look like", "'m64n32'"]),
        (BackwardDqConfig(64, 32, 4), TypeError, ["a config of forward", "BackwardDqConfig"]),
        (None, TypeError, ["a string or a config of forward", "None"]),
        (b"m64n32w4", TypeError, ["a string or a config of forward", "b'm64n32w4'"]),
    ],
    ids=str,
)
def test_what_is_no_config_of_the_family_is_refused(config, error, words):
    with pytest.raises(error) as caught:
        force("forward", config, Traits("float16", 64, 64), AMPERE)
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)


def test_what_is_chosen_may_be_forced():
    for family, limits in itertools.product(TENSOR_CORE_FAMILIES, (TURING, ADA, HOPPER)):
        for dtype, tf32 in (("float16", False), ("bfloat16", False), ("float32", True)):
            for traits in all_traits(dtype, tf32=tf32)[::5]:
                choice = choose(family, traits, limits)
                forced = force(family, str(choice.config), traits, limits)
                assert (forced.config, forced.traits) == (choice.config, choice.traits)


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
    scalars = {"softmax_scale": 1.0, "band_lo": 0, "band_hi": 0, "bias_shift": 0, "softcap": 0.0}
    rest = {"head_dim": 128, "head_dim_v": 64, "dtype": "float16", "alibi_strides": None}
    return AttentionProblem(**{**sizes, **scalars, **rest, **changes})


@pytest.mark.parametrize(
    ("changes", "pack"),
    [
        ({}, 4),
        ({"seqlen_q": 32}, 4),
        ({"seqlen_q": 33}, 1),
        ({"num_heads_kv": 8}, 1),
        ({"num_heads_kv": 1}, 8),
        # Each head has a slope of its own.
        ({"alibi_strides": (0, 1)}, 1),
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


# explain_dispatch


class Machine:
    """Arrays for a GPU of one's choice, of this process's kind."""

    def __init__(self, monkeypatch):
        self.gpu = None if SIMULATED else fake_gpu.install(monkeypatch)
        self.patch = monkeypatch

    def be(self, limits, num_sms=1, l2_bytes=2**20):
        """Have these limits."""
        for module in (calls, selection):
            self.patch.setattr(module, "limits_of_device", lambda device: limits)
        self.patch.setattr(selection, "multiprocessors", lambda device: (num_sms, l2_bytes))
        self.patch.setattr(ready, "_ready", {})

    def arrays(self, *shapes, dtype="float16"):
        """Arrays of zeros."""
        if self.gpu is None:
            return [np.zeros(shape, numpy_dtype(dtype)) for shape in shapes]
        return [self.gpu.array(shape, dtype) for shape in shapes]


@pytest.fixture
def machine(monkeypatch):
    """A `Machine`."""
    return Machine(monkeypatch)


LONG = (2, 500, 4, 64)


@pytest.mark.parametrize("limits", [TURING, AMPERE, ADA, HOPPER], ids=lambda limits: limits.arch)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_an_explanation_lists_the_three_kernels_and_why_not_others(machine, limits, dtype):
    machine.be(limits)
    q, k, v = machine.arrays(LONG, LONG, LONG, dtype=dtype)
    explanation = numflash.explain_dispatch(q, k, v, causal=True)
    choices = {"forward": explanation.forward, **explanation.backward}
    assert list(choices) == ["forward", "backward-dkdv", "backward-dq"]
    for family, choice in choices.items():
        expected = choose(family, Traits(dtype, 64, 64), limits, 500)
        assert choice == expected
        assert str(choice) in str(explanation)
        assert f"{family}: {choice.config} ({choice.config.implementation})" in str(explanation)
        for what, why in choice.passed_over:
            assert f"not {what}: {why}" in str(explanation)
    assert (EXACT in str(explanation)) is (dtype == "float32")
    is_turing = dtype == "bfloat16" and limits is TURING
    assert ("have float16, not bfloat16" in str(explanation)) is is_turing


def test_an_explanation_tells_of_packed_heads_and_splits(machine):
    machine.be(HOPPER, 132, 50 * 2**20)
    q, k = machine.arrays((1, 1, 32, 128), (1, 65536, 4, 128))
    explanation = numflash.explain_dispatch(q, k, k)
    splits = explanation.geometry.num_splits
    assert explanation.geometry.pack == 8
    assert splits > 1 and explanation.forward.config.num_splits == splits
    assert "  8 query heads of a group are packed into the rows of a tile" in str(explanation)
    assert f"  the keys are split over {splits} blocks" in str(explanation)
    (q,) = machine.arrays((1, 4096, 32, 128))
    explanation = numflash.explain_dispatch(q, k, k)
    assert (explanation.geometry.pack, explanation.geometry.num_splits) == (1, 1)
    assert "packed" not in str(explanation) and "split over" not in str(explanation)


def test_an_explanation_of_forced_configs(machine):
    machine.be(AMPERE)
    q, k, v = machine.arrays(LONG, LONG, LONG)
    forced = {"forward": "m16n16w4", "backward-dq": parse_config("backward-dq", "m32n32w4")}
    before = dict(forced)
    explanation = numflash.explain_dispatch(q, k, v, config=forced)
    assert forced == before
    assert str(explanation.forward.config) == "m16n16w4"
    assert explanation.forward.rule == "as the caller asks"
    assert str(explanation.backward["backward-dq"].config) == "m32n32w4"
    dkdv = explanation.backward["backward-dkdv"]
    assert dkdv == choose("backward-dkdv", Traits("float16", 64, 64), AMPERE, 500)
    explanation = numflash.explain_dispatch(q, k, v, config="sm80-m16n16w1s1x3")
    assert str(explanation.forward.config) == "sm80-m16n16w1s1x3"
    assert explanation.geometry.num_splits == 3


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"softmax_scale": -1.0}, "softmax_scale is not positive"),
        ({"softmax_scale": 0}, "softmax_scale is not positive"),
        ({"config": "m64n32w4"}, "forward: m64n32w4 (portable), as the caller asks"),
        ({"softcap": 2.0, "window_size": (5, 0)}, "forward: sm80-"),
    ],
)
def test_an_explanation_goes_by_the_options(machine, options, part):
    machine.be(AMPERE)
    q, k, v = machine.arrays(LONG, LONG, LONG)
    assert part in str(numflash.explain_dispatch(q, k, v, **options))


def test_an_explanation_says_why_bulk_copies_cannot_be_told_of_a_tensor(machine):
    machine.be(HOPPER)
    q, k = machine.arrays((2, 500, 1, 64), (2, 500, 1, 33))
    explanation = numflash.explain_dispatch(q, q, q)
    assert explanation.forward.config.implementation == "sm90"
    assert "cannot be described" not in str(explanation)
    explanation = numflash.explain_dispatch(k, k, k)
    assert explanation.forward.config.implementation == "sm80"
    line = (
        "  not sm90: q cannot be described to bulk copies: its row stride of 66 bytes is not a "
        "multiple of 16"
    )
    assert str(explanation).splitlines()[1] == line
    with pytest.raises(UnsupportedError, match="q cannot be described to bulk copies"):
        numflash.explain_dispatch(k, k, k, config="sm90-m64n64w4s1")
    (five,) = machine.arrays((2, 20, 5, 64))
    explanation = numflash.explain_dispatch(five, q, q)
    assert "not sm90: the 5 query heads of a group cannot be packed" in str(explanation)


def test_an_explanation_of_codes_on_hopper(machine):
    machine.be(HOPPER)
    (q,) = machine.arrays((2, 500, 4, 64))
    text = str(numflash.explain_dispatch(q, q, q, precision="fp8"))
    assert text.startswith("forward: fp8-sm90-m128n128w8s2-") and "as float16" not in text
    # One of 64 tokens, where tiles have 128.
    narrow = numflash.Fp8Recipe("block", 64)
    text = str(numflash.explain_dispatch(q, q, q, precision="fp8", fp8=narrow))
    assert "not fp8-sm90: scales of K or V change within a tile of keys" in text
    assert "codes are multiplied as float16" in text
    config = "fp8-sm90-m64n64w4s2"
    explanation = numflash.explain_dispatch(q, q, q, precision="fp8", fp8=narrow, config=config)
    assert str(explanation.forward.config) == config
    # Codes are padded, results are not.
    (odd,) = machine.arrays((2, 500, 4, 20))
    explanation = numflash.explain_dispatch(odd, odd, q, precision="fp8")
    assert explanation.forward.config.implementation == "sm90"
    text = str(numflash.explain_dispatch(q, q, odd, precision="fp8"))
    assert "not fp8-sm90: out cannot be described to bulk copies: its head stride of 40" in text


def test_an_explanation_of_tf32(machine):
    machine.be(HOPPER)
    q, k, v = machine.arrays(LONG, LONG, LONG, dtype="float32")
    explanation = numflash.explain_dispatch(q, k, v, precision="tf32")
    for choice in (explanation.forward, *explanation.backward.values()):
        assert choice.traits.tf32 and choice.config.implementation == "sm80"


def test_every_family_that_runs_by_itself_is_a_family():
    assert set(RUN) <= set(FAMILIES)
