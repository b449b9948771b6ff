"""The page's charts: parsed, and what they draw compared with the records."""

import html
import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from numflash.runtime.devices import architecture, blocks_per_sm
from tests.support.drawings import SVG, faults, text_boxes, text_width
from tests.support.tuning_results import (
    BEST,
    PROBLEM,
    RECORDS,
    Page,
    measured,
    parsed,
    predicted_result,
    resources,
    result,
)
from tuner import report
from tuner.drawing.axes import FONT, Axis, width_of
from tuner.records import Record
from tuner.report import charts, tables
from tuner.report.occupancy import corner, occupancy


def hopper_result():
    """Predicted times of configs that differ in what is on."""
    times = {"": 2.0, "-overlap": 1.8, "-pingpong": 1.7, "-overlap-pingpong": 1.6}
    records = [
        Record(f"sm90-m128n128w8s2{on}", "predicted", predicted_ms=ms, resources=resources())
        for on, ms in times.items()
    ]
    records.append(Record("sm90-m128n256w8s1-persistent", "spilled", "144 bytes", resources()))
    return result(records, origin="predicted", best=records[3])


def svg(figure):
    return ElementTree.fromstring(figure.svg)


def of_class(drawing, name):
    return [e for e in drawing.iter() if name in e.get("class", "").split()]


def texts(drawing):
    return ["".join(e.itertext()) for e in drawing.iter(SVG + "text")]


def titles(elements):
    return [e.findtext(SVG + "title") for e in elements]


# --- its charts


def charts_of(found):
    """The charts of a result, parsed."""
    figures = [charts.history(found), charts.heat_map(found), charts.importances(found)]
    figures += [charts.agreement(found), *occupancy(found), charts.parts(found)]
    return [(figure.title, svg(figure)) for figure in figures if figure.svg]


def of_one_time(count, **changes):
    """A result whose times are all the same, so that all labels want one place."""
    records = [
        measured(f"sm80-m{16 * n}n64w4s1", 1.0, 1.0, resources=resources(255, 232448))
        for n in range(1, count + 1)
    ]
    return result(records, floor_ms={"matrix": 0.999}, **changes)


def scaled(found, factor):
    """A result in which everything takes so many times as long."""
    records = [
        replace(
            record,
            samples_ms=tuple(ms * factor for ms in record.samples_ms),
            predicted_ms=record.predicted_ms and record.predicted_ms * factor,
            parts={"matrix": 1.1 * factor, "shared_memory": 0.9 * factor, "fma": 0.01 * factor},
        )
        for record in found.records
    ]
    floors = {name: ms * factor for name, ms in found.floor_ms.items()}
    default, best = (next(r for r in records if r.config == each.config)
                     for each in (found.default, found.best))  # fmt: skip
    return replace(found, records=records, default=default, best=best, floor_ms=floors)


def far_corners():
    """Configs whose best lies where the curve of one block has its label, and wide tiles."""
    sizes = [(64 * n, 16 * n) for n in range(1, 13)]
    records = [
        measured(f"sm80-m{m}n{n}w4s1", 1 + n / 100, 1.0, resources=resources(250, 225_000))
        for m, n in sizes
    ]
    budgets = {"sram_budget_bytes": 4096, "min_occupancy": 0.0625, "max_registers": 253}
    names = ("consumer_registers", "heads_in_flight", "a_name_that_is_longer_than_a_chart_is_wide")
    return result(records, importances=dict.fromkeys(names, 0.33), budgets=budgets)


def on_a_label():
    """A best where the curve of three blocks has its label."""
    smem_bytes, registers = corner(architecture("sm_90a"), 128, 3)
    best = measured("sm80-m64n64w4s1", 1.0, resources=resources(registers - 8, smem_bytes - 4000))
    return result([best, *RECORDS])


@pytest.mark.parametrize("factor", [1e-3, 0.0123, 0.1, 1, 4.567, 98.7, 12345])
@pytest.mark.parametrize(
    "found",
    [
        *(result(), hopper_result(), predicted_result(), of_one_time(1), of_one_time(9)),
        *(far_corners(), on_a_label()),
    ],
    ids=["usual", "hopper", "predicted", "one time", "nine of one time", "far corners", "on a 3"],
)
def test_no_text_of_a_chart_is_cut_or_covers_another(found, factor):
    for title, drawing in charts_of(scaled(found, factor)):
        assert not faults(drawing, {"": FONT}), title
        for ring in of_class(drawing, "ring"):
            cx, cy = (float(ring.get(name)) for name in ("cx", "cy"))
            for line, (left, top, right, bottom) in text_boxes(drawing, {"": FONT}):
                apart = max(left - cx, cx - right), max(top - cy, cy - bottom)
                assert max(apart) > 4, (title, line)


def test_text_takes_no_more_than_is_thought():
    for line in (
        "consumer_registers",
        "best so far 1.250",
        "2.000",
        "shared memory per block, KB",
    ):
        assert 0.75 < text_width(line, FONT) / width_of(line) < 1.03, line


def test_history():
    drawing = svg(charts.history(result()))
    dots, hollow, ticks = (of_class(drawing, name) for name in ("dot", "hollow", "cross"))
    assert (len(dots), len(hollow), len(ticks)) == (4, 1, 5)
    assert titles(ticks)[0] == "trial 6: sm80-m256n128w4s1, spilled: 812 bytes"
    # On a logarithmic axis equal ratios are equal distances: 2 / 1.5 and 1.5 / 1.25, 3 / 1.25.
    y = [float(dot.get("cy")) for dot in dots]
    scale = (y[2] - y[3]) / math.log(3 / 1.25)
    assert y[1] - y[0] == pytest.approx(scale * math.log(2 / 1.5), abs=0.11)
    assert [float(dot.get("cx")) for dot in dots] == sorted(float(dot.get("cx")) for dot in dots)
    (ring,) = of_class(drawing, "ring")
    assert ring.get("cx") == dots[2].get("cx") and ring.get("cy") == dots[2].get("cy")
    (step,) = of_class(drawing, "step")
    levels = [float(n) for n in re.findall(r"V([\d.]+)", step.get("d"))]
    assert levels == [pytest.approx(y[1]), pytest.approx(y[2])]
    assert {"best so far 1.250", "default 2.000", "floor 0.7500"} <= set(texts(drawing))
    assert "failed (5)" in charts.history(result()).caption


def test_history_leaves_far_lines_out_and_says_so():
    figure = charts.history(result(floor_ms={"matrix": 0.01}))
    assert not of_class(svg(figure), "floor")
    assert "The floor, 0.01000 ms, is below the picture" in figure.caption
    figure = charts.history(result(default=measured("sm80-m16n16w1s1", 99.0)))
    assert not of_class(svg(figure), "default")
    assert "The default, 99.00 ms, is above the picture" in figure.caption


@pytest.mark.parametrize("outlier", [9.0, 9000.0])
def test_outliers_do_not_flatten_the_pictures(outlier):
    records = [*RECORDS[:4], replace(RECORDS[4], samples_ms=(outlier,), predicted_ms=outlier)]
    # From 1.25 to 3 ms, as far apart as without the outlier.
    alone, found = result(RECORDS[:4]), result(records)
    for chart in (charts.history, charts.agreement):
        spans = []
        for each in (alone, found):
            heights = [float(dot.get("cy")) for dot in of_class(svg(chart(each)), "dot")[:4]]
            spans.append(max(heights) - min(heights))
        assert spans[1] > 0.8 * spans[0]
    figure = charts.history(found)
    (far,), (arrow,) = (of_class(svg(figure), name) for name in ("hollow", "beyond"))
    assert titles([far]) == ["trial 5: " + charts.described(records[4])]
    assert float(far.get("cy")) < 30 and arrow.get("d").startswith("M")
    assert "slower than 3.750 ms (1)" in figure.caption
    assert not of_class(svg(charts.history(alone)), "beyond")
    assert "slower than" not in charts.history(alone).caption
    colours = {e.get("class") for e in svg(charts.heat_map(found)).iter(SVG + "rect")}
    assert colours >= {"heat0", "heat1", "heat6"} and "and more" in charts.heat_map(found).caption


def test_what_was_never_compiled_is_not_called_stopped():
    never = Record("sm80-m16n64w4s1", "estimated", "not compiled: ...", predicted_ms=3.5)
    offline = predicted_result()
    caption = charts.history(replace(offline, records=[*offline.records, never])).caption
    assert "not compiled" in html.unescape(caption) and "stopped" not in caption
    caption = charts.history(result()).caption
    assert "stopped early, slow" in caption and "not compiled" not in caption


def test_the_speed_is_that_of_what_was_timed():
    found = result()
    assert found.tflops(BEST) == pytest.approx(4 * 64 * 64 * 4096 * 4097 / 2 / 1.25e-3 / 1e12)
    halved = replace(BEST, batch_heads=32)
    assert found.tflops(halved) == found.tflops(BEST) / 2
    assert replace(found, origin="predicted").tflops(halved) == pytest.approx(
        found.tflops(BEST) * 1.25 / 1.2
    )
    assert found.tflops(RECORDS[-1]) is None
    full, window = (replace(found, problem=replace(PROBLEM, mask=m)) for m in ("full", "window64"))
    assert full.tflops(BEST) == pytest.approx(4 * 64 * 64 * 4096**2 / 1.25e-3 / 1e12)
    assert window.tflops(BEST) == pytest.approx(4 * 64 * 64 * 4096 * 64 / 1.25e-3 / 1e12, rel=0.01)
    families = {"backward-dq": 3, "backward-dkdv": 4, "backward": 5}
    for family, products in families.items():
        each = replace(full, problem=replace(full.problem, family=family))
        assert each.tflops(BEST) == pytest.approx(full.tflops(BEST) * products / 2)
    assert replace(found, problem=replace(PROBLEM, family="delta")).tflops(BEST) is None
    assert "1.250 ms , 110 TFLOP/s" in parsed(found).all_text


def test_history_counts_what_has_no_comparable_time():
    figure = charts.history(result([*RECORDS, Record("m64n32w4", "predicted", predicted_ms=0.1)]))
    assert "1 without a measured time are not shown" in figure.caption
    assert "best so far 1.250" in texts(svg(figure))


def test_heat_map():
    drawing = svg(charts.heat_map(result([*RECORDS, measured("sm80-m256n32w8s1", 4.0)])))
    cells = {title: e for e in drawing.iter(SVG + "rect") if (title := e.findtext(SVG + "title"))}
    # 6 tile_m, of them 512 and 16, times 4 tile_n.
    assert len(cells) == 6 * 4
    (best,) = [e for title, e in cells.items() if title.startswith("tile 128 x 64: ")]
    assert best.get("class") == "heat0"
    (slowest,) = [e for title, e in cells.items() if title.startswith("tile 32 x 32: ")]
    assert slowest.get("class") == "heat6"
    (ring,) = of_class(drawing, "ring-heat")
    assert float(ring.get("x")) == pytest.approx(float(best.get("x")) + 1.5, abs=0.11)
    assert float(ring.get("y")) == pytest.approx(float(best.get("y")) + 1.5, abs=0.11)
    # 64 x 64 was tried with one stage and with two: the better one counts.
    shown = [t for t in texts(drawing) if "." in t]
    assert sorted(shown) == ["1.25", "1.50", "4.00", "9.00"]
    assert len(of_class(drawing, "hatched")) == 20
    assert cells["tile 256 x 128: 2 tried, none has a time"].get("class") == "hatched"
    assert cells["tile 16 x 128: not tried"].get("class") == "hatched"
    assert texts(drawing).count("x") == 3


def test_heat_map_of_a_kernel_without_tiles():
    problem = replace(PROBLEM, family="delta")
    figure = charts.heat_map(result([measured("w8", 1.0), measured("w4", 2.0)], problem=problem))
    assert figure.svg is None and "has tiles" in figure.caption


def test_importances():
    drawing = svg(charts.importances(result()))
    bars = [float(bar.get("width")) for bar in of_class(drawing, "bar")]
    assert bars[0] / bars[1] == pytest.approx(7 / 3, rel=0.01)
    assert texts(drawing) == ["tile_m", "70.0%", "num_stages", "30.0%"]
    assert charts.importances(result(importances={})).svg is None


def test_agreement():
    figure = charts.agreement(result())
    assert html.unescape(figure.caption) == (
        "Spearman's rank correlation 1.000, 5 configs. Arrows: beyond the picture (1)."
    )
    drawing = svg(figure)
    assert len(of_class(drawing, "dot")) == 5 and len(of_class(drawing, "ring")) == 1
    # One was measured and predicted far beyond three times the best.
    assert len(of_class(drawing, "beyond")) == 2
    # Predicted too slow: above the diagonal, and further up than to the right.
    pessimistic = [measured("sm80-m64n64w4s1", 1.0, 3.0), measured("sm80-m128n64w4s1", 1.0, 1.0)]
    dots = of_class(svg(charts.agreement(result(pessimistic))), "dot")
    assert dots[0].get("cx") == dots[1].get("cx")
    assert float(dots[0].get("cy")) < float(dots[1].get("cy")) - 50
    # Both axes are the same: a config as fast as predicted lies on the diagonal.
    exact = [measured("sm80-m64n64w4s1", 2.0, 2.0), measured("sm80-m128n64w4s1", 1.0, 1.0)]
    drawing = svg(charts.agreement(result(exact)))
    (diagonal,) = [e for e in of_class(drawing, "default") if e.tag == SVG + "line"]
    x1, y1, x2, y2 = (float(diagonal.get(name)) for name in ("x1", "y1", "x2", "y2"))
    for dot in of_class(drawing, "dot"):
        share = (float(dot.get("cx")) - x1) / (x2 - x1)
        assert float(dot.get("cy")) == pytest.approx(y1 + share * (y2 - y1), abs=0.2)


def test_agreement_when_nothing_is_measured():
    figure = charts.agreement(predicted_result())
    assert figure.svg is None and "Nothing to compare" in figure.caption
    one = charts.agreement(result(RECORDS[:1]))
    assert one.caption == "Rank correlation is undefined for 1 config."


def test_parts():
    drawing = svg(charts.parts(predicted_result()))
    bars, floors = of_class(drawing, "bar"), of_class(drawing, "bar-floor")
    assert titles(bars) == ["shared_memory: 1.500 ms", "matrix: 1.000 ms"]
    assert titles(floors) == ["matrix: 0.5000 ms", "exponential: 0.7500 ms"]
    widths = [float(bar.get("width")) for bar in [*bars, *floors]]
    assert widths[0] / widths[1] == pytest.approx(1.5, rel=0.01)
    assert widths[1] / widths[2] == pytest.approx(2, rel=0.01)
    assert "predicted 1.600 ms" in texts(drawing)
    assert charts.parts(result()).svg is None
    assert "no best" in charts.parts(result([RECORDS[-1]])).caption


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_89", "sm_90a", "sm_120"])
@pytest.mark.parametrize("num_threads", [32, 128, 256, 1024])
def test_corners_are_where_a_block_less_fits(arch, num_threads):
    limits = architecture(arch)
    for blocks in range(1, 40):
        found = corner(limits, num_threads, blocks)
        most = blocks_per_sm(limits, num_threads, 1, 0)[0]
        assert (found is None) == (blocks > most)
        if found is None:
            continue
        smem, registers = found
        assert blocks_per_sm(limits, num_threads, registers, smem)[0] >= blocks
        assert registers == 255 or (
            blocks_per_sm(limits, num_threads, registers + 1, 0)[0] < blocks
        )
        assert blocks_per_sm(limits, num_threads, 1, smem + 1)[0] < blocks


def test_occupancy():
    figures = occupancy(result())
    assert [figure.title for figure in figures] == [
        f"Occupancy, {n} threads per block" for n in (128, 64, 256)
    ]
    drawing = svg(figures[0])
    assert len(of_class(drawing, "dot")) == 3 and len(of_class(drawing, "cross")) == 3
    blocks = BEST.resources.blocks_per_sm
    (best,) = [title for title in titles(of_class(drawing, "dot")) if BEST.config + "," in title]
    assert best.endswith(
        f"255 registers, 49152 bytes, {blocks} blocks per SM, limited by registers"
    )
    ring, dot = of_class(drawing, "ring")[0], of_class(drawing, "dot")[2]
    assert ring.get("cx") == dot.get("cx") and ring.get("cy") == dot.get("cy")
    # An eighth of 2048 threads are two blocks of 128.
    assert {"64 KB", "200 registers", "at least 2 blocks"} <= set(texts(drawing))
    assert len(of_class(drawing, "budget")) == 3
    bare = svg(occupancy(result(budgets={}))[0])
    assert not of_class(bare, "budget")
    # A dot lies inside the curves of exactly as many blocks as fit.
    for dot, record in zip(of_class(bare, "dot"), RECORDS, strict=False):
        inside = 0
        for curve in of_class(bare, "curve"):
            y, x = map(float, re.match(r"M46 ([\d.]+)H([\d.]+)", curve.get("d")).groups())
            inside += float(dot.get("cx")) <= x and float(dot.get("cy")) >= y - 0.05
        assert inside == record.resources.blocks_per_sm


def test_occupancy_that_cannot_be_drawn():
    (unknown,) = occupancy(result(arch="sm_999"))
    assert unknown.svg is None and "sm_999" in unknown.caption
    (nothing,) = occupancy(result([Record("m64n32w4", "invalid", "no")]))
    assert nothing.svg is None and "No config was compiled" in nothing.caption
    threads = [
        replace(BEST, config=f"m64n32w{n}", resources=resources(num_threads=32 * n))
        for n in range(1, 7)
    ]
    figures = occupancy(result(threads))
    assert [figure.svg is None for figure in figures] == [False] * 4 + [True]
    assert "160, 192" in figures[-1].caption


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis(0, 100, 0, 1), [0, 20, 40, 60, 80, 100]),
        (Axis(0.5, 3.5, 0, 1), [1, 2, 3]),
        (Axis(0.9, 120, 0, 1, log=True), [1, 2, 5, 10, 20, 50, 100]),
        (Axis(1.02, 1.13, 0, 1, log=True), [1.05, 1.1]),
    ],
)
def test_ticks_are_round(axis, ticks):
    assert axis.ticks() == pytest.approx(ticks)


@pytest.mark.parametrize("low", [1e-4, 0.03, 1.7, 900.0])
@pytest.mark.parametrize("ratio", [1.001, 1.5, 5, 40, 1e4])
def test_there_are_always_a_few_ticks(low, ratio):
    axis = Axis.around([low, low * ratio], 0, 100)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 8
    assert all(-0.01 <= axis(tick) <= 100.01 for tick in ticks)


def test_what_cannot_be_drawn_comes_last():
    page = report.page([result(importances={})])
    drawn = ["<svg" in figure for figure in page.split("<figure>")[1:]]
    assert drawn == sorted(drawn, reverse=True) and not drawn[-1]


def test_what_is_on_or_off_is_compared_by_the_best_of_each():
    found = tables.best_by_switch(hopper_result())
    assert {name: (off.config, on.config) for name, (off, on) in found.items()} == {
        "overlap": ("sm90-m128n128w8s2-pingpong", "sm90-m128n128w8s2-overlap-pingpong"),
        "pingpong": ("sm90-m128n128w8s2-overlap", "sm90-m128n128w8s2-overlap-pingpong"),
    }
    (shown,) = [t for t in Page(report.page([hopper_result()])).tables if t[0][0] == "switch"]
    assert shown[1] == [
        "overlap",
        "~1.700",
        "sm90-m128n128w8s2-pingpong",
        "~1.600",
        "sm90-m128n128w8s2-overlap-pingpong",
        "1.06x",
    ]
    assert not [t for t in Page(report.page([result()])).tables if t[0][0] == "switch"]
