"""numflash-tune without a GPU, as users run it: killed, stopped, twice at once, cache damaged.

Every test has a cache of its own; machine code is shared, so that kernels are compiled once.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from numflash.configs import parse_config
from numflash.problem.classes import ProblemClass
from numflash.selection.entries import parse_table
from tests.conftest import share_compiled
from tests.support.covering import some, thorough
from tuner import model
from tuner.model.errors import ERRORS
from tuner.records import Record
from tuner.space import machines

CLASS = "forward float16-d64-dv64-vec full q4096 k4096 bh64 g1"
TUNER = ("-m", "numflash_tuner")
# The tuner, which pauses after each trial, so that there is a middle to stop it in.
PAUSING = """
import sys, time
from numflash_tuner import cli
from numflash_tuner.search import studies

pause, finish = float(sys.argv.pop(1)), studies.Ledger.finish

def finish_and_pause(self, trial, record):
    kept = finish(self, trial, record)
    time.sleep(pause)
    return kept

studies.Ledger.finish = finish_and_pause
sys.exit(cli.main())
"""
# The tuner, to which the compiler never hands the default of a search.
WITHOUT_DEFAULT = """
import sys
from concurrent.futures import Future
from numflash_tuner import cli
from numflash_tuner.search import search

look_at = search.Search._look_at

def look(self, trial, config, on_record):
    found = look_at(self, trial, config, on_record)
    if config == self.space.default:
        found = [search._Waiting(each.trial, each.config, each.began, Future()) for each in found]
    return found

search.Search._look_at = look
sys.exit(cli.main())
"""
OPTIONS = (
    *("--device", "sm_80", "--offline"),
    *("--pass", "forward", "--dtype", "float16", "--head-dim", "64", "--mask", "full"),
    *("--jobs", "1", "--seed", "0"),
)
# Prints the config of a call of this class in the simulator of an sm_80, and its rule.
EXPLAIN = """
import numpy as np
from numflash import explain_dispatch
q = np.zeros((4, 4096, 16, 64), np.float16)
print(explain_dispatch(q, q, q).forward)
"""
DEADLINE = 120


@pytest.fixture
def cache(tmp_path):
    """A cache with the machine code that there is, which is given what comes to it."""
    folder = tmp_path / "cache"
    share_compiled(folder)
    return folder


def environment(cache, **changes):
    """The user's environment: no simulator, tuned configs in use."""
    dropped = ("NUMBA_ENABLE_CUDASIM", "NUMFLASH_TUNED", "NUMFLASH_SIM_ARCH")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "NUMFLASH_CACHE_DIR": str(cache), **changes}


def start(cache, *options, pause=None, program=None):
    """Start the tuner in a process group of its own.

    `pause` after each trial, in seconds; or `program`, another Python text.
    """
    command = TUNER if pause is None else ("-c", PAUSING, pause)
    command = command if program is None else ("-c", program)
    return subprocess.Popen(
        list(map(str, [sys.executable, *command, *OPTIONS, *options])),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(cache),
        start_new_session=True,
        preexec_fn=_listen_to_ctrl_c,
    )


def _listen_to_ctrl_c():
    """A shell's job in the background ignores SIGINT, and so do all its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end(process):
    """(exit status, stdout, stderr) of the tuner."""
    out, err = process.communicate(timeout=DEADLINE)
    return process.returncode, out, err


def tune(cache, *options):
    """Run the tuner to a good end; (stdout, stderr)."""
    status, out, err = end(start(cache, *options))
    assert status == 0, err
    return out, err


def trials(cache):
    """The trials of the only study, as its journal has them."""
    path = next((cache / "studies").glob("*.journal"), None)
    if path is None:
        return []
    storage = JournalStorage(JournalFileBackend(str(path)))
    studies = storage.get_all_studies()
    return storage.get_all_trials(studies[0]._study_id, deepcopy=False) if studies else []


def tried(cache):
    """The configs that have a record."""
    counted = (TrialState.COMPLETE, TrialState.PRUNED)
    found = [trial for trial in trials(cache) if trial.state in counted]
    assert all("record" in trial.user_attrs for trial in found)
    return [trial.user_attrs["config"] for trial in found]


def expect_each_once(cache, count):
    """So many configs have a record, each once, and nothing is being tried any more."""
    assert len(tried(cache)) == count
    assert set(Counter(tried(cache)).values()) == {1}
    assert not [trial for trial in trials(cache) if trial.state == TrialState.RUNNING]


def entries(cache):
    """The entries of the config cache."""
    found = [parse_table(path.read_bytes()) for path in (cache / "configs").glob("*.json")]
    return [row.entry for table in found for rows in table.values() for row in rows]


def wait_for_records(cache, count, process):
    """Wait until the tuner has so many records."""
    began = time.monotonic()
    while time.monotonic() - began < DEADLINE:
        assert process.poll() is None, process.communicate()
        if list((cache / "studies").glob("*.journal")) and len(tried(cache)) >= count:
            return
        time.sleep(0.05)
    pytest.fail(f"no {count} records after {DEADLINE} s")


def test_a_bare_machine_ends_with_an_entry_that_dispatch_uses(cache, tmp_path):
    out, _ = tune(cache, "--trials", 6, "--report", tmp_path / "r.html")
    (entry,) = entries(cache)
    assert (str(entry.problem), entry.origin) == (CLASS, "predicted")
    assert entry.config in out and entry.default_ms >= entry.time_ms > 0
    expect_each_once(cache, 6)
    records = [Record.from_json(trial.user_attrs["record"]) for trial in trials(cache)]
    problem, machine = ProblemClass.parse(CLASS), machines.find("sm_80")
    for record in records:
        # What is not compiled for it is slow: no machine code beats it.
        at_best = model.at_best(machine, problem, parse_config("forward", record.config)).ms
        assert record.outcome == "estimated" or record.predicted_ms > at_best, record
    assert {record.outcome for record in records} >= {"predicted", "estimated"}
    report = (tmp_path / "r.html").read_text()
    assert CLASS in report and entry.config in report and report.endswith("</html>\n")
    explained = subprocess.run(
        [sys.executable, "-c", EXPLAIN],
        env=environment(cache, NUMBA_ENABLE_CUDASIM="1"),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    rule = f"tuned on this device for this class (predicted {entry.time_ms:.4g} ms, "
    assert explained.startswith(f"forward: {entry.config} (") and rule in explained


@thorough
def test_hopper_is_tuned_with_its_own_kernels(cache, tmp_path):
    report = tmp_path / "r.html"
    options = ("--device", "sm_90a", "--head-dim", 128, "--trials", 4, "--report", report)
    out, _ = tune(cache, *options)
    (entry,) = entries(cache)
    assert entry.problem.traits.head_dim == 128
    found = [config for config in tried(cache) if config.startswith("sm90-")]
    assert entry.config in found and entry.config in out
    assert len({config.split("-", 2)[2] for config in found}) > 1, "all have the same switches"
    page = report.read_text()
    assert "What is on or off" in page and all(config in page for config in found)


def processes_of(group):
    """The processes of a group that live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z" and int(fields[2]) == group:
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("whole_group", "sampler"), some([(True, "tpe"), (False, "grid")], (False, "grid")), ids=str
)
def test_after_a_kill_the_second_start_goes_on(cache, whole_group, sampler):
    # So many that the machine may be slow to look: it cannot be over by then.
    first = start(cache, "--trials", 60, "--sampler", sampler, pause=0.6)
    wait_for_records(cache, 2, first)
    if whole_group:
        os.killpg(first.pid, signal.SIGKILL)
    else:
        first.kill()
    first.wait()
    before = tried(cache)
    assert 2 <= len(before) < 60
    tune(cache, "--trials", len(before) + 2, "--sampler", sampler)
    expect_each_once(cache, len(before) + 2)
    assert tried(cache)[: len(before)] == before
    (entry,) = entries(cache)
    assert entry.default_config in tried(cache) and entry.default_ms >= entry.time_ms
    # Compilers end with the kernel that they are at.
    began = time.monotonic()
    while processes_of(first.pid):
        assert time.monotonic() - began < DEADLINE, "compilers outlived their parent"
        time.sleep(0.1)
    first.stdout.close()
    first.stderr.close()


@thorough
def test_ctrl_c_remembers_the_best_reports_and_says_how_to_go_on(cache, tmp_path):
    # So many that the machine may be slow to look: it cannot be over by then.
    process = start(cache, "--trials", 60, "--report", tmp_path / "r.html", pause=0.6)
    wait_for_records(cache, 2, process)
    # As from a terminal: to the compilers, too.
    os.killpg(process.pid, signal.SIGINT)
    status, _, err = end(process)
    assert status == 130 and "Traceback" not in err
    assert err.endswith("interrupted\nstopped; the same command goes on from here\n")
    before = tried(cache)
    assert 2 <= len(before) < 60
    assert entries(cache)[0].config in before
    assert entries(cache)[0].config in (tmp_path / "r.html").read_text()
    tune(cache, "--trials", len(before) + 2)
    expect_each_once(cache, len(before) + 2)
    assert tried(cache)[: len(before)] == before


@thorough
def test_killed_before_the_default_is_known_the_next_run_tries_it(cache):
    first = start(cache, "--trials", 60, program=WITHOUT_DEFAULT)
    began = time.monotonic()
    while not any("config" in trial.user_attrs for trial in trials(cache)):
        assert time.monotonic() - began < DEADLINE and first.poll() is None
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    # Without a GPU nothing is tried before the default is known.
    assert tried(cache) == []
    tune(cache, "--trials", 3)
    (entry,) = entries(cache)
    assert tried(cache)[0] == entry.default_config and len(tried(cache)) == 3
    gain = entry.default_ms / entry.time_ms - 1
    assert entry.config == entry.default_config or gain > ERRORS["sm80 forward"]


@thorough
def test_two_processes_at_once_try_nothing_twice(cache):
    both = [start(cache, "--trials", 6, pause=1) for _ in range(2)]
    outcomes = [end(process) for process in both]
    assert [status for status, _, _ in outcomes] == [0, 0], outcomes
    counts = Counter(tried(cache))
    assert set(counts.values()) == {1}
    # Both may have had one on its way when the last was counted.
    assert 6 <= len(counts) <= 7
    done = [trial for trial in trials(cache) if "record" in trial.user_attrs]
    owners = {trial.user_attrs["owner"]["pid"] for trial in done}
    assert owners == {process.pid for process in both}
    assert len(entries(cache)) == 1


@thorough
def test_a_damaged_cache_is_set_aside_and_the_run_succeeds(cache):
    tune(cache, "--trials", 2, "--quiet")
    (path,) = (cache / "configs").glob("*.json")
    whole = path.read_text()
    path.write_text(whole[:100])
    _, err = tune(cache, "--trials", 3, "--quiet")
    (aside,) = (cache / "configs").glob("*.corrupt-*")
    assert aside.read_text() == whole[:100]
    assert re.search(rf"{re.escape(str(path))} is set aside as {re.escape(aside.name)}", err)
    assert json.loads(path.read_text())["devices"]
    (entry,) = entries(cache)
    assert str(entry.problem) == CLASS
