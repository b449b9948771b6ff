"""How evenly lists of tiles load the SMs, counted."""

from pathlib import Path

import numpy as np
import pytest

from bench.__main__ import main
from bench.studies import balance
from bench.studies.balance import Case, dealt, works_of

PAGE = Path(__file__).parents[3] / "docs" / "sequences.md"
# What the busiest SM may have, as a multiple of the mean.
MOST = 1.15
# Of these the splits are too few or too long to be as even as the others.
ROUGH = {("decoding: long-tailed, 16", 8): 1.21, ("decoding: one of 100000 among 30", 32): 1.16}


def test_records_are_dealt_to_and_fro():
    found = dealt(np.array([9, 7, 5, 4, 2, 1]), 1, num_sms=3)
    assert found == (10 / (28 / 3), 9 / (28 / 3), 6)
    # The heads of a tile are neighbours: 9 9 | 7 7 to the first and the second, both times.
    assert dealt(np.array([9, 7]), 2, num_sms=2).busiest == 1


def test_work_is_counted_in_tiles_of_keys():
    case = Case(np.array([300]), np.array([600]))
    assert works_of(case, causal=False).tolist() == [6, 6, 6]
    assert works_of(case, causal=True).tolist() == [6, 6, 5]
    assert works_of(case, causal=False, least=4).tolist() == [5, 5, 5, 2, 2, 2]


@pytest.fixture(scope="module")
def rows():
    return list(balance.rows())


def test_no_sm_has_much_more_than_the_mean(rows):
    """Of the papers' lengths, and of those of a few hundred sequences."""
    named = [row for row in rows if "papers" in row["lengths"] or ", 300" in row["lengths"]]
    assert len(named) == 36
    for row in rows:
        # Few tiles an SM are even only where they are split.
        if row in named or row["largest tile"] < 0.4:
            assert row["whole"] <= MOST, row


def test_splits_are_even_where_tiles_are_not(rows):
    uneven = [row for row in rows if row["whole"] > MOST]
    assert {row["lengths"] for row in uneven} >= {"decoding: 1 x 131072", "decoding: 4 x 32768"}
    for row in uneven:
        most = ROUGH.get((row["lengths"], row["heads"]), MOST)
        assert row["split"] <= most, row


def test_the_page_has_the_table_that_the_command_prints(capsys):
    assert main(["balance"]) == 0
    assert capsys.readouterr().out.strip() in PAGE.read_text(encoding="utf-8")
