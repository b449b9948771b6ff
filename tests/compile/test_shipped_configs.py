"""Every shipped config, for every target GPU, becomes machine code that stays in registers.

Shipped is what `choose` returns. Which config that is depends on dtype, head dims, features, the
number of rows and the GPU; a case is a kernel with the GPUs that it is compiled for here.

`CASES` hold every config once, with the head dims of those that it is shipped for where registers
are scarcest; configs that differ in nothing but their warps, each of which does the same, count as
one. Dtypes, features and GPUs go round, and every family is there for every GPU. Kernels for
Hopper are held to their design in test_hopper_machine_code; here its GPUs stand for what runs
where bulk copies cannot. Turing, Blackwell with softcap, tf32 and splits over the keys have cases
of their own.

Compiling a tensor-core kernel takes seconds, so `COMPILED` are a covering set: each family on each
generation, with what keeps the most in registers, each kind of features, and each GPU. All CASES
are compiled with NUMFLASH_TEST_FULL=1, and all that is shipped by `python -m bench machine-code`.
"""

import hashlib
import itertools
import os
import pickle
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from numflash.configs import (
    HEAD_DIM_STEP,
    MAX_HEAD_DIM,
    ForwardConfig,
    MmaConfig,
    Traits,
    parse_config,
)
from numflash.kernels.kernel import Kernel
from numflash.machine_code.compiler import compile_kernel, get_cubin
from numflash.machine_code.report import inspect_kernel
from numflash.machine_code.sass import count_instructions, disassemble
from numflash.ptx import f32
from numflash.runtime.devices import ARCHITECTURES
from numflash.runtime.views import Pointer
from numflash.selection.rules import choose
from tests.support.covering import covering, some, thorough

ROOT = Path(__file__).parents[2]
FAMILIES = ("forward", "backward-dkdv", "backward-dq", "delta", "combine")
TENSOR_CORE_FAMILIES = FAMILIES[:3]
ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_120")
# From a single row to more than any tile has.
ROWS = (1, 16, 32, 64, 2**30)
HEAD_DIMS = range(HEAD_DIM_STEP, MAX_HEAD_DIM + 1, HEAD_DIM_STEP)
# Some configs are shipped for unequal head dims only.
PAIRS = [(d, dv) for d, dv in itertools.product(HEAD_DIMS, HEAD_DIMS) if d == dv or 256 in (d, dv)]
# Shared memory decides which config is chosen, and these have as much as sm_86.
LIKE_SM_86 = ("sm_89", "sm_120")
DTYPES = (("float16", {}), ("bfloat16", {}), ("float32", {"tf32": True}), ("float32", {}))
FEATURES = (
    {},
    {"features": ("softcap", "alibi")},
    {"vectorized": False},
    {"features": ("alibi",)},
    {"features": ("softcap",), "vectorized": False},
)
# Which config is chosen depends on which of these kinds the features are of.
KINDS = (
    ({},),
    ({"features": ("softcap",)}, {"features": ("softcap", "alibi")}, {"features": ("alibi",)}),
    ({"features": ("softcap",), "vectorized": False}, {"vectorized": False}),
)
# Of each family.
TURING_CASES, TF32_CASES = 2, 2


@dataclass(frozen=True)
class Shipped:
    """A kernel that some call runs on one GPU."""

    family: str
    config: str
    traits: Traits
    arch: str

    @property
    def accumulators(self) -> int:
        """float32 accumulators a thread: the more, the scarcer are registers."""
        config = parse_config(self.family, self.config)
        return config.accumulators_per_thread(self.traits)

    @property
    def scarcity(self) -> tuple:
        """Ascending with how hard it is to stay in registers."""
        traits = self.traits
        return self.accumulators, traits.head_dim + traits.head_dim_v, str(traits)


@dataclass(frozen=True)
class Case:
    """One kernel and the GPUs that it is compiled for."""

    family: str
    config: str
    traits: Traits
    archs: tuple[str, ...]

    def __str__(self):
        return f"{self.family}-{self.config}-{self.traits}-{'-'.join(self.archs)}"


def chosen(family, traits, arch, rows, positive_scale=True):
    """The config of a call, on Hopper of one for arrays that bulk copies cannot fetch."""
    limits, why = ARCHITECTURES[arch], "as if not describable"
    return choose(family, traits, limits, rows, positive_scale, no_bulk_copies=why)


def shipped(families=FAMILIES, dtypes=DTYPES, features=FEATURES, pairs=PAIRS) -> list[Shipped]:
    """All kernels that are shipped for these."""
    found = {}
    for family, (dtype, precision), flags in itertools.product(families, dtypes, features):
        for dims, arch, rows in itertools.product(pairs, ARCHS, ROWS):
            traits = Traits(dtype, *dims, **precision, **flags)
            if arch not in LIKE_SM_86:
                choice = chosen(family, traits, arch, rows)
                found[Shipped(family, str(choice.config), choice.traits, arch)] = None
    alike = [replace(k, arch=arch) for k in found for arch in LIKE_SM_86 if k.arch == "sm_86"]
    return [*found, *alike]


def generation(config: str) -> str:
    """Of a tensor-core config; empty for a portable one."""
    return config.partition("-")[0] if config.startswith("sm") else ""


def work(kernel) -> str:
    """The work of a warp of a kernel or case: all of a config but its generation and warps."""
    config = parse_config(kernel.family, kernel.config)
    if not isinstance(config, MmaConfig):
        return kernel.config
    one_warp = {"generation": "sm80", "num_warps": 1, "num_splits": 1}
    rows = "tile_n" if kernel.family == "backward-dkdv" else "tile_m"
    return str(replace(config, **one_warp, **{rows: config.row_tile // config.num_warps}))


def fewest_cases() -> list[Case]:
    """Every config once, where registers are scarcest; dtypes, features and GPUs in turn."""
    return [*portable_cases(), *tensor_core_cases(), *split_cases()]


def portable_cases() -> list[Case]:
    """Every portable config; every family for all GPUs."""
    by_config = {}
    for kernel in shipped(dtypes=DTYPES[3:], features=FEATURES[:1]):
        by_config.setdefault((kernel.family, kernel.config), []).append(kernel)
    cases, unused = [], {family: list(ARCHS) for family in FAMILIES}
    for i, ((family, config), kernels) in enumerate(by_config.items()):
        remaining = len({c for f, c in by_config if f == family}) - len(
            [case for case in cases if case.family == family]
        )
        possible = list(dict.fromkeys(kernel.arch for kernel in kernels))
        fresh = [arch for arch in unused[family] if arch in possible]
        archs = fresh[: 1 + max(0, len(unused[family]) - remaining)] or possible[:1]
        unused[family] = [arch for arch in unused[family] if arch not in archs]
        scarcest = max((k for k in kernels if k.arch in archs), key=lambda k: k.scarcity)
        # Turing has no tensor-core kernel for bfloat16, and any dtype can have a scale that is
        # not positive: all have portable kernels.
        dtype = "bfloat16" if "sm_75" in archs else ("float32", "float16")[i % 2]
        traits = replace(scarcest.traits, dtype=dtype, **FEATURES[i % len(FEATURES)])
        cases.append(Case(family, config, traits, tuple(archs)))
    return cases


def tensor_core_cases() -> list[Case]:
    """All that a warp does once; and of Turing and of tf32 what keeps the most in registers."""
    dtypes = DTYPES[0], DTYPES[2]
    every = shipped(TENSOR_CORE_FAMILIES, dtypes, [features[0] for features in KINDS])
    kernels = [kernel for kernel in every if generation(kernel.config)]
    return [case for family in TENSOR_CORE_FAMILIES for case in cases_of_family(family, kernels)]


def cases_of_family(family: str, kernels: list[Shipped]) -> list[Case]:
    """Those of one family."""
    of_family = [kernel for kernel in kernels if kernel.family == family]
    cases, uses = [], Counter()
    features = [itertools.cycle(features) for features in KINDS]

    def add(kernel):
        traits = kernel.traits
        if traits.dtype == "float16" and kernel.arch != "sm_75":
            traits = replace(traits, dtype=("float16", "bfloat16")[len(cases) % 2])
        plain = replace(traits, features=(), vectorized=True)
        varied = replace(plain, **next(features[kind_of(traits)]))
        case = Case(family, kernel.config, varied, (kernel.arch,))
        cases.append(case if is_shipped(case) else replace(case, traits=traits))
        uses[kernel.arch] += 1

    def scarcest(found) -> list[Shipped]:
        """Of each config the kernel with the most accumulators, ascending with these."""
        by_config = {}
        for k in sorted(found, key=lambda k: (k.scarcity, -uses[k.arch])):
            by_config[k.config] = k
        return sorted(by_config.values(), key=lambda k: k.scarcity)

    # Blackwell's compiler unrolls other loops over scores than that of older GPUs does.
    capped = [k for k in of_family if k.arch == "sm_120" and kind_of(k.traits) == 1]
    add(scarcest(k for k in capped if not k.traits.tf32)[-1])
    capped_work = {work(case) for case in cases}
    for kernel in scarcest(k for k in of_family if k.arch == "sm_75")[-TURING_CASES:]:
        add(kernel)
    # A kernel that keeps dK and dV spills before one that keeps as many accumulators of one.
    together = [k for k in of_family if k.arch == "sm_75" and not k.config.endswith("-apart")]
    add(scarcest(together)[-1])
    for kernel in scarcest(k for k in of_family if k.traits.tf32)[-TF32_CASES:]:
        add(kernel)
    newer = [k for k in of_family if not k.traits.tf32 and k.arch != "sm_75"]
    by_work = {}
    for kernel in newer:
        by_work.setdefault(work(kernel), []).append(kernel)
    rest = [found for text, found in by_work.items() if text not in capped_work]
    for i, found in enumerate(rest, 2):
        of_kind = [k for k in found if kind_of(k.traits) == i % len(KINDS)]
        add(max(of_kind or found, key=lambda k: (k.scarcity, -uses[k.arch])))
    # Cases that only Turing or tf32 has, if any.
    done = {work(case) for case in cases}
    for kernel in of_family:
        if work(kernel) not in done:
            done.add(work(kernel))
            add(kernel)
    return cases


def is_shipped(case: Case) -> bool:
    """Whether some call runs the case's kernel, on each of its GPUs."""
    config = case.config.removesuffix("x2")
    choices = [
        [
            str(chosen(case.family, case.traits, arch, rows, positive).config)
            for rows, positive in itertools.product(ROWS, (True, False))
        ]
        for arch in case.archs
    ]
    return all(config in configs for configs in choices)


def kind_of(traits: Traits) -> int:
    """Which of `KINDS` traits are of."""
    if not traits.vectorized:
        return 2
    return int(traits.shapes_scores)


def split_cases() -> list[Case]:
    """Forwards split over the keys: another end of the kernel, with results in float32."""
    cases = []
    for arch, dtype, rows in (("sm_75", "float16", 16), ("sm_90a", "bfloat16", 64)):
        traits = Traits(dtype, 128, 128)
        config = chosen("forward", traits, arch, rows).config
        cases.append(Case("forward", str(replace(config, num_splits=2)), traits, (arch,)))
    return cases


def compiled(cases: list[Case]) -> list[tuple[Case, str]]:
    """(case, GPU): those of the module's docstring."""
    table = [(case, arch) for case in cases for arch in case.archs]
    scarcest = {}
    for case in cases:
        kind = case.family, generation(case.config)
        of_kind = scarcest.setdefault(kind, case)
        if accumulators(case) > accumulators(of_kind):
            scarcest[kind] = case

    def labels(row):
        case, arch = row
        made_for, kind = generation(case.config), kind_of(case.traits)
        most = scarcest[case.family, made_for] is case
        splits = case.config.endswith("x2")
        return (
            (case.family, made_for, most or None),
            (made_for, kind, splits),
            (made_for, arch),
            (made_for, case.traits.dtype),
        )

    return covering(table, labels, together=1)


def accumulators(case: Case) -> int:
    """float32 accumulators a thread."""
    config = parse_config(case.family, case.config)
    return config.accumulators_per_thread(case.traits)


def kept_cases() -> list[Case]:
    """`fewest_cases`, looked for once for what configs, rules and this module say."""
    folders = [ROOT / "numflash" / room for room in ("configs", "selection", "problem", "runtime")]
    texts = [path.read_bytes() for folder in folders for path in sorted(folder.glob("*.py"))]
    digest = hashlib.sha256(b"|".join([*texts, Path(__file__).read_bytes()])).hexdigest()
    path = ROOT / "build" / "test-cache" / f"shipped-{digest[:32]}.pickle"
    with suppress(OSError, pickle.UnpicklingError, EOFError):
        return pickle.loads(path.read_bytes())
    cases = fewest_cases()
    written = path.with_suffix(f".{os.getpid()}")
    written.write_bytes(pickle.dumps(cases))
    written.replace(path)
    return cases


CASES = kept_cases()
COMPILED = compiled(CASES)


@pytest.mark.parametrize(("case", "arch"), some(COMPILED, every=6), ids=str)
def test_a_shipped_config(case, arch):
    config = parse_config(case.family, case.config)
    cubin = get_cubin(config, case.traits, ARCHITECTURES[arch])
    assert cubin.spill_store_bytes == cubin.spill_load_bytes == cubin.stack_bytes == 0
    assert cubin.warnings == ()
    assert cubin.smem_bytes <= ARCHITECTURES[arch].max_smem_per_block
    # Disassembling takes long, so a third of the cases stand for the rest.
    if COMPILED.index((case, arch)) % 3 == 0:
        report = inspect_kernel(config, case.traits, ARCHITECTURES[arch])
        assert report.faults == (), arch
        assert (report.instructions["HMMA"] > 0) is (config.implementation == "sm80")
        assert report.instructions["FFMA"] > 0


@pytest.mark.parametrize("case", some(CASES, every=4), ids=str)
def test_a_case_is_shipped(case):
    assert is_shipped(case)


def test_what_is_compiled_covers_every_family_generation_and_gpu():
    made = {(case.family, generation(case.config)) for case in CASES}
    assert {(case.family, generation(case.config)) for case, _ in COMPILED} == made
    assert {arch for _, arch in COMPILED} == set(ARCHS)
    by_generation = {(generation(case.config), arch) for case in CASES for arch in case.archs}
    assert {(generation(case.config), arch) for case, arch in COMPILED} == by_generation
    read = [case for i, (case, _) in enumerate(COMPILED) if i % 3 == 0]
    assert {generation(case.config) for case in read} == {"", "sm75", "sm80"}, "disassembled"


@thorough
def test_the_cases_cover_everything():
    done = {(c.family, work(c)) for c in CASES}
    pairs = list(itertools.product(HEAD_DIMS, HEAD_DIMS))
    features = [features[0] for features in KINDS]
    kernels = shipped(TENSOR_CORE_FAMILIES, DTYPES[1:3], features, pairs)
    for kernel in [*kernels, *shipped(dtypes=DTYPES[3:], features=FEATURES[:1], pairs=pairs)]:
        assert (kernel.family, work(kernel)) in done, kernel
    for family in FAMILIES:
        of_family = [c for c in CASES if c.family == family]
        implementations = {bool(generation(c.config)) for c in of_family}
        assert implementations == {False, family in TENSOR_CORE_FAMILIES}
        for is_mma in implementations:
            some = [c for c in of_family if bool(generation(c.config)) is is_mma]
            assert {arch for c in some for arch in c.archs} == set(ARCHS), (family, is_mma)
            if family not in TENSOR_CORE_FAMILIES:
                continue
            capped = [c for c in some if "softcap" in c.traits.features]
            assert any("sm_120" in c.archs for c in capped), family
            assert {c.traits.dtype for c in some} == {"float16", "bfloat16", "float32"}
            assert {c.traits.vectorized for c in some} == {True, False}, family
            for name in ("softcap", "alibi"):
                assert {name in c.traits.features for c in some} == {True, False}, (family, name)


@pytest.mark.parametrize("arch", LIKE_SM_86)
def test_what_is_like_sm_86_chooses_like_it(arch):
    for family, (dtype, precision), rows in itertools.product(FAMILIES, DTYPES[1:], ROWS):
        for dims in PAIRS:
            traits = Traits(dtype, *dims, **precision)
            choices = [choose(family, traits, ARCHITECTURES[a], rows) for a in ("sm_86", arch)]
            assert choices[0].config == choices[1].config


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_choice_fits_the_shared_memory(family, arch):
    limit = ARCHITECTURES[arch].max_smem_per_block
    for (dtype, precision), dims, rows in itertools.product(DTYPES[1:], PAIRS, ROWS):
        traits = Traits(dtype, *dims, **precision)
        choice = chosen(family, traits, arch, rows)
        assert choice.config.smem_bytes(choice.traits) <= limit, dims


@thorough
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
