"""Studies: shared by processes, resumed after any end, and no config tried twice."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

pytest.importorskip("optuna")
import optuna
from optuna.trial import TrialState

from numflash_tuner.records import Record
from numflash_tuner.studies import Ledger, StorageError, journal_path, open_study

# A worker that tries numbers 0 to 11 as "configs", each once, and takes a moment for each.
WORKER = """
import json, sys, time
import optuna
from optuna.distributions import IntDistribution
from numflash_tuner.records import Record
from numflash_tuner.studies import Ledger, open_study

url, name, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
optuna.logging.set_verbosity(optuna.logging.ERROR)
ledger = Ledger(open_study(url, name, optuna.samplers.RandomSampler(seed=0)))
ledger.give_up_abandoned()
while len(ledger.records()) < 12:
    trial = ledger.study.ask({"x": IntDistribution(0, 11)})
    ledger.begin(trial)
    config = str(trial.params["x"])
    if config in ledger.taken() or not ledger.claim(trial, config):
        ledger.give_up(trial)
        if len(ledger.taken()) == 12:
            break
        continue
    print(config, flush=True)
    time.sleep(pause)
    ledger.finish(trial, Record(config, "predicted", predicted_ms=1.0 + trial.params["x"]))
"""


def start(url, pause=0.0, name="numbers"):
    """A worker process on a study."""
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(url), name, str(pause)],
        stdout=subprocess.PIPE,
        text=True,
    )


def ledger_of(url, name="numbers"):
    """The ledger of a study."""
    return Ledger(open_study(str(url), name, optuna.samplers.RandomSampler()))


def tried(*workers):
    """What workers tried, after they ended well."""
    outputs = [worker.communicate(timeout=60)[0].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * len(workers)
    return [config for output in outputs for config in output]


def expect_each_once(ledger):
    """Every config has one record."""
    counts = Counter(record.config for record in ledger.records())
    assert counts == Counter(map(str, range(12)))


def test_two_processes_share_a_journal_and_try_nothing_twice(tmp_path):
    path = tmp_path / "study.journal"
    configs = tried(start(path, 0.02), start(path, 0.02))
    assert sorted(map(int, configs)) == list(range(12))
    expect_each_once(ledger_of(path))


def test_after_a_kill_the_next_process_goes_on(tmp_path):
    path = tmp_path / "study.journal"
    worker = start(path, 0.3)
    for _ in range(3):
        worker.stdout.readline()
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    ledger = ledger_of(path)
    done = len(ledger.records())
    assert 1 <= done <= 3
    configs = tried(start(path))
    # What was being tried when the process died is tried again, what was done is not.
    assert len(configs) == 12 - done
    expect_each_once(ledger_of(path))
    states = Counter(trial.state for trial in ledger_of(path).study.get_trials())
    assert not states[TrialState.RUNNING]


def test_a_line_cut_short_by_a_kill_does_no_harm(tmp_path):
    path = tmp_path / "study.journal"
    ledger = ledger_of(path)
    trial = ledger.study.ask()
    ledger.finish(trial, Record("a", "predicted", predicted_ms=1.0))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code":5,"worker_id":"x","stu')
    assert [record.config for record in ledger_of(path).records()] == ["a"]
    assert path.read_bytes().startswith(whole)
    again = ledger_of(path)
    trial = again.study.ask()
    again.finish(trial, Record("b", "predicted", predicted_ms=1.0))
    assert [record.config for record in ledger_of(path).records()] == ["a", "b"]


def test_a_trial_of_a_living_process_is_not_given_up(tmp_path):
    ledger = ledger_of(tmp_path / "study.journal")
    trial = ledger.study.ask()
    ledger.begin(trial)
    assert ledger.claim(trial, "a")
    assert ledger.give_up_abandoned() == 0 and ledger.taken() == {"a"}


def test_a_trial_of_another_host_is_given_up_when_it_is_too_old(tmp_path):
    ledger = ledger_of(tmp_path / "study.journal")
    trial = ledger.study.ask()
    trial.set_user_attr("owner", {"host": "elsewhere", "pid": 1, "start": "1"})
    assert ledger.claim(trial, "a")
    assert ledger.give_up_abandoned() == 0
    later = Ledger(ledger.study, clock=lambda: time.time() + 3600)
    assert later.give_up_abandoned() == 1 and later.taken() == set()


def test_the_earlier_of_two_claims_wins_whoever_asks_first(tmp_path):
    ledger = ledger_of(tmp_path / "study.journal")
    first, second, third = (ledger.study.ask() for _ in range(3))
    for trial in (first, second):
        trial.set_user_attr("config", "a")
    assert not ledger.claim(second, "a")
    assert ledger.claim(first, "a")
    ledger.finish(first, Record("a", "predicted", predicted_ms=1.0))
    assert not ledger.claim(third, "a")


def test_a_claim_waits_for_earlier_trials_that_are_still_choosing(tmp_path):
    ledger = ledger_of(tmp_path / "study.journal")
    earlier, later = ledger.study.ask(), ledger.study.ask()
    waited = []

    class Patient(Ledger):
        def _is_choosing(self, trial):
            choosing = super()._is_choosing(trial)
            if choosing:
                waited.append(trial.number)
                earlier.set_user_attr("config", "a")
            return choosing

    assert not Patient(ledger.study).claim(later, "a")
    assert waited == [earlier.number]


def test_failures_and_slow_configs_are_records_too(tmp_path):
    ledger = ledger_of(tmp_path / "study.journal")
    records = [
        Record("a", "measured", samples_ms=(1.0, 1.1, 1.2)),
        Record("b", "slow", "far behind", samples_ms=(5.0, 5.0)),
        Record("c", "spilled", "64 bytes"),
    ]
    for record in records:
        ledger.finish(ledger.study.ask(), record)
    assert ledger_of(tmp_path / "study.journal").records() == records
    states = [trial.state for trial in ledger.study.get_trials()]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED]


def test_the_journal_lies_in_the_cache_under_a_readable_name(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path))
    path = journal_path("forward float16 on NVIDIA H200, measured")
    assert path.parent == tmp_path / "studies" and "NVIDIA-H200" in path.name
    assert path != journal_path("forward float16 on NVIDIA H200; measured")


@pytest.mark.parametrize(
    "url, words",
    [
        ("postgresql://nobody:secret@127.0.0.1:1/none", ["127.0.0.1:1", "does not answer"]),
        ("nosuchbase://x/y", ["nosuchbase"]),
        ("sqlite:////no/such/folder/x.db", ["/no/such/folder/x.db"]),
    ],
)
def test_a_storage_that_does_not_answer_is_named_without_its_password(url, words):
    if url.startswith("postgresql"):
        pytest.importorskip("psycopg")
    with pytest.raises(StorageError) as error:
        open_study(url, "x", optuna.samplers.RandomSampler())
    assert all(word in str(error.value) for word in words) and "secret" not in str(error.value)


def test_a_journal_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        open_study(str(tmp_path / "file" / "x.journal"), "x", optuna.samplers.RandomSampler())


def test_a_damaged_journal_is_named(tmp_path):
    path = tmp_path / "x.journal"
    path.write_text("this is\nno journal\n")
    with pytest.raises(StorageError, match=r"x\.journal is damaged"):
        open_study(str(path), "x", optuna.samplers.RandomSampler())


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory):
    """The URL of a PostgreSQL server on loopback, started for these tests."""
    if os.environ.get("NUMFLASH_TEST_POSTGRESQL") != "1":
        pytest.skip("set NUMFLASH_TEST_POSTGRESQL=1 to start a PostgreSQL server and test on it")
    pytest.importorskip("psycopg")
    from tests.postgresql import serve

    with serve(tmp_path_factory.mktemp("postgresql")) as url:
        yield url


def test_two_processes_share_a_postgresql_database(postgresql):
    configs = tried(start(postgresql, 0.02), start(postgresql, 0.02))
    assert sorted(map(int, configs)) == list(range(12))
    expect_each_once(ledger_of(postgresql))


def test_after_a_kill_a_postgresql_study_goes_on(postgresql):
    worker = start(postgresql, 0.3, "killed")
    worker.stdout.readline()
    worker.stdout.readline()
    worker.kill()
    worker.wait()
    tried(start(postgresql, name="killed"))
    expect_each_once(ledger_of(postgresql, "killed"))


def test_records_are_json_of_any_version():
    record = Record("a", "measured", samples_ms=(1.0, 2.0), predicted_ms=3.0, parts={"x": 1.0})
    fields = json.loads(record.to_json())
    assert Record.from_json(json.dumps({**fields, "new": 1})) == record
    for text in ("", "[]", '{"config": 1}', '{"config": "a", "outcome": "x"}'):
        with pytest.raises(ValueError):
            Record.from_json(text)
