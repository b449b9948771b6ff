"""The offline model of a kernel's time.

`prediction` puts together what `counts` (instructions by formula), `machine_code` (instructions of
a disassembly), `grid` (blocks and tiles of a problem) and `tuner.space.machines` know; `hopper`
and `hopper_backward` do so for kernels whose warpgroups multiply asynchronously. Each makes the
`clocks` of a block first; `dispatch` says when all blocks are done. `errors` holds the errors of
all.
"""

from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path

from numflash.configs import Config, implementation_of
from numflash.problem.classes import ProblemClass

from ..records import ResourceUsage
from ..space.machines import Machine
from . import hopper, hopper_backward, prediction
from .clocks import BlockClocks
from .errors import gain_needed
from .kept import Kept
from .machine_code import MachineCode
from .prediction import Prediction, floor_ms, multiply_adds

CODE_SAVES = {"backward-dq": 0.1}
"""Kernel family -> fraction of a time by formula by which one from machine code may be shorter; of
others it is `CODE_SAVES_OF_OTHERS`. Of 243 predictions of kernels that did not spill, for sm_75,
sm_89 and sm_90a, none was shorter by more than 6.5 % (dQ) and 2.5 % (others)."""
CODE_SAVES_OF_OTHERS = 0.05

__all__ = [
    "BlockClocks",
    "Kept",
    "Prediction",
    "at_best",
    "block_clocks",
    "estimate",
    "floor_ms",
    "gain_needed",
    "multiply_adds",
    "predict",
    "source_hash",
]


def predict(
    machine: Machine,
    problem: ProblemClass,
    config: Config,
    resources: ResourceUsage,
    code: MachineCode | None,
    kept: Kept | None = None,
) -> Prediction:
    """Predict the time of a compiled kernel.

    Args:
        machine: the GPU.
        problem: the class; it stands for the problem with its rounded sizes.
        config: of the problem's family.
        resources: of the compiled kernel.
        code: its instructions; None counts by formula.
        kept: what its block mask keeps; None takes all that the band leaves.

    Raises:
        ValueError: not even one block fits on an SM, or its tensor cores have no such product.
    """
    return _module_of(config).predict(machine, problem, config, resources, code, kept)


def block_clocks(
    machine: Machine,
    problem: ProblemClass,
    config: Config,
    resources: ResourceUsage,
    code: MachineCode | None,
    kept: Kept | None = None,
) -> BlockClocks:
    """The clocks of a block of a compiled kernel: what `predict` makes its time of.

    Args:
        machine, problem, config, resources, code, kept: as for `predict`.

    Raises:
        ValueError: as `predict`; a kernel that streams rows has no tiles.
    """
    return _module_of(config).block_clocks(machine, problem, config, resources, code, kept)


def estimate(
    machine: Machine, problem: ProblemClass, config: Config, kept: Kept | None = None
) -> Prediction:
    """Predict a kernel's time by formula only. Registers that cannot suffice count as spilled.

    Args and raises as `predict`.
    """
    return _module_of(config).estimate(machine, problem, config, kept)


def at_best(machine: Machine, problem: ProblemClass, config: Config) -> Prediction:
    """Predict a time that no machine code of a config is predicted to beat.

    By formula, with the fewest registers that could suffice, no spill and the best occupancy, and
    less by what machine code may save.

    Raises:
        ValueError: as `predict`.
    """
    found = _module_of(config).at_best(machine, problem, config)
    saved = CODE_SAVES.get(problem.family, CODE_SAVES_OF_OTHERS)
    return replace(found, ms=(1 - saved) * found.ms)


def _module_of(config: Config):
    """The part of the model that knows a config's kernel."""
    if config.family in prediction.ROW_KERNELS or not implementation_of(config).needs_maps:
        return prediction
    return hopper if config.family == "forward" else hopper_backward


@cache
def source_hash() -> str:
    """Hash of everything that decides a prediction, the kernels aside."""
    digest, folder = sha256(), Path(__file__).parent
    for file in sorted([*folder.glob("*.py"), *(folder.parent / "space").glob("machines.*")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()
