"""Times of several methods, interleaved: in every round each method runs once, in random order.

So a clock that sinks or a device that warms up meets all methods alike, and the ratio of two
methods is formed round by round. What a timer is, `bench.measuring.device` says: here it is a
function that runs a call and returns milliseconds.
"""

import math
import random
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

MIN_ROUNDS, MAX_ROUNDS = 7, 25
_WARM_UPS = 2


@dataclass(frozen=True)
class Method:
    """Something to be timed.

    Attributes:
        name: as in the record.
        call: does the work, and returns its results.
        context: entered around the calls, outside the timed region.
    """

    name: str
    call: Callable[[], Any]
    context: Callable[[], AbstractContextManager] = field(default=nullcontext)


def num_rounds(warm_up_ms: dict[str, float], budget_ms: float) -> int:
    """Rounds that fit the time for a point: 7 to 25."""
    fits = budget_ms / max(sum(warm_up_ms.values()), 1e-6)
    return int(min(max(fits, MIN_ROUNDS), MAX_ROUNDS))


def time_interleaved(
    methods: list[Method],
    timer: Callable[[Method], float],
    *,
    budget_ms: float,
    on_failure: Callable[[str, Exception], None],
    seed: int = 0,
    rounds: int | None = None,
) -> dict[str, list[float | None]]:
    """Milliseconds of each method in each round; None in rounds after it failed.

    Args:
        methods: what to time.
        timer: runs a method once and returns milliseconds.
        budget_ms: time for all rounds together, which chooses their number.
        on_failure: told the name of a method that raised; the method is not run again.
        seed: of the order.
        rounds: their number, if not to be chosen.
    """
    samples: dict[str, list[float | None]] = {method.name: [] for method in methods}
    alive, warm = list(methods), {}

    def attempt(method: Method) -> float | None:
        try:
            return timer(method)
        except Exception as error:
            alive.remove(method)
            warm.pop(method.name, None)
            on_failure(method.name, error)
        return None

    for method in methods:
        for _ in range(_WARM_UPS):
            if method in alive and (milliseconds := attempt(method)) is not None:
                warm[method.name] = milliseconds
    order = random.Random(seed)
    for _ in range(rounds or num_rounds(warm, budget_ms)):
        for method in order.sample(alive, len(alive)):
            samples[method.name].append(attempt(method))
    return {name: times for name, times in samples.items() if name in warm}


def summarise(samples: list[float]) -> dict:
    """Median and quartiles of a method's times."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median_ms": median, "quartiles_ms": [low, high], "rounds": len(samples)}


def paired_ratio(ours: list[float], theirs: list[float]) -> float:
    """The factor by which ours is faster than theirs: the median over rounds of theirs / ours."""
    return statistics.median(t / o for o, t in zip(ours, theirs, strict=True))


def geometric_mean(ratios: list[float]) -> float:
    """The mean of ratios that treats 2 and 1/2 alike. Raises ValueError if there are none."""
    if not ratios:
        raise ValueError("a geometric mean needs at least one ratio")
    return math.exp(statistics.fmean(map(math.log, ratios)))
