"""One SM in clocks: what is drawn is what the events say, of every kernel."""

from xml.etree import ElementTree

import numpy as np
import pytest

from tests.support.drawings import SVG
from tests.support.explained_calls import CALLS, asked, asked_about
from tests.support.pages import page_faults
from tuner.drawing.document import document
from tuner.drawing.figures import arranged
from tuner.explain.asked import NotShownError
from tuner.explain.facts import timeline as facts
from tuner.explain.sections import timeline as section


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path / "cache"))


def each_kernel(name):
    call = asked_about(name)
    return [(call, kernel) for kernel in call.kernels.values() if kernel.is_tiled]


@pytest.mark.parametrize("name", ["causal", "two slots", "decode", "float32", "fp8"])
def test_pieces_of_a_row_do_not_overlap(name):
    for call, kernel in each_kernel(name):
        found = facts.find(call, kernel)
        for row in found.rows:
            for place in range(max(1, len(row.owners))):
                mine = sorted(p for p in row.pieces if p.row == place)
                # What holds a buffer may lie behind what fills it.
                ends = [p.end for p in mine]
                starts = [p.start for p in mine]
                assert (np.array(starts[1:]) >= np.array(ends[:-1]) - 1).all(), (row.name, place)
            assert all(p.end <= found.shown.value + 1e-6 for p in row.pieces)
            assert 0 <= row.busy.value <= 1 + 1e-9
        assert found.least.value <= found.turn.value * (1 + 1e-9)
        assert found.calibrated.value > 0


def test_three_clocks_of_a_turn_have_names():
    call = asked_about("causal")
    found = facts.find(call, call.forward)
    (figure,) = section.figures(found)
    said = "".join(ElementTree.fromstring(f"<p>{figure.caption}</p>").itertext())
    for number, name in (
        (found.turn, "by the events"),
        (found.least, "Products alone take"),
        (found.calibrated, "the model that predicts times"),
    ):
        assert f"{number.value:,.0f}" in said and name in said
    # Two warpgroups, 64 x 128 x 128 twice, at 1024 multiply-adds a clock for 128 columns.
    assert found.least.value == pytest.approx(2 * 2 * 64 * 128 * 128 / 2048, rel=0.05)


def test_a_short_walk_is_drawn_whole():
    call = asked("A100", (1, 100, 2, 64), causal=True)
    found = facts.find(call, call.forward)
    assert found.whole and found.shown.value == found.end.value
    kinds = {piece.kind for row in found.rows for piece in row.pieces}
    assert "mask" in kinds


def test_of_many_blocks_some_have_rows():
    call = asked_about("decode")
    found = facts.find(call, call.forward)
    assert found.blocks.value > found.drawn_blocks == facts.MOST_BLOCKS
    (figure,) = section.figures(found)
    assert f"Of {found.blocks} blocks 2 have rows" in figure.caption


def test_nothing_to_do():
    call = asked_about("no keys")
    with pytest.raises(NotShownError, match="no scores"):
        facts.find(call, call.forward)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "no keys"])
def test_figures_have_no_faults(name):
    for call, kernel in each_kernel(name):
        found = facts.find(call, kernel)
        (figure,) = section.figures(found)
        text = document("page", arranged([figure]))
        assert page_faults(text, most_bytes=60_000) == []
        drawn = ElementTree.fromstring(figure.svg)
        names = {e.text for e in drawn.iter(SVG + "text")}
        for row in found.rows:
            if row.group == "unit":
                assert f"{row.busy.value:.0%}" in names
