"""The plot of FP8 accuracy: a bar for each method, the paper's figures as marks; SVG by hand.

It brings its own background, so that it can be read wherever it stands, and follows the reader's
choice of light or dark.
"""

import math
from pathlib import Path

from bench.fp8_accuracy.inputs import PAPER_HEAD_DIM
from bench.fp8_accuracy.methods import KERNELS, METHODS, NUMPY, SPECIFICATION
from tuner.drawing.axes import Axis, line, text, width_of
from tuner.drawing.markup import Markup, tag
from tuner.drawing.style import DARK, LIGHT

_ROW, _BAR = 24, 13
_PANEL, _GAP, _VALUE = 168, 22, 52
_FONT = 12
_LABELS = math.ceil(12 + max(width_of(method.label, _FONT) for method in METHODS))
_TOP = 50
_TOKENS = ("card", "text", "muted", "line", "axis", "accent", "second")
_ALL = (SPECIFICATION, NUMPY, KERNELS)


def draw(record: dict, path: Path) -> None:
    """Draw the paper's distribution, the activations and the sinks; write an SVG file."""
    cases = [case for name in _TITLES if (case := _find(record, name))]
    bottom = _TOP + _ROW * len(METHODS)
    width = _LABELS + len(cases) * (_PANEL + _GAP)
    notes = ["◆ FlashAttention-3, Table 3 (arXiv 2407.08608)"]
    if record["kernels"]["device"]:
        notes.append(f"| kernels on {record['kernels']['device']}")
    height = bottom + 28 + 16 * len(notes)
    parts = [
        tag("style", Markup(_style())),
        tag("rect", class_="card", width=width, height=height),
    ]
    for i, method in enumerate(METHODS):
        at = _TOP + _ROW * i + _BAR - 1
        parts.append(text(_LABELS - 8, at, method.label, None, "end"))
    for i, case in enumerate(cases):
        parts += _panel(case, _LABELS + i * (_PANEL + _GAP), bottom)
    for i, note in enumerate(notes):
        parts.append(text(_LABELS, bottom + 36 + 16 * i, note, "second-text"))
    svg = tag(
        "svg",
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
        aria_label="RMSE of attention in float16 and FP8 on three inputs, logarithmic",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{svg}\n")


def _find(record: dict, name: str) -> dict | None:
    """The input of this name, of the paper's head_dim if there are several."""
    cases = [case for case in record["inputs"] if case["name"] == name]
    return min(cases, key=lambda case: case["head_dim"] != PAPER_HEAD_DIM, default=None)


def _panel(case: dict, left: float, bottom: float) -> list[Markup]:
    """Title, axis, and a bar for each method."""
    found = {(e["method"], e["engine"]): e["rmse"] for e in case["methods"] if "rmse" in e}
    papers = {m.name: m.paper for m in METHODS if m.paper and case["name"] == "outliers"}
    values = [value for value in (*found.values(), *papers.values()) if value > 0]
    low = 10.0 ** math.floor(math.log10(min(values)))
    # Bars begin at a decade; their figures need room beyond the longest.
    axis = Axis(low, max(values), left, left + _PANEL - _VALUE, log=True)
    parts = [
        text(left, 18, _TITLES[case["name"]], "title"),
        text(left, 34, _sizes(case), "muted"),
    ]
    for exponent in range(round(math.log10(low)), math.floor(math.log10(max(values))) + 1):
        at = axis(10.0**exponent)
        parts.append(line(at, _TOP - 6, at, bottom, "grid"))
        parts.append(text(at, bottom + 14, f"1e{exponent}", "muted", "middle"))
    for i, method in enumerate(METHODS):
        top = _TOP + _ROW * i
        cpu = next((found[key] for e in _ALL[:2] if (key := (method.name, e)) in found), None)
        kernel, paper = found.get((method.name, KERNELS)), papers.get(method.name)
        ends = [axis(value) for value in (cpu, kernel, paper) if value]
        if cpu:
            bar = {"x": left, "y": top, "width": axis(cpu) - left, "height": _BAR}
            about = tag("title", f"{method.label}: {cpu:.3e}")
            parts.append(tag("rect", about, class_="bar", **bar))
            parts.append(
                text(max(ends) + 8, top + _BAR - 2, f"{cpu:.1e}".replace("e-0", "e-"), "muted")
            )
        if kernel:
            at, about = axis(kernel), f"{method.label}, kernels: {kernel:.3e}"
            parts.append(line(at, top - 3, at, top + _BAR + 3, "kernel", about))
        if paper:
            x, y = axis(paper), top + _BAR / 2
            about = tag("title", f"{method.label}, FlashAttention-3: {paper:.1e}")
            mark = f"M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z"
            parts.append(tag("path", about, d=mark, class_="paper"))
    parts.append(line(left, _TOP - 6, left, bottom, "axis"))
    return parts


_TITLES = {
    "outliers": "N(0,1) with outliers",
    "activations": "MiniLM activations",
    "sinks": "Attention sinks",
}


def _sizes(case: dict) -> str:
    return f"RMSE; d = {case['head_dim']}, {case['seqlen']:,} keys"


def _style() -> str:
    light, dark = (
        "".join(f"--{name}:{scheme[name]};" for name in _TOKENS) for scheme in (LIGHT, DARK)
    )
    return (
        f":root{{{light}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
        f'text{{fill:var(--text);font:{_FONT}px system-ui,-apple-system,"Segoe UI",Roboto,'
        '"Liberation Sans",sans-serif;font-variant-numeric:tabular-nums}'
        ".card{fill:var(--card)}.title{font-weight:600;font-size:13px}"
        ".muted{fill:var(--muted);font-size:11px}.grid{stroke:var(--line)}"
        ".axis{stroke:var(--axis)}.bar{fill:var(--accent)}"
        ".paper{fill:var(--second);stroke:var(--card)}.second-text{fill:var(--second);font-size:11px}"
        ".kernel{stroke:var(--text);stroke-width:3}"
    )
