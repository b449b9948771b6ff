"""The child process that runs kernels: `python -m numflash_tuner.measuring.worker ORDINAL`.

Its requests are `drop`, `prepare` and `time`; `channel` has the pipes, and `measurer` asks.
"""

import sys
from collections.abc import Callable
from typing import Any

from numflash.api.check import check
from numflash.machine_code.compiler import get_cubin
from numflash.problem.classes import ProblemClass
from numflash.runtime.driver import limits_of_device
from numflash.runtime.errors import UnsupportedError, in_one_line
from numflash.runtime.mode import SIMULATED
from numflash.selection.rules import choose, force

from . import channel as channels
from . import representative
from .channel import Channel
from .gpu import Device, open_gpu
from .launches import RefusedError, bind, forced, forward_results, make_arrays, options_of
from .representative import CHECK_SEQLENS, Call

_MEMORY_SHARE = 0.35
"""Of the device's whole memory, for inputs and results: all processes on such a device then
measure the same call, whatever else is on it. Workspaces of splits come on top."""
_CALL_SECONDS = 2.0
_TENSOR_RATE, _PORTABLE_RATE = 2**38, 2**35
"""Multiply-adds per second and SM that kernels reach on slow devices: about a T4's."""
_WARM_UPS = 2


class Worker:
    """Prepares kernels on a device, and times them."""

    def __init__(self, device: Device, check_seqlens: tuple[int, int] = CHECK_SEQLENS):
        self.device, self.check_seqlens = device, check_seqlens
        self._inputs: tuple[Any, Call | None, dict] = (None, None, {})
        self._launches: dict[str, Callable[[], Any]] = {}
        self._checks = 0

    def drop(self) -> dict:
        """Forget all that was prepared."""
        self._launches.clear()
        return {}

    def forget(self, config: str | None) -> None:
        """Forget one config, if it was prepared."""
        self._launches.pop(config, None)

    def prepare(self, problem: str, config: str) -> dict:
        """Compile, check and warm up a config.

        Args:
            problem: the class, as a string.
            config: as a string.

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
        call = self._make_inputs(wanted)
        launch = self._bind(config)
        times = [self.device.time(launch) for _ in range(_WARM_UPS)]
        return {"batch_heads": call.batch * call.num_heads_q, "warm_ms": times[-1]}

    def time(self, config: str) -> dict:
        """`ms`, the milliseconds of one launch of a config that was prepared."""
        return {"ms": self.device.time(self._launches.get(config) or self._bind(config))}

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
            raise RefusedError("compile_failed", in_one_line(error)) from error

    def _check(self, problem: ProblemClass, config: str) -> None:
        """Compare with float64 on new numbers, so that results of an earlier kernel are wrong."""
        self._checks += 1
        call = representative.checked(problem, self.check_seqlens)
        arrays = make_arrays(self.device, problem.family, call, seed=10 * self._checks)
        dout = arrays.pop("dout", None)
        options, qkv = options_of(call, arrays), [arrays[name] for name in "qkv"]
        configs = forced(problem.family, config, *qkv, options)
        report = check(*qkv, dout=dout, config=configs, **options)
        if not report.passed:
            wrong = [
                f"{e.name} is off by {e.error:.3g}, allowed are {e.budget:.3g}"
                for e in report.errors
                if not e.passed
            ]
            raise RefusedError("wrong_result", "; ".join(wrong))

    def _make_inputs(self, problem: ProblemClass) -> Call:
        """The call to time, and its arrays: the same for all configs of a class."""
        key, call, _ = self._inputs
        if key != problem:
            self._launches.clear()
            self._inputs = (None, None, {})
            limits = limits_of_device(self.device.ordinal)
            default = choose("forward", problem.traits, limits).implementation
            rate = _TENSOR_RATE if default.has_tensor_cores else _PORTABLE_RATE
            num_sms = self.device.describe()["num_sms"]
            num_bytes = _MEMORY_SHARE * self.device.total_bytes()
            call = representative.fitting(problem, num_bytes, _CALL_SECONDS * rate * num_sms)
            arrays = make_arrays(self.device, problem.family, call, seed=1)
            if problem.family in representative.BACKWARD:
                arrays |= forward_results(call, arrays)
            self._inputs = (problem, call, arrays)
        return call

    def _bind(self, config: str) -> Callable[[], Any]:
        """The launch of a config; where memory is short the results of others make room for it."""
        problem, call, arrays = self._inputs
        try:
            launch = bind(problem.family, config, call, arrays)
        except Exception as error:
            if not (self._launches and _is_out_of_memory(error)):
                raise
            launch = None
        if launch is None:
            # They are bound again when they are timed.
            self._launches.clear()
            self.device.release()
            launch = bind(problem.family, config, call, arrays)
        self._launches[config] = launch
        return launch


def serve(device: Device, channel: Channel | None = None, **settings) -> None:
    """Answer requests until the parent is gone.

    Args:
        device: to run on.
        channel: to the parent; standard input and output by default.
        settings: of `Worker`.
    """
    worker = Worker(device, **settings)
    methods = {"drop": worker.drop, "prepare": worker.prepare, "time": worker.time}

    def failure(error: Exception, request: dict) -> tuple[str, str]:
        worker.forget(request.get("config"))
        return _failure(error)

    channels.serve(channel or Channel(), device, methods, failure)


def _failure(error: Exception) -> tuple[str, str]:
    """(outcome, reason) of the record."""
    if isinstance(error, RefusedError):
        return error.args
    if _is_out_of_memory(error):
        # Another process may hold the memory: this says nothing about the machine code.
        return "launch_failed", f"out of memory: {in_one_line(error)}"
    if isinstance(error, TypeError | ValueError | UnsupportedError):
        return "invalid", in_one_line(error)
    return "launch_failed", in_one_line(error)


def _is_out_of_memory(error: Exception) -> bool:
    """NumPy's, CuPy's and PyTorch's errors, and the CUDA driver's."""
    named = "OutOfMemory" in type(error).__name__ or "CUDA_ERROR_OUT_OF_MEMORY" in str(error)
    return named or isinstance(error, MemoryError)


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
