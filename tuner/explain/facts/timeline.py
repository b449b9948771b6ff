"""One SM in clocks: what its buffers, roles and units do, by the model of events.

No GPU has confirmed these events: they follow the kernel's program order and the rates of its
machine code, without contention for issue slots, bank conflicts and a limit of power.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from numflash.selection.layout import EDGE

from ...model.grid import lay
from ...pipeline import trace
from ...pipeline.steps import Walk
from ...pipeline.timeline import Lane, Span, Timeline
from ..asked import Asked, Kernel, NotShownError
from ..numbers import Number, Origin
from .laid import Laid, clocks_of, laid

MOST_BLOCKS = 2
"""Blocks whose buffers and roles are drawn; units show the work of all."""
_TURNS, _MOST_TILES, _FEWEST_TILES, _ALL_TILES = 4.6, 40, 10, 96
# Pieces of one product between which another role's come are drawn as one.
_GAP = 0.35


class Piece(NamedTuple):
    """What a lane does for a while.

    Attributes:
        row: of the lane, where several owners have a row each.
        start, end: clocks since the first block began.
        kind: as of `pipeline.timeline.Span`.
        label: the tile, with what it is of.
    """

    row: int
    start: float
    end: float
    kind: str
    label: str


@dataclass(frozen=True)
class Row:
    """A lane that is drawn.

    Attributes:
        name: as the timeline names it.
        group: "buffer", "role" or "unit".
        owners: whose work each of its rows is; () where there is one row for all.
        busy: share of the steady state.
        pieces: until `TimelineFacts.shown`.
    """

    name: str
    group: str
    owners: Sequence[str]
    busy: Number
    pieces: Sequence[Piece]


@dataclass(frozen=True)
class TimelineFacts:
    """One SM in clocks.

    Attributes:
        rows: the lanes, in the order of the picture.
        products: names of the products, those that make scores first.
        tiles: of the walk that was followed.
        blocks, drawn_blocks: that share the SM, and of these those that have rows.
        shown: clocks that are drawn, of `end` until all is done.
        whole: whether all of the walk is drawn.
        turn: clocks until every block is a tile further, by the events.
        least: of these, clocks that products take.
        calibrated: the same turn by the model that predicts times, which also counts what chance
            loses.
        unit: what multiplies: "tensor" or "FMA".
        bound_by: the unit that is busy for the largest share.
        waits: label -> share of the steady state that a role which multiplies waits for it, the
            longest wait first.
        rates: where the clocks of the steps are from.
    """

    rows: Sequence[Row]
    products: Sequence[str]
    tiles: Number
    blocks: Number
    drawn_blocks: int
    shown: Number
    end: Number
    whole: bool
    turn: Number
    least: Number
    calibrated: Number
    unit: str
    bound_by: str
    waits: dict[str, Number]
    rates: Origin


def find(asked: Asked, kernel: Kernel) -> TimelineFacts:
    """The facts of the first block of a kernel, or of those that share its SM.

    Raises:
        NotShownError: the kernel has no work, or no program of it is known.
    """
    found = laid(asked, kernel)
    if not found.work.any():
        raise NotShownError("no block has anything to do, so no clock passes")
    blocks = found.resident(asked.machine.num_sms)
    walk = _walk(found, blocks)
    try:
        timeline = trace(
            asked.machine,
            kernel.config,
            kernel.traits,
            [walk],
            report=kernel.report,
            blocks=blocks,
            grid=lay(kernel.problem, kernel.config).blocks,
        )
    except ValueError as error:
        raise NotShownError(str(error)) from error
    calibrated = clocks_of(asked, kernel, found).turn
    return _facts(kernel, timeline, walk.tiles, blocks, calibrated)


def _walk(found: Laid, blocks: int) -> Walk:
    """The longest walk of the head that is drawn; of a long one only so many tiles."""
    row = int(found.work.argmax())
    tiles = max(found.shares(row), key=len)
    most = max(_FEWEST_TILES, min(_MOST_TILES, _ALL_TILES // blocks))
    last, kinds = tiles[-most:], found.row(row)
    masked = [n for n, tile in enumerate(last) if kinds[tile] == EDGE]
    return Walk(len(last), (), tuple(masked))


def _facts(
    kernel: Kernel, timeline: Timeline, tiles: int, blocks: int, calibrated: float
) -> TimelineFacts:
    units = [lane for lane in timeline.lanes if lane.group == "unit"]
    (unit,) = (lane.name for lane in units if lane.name in ("tensor", "FMA"))
    first = min(span.start for span in timeline.of(unit))
    shown = first + _TURNS * timeline.turn
    whole = timeline.end <= shown + 1.5 * timeline.turn
    shown = timeline.end if whole else shown
    drawn = [lane for lane in timeline.lanes if _block_of(lane) < MOST_BLOCKS]
    rates: Origin = "assumed"
    if kernel.report is not None and kernel.report.main_loop is not None:
        rates = "machine code"
    return TimelineFacts(
        rows=[_row(timeline, lane, shown) for lane in drawn],
        products=list(dict.fromkeys(span.kind for span in timeline.of(unit))),
        tiles=Number(tiles, "counted"),
        blocks=Number(blocks, "counted" if kernel.report is None else "machine code"),
        drawn_blocks=min(blocks, MOST_BLOCKS),
        shown=Number(shown, "model", "clocks"),
        end=Number(timeline.end, "model", "clocks"),
        whole=whole,
        turn=Number(timeline.turn, "model", "clocks"),
        calibrated=Number(calibrated, "model", "clocks"),
        least=Number(timeline.turn * timeline.busy[unit], "model", "clocks"),
        unit=unit,
        bound_by=max(units, key=lambda lane: timeline.busy[lane.name]).name,
        waits=_waits(timeline, timeline.owners(unit)),
        rates=rates,
    )


def _block_of(lane: Lane) -> int:
    """The number of the block whose lane it is; 0 of units, and where there is one block."""
    head, found, _ = lane.name.partition(": ")
    return int(head.removeprefix("block ")) if found and lane.group != "unit" else 0


def _row(timeline: Timeline, lane: Lane, shown: float) -> Row:
    owners = timeline.owners(lane.name) if lane.group == "unit" and lane.name != "copies" else []
    owners = owners if 1 < len(owners) <= 4 else []
    places = {owner: n for n, owner in enumerate(owners)}
    gap = _GAP * timeline.turn
    pieces = []
    for owner in owners or [None]:
        spans = [span for span in timeline.of(lane.name, owner) if span.start < shown]
        for span in _merged(spans, gap if lane.group == "unit" else 1.0):
            end = min(span.end, shown)
            place = places.get(span.owner, 0)
            pieces.append(Piece(place, span.start, end, span.kind, span.label))
    busy = Number(timeline.busy[lane.name], "model")
    return Row(lane.name, lane.group, owners, busy, pieces)


def _merged(spans: Sequence[Span], gap: float) -> Iterator[Span]:
    """Spans in order; those of one kind and label that follow each other are one."""
    last: Span | None = None
    for span in spans:
        same = last is not None and (last.kind, last.label) == (span.kind, span.label)
        if same and span.start - last.end < gap:
            last = Span(last.lane, last.start, span.end, last.kind, last.label, last.owner)
        else:
            if last is not None:
                yield last
            last = span
    if last is not None:
        yield last


def _waits(timeline: Timeline, roles: Sequence[str]) -> dict[str, Number]:
    """Of the roles that multiply, the mean share of the steady state in each wait."""
    start, end = timeline.steady
    clocks: dict[str, float] = defaultdict(float)
    for span in (span for role in roles for span in timeline.of(role)):
        if span.kind in ("wait", "turn", "products"):
            what = {"turn": "their turn", "products": "products"}.get(span.kind, span.label)
            clocks[what] += max(0.0, min(span.end, end) - max(span.start, start))
    whole = max(1e-9, (end - start) * len(roles))
    shares = {what: Number(each / whole, "model") for what, each in clocks.items() if each > 0}
    return dict(sorted(shares.items(), key=lambda item: -item[1].value))
