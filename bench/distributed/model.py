"""The table without a GPU: arithmetic on schedules with assumed figures."""

from collections.abc import Iterable

from bench.distributed.cases import DIRECTIONS, METHODS, OF_BOTH, RANKS, Case
from bench.tables.tables import markdown

FLOPS = {"forward": 600e12, "backward": 450e12}
BANDWIDTH = 400e9
HEADING = (
    "No speed was measured here. This is arithmetic: the schedules' operations at "
    f"{FLOPS['forward'] / 1e12:.0f} TFLOP/s forward and {FLOPS['backward'] / 1e12:.0f} backward, "
    f"their bytes at {BANDWIDTH / 1e9:.0f} GB/s in each direction, all three assumed; launches "
    "and merges cost nothing in it."
)
COLUMNS = (*OF_BOTH, "MiB beyond results")


def rows(cases: Iterable[Case]) -> Iterable[list[str]]:
    """A row for each case, direction, number of ranks and method."""
    for case in cases:
        for direction in DIRECTIONS:
            alone = _milliseconds(case, 1, "gather", direction)
            for ranks in RANKS:
                for method in METHODS if ranks > 1 else METHODS[:1]:
                    yield _row(case, direction, ranks, method, alone)


def table(cases: Iterable[Case]) -> str:
    """The heading, and the rows in Markdown."""
    return f"{HEADING}\n\n{markdown(COLUMNS, rows(cases))}"


def _row(case: Case, direction: str, ranks: int, method: str, alone: float) -> list[str]:
    found = case.explained(ranks, method, direction)
    took = _milliseconds(case, ranks, method, direction)
    without_wires = _milliseconds(case, ranks, method, direction, bandwidth=None)
    return [
        str(case),
        direction,
        str(ranks),
        method if ranks > 1 else "one GPU",
        f"{took:.3g}",
        f"{alone / took / ranks:.2f}",
        f"{took - without_wires:.3f}",
        f"{found.balance.lockstep:.2f}",
        f"{max(found.sent) / 2**20:.0f}",
        f"{found.workspace / 2**20:.0f}",
    ]


def _milliseconds(
    case: Case, ranks: int, method: str, direction: str, bandwidth: float | None = BANDWIDTH
) -> float:
    figures = {"flops": FLOPS[direction], "bandwidth": bandwidth}
    return 1e3 * sum(case.explained(ranks, method, direction, **figures).seconds)
