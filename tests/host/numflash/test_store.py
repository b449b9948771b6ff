"""The config cache: what is kept, what is set aside, and what many processes do to it at once."""

import io
import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from numflash.problem.classes import ProblemClass
from numflash.runtime import files
from numflash.runtime.cache_folder import folder_for
from numflash.selection import entries, store
from numflash.selection.entries import Row, format_table, parse_table
from numflash.selection.store import DeviceKey, Entry, MergeCounts

FORWARD = ProblemClass.parse("forward float16-d64-dv64-vec causal q4096 k4096 bh64 g1")
BACKWARD = ProblemClass.parse("backward-dq float16-d64-dv64-vec full q1024 k1024 bh64 g1")
H200 = DeviceKey("NVIDIA H200", "sm_90a", 132)
A100 = DeviceKey("NVIDIA A100-SXM4-80GB", "sm_80", 108)
ENTRY = Entry(
    problem=FORWARD,
    config="sm80-m128n64w4s1",
    time_ms=1.25,
    spread=0.01,
    origin="measured",
    date="2026-11-21T09:14:04Z",
    kernels="0123abcd",
    compilers={"numba": "0.68.1", "nvvm": "13.0"},
    default_config="m64n32w4",
    default_ms=2.5,
)
OTHER = replace(ENTRY, problem=BACKWARD, config="m64n32w4", time_ms=3.0, spread=None)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, whose folder does not exist."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def warnings(caplog):
    """The messages of warnings so far."""
    caplog.set_level(logging.WARNING, logger="numflash")
    return lambda: [record.getMessage() for record in caplog.records]


def content(*raw, device=H200, schema=1) -> dict:
    """The content of a file with these raw entries."""
    key = {"name": device.name, "arch": device.arch, "num_sms": device.num_sms}
    return {"schema": schema, "devices": [{"device": key, "entries": list(raw)}]}


def put(data, device=H200) -> Path:
    """Write the file of a device."""
    path = store.path_of(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return path


def names() -> list[str]:
    """The files of the cache but its lock."""
    return sorted(path.name for path in store.config_dir().iterdir() if path.name != ".lock")


# Entries


def test_an_entry_survives_its_dict():
    assert Entry.from_dict(ENTRY.to_dict()) == ENTRY
    assert Entry.from_dict(json.loads(json.dumps(OTHER.to_dict()))) == OTHER
    assert Entry.from_dict({**ENTRY.to_dict(), "of_the_future": [1]}) == ENTRY
    assert len({ENTRY, Entry.from_dict(ENTRY.to_dict()), OTHER}) == 2


def test_numbers_of_numpy_are_written_as_numbers():
    entry = replace(ENTRY, time_ms=np.float32(1.5), default_ms=np.int64(3), spread=np.float64(0.5))
    assert json.dumps([entry.time_ms, entry.default_ms, entry.spread]) == "[1.5, 3.0, 0.5]"


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("problem", str(FORWARD), "problem must be a ProblemClass"),
        ("config", "m64", "config must look like"),
        ("config", None, "config must be the string form of a config, got None"),
        ("default_config", "sm80-m65n64w4s1", "multiple of 16"),
        ("time_ms", math.nan, "time_ms must be a positive number, got nan"),
        ("time_ms", math.inf, "time_ms must be a positive number, got inf"),
        ("time_ms", 0, "time_ms must be a positive number, got 0"),
        ("time_ms", 10**400, "time_ms must be a positive number, got 1000"),
        ("time_ms", True, "time_ms must be a positive number, got True"),
        ("default_ms", "2", "default_ms must be a positive number, got '2'"),
        ("spread", -0.1, "spread must be a number from 0 on, or None, got -0.1"),
        ("spread", math.nan, "spread must be"),
        ("origin", "guessed", "origin must be one of predicted, measured, got 'guessed'"),
        ("origin", [], "origin must be one of"),
        ("date", "yesterday", "date must be ISO 8601 in UTC, got 'yesterday'"),
        ("date", "2026-11-21T09:14:04", "date must be"),
        ("date", "2026-11-21T09:14:04+01:00", "date must be"),
        ("date", 20261121, "date must be"),
        ("kernels", "", "kernels must be a hash"),
        ("compilers", {"numba": 1}, "compilers must be versions by name"),
        ("compilers", ["numba"], "compilers must be versions by name"),
    ],
)
def test_an_entry_says_what_is_wrong(field, value, message):
    with pytest.raises(ValueError, match=message):
        replace(ENTRY, **{field: value})


@pytest.mark.parametrize(
    "name, arch, num_sms",
    [("", "sm_80", 1), (1, "sm_80", 1), ("A", "80", 1), ("A", "sm_80/..", 1), ("A", "sm_80\n", 1)]
    + [("A", "sm_80", n) for n in (-1, 1.0, True, "1", 2**31)],
)
def test_a_device_says_what_is_wrong(name, arch, num_sms):
    with pytest.raises(ValueError, match="must be"):
        DeviceKey(name, arch, num_sms)


# Adding and reading


def test_what_was_added_is_read(cache):
    path = store.add(H200, [ENTRY, OTHER])
    assert path == store.path_of(H200) and path.parent == cache / "configs" == store.config_dir()
    assert sorted(store.read(H200), key=str) == sorted([ENTRY, OTHER], key=str)
    assert store.read(A100) == []
    store.add(A100, [OTHER])
    assert {device: len(found) for device, found in store.read_all().items()} == {A100: 1, H200: 2}
    assert names() == sorted([path.name, store.path_of(A100).name])


def test_reading_nothing_creates_nothing(cache):
    assert (store.read(H200), store.read_all(), store.clear()) == ([], {}, [])
    assert store.add(H200, []) == store.path_of(H200)
    assert not cache.exists()


NAMES = [
    "NVIDIA H200",
    "../../etc/passwd",
    "a/b\\c:d",
    "графика ≥ 4090",
    "\ud800",
    "..",
    "x" * 999,
]
NAMES += ["CON", "a\0b", "-", "*", "sm_80"]


STEERING = "A\x1b[2J\x07\r\n\x9b31m\u202eB\u2066\u2028\ud800\u200f"


def test_names_cannot_steer_what_they_are_shown_on(warnings):
    device = DeviceKey(STEERING, "sm_80", 4)
    assert str(device) == "A?[2J????31m?B???? (sm_80, 4 SMs)"
    assert str(DeviceKey("графика ≥ 4090", "sm_80", 0)) == "графика ≥ 4090"
    path = put(content({**ENTRY.to_dict(), "origin": STEERING}, None, device=device))
    said = [*store.validate(path), *(store.read_file(path), warnings())[1]]
    assert len(said) == 4 and all(line.isprintable() for line in said)


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_any_name_of_a_device_makes_a_file(name):
    device = DeviceKey(name, "sm_80", 4)
    path = store.add(device, [ENTRY])
    assert path.parent == store.config_dir() and path.is_file() and len(path.name) < 120
    assert path.name.isascii()
    assert store.read(device) == [ENTRY]
    assert store.read_all() == {device: [ENTRY]}


def test_devices_that_differ_have_files_that_differ():
    devices = [H200, replace(H200, num_sms=114), replace(H200, arch="sm_90")]
    devices += [replace(H200, name=n) for n in ("NVIDIA  H200", "NVIDIA/H200", "nvidia h200")]
    assert len({store.path_of(device).name.lower() for device in devices}) == len(devices)
    assert store.path_of(H200).name.startswith("NVIDIA-H200-sm_90a-132sm-")


PREDICTED = replace(ENTRY, origin="predicted", time_ms=0.5)
LATER = {"date": "2026-11-22T00:00:00+00:00"}
OF_THE_FUTURE = {"date": "2099-01-01T00:00:00Z"}


@pytest.mark.parametrize(
    "first, second, stays",
    [
        (PREDICTED, ENTRY, "second"),
        (ENTRY, PREDICTED, "first"),
        (ENTRY, replace(PREDICTED, **LATER), "first"),
        (replace(PREDICTED, **LATER), ENTRY, "second"),
        (ENTRY, replace(ENTRY, time_ms=9.0, **LATER), "first"),
        (replace(ENTRY, **LATER), replace(ENTRY, time_ms=0.1), "second"),
        # A prediction that is 1.27 times better, and a later run that tried the default only.
        (PREDICTED, replace(PREDICTED, time_ms=0.5 * 1.27, **LATER), "first"),
        (ENTRY, replace(ENTRY, time_ms=9.0), "first"),
        (ENTRY, replace(ENTRY, config="m64n32w4", **LATER), "second"),
        (replace(PREDICTED, **OF_THE_FUTURE), PREDICTED, "second"),
        (replace(ENTRY, time_ms=0.1, **OF_THE_FUTURE), PREDICTED, "second"),
        (ENTRY, replace(ENTRY, time_ms=0.1, **OF_THE_FUTURE), "first"),
        (ENTRY, replace(ENTRY, kernels="ffff"), "both"),
        (ENTRY, replace(ENTRY, compilers={"numba": "0.69"}), "both"),
        (
            ENTRY,
            replace(ENTRY, compilers=dict(reversed(ENTRY.compilers.items())), **LATER),
            "second",
        ),
        (ENTRY, replace(ENTRY, problem=replace(FORWARD, mask="full")), "both"),
    ],
)
@pytest.mark.parametrize("at_once", [False, True])
def test_which_entry_stays(first, second, stays, at_once):
    for batch in [[first, second]] if at_once else [[first], [second]]:
        store.add(H200, batch)
    expected = {"first": [first], "second": [second], "both": [first, second]}[stays]
    assert sorted(store.read(H200), key=str) == sorted(expected, key=str)
    assert len(parse_table(store.path_of(H200).read_bytes())[H200]) == len(expected)


def test_what_was_tried_again_gives_way_whatever_its_time():
    lucky = replace(ENTRY, time_ms=0.1)
    again = replace(ENTRY, config="m64n32w4", **LATER)
    store.add(H200, [lucky, OTHER])
    store.add(H200, [again])
    assert lucky in store.read(H200)
    store.add(H200, [again], instead_of=[lucky])
    assert sorted(store.read(H200), key=str) == sorted([again, OTHER], key=str)


def test_a_device_in_several_files_has_one_entry_of_each_kind():
    put(content(ENTRY.to_dict(), OTHER.to_dict()), device=A100)
    store.add(H200, [replace(ENTRY, time_ms=0.9, **LATER), replace(OTHER, origin="predicted")])
    assert {e.problem: e.time_ms for e in store.read_all()[H200]} == {FORWARD: 0.9, BACKWARD: 3.0}
    assert {e.origin for e in store.read_all()[H200]} == {"measured"}
    assert store.read(A100) == []


def test_the_generation_tells_of_writes():
    def changed(action):
        before = store.generation()
        action()
        return store.generation() != before

    assert changed(lambda: store.add(H200, [ENTRY]))
    assert not changed(lambda: store.add(H200, [ENTRY, PREDICTED]))
    assert not changed(lambda: store.read(H200))
    assert changed(lambda: store.add(H200, [OTHER]))
    assert changed(store.clear)
    assert not changed(store.clear)


def test_files_are_stable_and_readable():
    path = store.add(H200, [ENTRY, OTHER])
    text = path.read_text()
    store.clear()
    store.add(H200, [replace(OTHER, time_ms=7.0), ENTRY])
    store.add(H200, [replace(OTHER, **LATER), ENTRY])
    assert path.read_text() == text.replace(OTHER.date, LATER["date"], 1)
    store.add(H200, [replace(OTHER, time_ms=7.0), ENTRY])
    assert path.read_text() == text.replace(OTHER.date, LATER["date"], 1)
    assert text.isascii() and text.endswith("}\n")
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    assert text.index("backward-dq float16") < text.index("forward float16")


# Files that are wrong

GOOD = format_table({H200: [Row.of(ENTRY)]}).encode()
NO_TABLE = {
    "empty": b"",
    "half": GOOD[: len(GOOD) // 2],
    "binary": bytes(range(256)) * 9,
    "zeros": b"\0" * 4096,
    "list": b"[]",
    "number": b"1",
    "huge number": b"9" * 5000,
    "deep": b"[" * 100_000,
    "no schema": b"{}",
    "schema of text": b'{"schema": "1", "devices": []}',
    "schema of truth": b'{"schema": true, "devices": []}',
    "huge schema": b'{"schema": ' + b"9" * 5000 + b', "devices": []}',
    "no devices": b'{"schema": 1}',
    "devices by name": b'{"schema": 1, "devices": {"NVIDIA H200": []}}',
    "device of text": b'{"schema": 1, "devices": ["NVIDIA H200"]}',
    "no device": b'{"schema": 1, "devices": [{"entries": []}]}',
    "device without SMs": b'{"schema": 1, "devices": [{"device": {"name": "A", "arch": "sm_80"}, '
    b'"entries": []}]}',
    "entries by name": json.dumps({**content(), "devices": [{**content()["devices"][0],
                                  "entries": {}}]}).encode(),
}  # fmt: skip

each_no_table = pytest.mark.parametrize("data", NO_TABLE.values(), ids=NO_TABLE.keys())


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


# Interrupted writes


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_changes_nothing(monkeypatch, step, error):
    path = store.add(H200, [ENTRY])
    before, generation = path.read_bytes(), store.generation()

    def fails(*arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fails)
        with pytest.raises(error if isinstance(error, type) else type(error)):
            store.add(H200, [OTHER])
    assert path.read_bytes() == before and names() == [path.name]
    assert store.generation() == generation
    store.add(H200, [OTHER])
    assert len(store.read(H200)) == 2


def test_the_text_is_on_the_disk_before_it_has_its_name(monkeypatch):
    steps = []
    for step in ("fsync", "replace"):
        real = getattr(os, step)
        monkeypatch.setattr(
            os, step, lambda *a, step=step, real=real: (steps.append(step), real(*a))
        )
    store.add(H200, [ENTRY])
    assert steps[:2] == ["fsync", "replace"]


PREAMBLE = """
import os, signal, sys, time
from dataclasses import replace
from numflash.runtime import files
from numflash.selection import store
from numflash.runtime.cache_folder import folder_for
from numflash.selection.entries import parse_table
((A100, (OTHER,)), (H200, (ENTRY,))) = parse_table(sys.argv[1].encode()).items()
ENTRY, OTHER = ENTRY.entry, OTHER.entry
"""


def run(program: str, *arguments: str) -> subprocess.Popen:
    """Another process, that knows some names of this module."""
    table = format_table({A100: [Row.of(OTHER)], H200: [Row.of(ENTRY)]})
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + program, table, *arguments],
        cwd=Path(__file__).parents[3],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_writer_loses_nothing_and_leaves_no_lock():
    path = store.add(H200, [ENTRY])
    process = run(
        "os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)\n"
        "store.add(H200, [OTHER])"
    )
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (left,) = [name for name in names() if name != path.name]
    assert left.endswith(".part")
    assert store.read_all() == {H200: [ENTRY]}
    started = time.monotonic()
    store.add(H200, [OTHER])
    assert time.monotonic() - started < 2
    assert len(store.read(H200)) == 2 and left in names()
    old = time.time() - files.LEFTOVER_SECONDS - 1
    os.utime(path.with_name(left), (old, old))
    store.add(A100, [OTHER])
    assert left not in names() and len(store.read_all()) == 2


# Many writers

ADD_MANY = """
worker, most = map(int, sys.argv[2:])
print("ready", flush=True)
sys.stdin.readline()
for n in range(most):
    device = (H200, A100)[n % 2]
    store.add(device, [replace(ENTRY, kernels=f"{worker}-{n}")])
"""


def test_processes_that_add_at_once_lose_nothing(warnings):
    workers, most = 4, 25
    processes = [run(ADD_MANY, str(n), str(most)) for n in range(workers)]
    put(b"broken")
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * workers
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    found = [entry.kernels for found in store.read_all().values() for entry in found]
    assert sorted(found) == sorted(f"{w}-{n}" for w in range(workers) for n in range(most))
    expected = [store.path_of(H200).name, store.path_of(A100).name]
    assert names() == sorted([*expected, f"{expected[0]}.corrupt-1"])


def test_threads_that_add_at_once_lose_nothing():
    def add(worker):
        for n in range(10):
            store.add(H200, [replace(ENTRY, kernels=f"{worker}-{n}")])

    threads = [threading.Thread(target=add, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.read(H200)) == 40


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_lock_is_waited_for_not_for_ever_and_dies_with_its_owner(monkeypatch):
    holder = run(
        "with files.locked(folder_for('configs')):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)"
    )
    assert holder.stdout.readline() == "held\n"
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    lock = str(store.config_dir() / ".lock")
    with pytest.raises(TimeoutError, match=f"{lock} was held by others for 0.1 seconds"):
        store.add(H200, [ENTRY])
    path = put(b"broken")
    assert store.read(H200) == [] and names() == [path.name]
    holder.kill()
    holder.communicate()
    store.add(H200, [ENTRY])
    assert store.read(H200) == [ENTRY]


def test_a_thread_that_holds_the_lock_is_waited_for_not_for_ever(monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    with files.locked(folder_for("configs")), pytest.raises(TimeoutError, match=r"\.lock"):
        store.add(H200, [ENTRY])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_forked_while_the_lock_was_held_can_take_it_later():
    with files.locked(folder_for("configs")):
        child = os.fork()
        if not child:
            try:
                store.add(H200, [ENTRY])
            finally:
                os._exit(0)
    deadline = time.monotonic() + 5
    while not (ended := os.waitpid(child, os.WNOHANG)[0]) and time.monotonic() < deadline:
        time.sleep(0.01)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert store.read(H200) == [ENTRY]


@pytest.mark.skipif(sys.platform == "win32", reason="flock is of POSIX")
def test_a_file_system_without_locks_is_named(monkeypatch):
    def fails(handle, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", fails)
    with pytest.raises(OSError, match=r"Operation not supported.*\.lock"):
        store.add(H200, [ENTRY])


# Whole files


def test_export_and_merge(tmp_path):
    store.add(H200, [ENTRY, OTHER])
    store.add(A100, [OTHER])
    everything = store.read_all()
    assert store.export(tmp_path / "all.json") == 3
    assert store.export(str(tmp_path / "one.json"), [A100]) == 1
    assert store.read_file(tmp_path / "one.json") == {A100: [OTHER]}
    assert store.read_file(str(tmp_path / "all.json")) == everything
    paths = [tmp_path / "one.json", tmp_path / "all.json"]
    assert store.merge(paths) == MergeCounts(unchanged=4)
    store.clear()
    assert store.merge(paths) == MergeCounts(added=3, unchanged=1)
    assert store.read_all() == everything
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "all.json",
        "one.json",
    ]


def test_merging_respects_what_is_better(tmp_path, warnings):
    path = tmp_path / "in.json"
    strange = {**OTHER.to_dict(), "config": "none"}
    rows = [ENTRY.to_dict(), OTHER.to_dict(), strange]
    path.write_text(json.dumps(content(*rows)))
    store.add(H200, [PREDICTED, replace(OTHER, time_ms=1.0, **LATER)])
    assert store.merge([path]) == MergeCounts(replaced=1, unchanged=1, skipped=1)
    assert {entry.time_ms for entry in store.read(H200)} == {ENTRY.time_ms, 1.0}
    assert f"{path}: entry 3" in warnings()[0]


def test_the_order_of_merging_never_matters(tmp_path):
    stale, same = {"kernels": "ffff"}, {"date": ENTRY.date.replace("Z", "+00:00")}
    rivals = [ENTRY, PREDICTED, *(replace(e, time_ms=1.0) for e in (ENTRY, PREDICTED))]
    rivals += [replace(e, **change) for e in rivals for change in (LATER, OF_THE_FUTURE, same)]
    rivals += [
        replace(rivals[2], config=f"m64n{n}w4", spread=s) for n in (32, 64) for s in (0, None)
    ]
    rivals += [replace(each, **stale) for each in rivals]
    paths, kept = [], set()
    for n, rival in enumerate(rivals):
        paths.append(tmp_path / f"{n}.json")
        paths[-1].write_text(json.dumps(content(rival.to_dict())))
    for seed in range(20):
        random.Random(seed).shuffle(paths)
        store.clear()
        half = seed % len(paths)
        store.merge(paths[:half])
        store.merge(paths[half:])
        kept.add(store.path_of(H200).read_bytes())
    assert len(kept) == 1
    found = store.read(H200)
    assert {entry.kernels for entry in found} == {ENTRY.kernels, "ffff"}
    assert all((e.origin, e.time_ms) == ("measured", 1.0) for e in found)
    assert all(e.date == LATER["date"] for e in found)


@each_no_table
def test_a_wrong_file_of_the_user_is_named_and_left_alone(data, tmp_path, cache):
    (tmp_path / "good.json").write_bytes(GOOD)
    path = tmp_path / "bad.json"
    path.write_bytes(data)
    for action in (store.read_file, lambda bad: store.merge([tmp_path / "good.json", bad])):
        with pytest.raises(ValueError, match=r"bad\.json: it is no"):
            action(path)
    assert path.read_bytes() == data and not cache.exists()
    (problem,) = store.validate(path)
    assert str(path) in problem


def test_a_missing_file_of_the_user(tmp_path):
    path = tmp_path / "absent.json"
    with pytest.raises(FileNotFoundError):
        store.merge([path])
    assert "No such file" in store.validate(path)[0]


def test_exporting_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no entries$"):
        store.export(tmp_path / "out.json")
    store.add(H200, [ENTRY])
    with pytest.raises(ValueError, match=r"has no entries of NVIDIA A100-SXM4-80GB \(sm_80"):
        store.export(tmp_path / "out.json", [H200, A100])
    with pytest.raises(OSError, match="nowhere"):
        store.export(tmp_path / "nowhere" / "out.json")
    assert not list(tmp_path.glob("*.json"))


def test_validate(tmp_path):
    path = tmp_path / "table.json"
    large = {**ENTRY.to_dict(), "config": "sm80-m256n256w4s3"}
    rows = [ENTRY.to_dict(), large, {**OTHER.to_dict(), "time_ms": -1}, OTHER.to_dict()]
    path.write_text(json.dumps(content(*rows)))
    duplicate, negative = store.validate(path)
    assert duplicate.startswith(f"{path}: entry 2 of NVIDIA H200 (sm_90a, 132 SMs): entry 1 is of")
    assert negative.endswith("entry 3 of NVIDIA H200 (sm_90a, 132 SMs): time_ms must be a "
                             "positive number, got -1")  # fmt: skip
    path.write_text(json.dumps(content(large, device=A100)))
    (problem,) = store.validate(path)
    assert problem.endswith("w4s3 needs 229376 bytes of shared memory, sm_80 has 166912")
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    for date in (OF_THE_FUTURE["date"], tomorrow.isoformat()):
        path.write_text(json.dumps(content({**ENTRY.to_dict(), "date": date})))
        (problem,) = store.validate(path)
        assert problem.endswith(f"SMs): date must not be in the future, got {date!r}")
    path.write_text(json.dumps(content(ENTRY.to_dict(), device=DeviceKey("X", "sm_123", 1))))
    assert "architecture must be one of" in store.validate(path)[0]
    path.write_text(json.dumps(content(schema=2)))
    assert store.validate(path) == [
        f"{path}: it has schema 2, this version of numflash reads {entries.SCHEMA}"
    ]
    path.write_bytes(GOOD)
    assert store.validate(path) == []


def test_clear_takes_what_is_of_the_cache_only():
    paths = [store.add(device, [ENTRY]) for device in (H200, A100)]
    put(b"broken", A100)
    store.read(A100)
    store.add(A100, [OTHER])
    mine = store.config_dir() / "notes.txt"
    mine.write_text("keep")
    part = put(b"half", replace(H200, num_sms=1)).rename(f"{paths[0]}.0123.part")
    assert store.clear(H200) == sorted([paths[0], part])
    assert store.read_all() == {A100: [OTHER]}
    assert store.clear() == [paths[1], paths[1].with_name(paths[1].name + ".corrupt-1")]
    assert names() == ["notes.txt"]
    assert store.read_all() == {}


def test_shipped_tables_are_read_and_a_wrong_one_ignored(tmp_path, monkeypatch, warnings):
    import importlib.resources

    (tmp_path / "a.json").write_bytes(GOOD)
    (tmp_path / "b.json").write_bytes(b"broken")
    both = {A100: [Row.of(OTHER)], H200: [Row.of(replace(OTHER))]}
    (tmp_path / "c.json").write_text(format_table(both))
    (tmp_path / "d.txt").write_text("no table")
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
    store.read_shipped.cache_clear()
    try:
        assert store.read_shipped() == {H200: [ENTRY, OTHER], A100: [OTHER]}
        assert store.read_shipped() is store.read_shipped()
    finally:
        store.read_shipped.cache_clear()
    (message,) = warnings()
    assert "b.json is ignored: it is not JSON" in message
    assert (tmp_path / "b.json").exists()


def test_what_is_shipped_is_valid():
    from importlib.resources import files as resources

    for file in resources("numflash.selection.shipped").iterdir():
        if file.name.endswith(".json"):
            assert store.validate(file) == []
    assert all(store.read_shipped().values())
