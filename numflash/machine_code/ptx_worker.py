"""The PTX of kernels for a process that simulates: compiled in another, which does not.

The simulator takes the place of Numba's compiler, once for a process. Here a worker is started
when something is to be compiled, and ends with this process. PTX is cached in memory and on disk
as cubins are, under everything that decides it.

The worker reads a length and a pickled (config, traits, architecture, route) from its standard
input, and answers with a length and a pickled (PTX, error). Its prints go to standard error.
"""

import io
import os
import pickle
import struct
import subprocess
import sys
import threading
from functools import cache, lru_cache

from numflash.configs import Config, Traits
from numflash.machine_code import compiler, cubins
from numflash.runtime.devices import Architecture
from numflash.runtime.errors import UnsupportedError

_LENGTH = struct.Struct("<Q")
_lock = threading.Lock()


@lru_cache(256)
def ptx_of(config: Config, traits: Traits, limits: Architecture, route: str = "ptx") -> str:
    """The PTX of a kernel, from memory, from disk, or compiled now by the worker.

    `route` is that of `compiler.executable_ptx`.

    Raises:
        UnsupportedError: the compiler packages are missing.
        RuntimeError: the worker fails.
    """
    config = getattr(config, "compiled", config)
    key = compiler.content_key(route, config, traits, limits)
    stored = cubins.read(key)
    if stored is not None:
        return stored[1].decode()
    with _lock:
        text, error = _ask((config, traits, limits, route))
    if error is not None:
        raise error
    cubins.write(key, {}, text.encode())
    return text


@cache
def _worker() -> subprocess.Popen:
    environment = dict(os.environ, NUMBA_ENABLE_CUDASIM="0")
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, "-c", f"import {__name__}; {__name__}.work()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )


def _ask(request: tuple) -> tuple[str | None, Exception | None]:
    worker = _worker()
    try:
        _send(worker.stdin, request)
        return _receive(worker.stdout)
    except (OSError, EOFError) as error:
        code = worker.wait()
        _worker.cache_clear()
        raise RuntimeError(f"the process that compiles PTX has ended with {code}") from error


def _send(stream: io.BufferedIOBase, message) -> None:
    content = pickle.dumps(message)
    stream.write(_LENGTH.pack(len(content)) + content)
    stream.flush()


def _receive(stream: io.BufferedIOBase):
    """The next message. Raises EOFError at the end."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    return pickle.loads(stream.read(*_LENGTH.unpack(head)))


def work() -> None:
    """Answer requests until there are no more: what the worker does."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    while True:
        try:
            request = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            _send(answers, (compiler.executable_ptx(*request), None))
        except UnsupportedError as error:
            _send(answers, (None, error))
        except Exception as error:
            _send(answers, (None, RuntimeError(f"compiling PTX: {error!r}")))
