"""The pool of compilers: what its processes are, and that whatever they do costs one config."""

import os
import signal
import subprocess
import sys
import time

import pytest

from numflash.configs import Traits, parse_config
from tests.support.covering import thorough
from tuner.records import ResourceUsage
from tuner.search.pool import CompilePool, Examined, NoCompilerError

TRAITS = Traits.parse("float16-d64-dv64-vec")
FINE, RAISES, CRASHES, HANGS, SLOW, ODD = (f"sm80-m64n{n}w4s1" for n in (16, 32, 48, 64, 96, 128))
LAID_OUT = f"{FINE}x4", f"{FINE}x2-packed", f"{FINE}x8-h4"
"""Configs that all share the machine code of splits."""


def config(text):
    """A config of a forward."""
    return parse_config("forward", text)


def about(text):
    """An answer that carries a text."""
    return Examined(ResourceUsage(1, 0, 0, 32, 1, text))


def work(family, text, traits, arch):
    """The stand-in for a compiler's work on a config: by its name."""
    if text == RAISES:
        raise RuntimeError("the back end\nis lost")
    if text == CRASHES:
        os.kill(os.getpid(), signal.SIGKILL)
    if text in (HANGS, SLOW):
        print("at work", flush=True)
        time.sleep(60 if text == HANGS else 0.3)
    if text == ODD:
        return lambda: "what cannot be sent"
    return about(f"{family} {text} {traits} {arch} {os.getpid()}")


def examine_process(family, text, traits, arch):
    """The stand-in for a compiler's process."""
    simulated = os.environ.get("NUMBA_ENABLE_CUDASIM")
    ignores = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    main = getattr(sys.modules["__main__"], "__file__", None)
    return about(f"{simulated} {ignores} {main}")


def examine_signals(family, text, traits, arch):
    """Which signals were kept from a compiler's process when it was born."""
    return about(str(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())))


def leave(family, text, traits, arch):
    """End the process as a library that gives up does."""
    os._exit(3)


def said(future):
    """The text of an answer."""
    return future.result(timeout=30).resources.limited_by


def test_every_config_gets_its_answer_and_processes_are_used_again():
    texts = [FINE, *(f"sm80-m128n{n}w4s1" for n in (16, 32, 64))]
    with CompilePool("sm_80", 2, work=work) as pool:
        futures = [pool.submit(config(text), TRAITS) for text in texts]
        answers = [said(future).rpartition(" ") for future in futures]
    assert [what for what, _, _ in answers] == [f"forward {text} {TRAITS} sm_80" for text in texts]
    processes = {int(pid) for _, _, pid in answers}
    assert len(processes) <= 2 and os.getpid() not in processes


@thorough
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_does_not_reach_a_compiler_that_is_starting():
    with CompilePool("sm_80", 1, work=examine_signals) as pool:
        assert said(pool.submit(config(FINE), TRAITS)) == "True"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_configs_of_the_same_machine_code_are_compiled_once():
    with CompilePool("sm_80", 1, work=work) as pool:
        first = pool.submit(config(f"{FINE}x2"), TRAITS)
        assert all(pool.submit(config(text), TRAITS) is first for text in LAID_OUT)
        assert pool.submit(config(FINE), TRAITS) is not first
        assert pool.submit(config(f"{FINE}x2"), Traits.parse("float16-d64-dv64")) is not first
        assert said(first).startswith(f"forward {FINE}x2 {TRAITS} sm_80")


@thorough
def test_what_fails_costs_its_own_config():
    """One process: each failure but the first comes to one that was started for it."""
    with CompilePool("sm_80", 1, timeout=6.0, work=work) as pool:
        futures = {t: pool.submit(config(t), TRAITS) for t in (RAISES, CRASHES, ODD, HANGS, FINE)}
        failures = {text: f.result(timeout=30).failure for text, f in futures.items()}
        assert said(futures[FINE])
    assert failures == {
        RAISES: ("compile_failed", "RuntimeError: the back end is lost"),
        CRASHES: ("compile_failed", "the compiler died (exit status -9)"),
        ODD: ("compile_failed", "the compiler died (exit status 1)"),
        HANGS: ("timeout", "compiling took more than 6 s"),
        FINE: None,
    }


@thorough
def test_a_process_that_leaves_is_reported_with_its_status():
    with CompilePool("sm_80", 1, work=leave) as pool:
        failure = pool.submit(config(FINE), TRAITS).result(timeout=30).failure
    assert failure == ("compile_failed", "the compiler died (exit status 3)")


def test_where_no_process_can_be_started_it_is_not_the_configs_fault():
    with CompilePool("sm_80", 1, work=lambda *task: None) as pool:
        for text in (FINE, SLOW):
            with pytest.raises(NoCompilerError, match=r"can be started: .*pickle"):
                pool.submit(config(text), TRAITS).result(timeout=30)


def test_compilers_know_neither_the_simulator_nor_the_main_module(monkeypatch):
    """And Ctrl-C, which reaches the whole group, does not end them: the parent does."""
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    main = sys.modules["__main__"]
    with CompilePool("sm_80", 1, work=examine_process) as pool:
        assert said(pool.submit(config(FINE), TRAITS)) == "None True None"
    assert os.environ["NUMBA_ENABLE_CUDASIM"] == "1"
    assert sys.modules["__main__"] is main


@thorough
def test_without_the_simulator_it_stays_unset(monkeypatch):
    monkeypatch.delenv("NUMBA_ENABLE_CUDASIM", raising=False)
    with CompilePool("sm_80", 1, work=examine_process) as pool:
        assert said(pool.submit(config(FINE), TRAITS)).startswith("None ")
    assert "NUMBA_ENABLE_CUDASIM" not in os.environ


@thorough
def test_closing_does_not_wait_for_compilers(capfd):
    with CompilePool("sm_80", 1, work=work) as pool:
        busy, waiting = (pool.submit(config(text), TRAITS) for text in (HANGS, FINE))
        for _ in range(600):
            if "at work" in capfd.readouterr().out:
                break
            time.sleep(0.02)
        assert busy.running()
        began = time.monotonic()
    assert time.monotonic() - began < 2
    assert waiting.cancelled() and busy.done()


def test_a_pool_that_was_never_used_starts_nothing():
    with CompilePool("sm_80", 2, work=work) as pool:
        assert not any(thread.is_alive() for thread in pool._threads)


# A program as users write them: without a guard for processes that import it.
PROGRAM = """
from tuner.search.pool import CompilePool
from tests.host.tuner import test_pool as test

print("run", flush=True)
with CompilePool("sm_80", 1, work=test.work) as pool:
    print(test.said(pool.submit(test.config(test.FINE), test.TRAITS)), flush=True)
    pool.submit(test.config(test.SLOW), test.TRAITS).result()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_program_is_not_run_again_and_compilers_end_with_it(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    program = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    )
    lines = [program.stdout.readline().strip() for _ in range(3)]
    program.kill()
    program.wait()
    assert lines[0] == "run" and lines[1].startswith("forward ") and lines[2] == "at work"
    program.stdout.close()
    compiler = int(lines[1].rpartition(" ")[2])
    # It finishes what it does, finds that nobody listens, and ends.
    for _ in range(200):
        if not _lives(compiler):
            return
        time.sleep(0.05)
    os.kill(compiler, signal.SIGKILL)
    pytest.fail("the compiler outlived the program")


def _lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
