"""The model as a search knows it: its guide, and offline its judge, of the kernels it knows.

Of others, those on 8-bit floats, it knows neither the rates of their products nor their
instructions. Times alone guide a search of them, and nothing is predicted.
"""

import math
from collections.abc import Callable

from numflash.configs import Config
from numflash.problem.classes import ProblemClass

from .. import model
from ..model import Prediction
from ..model.machine_code import MachineCode
from ..records import ResourceUsage
from ..space.configs import Space

_SAME = 1.0
"""Milliseconds of every config that the model does not know: none is better than another."""


def unknown(problem: ProblemClass) -> str | None:
    """Why the model cannot predict a class; None if it can."""
    if not problem.traits.fp8:
        return None
    return (
        f"the offline model cannot predict {problem}: it has neither the rates at which GPUs "
        "multiply e4m3 nor the instructions of these kernels; measure it on a GPU, without "
        "--offline"
    )


def estimate(space: Space, config: Config, by: Callable = model.estimate) -> float:
    """Milliseconds by formula; infinite where no block fits, the same where nothing is known."""
    if unknown(space.problem) is not None:
        return _SAME
    try:
        return by(space.machine, space.problem, config).ms
    except ValueError:
        return math.inf


def predict(
    space: Space, config: Config, resources: ResourceUsage, code: MachineCode | None
) -> Prediction | None:
    """The model's time of a compiled kernel; None if it does not know the kernel."""
    if unknown(space.problem) is not None:
        return None
    return model.predict(space.machine, space.problem, config, resources, code)


def floor_ms(space: Space) -> dict[str, float]:
    """As `model.floor_ms`; of 8-bit floats only the exponentials are sure."""
    found = model.floor_ms(space.machine, space.problem)
    if unknown(space.problem) is None:
        return found
    return {"exponential": found["exponential"], "floor": found["exponential"]}
