"""`tests.support.covering`: small sets of cases in which every pair of a table still meets."""

import itertools
from types import SimpleNamespace

import pytest

from tests import conftest
from tests.support.covering import covering, each_choice, meetings, some, thinned, thorough
from tests.support.faults import load

AXES = ("sm75", "sm80", "sm90"), ("full", "causal", "window", "tall"), ("f2", "b2"), range(5)
TABLE = list(itertools.product(*AXES))


def pairs(rows) -> set:
    return set().union(*map(meetings, rows))


def test_every_pair_meets_in_a_sixth_of_the_rows():
    chosen = covering(TABLE, lambda row: row, full=False)
    assert pairs(chosen) == pairs(TABLE)
    assert len(chosen) <= len(TABLE) // 5
    assert chosen == sorted(chosen, key=TABLE.index)


def test_no_row_of_it_is_needless():
    chosen = covering(TABLE, lambda row: row, full=False)
    for i in range(len(chosen)):
        assert pairs(chosen[:i] + chosen[i + 1 :]) != pairs(TABLE)


def test_the_choice_is_the_same_again_and_the_whole_table_is_one_word_away():
    assert covering(TABLE, lambda row: row, full=False) == covering(
        iter(TABLE), lambda row: row, full=False
    )
    assert covering(iter(TABLE), lambda row: row, full=True) == TABLE


def test_cheap_rows_come_before_dear_ones():
    table = [("a", n) for n in (9, 1, 5)]
    # Only the first label pairs with anything.
    chosen = covering(table, lambda row: (row[0],), cost=lambda row: row[1], full=False)
    assert chosen == [("a", 1)]


def test_each_label_alone():
    chosen = covering(TABLE, lambda row: row, together=1, full=False)
    assert len(chosen) == 5
    assert [set(axis) for axis in zip(*chosen, strict=True)] == [set(axis) for axis in AXES]


def test_none_is_no_label():
    table = [("a", None), ("a", "x"), ("b", None)]
    assert covering(table, lambda row: row, full=False) == [("a", "x"), ("b", None)]


@pytest.mark.parametrize("rows", [[], [("a", "b")]])
def test_few_rows_are_all_kept(rows):
    assert covering(rows, lambda row: row, full=False) == rows


def test_some_keeps_what_is_named_and_every_nth():
    rows = list("abcdef")
    assert some(rows, "b", "e", all_rows=False) == ["b", "e"]
    assert some(iter(rows), "b", every=3, all_rows=False) == ["a", "b", "d"]
    assert some(rows, "b", all_rows=True) == rows
    for whole in (True, False):
        with pytest.raises(ValueError, match=r"kept must be among the rows, and \['x'\] are not"):
            some(rows, "x", all_rows=whole)


def collected(name: str, *rows: str) -> SimpleNamespace:
    """A test with a row of each `parametrize`, or with none."""
    more = {"callspec": SimpleNamespace(_idlist=rows)} if rows else {}
    return SimpleNamespace(nodeid=f"{name}[{'-'.join(rows)}]" if rows else name, **more)


def test_of_axes_that_are_crossed_each_choice_is_there():
    crossed = [collected("crossed", *row) for row in itertools.product("abc", "xy")]
    table = [collected("table", row) for row in ("a-x", "a-y", "b-x")]
    items = [crossed[0], collected("alone"), *table, *crossed[1:]]
    kept = each_choice([*items])
    assert [item for item in kept if item not in crossed] == items[1:5]
    chosen = [item.callspec._idlist for item in kept if item in crossed]
    assert len(chosen) == 3 and [set(axis) for axis in zip(*chosen, strict=True)] == [
        {*"abc"},
        {*"xy"},
    ]


@pytest.mark.parametrize("all_run", [False, True])
def test_thorough_tests_run_where_all_do(all_run, request, monkeypatch):
    """Of this test and a thorough one, as `tests/conftest.py` collects them."""
    (this,) = (item for item in request.session.items if item is request.node)
    other = type(this).from_parent(this.parent, name="other", callobj=lambda: None)
    other.add_marker(thorough)
    left_out, items = [], [this, other]
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    monkeypatch.setattr(conftest, "ALL", all_run)
    conftest.pytest_collection_modifyitems(SimpleNamespace(hook=hook), items)
    assert (items, left_out) == (([this, other], []) if all_run else ([this], [other]))


def test_of_long_tables_a_few_rows_are_kept_and_of_faults_others():
    plain, breaking = SimpleNamespace(), SimpleNamespace(load=load)
    names = "long", "short"
    items = [collected(name, f"{n}") for name in names for n in range(13 if name == "long" else 6)]
    for item in items:
        item.module, item.get_closest_marker = plain, {}.get
    kept = thinned(iter(items), 6)
    assert [item.nodeid for item in kept[:6]] == [f"long[{n}]" for n in (0, 2, 4, 6, 8, 10)]
    assert kept[6:] == items[13:]
    marked = [*items]
    for item in marked[:13]:
        item.get_closest_marker = {"whole": "a mark"}.get
    assert thinned(marked, 6) == marked
    for item in items:
        item.module, item.get_closest_marker = breaking, {}.get
    assert thinned(items, 6, None) == items
    assert thinned(items, 6, 1) == [items[0], items[13]]
