"""Runs the gpu test layer in child processes, so that a crash or a hang costs only its own test.

The tests of a group are dealt out to several children at once. A child that dies or hangs is
replaced; the test that was running then is recorded as crashed or timed out, and the rest go on.
"""

import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from numflash.runtime.cache_folder import cache_dir
from tuner.measuring.child import Child, DeviceUnavailableError, FailedError

ROOT = Path(__file__).parents[2]
_CHECKOUT = str(ROOT)


@dataclass(frozen=True)
class Group:
    """Tests that run side by side, after the groups before."""

    name: str
    selection: tuple[str, ...]
    children: int


# The checks that all others rest on come first, those that may hang last.
GROUPS = (
    Group("instructions", ("tests/gpu/test_instructions.py",), 1),
    Group("Hopper forward", ("tests/gpu/test_attention.py", "-k", "on_hopper and not -c2"), 8),
    Group("forward", ("tests/gpu/test_attention.py", "-k", "test_forward and not on_hopper"), 8),
    Group("8-bit floats", ("tests/gpu/test_fp8.py",), 4),
    Group("gradients", ("tests/gpu/test_attention.py", "-k", "test_gradients"), 8),
    Group("api", ("tests/gpu/test_api.py",), 1),
    Group("tuner", ("tests/gpu/test_tuner.py",), 1),
    # Blocks that wait for each other may hang as no other kernel does: that costs nothing then.
    Group("clusters", ("tests/gpu/test_attention.py", "-k", "on_hopper and -c2"), 1),
)
HANG_SECONDS = 120
_TOOLKITS = ("/usr/local/cuda", "/opt/cuda")
_CONFIG = re.compile(r"\[((?:fp8-)?sm\d+-[\w-]+):")


def collect(groups: Iterable[Group]) -> dict[str, list[str]]:
    """The ids of the tests of each group, by its name.

    Raises:
        FailedError, DeviceUnavailableError: they cannot be collected.
    """
    child = Child(_command(), child_environment(), HANG_SECONDS, ROOT)
    try:
        found = {
            group.name: child.ask(HANG_SECONDS, do="collect", selection=group.selection)
            for group in groups
        }
    finally:
        child.close()
    return {name: reply["ids"] for name, reply in found.items()}


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
    left = ids
    while left and time.monotonic() < deadline:
        outcomes = _run_child(left, deadline, note)
        left = [name for name in left if name not in outcomes]


def _run_child(ids: list[str], deadline: float, note) -> dict[str, dict]:
    """One child over `ids`; the outcomes it reached, with the test it fell over, if any."""
    outcomes: dict[str, dict] = {}
    running: list[str] = []

    def heed(line: dict) -> None:
        if line["outcome"] == "started":
            running[:] = [line["id"]]
            return
        running.clear()
        outcomes[line["id"]] = {"outcome": line["outcome"], "reason": line["reason"]}
        note(outcomes)

    child, end, reason = None, "crashed", "the child process ended before its first test"
    try:
        child = Child(_command(), child_environment(), HANG_SECONDS, ROOT)
        child.ask(HANG_SECONDS, until=deadline, on_note=heed, do="run", ids=ids)
    except DeviceUnavailableError as error:
        reason = str(error)
    except FailedError as error:
        end = "timeout" if error.outcome == "timeout" else "crashed"
        reason = error.reason
    finally:
        if child is not None:
            child.close()
    if time.monotonic() < deadline:
        for name in running or (ids if not outcomes else ()):
            outcomes[name] = {"outcome": end, "reason": reason}
    note(outcomes)
    return outcomes


def _command() -> list[str]:
    return [sys.executable, "-P", "-m", "bench.records.recording"]


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
