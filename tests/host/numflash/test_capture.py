"""Problem classes are captured, and tuned on their first use."""

import functools
import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import replace

import numpy as np
import pytest

import numflash
from numflash.calls.arguments import request_of
from numflash.calls.forward import selection_of
from numflash.problem.options import AttentionOptions
from numflash.runtime.arrays import library_of
from numflash.runtime.mode import SIMULATED
from numflash.selection import autotune, capture, store
from tests.support.covering import thorough
from tests.support.tuned_classes import (
    HERE,
    SIMULATED_DEVICE,
    WANTED,
    arrays,
    entry,
    find,
    needs_simulator,
    use_empty_cache,
)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """A config cache of the test's own, no shipped tables, and tuned configs turned on."""
    use_empty_cache(tmp_path, monkeypatch)


@needs_simulator
def test_classes_are_captured_once_and_read_back(tmp_path, monkeypatch):
    path = tmp_path / "classes.txt"
    monkeypatch.setattr(capture, "_noted", set())
    monkeypatch.setenv("NUMFLASH_CAPTURE", str(path))
    numflash.explain_dispatch(*arrays())
    assert not path.exists()  # to ask is not to run
    for seqlen in (512, 400, 600):
        numflash.plan(*arrays(seqlen=seqlen))
    found = capture.read(path)
    assert len(path.read_text().splitlines()) == len(found) == 2
    assert WANTED in found and replace(WANTED, seqlen_q=1024, seqlen_k=1024) in found


@thorough
@needs_simulator
def test_sequences_and_pages_are_captured_but_not_where_bits_must_not_depend_on_a_class(
    tmp_path, monkeypatch
):
    path = tmp_path / "classes.txt"
    monkeypatch.setattr(capture, "_noted", set())
    monkeypatch.setenv("NUMFLASH_CAPTURE", str(path))
    q, k = np.zeros((6, 2, 16), np.float16), np.zeros((40, 1, 16), np.float16)
    of_q, of_k = np.array([0, 1, 6], np.int32), np.array([0, 9, 40], np.int32)
    numflash.attention_varlen(q, k, k, of_q, of_k, causal=True, batch_invariant=True)
    assert not path.exists()
    out, lse = numflash.attention_varlen(q, k, k, of_q, of_k, causal=True, return_lse=True)
    numflash.attention_varlen_backward(out, q, k, k, out, lse, of_q, of_k, causal=True)
    pages, table = np.zeros((7, 8, 1, 16), np.float16), np.array([[3, 1], [6, 0]], np.int32)
    given = {"page_table": table, "seqlens_k": np.array([9, 16], np.int32)}
    assert numflash.check(q[:2, None], pages, pages, **given).passed
    sizes = "float16-d32-dv32-vec-ragged causal q4 k32 bh4 g2"
    wanted = [f"{family} {sizes}" for family in ("forward", "backward-dkdv", "backward-dq")]
    wanted.append("forward float16-d32-dv32-vec-ragged-paged full q1 k16 bh4 g2 p8")
    assert set(wanted) <= set(map(str, capture.read(path)))


@needs_simulator
def test_a_tuned_config_serves_sequences_and_never_where_bits_must_not_depend_on_it():
    q, ends = np.zeros((64, 2, 64), np.float16), np.array([0, 1, 64], np.int32)
    given = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "causal": True}
    text = "forward float16-d64-dv64-vec-ragged causal q32 k32 bh4 g1"
    store.add(SIMULATED_DEVICE, [entry(text, "sm80-m32n32w2s1")])
    found = numflash.explain_dispatch(q, q, q, **given).forward
    assert str(found.config) == "sm80-m32n32w2s1" and found.is_final
    found = numflash.explain_dispatch(q, q, q, **given, batch_invariant=True).forward
    assert "tuned" not in found.rule


@needs_simulator
def test_the_splits_that_a_call_asks_for_are_not_those_that_were_tuned():
    q, k = np.zeros((2, 1, 2, 64), np.float16), np.zeros((2, 4096, 2, 64), np.float16)
    given = {"seqlens_k": np.array([4096, 9], np.int32)}
    text = "forward float16-d64-dv64-vec-ragged full q1 k4096 bh4 g1"
    store.add(SIMULATED_DEVICE, [entry(text, "sm80-m16n32w1s1x2")])
    for asked, found in ((None, 2), (1, 1), (8, 2)):
        choice = numflash.explain_dispatch(q, k, k, **given, num_splits=asked).forward
        assert "tuned on this device for this class" in choice.rule
        assert choice.config.num_splits == found


def test_a_capture_that_cannot_be_written_is_only_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(capture, "_noted", set())
    monkeypatch.setenv("NUMFLASH_CAPTURE", str(tmp_path / "no" / "such" / "folder"))
    with caplog.at_level(logging.WARNING, "numflash"):
        capture.note(WANTED)
        capture.note(WANTED)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("target", ["mine", "absent"])
def test_classes_are_not_captured_through_a_link(tmp_path, monkeypatch, caplog, target):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "classes").symlink_to(tmp_path / target)
    monkeypatch.setenv("NUMFLASH_CAPTURE", str(tmp_path / "classes"))
    capture.note(WANTED)
    assert "a symbolic link is not written through" in caplog.text
    assert (tmp_path / "mine").read_text() == "mine" and not (tmp_path / "absent").exists()


def test_a_damaged_capture_names_the_line(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text(f"{WANTED}\n\nnonsense\n")
    with pytest.raises(ValueError, match="line 3"):
        capture.read(path)


class EntryPoint:
    """An entry point that notes its calls."""

    def __init__(self, effect=lambda: None):
        self.calls, self.effect = [], effect

    def load(self):
        """The function."""

        def tune(problem, device, seconds):
            self.calls.append((problem, device, seconds))
            self.effect()

        return tune


@pytest.fixture
def autotuning(monkeypatch):
    """An entry point that numflash finds, as if there were a GPU."""
    point = EntryPoint()
    monkeypatch.setattr(autotune, "SIMULATED", False)
    monkeypatch.setattr(autotune, "_tried", set())
    monkeypatch.setattr(autotune, "_warnings", set())
    monkeypatch.setattr(autotune.metadata, "entry_points", lambda group: [point])
    monkeypatch.setenv("NUMFLASH_AUTOTUNE", "1")
    return point


@needs_simulator
def test_a_new_class_is_tuned_once_on_first_use(autotuning):
    autotuning.effect = lambda: store.add(
        SIMULATED_DEVICE, [entry(config="sm80-m32n16w2s1", origin="measured")]
    )
    q, k, v = arrays()
    assert str(_select(q, k, v).forward.config) == "sm80-m32n16w2s1"
    _select(q, k, v)
    # In the simulator the device is -1.
    assert autotuning.calls == [(WANTED, -1, 20.0)]


def _select(q, k, v):
    """The selection of a call on these arrays."""
    views = {
        name: library_of(x, name).view(x, name) for name, x in zip("qkv", (q, k, v), strict=True)
    }
    return selection_of(request_of(views, AttentionOptions()), None)


def test_a_class_that_was_measured_is_not_tuned_again(autotuning):
    store.add(SIMULATED_DEVICE, [entry(origin="measured")])
    if SIMULATED:
        _select(*arrays())
        assert autotuning.calls == []


def test_a_tuner_that_fails_is_only_a_warning(autotuning, caplog):
    def fail():
        raise RuntimeError("no luck")

    autotuning.effect = fail
    with caplog.at_level(logging.WARNING, "numflash"):
        assert not autotune.tune(WANTED, 0)
        assert not autotune.tune(WANTED, 0)
    assert len(autotuning.calls) == 1 and "no luck" in caplog.text


@pytest.mark.parametrize(
    "asked, seconds", [("0", 0), ("", 0), ("1", 20), ("7.5", 7.5), ("x", 0), ("-3", 0), ("nan", 0)]
)
def test_the_budget_of_an_autotune(autotuning, monkeypatch, asked, seconds):
    monkeypatch.setenv("NUMFLASH_AUTOTUNE", asked)
    assert autotune.seconds() == seconds


def test_without_the_tuner_autotune_says_how_to_get_it(autotuning, monkeypatch, caplog):
    monkeypatch.setattr(autotune.metadata, "entry_points", lambda group: [])
    with caplog.at_level(logging.WARNING, "numflash"):
        assert not autotune.tune(WANTED, 0)
    assert "numflash[tune]" in caplog.text


def test_numflash_imports_neither_optuna_nor_the_tuner():
    code = (
        "import sys, json, numflash; "
        "tops = {name.partition('.')[0] for name in sys.modules}; "
        "print(json.dumps(sorted(tops & {'optuna', 'numflash_tuner'})))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == []


def test_a_user_without_a_home_has_no_cache(monkeypatch, caplog):
    from pathlib import Path

    from numflash.machine_code import cubins
    from numflash.runtime import cache_folder

    def fail(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("NUMFLASH_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", fail)
    monkeypatch.setattr(
        cache_folder, "_nowhere", functools.cache(cache_folder._nowhere.__wrapped__)
    )
    before = sorted(Path(tempfile.gettempdir()).glob("numflash*"))
    assert find() is None
    cubins.write("key", {}, b"code")
    assert cubins.read("key") is None and cubins.contents() == (0, 0)
    with pytest.raises(OSError, match=os.devnull):
        store.add(HERE, [entry()])
    assert sorted(Path(tempfile.gettempdir()).glob("numflash*")) == before
    assert [r.message for r in caplog.records if "has no home" in r.message] == [
        "this user has no home: nothing is cached unless NUMFLASH_CACHE_DIR is set"
    ]
