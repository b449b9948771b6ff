"""The schedule of a page: work is conserved, and what is drawn is what the model plays."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.support.drawings import SVG
from tests.support.explained_calls import CALLS, asked, asked_about, asked_arrays
from tests.support.pages import page_faults
from tuner.drawing.document import document
from tuner.drawing.figures import arranged
from tuner.explain.asked import NotShownError
from tuner.explain.facts import schedule as facts
from tuner.explain.facts import timeline as timeline_facts
from tuner.explain.facts.laid import clocks_of, laid, places_of
from tuner.explain.sections import schedule as section
from tuner.explain.sections import timeline as timeline_section
from tuner.explain.unread import unread
from tuner.model import clocks


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path / "cache"))


def kernels(call):
    return [kernel for kernel in call.kernels.values() if kernel.is_tiled]


@pytest.mark.parametrize("name", ["causal", "two slots", "window", "decode", "float32"])
def test_walks_are_all_drawn_and_none_overlaps(name):
    call = asked_about(name)
    for kernel in kernels(call):
        found = facts.find(call, kernel)
        lane, start, end, tiles, quarter = found.drawn
        _, walks = places_of(laid(call, kernel), call.problem.num_heads_q)
        if found.every == 1:
            assert sorted(tiles) == sorted(walks)
        order = np.lexsort((start, lane))
        same = lane[order][1:] == lane[order][:-1]
        assert (start[order][1:][same] >= end[order][:-1][same] - 1e-6).all()
        assert (end > start).all() and end.max() <= found.finish.value + 1e-9
        assert lane.max() < found.slots.value
        # The longest walks are in the first quarter.
        assert tiles[quarter == quarter.min()].min() >= tiles[quarter == quarter.max()].max() - 1
        for n in set(quarter.tolist()):
            low, high = found.quarters[n]
            assert low <= tiles[quarter == n].min() and tiles[quarter == n].max() <= high


@pytest.mark.parametrize("name", ["causal", "two slots", "one query", "turing"])
def test_shares_and_curve_count_the_same_work(name):
    call = asked_about(name)
    found = facts.find(call, call.forward)
    times, shares = found.curve
    mean = float(np.diff(np.append(times, found.finish.value)) @ shares) / found.finish.value
    assert mean == pytest.approx(found.busy.value, rel=1e-6)
    assert 0 <= found.tail.value <= 1 - found.busy.value + 1e-9
    assert 0 <= found.first_idle.value <= found.finish.value
    if not found.persistent:
        return
    # Persistent blocks have nothing between their walks: all that is lost is at both ends.
    start = clocks_of(call, call.forward, laid(call, call.forward)).start
    lost = start / call.machine.clock_mhz / found.finish.value
    assert 1 - found.busy.value == pytest.approx(found.tail.value + lost, rel=1e-6)


def test_order_matters_where_blocks_wait_for_slots():
    call = asked_about("two slots")
    found = facts.find(call, call.forward)
    assert (found.blocks.value, found.slots.value, found.resident.value) == (256, 216, 2)
    assert found.opposite.value > 0.05 and found.busy.value < 0.8
    alone = facts.find(*(lambda c: (c, c.forward))(asked("A100", (1, 256, 4, 128), causal=True)))
    assert alone.opposite is None


def test_of_very_many_blocks_the_waves_between_are_one(monkeypatch):
    call = asked("A100", (16, 4096, 32, 64), causal=True)
    kernel = call.forward
    exact = facts.find(call, kernel)
    played = []
    monkeypatch.setattr(clocks, "dispatched", _few(clocks.dispatched, played))
    found = facts.find(call, kernel)
    assert len(played) == 1 and played[0] < 4000
    assert found.places == exact.places and found.places.value == 16 * 32 * 32
    assert found.finish.value == pytest.approx(exact.finish.value, rel=0.02)
    assert found.busy.value == pytest.approx(exact.busy.value, abs=0.02)


def _few(dispatched, played):
    """`dispatched` that plays few blocks; `played` gets how many."""

    def few(*arguments, **more):
        found = dispatched(*arguments, most_played=2000, **more)
        played.append(len(found.number))
        return found

    return few


@pytest.mark.parametrize("letters", ["", "-persistent"])
def test_how_blocks_come_to_their_tiles_is_said(letters):
    """Those of the forward are dealt out; those of the backward start in order, or draw."""
    call = asked(
        "H200", (2, 4096, 8, 128), causal=True, config={"backward": f"sm90-m64n128w8s2{letters}"}
    )
    said = {}
    for name in ("forward", "backward"):
        (figure,) = section.figures(facts.find(call, call.kernels[name]))
        said[name] = document("page", arranged([figure]))
    assert "deal 512 tiles of rows out" in said["forward"]
    drawn = "132 persistent blocks draw 512 tiles of rows one by one"
    assert (drawn in said["backward"]) == bool(letters)
    assert ("512 blocks start in their order" in said["backward"]) == (not letters)


def test_clusters_are_not_drawn():
    call = asked("H200", (1, 256, 4, 128), config="sm90-m64n64w4s2-c2")
    for find in (facts.find, timeline_facts.find):
        with pytest.raises(NotShownError, match="its blocks are in clusters"):
            find(call, call.forward)


def test_nothing_to_do():
    call = asked_about("no keys")
    with pytest.raises(NotShownError, match="no scores"):
        facts.find(call, call.forward)


@pytest.mark.parametrize("gpu", ["H200", "A100"])
def test_sequences_with_lengths_of_their_own(gpu):
    ends, x = np.array([0, 100, 1124, 1200, 3000], np.int32), unread((3000, 4, 64), "float16")
    lengths = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "layout": "thd", "causal": True}
    call = asked_arrays(gpu, {"q": x, "k": x, "v": x}, True, **lengths)
    for kernel in kernels(call):
        found = facts.find(call, kernel)
        of_time = timeline_facts.find(call, kernel)
        drawn = section.figures(found) + timeline_section.figures(of_time)
        assert page_faults(document("page", arranged(drawn))) == []
        listed = laid(call, kernel).listed
        assert found.places.value == len(listed) and of_time.tiles.value <= listed.tiles.max()


@pytest.mark.parametrize("name", [name for name in CALLS if name != "no keys"])
def test_figures_have_no_faults(name):
    call = asked_about(name)
    for kernel in kernels(call):
        found = facts.find(call, kernel)
        (figure,) = section.figures(found)
        text = document("page", arranged([figure]))
        assert page_faults(text, most_bytes=60_000) == []
        shown = " ".join("".join(ElementTree.fromstring(text[16:]).itertext()).split())
        for number in (found.places, found.slots, found.finish):
            assert str(number) in shown
        assert f"{found.busy.value:.1%}" in shown and figure.wide
        drawn = ElementTree.fromstring(figure.svg)
        marks = [
            e for e in drawn.iter() if (e.get("class") or "").rpartition(" ")[2][:4] == "walk"
        ]
        boxes = sum(e.get("d").count("M") if e.tag == SVG + "path" else 1 for e in marks)
        assert boxes == len(found.drawn[0]) <= facts.MOST_DRAWN + found.slots.value
        assert all(re.search(r"\d tiles", e.findtext(SVG + "title")) for e in marks)
