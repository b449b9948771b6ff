"""The config cache: what interrupted and many writers do to it."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from numflash.runtime import files
from numflash.runtime.cache_folder import folder_for
from numflash.selection import store
from numflash.selection.entries import Row, format_table
from tests.support.config_cache import A100, ENTRY, H200, OTHER, names, put
from tests.support.covering import ALL

pytestmark = pytest.mark.usefixtures("cache")


# Interrupted writes


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_changes_nothing(monkeypatch, step, error):
    path = store.add(H200, [ENTRY])
    before, generation = path.read_bytes(), store.generation()

    def fails(*arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fails)
        with pytest.raises(error if isinstance(error, type) else type(error)):
            store.add(H200, [OTHER])
    assert path.read_bytes() == before and names() == [path.name]
    assert store.generation() == generation
    store.add(H200, [OTHER])
    assert len(store.read(H200)) == 2


def test_the_text_is_on_the_disk_before_it_has_its_name(monkeypatch):
    steps = []
    for step in ("fsync", "replace"):
        real = getattr(os, step)
        monkeypatch.setattr(
            os, step, lambda *a, step=step, real=real: (steps.append(step), real(*a))
        )
    store.add(H200, [ENTRY])
    assert steps[:2] == ["fsync", "replace"]


PREAMBLE = """
import os, signal, sys, time
from dataclasses import replace
from numflash.runtime import files
from numflash.selection import store
from numflash.runtime.cache_folder import folder_for
from numflash.selection.entries import parse_table
((A100, (OTHER,)), (H200, (ENTRY,))) = parse_table(sys.argv[1].encode()).items()
ENTRY, OTHER = ENTRY.entry, OTHER.entry
"""


def run(program: str, *arguments: str) -> subprocess.Popen:
    """Another process, that knows some names of this module."""
    table = format_table({A100: [Row.of(OTHER)], H200: [Row.of(ENTRY)]})
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + program, table, *arguments],
        cwd=Path(__file__).parents[3],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_writer_loses_nothing_and_leaves_no_lock():
    path = store.add(H200, [ENTRY])
    process = run(
        "os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)\n"
        "store.add(H200, [OTHER])"
    )
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (left,) = [name for name in names() if name != path.name]
    assert left.endswith(".part")
    assert store.read_all() == {H200: [ENTRY]}
    started = time.monotonic()
    store.add(H200, [OTHER])
    assert time.monotonic() - started < 2
    assert len(store.read(H200)) == 2 and left in names()
    old = time.time() - files.LEFTOVER_SECONDS - 1
    os.utime(path.with_name(left), (old, old))
    store.add(A100, [OTHER])
    assert left not in names() and len(store.read_all()) == 2


# Many writers

ADD_MANY = """
worker, most = map(int, sys.argv[2:])
print("ready", flush=True)
sys.stdin.readline()
for n in range(most):
    device = (H200, A100)[n % 2]
    store.add(device, [replace(ENTRY, kernels=f"{worker}-{n}")])
"""


def test_processes_that_add_at_once_lose_nothing(warnings):
    workers, most = 4 if ALL else 2, 25
    processes = [run(ADD_MANY, str(n), str(most)) for n in range(workers)]
    put(b"broken")
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * workers
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    found = [entry.kernels for found in store.read_all().values() for entry in found]
    assert sorted(found) == sorted(f"{w}-{n}" for w in range(workers) for n in range(most))
    expected = [store.path_of(H200).name, store.path_of(A100).name]
    assert names() == sorted([*expected, f"{expected[0]}.corrupt-1"])


def test_threads_that_add_at_once_lose_nothing():
    def add(worker):
        for n in range(10):
            store.add(H200, [replace(ENTRY, kernels=f"{worker}-{n}")])

    threads = [threading.Thread(target=add, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.read(H200)) == 40


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_lock_is_waited_for_not_for_ever_and_dies_with_its_owner(monkeypatch):
    holder = run(
        "with files.locked(folder_for('configs')):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)"
    )
    assert holder.stdout.readline() == "held\n"
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    lock = str(store.config_dir() / ".lock")
    with pytest.raises(TimeoutError, match=f"{lock} was held by others for 0.1 seconds"):
        store.add(H200, [ENTRY])
    path = put(b"broken")
    assert store.read(H200) == [] and names() == [path.name]
    holder.kill()
    holder.communicate()
    store.add(H200, [ENTRY])
    assert store.read(H200) == [ENTRY]


def test_a_thread_that_holds_the_lock_is_waited_for_not_for_ever(monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    with files.locked(folder_for("configs")), pytest.raises(TimeoutError, match=r"\.lock"):
        store.add(H200, [ENTRY])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_forked_while_the_lock_was_held_can_take_it_later():
    with files.locked(folder_for("configs")):
        child = os.fork()
        if not child:
            try:
                store.add(H200, [ENTRY])
            finally:
                os._exit(0)
    deadline = time.monotonic() + 5
    while not (ended := os.waitpid(child, os.WNOHANG)[0]) and time.monotonic() < deadline:
        time.sleep(0.01)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert store.read(H200) == [ENTRY]


@pytest.mark.skipif(sys.platform == "win32", reason="flock is of POSIX")
def test_a_file_system_without_locks_is_named(monkeypatch):
    def fails(handle, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", fails)
    with pytest.raises(OSError, match=r"Operation not supported.*\.lock"):
        store.add(H200, [ENTRY])
