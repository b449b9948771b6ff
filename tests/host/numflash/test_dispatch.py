"""Which kernel runs, by which rule, and what a caller may force."""

import itertools
from dataclasses import replace

import pytest

from numflash.configs import (
    FAMILIES,
    BackwardDqConfig,
    MmaConfig,
    Traits,
    mma_rules,
    portable,
)
from numflash.runtime.devices import ARCHITECTURES, blocks_per_sm
from numflash.runtime.errors import UnsupportedError
from numflash.selection.rules import choose, force
from tests.support.covering import some

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
            generations = {"sm_75": "sm75", "sm_90a": "sm90"}
            assert choice.config.generation == generations.get(arch, "sm80")
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
        (promised,) = [n for n in mma_rules.WARPS_PER_SM if f" {n} warps" in choice.rule]
        assert warps_per_sm(choice.config, traits) >= promised
        candidates = mma_rules.candidates(family, generation)
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
            if getattr(config, "registers", None):
                most = config.registers[1] - 16
                assert config.accumulators_per_thread(traits) <= most, f"{config} {traits}"
            elif isinstance(config, MmaConfig):
                assert config.accumulators_per_thread(traits) <= 200, f"{config} {traits}"
            else:
                assert config.accumulators_per_thread(traits) <= 144, f"{config} {traits}"


@each_family
def test_more_shared_memory_never_means_a_smaller_portable_tile(family):
    by_memory = sorted(ARCHITECTURES.values(), key=lambda limits: limits.max_smem_per_block)
    for traits in all_traits("float32"):
        configs = [choose(family, traits, limits).config for limits in by_memory]
        sizes = [config.tile_m * config.tile_n for config in configs]
        assert sizes == sorted(sizes)


@pytest.mark.parametrize("family", some(TENSOR_CORE_FAMILIES, "forward"))
def test_every_candidate_is_chosen_somewhere(family):
    """One that never is would be shipped for nothing, and compiled by no test."""
    chosen = set()
    for dtype, options in (
        ("float16", {}),
        ("float16", {"features": ("softcap",)}),
        ("float32", {}),
    ):
        for limits, rows in itertools.product((TURING, AMPERE, ADA, HOPPER), ROWS):
            for traits in all_traits(dtype, **options):
                chosen.add(choose(family, traits, limits, rows).config)
    for rows, traits in itertools.product(ROWS, all_traits("float32", tf32=True)):
        chosen.add(choose(family, traits, AMPERE, rows).config)
    tiles = {str(config).partition("-")[2] for config in chosen if isinstance(config, MmaConfig)}
    candidates = [str(config) for config in mma_rules.candidates(family, "sm80")]
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
        ("sm90-m64n64w4s1", "bfloat16-d64-dv64-vec-fp8", HOPPER, ["it has no 8-bit floats"]),
        ("fp8-sm90-m64n64w4s1", "bfloat16-d64-dv64-vec", HOPPER, ["computes on 8-bit floats"]),
        ("fp8-sm90-m64n64w4s1", "bfloat16-d64-dv64-vec-fp8", ADA, ["sm_90a only"]),
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


def test_every_family_that_runs_by_itself_is_a_family():
    assert set(RUN) <= set(FAMILIES)


@pytest.mark.parametrize(
    ("traits", "config"),
    [
        (Traits("float16", 128, 128), "sm75-m32n64w4s1"),
        (Traits("float16", 128, 96), "sm75-m32n64w4s1"),
        # By compiling: 24 bytes spilled with softcap, 12 with so many columns of dV.
        (Traits("float16", 128, 128, ("softcap",)), "sm75-m32n64w4s1-apart"),
        (Traits("float16", 32, 224), "sm75-m32n64w4s1-apart"),
        # Never compiled: what takes registers beside the head dims.
        (Traits("float16", 128, 128, blocks=(128, 128)), "sm75-m32n64w4s1-apart"),
        (Traits("float16", 128, 128, ("sinks",)), "sm75-m32n64w4s1-apart"),
    ],
    ids=str,
)
def test_turing_computes_dk_and_dv_together_where_registers_suffice(traits, config):
    assert str(choose("backward-dkdv", traits, ARCHITECTURES["sm_75"]).config) == config
