"""Storages of studies: what fails is tried again, what is gone is named, no password is told."""

import sqlite3
import sys
from contextlib import closing

import pytest

pytest.importorskip("optuna")
import optuna
import sqlalchemy.exc
from optuna.exceptions import StorageInternalError
from optuna.storages import InMemoryStorage

from tests.support.covering import ALL, thorough
from tests.support.ledgers import configs_of, expect_all_open, keep, ledger_of
from tuner.records import Record
from tuner.search import storages
from tuner.search.studies import Ledger, StorageError, journal_path, open_study

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
    assert slept == [1, 2, 4, 8]
    assert configs_of(ledger) == ["a", "b"] and ledger.tried() == {"a", "b"}
    for use in (ledger.ask, ledger.taken, ledger.give_up_abandoned):
        with pytest.raises(StorageError):
            use()
    ledger.give_up(trial)
    assert slept == [1, 2, 4, 8]  # nobody waits for it any more


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


@thorough
def test_processes_that_begin_at_once_make_one_storage(tmp_path, monkeypatch):
    kinds = "sqlite:///{}.db", "{}.journal"
    urls = [
        kind.format(tmp_path / str(number)) for kind in kinds for number in range(3 if ALL else 1)
    ]
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
