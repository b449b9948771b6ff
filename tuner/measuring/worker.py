"""The child process that runs kernels: `python -m numflash_tuner.measuring.worker ORDINAL`.

Requests come as lines of JSON on its standard input, replies leave on what was its standard
output; whatever else is printed goes to standard error. `child.Child` is the other end. The child
ends when its input does, also in the middle of a kernel that hangs, and after a fault that leaves
the device unusable.
"""

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

import numflash
from numflash.arrays import library_of
from numflash.check import check
from numflash.compiler import get_cubin
from numflash.configs import MmaConfig
from numflash.dispatch import force
from numflash.errors import UnsupportedError
from numflash.launch import limits_of_device
from numflash.mode import SIMULATED
from numflash.problem_class import ProblemClass
from numflash_tuner.measuring import representative
from numflash_tuner.measuring.gpu import Device, open_gpu
from numflash_tuner.measuring.representative import CHECK_SEQLENS, Call

BROKEN = 3
"""The exit status after a fault that the device does not recover from."""
_MEMORY_SHARE = 0.4
_WARM_UPS = 2
_ORPHAN_SECONDS = 5
_AFTER = {"backward": "reduce-dq"}
_DEFAULTS = {
    "softmax_scale": None,
    "causal": False,
    "causal_align": "bottom_right",
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "layout": "bshd",
    "precision": None,
}


class RefusedError(Exception):
    """A config is given up: `args` are the outcome of its record and the reason."""


class Worker:
    """Prepares kernels on a device, and times them."""

    def __init__(self, device: Device, check_seqlens: tuple[int, int] = CHECK_SEQLENS):
        self.device, self.check_seqlens = device, check_seqlens
        self._inputs: tuple[Any, Call | None, dict] = (None, None, {})
        self._launches: dict[str, Callable[[], Any]] = {}
        self._checks = 0

    def drop(self) -> dict:
        """Forget what was prepared."""
        self._launches.clear()
        return {}

    def forget(self, config: str | None) -> None:
        """Forget one config, if it was prepared."""
        self._launches.pop(config, None)

    def prepare(self, problem: str, config: str, batch_heads: int | None = None) -> dict:
        """Compile, check and warm up a config.

        Args:
            problem: the class, as a string.
            config: as a string.
            batch_heads: of the call that is timed; None lets the memory decide.

        Returns:
            `batch_heads` of the call that is timed, and `warm_ms`, the time of a warm-up.

        Raises:
            RefusedError: the config is to be given up. Anything else means that it failed.
        """
        wanted = ProblemClass.parse(problem)
        if wanted.family not in (*representative.FORWARD, *representative.BACKWARD):
            raise RefusedError("invalid", f"there is no measurement of {wanted.family} by itself")
        self._compile(wanted, config)
        self._check(wanted, config)
        call, arrays = self._make_inputs(wanted, batch_heads)
        launch = self._launches[config] = bind(wanted.family, config, call, arrays)
        times = [self.device.time(launch) for _ in range(_WARM_UPS)]
        return {"batch_heads": call.batch * call.num_heads_q, "warm_ms": times[-1]}

    def time(self, config: str) -> dict:
        """`ms`, the milliseconds of one launch of a config that was prepared."""
        return {"ms": self.device.time(self._launches[config])}

    def _compile(self, problem: ProblemClass, config: str) -> None:
        limits = limits_of_device(self.device.ordinal)
        choice = force(problem.family, config, problem.traits, limits)
        if SIMULATED:
            return
        try:
            get_cubin(choice.config, choice.traits, limits)
        except UnsupportedError:
            raise
        except Exception as error:
            raise RefusedError("compile_failed", _line(error)) from error

    def _check(self, problem: ProblemClass, config: str) -> None:
        """Compare with float64 on new numbers, so that what an earlier kernel left is wrong."""
        self._checks += 1
        call = representative.checked(problem, self.check_seqlens)
        arrays = make_arrays(self.device, problem.family, call, seed=10 * self._checks)
        dout = arrays.pop("dout", None)
        options = {**call.options, "alibi_slopes": arrays.pop("alibi_slopes", None)}
        configs = forced(problem.family, config, *(arrays[n] for n in "qkv"), options)
        report = check(**arrays, dout=dout, config=configs, **options)
        if not report.passed:
            wrong = [
                f"{e.name} is off by {e.error:.3g}, allowed are {e.budget:.3g}"
                for e in report.errors
                if not e.passed
            ]
            raise RefusedError("wrong_result", "; ".join(wrong))

    def _make_inputs(self, problem: ProblemClass, batch_heads: int | None) -> tuple[Call, dict]:
        """The call to time and its arrays: the same for all configs of a class."""
        key, call, arrays = self._inputs
        same = key == problem and batch_heads in (None, call.batch * call.num_heads_q)
        if not same:
            self._launches.clear()
            self._inputs = (None, None, {})
            del arrays
            if batch_heads is None:
                call = representative.fitting(problem, _MEMORY_SHARE * self.device.free_bytes())
            else:
                call = representative.timed(problem, batch_heads)
            arrays = make_arrays(self.device, problem.family, call, seed=1)
            self._inputs = (problem, call, arrays)
        return call, arrays


def make_arrays(device: Device, family: str, call: Call, seed: int) -> dict[str, Any]:
    """q, k and v of a call, with `dout` for a backward, and its `alibi_slopes`."""
    arrays = {}
    names = ("q", "k", "v") if family in representative.FORWARD else ("q", "k", "v", "dout")
    for i, name in enumerate(names):
        shape = call.shapes[name]
        if not call.is_aligned:
            # No row of an odd number of elements follows another at a multiple of 16 bytes.
            shape = (*shape[:-1], shape[-1] + 1 + shape[-1] % 2)
        array = device.empty(shape, call.dtype)
        array = array if call.is_aligned else array[..., -call.shapes[name][-1] :]
        device.fill_normal(array, seed + i)
        arrays[name] = array
    if call.has_alibi:
        head = np.arange(1, call.num_heads_q + 1, dtype=np.float32)
        arrays["alibi_slopes"] = device.upload(2 ** (-8 * head / call.num_heads_q))
    return arrays


def bind(family: str, config: str, call: Call, arrays: dict[str, Any]) -> Callable[[], Any]:
    """A function that launches a family's kernel on these arrays, what it needs having run."""
    arrays = dict(arrays)
    options = {**_DEFAULTS, **call.options, "alibi_slopes": arrays.get("alibi_slopes")}
    q, k, v = (arrays[name] for name in ("q", "k", "v"))
    if family in representative.FORWARD:
        configs = forced(family, config, q, k, v, options)
        return numflash.plan(q, k, v, config=configs, **options).launch
    from numflash.calls import Backward

    out, lse = numflash.attention(q, k, v, return_lse=True, **options)
    arrays |= {"out": out, "lse": lse}
    library = library_of(q, "q")
    views = {name: library.view(array, name) for name, array in arrays.items()}
    operands = {name: library.operand(array) for name, array in arrays.items()}
    backward = Backward(views, {**options, "config": {family: config}})
    _, launches = backward.bind(operands, library)
    stream = library.stream(backward.device)
    for launch in launches.values():
        launch(stream)
    # How many parts of dQ there are to add up is the fused kernel's config.
    timed = [launches[name] for name in (family, _AFTER.get(family)) if name in launches]
    return lambda: [launch(stream) for launch in timed]


def forced(family: str, config: str, q, k, v, options: dict) -> dict[str, Any]:
    """The configs that have a call run this one: what combines needs a forward in parts.

    Raises:
        RefusedError: no forward of this call splits its keys.
    """
    if family != "combine":
        return {family: config}
    forward = numflash.explain_dispatch(q, k, v, **options).forward.config
    if not isinstance(forward, MmaConfig):
        raise RefusedError("invalid", f"the forward {forward} does not split its keys")
    parts = max(2, forward.num_splits)
    return {"forward": replace(forward, num_splits=parts), family: config}


class Channel:
    """The pipes to the parent. Takes over standard input and output."""

    def __init__(self):
        requests, replies = os.dup(0), os.dup(1)
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(2, 1)
        self._requests = os.fdopen(requests, encoding="utf-8")
        self._replies = os.fdopen(replies, "w", encoding="utf-8")
        self._queue: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def requests(self):
        """Requests as they come, until the parent is gone."""
        while (line := self._queue.get()) is not None:
            yield json.loads(line)

    def send(self, **message) -> None:
        """Write a line."""
        self._replies.write(json.dumps(message) + "\n")
        self._replies.flush()

    def _read(self) -> None:
        for line in self._requests:
            self._queue.put(line)
        self._queue.put(None)
        # Without a parent nobody would end a kernel that hangs.
        time.sleep(_ORPHAN_SECONDS)
        os._exit(1)


def serve(device: Device, channel: Channel | None = None, **settings) -> None:
    """Answer requests until the parent is gone.

    Args:
        device: what to run on.
        channel: to the parent; standard input and output by default.
        settings: of `Worker`.
    """
    channel = channel or Channel()
    worker = Worker(device, **settings)
    methods = {"drop": worker.drop, "prepare": worker.prepare, "time": worker.time}
    channel.send(hello=device.describe())
    for request in channel.requests():
        number, method = request.pop("id"), methods[request.pop("do")]
        try:
            reply = method(**request)
        except Exception as error:
            outcome, reason = _failure(error)
            reply = {"failed": outcome, "reason": reason}
        if "failed" in reply:
            worker.forget(request.get("config"))
            if not _recovers(device):
                channel.send(id=number, broken=True, **reply)
                # Nothing that runs at exit could succeed.
                os._exit(BROKEN)
        channel.send(id=number, **reply)


def _failure(error: Exception) -> tuple[str, str]:
    """(outcome, reason) of the record."""
    if isinstance(error, RefusedError):
        return error.args
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        return "over_budget", _line(error)
    if isinstance(error, TypeError | ValueError | UnsupportedError):
        return "invalid", _line(error)
    return "launch_failed", _line(error)


def _recovers(device: Device) -> bool:
    try:
        device.synchronize()
        device.release()
    except Exception:
        return False
    return True


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:600]


def main(arguments: list[str]) -> int:
    """Serve a GPU; 1 if there is none that can be used."""
    channel = Channel()
    try:
        if SIMULATED:
            raise RuntimeError("NUMBA_ENABLE_CUDASIM is set, and the simulator has no times")
        device = open_gpu(int(arguments[0]))
    except Exception as error:
        channel.send(no_device=str(error))
        return 1
    serve(device, channel)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
