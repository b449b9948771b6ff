"""Studies: shared by processes, resumed after any end, and no config tried twice."""

import importlib
import json
import multiprocessing
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing

import pytest

pytest.importorskip("optuna")
import optuna
import sqlalchemy.exc
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from numflash.runtime.files import locked
from numflash.runtime.switches import is_on
from tuner.records import Record
from tuner.search import owners, storages
from tuner.search.studies import ENVIRONMENT, Ledger, StorageError, journal_path, open_study

# A worker that tries numbers 0 to 11 as "configs", each once, and takes a moment for each.
WORKER = """
import json, sys, time
import optuna
from optuna.distributions import IntDistribution
from tuner.records import Record
from tuner.search.studies import Ledger, open_study
from numflash.runtime.switches import is_on

url, name, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
optuna.logging.set_verbosity(optuna.logging.ERROR)
ledger = Ledger(open_study(url, name, optuna.samplers.RandomSampler(seed=0)))
ledger.give_up_abandoned()
while len(ledger.records()) < 12:
    trial = ledger.ask({"x": IntDistribution(0, 11)})
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


def keep(ledger, config, outcome="predicted", **fields):
    """Try a config: a trial from its beginning to its end."""
    if outcome == "predicted":
        fields = {"predicted_ms": 1.0, **fields}
    trial = ledger.ask()
    assert ledger.claim(trial, config)
    assert ledger.finish(trial, Record(config, outcome, **fields))
    return trial


def loses(ledger, config):
    """Whether the ledger may not have a config."""
    trial = ledger.ask()
    claimed = ledger.claim(trial, config)
    ledger.give_up(trial)
    return not claimed


def configs_of(ledger):
    """The configs with records, in order of trial."""
    return [record.config for record in ledger.records()]


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


METHODS = (
    *("create_new_trial", "set_trial_param", "set_trial_user_attr", "set_trial_state_values"),
    *("set_trial_intermediate_value", "get_all_trials"),
)


class Fragile(InMemoryStorage):
    """A storage in which some methods fail so many times, before or after they did their work."""

    failures, failing, late = 0, METHODS, False


def _fragile(name):
    method = getattr(InMemoryStorage, name)

    def call(self, *args, **kwargs):
        fails = self.failures > 0 and name in self.failing
        self.failures -= fails
        if self.late or not fails:
            answer = method(self, *args, **kwargs)
        if fails:
            raise StorageInternalError("as Optuna puts it") from OSError("the line is cut")
        return answer

    return call


for _name in METHODS:
    setattr(Fragile, _name, _fragile(_name))


def fragile_ledger():
    """(ledger, its storage, how long it slept)."""
    storage, slept = Fragile(), []
    study = optuna.create_study(storage=storage, study_name="numbers")
    return Ledger(study, sleep=slept.append), storage, slept


def test_a_storage_that_fails_is_tried_again(caplog):
    ledger, storage, slept = fragile_ledger()
    distributions = {
        "x": optuna.distributions.IntDistribution(0, 11),
        "y": optuna.distributions.CategoricalDistribution(["p", "q"]),
        "z": optuna.distributions.FloatDistribution(0.5, 8.0, log=True),
    }
    for config in "abcde":
        proposed = {"x": ord(config) - ord("a"), "y": "q", "z": 2.0}
        storage.failures = 3
        trial = ledger.ask(distributions, proposed)
        assert slept == [1, 2, 4]
        assert trial.params == proposed and trial.distributions == distributions
        storage.failures = 1
        assert ledger.claim(trial, config)
        storage.failures = 3
        assert ledger.finish(trial, Record(config, "slow", samples_ms=(5.0,)))
        storage.failures = 3
        assert len(ledger.taken()) == len(ledger.records())
        slept.clear()
    assert configs_of(Ledger(ledger.study)) == list("abcde")
    assert len(ledger.study.trials) == 5
    assert "the line is cut" in caplog.text and "trying again in 4 s" in caplog.text


def test_a_proposal_is_not_lost_to_a_storage_that_fails():
    ledger, storage, slept = fragile_ledger()
    storage.failing = ("set_trial_param",)
    storage.failures = 2
    trial = ledger.ask({"x": optuna.distributions.IntDistribution(0, 11)}, {"x": 7})
    assert trial.params == {"x": 7} and slept == [1, 2] and len(ledger.study.trials) == 1


def test_what_a_failing_storage_did_all_the_same_is_not_lost():
    ledger, storage, slept = fragile_ledger()
    storage.failing, storage.late = ("set_trial_state_values",), True
    for config, outcome in (("a", "measured"), ("b", "spilled")):
        trial = ledger.ask()
        assert ledger.claim(trial, config)
        storage.failures = 1
        assert ledger.finish(trial, Record(config, outcome, samples_ms=(1.0,)))
        assert storage.failures == 0
    assert slept == [1, 1] and configs_of(Ledger(ledger.study)) == ["a", "b"]


def test_a_storage_that_is_gone_is_an_error_and_records_stay():
    ledger, storage, slept = fragile_ledger()
    keep(ledger, "a")
    trial = ledger.ask()
    assert ledger.claim(trial, "b")
    storage.failures = 10**6
    with pytest.raises(StorageError, match="numbers can no longer be used: the line is cut"):
        ledger.finish(trial, Record("b", "predicted", predicted_ms=1.0))
    assert slept == [1, 2, 4]
    assert configs_of(ledger) == ["a", "b"] and ledger.tried() == {"a", "b"}
    for use in (ledger.ask, ledger.taken, ledger.give_up_abandoned):
        with pytest.raises(StorageError):
            use()
    ledger.give_up(trial)
    assert slept == [1, 2, 4]  # nobody waits for it any more


def test_a_journal_that_is_gone_is_named(tmp_path):
    path = tmp_path / "studies" / "x.journal"
    ledger = Ledger(ledger_of(path).study, sleep=lambda seconds: None)
    keep(ledger, "a")
    path.unlink()
    with pytest.raises(StorageError, match=r"the journal .*x\.journal can no longer be used"):
        ledger.taken()
    assert configs_of(ledger) == ["a"]


def test_a_journal_that_is_damaged_meanwhile_is_named(tmp_path):
    path = tmp_path / "x.journal"
    ledger = ledger_of(path)
    with open(path, "ab") as file:
        file.write(b"this is\nno journal\n")
    with pytest.raises(StorageError, match=r"x\.journal .* damaged"):
        ledger.taken()


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


def test_the_journal_lies_in_the_cache_under_a_readable_name(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path))
    path = journal_path("forward float16 on NVIDIA H200, measured")
    assert path.parent == tmp_path / "studies" and "NVIDIA-H200" in path.name
    assert path != journal_path("forward float16 on NVIDIA H200; measured")


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
@pytest.mark.parametrize("what", ["cache", "studies", "file"])
def test_a_journal_in_the_cache_that_others_may_write_is_not_used(
    what, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path / "cache"))
    sampler = optuna.samplers.RandomSampler()
    open_study(None, "x", sampler).tell(open_study(None, "x", sampler).ask(), 1.0)
    path = journal_path("x")
    assert [p.stat().st_mode & 0o777 for p in (path.parent.parent, path.parent, path)] == [
        *(0o700, 0o700, 0o600)
    ]
    spoiled = {"cache": path.parent.parent, "studies": path.parent, "file": path}[what]
    spoiled.chmod(0o777)
    before = path.read_bytes()
    study = open_study(None, "x", sampler)
    assert not study.trials, "the file is read"
    study.ask()
    assert len(study.trials) == 1 and path.read_bytes() == before
    assert "everyone may write it" in caplog.text and "kept in memory" in caplog.text


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


@pytest.mark.parametrize(
    "url, words",
    [
        ("postgresql://me:SECRET@h:54x/db", ["54x", "neither"]),
        ("://me:SECRET@h/db", ["neither"]),
        ("nosuchbase://me:SECRET@h/db", ["nosuchbase", "driver"]),
        ("postgresql://me:SE@CRET@h/db", ["%40"]),
        ("nosuchbase://me:SE/CRET@h/db", ["nosuchbase", "driver"]),
        ("nosuchbase://me:SE?CRET@h/db", ["nosuchbase", "driver"]),
        ("nosuchbase://h/db?password=SECRET&x=1", ["nosuchbase", "x=1"]),
    ],
)
def test_no_message_tells_a_password(url, words):
    with pytest.raises(StorageError) as error:
        open_study(url, "x", optuna.samplers.RandomSampler())
    message = str(error.value)
    assert all(word in message for word in words)
    assert "SE" not in message and "CRET" not in message


@pytest.mark.parametrize(
    "url, shown",
    [
        ("postgresql://me:SECRET@h/db", "postgresql://me:***@h/db"),
        ("postgresql://me@h/db?email=a:b@c", "postgresql://me@h/db?email=a:b@c"),
        ("postgresql://me:a@h/db?to=b@c", "postgresql://me:***@h/db?to=b@c"),
        ("mysql://h/db?user=me&password=SECRET&x=1", "mysql://h/db?user=me&password=***&x=1"),
    ],
)
def test_a_storage_is_shown_without_its_password(url, shown):
    assert storages.shown(url, "x") == f"the storage {shown}"


def test_a_reason_is_told_without_the_password():
    text = "no 'S%40T' in\npostgresql://me:S%40T@h/db, nor is S@T one"
    expected = "no '***' in postgresql://me:***@h/db, nor is *** one"
    assert storages.hide_password(text, "postgresql://me:S%40T@h/db") == expected


def test_a_study_that_cannot_be_opened_tells_no_password(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("postgresql://me:SECRET@h/db is not to my liking")

    monkeypatch.setattr(storages, "RDBStorage", lambda *args, **kwargs: InMemoryStorage())
    monkeypatch.setattr(optuna, "create_study", fail)
    with pytest.raises(StorageError, match="not to my liking") as error:
        open_study("postgresql://me:SECRET@h/db", "x", optuna.samplers.RandomSampler())
    assert "SECRET" not in str(error.value) and "me:***@h/db" in str(error.value)


def test_tables_of_another_version_of_optuna_are_an_error(tmp_path):
    path = tmp_path / "x.db"
    ledger_of(f"sqlite:///{path}")
    for version, advice in (("v3.0.0.a", "storage upgrade"), ("v99", "pip install")):
        with closing(sqlite3.connect(path)) as database:
            database.execute("update alembic_version set version_num = ?", (version,))
            database.commit()
        with pytest.raises(StorageError, match=f"another version of Optuna: .*{advice}"):
            ledger_of(f"sqlite:///{path}")


# A process that opens new storages, each at the same moment as the others.
OPENER = """
import optuna
from tuner.search.studies import open_study

def run(urls, barrier, said):
    for url in urls:
        barrier.wait(60)
        try:
            open_study(url, "numbers", optuna.samplers.RandomSampler())
            said.put("")
        except Exception as error:
            said.put(f"{type(error).__name__}: {error}")
"""


def expect_all_open(urls, tmp_path, monkeypatch):
    """Several processes that begin at once on new storages can open every one."""
    (tmp_path / "opener_of_storages.py").write_text(OPENER)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = importlib.import_module("opener_of_storages").run
    context = multiprocessing.get_context("spawn")
    barrier, said = context.Barrier(3), context.Queue()
    processes = [context.Process(target=run, args=(urls, barrier, said)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [said.get(timeout=60) for _ in range(3 * len(urls))] == [""] * 3 * len(urls)
    for process in processes:
        process.join(60)
    for url in urls:
        assert ledger_of(url).records() == []


@pytest.mark.parametrize("kind", ["sqlite:///{}.db", "{}.journal"])
def test_processes_that_begin_at_once_make_one_storage(kind, tmp_path, monkeypatch):
    urls = [kind.format(tmp_path / str(number)) for number in range(8)]
    expect_all_open(urls, tmp_path, monkeypatch)


def test_a_database_that_does_not_answer_is_asked_once(monkeypatch):
    asked = []

    def refuse(url, **options):
        asked.append(url)
        raise sqlalchemy.exc.OperationalError(None, None, OSError("refused"))

    monkeypatch.setattr(storages, "RDBStorage", refuse)
    with pytest.raises(StorageError, match="does not answer: refused"):
        storages.open_storage("sqlite:///x.db", "x")
    assert len(asked) == 1


@pytest.fixture(scope="module")
def postgresql():
    """A PostgreSQL server on loopback, started for these tests."""
    if not is_on("NUMFLASH_TEST_POSTGRESQL"):
        pytest.skip("set NUMFLASH_TEST_POSTGRESQL=1 to start a PostgreSQL server and test on it")
    pytest.importorskip("psycopg")
    from tests.support.postgresql import serve

    with serve() as server:
        yield server


def test_processes_share_a_postgresql_database_that_all_find_empty(postgresql):
    url = postgresql.url
    configs = tried(*(start(url, 0.02) for _ in range(3)))
    assert sorted(map(int, configs)) == list(range(12))
    expect_each_once(ledger_of(url))


def test_processes_that_begin_at_once_make_the_tables_of_postgresql(
    postgresql, tmp_path, monkeypatch
):
    import psycopg

    schemas = [f"s{number}" for number in range(6)]
    url = postgresql.url.replace("postgresql://", "postgresql+psycopg://")
    with psycopg.connect(postgresql.url, autocommit=True) as connection:
        for schema in schemas:
            connection.execute(f"create schema {schema}")
    urls = [f"{url}?options=-csearch_path%3D{schema}" for schema in schemas]
    expect_all_open(urls, tmp_path, monkeypatch)


def test_after_a_kill_a_postgresql_study_goes_on(postgresql):
    worker = start(postgresql.url, 0.3, "killed")
    worker.stdout.readline()
    worker.stdout.readline()
    worker.kill()
    worker.wait()
    tried(start(postgresql.url, name="killed"))
    expect_each_once(ledger_of(postgresql.url, "killed"))


def test_a_postgresql_server_may_restart_in_the_middle(postgresql):
    worker = start(postgresql.url, 0.2, "restarted")
    for _ in range(3):
        worker.stdout.readline()
    postgresql.stop()
    time.sleep(1.5)
    postgresql.start()
    assert len(tried(worker)) == 9
    expect_each_once(ledger_of(postgresql.url, "restarted"))


def test_a_postgresql_server_that_stays_away_is_named_without_its_password(postgresql):
    url = postgresql.url.replace("tuner@", "tuner:SECRET@")
    slept = []
    ledger = Ledger(ledger_of(url, "lost").study, sleep=slept.append)
    keep(ledger, "a")
    postgresql.stop()
    try:
        with pytest.raises(StorageError, match=r"tuner:\*\*\*@127.*: .*refused") as error:
            ledger.taken()
    finally:
        postgresql.start()
    assert "SECRET" not in str(error.value) and slept == [1, 2, 4]
    assert configs_of(ledger) == ["a"]


def test_records_are_json_of_any_version():
    record = Record("a", "measured", samples_ms=(1.0, 2.0), predicted_ms=3.0, parts={"x": 1.0})
    fields = json.loads(record.to_json())
    assert Record.from_json(json.dumps({**fields, "new": 1})) == record
    for text in ("", "[]", '{"config": 1}', '{"config": "a", "outcome": "x"}'):
        with pytest.raises(ValueError):
            Record.from_json(text)
