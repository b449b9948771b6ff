"""What an SM does in time: spans on lanes, how busy each lane is, the clocks of a turn."""

from dataclasses import dataclass

STEADY = 0.3, 0.7
"""The share of a walk's tiles from which on, and until which, a block is in its steady state."""


@dataclass(frozen=True)
class Span:
    """What a lane does for a while.

    Attributes:
        lane: a `Lane`'s name.
        start, end: clocks since the block began.
        kind: what it does. Of buffers: "copy" (on its way) and "held" (from its arrival until all
            have given it back); between these it is empty. Of roles: "wait" (for a copy, a buffer
            or a barrier), "turn" (for its turn), "products" (for products of its own), "issue"
            (products, against back-pressure), or a kind of work: "mask", "max", "exp", "pack" and
            others. Of copies: "copy". Of what multiplies: the product, such as "S" and "PV". Of
            exponentials: "exp".
        label: the tile, with what it is of: "K 3", "S 3".
        owner: whose it is: the role that multiplies or computes exponentials, the channel that is
            fetched; of roles and buffers the block.
    """

    lane: str
    start: float
    end: float
    kind: str
    label: str = ""
    owner: str = ""

    @property
    def clocks(self) -> float:
        """Its length."""
        return self.end - self.start


@dataclass(frozen=True)
class Lane:
    """A row of the picture.

    Attributes:
        name: "K 0", "WG 1", "tensor"; with more than one block in front of it "block 1: ".
        group: "buffer", "role", or "unit": copies, what multiplies and exponentials, which all
            share.
    """

    name: str
    group: str


@dataclass(frozen=True)
class Timeline:
    """All that happens on an SM while its blocks run.

    Attributes:
        spans: by lane, each lane's in order.
        lanes: in the order of the picture, buffers first and units last.
        turn: clocks until every block is a tile further, in the steady state.
        steady: (start, end) of the steady state, clocks.
        busy: lane -> the share of the steady state that it is busy. Waits of roles do not count,
            of buffers only while they hold a tile.
        end: clocks until all is done.
    """

    spans: tuple[Span, ...]
    lanes: tuple[Lane, ...]
    turn: float
    steady: tuple[float, float]
    busy: dict[str, float]
    end: float

    def of(self, lane: str, owner: str | None = None) -> list[Span]:
        """The spans of a lane, of one owner if one is named, in order."""
        return [
            span
            for span in self.spans
            if span.lane == lane and (owner is None or span.owner == owner)
        ]

    def owners(self, lane: str) -> list[str]:
        """The owners of a lane's spans, in the order in which they first come."""
        return list(dict.fromkeys(span.owner for span in self.of(lane)))


IDLE = ("wait", "turn", "products", "issue", "copy")
"""Kinds of spans in which roles and buffers are not busy."""


def busy(spans: list[Span], window: tuple[float, float], is_unit: bool) -> float:
    """The share of a window, clocks, in which a lane with these spans is busy."""
    start, end = window
    worked = sum(
        max(0.0, min(span.end, end) - max(span.start, start))
        for span in spans
        if is_unit or span.kind not in IDLE
    )
    return worked / (end - start) if end > start else 0.0
