"""The kernels that the machine-code net compiles.

They come from the rules of dispatch: what `choose` takes by default on every GPU, and each
candidate of its tables at the largest head dims that it fits. With them go the variants of a
kernel: features, unaligned rows, tf32, splits over the keys, selected heads; and the kernels
around attention on 8-bit floats, and a fixed list of kernels with what callers ask for (`asked`).
Every config is there, but not with every dtype, head dim and feature, which would take hours. A
causal mask or a window is data of the kernels, not code: one kernel has all of these.
"""

import fnmatch
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from bench.machine_code import asked
from numflash.configs import (
    BLOCK_MASK_CONFIGS,
    FAMILIES,
    MERGING_CONFIGS,
    PORTABLE_CONFIGS,
    QUANTIZE_CONFIGS,
    SEQUENCE_CONFIGS,
    AmaxConfig,
    Config,
    DequantizeConfig,
    EstimateConfig,
    MergeOntoConfig,
    PrepareConfig,
    RotaryConfig,
    Traits,
    fp8,
    portable,
    quantize_config,
)
from numflash.configs import mma_rules as sm80
from numflash.configs import wgmma as sm90
from numflash.runtime.devices import ARCHITECTURES
from numflash.runtime.errors import UnsupportedError
from numflash.selection.rules import choose, unfit

MAIN_ARCHS = ("sm_75", "sm_80", "sm_90a")
"""GPUs whose kernels are of instructions of their own: their defaults at three head dims."""
OTHER_ARCHS = ("sm_86", "sm_89", "sm_120")
"""GPUs whose defaults follow from other sizes of shared memory: at one head dim."""
_DTYPES = {64: "float16", 128: "bfloat16", 256: "float16"}
_ONE_HEAD_DIM = 128
_ATTENTION = ("forward", "backward-dkdv", "backward-dq", "backward")
_FAMILIES = (
    *FAMILIES,
    *QUANTIZE_CONFIGS,
    *BLOCK_MASK_CONFIGS,
    *SEQUENCE_CONFIGS,
    *MERGING_CONFIGS,
)
_OF_EVERY_ARCH = ("forward", "backward-dkdv")
_NO_BULK_COPIES = "the net asks for the kernel without bulk copies"
# The larger the head dims, the scarcer are registers.
_PAIRS = sorted(
    itertools.product((64, 128, 192, 256), repeat=2), key=lambda pair: (sum(pair), pair)
)
_BENT = {"features": ("softcap", "alibi")}
_VARIANTS = (
    ("float16", _BENT, ("sm_75", "sm_80", "sm_90a", "sm_120")),
    ("float16", {"vectorized": False}, ("sm_75", "sm_80")),
    ("float32", {"tf32": True}, ("sm_80",)),
    ("float32", {}, ("sm_120",)),
)


@dataclass(frozen=True)
class NamedKernel:
    """A kernel by what stays when its code moves.

    Attributes:
        family: as in "forward".
        arch: the GPU, as in "sm_90a".
        traits, config: string forms; the first has dtype, head dims and features.
    """

    family: str
    arch: str
    traits: str
    config: str

    def __str__(self) -> str:
        return "/".join((self.family, self.arch, self.traits, self.config))


def kernels(only: Sequence[str] = ()) -> list[NamedKernel]:
    """Every kernel of the net, each machine code once.

    Args:
        only: patterns as in "forward", "forward/sm_90a" or "*/sm_75"; empty takes all.

    Raises:
        ValueError: a pattern matches no kernel.
    """
    found: dict[NamedKernel, None] = {}
    for config, traits, arch in itertools.chain(
        _defaults(),
        _candidates(),
        _variants(),
        _in_8_bits(),
        _quantisation(),
        _rotary(),
        _prepare(),
        _merging(),
        _asked(),
    ):
        code = getattr(config, "compiled", config)
        found[NamedKernel(config.family, arch, str(traits), str(code))] = None
    for pattern in only:
        if not any(is_wanted(kernel, [pattern]) for kernel in map(str, found)):
            raise ValueError(
                f"--only must name kernels as FAMILY or FAMILY/GPU, got {pattern!r}, which "
                f"matches none; families are {', '.join(_FAMILIES)}, GPUs "
                f"{', '.join(ARCHITECTURES)}"
            )
    return [kernel for kernel in found if is_wanted(str(kernel), only)]


def is_wanted(name: str, only: Sequence[str]) -> bool:
    """Whether a kernel's name matches one of the patterns, or there are none."""
    family_and_arch = "/".join(name.split("/")[:2])
    patterns = [each if "/" in each else f"{each}/*" for each in only]
    return not only or any(fnmatch.fnmatchcase(family_and_arch, each) for each in patterns)


_Found = Iterator[tuple[Config, Traits, str]]


def _chosen(family: str, traits: Traits, arch: str, **options) -> _Found:
    """The default, and what goes with it; nothing where a GPU has no such kernel."""
    try:
        choice = choose(family, traits, ARCHITECTURES[arch], **options)
    except UnsupportedError:
        return
    yield choice.config, choice.traits, arch


def _defaults() -> _Found:
    for arch, family in itertools.product(ARCHITECTURES, FAMILIES):
        is_main, is_attention = arch in MAIN_ARCHS, family in _ATTENTION
        if not is_main and arch not in OTHER_ARCHS and family not in _OF_EVERY_ARCH:
            continue
        for head_dim in _DTYPES if is_main and is_attention else (_ONE_HEAD_DIM,):
            dtype = "float16" if arch == "sm_75" else _DTYPES[head_dim]
            traits = Traits(dtype, head_dim, head_dim)
            yield from _chosen(family, traits, arch)
            if family == "forward" and arch == "sm_90a":
                yield from _chosen(family, traits, arch, no_bulk_copies=_NO_BULK_COPIES)


def _candidates() -> _Found:
    """Each config of the tables once for each generation of instructions."""
    for family in FAMILIES:
        for arch, generation in (("sm_75", "sm75"), ("sm_80", "sm80")):
            for config in sm80.candidates(family, generation):
                yield _scarcest(config, "float16", arch)
        if family in PORTABLE_CONFIGS:
            for config in portable.candidates(family):
                yield _scarcest(config, "float32", "sm_86")
    for head_dim in (64, 128, 192, 256):
        for is_fp8 in (False, True):
            traits = Traits("bfloat16", head_dim, head_dim, fp8=is_fp8)
            for config in sm90.candidates(traits):
                if config.misfit(traits) is None:
                    yield config, traits, "sm_90a"
    for arch in ("sm_75", "sm_80", "sm_89", "sm_90a"):
        for config in fp8.candidates(ARCHITECTURES[arch]):
            yield _scarcest(config, "float16", arch, fp8=True)


def _scarcest(config: Config, dtype: str, arch: str, **flags) -> tuple[Config, Traits, str]:
    """A config with the largest head dims that dispatch would give it, or the smallest of all."""
    fitting = [
        traits
        for traits in (Traits(dtype, *pair, **flags) for pair in _PAIRS)
        if unfit(config, traits, ARCHITECTURES[arch], config.block_rows, proven=False) is None
    ]
    return config, fitting[-1] if fitting else Traits(dtype, *_PAIRS[0], **flags), arch


def _variants() -> _Found:
    for dtype, features, archs in _VARIANTS:
        for family, arch in itertools.product(_ATTENTION, archs):
            yield from _chosen(family, Traits(dtype, 64, 64, **features), arch)
    for family, head_dim in itertools.product(_ATTENTION, (96, 192)):
        yield from _chosen(family, Traits("bfloat16", head_dim, head_dim), "sm_90a")
    traits = Traits("float16", 128, 128)
    for arch in MAIN_ARCHS:
        for config, fitting, _ in _chosen("forward", traits, arch):
            yield replace(config, num_splits=2), fitting, arch
        yield from _chosen("forward", replace(traits, head_dim=192), arch)
        yield from _chosen("forward", replace(traits, selected=True), arch)


def _in_8_bits() -> _Found:
    traits = Traits("float16", 128, 128, fp8=True)
    for arch in (*MAIN_ARCHS, *OTHER_ARCHS):
        yield from _chosen("forward", traits, arch)
    for arch in ("sm_75", "sm_80", "sm_89", "sm_90a"):
        yield from _chosen("forward", replace(traits, key_scales=True), arch)
        yield from _chosen("forward", replace(traits, **_BENT), arch)
        yield from _chosen("forward", replace(traits, selected=True), arch)
    for arch in ("sm_89", "sm_90a"):
        for config, fitting, _ in _chosen("forward", traits, arch):
            yield replace(config, num_splits=2), fitting, arch


def _quantisation() -> _Found:
    """As `numflash.quantize_fp8` and attention on 8-bit floats ask for them."""
    for arch in ("sm_75", "sm_80", "sm_89"):
        generation = fp8.generation(ARCHITECTURES[arch])
        asked = [
            ("float16", 128, {"block": 128, "hadamard": True}),
            ("float16", 128, {"block": 128, "transposed": True}),
            ("float16", 256, {"scale": "token", "hadamard": True, "statistics": True}),
            ("float32", 192, {"scale": "given", "hadamard": True, "format": "e5m2"}),
            ("bfloat16", 64, {"scale": "given", "transposed": True, "statistics": True}),
            ("float16", 128, {"hadamard": True, "measure": True}),
            ("float16", 128, {"transposed": True, "codes": True}),
        ]
        for number, (dtype, head_dim, options) in enumerate(asked):
            config = quantize_config(generation, head_dim, **options)
            aligned = (number + ARCHITECTURES[arch].compute_capability[1]) % 4 > 0
            yield config, Traits(dtype, head_dim, head_dim, vectorized=aligned), arch
        for dtype, head_dim, options in (
            ("float16", 128, {"hadamard": True}),
            ("float32", 256, {"transposed": True}),
        ):
            traits = Traits(dtype, head_dim, head_dim)
            yield DequantizeConfig(generation, **options), traits, arch
        for config in (AmaxConfig(1), AmaxConfig(8), EstimateConfig()):
            yield config, Traits("float16", 64, 64), arch


def _asked() -> _Found:
    """With functions, block masks, dropout and gradients of options, as callers ask for them."""
    for arch in MAIN_ARCHS:
        dtype = "float16" if arch == "sm_75" else "bfloat16"
        for families, changes in asked.ROWS:
            for family in families:
                traits = Traits(dtype, _ONE_HEAD_DIM, _ONE_HEAD_DIM, **changes)
                yield from _chosen(family, traits, arch)
        for config, changes in asked.around_attention():
            yield config, Traits("float16", 32, 32, **changes), arch
    traits = Traits("float32", 64, 64, program=asked.PROGRAMS["bias"])
    for family in ("forward", "backward-dq", "backward-dkdv"):
        yield from _chosen(family, traits, "sm_80")


def _rotary() -> _Found:
    """As `numflash.apply_rotary` asks for them."""
    given = [
        ("float16", 128, {}),
        ("bfloat16", 128, {"interleaved": True}),
        ("bfloat16", 64, {"narrow": True}),
        ("float32", 256, {"interleaved": True}),
    ]
    for arch, (dtype, head_dim, options) in itertools.product(MAIN_ARCHS, given):
        yield RotaryConfig(**options), Traits(dtype, head_dim, head_dim), arch
    for arch in OTHER_ARCHS:
        yield RotaryConfig(), Traits("float16", 96, 96, vectorized=False), arch


def _prepare() -> _Found:
    """As `numflash.attention_with_kvcache` asks for them."""
    asked = [
        ("float16", 128, 128, {}),
        ("bfloat16", 128, 64, {"interleaved": True, "narrow": True}),
        ("float32", 256, 256, {"interleaved": True}),
    ]
    for arch, (dtype, head_dim, head_dim_v, options) in itertools.product(MAIN_ARCHS, asked):
        yield PrepareConfig(**options), Traits(dtype, head_dim, head_dim_v), arch
    for arch in MAIN_ARCHS:
        yield PrepareConfig(), Traits("float16", 128, 128, codes=True), arch
    for arch in OTHER_ARCHS:
        yield PrepareConfig(), Traits("float16", 96, 96, vectorized=False), arch


def _merging() -> _Found:
    """As `numflash.merge_onto` asks for them."""
    for arch, dtype in itertools.product(MAIN_ARCHS, ("float32", "float16")):
        yield MergeOntoConfig(), Traits(dtype, 128, 128), arch
    for arch in OTHER_ARCHS:
        yield MergeOntoConfig(), Traits("bfloat16", 96, 96, vectorized=False), arch
