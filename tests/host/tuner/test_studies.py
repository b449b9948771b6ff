"""Studies: shared by processes, resumed after any end, and no config tried twice."""

import json
import signal
import sqlite3
import threading
import time
from collections import Counter
from contextlib import closing

import pytest

pytest.importorskip("optuna")
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.trial import TrialState

from numflash.runtime.files import locked
from tests.support.covering import thorough
from tests.support.ledgers import configs_of, expect_each_once, keep, ledger_of, start, tried
from tuner.records import Record
from tuner.search import owners
from tuner.search.studies import ENVIRONMENT, Ledger, StorageError


@thorough
def test_two_processes_share_a_journal_and_try_nothing_twice(tmp_path):
    path = tmp_path / "study.journal"
    configs = tried(start(path, 0.02), start(path, 0.02))
    assert sorted(map(int, configs)) == list(range(12))
    expect_each_once(ledger_of(path))


@thorough
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


def loses(ledger, config):
    """Whether the ledger may not have a config."""
    trial = ledger.ask()
    claimed = ledger.claim(trial, config)
    ledger.give_up(trial)
    return not claimed


def test_a_study_with_other_choices_is_refused_in_words(tmp_path):
    path = tmp_path / "study.journal"
    before = ledger_of(path)
    trial = before.ask({"tile_m": IntDistribution(0, 3)})
    assert before.claim(trial, "a")
    before.finish(trial, Record("a", "predicted", predicted_ms=1.0))
    after = ledger_of(path)
    assert configs_of(after) == ["a"]
    for other in (CategoricalDistribution((16, 32, 48, 64)), CategoricalDistribution((16, 64))):
        with pytest.raises(StorageError) as refused:
            after.ask({"tile_m": other})
        said = str(refused.value)
        assert f"the study 'numbers' in the journal {path} has other choices" in said
        assert "begin again in another --storage" in said
    states = Counter(trial.state for trial in after.study.get_trials())
    assert states == {TrialState.COMPLETE: 1, TrialState.FAIL: 2}


def test_a_line_cut_short_by_a_kill_does_no_harm(tmp_path):
    path = tmp_path / "study.journal"
    open_before = ledger_of(path)
    keep(open_before, "a")
    whole = path.read_bytes()
    with open(path, "ab") as file:
        file.write(b'{"op_code":5,"worker_id":"x","stu')
    assert configs_of(open_before) == ["a"]
    keep(open_before, "b")
    assert path.read_bytes().startswith(whole)
    with open(path, "ab") as file:
        file.write(b'{"op_code":5,"worker_id":"x","stu')
    opened_after = ledger_of(path)
    keep(opened_after, "c")
    for ledger in (open_before, opened_after, ledger_of(path)):
        assert configs_of(ledger) == ["a", "b", "c"]
    assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize("content", [None, b"mine", b"mine\n", b'{"op_code":5'])
def test_a_link_in_place_of_a_journal_is_not_written_through(tmp_path, content):
    path, elsewhere = tmp_path / "study.journal", tmp_path / "elsewhere"
    if content is not None:
        elsewhere.write_bytes(content)
    path.symlink_to(elsewhere)
    with pytest.raises(StorageError, match="a symbolic link is not written through"):
        ledger_of(path)
    assert elsewhere.exists() == (content is not None)
    assert content is None or elsewhere.read_bytes() == content


def test_a_journal_that_becomes_a_link_is_not_written_through(tmp_path):
    path, elsewhere = tmp_path / "study.journal", tmp_path / "elsewhere"
    ledger = Ledger(ledger_of(path).study, sleep=lambda seconds: None)
    elsewhere.write_bytes(path.read_bytes() + b'{"op_code":5')
    before = elsewhere.read_bytes()
    path.unlink()
    path.symlink_to(elsewhere)
    with pytest.raises(StorageError, match="a symbolic link is not written through"):
        ledger.ask()
    assert elsewhere.read_bytes() == before


def test_a_line_that_a_peer_is_writing_is_not_cut(tmp_path):
    path = tmp_path / "study.journal"
    keep(ledger_of(path), "a")
    line = json.dumps({"op_code": 2, "worker_id": "x", "study_id": 0, "user_attr": {"b": 1}})
    found = []

    def join():
        found.append(ledger_of(path).study.user_attrs)

    with locked(tmp_path), open(path, "ab", buffering=0) as file:
        file.write(line[:30].encode())
        thread = threading.Thread(target=join)
        thread.start()
        time.sleep(0.2)
        file.write(f"{line[30:]}\n".encode())
    thread.join(10)
    assert found == [{"b": 1}]


def test_a_trial_of_a_living_process_is_not_given_up(tmp_path):
    ledger = ledger_of(tmp_path / "study.journal")
    assert ledger.claim(ledger.ask(), "a")
    later = Ledger(ledger.study, clock=lambda: time.time() + 7 * 86400)
    assert later.give_up_abandoned() == 0 and later.taken() == {"a"}


class Clock:
    """A clock to set."""

    def __init__(self):
        self.now = time.time()

    def __call__(self):
        return self.now


def test_a_trial_of_another_host_is_given_up_when_it_no_longer_beats(tmp_path, monkeypatch):
    clock = Clock()
    ledger = Ledger(ledger_of(tmp_path / "study.journal").study, clock)
    done, running = keep(ledger, "a"), ledger.ask()
    assert ledger.claim(running, "b")
    monkeypatch.setattr(owners, "_host", lambda: "elsewhere")
    for _ in range(100):
        clock.now += 29
        ledger.beat()
    assert ledger.give_up_abandoned() == 0 and ledger.taken() == {"a", "b"}
    clock.now += 599
    assert ledger.give_up_abandoned() == 0
    clock.now += 60
    assert ledger.give_up_abandoned() == 1 and ledger.taken() == {"a"}
    ledger.beat()  # of a trial that is no longer its own, without an error
    assert done.number == 0


def test_beats_are_written_twice_a_minute(tmp_path):
    clock = Clock()
    ledger = Ledger(ledger_of(tmp_path / "study.journal").study, clock)
    began, trial = clock.now, ledger.ask()
    beats = set()
    for second in range(90):
        clock.now = began + second
        ledger.beat()
        beats.add(ledger.study.trials[trial.number].user_attrs["owner"]["beat"] - began)
    assert sorted(map(round, beats)) == [0, 30, 60]


def test_hosts_of_all_time_zones_see_who_works(tmp_path, monkeypatch):
    path = tmp_path / "study.db"
    theirs = ledger_of(f"sqlite:///{path}")
    assert theirs.claim(theirs.ask(), "a")
    monkeypatch.setattr(owners, "_host", lambda: "elsewhere")
    for config, zone in (("b", "-14 hours"), ("c", "+26 hours")):
        choosing, slept = theirs.study.ask(), []
        # As Optuna 4 has it, which keeps the local time of the host that began a trial.
        with closing(sqlite3.connect(path)) as database:
            start = "datetime_start = datetime(datetime_start, ?)"
            database.execute(f"update trials set {start}", (zone,))
            database.commit()

        def sleep(seconds, choosing=choosing, config=config, slept=slept):
            slept.append(seconds)
            choosing.set_user_attr("config", config)

        ours = Ledger(ledger_of(f"sqlite:///{path}").study, sleep=sleep)
        assert ours.give_up_abandoned() == 0 and "a" in ours.taken()
        # The earlier trial is waited for, wherever it began, and then has its config.
        assert loses(ours, config)
        assert len(slept) == 1


def test_a_trial_that_a_dead_process_began_is_not_waited_for(tmp_path):
    ledger = ledger_of(tmp_path / "study.journal")
    earlier = ledger.study.ask()
    earlier.set_user_attr("owner", {**owners.this_process(time.time()), "start": "0"})
    patient = Ledger(ledger.study, sleep=pytest.fail)
    assert patient.claim(patient.ask(), "a")
    assert patient.give_up_abandoned() == 1


def test_a_trial_that_never_claims_is_waited_for_once(tmp_path):
    clock, slept = Clock(), []

    def sleep(seconds):
        slept.append(seconds)
        clock.now += 1

    ledger = Ledger(ledger_of(tmp_path / "study.journal").study, clock, sleep)
    ledger.study.ask()
    assert ledger.claim(ledger.ask(), "a") and 5 <= len(slept) <= 30
    slept.clear()
    assert ledger.claim(ledger.ask(), "b") and not slept


def test_a_record_of_a_trial_that_was_given_up_is_dropped(tmp_path, caplog):
    path = tmp_path / "study.journal"
    ledger = ledger_of(path)
    trial = ledger.ask()
    assert ledger.claim(trial, "a")
    ledger_of(path).study.tell(trial.number, state=TrialState.FAIL)
    assert not ledger.finish(trial, Record("a", "predicted", predicted_ms=1.0))
    assert "given up by another process" in caplog.text
    assert ledger.records() == [] and ledger.taken() == set()
    keep(ledger, "a")
    assert configs_of(ledger_of(path)) == ["a"]


def test_a_trial_that_was_given_up_claims_nothing(tmp_path):
    ledger = ledger_of(tmp_path / "study.journal")
    trial = ledger.ask()
    ledger.study.tell(trial.number, state=TrialState.FAIL)
    assert not ledger.claim(trial, "a")
    ledger.give_up(trial)


def test_the_earlier_of_two_claims_wins_whoever_asks_first(tmp_path):
    ledger = ledger_of(tmp_path / "study.journal")
    first, second, third = (ledger.study.ask() for _ in range(3))
    for trial in (first, second):
        trial.set_user_attr("config", "a")
    assert not ledger.claim(second, "a")
    assert ledger.claim(first, "a")
    ledger.finish(first, Record("a", "predicted", predicted_ms=1.0))
    assert not ledger.claim(third, "a")


def test_what_the_environment_failed_is_tried_once_more_by_a_later_run(tmp_path):
    path = tmp_path / "study.journal"
    first, beside = ledger_of(path), ledger_of(path)
    for outcome in ENVIRONMENT:
        keep(first, outcome, outcome, reason="first")
    keep(first, "spilled", "spilled")
    keep(first, "fine")
    everything = {*ENVIRONMENT, "spilled", "fine"}
    for ledger in (first, beside):
        assert ledger.taken() == ledger.tried() == everything
        assert loses(ledger, "timeout")

    second = ledger_of(path)
    assert second.taken() == second.tried() == {"spilled", "fine"}
    assert set(configs_of(second)) == everything
    trial = second.ask()
    assert second.claim(trial, "timeout") and second.taken() == {"spilled", "fine", "timeout"}
    assert second.finish(trial, Record("timeout", "timeout", "second"))
    keep(second, "launch_failed", predicted_ms=2.0)
    assert second.taken() == second.tried() == everything - {"compile_failed"}
    assert loses(second, "timeout") and loses(second, "spilled")

    third = ledger_of(path)
    assert third.taken() == everything - {"compile_failed"}
    records = {record.config: record for record in third.records()}
    latest = ["compile_failed", "spilled", "fine", "timeout", "launch_failed"]
    assert configs_of(third) == latest and records["timeout"].reason == "second"
    assert records["launch_failed"].outcome == "predicted"


def test_two_runs_that_try_a_failure_once_more_do_not_do_it_twice(tmp_path):
    path = tmp_path / "study.journal"
    keep(ledger_of(path), "a", "timeout")
    one, other = ledger_of(path), ledger_of(path)
    trial = one.ask()
    assert one.claim(trial, "a") and loses(other, "a")
    assert one.finish(trial, Record("a", "timeout"))
    assert loses(one, "a") and loses(other, "a") and loses(ledger_of(path), "a")


def test_a_claim_waits_for_earlier_trials_that_are_still_choosing(tmp_path):
    study = ledger_of(tmp_path / "study.journal").study
    earlier, later = study.ask(), study.ask()
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            earlier.set_user_attr("config", "a")

    assert not Ledger(study, sleep=sleep).claim(later, "a")
    assert len(slept) == 3


def test_failures_and_slow_configs_are_records_too(tmp_path):
    ledger = ledger_of(tmp_path / "study.journal")
    records = [
        Record("a", "measured", samples_ms=(1.0, 1.1, 1.2)),
        Record("b", "slow", "far behind", samples_ms=(5.0, 5.0)),
        Record("c", "spilled", "64 bytes"),
    ]
    for record in records:
        assert ledger.finish(ledger.ask(), record)
    assert ledger_of(tmp_path / "study.journal").records() == records
    states = [trial.state for trial in ledger.study.get_trials()]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED]


def test_records_are_json_of_any_version():
    record = Record("a", "measured", samples_ms=(1.0, 2.0), predicted_ms=3.0, parts={"x": 1.0})
    fields = json.loads(record.to_json())
    assert Record.from_json(json.dumps({**fields, "new": 1})) == record
    for text in ("", "[]", '{"config": 1}', '{"config": "a", "outcome": "x"}'):
        with pytest.raises(ValueError):
            Record.from_json(text)
