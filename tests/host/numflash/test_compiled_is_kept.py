"""Kernels that tests compile are kept for the next run, in a folder of limited size."""

import os

from numflash.machine_code import cubins
from tests import conftest


def test_every_test_finds_what_another_has_compiled(tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    kept.mkdir(mode=0o700)
    monkeypatch.setattr(conftest, "_COMPILED", kept)
    for name in ("one", "two", "one"):
        conftest.share_compiled(tmp_path / name)
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path / "one"))
    cubins.write("key", {"registers": 1}, b"code")
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path / "two"))
    assert cubins.read("key") == ({"registers": 1}, b"code")
    assert cubins.read("another key") is None


def test_what_was_written_first_is_dropped_when_it_is_too_much(tmp_path):
    for age, name in enumerate("dcba"):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    conftest.drop_oldest(tmp_path, 40)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "d"]
    conftest.drop_oldest(tmp_path, 39)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d"]
