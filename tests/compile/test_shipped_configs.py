"""Every shipped config, for every target GPU, becomes machine code that stays in registers.

Shipped is what `default_config` returns. Which config that is depends on head dims, shared memory
and the number of rows, so a case is a kernel family, a pair of head dims and a config, with the
GPUs that it is shipped for; dtypes and features go round. One case is one test, because Numba's
work on a kernel's device functions is shared between GPUs.

Each config is compiled with the largest head dims that it is shipped for, where registers are
scarcest. With NUMFLASH_TEST_EVERY_CONFIG=1 every head dim has its turn, which takes many minutes.
"""

import itertools
import os
from dataclasses import dataclass, replace

import pytest

from numflash.compiler import compile_kernel, get_cubin
from numflash.configs import (
    DTYPES,
    FAMILIES,
    HEAD_DIM_STEP,
    MAX_HEAD_DIM,
    ForwardConfig,
    Traits,
    default_config,
)
from numflash.devices import ARCHITECTURES
from numflash.inspect import inspect_kernel
from numflash.kernels.kernel import Kernel
from numflash.ptx import Pointer, f32
from numflash.sass import count_instructions, disassemble

ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_120")
# From a single row to more than any tile has.
ROWS = (1, 8, 16, 32, 2**30)
HEAD_DIMS = range(HEAD_DIM_STEP, MAX_HEAD_DIM + 1, HEAD_DIM_STEP)
FEATURES = (
    {},
    {"softcap": True, "alibi": True},
    {"vectorized": False},
    {"alibi": True},
    {"softcap": True, "vectorized": False},
)


@dataclass(frozen=True)
class Case:
    """One kernel and the GPUs that it is shipped for."""

    family: str
    config: str
    traits: Traits
    archs: tuple[str, ...]

    def __str__(self):
        return f"{self.family}-{self.config}-{self.traits}"


def shipped_configs(family, head_dim, head_dim_v, arch):
    """The string forms of all configs that are shipped for these head dims."""
    traits = Traits("float16", head_dim, head_dim_v)
    limit = ARCHITECTURES[arch].max_smem_per_block
    return dict.fromkeys(str(default_config(family, traits, limit, rows)) for rows in ROWS)


def shapes_of(family):
    """(head_dim, head_dim_v): all equal ones, and a few others."""
    if family == "delta":
        return [(32, 32), (64, 128), (256, 256)]
    # (160, 256) brings a config that no equal head dims have.
    return [*((d, d) for d in HEAD_DIMS), (160, 256) if family == "backward-dkdv" else (192, 128)]


def every_case():
    """All that is shipped, the largest head dims first; dtypes and features go round."""
    cases = []
    for family in FAMILIES:
        for dims in sorted(shapes_of(family), key=sum, reverse=True):
            archs = {}
            for arch in ARCHS:
                for config in shipped_configs(family, *dims, arch):
                    archs.setdefault(config, []).append(arch)
            for config, shipped_for in archs.items():
                i = len(cases)
                traits = Traits(DTYPES[i % len(DTYPES)], *dims, **FEATURES[i % len(FEATURES)])
                cases.append(Case(family, config, traits, tuple(shipped_for)))
    return cases


def fewest_cases():
    """Every config on every GPU once, with the largest head dims that it is shipped for there."""
    covered, cases = set(), []
    for case in every_case():
        archs = [a for a in case.archs if (case.family, case.config, a) not in covered]
        if archs:
            covered |= {(case.family, case.config, arch) for arch in archs}
            cases.append(replace(case, archs=tuple(archs)))
    return cases


CASES = every_case() if os.environ.get("NUMFLASH_TEST_EVERY_CONFIG") else fewest_cases()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_shipped_config(case):
    config = FAMILIES[case.family].parse(case.config)
    for arch in case.archs:
        cubin = get_cubin(config, case.traits, ARCHITECTURES[arch])
        assert cubin.spill_store_bytes == cubin.spill_load_bytes == cubin.stack_bytes == 0, arch
        assert cubin.warnings == (), arch
        assert cubin.smem_bytes <= ARCHITECTURES[arch].max_smem_per_block, arch
    # Disassembling takes as long as compiling, so one GPU stands for all.
    arch = case.archs[CASES.index(case) % len(case.archs)]
    report = inspect_kernel(config, case.traits, ARCHITECTURES[arch])
    assert report.faults == (), arch
    assert report.instructions["FFMA"] > 0


def test_the_cases_cover_everything():
    covered = {(c.family, c.config, arch) for c in CASES for arch in c.archs}
    for family, arch in itertools.product(FAMILIES, ARCHS):
        for dims in itertools.product(HEAD_DIMS, HEAD_DIMS):
            for config in shipped_configs(family, *dims, arch):
                assert (family, config, arch) in covered, dims
    for family in set(FAMILIES) - {"delta"}:
        traits = [c.traits for c in CASES if c.family == family]
        assert {t.dtype for t in traits} == set(DTYPES)
        for name in ("softcap", "alibi", "vectorized"):
            assert {getattr(t, name) for t in traits} == {True, False}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_default_fits_the_shared_memory(family, arch):
    limit = ARCHITECTURES[arch].max_smem_per_block
    for *dims, rows in itertools.product(HEAD_DIMS, HEAD_DIMS, ROWS):
        traits = Traits("float32", *dims)
        assert default_config(family, traits, limit, rows).smem_bytes(traits) <= limit, dims


def test_a_monstrous_config_is_found_out():
    # 1024 threads leave 64 registers to each.
    config = ForwardConfig.parse("m128n64w32")
    report = inspect_kernel(config, Traits("float32", 128, 128), ARCHITECTURES["sm_80"])
    assert report.spill_store_bytes > 0
    assert report.spill_load_bytes > 0
    assert report.stack_bytes > 0
    assert report.instructions["LDL"] > 0
    assert report.instructions["STL"] > 0
    assert len(report.faults) >= 5


def test_float64_is_found_out():
    def kernel(x: Pointer(f32)):
        x[0] *= 0.1  # a Python float is a float64

    cubin = compile_kernel(lambda: Kernel("f64", kernel, 32, 0), ARCHITECTURES["sm_80"])
    assert count_instructions(disassemble(cubin.code))["F64"] > 0
