"""Result: the findings of a run of the tuner for one problem class on one device.

A result is either measured or predicted, and so are all times that are compared in it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from numflash.configs import parse_config
from numflash.problem.classes import ProblemClass

from ..model import multiply_adds
from ..records import FAILURES, Record

ORIGINS = ("measured", "predicted")


@dataclass(frozen=True)
class Result:
    """One problem class, tuned on one device.

    Attributes:
        device: name of the device, "NVIDIA H200"; or that of an architecture, "sm_80".
        arch: as in `numflash.runtime.devices.ARCHITECTURES`.
        num_sms: multiprocessors of the device.
        problem: the tuned class.
        origin: "measured", or "predicted" by the offline model.
        default: the config that is used without a tuner.
        best: the winner, possibly the default itself.
        records: of all trials, in their order, failures included.
        floor_ms: resource -> milliseconds that no kernel can beat; the floor is the largest.
        space_size: configs in the space.
        pruned: constraint -> configs of the space that it removed before anything was compiled.
        pruned_examples: constraint -> one config that it removed, and why.
        importances: parameter -> its share in the variation of the time; empty if unknown.
        budgets: limits by name, None if not set: `smem_limit_bytes` of the device and
            `sram_budget_bytes` of the user, both per block; `min_occupancy`, resident warps over
            the most an SM holds; `max_registers` per thread.
    """

    device: str
    arch: str
    num_sms: int
    problem: ProblemClass
    origin: str
    default: Record
    best: Record
    records: list[Record]
    floor_ms: dict[str, float] = field(default_factory=dict)
    space_size: int = 0
    pruned: dict[str, int] = field(default_factory=dict)
    pruned_examples: dict[str, str] = field(default_factory=dict)
    importances: dict[str, float] = field(default_factory=dict)
    budgets: dict[str, float | int | None] = field(default_factory=dict)

    def __post_init__(self):
        if self.origin not in ORIGINS:
            raise ValueError(f"origin must be one of {', '.join(ORIGINS)}, got {self.origin!r}")

    def time_ms(self, record: Record) -> float | None:
        """The time of a record that compares with the others of this result.

        Measured in a measured result and predicted in a predicted one, never a mixture; None if
        the record failed or has no such time.
        """
        if record.outcome in FAILURES:
            return None
        time = record.median_ms if self.origin == "measured" else record.predicted_ms
        return time if time is not None and math.isfinite(time) and time > 0 else None

    def tflops(self, record: Record) -> float | None:
        """The speed of a record in 1e12 operations a second; None without a time or products.

        Operations are the multiplications and additions of the family's matrix products, of the
        scores that are not masked, as the FlashAttention papers count them.
        """
        time, problem = self.time_ms(record), self.problem
        if self.origin == "measured" and record.batch_heads is not None:
            problem = replace(problem, batch_heads=record.batch_heads)
        terms = multiply_adds(problem)
        return 2 * terms / time / 1e9 if time and terms else None

    @property
    def winner(self) -> Record | None:
        """The best, if it has a time; None if nothing worked."""
        return None if self.time_ms(self.best) is None else self.best

    @property
    def speedup(self) -> float | None:
        """Time of the default over that of the best; None if either has none."""
        default, best = self.time_ms(self.default), self.time_ms(self.best)
        return None if default is None or best is None else default / best

    @property
    def spread(self) -> float | None:
        """Interquartile range of the best's samples over their median; None if not measured."""
        return self.best.spread if self.origin == "measured" and self.winner else None

    @property
    def floor(self) -> float | None:
        """Milliseconds that no kernel can beat; None if unknown."""
        return max(self.floor_ms.values(), default=None)

    def pairs(self) -> list[tuple[Record, float, float]]:
        """(record, predicted ms, measured ms) of each record that has both."""
        return [
            (record, record.predicted_ms, record.median_ms)
            for record in self.records
            if record.outcome not in FAILURES and record.predicted_ms and record.median_ms
        ]


def parameters(family: str, config: str) -> dict[str, object]:
    """The parameters of a config, by name; empty for a text that is no config of the family."""
    try:
        return asdict(parse_config(family, config))
    except ValueError:
        return {}


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties sharing their mean rank.

    None where it is not defined: fewer than two points, or all values of one side equal.
    """
    if len(x) != len(y):
        raise ValueError(f"both sides must be equally long, got {len(x)} and {len(y)}")
    if len(x) < 2:
        return None
    ranks = np.stack([_ranks(x), _ranks(y)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    scale = math.sqrt(float((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum()) / scale if scale else None


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1 on; equal values get the mean of theirs."""
    _, group, sizes = np.unique(
        np.asarray(values, np.float64), return_inverse=True, return_counts=True
    )
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]


def format_ms(milliseconds: float | None) -> str:
    """Four significant digits; a dash if there is no time."""
    if milliseconds is None or not math.isfinite(milliseconds):
        return "-"
    if milliseconds <= 0:
        return f"{milliseconds:g}"
    return f"{milliseconds:.{max(0, 3 - math.floor(math.log10(milliseconds)))}f}"
