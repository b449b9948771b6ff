"""The tables of tuned configs that come with numflash: valid, of nothing superfluous, dated."""

import json
import os
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.support.covering import thorough

pytest.importorskip("optuna")

from numflash.configs import parse_config
from numflash.problem.classes import ProblemClass
from numflash.runtime.devices import architecture
from numflash.selection import store
from numflash.selection.choice import FUSED
from numflash.selection.entries import DeviceKey, Entry
from numflash.selection.rules import force
from tuner import caches, shipping, tables
from tuner.records import Record
from tuner.space import machines
from tuner.space.configs import Space

SHIPPED = store.read_shipped()
H100 = machines.find("H100")
DEVICE = DeviceKey(H100.name, H100.arch, H100.num_sms)
SHORT = ProblemClass.parse("forward float16-d64-dv64-vec causal q512 k512 bh1024 g1")
DEFAULT = str(Space(SHORT, H100).default)
# Tiles of 128 rows waste less of a short causal problem than the default's 192.
BETTER = "sm90-m128n128w8s2-overlap-pingpong-persistent"


def entry(config=BETTER, **changes):
    """An entry made with what is installed."""
    made = tables.made_now()
    found = Entry(
        problem=SHORT,
        config=config,
        time_ms=0.16,
        spread=None,
        origin="predicted",
        date="2026-11-28T00:00:00Z",
        kernels=made["kernels"],
        compilers=made["compilers"],
        default_config=DEFAULT,
        default_ms=0.19,
    )
    return replace(found, **changes)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of shipped tables of the test's own."""
    monkeypatch.setattr(tables, "folder", lambda: tmp_path)
    return tmp_path


def test_there_is_a_table_for_every_gpu_and_nothing_else():
    assert set(tables.paths()) == {tables.path_of(name) for name in tables.GPUS}
    assert {device.name for device in SHIPPED} <= set(tables.GPUS)


@pytest.mark.parametrize("name", tables.GPUS)
def test_nothing_is_wrong_with_a_table_and_nothing_in_it_superfluous(name):
    path, machine = tables.path_of(name), machines.find(name)
    assert store.validate(path) == []
    assert tables.made(path)["kernels"]
    for found in SHIPPED.get(DeviceKey(machine.name, machine.arch, machine.num_sms), []):
        problem = found.problem
        choice = force(problem.family, found.config, problem.traits, architecture(machine.arch))
        assert str(choice.config) == found.config
        assert shipping.why_not(machine, found) is None


def test_a_stale_table_is_told_of():
    """A warning in pytest's summary, not a failure: tables are made anew once, after all kernels.

    They serve classes near their own as long as their configs are possible, stale or not.
    """
    if stale := list(filter(None, map(tables.warning, tables.paths()))):
        text = (
            f"{len(stale)} shipped tables are stale (numflash-tune validate --shipped): {stale[0]}"
        )
        warnings.warn(text, stacklevel=1)


def test_a_fresh_table_is_fresh_whether_it_has_entries_or_not(folder):
    for entries in ([entry()], []):
        tables.write(folder / "a.json", {DEVICE: entries}, tables.made_now())
        assert tables.staleness(folder / "a.json") == []
        assert tables.warning(folder / "a.json") is None
        assert store.validate(folder / "a.json") == []
        assert store.read_file(folder / "a.json") == ({DEVICE: entries} if entries else {})


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        ({"kernels": "f" * 64}, "kernels ffffffffffff, now "),
        ({"model": "e" * 64}, "model eeeeeeeeeeee, now "),
        ({"model": None}, "model unknown, now "),
        ({"compilers": {"numba": "0.1"}}, "numba 0.1, now "),
    ],
)
@pytest.mark.parametrize("count", [0, 1], ids=["empty", "with an entry"])
def test_a_table_made_with_something_else_is_stale(folder, capsys, then, reason, count):
    path = folder / "a.json"
    tables.write(path, {DEVICE: count * [entry()]}, tables.made_now() | then)
    assert any(each.startswith(reason) for each in tables.staleness(path))
    assert tables.warning(path).startswith("a.json is stale, made with ")
    assert caches.main(["validate", "--shipped"]) == 1
    assert reason in capsys.readouterr().out
    assert caches.main(["show", "--shipped"]) == 0
    assert reason in capsys.readouterr().out


def test_validate_says_nothing_of_a_fresh_table(folder, capsys):
    tables.write(folder / "a.json", {DEVICE: [entry()]}, tables.made_now())
    assert caches.main(["validate", "--shipped"]) == 0
    assert capsys.readouterr().out == "1 files, nothing wrong\n"
    caches.main(["show", "--shipped"])
    assert "stale" not in capsys.readouterr().out


def test_a_table_that_does_not_say_what_it_was_made_with_is_as_old_as_its_entries(folder):
    path = folder / "a.json"
    for changes, expected in (
        ({}, ["model unknown"]),
        ({"kernels": "f" * 64}, ["kernels ffffffffffff", "model unknown"]),
        # No model made what was measured.
        ({"origin": "measured"}, []),
    ):
        tables.write(path, {DEVICE: [entry(**changes)]}, {})
        assert [each.split(", now ")[0] for each in tables.staleness(path)] == expected


def test_what_would_not_be_shipped_today_is_taken_out(folder):
    other = "sm80-m128n128w4s1"
    kept = entry()
    long = replace(SHORT, seqlen_q=4096, seqlen_k=4096, batch_heads=64)
    dropped = {
        "is the default": entry(DEFAULT, problem=replace(SHORT, batch_heads=512)),
        "over the default by formula": entry(other, problem=replace(SHORT, batch_heads=2048)),
        # Stored as twice as fast, by another model.
        "are needed": entry(BETTER, problem=replace(long, mask="full"), default_ms=0.32),
        "is not possible": entry("sm80-m256n256w8s3", problem=replace(SHORT, batch_heads=256)),
    }
    path, made = tables.path_of(H100.name), tables.made_now() | {"kernels": "f" * 64}
    tables.write(path, {DEVICE: [kept, *dropped.values()]}, made)
    told = shipping.strip(path)
    assert len(told) == len(dropped)
    for why, found in dropped.items():
        assert any(str(found.problem) in line and why in line for line in told), (why, told)
    assert store.read_file(path) == {DEVICE: [kept]}
    # Nothing was predicted anew: it is as stale as before.
    assert tables.made(path) == made
    before = path.read_bytes()
    assert shipping.strip(path) == [] and path.read_bytes() == before


def test_what_was_measured_is_not_judged_by_the_model():
    slower = "sm80-m64n16w4s1"
    assert shipping.why_not(H100, entry(slower)) is not None
    assert shipping.why_not(H100, entry(slower, origin="measured")) is None
    assert shipping.why_not(H100, entry(DEFAULT, origin="measured")) == "is the default"


@thorough
def test_only_what_differs_from_the_default_is_shipped(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", "of the user")
    monkeypatch.setattr(shipping, "_PROBLEMS", ("--head-dim 64 --mask full",))
    same = entry(DEFAULT, problem=replace(SHORT, batch_heads=512))
    tuned = []

    def tune(session, space, *more):
        """As the real one, which remembers what wins, be it the default."""
        tuned.append(space.problem)
        if len(tuned) == 1:
            session.entries += [entry(), same]
        record = Record(DEFAULT, "predicted", predicted_ms=0.19)
        session.results.append(SimpleNamespace(problem=space.problem, records=[record]))
        return session.results[-1]

    monkeypatch.setattr(shipping.Session, "tune", tune)
    monkeypatch.setattr(shipping.Session, "compile_ahead", lambda session, spaces: None)
    command = [H100.name, "--quiet", "--folder", str(tmp_path / "made")]
    assert shipping.main(command) == 0
    path = tables.path_of(H100.name)
    assert [problem.family for problem in tuned] == ["forward", "backward-dkdv", "backward-dq"]
    assert store.read_file(path) == {DEVICE: [entry()]}
    assert tables.staleness(path) == []
    assert json.loads(path.read_bytes())["made"] == tables.made_now()
    # What the fake remembers is of other classes than it was asked for.
    assert tables.default_stays(path) == sorted(map(str, tuned))
    assert caches.main(["show", "--shipped"]) == 0
    said = f"{path.name}: the default stays in {len(tuned)} classes\n"
    assert said in capsys.readouterr().out
    assert os.environ["NUMFLASH_CACHE_DIR"] == str(tmp_path / "made")
    # The same command goes on with what is not fresh.
    seen = len(tuned)
    assert shipping.main(command) == 0 and len(tuned) == seen
    assert capsys.readouterr().out.splitlines()[-1] == f"[1/1] {path.name}: is fresh"
    assert shipping.main([*command, "--all"]) == 0 and len(tuned) == 2 * seen


def test_a_table_has_classes_of_all_families_that_it_is_dated_by():
    families = {problem.family for problem in shipping._problems()}
    assert families - {FUSED} == set(tables.FAMILIES)


def test_a_table_is_not_made_where_a_config_could_not_be_compiled(folder, monkeypatch, capsys):
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", "of the user")
    monkeypatch.setattr(shipping, "_PROBLEMS", ("--head-dim 64 --mask full",))
    records = [Record(DEFAULT, "timeout", "compiling took more than 180 s")]
    found = SimpleNamespace(records=records, problem=SHORT)
    monkeypatch.setattr(shipping.Session, "tune", lambda *_: found)
    monkeypatch.setattr(shipping.Session, "compile_ahead", lambda session, spaces: None)
    with pytest.raises(SystemExit) as end:
        shipping.main([H100.name, "--quiet", "--folder", str(folder / "made")])
    path = tables.path_of(H100.name)
    assert end.value.code == 1 and not path.exists()
    said = f"{path.name} is not made: {DEFAULT} of {SHORT} could not be looked at (timeout: "
    assert capsys.readouterr().err.startswith(said)


def test_configs_in_this_file_are_configs():
    for text in (BETTER, DEFAULT):
        assert parse_config("forward", text)
