"""The config cache: what is kept, and which of two entries stays."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from numflash.selection import store
from numflash.selection.entries import parse_table
from numflash.selection.store import DeviceKey, Entry
from tests.support.config_cache import (
    A100,
    BACKWARD,
    ENTRY,
    FORWARD,
    H200,
    LATER,
    OF_THE_FUTURE,
    OTHER,
    PREDICTED,
    content,
    names,
    put,
)

pytestmark = pytest.mark.usefixtures("cache")


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
