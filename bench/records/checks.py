"""Runs the gpu test layer in child processes, so that a crash or a hang costs only its own test.

The tests of a group are dealt out to several children at once. A child that dies or hangs is
replaced; the test that was running then is recorded as crashed or timed out, and the rest go on.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from numflash.runtime.cache_folder import cache_dir

ROOT = Path(__file__).parents[2]
_CHECKOUT = str(ROOT)


@dataclass(frozen=True)
class Group:
    """Tests that run side by side, after the groups before."""

    name: str
    selection: tuple[str, ...]
    children: int


# The checks that all others rest on come first.
GROUPS = (
    Group("instructions", ("tests/gpu/test_instructions.py",), 1),
    Group("Hopper forward", ("tests/gpu/test_attention.py", "-k", "on_hopper"), 8),
    Group("forward", ("tests/gpu/test_attention.py", "-k", "test_forward and not on_hopper"), 8),
    Group("8-bit floats", ("tests/gpu/test_fp8.py",), 4),
    Group("gradients", ("tests/gpu/test_attention.py", "-k", "test_gradients"), 8),
    Group("api", ("tests/gpu/test_api.py",), 1),
    Group("tuner", ("tests/gpu/test_tuner.py",), 1),
)
HANG_SECONDS = 120
_TOOLKITS = ("/usr/local/cuda", "/opt/cuda")
_CONFIG = re.compile(r"\[((?:fp8-)?sm\d+-[\w-]+):")


def collect(group: Group) -> list[str]:
    """The ids of a group's tests."""
    command = [*_pytest(), "--collect-only", *group.selection]
    done = subprocess.run(
        command, cwd=ROOT, env=child_environment(), capture_output=True, text=True
    )
    return [line for line in done.stdout.splitlines() if "::" in line]


def run(ids: list[str], children: int, deadline: float, on_outcome) -> dict[str, dict]:
    """Run tests until done or until `deadline` (of time.monotonic); outcome and reason by id."""
    children = max(1, min(children, os.cpu_count() or 1, len(ids)))
    lock, checks = threading.Lock(), {}

    def note(outcomes: dict[str, dict]) -> None:
        with lock:
            for name in outcomes.keys() - checks.keys():
                checks[name] = outcomes[name]
                on_outcome(name, outcomes[name])

    with ThreadPoolExecutor(children) as pool:
        shards = [ids[i::children] for i in range(children)]
        list(pool.map(lambda shard: _run_shard(shard, deadline, note), shards))
    return checks


def by_config(outcomes: dict[str, dict]) -> dict[str, dict[str, int]]:
    """The checks of each config that tests name ("[sm90-...:case]"), counted by outcome."""
    found: dict[str, dict[str, int]] = {}
    for name, check in outcomes.items():
        if config := _CONFIG.search(name):
            tally = found.setdefault(config[1], {})
            tally[check["outcome"]] = tally.get(check["outcome"], 0) + 1
    return found


def _run_shard(ids: list[str], deadline: float, note) -> None:
    done: dict[str, dict] = {}
    while (left := [name for name in ids if name not in done]) and time.monotonic() < deadline:
        with tempfile.TemporaryDirectory() as folder:
            outcomes = _run_child(left, Path(folder), deadline, note)
        if not outcomes and time.monotonic() < deadline:
            reason = "the child process ended before its first test"
            outcomes = {name: {"outcome": "crashed", "reason": reason} for name in left}
            note(outcomes)
        done |= outcomes


def _run_child(ids: list[str], folder: Path, deadline: float, note) -> dict[str, dict]:
    """One child over `ids`; the outcomes it reached, with the test it fell over, if any."""
    record, wanted = folder / "record.jsonl", folder / "ids"
    record.touch()
    wanted.write_text("\n".join(ids))
    files = sorted({name.split("::")[0] for name in ids})
    command = [*_pytest(), f"--record={record}", f"--only-ids={wanted}", *files]
    with open(folder / "output", "w+") as output:
        child = subprocess.Popen(
            command, cwd=ROOT, env=child_environment(), stdout=output, stderr=subprocess.STDOUT
        )
        last_change, size, hung = time.monotonic(), 0, False
        while child.poll() is None:
            time.sleep(0.2)
            now = time.monotonic()
            if record.stat().st_size != size:
                last_change, size = now, record.stat().st_size
                note(_finished(record))
            hung = now - last_change > HANG_SECONDS
            if hung or now > deadline:
                child.kill()
                child.wait()
        output.seek(0)
        tail = output.read()[-1500:]
    outcomes = _finished(record)
    running = _started(record) - outcomes.keys()
    if time.monotonic() < deadline or hung:
        outcome = "timeout" if hung else "crashed"
        outcomes |= {name: {"outcome": outcome, "reason": tail} for name in running}
    note(outcomes)
    return outcomes


def _lines(record: Path) -> list[dict]:
    complete = [line for line in record.read_text().splitlines(keepends=True) if line[-1] == "\n"]
    return [json.loads(line) for line in complete]


def _started(record: Path) -> set[str]:
    return {line["id"] for line in _lines(record) if line["outcome"] == "started"}


def _finished(record: Path) -> dict[str, dict]:
    return {
        line["id"]: {"outcome": line["outcome"], "reason": line["reason"]}
        for line in _lines(record)
        if line["outcome"] != "started"
    }


def _pytest() -> list[str]:
    plugins = ["-p", "no:cacheprovider", "-p", "bench.records.recording"]
    return [sys.executable, "-m", "pytest", "-q", *plugins, "-o", "addopts="]


def child_environment() -> dict[str, str]:
    """This process's environment, without the simulator, and with the checkout importable."""
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_ENABLE_CUDASIM"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [_CHECKOUT, *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    # Children share what they compile, and know nothing of what this user has tuned.
    environment.setdefault("NUMFLASH_CACHE_DIR", str(cache_dir() / "bench"))
    if not {"CUDA_HOME", "CUDA_PATH"} & environment.keys() and (toolkit := find_toolkit()):
        environment["CUDA_HOME"] = toolkit
    return environment


def find_toolkit(folders: tuple[str, ...] = _TOOLKITS) -> str | None:
    """The folder of a CUDA toolkit with NVVM, for machines without the wheel; None without one."""
    nvcc = shutil.which("nvcc")
    beside = [str(Path(nvcc).resolve().parent.parent)] if nvcc else []
    return next((f for f in (*beside, *folders) if (Path(f) / "nvvm").is_dir()), None)
