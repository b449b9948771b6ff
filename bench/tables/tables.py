"""Records as tables: Markdown, which is also what a terminal gets.

A time counts if the method's results were right (`records.entries.is_right`); everything else is
a word that says why there is no number.
"""

from collections.abc import Iterable
from typing import Any

from bench.peers import methods as peers
from bench.points import interleave, work
from bench.points.points import Point
from bench.points.work import Ceilings
from bench.records.entries import is_right

_WORDS = {
    "unavailable": "-",
    "failed": "failed",
    "out of memory": "no memory",
    "crashed": "crashed",
    "left out": "no time",
}
FP8_NOTE = (
    "FP8: sm_89, sm_120 and sm_121 have an instruction for products of 8-bit floats through "
    "mma.sync (QMMA), sm_90 through wgmma (QGMMA), where a tile of keys has one scale. On sm_100 "
    "the assembler makes conversions and float16 products of mma.sync's, and before sm_89 there "
    "is none: there the FP8 forward multiplies float16 (HMMA), saves memory, and cannot be faster "
    "than 16 bits."
)
_RATIO_NOTE = (
    "Ratios are numflash's speed over the peer's, the median of rounds in which both ran in turn; "
    "above 1 numflash is faster."
)


def markdown(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table whose columns are lined up."""
    lines = [[str(cell) for cell in line] for line in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def render(cells: list[str]) -> str:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        return "| " + " | ".join(padded) + " |"

    ruler = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([render(lines[0]), ruler, *map(render, lines[1:])])


def ceilings_of(record: dict) -> Ceilings | None:
    """The ceilings that a record measured; None if it was cut short before."""
    found = record.get("ceilings", {})
    if "matmul_tflops" not in found:
        return None
    clock = record.get("max_sm_clock_mhz")
    return Ceilings(found["matmul_tflops"], found["copy_gbps"], found["num_sms"], clock)


def method_names(points: list[dict]) -> list[str]:
    """The methods of some points that gave at least one time, numflash first."""
    names = [n for p in points for n, e in p["methods"].items() if "median_ms" in e]
    known = [name for name in peers.PEERS if name in names]
    return list(dict.fromkeys([*known, *names]))


def untimed(points: list[dict]) -> str:
    """The methods that gave no time at any point, and why not in a word; "" if there are none."""
    timed = method_names(points)
    why = {n: e["status"] for p in points for n, e in p["methods"].items() if n not in timed}
    return ", ".join(f"{name} ({status})" for name, status in why.items())


def speeds(points: list[dict]) -> str:
    """TFLOP/s of every method, a row for each point of the grid."""
    names = method_names(points)
    header = ["dtype", "head_dim", "mask", "seqlen", *(f"{name} TFLOP/s" for name in names)]
    rows = []
    for entry in _in_order(points):
        point = Point.from_dict(entry)
        mask = "causal" if point.causal else "full"
        size = [point.dtype, point.head_dim, mask, point.seqlen_q]
        rows.append([*size, *(_speed(entry["methods"].get(name)) for name in names)])
    return markdown(header, rows)


def ratios(points: list[dict]) -> str:
    """numflash against each peer: geometric mean, extremes, and how many points went into it."""
    by_peer: dict[str, list[float]] = {}
    for entry in points:
        for name, ratio in entry.get("ratios", {}).items():
            by_peer.setdefault(name, []).append(ratio)
    rows = [
        [
            name,
            f"{interleave.geometric_mean(found):.2f}",
            f"{min(found):.2f} to {max(found):.2f}",
            len(found),
        ]
        for name, found in sorted(by_peer.items())
    ]
    if not rows:
        return "No point has both numflash and a peer."
    header = ["peer", "geometric mean of ratios", "smallest to largest", "points"]
    return f"{markdown(header, rows)}\n\n{_RATIO_NOTE}"


def point_ratios(points: list[dict]) -> str:
    """numflash against each peer, point by point."""
    names = sorted({name for entry in points for name in entry.get("ratios", {})})
    rows = []
    for entry in _in_order(points):
        found = [entry.get("ratios", {}).get(name) for name in names]
        texts = ["-" if r is None else f"{r:.2f}" for r in found]
        rows.append([Point.from_dict(entry), *texts])
    return markdown(["numflash / peer", *names], rows)


def fractions(points: list[dict], ceilings: Ceilings) -> str:
    """numflash against what the device reached in the same run."""
    rows = []
    for entry in _in_order(points):
        ours = entry["methods"].get(peers.OURS)
        if ours is None or not is_right(ours):
            continue
        point = Point.from_dict(entry)
        floor = work.floor_ms(point, ceilings)
        bound = max((name for name in floor if name != "floor"), key=floor.get)
        rows.append(
            [
                point,
                f"{ours['median_ms']:.3f}",
                f"{ours['tflops'] / ceilings.matmul_tflops:.0%}",
                f"{ours['gbps'] / ceilings.copy_gbps:.0%}",
                f"{floor['floor'] / ours['median_ms']:.0%} ({bound})",
                _number(entry.get("sm_clock_mhz")),
                _number(entry.get("power_w")),
            ]
        )
    if not rows:
        return "numflash has no time at any point."
    header = ["point", "ms", "of matmul", "of copy", "of floor", "SM MHz", "W"]
    return markdown(header, rows)


def fp8(points: list[dict]) -> str:
    """The factor by which 8-bit floats are faster than 16 bits, as a table; "" without a time."""
    rows = []
    for entry in _in_order(points):
        names = peers.FP8, peers.FP8_QUANTIZING
        found = [entry.get("ratios", {}).get(name) for name in names]
        if any(found):
            texts = ["-" if r is None else f"{1 / r:.2f}" for r in found]
            times = (entry["methods"].get(name, {}) for name in (peers.OURS, *names))
            texts = [*(f"{t['median_ms']:.3f}" if is_right(t) else "-" for t in times), *texts]
            rows.append([Point.from_dict(entry), *texts])
    if not rows:
        return ""
    both = "and quantisation"
    header = ["point", "16 bits ms", "FP8 ms", f"{both} ms", "FP8 / 16 bits", both]
    return (
        f"{markdown(header, rows)}\n\nSpeeds over numflash's in 16 bits, the median of rounds in "
        f"which both ran in turn; once on arrays that are in 8 bits already.\n\n{FP8_NOTE}"
    )


def decode(points: list[dict], ceilings: Ceilings | None) -> str:
    """Decoding: time, bandwidth, and its fraction of the copy's."""
    rows = []
    for entry in points:
        for name, method in entry["methods"].items():
            if not is_right(method):
                continue
            fraction = "-" if ceilings is None else f"{method['gbps'] / ceilings.copy_gbps:.0%}"
            time_us = f"{1e3 * method['median_ms']:.1f}"
            rows.append([Point.from_dict(entry), name, time_us, f"{method['gbps']:.0f}", fraction])
    if not rows:
        return "Decoding has no time."
    return markdown(["decoding", "method", "us", "GB/s", "of copy"], rows)


def caches(points: list[dict], ceilings: Ceilings | None) -> str:
    """Queries over a cache: of each method the share of a copy's bandwidth that K and V take."""
    names = method_names(points)
    header = ["queries", "keys", "batch", "page", "GB of K and V", *names]
    rows = []
    for entry in points:
        point = Point.from_dict(entry)
        page = point.page_size or "-"
        moved = f"{work.cache_bytes(point) / 1e9:.3g}"
        cells = [_share(point, entry["methods"].get(name), ceilings) for name in names]
        rows.append([point.seqlen_q, point.seqlen_k, point.batch, page, moved, *cells])
    if not names:
        return "No method has a time at any point."
    unit = "microseconds" if ceilings is None else "microseconds, and share of a copy's bandwidth"
    return f"{markdown(header, rows)}\n\nOf each method {unit}: the bytes of K and V alone."


def _share(point: Point, method: dict | None, ceilings: Ceilings | None) -> str:
    if method is None:
        return "-"
    if not is_right(method):
        return "wrong" if "median_ms" in method else _WORDS.get(method["status"], "-")
    milliseconds = method["median_ms"]
    text = f"{1e3 * milliseconds:.1f}"
    if ceilings is None:
        return text
    return f"{text} ({work.share_of_copy(point, milliseconds, ceilings):.0%})"


def sequences(points: list[dict]) -> str:
    """TFLOP/s of every method on sequences one after another: of the work that these have."""
    names = method_names(points)
    header = ["direction", "head_dim", "sequences", "mean", "longest", *names]
    rows = []
    for entry in points:
        point = Point.from_dict(entry)
        sizes = point.batch, point.seqlen_k, max(point.seqlens)
        cells = [_speed(entry["methods"].get(name)) for name in names]
        rows.append([point.direction, point.head_dim, *sizes, *cells])
    return markdown(header, rows) if names else "No method has a time at any point."


def host(found: dict) -> str:
    """Host time of a call."""
    rows = [
        [name, f"{entry['median_us']:.1f}" if "median_us" in entry else entry["reason"]]
        for name, entry in found.items()
    ]
    return markdown(["method", "host microseconds of a forward call"], rows)


def problems(points: list[dict]) -> str:
    """Every method that has no time, or a wrong result, once for each reason; "" if none."""
    seen: dict[tuple[str, str], str] = {}
    for entry in points:
        for name, method in entry["methods"].items():
            reason = method.get("reason")
            if reason is None and method.get("check", {}).get("outcome") == "failed":
                check = method["check"]
                reason = f"wrong result: errors {check['errors']}, budgets {check['budgets']}"
            if reason is not None:
                seen.setdefault((name, reason[:160]), str(Point.from_dict(entry)))
    lines = [f"- {name}, first at {point}: {reason}" for (name, reason), point in seen.items()]
    return "\n".join(lines)


def _speed(method: dict | None) -> str:
    if method is None:
        return "-"
    if "median_ms" not in method:
        return _WORDS.get(method["status"], method["status"])
    return f"{method['tflops']:.0f}" if is_right(method) else "wrong"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _in_order(points: list[dict]) -> list[dict]:
    keys = ("dtype", "head_dim", "causal", "seqlen_q", "seqlen_k")
    return sorted(points, key=lambda entry: [entry[key] for key in keys])
