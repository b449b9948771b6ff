"""The program of a config."""

from collections.abc import Sequence

from numflash.configs import Config, Sm90ForwardConfig, Traits

from . import hopper_forward
from .steps import Program, Walk

_PROGRAMS = {
    Sm90ForwardConfig: hopper_forward.program,
}
"""Of each kind of config and those made of it, the first that fits."""


def program_of(config: Config, traits: Traits, walks: int | Sequence[Walk]) -> Program:
    """What the roles of a block do.

    Args:
        config, traits: of the kernel.
        walks: tiles that the block walks over, or a `Walk` for each tile of rows of its own.

    Raises:
        ValueError: no program is known for the config.
    """
    if isinstance(walks, int):
        walks = (Walk(walks),)
    for kind, program in _PROGRAMS.items():
        if isinstance(config, kind):
            return program(config, traits, tuple(walks))
    raise ValueError(f"no program is known for the kernel of {config.family} {config}")
