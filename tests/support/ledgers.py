"""Ledgers of studies, and worker processes that try numbers as configs."""

import importlib
import multiprocessing
import subprocess
import sys
from collections import Counter

import optuna

from tuner.records import Record
from tuner.search.studies import Ledger, open_study

# A worker that tries numbers 0 to 11 as "configs", each once, and takes a moment for each.
WORKER = """
import json, sys, time
import optuna
from optuna.distributions import IntDistribution
from tuner.records import Record
from tuner.search.studies import Ledger, open_study
from numflash.runtime.switches import is_on

url, name, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
optuna.logging.set_verbosity(optuna.logging.ERROR)
ledger = Ledger(open_study(url, name, optuna.samplers.RandomSampler(seed=0)))
ledger.give_up_abandoned()
while len(ledger.records()) < 12:
    trial = ledger.ask({"x": IntDistribution(0, 11)})
    config = str(trial.params["x"])
    if config in ledger.taken() or not ledger.claim(trial, config):
        ledger.give_up(trial)
        if len(ledger.taken()) == 12:
            break
        continue
    print(config, flush=True)
    time.sleep(pause)
    ledger.finish(trial, Record(config, "predicted", predicted_ms=1.0 + trial.params["x"]))
"""


def start(url, pause=0.0, name="numbers"):
    """A worker process on a study."""
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(url), name, str(pause)],
        stdout=subprocess.PIPE,
        text=True,
    )


def ledger_of(url, name="numbers"):
    """The ledger of a study."""
    return Ledger(open_study(str(url), name, optuna.samplers.RandomSampler()))


def tried(*workers):
    """What workers tried, after they ended well."""
    outputs = [worker.communicate(timeout=60)[0].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * len(workers)
    return [config for output in outputs for config in output]


def expect_each_once(ledger):
    """Every config has one record."""
    counts = Counter(record.config for record in ledger.records())
    assert counts == Counter(map(str, range(12)))


def keep(ledger, config, outcome="predicted", **fields):
    """Try a config: a trial from its beginning to its end."""
    if outcome == "predicted":
        fields = {"predicted_ms": 1.0, **fields}
    trial = ledger.ask()
    assert ledger.claim(trial, config)
    assert ledger.finish(trial, Record(config, outcome, **fields))
    return trial


def configs_of(ledger):
    """The configs with records, in order of trial."""
    return [record.config for record in ledger.records()]


# A process that opens new storages, each at the same moment as the others.
OPENER = """
import optuna
from tuner.search.studies import open_study

def run(urls, barrier, said):
    for url in urls:
        barrier.wait(60)
        try:
            open_study(url, "numbers", optuna.samplers.RandomSampler())
            said.put("")
        except Exception as error:
            said.put(f"{type(error).__name__}: {error}")
"""


def expect_all_open(urls, tmp_path, monkeypatch):
    """Several processes that begin at once on new storages can open every one."""
    (tmp_path / "opener_of_storages.py").write_text(OPENER)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = importlib.import_module("opener_of_storages").run
    context = multiprocessing.get_context("spawn")
    barrier, said = context.Barrier(3), context.Queue()
    processes = [context.Process(target=run, args=(urls, barrier, said)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [said.get(timeout=60) for _ in range(3 * len(urls))] == [""] * 3 * len(urls)
    for process in processes:
        process.join(60)
    for url in urls:
        assert ledger_of(url).records() == []
