"""`bench distributed` on ranks that are threads, with NumPy's arrays in place of a GPU's."""

import numpy as np
import pytest

from bench import report
from bench.distributed import measuring
from bench.distributed.cases import Case
from bench.distributed.command import table
from bench.distributed.measuring import STILL, measure
from bench.distributed.ranks import Threads
from tests.support.covering import some, thorough


class Host:
    """A device that is none."""

    def normal(self, shape, dtype, seed):
        """See `bench.distributed.ranks.Device`."""
        return np.random.default_rng(seed).standard_normal(shape).astype(dtype)

    def synchronize(self):
        """See `bench.distributed.ranks.Device`."""


CASE = Case(8, 2, 1, 16, dtype="float16")


@thorough
@pytest.mark.parametrize("direction", some(["forward", "backward"], "forward"))
def test_a_method_is_checked_counted_and_timed(monkeypatch, direction):
    monkeypatch.setattr(measuring, "METHODS", ("ring",))
    point = measure(Threads(Host(), "the host"), CASE, 2, direction, rounds=1)
    assert (point["ranks"], point["direction"]) == (2, direction)
    ring, still = (point["methods"][name] for name in ("ring", "ring" + STILL))
    assert ring["status"] == still["status"] == "measured"
    assert ring["sent"] == ring["expected"] and all(ring["sent"])
    assert 0 < ring["rel_rms"] < 2e-3
    assert ring["exposed_ms"] == ring["median_ms"] - still["median_ms"]
    peer = point["methods"]["ring-flash-attention"]
    assert peer["status"] == "unavailable" and "torchrun" in peer["reason"]
    assert " yes " in table([point], in_turn=True)
    # What reads all records passes it over.
    assert report.newest_points([{"points": [point]}], direction) == []


def test_wrong_results_are_not_timed(monkeypatch):
    monkeypatch.setattr(measuring, "METHODS", ("gather",))
    monkeypatch.setattr(measuring, "MAX_REL_RMS", 0.0)
    point = measure(Threads(Host(), "the host"), CASE, 1, "forward", rounds=1)
    # Of one rank the results are those of one GPU, to the bit.
    assert point["methods"]["gather"]["rel_rms"] == 0
    monkeypatch.setattr(measuring, "_rel_rms", lambda found, expected: 0.5)
    point = measure(Threads(Host(), "the host"), CASE, 1, "forward", rounds=1)
    assert point["methods"]["gather"] == {
        "status": "wrong",
        "sent": 0,
        "rel_rms": 0.5,
        "reason": "differs by 5.0e-01",
    }
