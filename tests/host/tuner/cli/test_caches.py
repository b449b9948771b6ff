"""Subcommands that list, move, forget and validate what was tuned."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("optuna")
from numflash.machine_code.compiler import versions
from numflash.machine_code.sources import family_hash
from numflash.problem.classes import ProblemClass
from numflash.selection import store
from numflash.selection.entries import Entry
from tests.support.covering import thorough
from tests.support.tuning_entries import A100, CLASS, OFFLINE, SMALL, T4
from tuner import cli
from tuner.search import session
from tuner.search.storages import StorageError


def entry(problem=CLASS, config="m64n32w4", **changes):
    """An entry of the config cache."""
    facts = {
        "problem": ProblemClass.parse(problem),
        "config": config,
        "time_ms": 1.0,
        "spread": None,
        "origin": "predicted",
        "date": "2026-11-21T00:00:00Z",
        "kernels": family_hash(problem.split()[0]),
        "compilers": versions(),
        "default_config": config,
        "default_ms": 1.5,
    }
    return Entry(**{**facts, **changes})


def test_show_lists_each_device_with_its_entries(run, tmp_path):
    status, out, err = run("show")
    assert (status, out) == (0, "") and err == f"no entries in {store.config_dir()}\n"
    other = CLASS.replace("full", "causal")
    store.add(A100, [entry(), entry(other, config="m32n32w2", origin="measured", spread=0.01)])
    store.add(T4, [entry(time_ms=2.0, default_ms=5.0)])
    status, out, _ = run("show")
    lines = out.splitlines()
    assert status == 0
    assert [line for line in lines if line[0] != " "] == [str(A100), str(T4)]
    row = next(line for line in lines if "measured" in line)
    assert [other, "m32n32w2", "1.50", "2026-11-21"] == [
        word for word in (other, "m32n32w2", "1.50", "2026-11-21") if word in row
    ]
    assert "2.50" in lines[-1] and "predicted" in lines[-1]
    _, out, _ = run("show", "--device", "tesla")
    assert str(T4) in out and str(A100) not in out
    status, out, err = run("show", "--device", "riva")
    assert (status, out) == (0, "") and "no entries of a device like 'riva'" in err


def test_no_listing_lets_names_steer_the_terminal(run, tmp_path, caplog):
    steering = "GPU\x1b[2J\x9b\u202e"
    key = {"name": steering, "arch": "sm_75", "num_sms": 4}
    strange = {**entry().to_dict(), "kernels": "", "config": steering}
    # A date without hyphens may have any character before its time.
    dated = {**entry().to_dict(), "date": "20261121\x1b0914Z"}
    table = {"schema": 1, "devices": [{"device": key, "entries": [dated, strange]}]}
    path = tmp_path / f"{steering}.json"
    path.write_text(json.dumps(table))
    said = [*run("validate", path)[1:], *run("merge", path)[1:]]
    said += [*run("show")[1:], *run("show", "--device", "gpu\x1b[2j")[1:]]
    said += [*run("export", tmp_path / f"{steering}2")[1:], *run("validate")[1:]]
    said += [*run("merge", tmp_path / f"{steering}3")[1:], *run("clear")[1:]]
    lines = [line for text in said for line in text.split("\n")]
    assert all(line.isprintable() for line in lines), lines
    assert sum("GPU?[2J?? (sm_75, 4 SMs)" in line for line in lines) >= 3
    assert sum("2026-11-21" in line for line in lines) == 2
    logged = cli._Formatter("numflash: %(message)s")
    assert caplog.records
    assert all(logged.format(record).isprintable() for record in caplog.records)


def test_a_reason_from_a_shared_storage_cannot_steer_the_terminal(refused, run, monkeypatch):
    def fails(*arguments):
        raise LookupError("it\x1b[2J failed")

    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "tune", fails)
        assert "it?[2J failed" in run(*SMALL, *OFFLINE)[2]

    def breaks(*arguments):
        raise StorageError("it\x1b[2J broke")

    monkeypatch.setattr(session.Session, "tune", breaks)
    assert "it?[2J broke" in refused(*SMALL, *OFFLINE, "--quiet", status=1)


def test_shipped_tables_are_shown(run, monkeypatch):
    monkeypatch.setattr(store, "read_shipped", lambda: {T4: [entry()]})
    assert str(T4) in run("show", "--shipped")[1]
    assert run("show")[1] == ""


def test_export_clear_and_merge_are_a_round_trip(run, tmp_path):
    store.add(A100, [entry()])
    store.add(T4, [entry(time_ms=2.0)])
    before = store.read_all()
    assert run("export", "all.json") == (0, "2 entries in all.json\n", "")
    assert run("export", "t4.json", "--device", "t4") == (0, "1 entries in t4.json\n", "")
    assert run("validate", "all.json", "t4.json") == (0, "2 files, nothing wrong\n", "")
    assert run("validate") == (0, "2 files, nothing wrong\n", "")
    path = store.path_of(T4)
    assert run("clear", "--device", "tesla") == (0, f"removed {path}\n", "")
    assert set(store.read_all()) == {A100}
    assert run("clear")[1].count("removed ") == 1 and store.read_all() == {}
    assert run("clear") == (0, "nothing to remove\n", "")
    counts = "1 added, 0 replaced, 0 unchanged, 0 skipped\n"
    assert run("merge", "t4.json") == (0, counts, "")
    assert run("merge", "t4.json", "all.json")[1] == (
        "1 added, 0 replaced, 2 unchanged, 0 skipped\n"
    )
    assert store.read_all() == before


def test_clear_can_forget_what_was_tried_too(run):
    assert run(*SMALL, *OFFLINE, "--trials", 2, "--quiet")[0] == 0
    folder = store.config_dir().parent / "studies"
    assert list(folder.glob("*.journal"))
    assert ".journal" not in run("clear")[1] and list(folder.glob("*.journal"))
    assert run("clear", "--studies")[1].count(".journal") == 1
    assert not list(folder.glob("*.journal"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("merge", "broken.json"), "numflash-tune merge: error: broken.json: it is not JSON"),
        (("merge", "all.json", "absent.json"), "'absent.json'"),
        (("export", "no/all.json"), "no/all.json"),
        (("export", "all.json", "--device", "riva"), "no device like 'riva'"),
    ],
)
def test_files_that_are_of_no_use_are_named(refused, tmp_path, argv, words):
    store.add(A100, [entry()])
    store.export("all.json")
    before = store.read_all()
    (tmp_path / "broken.json").write_text("[1, 2")
    assert words in refused(*argv, status=1)
    assert store.read_all() == before


def test_an_empty_cache_is_not_exported(refused, tmp_path):
    assert f"the config cache {store.config_dir()} has no entries" in refused(
        "export", "all.json", status=1
    )
    assert not (tmp_path / "all.json").exists()


def test_validate_says_all_that_is_wrong(run, tmp_path):
    store.add(T4, [entry(), entry(CLASS.replace("full", "causal"), config="m128n128w4")])
    content = json.loads(store.path_of(T4).read_text())
    content["devices"][0]["entries"][0]["time_ms"] = -1
    (tmp_path / "wrong.json").write_text(json.dumps(content))
    (tmp_path / "broken.json").write_text("{")
    status, out, err = run("validate", "wrong.json", "absent.json", "broken.json")
    assert (status, err) == (1, "")
    lines = out.splitlines()
    assert "wrong.json: entry 1 of Tesla T4" in lines[0] and "time_ms" in lines[0]
    assert "'absent.json'" in lines[-2] and lines[-1].startswith("broken.json: it is not JSON")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("show", "--frobnicate"), "unrecognized arguments: --frobnicate"),
        (("export",), "required: file"),
        (("merge",), "required: files"),
        (("show", "--device"), "--device: expected one argument"),
    ],
)
def test_bad_arguments_of_subcommands_are_one_line(refused, argv, words):
    assert words in refused(*argv)


@thorough
def test_it_is_a_module_too():
    finished = subprocess.run(
        [sys.executable, "-m", "numflash_tuner", *OFFLINE, "--trials", "0"],
        capture_output=True,
        text=True,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
    )
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == "numflash-tune: error: --trials must be positive, got 0\n"
