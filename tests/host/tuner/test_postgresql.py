"""Studies in a PostgreSQL database: begun at once, killed, restarted and lost."""

import time

import pytest

pytest.importorskip("optuna")
from numflash.runtime.switches import is_on
from tests.support.ledgers import (
    configs_of,
    expect_all_open,
    expect_each_once,
    keep,
    ledger_of,
    start,
    tried,
)
from tuner.search.studies import Ledger, StorageError


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
    assert "SECRET" not in str(error.value) and slept == [1, 2, 4, 8]
    assert configs_of(ledger) == ["a"]
