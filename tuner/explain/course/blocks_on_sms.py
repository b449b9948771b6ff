"""Lesson 4: six blocks on four SMs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

import numflash
from numflash.kernels.portable import forward as kernel

from ...drawing.axes import Axis, chart, text
from ...drawing.figures import Figure, Table
from ...drawing.markup import Markup, escaped, joined
from ...drawing.shapes import boxed_text, rect
from ...model.dispatch import dispatched
from .lesson import Check, Lesson, Slip, Step
from .looking import PORTABLE, rows, watched

_SMS, _BLOCKS = 4, 6
_TILE_M, _TILE_N = 4, 8
_TOKENS = _BLOCKS * _TILE_M


@dataclass(frozen=True)
class Placed:
    """Blocks on SMs: each one's SM, slot, begin and end, in units of a tile by itself."""

    name: str
    blocks: list[tuple[int, int, float, float]]

    @property
    def end(self) -> float:
        """When the last one ends."""
        return max(end for *_, end in self.blocks)

    @property
    def sms(self) -> list[int]:
        """The SM of each block."""
        return [sm for sm, *_ in self.blocks]

    @property
    def waited(self) -> list[int]:
        """The blocks that did not begin at once."""
        return [n for n, (_, _, start, _) in enumerate(self.blocks) if start > 0]


def lesson() -> Lesson:
    """6 blocks on 4 SMs."""
    starts, walks = _watch()
    equal = [1] * _BLOCKS
    two = _place("two on an SM", equal, 2)
    one = _place("one on an SM", equal, 1)
    hidden = _place("two, each half idle alone", equal, 2, lambda n, k: n * max(1.0, k / 2))
    longest = _place("longest first", walks, 1)
    shortest = _place("shortest first", walks[::-1], 1)
    return Lesson(
        4,
        "Six blocks on four SMs",
        "A launch has 6 blocks and the GPU 4 SMs. Which blocks wait, and which SM gets which?",
        (
            Step(
                "How many slots",
                "An SM holds as many blocks as its shared memory, registers and threads allow. "
                f"With room for two there are {2 * _SMS} slots for {_BLOCKS} blocks: nothing "
                "waits. "
                f"Blocks 0 to 5 go to the SMs {_listed(two.sms)}. Only with room for one do the "
                f"blocks {_listed(one.waited)} wait for a second round.",
                "model",
                Table(
                    ("room", "blocks that wait", "ends after", "slots busy"),
                    [
                        (
                            p.name,
                            _listed(p.waited) or "none",
                            f"{p.end:g}",
                            f"{_busy(p, slots):.0%}",
                        )
                        for p, slots in ((two, 2), (one, 1), (hidden, 2))
                    ],
                    (2, 3),
                    "Blocks of one tile each; a tile by itself takes 1",
                ),
            ),
            Step(
                "Is two at once faster?",
                "Two blocks that both need the tensor cores all the time share them: "
                f"{two.end:g}, no better than two rounds. But a block often waits, for memory or "
                "for its own softmax. If it uses half of the SM when alone, the other one gets "
                f"what is left: {hidden.end:g}.",
                "model",
            ),
            Step(
                "Blocks are not equal",
                f"With a causal mask a block of late queries has more keys to see. {_TOKENS} "
                f"tokens in `{PORTABLE}`, {_TILE_M} queries a block: we watched its {_BLOCKS} "
                f"blocks begin at the queries {_listed(starts)} and walk over {_listed(walks)} "
                "tiles of keys. The kernel turns the order round on purpose, the longest first: "
                f"on {_SMS} SMs with room for one it ends after {longest.end:g}, the other way "
                f"round after {shortest.end:g}.",
                "kernel",
            ),
        ),
        (
            Slip(
                "Blocks 0 and 1 go to SM 0, 2 and 3 to SM 1, and so on.",
                "NVIDIA documents no order. By Gilman and others (2020) a block goes to the SM "
                "with the most room, so each SM gets one before any gets two: "
                f"{_listed(two.sms)}. No kernel may depend on it.",
            ),
            Slip(
                "6 blocks on 4 SMs take two rounds.",
                "Only if an SM has room for one. Count slots, not SMs.",
            ),
            Slip(
                "The last round is the problem of uneven work.",
                "It is who comes last that counts. A long block that begins last runs alone.",
            ),
        ),
        (
            Check.equal("Nothing waits where two have room", two.waited, []),
            Check.equal("Breadth first", two.sms, [0, 1, 2, 3, 0, 1]),
            Check.equal("Two wait where one has room", one.waited, [4, 5]),
            Check.close("Blocks that share a unit gain nothing", two.end, one.end, 1e-9),
            Check.close("Blocks that wait do", hidden.end, 1.0, 1e-9),
            Check.equal("The kernel begins with the last queries", starts, [20, 16, 12, 8, 4, 0]),
            Check.equal("The longest first ends earlier", longest.end < shortest.end, True),
        ),
        (
            _figure(
                "Equal blocks",
                [two, one],
                "Two slots on an SM share it, so each block takes twice as long: both end at "
                f"{two.end:g}, but with one slot two blocks wait.",
            ),
            _figure(
                "Blocks of a causal mask",
                [longest, shortest],
                f"The longest first ends after {longest.end:g} tiles, the shortest first after "
                f"{shortest.end:g}.",
            ),
        ),
    )


def _place(
    name: str,
    tiles: Sequence[int],
    slots: int,
    clocks: Callable[[float, int], float] = lambda tiles, together: float(tiles * together),
) -> Placed:
    """Blocks by the model's dispatch; clocks(tiles, together) of one that shares its SM."""
    found = dispatched(np.asarray(tiles), clocks, _SMS, slots)
    columns = found.sm, found.slot, found.start, found.end
    return Placed(name, list(zip(*(column.tolist() for column in columns), strict=True)))


def _busy(placed: Placed, slots: int) -> float:
    """The share of slots at work until the last block ends."""
    worked = sum(end - start for _, _, start, end in placed.blocks)
    return worked / (_SMS * slots * placed.end)


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _watch() -> tuple[list[int], list[int]]:
    """(first query, tiles of keys) of each block of a causal forward, in the order of blocks."""
    x = rows(np.random.default_rng(6).standard_normal((_TOKENS, 8)))
    with watched(kernel, "last_of") as calls, watched(kernel, "tiles_seen") as seen:
        numflash.attention(x, x, x, causal=True, config=PORTABLE)
    starts = [int(arguments[0]) for arguments, _ in calls]
    return starts, [int(tiles[1] - tiles[0]) for _, tiles in seen]


_LEFT, _RIGHT, _SLOT, _GAP = 44.0, 340.0, 15.0, 22.0
_ROLES = ("s", "pv", "copy", "exp", "max", "full")


def _figure(title: str, ways: list[Placed], said: str) -> Figure:
    x = Axis(0.0, max(placed.end for placed in ways), _LEFT, _RIGHT)
    parts, y = [], 16.0
    for placed in ways:
        slots = 1 + max(slot for _, slot, *_ in placed.blocks)
        parts.append(text(4, y - 4, f"{placed.name}: ends after {placed.end:g}", "bold"))
        for sm in range(_SMS):
            parts.append(text(4, y + (sm + 0.5) * slots * _SLOT + 4, f"SM {sm}", "muted"))
        parts += [_block(n, *block, x, y, slots) for n, block in enumerate(placed.blocks)]
        y += _SMS * slots * _SLOT + _GAP
    return Figure(
        title,
        escaped(f"The number is the block. {said}"),
        chart(said, joined(parts), height=y - _GAP + 6),
        Table(
            ("", "block", "SM", "begins", "ends"),
            [
                (placed.name, n, sm, f"{start:g}", f"{end:g}")
                for placed in ways
                for n, (sm, _, start, end) in enumerate(placed.blocks)
            ],
            range(1, 5),
        ),
    )


def _block(n, sm, slot, start, end, x: Axis, y: float, slots: int) -> Markup:
    box = (x(start), y + (sm * slots + slot) * _SLOT, x(end) - x(start) - 1.5, _SLOT - 2)
    role = _ROLES[n % len(_ROLES)]
    shown = f"block {n} on SM {sm}, {start:g} to {end:g}"
    return joined([rect(*box, role, shown), boxed_text(box, str(n), f"on-{role}", 11)])
