"""Functions that run in the simulator, for who has no GPU.

Numba decides between GPU and simulator when it is imported, so a process that does not simulate
starts one that does: `simulate` hands it a function and its arguments, and returns the result.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable

from numflash.runtime.driver import limits_of_device
from numflash.runtime.errors import in_one_line
from numflash.runtime.mode import simulating

_MOST_SECONDS = 60.0


class NotSimulatedError(RuntimeError):
    """The process that simulates has failed; the message says why, in one line."""


def simulate(
    work: Callable,
    *arguments,
    arch: str,
    seconds: float = _MOST_SECONDS,
    speaks: bool = False,
):
    """The result of work(*arguments) where kernels are simulated.

    In this process if it simulates this architecture, else in one of its own.

    Args:
        work: a function at the top of a module, which processes find by its name.
        arguments: of it; they and the result can be pickled.
        arch: that the simulator models, as in "sm_90a".
        seconds: after which the process is given up.
        speaks: whether what the work writes to stderr is shown; otherwise its last line is the
            reason if the process dies.

    Raises:
        NotSimulatedError: the work failed, or took too long.
    """
    if simulating() and limits_of_device(0).arch == arch:
        answer = _answer(work, arguments)
    else:
        answer = _ask((work, arguments), arch, seconds, speaks)
    if isinstance(answer, _Failure):
        raise NotSimulatedError(answer.reason)
    return answer


class _Failure:
    """Why there is no result."""

    def __init__(self, reason: str):
        self.reason = reason


def _answer(work: Callable, arguments: tuple):
    try:
        return work(*arguments)
    except Exception as error:
        return _Failure(in_one_line(error))


def _ask(task: tuple, arch: str, seconds: float, speaks: bool):
    """The answer of a process that simulates. Configs are those of rules, not this user's."""
    environment = {
        **os.environ,
        "NUMBA_ENABLE_CUDASIM": "1",
        "NUMFLASH_SIM_ARCH": arch,
        "NUMFLASH_TUNED": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-c", f"from {__name__} import serve; serve()"]
    try:
        done = subprocess.run(
            command,
            input=pickle.dumps(task),
            stdout=subprocess.PIPE,
            stderr=None if speaks else subprocess.PIPE,
            env=environment,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return _Failure(f"simulating took more than {seconds:g} s")
    except OSError as error:
        return _Failure(f"no process can be started: {in_one_line(error)}")
    if done.returncode:
        said = (done.stderr or b"").decode(errors="replace").strip().splitlines()
        last = said[-1:] or ["no message"]
        return _Failure(f"the process ended with {done.returncode}: {last[0]}")
    return pickle.loads(done.stdout)


def serve() -> None:
    """In the new process: one task from stdin, its answer to stdout."""
    output, sys.stdout = sys.stdout.buffer, sys.stderr
    if not simulating():
        reason = "NUMBA_ENABLE_CUDASIM=1 is set, and Numba's configuration overrules it"
        output.write(pickle.dumps(_Failure(reason)))
        return
    output.write(pickle.dumps(_answer(*pickle.load(sys.stdin.buffer))))
