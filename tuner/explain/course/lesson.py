"""A lesson: a question, the steps that answer it, what is often noted wrongly, checks, figures.

A lesson computes its numbers; none is typed in but a published one and a slip. In texts
`backticks` mark code.
"""

from dataclasses import dataclass

import numpy as np

from ...drawing.figures import Figure, Table

ORIGINS = {
    "kernel": "by the kernel, simulated",
    "exact": "in float64",
    "counted": "counted from tiles",
    "model": "by the offline model",
    "published": "published by others",
}
"""Where the numbers of a step come from."""


@dataclass(frozen=True)
class Step:
    """A step of an answer.

    Attributes:
        title: what is done, in a few words.
        text: what is seen, and why.
        origin: of its numbers, one of `ORIGINS`.
        table: its numbers.
        code: what a student can run, with NUMBA_ENABLE_CUDASIM=1; a test does.
    """

    title: str
    text: str
    origin: str
    table: Table | None = None
    code: str = ""

    def __post_init__(self):
        if self.origin not in ORIGINS:
            raise ValueError(f"origin must be one of {', '.join(ORIGINS)}, got {self.origin!r}")


@dataclass(frozen=True)
class Slip:
    """What common notes say, and what holds."""

    says: str
    holds: str


@dataclass(frozen=True)
class Check:
    """What a lesson claims, whether it holds, and the numbers that say so."""

    claim: str
    holds: bool
    seen: str

    @classmethod
    def close(cls, claim: str, found, expected, within: float) -> "Check":
        """That all numbers are within so much of those expected."""
        error = float(np.max(np.abs(np.asarray(found, float) - np.asarray(expected, float))))
        return cls(claim, error <= within, f"largest difference {error:.2g}, allowed {within:.2g}")

    @classmethod
    def equal(cls, claim: str, found, expected) -> "Check":
        """That something is exactly this."""
        return cls(claim, bool(np.all(np.equal(found, expected))), f"{found}")


@dataclass(frozen=True)
class Lesson:
    """A lesson of the course.

    Attributes:
        number: from 1 on.
        title: what is learned.
        question: as a student asks it.
        steps: the answer.
        slips: what is often noted, and what holds.
        checks: each is a test case.
        figures: each with a table of its numbers.
    """

    number: int
    title: str
    question: str
    steps: tuple[Step, ...]
    slips: tuple[Slip, ...]
    checks: tuple[Check, ...]
    figures: tuple[Figure, ...]
