"""NUMFLASH_AUTOTUNE=1: tune a class of problems when it is first met.

The tuner is a package of its own, found through the entry point `numflash.autotune`; numflash
imports it only when it is asked for. NUMFLASH_AUTOTUNE=1 spends 20 seconds on a class, another
number so many seconds. In the simulator there is nothing to measure, and it means nothing.
"""

import logging
import os
from importlib import metadata

from numflash.problem.classes import ProblemClass
from numflash.runtime import switches
from numflash.runtime.mode import SIMULATED

GROUP = "numflash.autotune"
_VARIABLE = "NUMFLASH_AUTOTUNE"
_SECONDS = 20.0
_log = logging.getLogger("numflash")
_tried: set[tuple[ProblemClass, int]] = set()


def seconds() -> float:
    """Seconds that may be spent on a class; 0 if nothing is to be tuned."""
    if SIMULATED:
        return 0.0
    asked = os.environ.get(_VARIABLE, "")
    try:
        budget = float(asked)
    except ValueError:
        try:
            return _SECONDS * switches.is_on(_VARIABLE)
        except ValueError:
            budget = -1.0
    if not 0 <= budget < float("inf"):
        _warn_once(
            f"{_VARIABLE} must be a switch (0, 1, off, on) or a number of seconds, got {asked!r}"
        )
        return 0.0
    return _SECONDS if budget == 1 else budget


def tune(problem: ProblemClass, device: int) -> bool:
    """Tune a class on a device, once in a process. Returns whether that was done now.

    Errors are logged: the caller's work goes on with the config it would have had.
    """
    budget = seconds()
    if not budget or (problem, device) in _tried:
        return False
    _tried.add((problem, device))
    try:
        (found, *_) = metadata.entry_points(group=GROUP)
    except ValueError:
        _warn_once('NUMFLASH_AUTOTUNE needs the tuner: pip install "numflash[tune]"')
        return False
    try:
        found.load()(problem, device, budget)
    except Exception as error:
        _log.warning("tuning %s failed: %s: %s", problem, type(error).__name__, error)
        return False
    return True


_warnings: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _warnings:
        _warnings.add(text)
        _log.warning("%s", text)
