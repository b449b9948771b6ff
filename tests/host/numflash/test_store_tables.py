"""The config cache: tables exported, merged, validated, cleared and shipped."""

import json
import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from numflash.selection import entries, store
from numflash.selection.entries import Row, format_table
from numflash.selection.store import DeviceKey, MergeCounts
from tests.support.config_cache import (
    A100,
    ENTRY,
    GOOD,
    H200,
    LATER,
    OF_THE_FUTURE,
    OTHER,
    PREDICTED,
    content,
    each_no_table,
    names,
    put,
)

pytestmark = pytest.mark.usefixtures("cache")


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
