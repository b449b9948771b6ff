"""Lesson 3: the softmax that goes along with the keys, and the kernel that is lazy about it."""

from dataclasses import dataclass

import numpy as np

from numflash.tiles.mma import softmax as on_tensor_cores
from numflash.tiles.portable import softmax as portable

from ...drawing.axes import HEIGHT, Axis, chart, circle, frame
from ...drawing.figures import Figure, Table, key
from ...drawing.markup import Markup, joined, tag
from .lesson import Check, Lesson, Slip, Step
from .looking import PORTABLE, TENSOR_CORES, Seen, see, watched

_LAG = float(on_tensor_cores.LAG)
_LOG2_E = float(np.log2(np.e))
_HIDDEN = -1000.0
"""A score whose weight is 0: it fills up a tile."""


@dataclass(frozen=True)
class Walk:
    """A row's walk: the result, and after each tile the number that the kernel subtracts."""

    seen: Seen
    subtracted: list[float]


def lesson() -> Lesson:
    """Online rescaling: exact, and lazy."""
    eager, lazy = _portable([(1, 2, 3), (4, 5, 6)]), _lazy([(1, 2, 3), (4, 5, 6)])
    jump = _lazy([(1, 2, 3), (7, 8, 9)])
    running = _running([1, 2, 3, 4, 5, 6])
    factor = float(np.exp(3 - 6))
    long = _long_row()
    walk = _lazy(long)
    moves = len(set(walk.subtracted)) - 1
    true = np.maximum.accumulate([max(tile) for tile in long]).tolist()
    growths = len(set(true)) - 1
    return Lesson(
        3,
        "Online softmax: go on before you know the maximum",
        "exp(x - max) needs the maximum of the whole row. How can the kernel add up tile after "
        "tile when the maximum is still to come?",
        (
            Step(
                "Repair what is there",
                "After 1, 2, 3 the maximum is 3 and the sum, relative to it, "
                f"{running[2]:.4f}. With 4, 5, 6 the maximum becomes 6. All that was added so far "
                f"is too large by exp(6 - 3), so sum and O are multiplied by exp(3 - 6) = "
                f"{factor:.4f}: {running[2]:.4f} x {factor:.4f} + {running[2]:.4f} = "
                f"{running[5]:.4f}. Six equal queries with a causal mask show it: query i sees "
                "the keys up to i, so its lse is the state after i keys.",
                "kernel",
                Table(
                    ("keys seen", "maximum", "sum relative to it"),
                    [(i + 1, i + 1, f"{x:.4f}") for i, x in enumerate(running)],
                    range(3),
                    "The state after each key",
                ),
            ),
            Step(
                "What the kernel subtracted",
                f"We watch two kernels walk over 1, 2, 3 in one tile and 4, 5, 6 in the next. "
                f"`{PORTABLE}` subtracts {_listed(eager)}, as the textbook does. "
                f"`{TENSOR_CORES}` subtracts {_listed(lazy)}: it did not follow. It moves only "
                f"when the maximum has grown by more than a factor of 2^{_LAG:g} = {2**_LAG:g} in "
                f"P, and exp(6 - 3) is only 2^{3 * _LOG2_E:.1f}. With 7, 8, 9 in the second tile "
                f"the factor is 2^{6 * _LOG2_E:.1f}, and it subtracts {_listed(jump)}.",
                "kernel",
            ),
            Step(
                "Lazy is right, too",
                "Any number may be subtracted, as long as sum and O share it: it cancels in O / "
                f"sum. P may then exceed 1, but by no more than {2**_LAG:g}, far from the end of "
                "float16 at 65504. The two kernels agree to "
                f"{np.abs(_weights(eager) - _weights(lazy)).max():.0e}, a rounding of float16. In "
                f"the row of the figure the maximum grows {growths} times, and the kernel "
                f"rescales {moves}.",
                "kernel",
            ),
        ),
        (
            Slip(
                "Every new maximum rescales O.",
                "It did in FlashAttention-1 and 2. Ours, after FlashAttention-4, rescales rarely. "
                "A warp decides by one vote, so a row may move because a neighbour must.",
            ),
            Slip(
                "O is divided by the sum in each tile.",
                "Once, at the end. FlashAttention-2 took that division out of the loop.",
            ),
        ),
        (
            Check.close("After three keys the sum", running[2], 1.5032, 5e-5),
            Check.close("After six keys the sum", running[5], 1.5781, 5e-5),
            Check.close("The factor", factor, 0.0498, 5e-5),
            Check.equal("The portable kernel follows each maximum", eager.subtracted, [3, 6]),
            Check.close("The lazy one does not", lazy.subtracted, [3, 3], 1e-3),
            Check.close("but beyond its lag it does", jump.subtracted, [3, 9], 1e-3),
            Check.close("Both give the same P", _weights(lazy), _weights(eager), 5e-4),
            Check(
                "What is subtracted is never more than the lag behind",
                all(
                    -1e-3 <= (t - s) * _LOG2_E <= _LAG + 1e-3
                    for t, s in zip(true, walk.subtracted, strict=True)
                ),
                f"{moves} moves for {growths} new maxima",
            ),
        ),
        (_figure(long, true, walk.subtracted, moves, growths),),
    )


def _long_row() -> list[tuple[float, ...]]:
    """Scores whose maximum grows often: 16 tiles."""
    random = np.random.default_rng(5)
    drift = np.linspace(0, 16, 16)[:, None]
    scores = drift + 1.5 * random.standard_normal((16, 8))
    return [tuple(tile) for tile in (8 * scores).round() / 8]  # exact in float16


def _filled(tiles: list[tuple[float, ...]], tile_n: int) -> np.ndarray:
    """(keys, 1): these scores at the beginning of each tile of keys."""
    keys = np.full((len(tiles), tile_n), _HIDDEN)
    for row, tile in zip(keys, tiles, strict=True):
        row[: len(tile)] = tile
    return keys.reshape(-1, 1)


def _weights(walk: Walk) -> np.ndarray:
    """The weights that are not 0, in the order of keys."""
    return walk.seen.p[0][walk.seen.p[0] > 0]


def _portable(tiles: list[tuple[float, ...]]) -> Walk:
    # Thread 0 asks for the maximum of row 0 once in a tile: it owns one row of four.
    with watched(portable, "row_max_of_lanes") as calls:
        seen = see([[1.0]], _filled(tiles, 8))
    return Walk(seen, [float(result) for _, result in calls])


def _lazy(tiles: list[tuple[float, ...]]) -> Walk:
    # Thread 0 owns rows 0 and 8, in this order in each tile; shifts are in base 2.
    with watched(on_tensor_cores, "shift_of_row") as calls:
        seen = see([[1.0]], _filled(tiles, 16), config=TENSOR_CORES, dtype=np.float16)
    return Walk(seen, [float(result) / _LOG2_E for _, result in calls[::2]])


def _running(scores: list[int]) -> np.ndarray:
    """The sum after each key, relative to the largest so far."""
    x = np.array(scores, float)
    seen = see(np.ones((len(x), 1)), x[:, None], causal=True)
    return np.exp(seen.lse - np.maximum.accumulate(x))


def _listed(walk: Walk) -> str:
    return " and then ".join(f"{x:.3g}" for x in walk.subtracted)


def _figure(tiles, true: list[float], subtracted: list[float], moves: int, growths: int) -> Figure:
    x = Axis(0.0, float(len(tiles)), 46, 340)
    y = Axis(min(map(min, tiles)) - 0.5, max(true) + 1, HEIGHT - 36, 16)
    dots = [
        circle(x(n + (j + 0.5) / len(tile)), y(score), 1.6, "dot")
        for n, tile in enumerate(tiles)
        for j, score in enumerate(tile)
    ]
    return Figure(
        "A row of 16 tiles: the true maximum, and what the lazy kernel subtracts",
        joined(
            [
                key("•", "k-accent", "scores"),
                key("┄", "k-second", "maximum so far"),
                key("━", "k-text", "subtracted"),
                f"{growths} new maxima, {moves} rescalings.",
            ]
        ),
        chart(
            f"The maximum grows {growths} times; what the kernel subtracts moves {moves} times.",
            frame(x, y, "tile of keys", "score"),
            *dots,
            _stairs(x, y, true, "budget", "maximum so far"),
            _stairs(x, y, subtracted, "outline", "what the kernel subtracts"),
        ),
        Table(
            ("tile", "maximum so far", "subtracted"),
            [
                (n, f"{t:.2f}", f"{s:.2f}")
                for n, (t, s) in enumerate(zip(true, subtracted, strict=True))
            ],
            range(3),
        ),
    )


def _stairs(x: Axis, y: Axis, values: list[float], class_: str, title: str) -> Markup:
    path = "".join(
        f"{'M' if n == 0 else 'L'}{x(n):.1f} {y(value):.1f}H{x(n + 1):.1f}"
        for n, value in enumerate(values)
    )
    return tag("path", tag("title", title), d=path, class_=class_)
