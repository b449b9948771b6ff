"""A run of the tuner: what it remembers, also when it is stopped, and where its trials are."""

import errno
import json
import os
import re
import time
import zlib
from concurrent.futures import Future
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

pytest.importorskip("optuna")
import optuna
from optuna.storages.journal import JournalFileBackend

from numflash.configs import parse_config
from numflash.machine_code.compiler import versions
from numflash.machine_code.sources import family_hash
from numflash.problem.classes import ProblemClass
from numflash.selection import store
from numflash.selection.entries import DeviceKey
from tests.support.covering import ALL
from tuner import autotune, model, report
from tuner.records import Record, ResourceUsage
from tuner.search import session
from tuner.search.pool import Examined
from tuner.search.results import format_ms
from tuner.search.search import StoppingRules
from tuner.search.session import Options, Session
from tuner.search.studies import StorageError
from tuner.space import machines
from tuner.space.configs import Budgets, EmptySpaceError
from tuner.space.dimensions import value_of
from tuner.space.target import Target

FORWARD = ProblemClass.parse("forward bfloat16-d128-dv128-vec full q1024 k4096 bh16 g4")
DQ = ProblemClass.parse("backward-dq float32-d64-dv64-vec full q4096 k4096 bh64 g1")
LONGER = ProblemClass.parse("backward-dq float32-d64-dv64-vec full q8192 k8192 bh64 g1")
MACHINE = machines.find("NVIDIA A100-SXM4-80GB")
DEVICE = DeviceKey(MACHINE.name, MACHINE.arch, MACHINE.num_sms)


class InstantPool:
    """A CompilePool whose compilers take no time; all configs spill if `spill_bytes` is set."""

    spill_bytes = 0

    def __init__(self, arch, jobs):
        self.arch = arch

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def submit(self, config, traits):
        """The future of a config, already done."""
        future = Future()
        smem, threads = config.smem_bytes(traits), config.num_threads
        resources = ResourceUsage(128, self.spill_bytes, smem, threads, 2, "registers")
        future.set_result(Examined(resources))
        return future


class Stopwatch:
    """A Measurer whose times are a hash of the config; each takes a second by its own clock."""

    def __init__(self, interrupt_at=None):
        self.seconds, self.measured, self.interrupt_at = 0.0, [], interrupt_at

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def measure(self, problem, config, stop):
        """Five samples around the config's time."""
        if len(self.measured) == self.interrupt_at:
            raise KeyboardInterrupt
        self.seconds += 1
        self.measured.append(config)
        return Record(config, "measured", samples_ms=self.samples(config, 5))

    def remeasure(self, problem, configs, rounds):
        """The same again."""
        return {config: list(self.samples(config, rounds)) for config in configs}

    @staticmethod
    def samples(config, count):
        """Times within 1 % of each other."""
        ms = 1 + zlib.crc32(config.encode()) % 1000 / 1000
        return tuple(ms * (1 + i / 100 / count) for i in range(count))


@pytest.fixture(autouse=True)
def instant(tmp_path, monkeypatch):
    """No compilers, and a cache of the test's own."""
    monkeypatch.setattr(session, "CompilePool", InstantPool)
    monkeypatch.setattr(InstantPool, "spill_bytes", 0)
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path / "cache"))


def tune(measurer=None, problems=(DQ,), trials=6, clock=None, **options):
    """Tune classes; the results. Time passes where a Stopwatch measures, or by `clock`."""
    rules = StoppingRules(trials, options.pop("seconds", None))
    chosen = Options(rules, options.pop("budgets", Budgets()), seed=0, jobs=1, **options)
    clock = clock or (lambda: 0.0 if measurer is None else measurer.seconds)
    with Session(DEVICE, MACHINE, measurer, chosen, clock) as running:
        spaces = running.spaces(list(problems))
        return [
            running.tune(space, len(spaces) - i, str(space.problem), quiet=True)
            for i, space in enumerate(spaces)
        ]


def journals(tmp_path):
    """The journals in the cache."""
    return sorted(path.name for path in (tmp_path / "cache" / "studies").glob("*.journal"))


def test_a_predicted_winner_is_an_entry_with_all_its_facts():
    (result,) = tune()
    (entry,) = store.read(DEVICE)
    assert (entry.problem, entry.config) == (DQ, result.best.config)
    assert (entry.time_ms, entry.spread) == (result.best.predicted_ms, None)
    assert (entry.default_config, entry.default_ms) == (
        result.default.config,
        result.default.predicted_ms,
    )
    assert entry.origin == result.origin == "predicted"
    assert (entry.kernels, entry.compilers) == (family_hash(DQ.family), versions())
    found = datetime.strptime(entry.date, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert timedelta() <= datetime.now(UTC) - found < timedelta(minutes=1)


def test_a_measured_winner_is_an_entry_with_its_spread():
    watch = Stopwatch()
    (result,) = tune(watch)
    (entry,) = store.read(DEVICE)
    assert entry.origin == "measured" and entry.config == result.best.config
    assert entry.config == min(watch.measured, key=lambda config: watch.samples(config, 5)[0])
    assert entry.spread == result.best.spread > 0
    assert entry.default_ms == pytest.approx(watch.samples(entry.default_config, 15)[7])


class Settling(Stopwatch):
    """A Stopwatch whose finalists take 2 % longer when they are measured against each other."""

    def remeasure(self, problem, configs, rounds):
        """Times of a GPU that has become warm."""
        again = super().remeasure(problem, configs, rounds)
        return {config: [1.02 * ms for ms in times] for config, times in again.items()}


def test_there_is_one_best_and_one_time_of_it(capsys):
    with Session(DEVICE, MACHINE, Settling(), Options(StoppingRules(12), seed=0, jobs=1)) as run:
        (space,) = run.spaces([DQ])
        result = run.tune(space, 1, "a title")
    best = result.best
    (listed,) = [record for record in result.records if record.config == best.config]
    assert listed.samples_ms == best.samples_ms
    shown = f"best {format_ms(best.time_ms)} ms {best.config} "
    assert shown in capsys.readouterr().err.splitlines()[-1]
    table, page = report.table([result]).splitlines(), report.page([result])
    (row,) = [line.split() for line in table if line.split()[:1] == [result.default.config]]
    assert row[2:4] == [best.config, format_ms(best.time_ms)]
    (entry,) = store.read(DEVICE)
    assert (entry.config, entry.time_ms) == (best.config, best.time_ms)
    times = re.findall(rf"<code>{best.config}</code></td><td.*?</td><td[^>]*>([\d.]+)", page)
    assert times == [format_ms(best.time_ms)]


@pytest.mark.parametrize("fails", ["default", "best"])
def test_what_fails_when_it_is_measured_again_is_no_longer_listed_as_fast(fails):
    class Failing(Stopwatch):
        def remeasure(self, problem, configs, rounds):
            return {c: t for c, t in super().remeasure(problem, configs, rounds).items() if c != x}

    (first,) = tune(Stopwatch())
    x = getattr(first, fails).config
    (result,) = tune(Failing())
    (listed,) = [record for record in result.records if record.config == x]
    assert listed.outcome == "launch_failed" and "measured again" in listed.reason
    assert result.best.config != x
    assert result.default.outcome == ("launch_failed" if fails == "default" else "measured")


def test_why_a_faster_one_did_not_win_is_told_where_the_best_is():
    (result,) = tune(trials=12)
    fastest = min(result.records, key=lambda record: record.time_ms)
    why = f"{fastest.config} is predicted to take"
    chosen = replace(result, best=replace(result.default, reason=f"{why} 3.0% less time"))
    assert f"    best: {why} 3.0% less time" in report.table([chosen]).splitlines()
    assert f"{why} 3.0% less time" in report.page([chosen])


def test_a_result_carries_what_the_report_shows():
    (result,) = tune(budgets=Budgets(smem_bytes=32 * 1024, min_occupancy=0.1))
    assert (result.device, result.arch, result.num_sms) == (MACHINE.name, "sm_80", 108)
    assert len(result.records) == 6
    assert result.pruned["--sram-budget"] > 0
    assert sum(result.pruned.values()) < result.space_size
    assert result.budgets == {
        "smem_limit_bytes": 163 * 1024,
        "sram_budget_bytes": 32 * 1024,
        "min_occupancy": 0.1,
        "max_registers": 255,
    }
    assert result.floor_ms and result.best.time_ms >= max(result.floor_ms.values())


def test_predicted_gives_way_to_measured_and_not_the_other_way_round():
    tune()
    tune(Stopwatch())
    (measured,) = store.read(DEVICE)
    assert measured.origin == "measured"
    tune(trials=8)
    assert store.read(DEVICE) == [measured]


def test_a_run_of_one_trial_does_not_replace_what_is_better(monkeypatch):
    # Else no prediction of this class is beyond the model's error.
    monkeypatch.setattr(model, "gain_needed", lambda *about: 0.0)
    (result,) = tune(trials=8)
    (found,) = store.read(DEVICE)
    assert result.speedup > 1
    # Its study is another, so that it tries the default only.
    tune(trials=1, budgets=Budgets(min_occupancy=0.01))
    assert store.read(DEVICE) == [found]


def test_what_is_remembered_gives_way_to_what_beat_it_in_the_same_run():
    watch = Stopwatch()
    tune(watch)
    (found,) = store.read(DEVICE)
    # As after a lucky measurement: a time that no config reaches again.
    slowest = max(watch.measured, key=lambda config: watch.samples(config, 5)[0])
    lucky = replace(found, config=slowest, time_ms=found.time_ms / 4)
    store.add(DEVICE, [lucky])
    assert store.read(DEVICE) == [lucky]
    tune(Stopwatch())
    (again,) = store.read(DEVICE)
    assert again.config == found.config and again.time_ms == found.time_ms


def test_ctrl_c_remembers_the_best_so_far():
    watch = Stopwatch(interrupt_at=4)
    with pytest.raises(KeyboardInterrupt):
        tune(watch)
    (entry,) = store.read(DEVICE)
    assert len(watch.measured) == 4
    assert entry.config == min(watch.measured, key=lambda config: watch.samples(config, 5)[0])


def test_ctrl_c_before_anything_was_tried_remembers_nothing():
    with pytest.raises(KeyboardInterrupt):
        tune(Stopwatch(interrupt_at=0))
    assert store.read(DEVICE) == []


def test_classes_tuned_before_a_stop_are_remembered():
    with pytest.raises(KeyboardInterrupt):
        tune(Stopwatch(interrupt_at=6), problems=(DQ, LONGER))
    assert [entry.problem for entry in store.read(DEVICE)] == [DQ]


def test_the_second_start_goes_on_where_the_first_was_stopped():
    first, second = Stopwatch(interrupt_at=4), Stopwatch()
    with pytest.raises(KeyboardInterrupt):
        tune(first)
    (result,) = tune(second)
    assert len(second.measured) == 2 and len(result.records) == 6
    assert not set(first.measured) & set(second.measured)
    assert (result.best.config,) == tuple(entry.config for entry in store.read(DEVICE))


def test_classes_share_the_time():
    first, second = tune(Stopwatch(), (DQ, LONGER), trials=None, seconds=20)
    assert 9 <= len(first.records) <= 12
    assert 8 <= len(second.records) <= 12


def test_what_a_class_leaves_of_its_time_is_the_others():
    target = Stopwatch()
    tune(target, (DQ,), trials=6, seconds=20)
    assert target.seconds == 6
    watch = Stopwatch()
    _, second = tune(watch, (DQ, LONGER), trials=16, seconds=22)
    assert watch.seconds - (16 - 6) >= 10 and len(second.records) >= 11


def test_no_time_at_all_is_said():
    with pytest.raises(LookupError, match=f"no config of {DQ} was tried: the time was over"):
        tune(seconds=1e-6, clock=time.monotonic)
    assert store.read(DEVICE) == []


def test_nothing_that_works_is_an_error_that_says_why(monkeypatch):
    monkeypatch.setattr(InstantPool, "spill_bytes", 64)
    with pytest.raises(LookupError, match=f"no config of {DQ} worked: 6 spilled"):
        tune()
    assert store.read(DEVICE) == []


def test_an_empty_space_is_named_before_anything_is_tried(tmp_path):
    with pytest.raises(EmptySpaceError, match=r"--sram-budget \d+"):
        tune(problems=(LONGER, DQ), budgets=Budgets(smem_bytes=64))
    assert journals(tmp_path) == []


def test_trials_are_shared_by_runs_that_compare_and_by_no_others(tmp_path, monkeypatch):
    tune()
    tune(trials=7)
    assert len(journals(tmp_path)) == 1
    tune(Stopwatch())
    assert len(journals(tmp_path)) == 2
    tune(budgets=Budgets(min_occupancy=0.2))
    assert len(journals(tmp_path)) == 3
    monkeypatch.setattr(session, "family_hash", lambda family: "0" * 64)
    tune()
    assert len(journals(tmp_path)) == 4
    monkeypatch.setattr(session, "versions", lambda: {**versions(), "numba": "99"})
    tune()
    assert len(journals(tmp_path)) == 5


def test_journals_hold_values_that_other_tools_of_optuna_show(tmp_path):
    watch = Stopwatch()
    trials = 25 if ALL else 12
    (result,) = tune(watch, problems=[FORWARD], trials=trials)
    (name,) = journals(tmp_path)
    backend = JournalFileBackend(str(tmp_path / "cache" / "studies" / name))
    storage = optuna.storages.JournalStorage(backend)
    (summary,) = optuna.get_all_study_summaries(storage)
    study = optuna.load_study(study_name=summary.study_name, storage=storage)
    done = [trial for trial in study.trials if trial.state.is_finished() and trial.user_attrs]
    tried = [trial for trial in done if "record" in trial.user_attrs]
    assert len(tried) == trials
    for trial in tried:
        config = parse_config("forward", trial.user_attrs["config"])
        assert len(trial.params) > 5
        for parameter, value in trial.params.items():
            assert value == value_of(config, parameter), (str(config), parameter)
    assert study.best_trial.params["tile_m"] in (64, 128, 192, 256)
    assert {"generation", "overlap", "num_splits"} & set(result.importances)


def test_a_study_of_another_form_is_not_gone_on_with(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(session, "FORMAT", "indices")
        (first,) = tune()
    (second,) = tune()
    assert len(journals(tmp_path)) == 2
    assert len(first.records) == len(second.records) == 6


def test_a_storage_of_the_users_is_used(tmp_path):
    path = tmp_path / "mine" / "trials.journal"
    tune(storage=str(path))
    assert path.stat().st_size and journals(tmp_path) == []


@pytest.fixture
def unwritable(tmp_path, monkeypatch):
    """A cache folder that cannot be: something else has its name. Holds for root, too."""
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(blocked / "cache"))
    return blocked / "cache"


def test_where_the_cache_cannot_be_written_work_goes_on(unwritable, caplog, capsys):
    (result,) = tune()
    assert len(result.records) == 6 and capsys.readouterr() == ("", "")
    studies, *_, configs = (record.getMessage() for record in caplog.records)
    assert f"{unwritable / 'studies'} (" in studies and str(unwritable.parent) + "')" in studies
    assert "cannot be continued" in studies
    assert str(unwritable / "configs") in configs and "not remembered" in configs


@pytest.fixture
def full(monkeypatch):
    """Makes the disk full after so many lines of journals have been written."""
    real, written = JournalFileBackend.append_logs, []

    def fill(after):
        def append_logs(self, logs):
            if len(written) < after:
                written.append(logs)
                return real(self, logs)
            with open(self._file_path, "ab") as file:
                file.write(b'{"op_code":5,"worker')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(JournalFileBackend, "append_logs", append_logs)

    return fill


@pytest.mark.parametrize("after", [0, 1, 2, 3, 30])
def test_where_the_disk_is_full_work_goes_on_in_memory_and_is_said_once(full, caplog, after):
    full(after)
    first, second = tune(problems=(DQ, LONGER), trials=8)
    assert len(first.records) == len(second.records) == 8
    assert len({record.config for record in first.records}) == 8
    said = [r.getMessage() for r in caplog.records if "No space left on device" in r.getMessage()]
    assert len(said) == 1 and "kept in memory" in said[0]
    assert [entry.problem for entry in store.read(DEVICE)] == [DQ, LONGER]


def test_a_storage_of_the_users_on_a_full_disk_is_an_error_and_the_best_is_kept(full, tmp_path):
    full(80)
    with pytest.raises(StorageError, match=r"mine\.journal .*No space left"):
        tune(storage=str(tmp_path / "mine.journal"), trials=30)
    assert [entry.problem for entry in store.read(DEVICE)] == [DQ]


def test_a_storage_of_the_users_that_cannot_be_written_is_an_error(unwritable):
    with pytest.raises(StorageError, match="cannot be written"):
        tune(storage=str(unwritable / "trials.journal"))


def test_a_damaged_journal_is_an_error_and_not_lost(tmp_path):
    tune()
    (name,) = journals(tmp_path)
    path = tmp_path / "cache" / "studies" / name
    lines = path.read_text().splitlines(keepends=True)
    damaged = "".join([lines[0], "{]\n", *lines[1:]])
    path.write_text(damaged)
    with pytest.raises(StorageError, match=f"{name} is damaged"):
        tune()
    assert path.read_text() == damaged


def test_a_damaged_table_is_set_aside(caplog):
    path = store.path_of(DEVICE)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    tune()
    assert path.with_name(f"{path.name}.corrupt-1").read_text() == "{"
    assert json.loads(path.read_text())["devices"][0]["entries"]
    assert "is set aside" in caplog.text


def test_progress_goes_to_the_terminal_unless_it_shall_be_quiet(capsys):
    with Session(DEVICE, MACHINE, None, Options(StoppingRules(3), jobs=1)) as running:
        (space,) = running.spaces([DQ])
        running.tune(space, 1, "a title", quiet=True)
        assert capsys.readouterr() == ("", "")
        running.tune(space, 1, "a title")
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("a title  3/3  best predicted ")


def test_autotune_measures_on_the_device_for_the_time_given(monkeypatch):
    watch, asked = Stopwatch(), []

    def find_target(device, offline):
        asked.append((device, offline))
        return Target(DEVICE, MACHINE, 3)

    def make(ordinal, expected):
        assert expected == DEVICE
        asked.append(ordinal)
        return watch

    def make_session(*arguments):
        return Session(*arguments, clock=lambda: watch.seconds)

    monkeypatch.setattr(autotune, "find_target", find_target)
    monkeypatch.setattr(autotune, "DeviceMeasurer", make)
    monkeypatch.setattr(autotune, "Session", make_session)
    autotune.autotune(DQ, 3, 8.0)
    assert asked == [("3", False), 3]
    assert 8 <= watch.seconds <= 16
    (entry,) = store.read(DEVICE)
    assert (entry.problem, entry.origin) == (DQ, "measured")
    assert entry.config in watch.measured
