"""The program of a config."""

from collections.abc import Sequence

from numflash.configs import (
    BackwardDkDvConfig,
    BackwardDqConfig,
    Config,
    ForwardConfig,
    Fp8ForwardConfig,
    MmaBackwardConfig,
    MmaBackwardDkDvConfig,
    MmaBackwardDqConfig,
    MmaForwardConfig,
    Sm90ForwardConfig,
    Sm90Fp8ForwardConfig,
    Traits,
)
from numflash.configs.wgmma_backward import (
    Sm90BackwardConfig,
    Sm90BackwardDkDvConfig,
    Sm90BackwardDqConfig,
)

from . import (
    hopper_backward,
    hopper_dkdv,
    hopper_dq,
    hopper_forward,
    mma_backward,
    mma_forward,
    portable,
)
from .steps import Program, Walk

_PROGRAMS = {
    Sm90ForwardConfig: hopper_forward.program,
    Sm90Fp8ForwardConfig: hopper_forward.program,
    Sm90BackwardConfig: hopper_backward.program,
    Sm90BackwardDkDvConfig: hopper_dkdv.program,
    Sm90BackwardDqConfig: hopper_dq.program,
    MmaForwardConfig: mma_forward.program,
    Fp8ForwardConfig: mma_forward.program,
    MmaBackwardConfig: mma_backward.fused_program,
    MmaBackwardDkDvConfig: mma_backward.dkdv_program,
    MmaBackwardDqConfig: mma_backward.dq_program,
    ForwardConfig: portable.forward_program,
    BackwardDqConfig: portable.dq_program,
    BackwardDkDvConfig: portable.dkdv_program,
}
# Blocks that walk more than once: for several tiles of their own rows.
_WALK_OFTEN = Sm90ForwardConfig, Sm90Fp8ForwardConfig, MmaBackwardConfig


def program_of(config: Config, traits: Traits, walks: int | Sequence[Walk]) -> Program:
    """What the roles of a block do.

    Args:
        config, traits: of the kernel.
        walks: tiles that the block walks over, or a `Walk` for each tile of rows of its own.

    Raises:
        ValueError: no program is known for the config, as of blocks in clusters, or its blocks
            walk only once.

    Example:
        >>> program_of(config, traits, 8).roles["producer"]()
    """
    walks = (Walk(walks),) if isinstance(walks, int) else tuple(walks)
    kind = type(config)
    if kind not in _PROGRAMS or config.cluster > 1:
        raise ValueError(f"no program is known for the kernel of {config.family} {config}")
    if len(walks) != 1 and kind not in _WALK_OFTEN:
        raise ValueError(f"a block of {config.family} {config} walks once, got {len(walks)} walks")
    return _PROGRAMS[kind](config, traits, walks)
