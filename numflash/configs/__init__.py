"""Kernel configs: the traits that a kernel is compiled for, and the choices that may be tuned.

`Traits` is fixed by the problem: dtype, head dims, and which features the kernel has. A config is
a free choice among equally right ones: tile sizes, warps, stages. Each kernel family, such as
"forward", has a config class for each of its implementations: the portable kernels
(`configs.portable`), those for tensor cores (`configs.mma`), for Hopper's (`configs.wgmma`), and
on 8-bit floats (`configs.fp8`). `configs.quantize` has those of the kernels around attention on
8-bit floats, `configs.sequences` those around sequences. `configs.implementations` has a row for
each. Traits and configs have short string forms (`configs.letters`), used in file names, test ids
and on the command line: `float16-d64-dv64-softcap-vec`, `m64n32w4`, `sm80-m128n64w4s1`.

Everything here is plain arithmetic; nothing imports Numba.
"""

from numflash.configs.block_masks import (
    BLOCK_MASK_CONFIGS,
    MaskListsConfig,
    MaskScatterConfig,
    MaskTilesConfig,
)
from numflash.configs.fp8 import Fp8ForwardConfig
from numflash.configs.implementations import (
    IMPLEMENTATIONS,
    Implementation,
    implementation_of,
)
from numflash.configs.merging import MERGING_CONFIGS, MergeOntoConfig
from numflash.configs.mma import (
    MMA_CONFIGS,
    MmaBackwardConfig,
    MmaBackwardDkDvConfig,
    MmaBackwardDqConfig,
    MmaBackwardRowsConfig,
    MmaConfig,
    MmaForwardConfig,
    ReduceDqConfig,
)
from numflash.configs.portable import (
    PORTABLE_CONFIGS,
    ArraySumsConfig,
    BackwardColumnsConfig,
    BackwardDkDvConfig,
    BackwardDqConfig,
    BackwardRowsConfig,
    BackwardScatterConfig,
    BackwardTilesConfig,
    ClearSumsConfig,
    CombineConfig,
    DeltaConfig,
    ForwardConfig,
    RoundSumsConfig,
    SmemLayout,
)
from numflash.configs.quantize import (
    QUANTIZE_CONFIGS,
    AmaxConfig,
    DequantizeConfig,
    EstimateConfig,
    QuantizeConfig,
    quantize_config,
)
from numflash.configs.sequences import (
    SEQUENCE_CONFIGS,
    PrepareConfig,
    RotaryConfig,
    ScheduleConfig,
)
from numflash.configs.traits import (
    DTYPES,
    FP8_STEP,
    HEAD_DIM_STEP,
    MAX_HEAD_DIM,
    Asked,
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

FAMILIES = tuple(dict.fromkeys([*PORTABLE_CONFIGS, *MMA_CONFIGS]))
"""Every kernel family of attention."""
Config = (
    ForwardConfig
    | BackwardDkDvConfig
    | BackwardDqConfig
    | BackwardRowsConfig
    | BackwardColumnsConfig
    | BackwardTilesConfig
    | BackwardScatterConfig
    | DeltaConfig
    | ArraySumsConfig
    | ClearSumsConfig
    | RoundSumsConfig
    | CombineConfig
    | MmaConfig
    | QuantizeConfig
    | AmaxConfig
    | DequantizeConfig
    | RotaryConfig
    | PrepareConfig
    | MaskTilesConfig
    | MaskScatterConfig
    | MaskListsConfig
    | MergeOntoConfig
    | ScheduleConfig
)


def parse_config(family: str, text: str) -> Config:
    """The config of a kernel family with this string form.

    Raises:
        ValueError: the family is unknown, or the text is no config of it.
    """
    rows = [row for row in IMPLEMENTATIONS if family in row.configs]
    if not rows:
        raise ValueError(f"kernel family must be one of {', '.join(FAMILIES)}, got {family!r}")
    # A text that begins like none is read as a config of the most general one.
    row = next((row for row in rows if text.startswith(row.begins)), rows[-1])
    return row.configs[family].parse(text)


__all__ = [
    "BLOCK_MASK_CONFIGS",
    "DTYPES",
    "FAMILIES",
    "FP8_STEP",
    "HEAD_DIM_STEP",
    "IMPLEMENTATIONS",
    "MAX_HEAD_DIM",
    "MERGING_CONFIGS",
    "MMA_CONFIGS",
    "PORTABLE_CONFIGS",
    "QUANTIZE_CONFIGS",
    "SEQUENCE_CONFIGS",
    "SLAB_BYTES",
    "WARPGROUP_ROWS",
    "AmaxConfig",
    "ArraySumsConfig",
    "Asked",
    "BackwardColumnsConfig",
    "BackwardDkDvConfig",
    "BackwardDqConfig",
    "BackwardRowsConfig",
    "BackwardScatterConfig",
    "BackwardTilesConfig",
    "ClearSumsConfig",
    "CombineConfig",
    "Config",
    "DeltaConfig",
    "DequantizeConfig",
    "EstimateConfig",
    "ForwardConfig",
    "Fp8ForwardConfig",
    "Implementation",
    "MaskListsConfig",
    "MaskScatterConfig",
    "MaskTilesConfig",
    "MergeOntoConfig",
    "MmaBackwardConfig",
    "MmaBackwardDkDvConfig",
    "MmaBackwardDqConfig",
    "MmaBackwardRowsConfig",
    "MmaConfig",
    "MmaForwardConfig",
    "PrepareConfig",
    "QuantizeConfig",
    "ReduceDqConfig",
    "RotaryConfig",
    "RoundSumsConfig",
    "ScheduleConfig",
    "Sm90ForwardConfig",
    "Sm90Fp8ForwardConfig",
    "SmemLayout",
    "Traits",
    "implementation_of",
    "padded_fp8_head_dim",
    "padded_head_dim",
    "parse_config",
    "quantize_config",
]
