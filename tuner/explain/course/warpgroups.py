"""Lesson 7: specialised warps, turns between warpgroups, and products that overlap a softmax."""

from functools import cache

from numflash.configs import Traits, parse_config

from ...drawing.axes import Axis, text
from ...drawing.figures import Figure, Table, swatch
from ...drawing.markup import Markup, joined
from ...drawing.shapes import boxed_text, boxes, ruler, strip
from ...pipeline.engine import play
from ...pipeline.programs import program_of
from ...pipeline.rates import Rates, rates_of
from ...pipeline.timeline import Timeline
from ...space.machines import find
from .lesson import Check, Lesson, Slip, Step

_GPU = "NVIDIA H100 80GB HBM3"
_PLAIN = "sm90-m128n128w8s2"
_WAYS = {
    "as they come": _PLAIN,
    "overlap": f"{_PLAIN}-overlap",
    "turns": f"{_PLAIN}-pingpong",
    "turns and overlap": f"{_PLAIN}-overlap-pingpong",
}
_TILES = 24
# FlashAttention-3, arXiv 2407.08608: the abstract, and Table 2 (head_dim 128, 16 heads, 8448
# tokens, 4 sequences, float16, H100), TFLOP/s.
_SHARE_OF_FA2 = 0.35
_ABLATION = {"all": 661, "no overlap": 582, "no specialised warps": 570}


def lesson() -> Lesson:
    """Warp specialisation, ping-pong and two stages."""
    small = {way: _timeline(name, 64)[0] for way, name in _WAYS.items()}
    large = {way: _timeline(name, 128)[0] for way, name in _WAYS.items()}
    rates = _timeline(_PLAIN, 64)[1]
    turns = {way: timeline.turn for way, timeline in small.items()}
    floor = 2 * sum(rates.products.values())
    machine = find(_GPU)
    peak = 2 * machine.wgmma_f16 * machine.num_sms * machine.clock_mhz * 1e6 / 1e12
    gain = turns["as they come"] / turns["turns"]
    return Lesson(
        7,
        "Specialised warps, turns, and two stages",
        "FlashAttention-3 has three tricks on Hopper: a warp that only copies, warpgroups that "
        "take turns (ping-pong), and products that overlap a softmax. What does each one hide?",
        (
            _clocks_step(rates, floor),
            _turns_step(small, large, gain),
            Step(
                "What was measured",
                "By Table 2 of FlashAttention-3 (arXiv 2407.08608; head_dim 128, H100) all three "
                f"together reach {_ABLATION['all']} TFLOP/s, without overlap "
                f"{_ABLATION['no overlap']}, without specialised warps "
                f"{_ABLATION['no specialised warps']}. No GPU has run ours.",
                "published",
            ),
        ),
        (
            Slip(
                "Ping-pong is between two buffers of K and V.",
                "It is between two warpgroups: one multiplies while the other computes its "
                "softmax. Two buffers are two stages of copies, which is another matter. And the "
                "two stages of FlashAttention-3's overlap are those of one warpgroup: S of the "
                "next tile beside the softmax of this one.",
            ),
            Slip(
                "FlashAttention-2 reaches 500 to 600 TFLOP/s on an H100.",
                f"The abstract of FlashAttention-3 says {_SHARE_OF_FA2:.0%} of the peak: of "
                f"{peak:.0f} TFLOP/s that is about {_SHARE_OF_FA2 * peak:.0f}.",
            ),
            Slip(
                "Specialised warps are faster because they work in parallel.",
                "All warps do. A warp that only copies needs few registers, and gives its share "
                "to those that multiply; and it waits for buffers where they would have to.",
            ),
        ),
        (
            Check("Turns pay at head_dim 64", gain > 1.2, f"{gain:.2f} times as fast"),
            Check(
                "So does overlap, less",
                turns["turns"] < turns["overlap"] < turns["as they come"],
                f"{turns['overlap']:,.0f} clocks",
            ),
            Check(
                "Both together are best",
                turns["turns and overlap"] == min(turns.values()),
                f"{turns['turns and overlap']:,.0f} clocks",
            ),
            Check(
                "Nothing is faster than the tensor cores",
                all(turn >= floor - 1 for turn in turns.values()),
                f"{floor:,.0f} clocks",
            ),
            Check(
                "At 128 turns alone keep the tensor cores busy",
                large["turns"].busy["tensor"] > 0.95,
                f"{large['turns'].busy['tensor']:.0%}",
            ),
            Check.close("35 % of the peak", _SHARE_OF_FA2 * peak, 350, 10),
        ),
        (_figure({way: small[way] for way in ("as they come", "turns", "turns and overlap")}),),
    )


@cache
def _timeline(name: str, head_dim: int) -> tuple[Timeline, Rates]:
    """A block alone on its SM, with copies that take no time."""
    config = parse_config("forward", name)
    traits = Traits("bfloat16", head_dim, head_dim, vectorized=True)
    program = program_of(config, traits, _TILES)
    rates = rates_of(program, find(_GPU), config, traits).with_copies(0.0)
    return play(program, rates), rates


def _clocks_step(rates: Rates, floor: float) -> Step:
    products, exponentials = sum(rates.products.values()), rates.work["exp"]
    return Step(
        "Two scarce units",
        "A block has two warpgroups that multiply, and a producer that only copies. A warpgroup "
        f"has 64 queries and meets 128 keys at a time. At head_dim 64 its products S and PV take "
        f"{products:.0f} clocks of the tensor cores and its exponentials {exponentials:.0f} of "
        "the units that compute them, which do 16 a clock: as long! Maxima and conversions come "
        f"on top. Two warpgroups need {floor:,.0f} clocks of the tensor cores for a tile, so this "
        "is the best that can be, if everything else hides behind it.",
        "model",
        Table(
            ("step of a warpgroup", "unit", "clocks"),
            [
                ("S and PV", "tensor cores", f"{products:.0f}"),
                ("exponentials", "special functions", f"{exponentials:.0f}"),
                ("maxima", "its own", f"{rates.work['max']:.0f}"),
                ("conversions", "its own", f"{rates.work['pack']:.0f}"),
            ],
            (2,),
            "By formula, of a tile of 64 x 128 at head_dim 64",
        ),
    )


def _turns_step(small: dict, large: dict, gain: float) -> Step:
    found = [
        (
            way,
            f"{small[way].turn:,.0f}",
            f"{small[way].busy['tensor']:.0%}",
            f"{large[way].turn:,.0f}",
            f"{large[way].busy['tensor']:.0%}",
        )
        for way in _WAYS
    ]
    return Step(
        "Turns break the lockstep",
        "Left alone, both warpgroups do nearly the same at the same time: both multiply and share "
        "the tensor cores, then both want exponentials while the tensor cores have nothing to do. "
        "A turn, which is a barrier between the two, lets one multiply while the other is in its "
        f"softmax: {gain:.2f} times as fast at head_dim 64. Overlap within a warpgroup hides some "
        "of what is left. With head_dim 128 products are twice as long and exponentials are not, "
        "so turns alone keep the tensor cores busy. Copies take no time in this model, to show "
        "the rest by itself.",
        "model",
        Table(
            ("", "d = 64: clocks", "tensor cores", "d = 128: clocks", "tensor cores "),
            found,
            range(1, 5),
            "A tile of keys for both warpgroups, and how busy the tensor cores are",
        ),
    )


_LEFT, _RIGHT, _ROW, _GAP, _TOP = 150.0, 905.0, 17.0, 26.0, 20.0
_KINDS = {
    "S": "s", "PV": "pv", "exp": "exp", "max": "max", "pack": "max", "mask": "edge",
    "products": "under", "issue": "under", "wait": "wait", "turn": "wait",
}  # fmt: skip


def _figure(timelines: dict[str, Timeline]) -> Figure:
    clocks = 2 * max(timeline.turn for timeline in timelines.values())
    x = Axis(0.0, clocks, _LEFT, _RIGHT)
    parts, numbers, y = [], [], _TOP
    for way, timeline in timelines.items():
        shown = f"{way}: {timeline.turn:,.0f} clocks a tile"
        parts.append(text(8, y - 5, shown, "bold"))
        rows = [(f"warpgroup {lane[-1]}", lane, None) for lane in ("WG 0", "WG 1")]
        for name, lane in (("tensor cores", "tensor"), ("exponentials", "exponentials")):
            rows += [(f"{name}, of {owner[-1]}", lane, owner) for owner in ("WG 0", "WG 1")]
        for name, lane, owner in rows:
            parts.append(text(_LEFT - 8, y + 12, name, "muted small", "end"))
            parts.append(_lane(timeline, lane, owner, x, y))
            y += _ROW
        parts.append(text(_RIGHT + 8, y - 3 * _ROW, f"{timeline.busy['tensor']:.0%}", "bold"))
        numbers.append(
            (way, f"{timeline.turn:,.0f}", *(f"{timeline.busy[u]:.0%}" for u in _UNITS))
        )
        y += _GAP
    parts.append(ruler(x, y - 14, "clocks of the SM, in the steady state"))
    first, last = (round(timelines[way].turn) for way in ("as they come", "turns"))
    return Figure(
        "Two warpgroups at head_dim 64, in time",
        joined(
            [
                swatch("s", "S = Q Kᵀ"),
                swatch("pv", "O += P V"),
                swatch("under", "waits for its products"),
                swatch("exp", "exponentials"),
                swatch("max", "maxima, conversions"),
                swatch("wait", "waits for its turn."),
                "On the right, how busy the tensor cores are. A model of events in the kernel's "
                "program order; copies take no time.",
            ]
        ),
        strip(
            "Without turns both warpgroups do nearly the same at once, and a tile takes "
            f"{first:,} clocks; with turns one multiplies while the other computes, and it takes "
            f"{last:,}.",
            *parts,
            height=y + 28,
        ),
        Table(("", "clocks a tile", *_UNITS.values()), numbers, range(1, 4)),
        wide=True,
    )


_UNITS = {"tensor": "tensor cores busy", "exponentials": "exponentials busy"}


def _lane(timeline: Timeline, lane: str, owner: str | None, x: Axis, y: float) -> Markup:
    """The spans of a lane in the window that the axis shows, a path for each kind."""
    start = timeline.steady[0]
    found: dict[str, list] = {}
    labels = []
    for span in timeline.of(lane, owner):
        begin, end = max(span.start - start, 0.0), min(span.end - start, x.high)
        if end <= begin:
            continue
        role = _KINDS[span.kind]
        box = (x(begin), y, x(end) - x(begin), _ROW - 3)
        found.setdefault(role, []).append(box)
        labels.append(boxed_text(box, span.label or span.kind, f"on-{role} small", 10.1))
    ground = boxes([(x.start, y, x.end - x.start, _ROW - 3)], "none")
    drawn = [boxes(each, role, role) for role, each in found.items()]
    return joined([ground, *drawn, *labels])
