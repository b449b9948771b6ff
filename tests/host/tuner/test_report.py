"""The tuner's table and page: parsed, and the numbers in them compared with the records."""

import html
import itertools
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from numflash.problem.classes import ProblemClass
from numflash.runtime.devices import architecture, blocks_per_sm
from tests.support.drawings import SVG, faults, text_boxes, text_width
from tuner import report
from tuner.records import FAILURES, Record, ResourceUsage
from tuner.report import charts, style, tables
from tuner.report.axes import FONT, Axis, width_of
from tuner.report.occupancy import corner, occupancy
from tuner.search.results import Result, parameters, rank_correlation

PROBLEM = ProblemClass.parse("forward float16-d64-dv64-vec causal q4096 k4096 bh64 g1")
VOID = {"meta"}


def resources(registers=128, smem_bytes=32768, num_threads=128, spill_bytes=0):
    blocks, limited_by = blocks_per_sm(architecture("sm_90a"), num_threads, registers, smem_bytes)
    return ResourceUsage(registers, spill_bytes, smem_bytes, num_threads, blocks, limited_by)


def measured(config, milliseconds, predicted_ms=None, **changes):
    samples = (milliseconds * 0.99, milliseconds, milliseconds * 1.01)
    return replace(
        Record(config, "measured", predicted_ms=predicted_ms, samples_ms=samples), **changes
    )


RECORDS = [
    measured("sm80-m64n64w4s1", 2.0, 1.9, resources=resources()),
    measured("sm80-m64n64w4s2", 1.5, 1.6, resources=resources(168, 49152)),
    measured("sm80-m128n64w4s1", 1.25, 1.2, resources=resources(255, 49152), finished=1.79e9),
    measured("sm80-m128n64w8s1", 3.0, 2.5, resources=resources(128, 49152, 256)),
    measured("sm80-m32n32w2s1", 9.0, 8.0, outcome="slow", resources=resources(90, 8192, 64)),
    Record("sm80-m256n128w4s1", "spilled", "812 bytes", resources(255, 90000)),
    Record("sm80-m256n128w4s2", "spilled", "96 bytes", resources(255, 90000)),
    Record("sm80-m256n32w4s1", "spilled", "a warning", resources(255, 90000)),
    Record("sm80-m512n64w4s1", "over_budget", "needs <much> & 'more'"),
    Record("sm80-m16n16w1s1", "wrong_result", "out: 0.3", samples_ms=(0.1, 0.1)),
]
BEST = RECORDS[2]


def result(records=RECORDS, **changes):
    made = Result(
        device="NVIDIA H200",
        arch="sm_90a",
        num_sms=132,
        problem=PROBLEM,
        origin="measured",
        default=records[0],
        best=min(records, key=lambda record: record.time_ms),
        records=list(records),
        floor_ms={"matrix": 0.5, "exponential": 0.75},
        space_size=1000,
        pruned={"shared memory": 600, "threads": 250},
        pruned_examples={"shared memory": "m256n64w4 needs <600> bytes"},
        importances={"tile_m": 0.7, "num_stages": 0.3},
        budgets={"sram_budget_bytes": 65536, "min_occupancy": 0.125, "max_registers": 200},
    )
    return replace(made, **changes)


def predicted_result():
    records = [
        Record(f"sm80-m{m}n64w4s1", "predicted", predicted_ms=ms, resources=resources())
        for m, ms in ((64, 2.0), (128, 1.6))
    ]
    parts = {"matrix": 1.0, "shared_memory": 1.5}
    best = replace(records[1], parts=parts)
    return result([records[0], best], origin="predicted", default=records[0], best=best)


def hopper_result():
    """Predicted times of configs that differ in what is on."""
    times = {"": 2.0, "-overlap": 1.8, "-pingpong": 1.7, "-overlap-pingpong": 1.6}
    records = [
        Record(f"sm90-m128n128w8s2{on}", "predicted", predicted_ms=ms, resources=resources())
        for on, ms in times.items()
    ]
    records.append(Record("sm90-m128n256w8s1-persistent", "spilled", "144 bytes", resources()))
    return result(records, origin="predicted", best=records[3])


class Page(HTMLParser):
    """What a page consists of; fails where elements do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.tables, self.ids, self.links = [], set(), []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, name, attributes):
        attributes = dict(attributes)
        self.tags.append(name)
        self.attributes.append(attributes)
        self.ids.add(attributes.get("id"))
        if name == "a":
            self.links.append(attributes["href"])
        if name not in VOID:
            self.open.append(name)
        if name == "table":
            self.tables.append([])
        elif name == "tr":
            self.tables[-1].append([])
        elif name in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, name, attributes):
        assert name in VOID

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def table(self, first):
        """The rows of the table whose first column has this name."""
        (found,) = [rows[1:] for rows in self.tables if rows[0][0] == first]
        return found

    @property
    def all_text(self):
        return " ".join(self.text)


def parsed(*results):
    return Page(report.page(list(results)))


def svg(figure):
    return ElementTree.fromstring(figure.svg)


def of_class(drawing, name):
    return [e for e in drawing.iter() if name in e.get("class", "").split()]


def texts(drawing):
    return ["".join(e.itertext()) for e in drawing.iter(SVG + "text")]


def titles(elements):
    return [e.findtext(SVG + "title") for e in elements]


# --- results


def test_rank_correlation():
    x = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert rank_correlation(x, [v**3 for v in x]) == pytest.approx(1)
    assert rank_correlation(x, [-v for v in x]) == pytest.approx(-1)
    # 1 - 6 sum d^2 / n (n^2 - 1), d = 1, -1, 1, -1, 0
    assert rank_correlation(x, [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / 120)
    # ranks 1 2.5 2.5 4 and 1 2 3 4: Pearson of these
    tied = np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1]
    assert rank_correlation([1, 5, 5, 7], [10, 20, 30, 40]) == pytest.approx(tied)


@pytest.mark.parametrize("x", [[], [1.0], [2.0, 2.0, 2.0]])
def test_rank_correlation_is_undefined(x):
    assert rank_correlation(x, list(range(len(x)))) is None
    assert rank_correlation(list(range(len(x))), x) is None


def test_rank_correlation_wants_pairs():
    with pytest.raises(ValueError, match="got 2 and 1"):
        rank_correlation([1, 2], [1])


def test_times_of_one_kind_only_are_compared():
    mixed = measured("sm80-m64n64w4s1", 2.0)
    only_predicted = Record("sm80-m128n64w4s1", "predicted", predicted_ms=0.1)
    found = result([mixed, only_predicted], best=only_predicted)
    assert found.time_ms(only_predicted) is None
    assert found.speedup is None and found.winner is None
    assert result(origin="predicted").time_ms(RECORDS[0]) == 1.9
    assert result().speedup == pytest.approx(1.6)
    assert result().spread == pytest.approx(0.01)
    assert result(origin="predicted").spread is None
    assert result().floor == 0.75 and result(floor_ms={}).floor is None


def test_an_unknown_origin_is_rejected():
    with pytest.raises(ValueError, match="measured, predicted, got 'guessed'"):
        result(origin="guessed")


def test_parameters():
    assert parameters("forward", "m64n32w4") == {"tile_m": 64, "tile_n": 32, "num_warps": 4}
    assert parameters("forward", "sm80-m64n32w4s2")["num_stages"] == 2
    assert parameters("forward", "nonsense") == {}


# --- the table for a terminal


def test_table():
    lines = report.table([result(), predicted_result()]).splitlines()
    assert lines[1] == "NVIDIA H200 (sm_90a, 132 SMs)"
    assert lines[2].strip() == str(PROBLEM)
    assert lines[3].split() == [
        *("sm80-m64n64w4s1", "2.000", "sm80-m128n64w4s1", "1.250", "1.60x", "1.0%", "measured"),
    ]
    assert lines[5].split() == [
        *("sm80-m64n64w4s1", "~2.000", "sm80-m128n64w4s1", "~1.600", "1.25x", "-", "predicted"),
    ]
    assert lines[-1] == "~ predicted by the offline model, not measured."
    assert lines[3].index("2.000") + 5 == lines[5].index("~2.000") + 6
    assert "predicted" not in report.table([result()])


def test_table_without_a_winner():
    text = report.table([result([RECORDS[-1]])])
    assert text.splitlines()[-1].split() == [
        *("sm80-m16n16w1s1", "failed", "none", "-", "-", "-", "measured")
    ]
    assert report.table([]) == "Nothing was tuned."


@pytest.mark.parametrize("text", ["GPU\x1b[2J", "GPU\x9b2J", "GPU\u202e002", "GPU\n A100"])
def test_names_steer_neither_the_terminal_nor_the_page(text):
    hostile = result([Record(text, "invalid", text)], device=text, pruned={text: 1})
    for shown in (report.table([hostile]), report.page([hostile])):
        assert all(line.replace("\t", "").isprintable() for line in shown.split("\n"))
        assert text[3] not in shown or text[3] == "\n"
    assert "GPU?[2J" in report.table([result(device="GPU\x1b[2J")])


@pytest.mark.parametrize("target", ["elsewhere", "absent"])
def test_a_link_in_place_of_the_page_is_replaced(tmp_path, target):
    (tmp_path / "elsewhere").write_text("mine")
    path = tmp_path / "report.html"
    path.symlink_to(tmp_path / target)
    report.write_html(path, [result()])
    assert (tmp_path / "elsewhere").read_text() == "mine" and not (tmp_path / "absent").exists()
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


# --- the page as a whole

HOSTILE = "<script>alert('x')</script> & \"GPU\" \x1b\x00\ud800 名"


def many():
    sizes = (2**n for n in range(4, 10))
    return [result(problem=replace(PROBLEM, seqlen_q=n)) for n in sizes] + [predicted_result()]


@pytest.mark.parametrize(
    "results",
    [
        [],
        [result()],
        [result(RECORDS[:1])],
        [result([r for r in RECORDS if r.outcome in FAILURES])],
        [predicted_result()],
        [result(device=HOSTILE, pruned={HOSTILE: 3}, importances={HOSTILE: 0.5})],
        [result([RECORDS[0].failed(o, HOSTILE) for o in FAILURES], floor_ms={HOSTILE: 1.0})],
        [result([Record(HOSTILE, "invalid", HOSTILE)])],
        [result(arch="sm_999"), result(records=[BEST], floor_ms={}, importances={}, budgets={})],
        many(),
    ],
    ids=itertools.count(),
)
def test_the_page_is_well_formed_and_needs_nothing_else(tmp_path, results):
    path = tmp_path / "report.html"
    report.write_html(path, results)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    assert root.tag == "html"
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & set(page.tags)
    for attributes in page.attributes:
        assert not [name for name in attributes if name.startswith("on") or name == "src"]
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    urls = re.findall(r"https?://[^\"' )]*|url\([^)]*\)|@import", text)
    assert set(urls) <= {"http://www.w3.org/2000/svg", "url(#hatch)"}
    assert "hatch" in page.ids
    assert not re.search(r"\b(nan|inf)\b", page.all_text)
    for name in ("x", "y", "cx", "cy", "x1", "x2", "y1", "y2", "width", "height", "r"):
        for attributes in page.attributes:
            if name in attributes:
                assert -1 <= float(attributes[name]) < 2000


def test_names_are_text():
    page = parsed(result(device=HOSTILE), result())
    assert "<script>alert('x')</script> & \"GPU\" \ufffd\ufffd\ufffd 名" in page.all_text


def test_a_page_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError):
        report.write_html(tmp_path / "missing" / "report.html", [])


def test_facts_and_subtitle():
    text = parsed(result()).all_text
    assert "1 problem class, 10 trials, the last of them on 2026-09-21" in text
    for fact in ("2.000 ms", "1.250 ms", "1.60x", "1.0%", "0.7500 ms", "1.67 times as long"):
        assert fact in text
    assert "predicted by the offline model" not in text


def test_predicted_times_are_never_called_measured():
    page = parsed(predicted_result())
    assert "All times are predicted by the offline model, not measured." in page.all_text
    assert "best (predicted)" in page.all_text
    said = page.all_text.replace("not measured", "").replace("measured, ms", "")
    said = said.replace("Predicted against measured", "")
    assert "measured" not in said


def test_several_results_have_an_index():
    page = parsed(*many())
    index = page.table("problem class")
    assert len(index) == 7
    # 16 queries see 4096 keys each, save the last 1 to 15 of them.
    speed = 4 * 64 * 64 * (16 * 4096 - 15 * 8) / 1.25e-3 / 1e12
    assert index[0][1:] == [
        *("sm80-m64n64w4s1", "2.000", "sm80-m128n64w4s1", "1.250", f"{speed:.3g}"),
        *("1.60x", "1.0%", "measured"),
    ]
    assert index[-1][2] == "~2.000" and index[-1][-1] == "predicted"
    assert index[-1][5] == f"~{4 * 64 * 64 * 4096 * 4097 / 2 / 1.6e-3 / 1e12:.3g}" == "~85.9"
    assert page.links == [f"#result-{n}" for n in range(1, 8)]
    assert "Times of 1 of the classes are predicted" in page.all_text
    assert not [rows for rows in parsed(result()).tables if rows[0][0] == "problem class"]


# --- its tables


def test_all_tried_by_time():
    rows = parsed(result()).table("config")
    assert len(rows) == len(RECORDS)
    assert [row[2] for row in rows[:5]] == ["1.250", "1.500", "2.000", "3.000", "9.000"]
    blocks = str(BEST.resources.blocks_per_sm)
    assert rows[0][1:] == ["measured", "1.250", "1.0%", "1.200", "110", "255", "48.0", blocks]
    assert [row[0] for row in rows[5:]] == [record.config for record in RECORDS[5:]]
    assert rows[8][1:] == ["over budget", *["-"] * 7]
    # Its samples were of a wrong result.
    assert rows[9][1:4] == ["wrong result", "-", "-"]


def test_pruned_and_failed_are_counted():
    page = parsed(result())
    assert page.table("constraint") == [
        ["shared memory", "600", "60.0%", "m256n64w4 needs <600> bytes"],
        ["threads", "250", "25.0%", ""],
    ]
    assert "Pruned before anything was compiled: 850 of 1,000 in the space" in page.all_text
    assert page.table("outcome")[0] == ["spilled", "2", "812 bytes", "sm80-m256n128w4s1"]
    assert ["over budget", "1", "needs <much> & 'more'", "sm80-m512n64w4s1"] in page.table(
        "outcome"
    )
    assert sum(int(row[1]) for row in page.table("outcome")) == 5
    assert "Failed: 5 of 10 tried" in page.all_text


def test_failures_that_differ_in_numbers_are_one():
    groups = tables.failure_groups(RECORDS)
    assert [(outcome, len(found)) for outcome, found in groups] == [
        ("spilled", 2),
        ("over_budget", 1),
        ("spilled", 1),
        ("wrong_result", 1),
    ]


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
    never = Record("sm80-m16n64w4s1", "slow", "not compiled: ...", predicted_ms=3.5)
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


# --- colours


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [style.LIGHT, style.DARK])
def test_contrasts(scheme):
    for ground, name in itertools.product(
        ("page", "card"), ("text", "muted", "accent", "second", "failed")
    ):
        assert contrast(scheme[ground], scheme[name]) >= 4.5, (ground, name)
    assert contrast(scheme["card"], scheme["axis"]) >= 3
    for i in range(style.HEAT_STEPS):
        assert contrast(scheme[f"heat{i}"], scheme[f"on-heat{i}"]) >= 4.5, i
    steps = [luminance(scheme[f"heat{i}"]) for i in range(style.HEAT_STEPS)]
    assert steps in (sorted(steps), sorted(steps, reverse=True))


def test_every_colour_of_the_style_is_a_token_of_both_schemes():
    used = set(re.findall(r"var\(--([\w-]+)\)", style.STYLE))
    assert used <= set(style.LIGHT) and set(style.LIGHT) == set(style.DARK)
    rules = style.STYLE.split("@media screen", 1)[1].split("\n", 1)[1]
    assert not re.search(r"#[0-9a-f]{3,6}\b", rules)


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
