"""`python -m bench report`: tables and figures of README and docs/fp8.md, from `bench/results`.

The newest record of a device that measured a point is the one that counts, and a point is taken
whole, so that ratios are of methods that ran in turn. A point without a record is called "not
yet measured"; no number comes from anywhere else. `bench.fp8_accuracy.section` draws the accuracy
of FP8.
"""

import argparse
from pathlib import Path

from bench.fp8_accuracy import section as fp8_section
from bench.points.points import DIRECTIONS, Point
from bench.records import record
from bench.records.checks import ROOT
from bench.records.entries import is_measured, is_right
from bench.tables import figures, quantization, tables
from numflash.machine_code import sources

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
FP8_BEGIN, FP8_END = "<!-- bench:fp8:begin -->", "<!-- bench:fp8:end -->"
_NOT_VERIFIED, _NOT_MEASURED = "not yet verified on hardware", "not yet measured"


def add_command(commands) -> None:
    """Add `report` to the commands of `python -m bench`."""
    parser = commands.add_parser("report", help=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of records")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file to write to")
    parser.add_argument(
        "--figures", type=Path, default=ROOT / "docs" / "figures", help="folder of the plots"
    )
    parser.add_argument(
        "--fp8-figure", type=Path, default=ROOT / "docs" / "fp8-accuracy.svg", help="plot of FP8"
    )
    parser.add_argument(
        "--fp8-page", type=Path, default=ROOT / "docs" / "fp8.md", help="page of FP8's accuracy"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write README and FP8's page between their markers; 1 if one lacks its markers.

    FP8's page stays as it is where there is no record of it.
    """
    records = record.read_all(arguments.results)
    records = [found for found in records if found["name"] != fp8_section.FILE_NAME]
    fp8 = fp8_section.read(arguments.results)
    readme, page = arguments.readme, arguments.fp8_page
    pages = {readme: (render(records, arguments.figures, readme.parent), BEGIN, END)}
    if fp8 is not None:
        text = fp8_section.render(fp8, arguments.fp8_figure, page.parent)
        pages[page] = (text, FP8_BEGIN, FP8_END)
    updated = {}
    for path, part in pages.items():
        try:
            updated[path] = replace_between(path.read_text(), *part)
        except ValueError as error:
            print(f"{path}: {error}")
            return 1
    for path, text in updated.items():
        path.write_text(text)
    print(f"{readme}: {len(records)} records")
    return 0


def replace_between(text: str, new: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with what stands between the markers replaced.

    Raises:
        ValueError: the markers are not there, or not once, or in the wrong order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"needs one {begin} and after it one {end}")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{new.strip()}\n{end}{rest.partition(end)[2]}"


def render(records: list[dict], figures_folder: Path, relative_to: Path) -> str:
    """The text between the markers; draws the figures on the way."""
    devices = list(dict.fromkeys(r["device"] for r in records if r.get("device")))
    parts = [_summary(records, devices)]
    for device in devices:
        mine = [r for r in records if r.get("device") == device]
        for direction in DIRECTIONS:
            points = newest_points(mine, direction)
            if points:
                parts.append(_section(device, direction, points, figures_folder, relative_to))
        parts += _gpt2(mine, device)
        measured = [r for r in mine if quantization.is_measured(r.get("quantize"))]
        if measured:
            parts += [f"#### {device}, quantisation", quantization.table(measured[-1]["quantize"])]
    return "\n\n".join(parts)


def newest_points(records: list[dict], direction: str, kind: str = "grid") -> list[dict]:
    """The newest measurement of every point, each with its "record"; `records` oldest first."""
    newest: dict[Point, dict] = {}
    for found in records:
        for entry in found.get("points", []):
            is_wanted = entry["direction"] == direction and entry["kind"] == kind
            if is_wanted and is_measured(entry):
                newest[Point.from_dict(entry)] = {**entry, "record": found}
    return list(newest.values())


def _summary(records: list[dict], devices: list[str]) -> str:
    today = sources.source_hash()
    rows = []
    for device in devices:
        mine = [r for r in records if r.get("device") == device]
        outcomes: dict[str, dict[str, str]] = {}
        for found in mine:
            checks = {n: c["outcome"] for n, c in found.get("checks", {}).items()}
            outcomes.setdefault(found.get("source_hash"), {}).update(checks)
        checks = outcomes.get(today, {})
        if checks:
            passed = sum(outcome == "passed" for outcome in checks.values())
            checked = f"{passed} of {len(checks)}"
        else:
            older = any(outcomes.values())
            checked = f"{_NOT_VERIFIED}{' with the kernels of today' if older else ''}"
        grid = {d: len(newest_points(mine, d)) for d in DIRECTIONS}
        measured = ", ".join(f"{d}: {n} points" for d, n in grid.items() if n) or _NOT_MEASURED
        rows.append([device, checked, measured])
    if not rows:
        rows = [["all", _NOT_VERIFIED, _NOT_MEASURED]]
    return tables.markdown(["GPU", "checks passed", "benchmark"], rows)


def _section(device, direction, points, figures_folder: Path, relative_to: Path) -> str:
    """Ratios, fractions and figures of one device and direction."""
    last = points[-1]["record"]
    commit = (last.get("commit") or "unknown")[:10]
    parts = [
        f"#### {device}, {direction}",
        f"Driver {last.get('driver')}, commit {commit}, {last.get('date')}; 16k tokens, hidden "
        "size 2,048, random normal inputs, cold L2.",
        tables.speeds(points),
        tables.ratios(points),
        *filter(None, [tables.fp8(points)]),
    ]
    if untimed := tables.untimed(points):
        parts.append(f"No time at any point: {untimed}.")
    if stale := sum(p["record"].get("source_hash") != sources.source_hash() for p in points):
        parts.append(f"{stale} of {len(points)} points were measured with older kernels.")
    ceilings = tables.ceilings_of(last)
    if ceilings is not None:
        reached = f"{ceilings.matmul_tflops:.0f} TFLOP/s, a copy {ceilings.copy_gbps:.0f} GB/s"
        parts.append(f"In the same run a matrix product reached {reached}.")
        # The fraction of a floor is one of the same run.
        same = [point for point in points if point["record"] is last]
        parts.append(tables.fractions(same, ceilings))
        decoding = [p for p in newest_points([last], direction, "decode")]
        if decoding:
            parts.append(tables.decode(decoding, ceilings))
    parts += _figures(device, direction, points, figures_folder, relative_to)
    return "\n\n".join(parts)


def _figures(device, direction, points, folder: Path, relative_to: Path) -> list[str]:
    lines = []
    for dtype in sorted({point["dtype"] for point in points}):
        chosen = [point for point in points if point["dtype"] == dtype]
        name = "".join(c if c.isalnum() else "-" for c in f"{device}-{direction}-{dtype}".lower())
        ceilings = tables.ceilings_of(chosen[-1]["record"])
        try:
            drawn = figures.draw(chosen, ceilings, f"{device}, {direction}, {dtype}", name, folder)
        except ImportError:
            print(figures.NO_MATPLOTLIB)
            return lines
        for path in drawn:
            try:
                link = path.resolve().relative_to(relative_to.resolve()).as_posix()
            except ValueError:
                link = path.as_posix()
            lines.append(f"![{path.stem}]({link})")
    return lines


def _gpt2(records: list[dict], device: str) -> list[str]:
    """The first paper's table: GPT-2 medium, forward and backward together."""
    found = {d: newest_points(records, d, "gpt2-medium") for d in DIRECTIONS}
    if not all(found.values()):
        return []
    totals: dict[str, float] = {}
    methods = [found[d][0]["methods"] for d in DIRECTIONS]
    for name in methods[0].keys() & methods[1].keys():
        if all(is_right(entries[name]) for entries in methods):
            totals[name] = sum(entries[name]["median_ms"] for entries in methods)
    ours = totals.get("numflash")
    if ours is None:
        return []
    rows = [
        [name, f"{total:.2f}", f"{total / ours:.2f}"]
        for name, total in sorted(totals.items(), key=lambda item: item[1])
    ]
    title = (
        f"{device}, GPT-2 medium (seqlen 1024, head_dim 64, 16 heads, batch 64, float16), forward "
        "and backward. The first paper's table: standard attention took 41.7 / 7.3 = 5.7 times as "
        "long (A100)."
    )
    return [title, tables.markdown(["method", "ms", "times numflash's"], rows)]
