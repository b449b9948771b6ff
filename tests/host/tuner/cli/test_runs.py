"""A run of the tuner's command line: its work, memory and report."""

import dataclasses
import errno
import itertools
import os
from concurrent.futures import Future
from html.parser import HTMLParser

import pytest

pytest.importorskip("optuna")
from numflash.selection import store
from numflash.selection.entries import DeviceKey
from tests.host.tuner.test_session import InstantPool, Stopwatch
from tests.support.covering import thorough
from tests.support.tuning_entries import A100, CLASS, OFFLINE, SMALL
from tuner import cli
from tuner.search.candidates import distinct
from tuner.search.search import Search, StoppingRules
from tuner.search.session import Options, Session
from tuner.space import machines
from tuner.space import target as targets


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
        """An element that ends was the last to begin."""
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


@thorough
def test_the_plan_of_the_commands_example_is_24_classes(monkeypatch):
    """And is said when a few kernels are compiled, not 24."""
    submit, submitted = InstantPool.submit, []
    monkeypatch.setattr(
        InstantPool,
        "submit",
        lambda self, *config: submitted.append(config) or submit(self, *config),
    )
    args = cli.make_parser().parse_args(["--device", "A100", "--offline"])
    target = targets.find_target(args.device, args.offline)
    with Session(target.key, target.machine, None, Options(StoppingRules(48), jobs=2)) as session_:
        spaces = session_.spaces(cli.problems_of(args))
        plan = session_.plan(spaces)
    assert 2 <= len(submitted) <= 4
    assert str(plan) == (
        "24 classes of problems on NVIDIA A100-SXM4-80GB, 1,152 trials, 48 each: how long that "
        "takes shows when a kernel is compiled"
    )


def test_a_plan_counts_once_what_the_model_cannot_tell_apart():
    args = cli.make_parser().parse_args([*OFFLINE, *SMALL, "--dtype", "float16"])
    target = targets.find_target(args.device, args.offline)
    with Session(target.key, target.machine, None, Options(jobs=1)) as session_:
        (space,) = session_.spaces(cli.problems_of(args))
        (size,) = session_.plan([space]).sizes
    assert size == distinct(space) < len(space.feasible)


def test_a_plan_makes_no_study(run, tmp_path, monkeypatch):
    def tune(self, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "tune", tune)
    status, _, err = run(*OFFLINE, *SMALL)
    assert status == 130 and err.startswith("1 class of problems")
    assert not (tmp_path / "cache" / "studies").exists()


@thorough
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
    def fail(path, results, pages):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr("tuner.report.write_html", fail)
    status, out, err = run(*OFFLINE, *SMALL, "--trials", 2, "--quiet", "--report", "r.html")
    assert status == 0 and CLASS in out
    assert err.startswith("numflash-tune: cannot write the report: ") and "r.html" in err
    assert store.read_all()


def interrupt_at(number, monkeypatch):
    """Ctrl-C before the trial of this number; the method that it replaces."""
    real, count = Search._look_at, itertools.count()

    def look_at(self, *trial):
        if next(count) == number:
            raise KeyboardInterrupt
        return real(self, *trial)

    monkeypatch.setattr(Search, "_look_at", look_at)
    return real


def test_ctrl_c_writes_the_report_that_was_asked_for(run, tmp_path, monkeypatch):
    interrupt_at(5, monkeypatch)
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
    command = (*OFFLINE, *SMALL, "--trials", 2, "--seqlen", 4096, 8192, "--quiet")
    real = interrupt_at(2, monkeypatch)
    status, out, err = run(*command)
    assert (status, err) == (130, "stopped; the same command goes on from here\n")
    assert CLASS in out and "q8192" not in out
    monkeypatch.setattr(Search, "_look_at", real)
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


@pytest.mark.parametrize(
    ("options", "text"),
    [
        pytest.param(
            ("--varlen", "--batch", 6, "--seqlen", 300, "--pass", "forward"),
            "forward float16-d64-dv64-vec-ragged causal q512 k512 bh128 g1",
            marks=thorough,
        ),
        (
            ("--page-size", 16, "--seqlen-q", 1, "--seqlen", 8192, "--heads-kv", 4),
            "forward float16-d64-dv64-vec-ragged-paged full q1 k8192 bh64 g4 p16",
        ),
    ],
)
def test_sequences_and_pages_are_tuned_remembered_and_found(run, options, text):
    given = ("--dtype", "float16", "--head-dim", 64, "--mask", "causal", *options)
    status, out, err = run(*OFFLINE, *given, "--trials", 3)
    assert status == 0 and text in out, err
    found = {str(each.problem): each for each in store.read(DeviceKey("sm_80", "sm_80", 0))}
    assert found[text].origin == "predicted" and found[text].config.startswith("sm80-")
    assert {name.split()[0] for name in found} <= {"forward", "combine"}
    assert all("paged" not in name for name in found if name.startswith("combine"))


def test_a_measured_run_on_8_bit_floats_is_remembered_and_reported(run, tmp_path, monkeypatch):
    watch = Stopwatch()
    watch.close = lambda: None
    monkeypatch.setattr("tuner.measuring.measurer.DeviceMeasurer", lambda *given, **more: watch)
    h200 = DeviceKey("NVIDIA H200", "sm_90a", 132)
    local = targets.Target(h200, machines.find(h200.name), 0)
    monkeypatch.setattr(targets, "find_target", lambda device, offline: local)
    asked = ("--precision", "fp8", "--dtype", "float16", "--head-dim", 64, "--mask", "full")
    status, out, err = run(*asked, "--trials", 12, "--report", "r.html")
    assert status == 0 and "measured" in out and "predicted" not in out, err
    (found,) = store.read(h200)
    assert str(found.problem) == "forward float16-d64-dv64-vec-fp8 full q4096 k4096 bh64 g1"
    assert found.default_config == "fp8-sm90-m128n128w8s2-overlap-pingpong-persistent"
    assert found.config.startswith("fp8-sm") and found.config in out
    page = Page()
    page.feed((tmp_path / "r.html").read_text())
    page.close()
    assert page.open == [] and found.config in page.text and "Tried: 12" in page.text
    assert "What bounds the best, by the model" in page.text
    assert "was not asked" not in page.text
    # The page of the winner.
    assert found.config in (tmp_path / "r-1.html").read_text()
