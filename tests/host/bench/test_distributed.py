"""`python -m bench distributed` without a GPU: its arithmetic, its tables, ranks as threads."""

import numpy as np
import pytest

from bench.__main__ import main
from bench.distributed import command, measuring, model
from bench.distributed.cases import Case, cases
from bench.distributed.measuring import STILL
from bench.distributed.ranks import Threads, is_under_torchrun
from bench.distributed.wires import Counting, Still
from bench.records import record
from numflash.distributed import local


def _row(case, direction, ranks, method):
    (found,) = [
        dict(zip(model.COLUMNS, row, strict=True))
        for row in model.rows([case])
        if row[1:4] == [direction, str(ranks), method]
    ]
    return found


@pytest.mark.parametrize(
    "case, forward, backward, mib, exposed",
    [
        (Case(2**15, 32, 8), 1.83, 6.1, 70, 0.18),
        (Case(2**17, 32, 8), 29.3, 97.7, 280, 0.73),
        (Case(2**17, 32, 32), 29.3, 97.7, 448, 1.2),
    ],
    ids=str,
)
def test_the_model_is_that_of_the_design(case, forward, backward, mib, exposed):
    """DISTRIBUTED.md, section 5: 8 ranks, from the same assumed figures."""
    found = _row(case, "forward", 8, "ring")
    assert float(found["ms"]) == pytest.approx(forward, rel=0.01)
    # A hop hides under a step; the queries or keys that go home last do not.
    assert float(found["exposed ms"]) == 0
    assert float(_row(case, "backward", 8, "ring")["ms"]) == pytest.approx(backward, rel=0.02)
    heads = _row(case, "forward", 8, "heads")
    # And lse, which the design left out: 4 bytes of 256.
    assert float(heads["MiB sent"]) == pytest.approx(mib, rel=0.01)
    assert float(heads["exposed ms"]) == pytest.approx(exposed, rel=0.05)
    assert float(heads["share of one GPU's speed"]) < 1


def test_one_gpu_has_its_own_speed():
    for direction in ("forward", "backward"):
        found = _row(cases()[0], direction, 1, "one GPU")
        assert found["share of one GPU's speed"] == "1.00" and found["MiB sent"] == "0"


def test_windows_are_balanced():
    window = [case for case in cases() if case.window]
    for row in model.rows(window):
        assert float(row[model.COLUMNS.index("lockstep")]) <= 1.1


def test_without_a_gpu_the_table_says_that_nothing_was_measured(monkeypatch, capsys):
    monkeypatch.setattr(record, "_gpu", lambda *_: None)
    assert main(["distributed", "--quick"]) == 0
    printed = capsys.readouterr().out
    assert "nothing is measured" in printed
    assert "No speed was measured here" in printed and "all three assumed" in printed
    assert len(printed.splitlines()) == 4 + 2 + 2 * (1 + 3 * 3)


POINTS = [
    {
        "case": "c",
        "direction": "forward",
        "ranks": 1,
        "methods": {"gather": {"status": "measured", "median_ms": 8.0}},
    },
    {
        "case": "c",
        "direction": "forward",
        "ranks": 4,
        "methods": {
            "gather": {
                "status": "measured",
                "median_ms": 2.5,
                "exposed_ms": 0.25,
                "sent": [2**20, 2**21],
                "expected": [2**20, 2**21],
                "lockstep": 1.0,
            },
            "gather" + STILL: {"status": "measured", "median_ms": 2.25},
            "ring": {
                "status": "measured",
                "median_ms": 2.0,
                "sent": [1, 1],
                "expected": [1, 2],
                "lockstep": 1.0,
            },
            "yunchang": {"status": "unavailable", "reason": "No module named 'yunchang'"},
        },
    },
]


def test_the_table_of_a_record():
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in command.table(POINTS, in_turn=False).splitlines()[2:]
    ]
    assert [line[3:] for line in lines] == [
        ["gather", "8", "1.00", "", "", "", ""],
        ["gather", "2.5", "0.80", "0.250", "1.00", "2", "yes"],
        ["ring", "2", "1.00", "", "1.00", "9.537e-07", "NO"],
        ["yunchang", "unavailable: No module named 'yunchang'", "", "", "", "", ""],
    ]


def test_ranks_in_turn_share_one_gpus_speed():
    line = command.table(POINTS, in_turn=True).splitlines()[3]
    assert [cell.strip() for cell in line.split("|")][6] == "3.20"


def test_a_time_is_that_of_the_slowest_rank():
    entries = [
        {"status": "measured", "ms": [1.0, 5.0, 2.0], "sent": 7, "rel_rms": 1e-3},
        {"status": "measured", "ms": [2.0, 1.0, 3.0], "sent": 8, "rel_rms": 2e-3},
    ]
    found = measuring._together(entries)
    assert found["samples_ms"] == [2.0, 5.0, 3.0] and found["median_ms"] == 3.0
    assert (found["sent"], found["rel_rms"]) == ([7, 8], 2e-3)


def test_one_failure_is_that_of_all():
    failed = {"status": "failed", "reason": "r"}
    assert measuring._together([{"status": "measured", "ms": []}, failed]) == failed


def test_bytes_are_counted_and_moved_or_not():
    arrays = [np.arange(6, dtype=np.uint8), np.zeros(6, np.uint8)]

    def run(wrap):
        comms, target = [wrap(comm) for comm in local(2)], np.zeros(6, np.uint8)
        waits = [
            comms[0].exchange([(arrays[0], 1), (arrays[0][:2], 1)], [], "x"),
            comms[1].exchange([], [(target, 0), (np.zeros(2, np.uint8), 0)], "x"),
        ]
        for wait in waits:
            wait()
        return comms, target

    comms, target = run(Counting)
    assert [comm.sent for comm in comms] == [8, 0] and (target == arrays[0]).all()
    _, target = run(Still)
    assert not target.any()


def test_threads_are_ranks_and_raise():
    ranks = Threads(None, "a GPU", timeout=20)
    # Each waits for the others.
    seen = ranks.run(3, lambda rank: {"others": rank.comm.agree(str(rank.comm.rank))})
    assert [each["others"] for each in seen] == [["0", "1", "2"]] * 3

    def fail(rank):
        if rank.comm.rank == 1:
            raise KeyError("k")
        return {}

    with pytest.raises(KeyError):
        ranks.run(2, fail)
    assert ranks.is_late(0) and not ranks.is_late(float("inf"))


def test_torchrun_is_seen(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not is_under_torchrun()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert is_under_torchrun()


def test_sizes_and_directions_are_measured_until_the_deadline(monkeypatch):
    asked = []
    monkeypatch.setattr(
        command, "measure", lambda ranks, case, size, direction: asked.append((size, direction))
    )
    ranks = Threads(None, "a GPU")
    ranks.most = 4
    assert list(command.measured(ranks, cases(quick=True), float("inf"))) == []
    assert asked == [(n, way) for way in ("forward", "backward") for n in (1, 2, 4)]
    asked.clear()
    assert list(command.measured(ranks, cases(), 0.0)) == [] and asked == []
