"""NUMFLASH_AUTOTUNE: tuning that numflash calls when it first meets a class of problems."""

import logging

from numflash.problem.classes import ProblemClass

from .measuring.measurer import DeviceMeasurer
from .search.search import StoppingRules
from .search.session import Options, Session
from .space.target import find_target

_log = logging.getLogger("numflash")


def autotune(problem: ProblemClass, device: int, seconds: float) -> None:
    """Tune a class on a CUDA device and remember the winner.

    Args:
        problem: the class.
        device: ordinal of the CUDA device.
        seconds: for the search; compilations that it has begun may take a little longer.

    Raises:
        LookupError: no config worked.
        RuntimeError: the device or the storage of trials cannot be used.
    """
    target = find_target(str(device), offline=False)
    options = Options(rules=StoppingRules(trials=None, seconds=seconds))
    _log.info("tuning %s for %g s ...", problem, seconds)
    with (
        DeviceMeasurer(device, expected=target.key) as measurer,
        Session(target.key, target.machine, measurer, options) as session,
    ):
        spaces = session.spaces([problem])
        if not spaces:
            return
        (space,) = spaces
        result = session.tune(space, 1, str(problem), quiet=True)
    _log.info("tuned %s: %s", problem, result.best.config)
