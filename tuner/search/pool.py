"""Compiling ahead: configs become machine code in other processes while others are measured.

Needs no GPU. Configs that differ only in how they are laid out over the machine share machine
code, and are compiled once. A compiler that crashes or never ends costs its own config.
"""

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from queue import SimpleQueue
from types import ModuleType

from numflash.configs import Config, Traits, parse_config
from numflash.runtime.devices import architecture
from numflash.runtime.errors import in_one_line

from ..model.machine_code import MachineCode, analyse
from ..records import ResourceUsage

_SIMULATOR = "NUMBA_ENABLE_CUDASIM"


@dataclass(frozen=True)
class Examined:
    """The compiler's result for a config.

    Attributes:
        resources: None if it failed.
        code: its machine code, counted; None without a disassembler.
        failure: (outcome, reason) as in `records.FAILURES`; None if it was compiled.
    """

    resources: ResourceUsage | None = None
    code: MachineCode | None = None
    failure: tuple[str, str] | None = None


def examine(family: str, config: str, traits: str, arch: str) -> Examined:
    """Compile a config, or find it in the cache, and read its machine code."""
    from numflash.machine_code.compiler import get_cubin
    from numflash.machine_code.sass import disassemble
    from numflash.runtime.errors import UnsupportedError

    limits = architecture(arch)
    try:
        cubin = get_cubin(parse_config(family, config), Traits.parse(traits), limits)
    except Exception as error:
        return _failed(error)
    resources = ResourceUsage.of(cubin, limits)
    try:
        return Examined(resources, analyse(disassemble(cubin.code)))
    except UnsupportedError:
        return Examined(resources)


class NoCompilerError(RuntimeError):
    """Compiler processes cannot be started here."""


class CompilePool:
    """Processes that examine configs. A context manager."""

    def __init__(
        self,
        arch: str,
        jobs: int,
        timeout: float = 180.0,
        work: Callable[[str, str, str, str], Examined] = examine,
    ):
        """Processes start with the first config.

        Args:
            arch: to compile for.
            jobs: how many processes.
            timeout: seconds after which a config is given up and its process ended.
            work: of a process for a config, as `examine`.
        """
        self._arch, self._timeout, self._work = arch, timeout, work
        self._queue: SimpleQueue = SimpleQueue()
        self._futures: dict[tuple, Future] = {}
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(jobs)]
        self._started = self._closing = False

    def __enter__(self) -> "CompilePool":
        return self

    def __exit__(self, *exception) -> None:
        self._closing = True
        for future in self._futures.values():
            future.cancel()
        if self._started:
            for _ in self._threads:
                self._queue.put(None)
            for thread in self._threads:
                thread.join()

    def submit(self, config: Config, traits: Traits) -> "Future[Examined]":
        """Have a config examined; the same machine code only once.

        The future's result raises NoCompilerError where processes cannot be started.
        """
        compiled = getattr(config, "compiled", config)
        task = (config.family, str(compiled), str(traits), self._arch)
        if task not in self._futures:
            self._futures[task] = Future()
            self._queue.put(task)
        if not self._started:
            self._started = True
            for thread in self._threads:
                thread.start()
        return self._futures[task]

    def _serve(self) -> None:
        """One thread: hand tasks to a process, and outlive it."""
        worker = _Worker(self._work)
        try:
            while (task := self._queue.get()) is not None and not self._closing:
                future = self._futures[task]
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(self._run(worker, task))
                    except NoCompilerError as error:
                        future.set_exception(error)
        finally:
            worker.stop()

    def _run(self, worker: "_Worker", task: tuple) -> Examined:
        try:
            return worker.run(task, self._timeout, lambda: self._closing)
        except TimeoutError:
            why = f"compiling took more than {self._timeout:g} s"
            return Examined(failure=("timeout", why))
        except NoCompilerError:
            raise
        except (EOFError, OSError):
            return Examined(failure=("compile_failed", f"the compiler died ({worker.ending})"))
        except Exception as error:
            return _failed(error)


class _Worker:
    """A process that examines one config at a time, started when it is needed."""

    def __init__(self, work: Callable):
        self._work, self._process, self._pipe = work, None, None
        self.ending = ""

    def run(self, task: tuple, timeout: float, closing: Callable[[], bool]) -> Examined:
        """Raises TimeoutError, or EOFError or OSError if the process dies."""
        if self._process is None or not self._process.is_alive():
            self._start()
        try:
            self._pipe.send(task)
            waited = 0.0
            while not self._pipe.poll(_POLL_SECONDS):
                waited += _POLL_SECONDS
                if waited > timeout or closing():
                    raise TimeoutError
            return self._pipe.recv()
        except Exception as error:
            # Who closed the pipe ends by itself, with a status that says more than that of a kill.
            died = isinstance(error, EOFError | OSError) and not isinstance(error, TimeoutError)
            self.stop(_EXIT_SECONDS if died else 0.0)
            raise

    def _start(self) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        process = context.Process(target=_work_off, args=(theirs, self._work), daemon=True)
        try:
            with _as_compiler(), _without_ctrl_c():
                process.start()
        except Exception as error:
            # Not the config's fault: a daemonic parent, no memory, no processes left.
            raise NoCompilerError(f"no compiler process can be started: {error}") from error
        finally:
            theirs.close()
        self._process = process

    def stop(self, seconds: float = 0.0) -> None:
        """End the process; before it is killed it has so many seconds to end by itself."""
        if self._process is not None:
            self._pipe.close()
            self._process.join(max(seconds, _POLL_SECONDS))
            self._process.kill()
            self._process.join()
            self.ending = f"exit status {self._process.exitcode}"
            self._process = None


_POLL_SECONDS, _EXIT_SECONDS = 0.2, 5.0


def _work_off(pipe: Connection, work: Callable[..., Examined]) -> None:
    """A worker process: tasks come through the pipe until it closes."""
    # On Windows nothing blocks it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            examined = work(*task)
        except Exception as error:
            examined = _failed(error)
        try:
            pipe.send(examined)
        except OSError:
            return
        if not gc.get_freeze_count():
            # Objects that Numba has loaded live to the end: looking through them for garbage after
            # each kernel takes a tenth of the time.
            gc.collect()
            gc.freeze()


def _failed(error: Exception) -> Examined:
    return Examined(failure=("compile_failed", in_one_line(error)))


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """For processes started within, there is no Ctrl-C, not even while they start.

    It reaches the whole group: the parent decides when its workers end.
    """
    if sys.platform == "win32":
        yield
        return
    # Else the first process starts it, and afterwards the signal is no longer blocked.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_environment = threading.Lock()


@contextmanager
def _as_compiler() -> Iterator[None]:
    """For processes started within, Numba is a compiler, and there is no main module.

    The simulator has no compiler. A new process would run the user's program once more, up to
    where it starts processes, unless the program guards against that.
    """
    with _environment:
        simulated, program = os.environ.pop(_SIMULATOR, None), sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = program
            if simulated is not None:
                os.environ[_SIMULATOR] = simulated
