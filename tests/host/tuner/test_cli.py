"""The command line of the tuner: what it does, and that every error is one line."""

import dataclasses
import errno
import itertools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import Future
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("optuna")

from numflash.calls.arguments import request_of
from numflash.machine_code.compiler import versions
from numflash.machine_code.sources import family_hash
from numflash.problem.classes import ProblemClass
from numflash.problem.options import AttentionOptions
from numflash.runtime.arrays import library_of
from numflash.runtime.mode import SIMULATED
from numflash.selection import store
from numflash.selection.entries import DeviceKey, Entry
from tests.host.tuner.test_session import InstantPool, Stopwatch
from tuner import caches, cli
from tuner.search import session
from tuner.search.candidates import distinct
from tuner.search.pool import NoCompilerError
from tuner.search.search import StoppingRules
from tuner.search.session import Options, Session
from tuner.search.storages import StorageError
from tuner.space import machines
from tuner.space import target as targets

OFFLINE = ("--device", "sm_80", "--offline")
SMALL = ("--pass", "forward", "--dtype", "float32", "--head-dim", "64", "--mask", "full")
CLASS = "forward float32-d64-dv64-vec full q4096 k4096 bh64 g1"
A100 = DeviceKey("NVIDIA A100-SXM4-80GB", "sm_80", 108)
T4 = DeviceKey("Tesla T4", "sm_75", 40)


@pytest.fixture(autouse=True)
def instant(tmp_path, monkeypatch):
    """No compilers, a cache and a working directory of the test's own."""
    monkeypatch.setattr(session, "CompilePool", InstantPool)
    monkeypatch.setattr(InstantPool, "spill_bytes", 0)
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capsys):
    """Runs the command line; (exit status, stdout, stderr)."""

    def run(*argv):
        try:
            status = cli.main([str(argument) for argument in argv])
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return run


@pytest.fixture
def refused(run):
    """Runs what must be refused; the only line that it writes."""

    def refused(*argv, status=2):
        found, out, err = run(*argv)
        assert (found, out) == (status, "")
        assert err.count("\n") == 1 and err.startswith("numflash-tune"), err
        return err

    return refused


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


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--trials", "0"), "--trials must be positive, got 0"),
        (("--trials", "many"), "--trials: invalid int value: 'many'"),
        (("--time-budget", "-1"), "--time-budget must be positive, got -1.0"),
        (("--time-budget", "nan"), "--time-budget must be positive, got nan"),
        (("--target", "0"), "--target must be positive, got 0.0"),
        (("--jobs", "0"), "--jobs must be positive, got 0"),
        (("--sampler", "best"), "--sampler: invalid choice: 'best'"),
        (("--seed", "-1"), "Seed must be between 0 and"),
        (
            ("--sram-budget", "48Q"),
            "--sram-budget must be a number of bytes, as in 48K, got '48Q'",
        ),
        (("--sram-budget", "K"), "--sram-budget must be a number of bytes, as in 48K, got 'K'"),
        (("--sram-budget", ""), "--sram-budget must be a number of bytes, as in 48K, got ''"),
        (("--sram-budget", "0"), "the shared-memory budget must be positive, got 0"),
        (("--min-occupancy", "1.5"), "the occupancy must be between 0 and 1, got 1.5"),
        (("--min-occupancy", "nan"), "the occupancy must be between 0 and 1, got nan"),
        (("--mask", "diagonal"), "--mask must be full, causal or windowN"),
        (("--mask", "window"), "--mask must be full, causal or windowN"),
        (("--mask", "window0"), "--mask must be full, causal or windowN"),
        (("--mask", "window-5"), "--mask must be full, causal or windowN"),
        (("--heads", "8", "--heads-kv", "3"), "--heads-kv must divide --heads, 8, got 3"),
        (("--heads-kv", "0"), "--heads-kv must divide --heads, 16, got 0"),
        (("--heads", "0"), "--heads must be positive, got 0"),
        (("--batch", "-2"), "--batch must be positive, got -2"),
        (("--seqlen", "4096", "0"), "--seqlen must be positive, got 0"),
        (("--seqlen-q", "-1"), "--seqlen-q must be positive, got -1"),
        (("--head-dim", "0"), "--head-dim must be 1 to 256, got 0"),
        (("--head-dim-v", "257"), "--head-dim-v must be 1 to 256, got 257"),
        (("--dtype", "float8"), "--dtype: invalid choice: 'float8'"),
        (("--pass", "sideways"), "--pass: invalid choice: 'sideways'"),
        (("--pass",), "--pass: expected at least one argument"),
        (("--precision", "tf16"), "--precision: invalid choice: 'tf16'"),
        (("--frobnicate",), "unrecognized arguments: --frobnicate"),
        (("nonsense",), "unrecognized arguments: nonsense. Subcommands, which come first, are"),
        (("--quiet", "show"), "did you mean numflash-tune show? Subcommands, which come first,"),
        (("--precision", "tf32"), "tf32 goes with --dtype float32, got --dtype float16 bfloat16"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_arguments_are_named(refused, argv, words):
    assert words in refused(*OFFLINE, *argv)


def test_a_mistyped_subcommand_is_answered_with_those_there_are(refused):
    for typed, meant in (("shw", "show"), ("vaildate", "validate"), ("Merge", "merge")):
        said = refused(typed)
        assert f"{typed}; did you mean numflash-tune {meant}? Subcommands" in said
        assert all(command in said for command in caches.COMMANDS)


@pytest.mark.parametrize(
    ("device", "head_dim", "words"),
    [
        ("T4", 64, "on its FMA units, not as tf32 (sm75 (tensor cores): Turing's"),
        ("sm_80", 256, "of shared memory per block, sm_80 has 166912); what runs there is"),
    ],
)
def test_tf32_that_a_gpu_does_not_multiply_is_refused(refused, device, head_dim, words):
    options = ("--dtype", "float32", "--precision", "tf32", "--head-dim", head_dim)
    said = refused("--device", device, "--offline", *options, "--trials", 1)
    assert words in said and "forward float32" in said and "without --precision tf32" in said


def test_tf32_is_tuned_where_it_is_multiplied(run):
    options = (*SMALL, "--precision", "tf32", "--trials", 1, "--quiet")
    status, out, _ = run(*OFFLINE, *options)
    assert status == 0 and "-tf32 full" in out and " sm80-m" in out


def test_an_unknown_device_names_the_nearest(refused):
    said = refused("--device", "RTX 409", "--offline")
    assert "'RTX 409'" in said and "did you mean NVIDIA GeForce RTX 4090" in said


@pytest.mark.parametrize("device", ["sm_99", "", "sm_70", "-1x"])
def test_what_is_no_device_is_quoted(refused, device):
    assert repr(device) in refused(f"--device={device}", "--offline")


@pytest.mark.parametrize("device", [(), ("--device", "0"), ("--device", "5", "--offline")])
@pytest.mark.skipif(not SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM=1")
def test_without_a_gpu_it_says_what_can_be_done(refused, device):
    said = refused(*device)
    assert "no GPU in the simulator" in said
    assert said.endswith(
        '. To tune for a GPU that is not here: --device "NVIDIA A100" --offline\n'
    )


@pytest.mark.parametrize(
    ("here", "words"),
    [([], "it has no GPU"), (["Tesla T4", "NVIDIA L4"], "its GPUs are Tesla T4, NVIDIA L4")],
)
def test_a_gpu_that_is_not_here_cannot_be_measured(refused, monkeypatch, here, words):
    monkeypatch.setattr(targets, "_local_names", lambda: here)
    said = refused("--device", "A100")
    assert f"NVIDIA A100-SXM4-80GB cannot be measured on this machine: {words}" in said
    assert "use --offline" in said


@pytest.mark.parametrize(
    ("argv", "constraint"),
    [
        (("--sram-budget", "64"), "--sram-budget"),
        (("--dtype", "float16", "--min-occupancy", "1", "--head-dim", "256"), "--min-occupancy"),
    ],
)
def test_impossible_budgets_name_the_constraint_that_empties_the_space(refused, argv, constraint):
    said = refused(*OFFLINE, *SMALL, *argv, status=1)
    assert "is possible on sm_80" in said and re.search(rf"{constraint} [1-9]\d*", said)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://me:secret@127.0.0.1:1/x", "postgresql://me:***@127.0.0.1:1/x"),
        ("nonsense://x", "the driver for nonsense://x is missing"),
        ("/dev/null/trials", "the journal /dev/null/trials cannot be written"),
    ],
)
def test_a_storage_that_does_not_answer_is_named(refused, url, words):
    if url.startswith("postgresql"):
        pytest.importorskip("psycopg")
    said = refused(*OFFLINE, *SMALL, "--quiet", "--storage", url, status=1)
    assert words in said and "secret" not in said


def test_a_storage_that_fails_in_the_middle_is_one_line(refused, monkeypatch):
    from optuna.exceptions import StorageInternalError

    from tuner.search import studies

    def fail(self, trial, record):
        raise StorageInternalError("the connection\nis lost")

    monkeypatch.setattr(studies.Ledger, "finish", fail)
    assert "the connection is lost" in refused(*OFFLINE, *SMALL, "--quiet", status=1)


def test_where_no_compiler_can_be_started_it_is_one_line(refused, monkeypatch):
    def submit(self, config, traits):
        future = Future()
        future.set_exception(NoCompilerError("no compiler process can be started: no memory"))
        return future

    monkeypatch.setattr(InstantPool, "submit", submit)
    said = refused(*OFFLINE, *SMALL, "--quiet", status=1)
    assert said.endswith("error: no compiler process can be started: no memory\n")


def test_a_class_that_fails_does_not_end_the_others(run, monkeypatch):
    monkeypatch.setattr(InstantPool, "spill_bytes", 4)
    status, out, err = run(*OFFLINE, *SMALL, "--seqlen", 512, 1024, "--trials", 2, "--quiet")
    assert (status, out) == (1, "")
    assert [line.partition(" worked: ")[0] for line in err.splitlines()] == [
        f"numflash-tune: no config of {CLASS.replace('4096', size)}" for size in ("512", "1024")
    ]


def test_a_missing_package_says_how_to_get_it(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "tuner.search.search", None)
    assert 'pip install "numflash[tune]"' in refused(*OFFLINE)


def test_devices_are_listed(run):
    status, out, err = run("--list-devices")
    assert (status, err) == (0, "") and out.splitlines() == machines.names()


def test_help_names_the_subcommands(run):
    status, out, _ = run("--help")
    assert status == 0
    assert all(command in out for command in caches.COMMANDS)


class Page(HTMLParser):
    """Which elements of a page are open, and its text."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], ""

    def handle_starttag(self, tag, attributes):
        """It is open until it ends."""
        self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        """It has no contents."""

    def handle_endtag(self, tag):
        """What ends was the last to begin."""
        assert self.open.pop() == tag

    def handle_data(self, data):
        """Collect it."""
        self.text += data


def test_an_offline_run_remembers_shows_and_reports(run, tmp_path):
    status, out, err = run(*OFFLINE, *SMALL, "--trials", 5, "--report", "r.html")
    assert status == 0
    (found,) = store.read(DeviceKey("sm_80", "sm_80", 0))
    assert (str(found.problem), found.origin) == (CLASS, "predicted")
    assert CLASS in out and found.config in out and f"report: {tmp_path / 'r.html'}" in out
    plan, progress = err.splitlines()
    assert plan.startswith("1 class of problems on sm_80, 5 trials: ")
    assert progress.startswith(f"[1/1] {CLASS}  5/5  best predicted ")
    page = Page()
    page.feed((tmp_path / "r.html").read_text())
    page.close()
    assert page.open == [] and CLASS in page.text and found.config in page.text
    assert "Tried: 5" in page.text


def test_before_it_starts_it_says_how_much_it_plans_and_how_long_that_takes(run, monkeypatch):
    def submit(self, config, traits):
        future = real(self, config, traits)
        examined = future.result()
        resources = dataclasses.replace(examined.resources, compile_ms=4000.0)
        future = Future()
        future.set_result(dataclasses.replace(examined, resources=resources))
        return future

    real = InstantPool.submit
    monkeypatch.setattr(InstantPool, "submit", submit)
    command = (*OFFLINE, *SMALL, "--mask", "full", "causal", "--head-dim", 64, "--jobs", 2)
    err = run(*command, "--trials", 6)[2]
    assert err.splitlines()[0] == (
        "2 classes of problems on sm_80, 12 trials, 6 each: up to about 0:24, if all are "
        "compiled, which takes 4.0 s a kernel, 2 at once"
    )
    err = run(*command, "--trials", 10, "--time-budget", 90)[2]
    assert err.splitlines()[0] == (
        "2 classes of problems on sm_80, 20 trials, 10 each; 8 are left: up to about 0:16, if all "
        "are compiled, which takes 4.0 s a kernel, 2 at once, or 1:30 by --time-budget"
    )
    err = run(*command, "--trials", 10)[2]
    assert err.splitlines()[0].endswith("20 trials, 10 each; 0 are left: nothing is left to try")


def test_the_plan_of_the_commands_example_is_24_classes(monkeypatch):
    """And is said when a few kernels are compiled, not 24."""
    submit, submitted = InstantPool.submit, []
    monkeypatch.setattr(
        InstantPool,
        "submit",
        lambda self, *config: submitted.append(config) or submit(self, *config),
    )
    args = cli._parser().parse_args(["--device", "A100", "--offline"])
    target = targets.find_target(args.device, args.offline)
    with Session(target.key, target.machine, None, Options(StoppingRules(48), jobs=2)) as session_:
        spaces = session_.spaces(cli._problems(args))
        plan = session_.plan(spaces)
    assert 2 <= len(submitted) <= 4
    assert str(plan) == (
        "24 classes of problems on NVIDIA A100-SXM4-80GB, 1,152 trials, 48 each: how long that "
        "takes shows when a kernel is compiled"
    )


def test_a_plan_counts_once_what_the_model_cannot_tell_apart():
    args = cli._parser().parse_args([*OFFLINE, *SMALL, "--dtype", "float16"])
    target = targets.find_target(args.device, args.offline)
    with Session(target.key, target.machine, None, Options(jobs=1)) as session_:
        (space,) = session_.spaces(cli._problems(args))
        (size,) = session_.plan([space]).sizes
    assert size == distinct(space) < len(space.feasible)


def test_a_plan_makes_no_study(run, tmp_path, monkeypatch):
    def tune(self, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "tune", tune)
    status, _, err = run(*OFFLINE, *SMALL)
    assert status == 130 and err.startswith("1 class of problems")
    assert not (tmp_path / "cache" / "studies").exists()


def test_a_plan_reads_a_storage_of_the_users(run, tmp_path):
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    command = (*OFFLINE, *SMALL, "--storage", url)
    assert ", 3 trials: " in run(*command, "--trials", 3)[2]
    assert ", 5 trials; 2 are left: " in run(*command, "--trials", 5)[2]


def test_the_same_command_goes_on_and_a_larger_one_adds(run):
    command = (*OFFLINE, *SMALL, "--seed", 1)
    assert "  3/3  " in run(*command, "--trials", 3)[2]
    again = run(*command, "--trials", 3)[2]
    assert "  3/3  " in again and again.endswith("0:00\n")
    assert "  5/5  " in run(*command, "--trials", 5)[2]


@pytest.mark.parametrize("report", ["no/r.html", ".", "blocked/r.html", "/dev/null"])
def test_a_report_that_cannot_be_written_is_refused_before_the_search(
    refused, tmp_path, monkeypatch, report
):
    (tmp_path / "blocked").write_text("")
    monkeypatch.setattr(InstantPool, "submit", pytest.fail)
    said = refused(*OFFLINE, *SMALL, "--trials", 2, "--quiet", "--report", report)
    assert "--report cannot be written: " in said and repr(report) in said
    assert not store.read_all()


def test_a_report_is_not_touched_before_there_is_a_new_one(run, tmp_path, monkeypatch):
    def submit(self, config, traits):
        raise KeyboardInterrupt

    monkeypatch.setattr(InstantPool, "submit", submit)
    (tmp_path / "old.html").write_text("old")
    for name in ("old.html", "new.html"):
        assert run(*OFFLINE, *SMALL, "--report", name)[0] == 130
    assert (tmp_path / "old.html").read_text() == "old"
    assert not (tmp_path / "new.html").exists()


def test_a_report_that_can_no_longer_be_written_costs_the_report_only(run, monkeypatch):
    def fail(path, results):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr("tuner.report.write_html", fail)
    status, out, err = run(*OFFLINE, *SMALL, "--trials", 2, "--quiet", "--report", "r.html")
    assert status == 0 and CLASS in out
    assert err.startswith("numflash-tune: cannot write the report: ") and "r.html" in err
    assert store.read_all()


def test_ctrl_c_writes_the_report_that_was_asked_for(run, tmp_path, monkeypatch):
    real, count = InstantPool.submit, itertools.count()

    def submit(self, config, traits):
        if next(count) == 6:
            raise KeyboardInterrupt
        return real(self, config, traits)

    monkeypatch.setattr(InstantPool, "submit", submit)
    status, out, err = run(*OFFLINE, *SMALL, "--trials", 9, "--jobs", 1, "--report", "r.html")
    assert status == 130 and err.endswith("stopped; the same command goes on from here\n")
    (found,) = store.read_all()[DeviceKey("sm_80", "sm_80", 0)]
    page = (tmp_path / "r.html").read_text()
    assert found.config in out and found.config in page and f"{tmp_path / 'r.html'}" in out
    assert "interrupted" in err and f"best predicted {found.time_ms:.4g}" in err


def test_where_the_cache_cannot_be_written_work_goes_on(run, tmp_path, monkeypatch, caplog):
    (tmp_path / "blocked").write_text("")
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path / "blocked" / "cache"))
    status, out, _ = run(*OFFLINE, *SMALL, "--trials", 2, "--quiet")
    assert status == 0 and CLASS in out
    assert all(str(tmp_path / "blocked") in r.getMessage() for r in caplog.records)
    assert "kept in memory" in caplog.text
    assert "the config found is not remembered" in caplog.text


def test_ctrl_c_says_how_to_go_on_and_shows_what_there_is(run, monkeypatch):
    real = InstantPool.submit

    def submit(self, config, traits):
        if str(config) in seen:
            raise KeyboardInterrupt
        seen.append(str(config))
        return real(self, config, traits)

    seen = []
    command = (*OFFLINE, *SMALL, "--trials", 2, "--seqlen", 4096, 8192, "--quiet")
    monkeypatch.setattr(InstantPool, "submit", submit)
    status, out, err = run(*command)
    assert (status, err) == (130, "stopped; the same command goes on from here\n")
    assert CLASS in out and "q8192" not in out
    monkeypatch.setattr(InstantPool, "submit", real)
    status, out, _ = run(*command)
    assert status == 0 and CLASS in out and "q8192" in out


def test_a_measured_run_closes_its_measurer(run, monkeypatch):
    watch, closed = Stopwatch(), []
    watch.close = lambda: closed.append(True)

    def make(ordinal, expected):
        assert (ordinal, expected) == (0, A100)
        return watch

    monkeypatch.setattr("tuner.measuring.measurer.DeviceMeasurer", make)
    local = targets.Target(A100, machines.find(A100.name), 0)
    monkeypatch.setattr(targets, "find_target", lambda device, offline: local)
    status, out, _ = run(*SMALL, "--trials", 3, "--quiet")
    assert status == 0 and closed == [True]
    assert "measured" in out and "predicted" not in out
    assert [found.origin for found in store.read(A100)] == ["measured"]


def classes(*argv):
    """The classes that arguments mean."""
    return [str(found) for found in cli._problems(cli._parser().parse_args(argv))]


def test_classes_are_every_combination_once():
    found = classes("--dtype", "float16", "--seqlen", "1000", "1024", "--head-dim", "64")
    assert len(found) == len(set(found)) and len({text.split()[0] for text in found}) >= 4
    assert {tuple(text.split()[1:3]) for text in found} == {
        ("float16-d64-dv64-vec", "full"),
        ("float16-d64-dv64-vec", "causal"),
    }
    assert all(text.endswith("q1024 k1024 bh64 g1") for text in found)


@pytest.mark.parametrize(
    ("argv", "shape", "options"),
    [
        (("--batch", "3", "--heads", "12", "--heads-kv", "4"), (3, 4096, 4096, 12, 4), {}),
        # Beyond these sizes classes do not differ.
        (("--batch", "2000", "--heads", "16"), (2000, 4096, 4096, 16, 16), {}),
        (("--seqlen", "300000", "--seqlen-q", "7"), (4, 7, 300000, 16, 16), {}),
        (("--mask", "causal", "--seqlen", "77"), (4, 77, 77, 16, 16), {"causal": True}),
        (
            ("--mask", "window1000"),
            (4, 4096, 4096, 16, 16),
            {"causal": True, "window_size": (999, 0)},
        ),
    ],
)
@pytest.mark.skipif(not SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM=1")
def test_a_class_is_the_one_that_its_problems_are_of(argv, shape, options):
    batch, seqlen_q, seqlen_k, heads, heads_kv = shape
    q = np.lib.stride_tricks.as_strided(
        np.zeros(64, np.float16), (batch, seqlen_q, heads, 64), (0, 0, 0, 2)
    )
    k = np.lib.stride_tricks.as_strided(q[0, 0, 0], (batch, seqlen_k, heads_kv, 64), (0, 0, 0, 2))
    views = {
        name: library_of(x, name).view(x, name) for name, x in zip("qkv", (q, k, k), strict=True)
    }
    request = request_of(views, AttentionOptions(**options))
    full = () if "--mask" in argv else ("--mask", "full")
    forward = ("--pass", "forward", "--dtype", "float16", "--head-dim", "64")
    asked = classes(*forward, *full, *argv)
    assert str(ProblemClass.of("forward", request.problem, request.traits)) in asked


def test_tf32_is_for_float32_only(refused):
    said = refused(*OFFLINE, "--precision", "tf32", "--dtype", "float32", "float16")
    assert "goes with --dtype float32, got --dtype float32 float16" in said


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--capture", "noted"), "--capture FILE goes with a program"),
        (("--", sys.executable, "-c", "1"), "--capture FILE goes with a program"),
        (("--capture", "noted", "--"), "--capture FILE goes with a program"),
        (("--capture", "noted", "--", "no-such-program"), "cannot run no-such-program: "),
    ],
)
def test_a_capture_needs_a_file_and_a_program(refused, tmp_path, argv, words):
    assert words in refused(*argv)
    assert not (tmp_path / "noted").exists()


PROGRAM = """
import sys, numpy as np
from numflash import attention, attention_backward
q = np.zeros((1, 5, 2, 16), np.float16)
out, lse = attention(q, q, q, causal=True, return_lse=True)
attention_backward(out, q, q, q, out, lse, causal=True)
sys.exit(7)
"""


def test_a_program_notes_its_classes_and_these_are_tuned(run, tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    status, out, err = run("--capture", "noted", "--", sys.executable, "-c", PROGRAM)
    assert (status, err) == (7, "")
    noted = (tmp_path / "noted").read_text().splitlines()
    assert out == f"{len(noted)} classes of problems are in noted\n"
    forward = "forward float16-d32-dv32-vec causal q8 k8 bh2 g1"
    assert forward in noted
    command = (*OFFLINE, "--from-capture", "noted", "--trials", 1, "--quiet")
    status, out, _ = run(*command, "--pass", "forward")
    tuned = {str(found.problem) for found in store.read(DeviceKey("sm_80", "sm_80", 0))}
    assert status == 0 and forward in tuned
    assert {text.split()[0] for text in tuned} <= {"forward", "combine"}
    run(*command)
    tuned = {str(found.problem) for found in store.read(DeviceKey("sm_80", "sm_80", 0))}
    assert {text.split()[0] for text in tuned} >= {"backward-dq", "backward-dkdv"}
    assert tuned <= set(noted)


@pytest.mark.parametrize(
    ("program", "status"),
    [("import sys; sys.exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)],
)
def test_a_program_without_attention_keeps_its_status(run, program, status):
    found, out, err = run("--capture", "noted", "--", sys.executable, "-c", program)
    assert (found, out) == (status, "")
    assert err == f"{sys.executable} ran no attention: noted was not written\n"


def test_what_a_capture_is_not_written_to(run, tmp_path):
    (tmp_path / "noted").write_text("a letter\n")
    status, out, err = run("--capture", "noted", "--", sys.executable, "-c", "")
    assert (status, out) == (0, "")
    assert err.startswith("numflash-tune: noted is no capture: noted, line 1: ")
    status, out, err = run("--capture", ".", "--", sys.executable, "-c", "")
    assert (status, out) == (0, "") and "[Errno 21]" in err


def test_ctrl_c_ends_a_program_that_notes(run, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", stop)
    assert run("--capture", "noted", "--", "true") == (130, "", "stopped\n")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "'noted'"),
        (b"", "noted holds no class of forward"),
        (b"backward-dq float16-d64-dv64-vec full q64 k64 bh1 g1\n", "no class of forward"),
        (f"{CLASS}\nforward float17 full\n".encode(), "noted, line 2: a problem class must look"),
        (bytes(range(128, 256)), "noted is no capture"),
    ],
)
def test_a_capture_that_is_of_no_use_is_named(refused, tmp_path, content, words):
    if content is not None:
        (tmp_path / "noted").write_bytes(content)
    assert words in refused(*OFFLINE, "--pass", "forward", "--from-capture", "noted")


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


def test_it_is_a_module_too():
    finished = subprocess.run(
        [sys.executable, "-m", "numflash_tuner", *OFFLINE, "--trials", "0"],
        capture_output=True,
        text=True,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
    )
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == "numflash-tune: error: --trials must be positive, got 0\n"
