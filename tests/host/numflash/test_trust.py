"""Who may write what numflash reads: refused, said once, and never in a user's way."""

import hashlib
import logging
import os
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from stat import S_IMODE
from types import SimpleNamespace

import pytest

from numflash.api import info
from numflash.machine_code import cubins
from numflash.runtime import cache_folder, trust
from numflash.runtime.files import locked
from numflash.selection import store
from tests.host.numflash.test_store import ENTRY, H200
from tuner import caches

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="only root can become other users")
STRANGER, MEMBERS, GROUP = 65534, (12001, 12002), 12000


@pytest.fixture(autouse=True)
def users_cache(tmp_path, monkeypatch):
    """The folder of a user who has named none; nothing has been said yet."""
    monkeypatch.delenv("NUMFLASH_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(trust, "_said", set())
    return tmp_path / "numflash"


@pytest.fixture
def warnings(caplog):
    """The messages logged so far, which are then forgotten."""

    def take():
        found = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        caplog.clear()
        return found

    return take


@pytest.fixture(params=[0o000, 0o002, 0o022, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def fill():
    """One file of each kind in the cache."""
    cubins.write("key", {"registers": 1}, b"code")
    store.add(H200, [ENTRY])


def is_read():
    """The parts of `fill` that are found: (the kernel, the table)."""
    return cubins.read("key") == ({"registers": 1}, b"code"), store.read(H200) == [ENTRY]


def writable_by_all(path):
    path.chmod(0o777 if path.is_dir() else 0o666)


def writable_by_a_group(path):
    path.chmod(0o770 if path.is_dir() else 0o660)


def of_a_stranger(path):
    os.chown(path, STRANGER, -1)


hows = pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        pytest.param(writable_by_all, "everyone may write it", id="world"),
        pytest.param(writable_by_a_group, "the group", id="group"),
        pytest.param(of_a_stranger, "it belongs to the user", id="owner", marks=needs_root),
    ],
)


def test_what_is_new_is_the_users_alone(users_cache, umask, warnings):
    fill()
    with locked(cache_folder.folder_for("configs")):
        pass
    for folder in (users_cache, users_cache / "cubins", users_cache / "configs"):
        assert S_IMODE(folder.stat().st_mode) == 0o700
    for file in users_cache.rglob("*.*"):
        assert not S_IMODE(file.stat().st_mode) & 0o022, file
    assert is_read() == (True, True) and warnings() == []


@hows
@pytest.mark.parametrize("name", ["", "cubins", "configs"])
def test_a_folder_that_others_may_write_is_not_used(name, spoil, reason, users_cache, warnings):
    fill()
    before = {file: file.read_bytes() for file in users_cache.rglob("*.*")}
    spoil(users_cache / name)
    found = (name == "configs", name == "cubins")
    assert is_read() == found
    (said,) = warnings()
    assert f"{users_cache / name} is not used: {reason}" in said and "NUMFLASH_CACHE_DIR" in said
    # Neither is anything written there, and nothing is said twice.
    if not found[0]:
        cubins.write("key", {}, b"other code")
    if not found[1]:
        with pytest.raises(PermissionError, match="is not used"):
            store.add(H200, [replace(ENTRY, time_ms=0.5)])
    assert is_read() == found and warnings() == []
    assert {file: file.read_bytes() for file in before} == before


@hows
def test_a_file_that_others_may_write_is_made_anew(spoil, reason, users_cache, warnings):
    fill()
    (kernel,), (table,) = users_cache.rglob("*.cubin"), users_cache.rglob("*.json")
    spoil(kernel)
    spoil(table)
    assert is_read() == (False, False)
    said = "\n".join(warnings())
    assert all(f"{file} is not used: {reason}" in said for file in (kernel, table))
    fill()
    assert is_read() == (True, True)
    assert [file.name for file in table.parent.glob("*.corrupt*")] == [table.name + ".corrupt-1"]


@hows
@pytest.mark.parametrize("name", ["", "configs", "*.json"])
def test_what_is_not_used_is_not_called_right(name, spoil, reason, users_cache, capsys):
    fill()
    (table,) = users_cache.rglob("*.json")
    path = table if name == "*.json" else users_cache / name
    assert caches.main(["validate"]) == 0
    spoil(path)
    assert caches.main(["validate"]) == 1
    assert capsys.readouterr().out.count(f"{path} is not used: {reason}") == 1
    told = info.describe(info.collect())
    assert (f"{path} is not used: {reason}" in told) is (name == "")


@pytest.mark.parametrize(
    ("mode", "owner", "gid", "group", "who"),
    [
        (0o100644, "me", 1, None, None),
        (0o100644, "root", 1, None, None),
        (0o100644, "stranger", 1, None, "belongs to the user"),
        (0o100644, "stranger", 1, 1, None),
        (0o100664, "me", 1, None, "the group 1"),
        (0o100664, "stranger", 1, 1, None),
        (0o100664, "stranger", 1, 2, "the group 1"),
        (0o100646, "me", 1, 1, "everyone"),
        (0o041777, "root", 1, None, "everyone"),
    ],
)
def test_who_else_could_have_written_it(mode, owner, gid, group, who):
    uid = {"me": os.geteuid(), "root": 0, "stranger": os.geteuid() + 1}[owner]
    reason = trust._who_else(SimpleNamespace(st_mode=mode, st_uid=uid, st_gid=gid), group)
    assert reason is None if who is None else who in reason


def test_a_folder_that_is_a_link_is_its_target(users_cache, tmp_path, warnings):
    target = tmp_path / "elsewhere"
    target.mkdir(mode=0o700)
    users_cache.symlink_to(target)
    fill()
    assert is_read() == (True, True) and warnings() == []
    target.chmod(0o777)
    assert is_read() == (False, False) and len(warnings()) == 1


def test_the_temporary_folder_is_no_cache(tmp_path, monkeypatch, warnings):
    tmp_path.chmod(0o1777)
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path))
    cubins.write("key", {}, b"code")
    assert cubins.read("key") is None and list(tmp_path.iterdir()) == []
    assert len(warnings()) == 1


def test_what_bench_runs_shares_a_folder_of_this_user(users_cache):
    from bench.records.checks import child_environment

    assert child_environment()["NUMFLASH_CACHE_DIR"] == str(users_cache / "bench")


# A folder that a group shares


@pytest.fixture
def shared(monkeypatch):
    """A folder that NUMFLASH_CACHE_DIR names and that a group may write."""
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        folder = Path(parent, "shared")
        folder.mkdir()
        if ROOT:
            os.chown(folder, -1, GROUP)
        folder.chmod(0o770)
        monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(folder))
        yield folder


@contextmanager
def member(number):
    """Another user of the group."""
    os.setegid(GROUP)
    os.seteuid(MEMBERS[number])
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def test_a_group_can_read_what_is_new_in_its_folder(shared, umask, warnings):
    fill()
    group = shared.stat().st_gid
    for folder in (shared / "cubins", shared / "configs"):
        assert S_IMODE(folder.stat().st_mode) & 0o777 == 0o770
    for file in shared.rglob("*.*"):
        mode = S_IMODE(file.stat().st_mode)
        assert (file.stat().st_gid, mode & 0o062) == (
            group,
            0o060 if file.name == ".lock" else 0o040,
        )
    assert is_read() == (True, True) and warnings() == []


@needs_root
def test_members_use_each_others_files(shared, umask, warnings):
    with member(0):
        fill()
    before = {file: file.stat().st_ino for file in shared.rglob("*.*")}
    with member(1):
        assert is_read() == (True, True)
        fill_more = replace(ENTRY, time_ms=0.5)
        store.add(H200, [fill_more])
        assert store.read(H200) == [fill_more]
    with member(0):
        assert cubins.read("key") is not None and store.read(H200) == [fill_more]
    kernels = [file for file in before if file.suffix == ".cubin"]
    assert len(kernels) == 1 and kernels[0].stat().st_ino == before[kernels[0]]
    assert warnings() == []


@needs_root
def test_what_a_member_alone_could_read_is_replaced_once(shared, warnings):
    with member(0):
        fill()
    (kernel,) = shared.rglob("*.cubin")
    kernel.chmod(0o600)
    with member(1):
        assert cubins.read("key") is None
        cubins.write("key", {"registers": 1}, b"code")
    with member(0):
        assert is_read() == (True, True)
    assert warnings() == []


@pytest.mark.parametrize("name", ["", "cubins", "file"])
def test_the_world_may_not_write_what_a_group_shares(name, shared, warnings):
    fill()
    (kernel,) = shared.rglob("*.cubin")
    path = kernel if name == "file" else shared / name
    path.chmod(path.stat().st_mode | 0o002)
    assert cubins.read("key") is None
    (said,) = warnings()
    assert f"{path} is not used: everyone may write it" in said


@needs_root
def test_another_group_may_not_write_what_a_group_shares(shared, warnings):
    fill()
    (kernel,) = shared.rglob("*.cubin")
    os.chown(kernel, -1, GROUP + 1)
    kernel.chmod(0o660)
    assert cubins.read("key") is None
    assert f"the group {GROUP + 1} may write it" in warnings()[0]


@needs_root
def test_a_strangers_folder_is_not_believed_because_it_was_named(tmp_path, monkeypatch, warnings):
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path / "cache"))
    fill()
    os.chown(tmp_path / "cache", STRANGER, -1)
    assert is_read() == (False, False)
    assert f"it belongs to the user {STRANGER}" in warnings()[0]


@needs_root
def test_a_strangers_group_does_not_make_it_believed(tmp_path, monkeypatch, warnings):
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path / "cache"))
    fill()
    for path in (tmp_path / "cache", *(tmp_path / "cache").rglob("*")):
        os.chown(path, STRANGER, STRANGER)
    (tmp_path / "cache").chmod(0o2775)
    assert is_read() == (False, False)
    assert f"the group {STRANGER} may write it" in warnings()[0]


@pytest.mark.parametrize("header", ["[]", "3", "null", "[" * 100_000, '{"key": 1e999}', "\x00"])
def test_any_header_is_read(header):
    """A file of this user whose checksum fits, whatever it says."""
    cubins.write("key", {}, b"code")
    rest = header.encode() + b"\ncode"
    checksum = hashlib.sha256(rest).hexdigest().encode()
    cubins._path("key").write_bytes(cubins._MAGIC + checksum + b"\n" + rest)
    assert cubins.read("key") is None
