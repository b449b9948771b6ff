"""The forward on 8-bit floats as machine code: what is chosen stays in registers, and multiplies.

For each head_dim and GPU the config that `selection.rules` chooses, with scales of tiles and of
keys in turn. NUMFLASH_TEST_FULL=1 compiles all of them with every feature.
"""

import itertools
from dataclasses import replace

import pytest

from numflash.configs import Fp8ForwardConfig, Sm90Fp8ForwardConfig, Traits, wgmma
from numflash.machine_code.compiler import get_cubin
from numflash.machine_code.report import inspect_kernel
from numflash.machine_code.sass import count_instructions, disassemble
from numflash.runtime.devices import architecture
from numflash.selection.rules import choose
from tests.support.covering import FULL, some, thorough

# sm_86 has the instructions of sm_80 and the shared memory of sm_89.
ARCHS = ("sm_75", "sm_80", "sm_89", "sm_90a", "sm_120")
NATIVE = ("sm_89", "sm_120")
HOPPER, MANY_ROWS = architecture("sm_90a"), 2**30
HEAD_DIMS = (64, 128, 192, 256)
PLAIN, KEYS = {}, {"key_scales": True}
BENT = {"features": ("softcap", "alibi")}
ALL = {**KEYS, **BENT}


def kernel(
    arch: str, head_dim: int, features: dict, dtype: str = "float16", rows: int = MANY_ROWS
):
    """(config, traits, limits) of what is chosen."""
    limits = architecture(arch)
    traits = Traits(dtype, head_dim, head_dim, fp8=True, **features)
    return choose("forward", traits, limits, rows).config, traits, limits


def _cases():
    """(arch, head_dim, features): each GPU and head_dim; where registers are scarcest both."""
    if FULL:
        return list(itertools.product(ARCHS, HEAD_DIMS, (PLAIN, KEYS, BENT, ALL)))
    return [
        ("sm_75", 256, KEYS),
        ("sm_80", 64, ALL),
        ("sm_80", 192, PLAIN),
        ("sm_89", 256, PLAIN),
        ("sm_90a", 128, KEYS),
        ("sm_120", 128, ALL),
        ("sm_120", 256, KEYS),
    ]


def _name(case) -> str:
    arch, head_dim, features = case
    return "-".join([arch, f"d{head_dim}", *(features or ["plain"])])


@pytest.mark.parametrize("case", some(_cases(), _cases()[1]), ids=_name)
def test_what_is_chosen_stays_in_registers_and_multiplies(case):
    arch, head_dim, features = case
    dtype = "bfloat16" if head_dim == 128 else "float16"
    config, traits, limits = kernel(arch, head_dim, features, dtype)
    report = inspect_kernel(config, traits, limits)
    assert report.faults == (), f"{config}, {report.registers} registers"
    counts = report.instructions
    by_wgmma = isinstance(config, Sm90Fp8ForwardConfig)
    assert by_wgmma is (arch == "sm_90a")
    assert (counts["QGMMA"] > 0) is by_wgmma
    assert (counts["QMMA"] > 0) is (arch in NATIVE)
    assert config.multiplies_codes is (by_wgmma or arch in NATIVE)
    assert (counts["HMMA"] > 0) is not config.multiplies_codes


def _hopper_cases():
    """(config, dtype, head_dim, features): what is chosen; in full every candidate."""
    if FULL:
        features = [PLAIN, {"features": ("softcap",)}, {"features": ("alibi",)}, BENT, KEYS, ALL]
        for head_dim, dtype, feature in itertools.product(
            HEAD_DIMS, ("float16", "bfloat16"), features
        ):
            traits = Traits(dtype, head_dim, head_dim, fp8=True, **feature)
            for config in wgmma.candidates(traits):
                if wgmma.misfit(config, traits, HOPPER, 2**30) is None:
                    yield config, dtype, head_dim, feature
                    yield replace(config, num_splits=2), dtype, head_dim, feature
        return
    for head_dim, dtype, feature in (
        (64, "float16", BENT),
        (128, "bfloat16", PLAIN),
        (192, "float16", PLAIN),
        (256, "bfloat16", {"features": ("alibi",)}),
        (64, "bfloat16", KEYS),
        (128, "float16", ALL),
        (256, "float16", KEYS),
    ):
        yield kernel("sm_90a", head_dim, feature, dtype)[0], dtype, head_dim, feature
    few = kernel("sm_90a", 128, PLAIN, rows=64)[0]
    yield replace(few, num_splits=2), "bfloat16", 128, PLAIN


def _hopper_name(case) -> str:
    config, dtype, head_dim, features = case
    return "-".join([str(config), dtype, f"d{head_dim}", *features])


ON_HOPPER = tuple(_hopper_cases())


@pytest.mark.parametrize("case", some(ON_HOPPER, ON_HOPPER[0]), ids=_hopper_name)
def test_products_of_wgmma_are_as_many_as_there_must_be(case):
    config, dtype, head_dim, features = case
    traits = Traits(dtype, head_dim, head_dim, fp8=True, **features)
    report = inspect_kernel(config, traits, HOPPER)
    assert report.faults == ()
    # 32 columns of Q or keys of V a step; O of more than 128 columns comes in parts.
    of_s, of_o = head_dim // 32, config.tile_n // 32 * (head_dim // config.part_columns(traits))
    # The first tile of keys has an S of its own, the last an O.
    assert report.instructions["QGMMA"] == 2 * (of_s + of_o)
    assert report.instructions["HMMA"] == report.instructions["HGMMA"] == 0
    loop = report.main_loop
    if config.overlap:
        assert (loop.groups, loop.waits) == ((of_s, of_o), (1, 0))
        assert loop.overlapped_exponentials == loop.exponentials
    # A thread has 2 scores of each 8 columns for each of 2 rows, and a weight for each row.
    # Of float16 tanh is made of an exponential, of bfloat16 it is an instruction.
    has_tanh = "softcap" in traits.features and dtype == "float16"
    tanh = config.tile_n // 2 if has_tanh else 0
    assert loop.exponentials == config.tile_n // 2 + 2 + tanh
    # A thread reads the scales of four of its keys at once, and of each three.
    of_keys = 3 * config.tile_n // 16 if traits.key_scales else 0
    assert loop.opcodes.get("LDS", 0) == of_keys


def products(config: str, arch: str) -> dict[str, int]:
    """The number of each instruction in a kernel with head_dim 64."""
    traits = Traits("float16", 64, 64, fp8=True)
    cubin = get_cubin(Fp8ForwardConfig.parse(config), traits, architecture(arch))
    return count_instructions(disassemble(cubin.code))


def test_products_are_as_many_as_there_must_be():
    # 16 rows a warp: of S 8 columns of products, 2 steps of 32; of O 8 columns, 2 steps.
    counts = products("fp8-sm89-m64n64w4s1", "sm_89")
    assert (counts["QMMA"], counts["HMMA"]) == (8 * 2 + 8 * 2, 0)


@thorough
def test_products_of_float16_are_twice_as_many():
    counts = products("fp8-sm80-m64n64w4s1", "sm_80")
    assert (counts["QMMA"], counts["HMMA"]) == (0, 8 * 4 + 8 * 4)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_120"])
def test_there_is_a_kernel_for_everything_and_it_fits(arch):
    limits = architecture(arch)
    shapes = itertools.product(HEAD_DIMS, HEAD_DIMS, (PLAIN, KEYS, BENT, ALL), (1, 16, 64, 2**30))
    for head_dim, head_dim_v, features, rows in shapes:
        traits = Traits("float16", head_dim, head_dim_v, fp8=True, **features)
        config = choose("forward", traits, limits, rows).config
        assert config.smem_bytes(traits) <= limits.max_smem_per_block
        assert config.misfit(traits) is None
