"""The checker of pages, by pages with faults; shapes and figures, by the checker."""

from xml.etree import ElementTree

import pytest

from tests.support.drawings import SVG
from tests.support.pages import page_faults
from tests.support.tuning_results import result
from tuner import report
from tuner.drawing import shapes
from tuner.drawing.axes import Axis, chart, line, text, upwards
from tuner.drawing.document import document
from tuner.drawing.figures import MOST_ROWS, Figure, Table, arranged, drawn, swatch
from tuner.drawing.markup import Markup, escaped, tag

LABEL = "three bars, of which two are long"
TABLE = Table(("a", "b"), [("x", 1)], (1,))


def figure(*marks, caption="As it is.", table=TABLE, **changes):
    svg = chart(LABEL, *marks) if marks else None
    return Figure("A figure", escaped(caption), svg, table, **changes)


def page(*contents):
    return document("A page", tag("h1", "A page"), *contents)


@pytest.mark.parametrize(
    "contents, fault",
    [
        (Markup("<p>"), "not well-formed"),
        (tag("script", "1"), "has a script"),
        (tag("img", src="x.png"), "has a img"),
        (tag("p", onclick="f()"), "p has onclick"),
        (tag("p", "see https://example.org/x"), "names https://example.org/x"),
        (tag("style", "@import 'x'"), "names @import"),
        (tag("style", "i{background:url(x.png)}"), "names url(x.png)"),
        (tag("a", "x", href="#nowhere"), "a link leads nowhere: '#nowhere'"),
        (tag("a", "x", href="https://example.org"), "a link leads nowhere"),
        (tag("i", tag("b", id="x"), id="x"), "two elements are x"),
        (tag("p", "nan ms"), "says nan"),
        (tag("p", "None"), "says nan, inf or None"),
        (tag("p", "x" * 400_000), "bytes, of 400,000 at most"),
        (drawn(figure(text(340, 20, "too long"))), "'too long' is cut"),
        (drawn(figure(text(9, 20, "one"), text(9, 22, "two"))), "'one' covers 'two'"),
        (drawn(figure(upwards(12, 240, "up"))), "'up' is cut"),
        (drawn(figure(shapes.rect(300, 9, 60, 9, "s"))), "a rect at 360, 18 lies outside"),
        (drawn(figure(shapes.boxes([(1, 1, 400, 2)], "s"))), "a path at 401, 3 lies outside"),
        (drawn(figure(line(0, 0, 0, 300, "axis"))), "a line at 0, 300 lies outside"),
        (drawn(figure(shapes.rect(1, 1, 1, 1, "mauve"))), "no rule for the class mauve"),
        (drawn(figure(tag("rect", x=1))), "a rect without a class"),
        (drawn(figure(text(9, 20, "one"), table=None)), "figure 'A figure' has no table"),
        (tag("svg", xmlns=SVG[1:-1], viewBox="0 0 9 9"), "is neither chart nor strip"),
        (chart("a chart", text(9, 20, "one")), "is no image with a sentence: 'a chart'"),
    ],
)
def test_faults_are_found(contents, fault):
    found = page_faults(page(contents))
    assert [line for line in found if fault in line], found


def test_a_page_without_faults():
    marks = shapes.rect(40, 20, 60, 9, "held", "a tile"), text(9, 20, "one"), upwards(20, 30, "up")
    link = tag("a", "there", href="https://github.com/x/y")
    assert page_faults(page(link, arranged([figure(*marks), figure()]))) == []


def test_the_report_has_no_faults():
    assert page_faults(report.page([result()]), tables=False) == []


def test_many_rectangles_are_one_path():
    found = [(1.04, 2, 3, 4), (5, 6.26, 7, 8)]
    path = ElementTree.fromstring(shapes.boxes(found, "s", "two"))
    assert path.get("d") == "M1 2h3v4h-3zM5 6.3h7v8h-7z" and path.findtext("title") == "two"
    path = ElementTree.fromstring(shapes.lanes([(1.04, 2, 3)], 2.5, "walk0", "one"))
    assert (path.get("d"), path.get("stroke-width")) == ("M1 2h3", "2.50")
    assert ElementTree.fromstring(shapes.slashes(found)).get("d") == "M1 6l3 -4M5 14.3l7 -8"


@pytest.mark.parametrize("low, values", [(0.0, (0.0, 3.0)), (1.0, (5.0, 1e9)), (0.0, (0.0, 0.0))])
@pytest.mark.parametrize("name", ["tensor cores", "x" * 80])
def test_bars(low, values, name):
    found = [shapes.Bar(name, value, f"{value:,.0f} clocks", "exp") for value in values]
    marks = [shapes.Mark(max(values), "predicted 1,234 clocks"), shapes.Mark(values[0], "floor 1")]
    svg = shapes.bars(LABEL, found, marks, low)
    assert page_faults(page(drawn(Figure("Bars", escaped(""), svg, TABLE)))) == []
    widths = [float(r.get("width")) for r in ElementTree.fromstring(svg).iter(SVG + "rect")]
    assert widths == sorted(widths)


@pytest.mark.parametrize("high", [1e-3, 7.0, 123.4, 1e7])
def test_a_strip_pans_and_can_be_focused(high):
    x = Axis(0.0, high, 60, 900)
    svg = shapes.strip(LABEL, shapes.ruler(x, 20, "µs since the start"), height=58)
    root = ElementTree.fromstring(page(drawn(figure(wide=True))).removeprefix("<!DOCTYPE html>\n"))
    assert root.find(".//div[@class='pan']") is None
    text = page(drawn(Figure("Strip", escaped(""), svg, TABLE, wide=True)))
    assert page_faults(text) == []
    root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    pan = root.find(".//div[@class='pan']")
    assert (pan.get("tabindex"), pan.get("aria-label")) == ("0", "Strip")


def test_text_in_a_box_only_where_it_has_room():
    assert shapes.boxed_text((0, 0, 9, 20), "PV 12", "on-pv", 11) == ""
    assert shapes.boxed_text((0, 0, 90, 9), "PV 12", "on-pv", 11) == ""
    found = ElementTree.fromstring(shapes.boxed_text((10, 0, 90, 20), "PV 12", "on-pv", 11))
    assert (found.get("x"), found.text) == ("55", "PV 12")


def test_a_long_table_shows_its_ends():
    rows = [(f"row {n}", n) for n in range(MOST_ROWS + 1)]
    text = drawn(figure(table=Table(("a", "b"), rows, (1,))))
    assert text.count("<tr>") == MOST_ROWS + 2 and "… 1 rows …" in text
    assert "row 11" in text and "row 12<" not in text and "row 13" in text


def test_figures_side_by_side():
    wide, narrow = figure(wide=True), figure()
    text = arranged([narrow, narrow, wide, narrow])
    assert text.count('class="charts few"') == 2 and text.count("<figure") == 4


def test_a_legend_names_roles():
    assert swatch("held", "a tile") == (
        '<span class="key"><i class="swatch held"></i>a tile </span>'
    )
