"""Lists of tiles, made by the compiled kernel: the reference's, word for word."""

import numpy as np
import pytest

from numflash.configs import ScheduleConfig
from numflash.problem.sequences import ListShape
from tests.support.sequence_cases import BAD_LENGTHS, CASES, CAUSAL, SPLITS, lists_made


@pytest.mark.parametrize(
    "case",
    ["window", "packed heads", "of keys", "empty sequences", "starts and lengths", "padded"],
)
def test_a_list_is_the_reference_s_word_for_word(executed, case):
    executed("sm_80")
    given, shape = CASES[case]
    (made,), (wanted,) = lists_made(given, [shape], ScheduleConfig(2))
    np.testing.assert_array_equal(made, wanted)


@pytest.mark.parametrize("case", ["by work", "window", "work beyond 32 bits", "nothing"])
def test_tiles_that_are_split_are_the_reference_s_word_for_word(executed, case):
    executed("sm_80")
    given, shape = SPLITS[case]
    for made, wanted in zip(*lists_made(given, [shape], ScheduleConfig(2)), strict=True):
        np.testing.assert_array_equal(made, wanted)


def test_numbers_that_leave_the_array_are_cut(executed):
    executed("sm_90a")
    for given in BAD_LENGTHS.values():
        shapes = [ListShape(16, 16, **CAUSAL), ListShape(32, 16, by_keys=True, **CAUSAL)]
        for made, wanted in zip(*lists_made(given, shapes, ScheduleConfig(2)), strict=True):
            np.testing.assert_array_equal(made, wanted)
