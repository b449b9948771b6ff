"""The winner of a search among the configs that it has tried.

The default has to be beaten: offline by more than the model's error. Where there is a GPU the
finalists are measured again, in turn. Times that are close are equal.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from .. import model
from ..measuring.measurer import Measurer
from ..records import Record
from ..space.configs import Space
from .candidates import Candidates

USABLE = ("measured", "predicted")
"""Outcomes of configs that may win."""
_FINALISTS, _FINAL_ROUNDS = 5, 15
_TIE = 0.01
"""Times this close are equal; the config with less shared memory wins."""


class Contest:
    """The comparison of tried configs with each other, and with the default.

    Attributes:
        finals: of finalists that were measured again their last records, by config.
    """

    def __init__(
        self,
        space: Space,
        candidates: Candidates,
        measurer: Measurer | None,
        first: Sequence[str],
    ):
        """Args are as those of `Search`; `first` begins with the default."""
        self._space, self._candidates, self._measurer = space, candidates, measurer
        self._default, self._first = str(space.default), first
        self.finals: dict[str, Record] = {}

    @cached_property
    def gains_needed(self) -> np.ndarray:
        """Of each number the fraction by which the default must be slower to give way."""
        space = self._space
        return np.array(
            [
                model.gain_needed(space.machine, space.problem, config, space.default)
                for config in self._candidates.configs
            ]
        )

    def winner(
        self, tried: list[Record], lacks_default: bool, again: bool
    ) -> tuple[Record, Record]:
        """(the default's record, the winner's), whose reason says why a faster one did not win.

        Args:
            tried: the records of all trials.
            lacks_default: whether the default was not tried, and something may win.
            again: measure the finalists against each other first, where there is a GPU.

        Raises:
            LookupError: nothing that was tried can be used, or the default was not tried.
        """
        records = {record.config: record for record in tried}
        usable = [r for r in records.values() if r.outcome in USABLE]
        if not usable:
            raise LookupError(f"no config of {self._space.problem} worked: {_outcomes(records)}")
        if lacks_default:
            raise LookupError(
                f"no config of {self._space.problem} is named the best: its default, "
                f"{self._default}, was not tried"
            )
        usable.sort(key=lambda record: record.time_ms)
        default = records.get(self._default)
        usable, within_error = self._beyond_error(usable, default)
        firsts = [record for record in usable[_FINALISTS:] if record.config in self._first]
        finalists = usable[:_FINALISTS] + firsts
        if again and self._measurer is not None and len(finalists) > 1:
            finalists = self._measured_again(finalists)
        default = self.finals.get(self._default, default)
        if default is None:
            violation = self._space.failure(self._space.default)
            default = Record(self._default, *(violation or ("invalid", "it is not in the space")))
        fastest = min(finalists, key=lambda record: record.time_ms)
        tied = [r for r in finalists if r.time_ms <= (1 + _TIE) * fastest.time_ms]
        best = min(tied, key=lambda record: (record.resources.smem_bytes, record.time_ms))
        why = []
        if best is not fastest:
            why.append(
                f"{fastest.config} is faster by less than {_TIE:.0%}, which counts as equal, and "
                "takes more shared memory"
            )
        before = [r for r in usable if r not in finalists and r.config not in self.finals]
        if any(record.time_ms < best.time_ms for record in before):
            why.append(
                "the finalists were measured again, in turn; what looks faster and was not among "
                "them has times of its first trial"
            )
        within_error = [r for r in within_error if r.time_ms < best.time_ms]
        if within_error:
            fastest = within_error[0]
            gain, needed = default.time_ms / fastest.time_ms - 1, self._gain_needed(fastest)
            why.append(
                f"{fastest.config} is predicted to gain {gain:.1%} over the default, and must "
                f"gain more than {needed:.1%}, the model's error, to displace it"
            )
        estimated = [r for r in records.values() if r.outcome == "estimated"]
        estimated = [r for r in estimated if r.predicted_ms < best.time_ms]
        if estimated and not within_error:
            fastest = min(estimated, key=lambda record: record.predicted_ms)
            why.append(f"{fastest.config} was {fastest.reason}")
        return default, replace(best, reason="; ".join(filter(None, [best.reason, *why])))

    def _measured_again(self, finalists: list[Record]) -> list[Record]:
        """The finalists, measured in turn; as they were before if every measurement fails."""
        configs = [record.config for record in finalists]
        samples = self._measurer.remeasure(self._space.problem, configs, _FINAL_ROUNDS)
        if not any(samples.values()):
            return finalists
        self.finals = {}
        for record in finalists:
            times = tuple(samples.get(record.config, ()))
            self.finals[record.config] = (
                replace(record, samples_ms=times)
                if times
                else record.failed("launch_failed", "it failed when it was measured again")
            )
        return [final for final in self.finals.values() if final.outcome in USABLE]

    def _beyond_error(
        self, usable: list[Record], default: Record | None
    ) -> tuple[list[Record], list[Record]]:
        """(the default and configs whose gain is larger than the model's error, the rest)."""
        if self._measurer is not None or default is None or not math.isfinite(default.time_ms):
            return usable, []
        beyond, within = [], []
        for record in usable:
            gain = default.time_ms / record.time_ms - 1
            is_beyond = record is default or gain > self._gain_needed(record)
            (beyond if is_beyond else within).append(record)
        return beyond, within

    def _gain_needed(self, record: Record) -> float:
        return float(self.gains_needed[self._candidates.numbers[record.config]])


def _outcomes(records: dict[str, Record]) -> str:
    """The number of each failure, with one reason for each."""
    found: dict[str, list[str]] = {}
    for record in records.values():
        found.setdefault(record.outcome, []).append(record.reason)
    return "; ".join(f"{len(why)} {outcome} ({why[0]})" for outcome, why in found.items())
