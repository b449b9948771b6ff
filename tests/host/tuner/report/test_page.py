"""The tuner's table and page: parsed, and the numbers compared with the records."""

import itertools
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from tests.support.tuning_results import (
    BEST,
    PROBLEM,
    RECORDS,
    Page,
    parsed,
    predicted_result,
    result,
)
from tuner import report
from tuner.records import FAILURES, Record
from tuner.report import tables

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
