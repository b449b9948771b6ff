"""The occupancy picture: the blocks of each compiled config that fit on an SM, and the budgets.

The registers of a block depend on its threads, so there is a chart per number of threads.
"""

import math
from collections import Counter
from collections.abc import Callable

from numflash.runtime.devices import KB, Architecture, architecture, blocks_per_sm

from ..drawing.axes import (
    BOTTOM,
    LEFT,
    RIGHT,
    RING,
    TOP,
    Axis,
    Labels,
    chart,
    circle,
    cross,
    frame,
    line,
)
from ..drawing.figures import Figure, key
from ..drawing.markup import Markup, escaped, joined, tag
from ..records import FAILURES, Record
from ..search.results import Result
from .charts import described, label_best

MAX_REGISTERS = 255
"""Of a thread, on every architecture."""
MAX_CHARTS = 4
# Corners of curves closer than this, in pixels, get no label.
_LABEL_ROOM = 13
_TITLE = "Occupancy"


def occupancy(result: Result) -> list[Figure]:
    """A figure for each number of threads that compiled configs have, that of the best first."""
    try:
        limits = architecture(result.arch)
    except ValueError as error:
        return [Figure(_TITLE, escaped(f"Limits are unknown: {error}."))]
    threads = Counter(
        record.resources.num_threads for record in result.records if record.resources is not None
    )
    if not threads:
        return [Figure(_TITLE, escaped("No config was compiled."))]
    winner = result.winner
    of_best = winner.resources.num_threads if winner and winner.resources else None
    order = sorted(threads, key=lambda n: (n != of_best, -threads[n], n))
    figures = [_figure(result, limits, n) for n in order[:MAX_CHARTS]]
    if left_out := order[MAX_CHARTS:]:
        names = ", ".join(map(str, sorted(left_out)))
        figures.append(Figure(_TITLE, escaped(f"Not drawn: blocks of {names} threads.")))
    return figures


def corner(limits: Architecture, num_threads: int, blocks: int) -> tuple[int, int] | None:
    """The most (shared memory in bytes, registers) with which so many blocks fit on an SM.

    Each is the most with next to nothing of the other; None if the threads alone are too many.
    """

    def fits(registers: int, smem_bytes: int) -> bool:
        return blocks_per_sm(limits, num_threads, registers, smem_bytes)[0] >= blocks

    if not fits(1, 0):
        return None
    return (
        _most(limits.max_smem_per_block, lambda smem: fits(1, smem)),
        _most(MAX_REGISTERS, lambda registers: fits(registers, 0)),
    )


def _most(high: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `high` that fits, by bisection; 0 fits."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _figure(result: Result, limits: Architecture, num_threads: int) -> Figure:
    records = [r for r in result.records if r.resources and r.resources.num_threads == num_threads]
    widest = max(limits.max_smem_per_block, *(r.resources.smem_bytes for r in records))
    x = Axis(0.0, widest / KB * 1.04, LEFT, RIGHT)
    y = Axis(0.0, 272.0, BOTTOM, TOP)
    marks, labels, last, blocks = [], Labels(), math.inf, 1
    for record in records:
        if record.config == result.best.config:
            labels.keep_clear(*_place(record, x, y), RING)
    while (at := corner(limits, num_threads, blocks)) is not None and min(at) > 0:
        px, py = x(at[0] / KB), y(at[1])
        if last - px > _LABEL_ROOM:
            marks.append(_bounded(px, py, "curve"))
            label = "1 block" if blocks == 1 else f"{blocks}"
            # In the corner, or further along the curve.
            inside = [(px - 3 - away, py + 11, "end") for away in (0, 20, 40)]
            labels.add(label, "muted halo", *inside, (px - 3, py + 28, "end"))
            last = px
        blocks += 1
    marks += _budgets(result, limits, num_threads, x, y, labels)
    marks += [_point(record, result, x, y, labels) for record in records]
    failed = sum(record.outcome in FAILURES for record in records)
    legend = []
    if len(records) > failed:
        legend.append(key("●", "k-accent", f"compiled ({len(records) - failed})"))
    if failed:
        legend.append(key("x", "failed", f"compiled, but failed ({failed})"))
    legend.append(
        f"Curves: the most registers and shared memory for 1, 2, 3 ... blocks on an SM "
        f"of {limits.arch}. "
    )
    if _has_budget(result):
        legend.append(key("- -", "k-second", "budgets"))
    return Figure(
        f"Occupancy, {num_threads} threads per block",
        joined(legend),
        chart(
            f"{len(records)} configs of {num_threads} threads by shared memory and registers",
            frame(x, y, "shared memory per block, KB", "registers per thread"),
            *marks,
            *labels.drawn(),
        ),
    )


def _bounded(px: float, py: float, class_: str) -> Markup:
    return tag("path", d=f"M{LEFT} {py:.1f}H{px:.1f}V{BOTTOM}", class_=class_)


def _point(record: Record, result: Result, x: Axis, y: Axis, labels: Labels) -> Markup:
    resources = record.resources
    px, py = _place(record, x, y)
    about = (
        f"{described(record)}; {resources.registers} registers, {resources.smem_bytes} bytes, "
        f"{resources.blocks_per_sm} blocks per SM, limited by {resources.limited_by}"
    )
    if record.outcome in FAILURES:
        return cross(px, py, "cross", about)
    dot = circle(px, py, 2.5, "dot", about)
    if record.config != result.best.config:
        return dot
    label_best(labels, px, py)
    return joined([dot, circle(px, py, RING, "ring")])


def _place(record: Record, x: Axis, y: Axis) -> tuple[float, float]:
    return x(record.resources.smem_bytes / KB), y(min(record.resources.registers, 272))


def _has_budget(result: Result) -> bool:
    names = ("sram_budget_bytes", "min_occupancy", "max_registers")
    return any(result.budgets.get(name) for name in names)


def _budgets(
    result: Result, limits: Architecture, num_threads: int, x: Axis, y: Axis, labels: Labels
) -> list[Markup]:
    """The limits that the user has set, and the device's limit of shared memory."""
    budgets, marks = result.budgets, []
    limit = (budgets.get("smem_limit_bytes") or limits.max_smem_per_block) / KB
    marks.append(line(x(limit), BOTTOM, x(limit), TOP, "axis", f"limit of a block: {limit:g} KB"))
    if (smem := budgets.get("sram_budget_bytes")) is not None:
        px = x(min(smem / KB, x.high))
        marks.append(line(px, BOTTOM, px, TOP, "budget", f"budget: {smem / KB:g} KB"))
        places = (px - 4, BOTTOM - 5, "end"), (px + 4, BOTTOM - 5, "start")
        labels.add(f"{smem / KB:g} KB", "label-default halo", *places)
    if (registers := budgets.get("max_registers")) is not None:
        py = y(min(registers, 272))
        marks.append(line(LEFT, py, RIGHT, py, "budget", f"budget: {registers} registers"))
        places = [(at, py + down, "end") for at in (RIGHT - 4, RIGHT - 90) for down in (-4, 13)]
        labels.add(f"{registers} registers", "label-default halo", *places)
    if share := budgets.get("min_occupancy"):
        blocks = math.ceil(share * limits.max_threads_per_sm / num_threads)
        if (at := corner(limits, num_threads, blocks)) is not None:
            px, py = x(at[0] / KB), y(at[1])
            marks.append(_bounded(px, py, "budget"))
            label = f"at least {blocks} block" + ("s" if blocks > 1 else "")
            places = [
                (at, py + down, "start") for at in (LEFT + 4, LEFT + 90) for down in (12, -4)
            ]
            labels.add(label, "label-default halo", *places)
    return marks
