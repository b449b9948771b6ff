"""Every shipped config, for every target GPU, becomes machine code that stays in registers.

Shipped is what `default_config` returns. Which config that is depends on head dims and shared
memory alone, so a case is a kernel family, a pair of head dims and a config, with all the GPUs
that it is shipped for; dtypes and features go round. One case is one test, because Numba's work on
a kernel's device functions is shared between GPUs.
"""

import itertools
from dataclasses import dataclass

import pytest

from numflash.compiler import compile_kernel
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
from numflash.ptx import Pointer, cuda, f32
from numflash.sass import count_instructions, disassemble

ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_120")
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


def shipped_config(family, head_dim, head_dim_v, arch):
    """The string form of the config that is shipped for these head dims."""
    traits = Traits("float16", head_dim, head_dim_v)
    return str(default_config(family, traits, ARCHITECTURES[arch].max_smem_per_block))


def shapes_of(family):
    """(head_dim, head_dim_v): all equal ones, and a few others."""
    if family == "delta":
        return [(32, 32), (64, 128), (256, 256)]
    # (160, 256) brings a config that no equal head dims have.
    return [*((d, d) for d in HEAD_DIMS), (160, 256) if family == "backward-dkdv" else (192, 128)]


def make_cases():
    """The cases; each attention kernel, head dim and GPU is in one of them."""
    cases = []
    for family in FAMILIES:
        for dims in shapes_of(family):
            archs = {}
            for arch in ARCHS:
                archs.setdefault(shipped_config(family, *dims, arch), []).append(arch)
            for config, shipped_for in archs.items():
                i = len(cases)
                traits = Traits(DTYPES[i % len(DTYPES)], *dims, **FEATURES[i % len(FEATURES)])
                cases.append(Case(family, config, traits, tuple(shipped_for)))
    return cases


CASES = make_cases()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_shipped_config(case):
    config = FAMILIES[case.family].parse(case.config)
    for arch in case.archs:
        report = inspect_kernel(config, case.traits, ARCHITECTURES[arch])
        assert report.faults == (), arch
        assert report.instructions["FFMA"] > 0


def test_the_cases_cover_everything():
    covered = {(c.family, c.config, arch) for c in CASES for arch in c.archs}
    for family, arch in itertools.product(FAMILIES, ARCHS):
        for dims in itertools.product(HEAD_DIMS, HEAD_DIMS):
            assert (family, shipped_config(family, *dims, arch), arch) in covered, dims
        for dtype in DTYPES:
            assert any(
                c.family == family and c.traits.dtype == dtype and arch in c.archs for c in CASES
            )
    for family in FAMILIES:
        features = [c.traits for c in CASES if c.family == family]
        for name in ("softcap", "alibi", "vectorized"):
            assert {getattr(traits, name) for traits in features} == {True, False}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_default_fits_the_shared_memory(family, arch):
    limit = ARCHITECTURES[arch].max_smem_per_block
    for dims in itertools.product(HEAD_DIMS, HEAD_DIMS):
        traits = Traits("float32", *dims)
        assert default_config(family, traits, limit).smem_bytes(traits) <= limit, dims


def test_a_monstrous_config_is_found_out():
    config = ForwardConfig.parse("m64n128w2")
    report = inspect_kernel(config, Traits("float32", 256, 256), ARCHITECTURES["sm_80"])
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


def test_an_indexed_array_is_found_out():
    def kernel(x: Pointer(f32)):
        array = cuda.local.array(64, f32)
        for i in range(64):
            array[i] = x[i]
        x[0] = array[cuda.threadIdx.x]

    cubin = compile_kernel(lambda: Kernel("local", kernel, 32, 0), ARCHITECTURES["sm_80"])
    assert cubin.stack_bytes > 0
    assert count_instructions(disassemble(cubin.code))["LDL"] > 0
