"""Figures of a tuning run: ranks, times of one kind, parameters."""

import numpy as np
import pytest

from tests.support.tuning_results import RECORDS, measured, result
from tuner.records import Record
from tuner.search.results import parameters, rank_correlation

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
