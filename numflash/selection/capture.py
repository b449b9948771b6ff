"""NUMFLASH_CAPTURE=FILE: write down the problem classes that a program runs.

One class a line, appended when a process first meets it. `numflash-tune --from-capture FILE` tunes
them.
"""

import logging
import os

from numflash.problem.classes import ProblemClass
from numflash.runtime.files import open_unlinked

_log = logging.getLogger("numflash")
_noted: set[tuple[str, ProblemClass]] = set()


def note(problem: ProblemClass) -> None:
    """Write a class down, if that is asked for; a failure is logged, never raised."""
    path = os.environ.get("NUMFLASH_CAPTURE")
    if not path or (path, problem) in _noted:
        return
    _noted.add((path, problem))
    try:
        # One write of one short line: lines of several processes do not mix.
        with open(path, "a", encoding="utf-8", opener=open_unlinked) as file:
            file.write(f"{problem}\n")
    except OSError as error:
        _log.warning("NUMFLASH_CAPTURE: cannot write classes to %s: %s", path, error)


def read(path: str | os.PathLike) -> list[ProblemClass]:
    """The classes in a file, each once, in the order in which they were met.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is no problem class.
    """
    with open(path, encoding="utf-8") as file:
        lines = [line.strip() for line in file]
    found = []
    for number, line in enumerate(lines, 1):
        if line:
            try:
                found.append(ProblemClass.parse(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    return list(dict.fromkeys(found))
