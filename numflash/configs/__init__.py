"""Kernel configs: the traits that a kernel is compiled for, and the choices that may be tuned.

`Traits` is fixed by the problem: dtype, head dims, and which features the kernel has. A config is
a free choice among equally right ones: tile sizes, warps, stages. Each kernel family, such as
"forward", has a config class for each of its implementations: the portable kernels
(`configs.portable`), those for tensor cores (`configs.mma`), for Hopper's (`configs.wgmma`), and
on 8-bit floats (`configs.fp8`). `configs.quantize` has those of the kernels around attention on
8-bit floats. Traits and configs have short string forms, used in file names, test ids and on the
command line: `float16-d64-dv64-softcap-vec`, `m64n32w4`, `sm80-m128n64w4s1`.

Everything here is plain arithmetic; nothing imports Numba.
"""

from numflash.configs.fp8 import PREFIX, Fp8ForwardConfig
from numflash.configs.mma import (
    MMA_CONFIGS,
    MmaBackwardConfig,
    MmaBackwardDkDvConfig,
    MmaBackwardDqConfig,
    MmaConfig,
    MmaForwardConfig,
    ReduceDqConfig,
)
from numflash.configs.portable import (
    PORTABLE_CONFIGS,
    BackwardDkDvConfig,
    BackwardDqConfig,
    CombineConfig,
    DeltaConfig,
    ForwardConfig,
    SmemLayout,
    accumulators_per_thread,
)
from numflash.configs.quantize import (
    QUANTIZE_CONFIGS,
    AmaxConfig,
    DequantizeConfig,
    EstimateConfig,
    QuantizeConfig,
    quantize_config,
)
from numflash.configs.traits import (
    DTYPES,
    FP8_STEP,
    HEAD_DIM_STEP,
    MAX_HEAD_DIM,
    Traits,
    padded_fp8_head_dim,
    padded_head_dim,
)
from numflash.configs.wgmma import (
    SLAB_BYTES,
    WARPGROUP_ROWS,
    Sm90ForwardConfig,
    Sm90Fp8ForwardConfig,
)

FP8_FORWARDS = (Fp8ForwardConfig, Sm90Fp8ForwardConfig)
"""Configs of the forwards on 8-bit floats."""
# The beginnings of their string forms; the first that a text has is its own.
_FORWARDS = {
    f"{PREFIX}sm90": Sm90Fp8ForwardConfig,
    PREFIX: Fp8ForwardConfig,
    "sm90": Sm90ForwardConfig,
}
FAMILIES = tuple(dict.fromkeys([*PORTABLE_CONFIGS, *MMA_CONFIGS]))
"""Every kernel family of attention."""
Config = (
    ForwardConfig
    | BackwardDkDvConfig
    | BackwardDqConfig
    | DeltaConfig
    | CombineConfig
    | MmaConfig
    | QuantizeConfig
    | AmaxConfig
    | DequantizeConfig
)


def parse_config(family: str, text: str) -> Config:
    """The config of a kernel family with this string form.

    Raises:
        ValueError: the family is unknown, or the text is no config of it.
    """
    if family in QUANTIZE_CONFIGS:
        return QUANTIZE_CONFIGS[family].parse(text)
    if family not in FAMILIES:
        raise ValueError(f"kernel family must be one of {', '.join(FAMILIES)}, got {family!r}")
    for prefix, forward in _FORWARDS.items():
        if text.startswith(prefix) and family == forward.family:
            return forward.parse(text)
    implementations = [MMA_CONFIGS, PORTABLE_CONFIGS]
    if not text.startswith("sm"):
        implementations.reverse()
    (config, *_) = (configs[family] for configs in implementations if family in configs)
    return config.parse(text)


__all__ = [
    "DTYPES",
    "FAMILIES",
    "FP8_FORWARDS",
    "FP8_STEP",
    "HEAD_DIM_STEP",
    "MAX_HEAD_DIM",
    "MMA_CONFIGS",
    "PORTABLE_CONFIGS",
    "QUANTIZE_CONFIGS",
    "SLAB_BYTES",
    "WARPGROUP_ROWS",
    "AmaxConfig",
    "BackwardDkDvConfig",
    "BackwardDqConfig",
    "CombineConfig",
    "Config",
    "DeltaConfig",
    "DequantizeConfig",
    "EstimateConfig",
    "ForwardConfig",
    "Fp8ForwardConfig",
    "MmaBackwardConfig",
    "MmaBackwardDkDvConfig",
    "MmaBackwardDqConfig",
    "MmaConfig",
    "MmaForwardConfig",
    "QuantizeConfig",
    "ReduceDqConfig",
    "Sm90ForwardConfig",
    "Sm90Fp8ForwardConfig",
    "SmemLayout",
    "Traits",
    "accumulators_per_thread",
    "padded_fp8_head_dim",
    "padded_head_dim",
    "parse_config",
    "quantize_config",
]
