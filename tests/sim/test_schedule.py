"""Lists of tiles, made by the kernel: the reference's, word for word."""

import numpy as np
import pytest

from numflash.configs import ScheduleConfig
from numflash.problem.sequences import ListShape
from tests.support.covering import some
from tests.support.sequence_cases import BAD_LENGTHS, CASES, CAUSAL, SPLITS, lists_made, packed

TWO_WARPS = ScheduleConfig(2)


@pytest.mark.parametrize("case", CASES)
def test_a_list_is_the_reference_s_word_for_word(on, case):
    on("sm_80")
    given, shape = CASES[case]
    lists, wanted = lists_made(given, [shape], TWO_WARPS)
    assert wanted[0][1] == 0
    for made, expected in zip(lists, wanted, strict=True):
        np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize("case", BAD_LENGTHS)
def test_numbers_that_leave_the_array_are_cut_and_told(on, case):
    """The simulator reports each access beyond the list's room."""
    on("sm_80")
    (made,), (wanted,) = lists_made(BAD_LENGTHS[case], [ListShape(16, 16, **CAUSAL)], TWO_WARPS)
    assert wanted[1] == 1
    np.testing.assert_array_equal(made, wanted)


@pytest.mark.parametrize("warps", [1, 4])
def test_lists_do_not_depend_on_the_order_or_number_of_warps(on, each_seed, warps):
    on("sm_80")
    rng = np.random.default_rng(each_seed)
    given = packed(rng.integers(0, 70, 45), rng.integers(0, 300, 45))
    shape = ListShape(16, 16, lo=-90, **CAUSAL)
    (made,), (wanted,) = lists_made(given, [shape], ScheduleConfig(warps))
    np.testing.assert_array_equal(made, wanted)


def test_splits_do_not_depend_on_the_order_of_warps(on, each_seed):
    on("sm_80")
    rng = np.random.default_rng(each_seed)
    given = packed(rng.integers(0, 70, 20), rng.integers(0, 900, 20))
    shape = ListShape(16, 16, least=1, shares=11, **CAUSAL)
    for made, wanted in zip(*lists_made(given, [shape], ScheduleConfig(4)), strict=True):
        np.testing.assert_array_equal(made, wanted)


def test_one_launch_makes_lists_of_queries_and_of_keys(on):
    on("sm_80")
    given = packed([30, 0, 100], [50, 20, 10])
    shapes = [ListShape(16, 32, **CAUSAL), ListShape(64, 16, by_keys=True, **CAUSAL)]
    shapes.append(ListShape(32, 16, **CAUSAL))
    for made, wanted in zip(*lists_made(given, shapes, TWO_WARPS), strict=True):
        np.testing.assert_array_equal(made, wanted)


@pytest.mark.parametrize("case", SPLITS)
def test_tiles_that_are_split_are_the_reference_s_word_for_word(on, case):
    on("sm_80")
    given, shape = SPLITS[case]
    lists = lists_made(given, [shape], TWO_WARPS)
    assert lists[1][0][1] == 0
    for made, wanted in zip(*lists, strict=True):
        np.testing.assert_array_equal(made, wanted)


@pytest.mark.parametrize("shares", [0, 3])
@pytest.mark.parametrize("case", some(BAD_LENGTHS, every=3))
def test_what_has_no_room_is_cut_when_tiles_are_split(on, case, shares):
    on("sm_80")
    shape = ListShape(16, 16, least=1, shares=shares, **CAUSAL)
    for each in (shape, shape._replace(lo=-40)):
        lists = lists_made(BAD_LENGTHS[case], [each], TWO_WARPS)
        assert lists[1][0][1] == 1
        for made, wanted in zip(*lists, strict=True):
            np.testing.assert_array_equal(made, wanted)


def test_lists_with_splits_and_without_in_one_call(on):
    on("sm_80")
    given = packed([30, 0, 100], [50, 20, 10])
    shapes = [ListShape(16, 32), ListShape(16, 16, least=1, **CAUSAL), ListShape(32, 32)]
    for made, wanted in zip(*lists_made(given, shapes, TWO_WARPS), strict=True):
        np.testing.assert_array_equal(made, wanted)


def test_the_config_that_is_shipped(on):
    on("sm_80")
    (made,), (wanted,) = lists_made(*CASES["causal"][:1], [CASES["causal"][1]])
    np.testing.assert_array_equal(made, wanted)
