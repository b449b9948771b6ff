"""The config cache: what is set aside, and folders and links that cannot be written."""

import io
import json
import math
import os
import sys
import tempfile
from dataclasses import replace

import pytest

from numflash.runtime import files
from numflash.selection import store
from numflash.selection.entries import parse_table
from tests.support.config_cache import (
    A100,
    BACKWARD,
    ENTRY,
    FORWARD,
    GOOD,
    H200,
    LATER,
    OTHER,
    content,
    each_no_table,
    names,
    put,
)

pytestmark = pytest.mark.usefixtures("cache")


# Files that are wrong


@each_no_table
def test_what_is_no_table_is_set_aside(data, warnings):
    path = put(data)
    store.add(A100, [OTHER])
    assert store.read(H200) == []
    aside = path.with_name(path.name + ".corrupt-1")
    assert aside.read_bytes() == data
    (message,) = warnings()
    assert str(path) in message and aside.name in message and ": it is no" in message
    assert store.read(H200) == [] and len(warnings()) == 1
    assert store.read_all() == {A100: [OTHER]}


@each_no_table
def test_adding_sets_aside_too(data, warnings):
    path = put(data)
    store.add(H200, [ENTRY])
    assert store.read(H200) == [ENTRY]
    assert path.with_name(path.name + ".corrupt-1").read_bytes() == data
    assert len(warnings()) == 1


def test_a_second_wrong_file_does_not_replace_the_first(warnings):
    for data in (b"first", b"second"):
        path = put(data)
        assert store.read_all() == {}
    assert [path.with_name(f"{path.name}.corrupt-{n}").read_bytes() for n in (1, 2)] == [
        b"first",
        b"second",
    ]


def test_another_schema_is_set_aside(warnings):
    for number in (1, 2):
        path = put(content({"number": number}, schema=99))
        assert store.read(H200) == []
    assert names() == [f"{path.name}.schema-99", f"{path.name}.schema-99-2"]
    assert "it has schema 99, this version of numflash reads 1" in warnings()[0]
    store.add(H200, [ENTRY])
    assert store.read(H200) == [ENTRY]


BAD = {
    "config": {"config": "m64n33w4"},
    "config of another family": {"problem": str(BACKWARD), "default_config": "sm80-m128n64w4s1x2"},
    "config that is a number": {"config": 64},
    "family": {"problem": str(FORWARD).replace("forward", "sideways")},
    "problem": {"problem": {"family": "forward"}},
    "no queries": {"problem": str(FORWARD).replace("q4096", "q0")},
    "keys not rounded": {"problem": str(FORWARD).replace("k4096", "k4095")},
    "a size beyond floats": {"problem": str(FORWARD).replace("bh64", f"bh{2**1100}")},
    "a window not rounded": {"problem": str(FORWARD).replace("causal", "window3")},
    "traits": {"problem": str(FORWARD).replace("float16", "float17")},
    "nan": {"time_ms": math.nan},
    "infinity": {"default_ms": math.inf},
    "huge": {"time_ms": 10**399},
    "origin": {"origin": "hoped"},
    "compilers": {"compilers": None},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD.keys())
def test_a_wrong_entry_is_skipped_alone(change, warnings):
    path = put(content({**ENTRY.to_dict(), **change}, OTHER.to_dict()))
    data = path.read_bytes()
    assert store.read(H200) == [OTHER]
    (message,) = warnings()
    assert message.startswith(f"{path}: entry 1 of NVIDIA H200 (sm_90a, 132 SMs) is ignored: ")
    assert path.read_bytes() == data and names() == [path.name]


@pytest.mark.parametrize("raw", [None, 1, "x", [], {}, [[]]])
def test_what_is_no_entry_is_skipped_alone(raw, warnings):
    put(content(raw, OTHER.to_dict()))
    assert store.read(H200) == [OTHER]
    assert "entry 1 of" in warnings()[0]
    assert store.add(H200, [ENTRY]) and len(store.read(H200)) == 2


def test_numbers_too_long_or_too_large_for_python_cost_one_entry(warnings):
    text = json.dumps(content(ENTRY.to_dict(), OTHER.to_dict()))
    for number in ("9" * 5000, "1e999", "-1e999"):
        put(text.replace("1.25", number).encode())
        assert store.read(H200) == [OTHER]
        path = store.add(H200, [replace(OTHER, **LATER)])
        assert len(store.read_file(path)[H200]) == 1
        json.loads(path.read_text(), parse_constant=pytest.fail)


def test_what_other_versions_wrote_stays_in_the_file():
    foreign = {**ENTRY.to_dict(), "config": "sm90-m128n128w12"}
    extended = {**OTHER.to_dict(), "clock_mhz": 1980}
    path = put({**content(foreign, extended), "written_by": "numflash 9"})
    assert store.read(H200) == [OTHER]
    store.add(H200, [ENTRY])
    written = json.loads(path.read_text())["devices"][0]["entries"]
    assert foreign in written and extended in written and len(written) == 3
    store.add(A100, [ENTRY])
    put(content(ENTRY.to_dict(), device=A100), device=H200)
    store.add(H200, [OTHER])
    assert parse_table(store.path_of(H200).read_bytes()).keys() == {A100, H200}


def test_no_nan_and_no_nesting_is_written():
    deep = []
    for _ in range(600):
        deep = [deep]
    strange = [{**ENTRY.to_dict(), "time_ms": math.nan}, {**OTHER.to_dict(), "note": math.inf}]
    path = put(content(*strange, {"deep": deep}))
    store.add(H200, [ENTRY])
    written = json.loads(path.read_text(), parse_constant=pytest.fail)["devices"][0]["entries"]
    assert written == [OTHER.to_dict(), ENTRY.to_dict()]


def test_a_file_repaired_meanwhile_is_not_set_aside(monkeypatch, warnings):
    path = put(b"broken")
    locked = files.locked

    def repaired_while_waiting(folder):
        path.write_bytes(GOOD)
        return locked(folder)

    monkeypatch.setattr(store, "locked", repaired_while_waiting)
    assert store.read(H200) == [ENTRY]
    assert names() == [path.name] and warnings() == []


# Folders that cannot be written


@pytest.fixture
def read_only(monkeypatch):
    """A cache with one entry, in a folder that cannot be written, not even by root."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("NUMFLASH_CACHE_DIR", folder)
        store.add(H200, [ENTRY])
        (store.config_dir() / ".lock").unlink()
        store.config_dir().chmod(0o555)
        os.chmod(folder, 0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        yield store.config_dir()
        if root:
            os.seteuid(0)
        os.chmod(folder, 0o755)
        store.config_dir().chmod(0o755)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
def test_a_read_only_folder_is_read_and_cannot_be_added_to(read_only, warnings):
    assert store.read(H200) == [ENTRY]
    assert warnings() == []
    before = store.generation()
    for device in (H200, A100):
        with pytest.raises(PermissionError, match=str(read_only)):
            store.add(device, [OTHER])
    with pytest.raises(PermissionError):
        store.clear()
    assert store.read_all() == {H200: [ENTRY]} and store.generation() == before


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
def test_a_wrong_file_in_a_read_only_folder_is_ignored(read_only, warnings, monkeypatch):
    monkeypatch.setattr(store, "open_file", lambda path: io.BytesIO(b"broken"))
    assert store.read(H200) == []
    (message,) = warnings()
    assert "is ignored: it is not JSON" in message and "cannot be set aside" in message
    assert names() == [store.path_of(H200).name]


def test_where_no_folder_can_be(cache, warnings):
    cache.write_text("a file")
    assert store.read(H200) == []
    with pytest.raises(OSError, match="cache"):
        store.add(H200, [ENTRY])
    assert cache.read_text() == "a file"


def test_a_file_that_cannot_be_read_is_not_replaced(warnings):
    path = store.path_of(H200)
    path.mkdir(parents=True)
    assert store.read(H200) == []
    assert str(path) in warnings()[0]
    with pytest.raises(OSError, match=path.name):
        store.add(H200, [ENTRY])
    assert names() == [path.name]


# Links in place of files


@pytest.fixture
def elsewhere(tmp_path):
    """A file that nothing here may write to."""
    path = tmp_path / "elsewhere"
    path.write_text("mine")
    yield path
    assert path.read_text() == "mine" and not (tmp_path / "absent").exists()


each_link = pytest.mark.parametrize("target", ["elsewhere", "absent"])


@each_link
def test_a_link_in_place_of_a_table_is_replaced(elsewhere, target):
    path = store.path_of(H200)
    path.parent.mkdir(parents=True)
    path.symlink_to(elsewhere.with_name(target))
    store.add(H200, [ENTRY])
    assert store.read(H200) == [ENTRY] and not path.is_symlink()
    out = elsewhere.with_name("out.json")
    out.symlink_to(elsewhere.with_name(target))
    assert store.export(out) == 1 and not out.is_symlink()


@each_link
def test_a_link_in_place_of_the_lock_is_refused(elsewhere, target):
    store.config_dir().mkdir(parents=True)
    (store.config_dir() / ".lock").symlink_to(elsewhere.with_name(target))
    with pytest.raises(OSError, match=r"a symbolic link is not written through: .*\.lock"):
        store.add(H200, [ENTRY])
    assert names() == []


@pytest.mark.skipif(not os.path.exists("/dev/null"), reason="there are no devices")
def test_what_is_no_file_is_not_replaced(tmp_path):
    store.add(H200, [ENTRY])
    (tmp_path / "link").symlink_to("/dev/null")
    for path in (tmp_path / "link", tmp_path):
        with pytest.raises(OSError, match="only a file can be replaced"):
            store.export(path)
    assert (tmp_path / "link").is_symlink()
