"""One SM in clocks: what the roles of a block do, in the kernels' program order, in time.

    steps       the vocabulary of programs: a kernel is a `Program` of roles
    engine      plays a program in time, with player (a role), block and clock
    timeline    what comes out: spans on lanes
    rates       the clocks of each step: of a machine, and of machine code
    programs    the program of a config, of the files below

    hopper_forward, with hopper_fp8 (on codes) and ring (its buffers)
    hopper_backward (one kernel), hopper_dkdv, hopper_dq, with hopper_queries (what is fetched)
    mma_forward, mma_backward, with mma (what they share); portable

A kernel's order here is the order in which its roles wait, multiply and release in the simulator
(`tests/sim/test_pipeline_order.py`, `test_pipeline_block_order.py`). A new kernel is a new file
and a row of `programs`.
"""

from collections.abc import Sequence

from numflash.configs import Config, Traits
from numflash.machine_code.report import Report

from ..space.machines import Machine
from .engine import play
from .programs import program_of
from .rates import rates_of
from .steps import Walk
from .timeline import Timeline


def trace(
    machine: Machine,
    config: Config,
    traits: Traits,
    walks: int | Sequence[Walk] = 8,
    *,
    report: Report | None = None,
    blocks: int = 1,
    grid: int = 2**30,
    copies: float | None = None,
) -> Timeline:
    """What one SM does while its blocks run: a model of events, which no GPU has confirmed.

    Args:
        machine: whose SM it is.
        config, traits: of the kernel.
        walks: tiles that each block walks over, or a `Walk` for each tile of rows of its own.
        report: on the kernel's machine code; None takes all clocks by formula.
        blocks: that share the SM.
        grid: blocks of the whole launch, which share the L2.
        copies: clocks of each copy, instead of what its bytes take: 0 where copies are hidden.

    Returns:
        Spans in clocks, by lane; see `Timeline`.

    Raises:
        ValueError: no program is known for the config, or the machine has no such products.

    Example:
        >>> config = parse_config("forward", "sm90-m128n128w8s2-overlap-pingpong")
        >>> traits = Traits("bfloat16", 128, 128)
        >>> trace(machines.find("H100"), config, traits, 16).turn
    """
    program = program_of(config, traits, walks)
    rates = rates_of(program, machine, config, traits, report, grid)
    return play(program, rates if copies is None else rates.with_copies(copies), blocks)
