"""A call as the text that XLA's programs hold, and the handler that runs it.

The text says all but addresses: options, dtypes, shapes, gradients, bytes of workspace. A program
that another process compiled, and that XLA found in its cache, so means the same in this one. A
`Ready` is made of it once for each device, when JAX traces the call or when XLA initialises its
program: kernels are loaded by then, and running it may be captured in a CUDA graph.
"""

import atexit
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import jax

from numflash.calls.backward import Backward
from numflash.calls.forward import Forward
from numflash.calls.fp8_forward import AutoForward, Fp8Forward
from numflash.calls.fp8_options import expect_recipe_is_used, refuse_backward, with_budget
from numflash.frontends.encoding import decode, names_of
from numflash.frontends.jax import ffi
from numflash.frontends.jax.buffers import Memory, Spec, array_at
from numflash.problem.options import AttentionOptions, GradientOptions
from numflash.runtime.arrays import library_of
from numflash.runtime.driver import device_of, limits_of_device, multiprocessors
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.mode import SIMULATED
from numflash.runtime.views import fresh
from numflash.selection.choice import split_configs

TARGET = "numflash"
"""The name that XLA knows the handler by."""
_SIMULATOR = -1
_ALIGNMENT = 16
# Calls that are ready; emptied when there are more, so that varying shapes cannot leak.
_MAX_READY = 4096
# Sets of addresses that a call is bound to; likewise.
_MAX_ADDRESSES = 64


@dataclass(frozen=True)
class Call:
    """A call, but for its arrays.

    Attributes:
        options: the text of its options (`frontends.encoding`).
        names: of its arrays, in order; those of the options come last.
        wrt: of a backward, whose gradients it returns; None of a forward.
        grad_dtype: of a backward, that of `numflash.attention_backward`.
    """

    options: str
    names: tuple[str, ...]
    wrt: tuple[str, ...] | None = None
    grad_dtype: str | None = None

    @property
    def results(self) -> tuple[str, ...]:
        """The names of what it returns."""
        return ("out", "lse") if self.wrt is None else tuple(f"d{name}" for name in self.wrt)

    @cached_property
    def decoded(self) -> AttentionOptions:
        """The options, with names in place of arrays."""
        return decode(self.options, names_of(self.options))

    def text(self, specs: tuple[Spec, ...], workspace: int = 0) -> str:
        """All of the call but addresses."""
        said = {"options": self.options, "names": self.names, "wrt": self.wrt, "arrays": specs}
        if self.grad_dtype is not None:
            said["grad_dtype"] = self.grad_dtype
        return json.dumps(said | {"workspace": workspace}, separators=(",", ":"))


class Ready:
    """A call made ready on a device: only addresses are missing.

    Attributes:
        results: the arrays that it returns.
        workspace: bytes that it needs besides.
        room: bytes of workspace that the text says there are.
    """

    def __init__(self, text: str, device: int):
        """Check, choose, compile and load.

        Args:
            text: of `Call.text`.
            device: ordinal of the CUDA device, or -1 in the simulator.

        Raises:
            TypeError, ValueError, UnsupportedError: as `numflash.attention`.
        """
        said = json.loads(text)
        names, wrt = tuple(said["names"]), said["wrt"]
        wrt = None if wrt is None else tuple(wrt)
        call = Call(said["options"], names, wrt, said.get("grad_dtype"))
        specs = [Spec(dtype, tuple(shape)) for dtype, shape in said["arrays"]]
        self._arguments = tuple(zip(names, specs, strict=True))
        self._device, self.room = device, said["workspace"]
        self._bind, self._numbers = _bound(call, dict(self._arguments), device)
        self._memory = Memory(self._launched_never, self._arguments, device)
        self.results, self.workspace = self._memory.results, self._memory.workspace
        # XLA uses the same addresses again and again.
        self._launches: dict[tuple[int, ...], tuple[Callable[[int], None], ...]] = {}

    def _launched_never(self, operands: dict, library) -> list:
        *found, _ = self._bind(self._numbers | operands, library)
        return found[0] if len(found) == 1 else found

    def launch(self, arguments: list[int], results: list[int], stream: int) -> None:
        """Launch on the arrays at these addresses.

        Args:
            arguments: addresses of the call's arrays.
            results: those of its results and, if it has one, of its workspace.
            stream: address of a CUDA stream.

        Raises:
            ValueError: arrays that are not aligned.
        """
        key = (*arguments, *results)
        launches = self._launches.get(key)
        if launches is None:
            launches = self._bound_to(arguments, results)
            if len(self._launches) >= _MAX_ADDRESSES:
                self._launches.clear()
            if not SIMULATED:  # there binding is nothing beside running
                self._launches[key] = launches
        for each in launches:
            each(stream)

    def _bound_to(self, arguments: list[int], results: list[int]) -> tuple[Callable, ...]:
        for pointer in (*arguments, *results):
            if pointer % _ALIGNMENT:
                raise ValueError(
                    f"XLA's buffers must be aligned to {_ALIGNMENT} bytes, got one at {pointer:#x}"
                )
        operands = dict(self._numbers)
        for (name, spec), pointer in zip(self._arguments, arguments, strict=True):
            array = array_at(pointer, spec, self._device)
            operands[name] = library_of(array, name).operand(array)
        library = self._memory.library(results, results[-1] if self.workspace else 0)
        *_, launches = self._bind(operands, library)
        return tuple(launches.values())


def _bound(call: Call, specs: dict[str, Spec], device: int) -> tuple[Callable, dict]:
    """The `bind` of a call, and the numbers that its launches fill in."""
    options = decode(
        call.options,
        [array_at(0, Spec(specs[n].dtype, (0,)), device) for n in names_of(call.options)],
    )
    views = {name: fresh(spec.shape, spec.dtype, device) for name, spec in specs.items()}
    of_forward, of_backward = split_configs(options.config)
    if call.wrt is not None:
        refuse_backward(None, None, None, options.precision)
        options = options.of_backward(of_backward)
        asked = GradientOptions(wrt=call.wrt, grad_dtype=call.grad_dtype)
        made = Backward(views, options, asked)
        return made.bind, options.numbers()
    options, kind = options._replace(config=of_forward), Forward
    if options.precision == "auto" or options.max_rel_error is not None:
        options = with_budget(options)
    if options.precision in ("fp8", "auto"):
        kind = AutoForward if options.precision == "auto" else Fp8Forward
    else:
        expect_recipe_is_used(options)
    return kind(views, options).bind, options.numbers()


_ready: dict[tuple[bytes, int], Ready] = {}


def _ready_for(text: bytes, device: int) -> Ready:
    ready = _ready.get((text, device))
    if ready is None:
        ready = Ready(text.decode(), device)
        if ready.workspace > ready.room:
            raise UnsupportedError(
                f"XLA's program was compiled for a workspace of {ready.room} bytes, and on this "
                f"GPU, with the configs that are tuned for it, the call needs {ready.workspace}: "
                "compile it again here (jax.clear_caches(), or another compilation cache)"
            )
        _remember(text, device, ready)
    return ready


def _remember(text: bytes, device: int, ready: Ready) -> None:
    if len(_ready) >= _MAX_READY:
        _ready.clear()
    _ready[text, device] = ready


def devices_of_process() -> tuple[int, ...]:
    """A CUDA device of JAX's of each kind that this process has; -1 is the simulator.

    Raises:
        UnsupportedError: it has none.
    """
    if SIMULATED:
        return (_SIMULATOR,)
    try:
        found = [each.local_hardware_id for each in jax.local_devices(backend="cuda")]
    except RuntimeError as error:
        raise UnsupportedError(
            f"numflash.jax needs a CUDA device that JAX sees: {str(error).rstrip('.')}. Install "
            '"jax[cuda13]" (or [cuda12]), or set NUMBA_ENABLE_CUDASIM=1 before Python starts: '
            "kernels then run in the simulator, on JAX's CPU platform"
        ) from error
    kinds = {(limits_of_device(n), multiprocessors(n)): n for n in reversed(found)}
    return tuple(kinds.values())


@lru_cache(4096)
def planned(call: Call, specs: tuple[Spec, ...]) -> tuple[str, tuple[Spec, ...]]:
    """The text of a call on such arrays, and what it returns: the workspace comes last.

    Raises:
        TypeError, ValueError, UnsupportedError: as `numflash.attention`.
    """
    text = call.text(specs)
    ready = {device: Ready(text, device) for device in devices_of_process()}
    workspace = max(each.workspace for each in ready.values())
    text, results = call.text(specs, workspace), next(iter(ready.values())).results
    for device, each in ready.items():
        _remember(text.encode(), device, each)
    return text, results + ((Spec("uint8", (workspace,)),) if workspace else ())


_simulating = threading.Lock()
# Threads of XLA's that are in the handler.
_inside: set[int] = set()


def run(frame: ffi.Frame) -> None:
    """The handler's work: launch a call, or make it ready."""
    if SIMULATED:
        _inside.add(threading.get_ident())
        try:
            # XLA's threads take turns: the simulator runs one kernel at a time.
            with _simulating:
                _ready_for(frame.text, _SIMULATOR).launch(frame.arguments, frame.results, 0)
        finally:
            _inside.discard(threading.get_ident())
        return
    device = frame.api.device(frame.context)
    if device is None:
        device = device_of(next(filter(None, (*frame.results, *frame.arguments)), 0))
    ready = _ready_for(frame.text, device)
    if frame.stage == ffi.EXECUTE:
        ready.launch(frame.arguments, frame.results, frame.api.stream(frame.context))


_QUIET_SECONDS = 0.1


@atexit.register
def _finish() -> None:
    """Wait for what XLA still computes: its threads cannot call Python while Python ends."""
    if not _ready:
        return
    for array in jax.live_arrays():
        try:
            array.block_until_ready()
        except Exception:
            continue  # its computation failed, or it was given away
    # Results that nobody holds any more are computed, too.
    end = time.monotonic() + _QUIET_SECONDS
    while time.monotonic() < end:
        if _inside:
            end = time.monotonic() + _QUIET_SECONDS
        time.sleep(_QUIET_SECONDS / 10)


def refuse(frame: ffi.Frame) -> None:
    """The work of the handler for the platform that kernels of this process do not run on."""
    if SIMULATED:
        raise UnsupportedError(
            "NUMBA_ENABLE_CUDASIM=1 is set: kernels of this process run in the simulator, on "
            'JAX\'s CPU platform (jax.config.update("jax_platforms", "cpu")), not on a GPU'
        )
    raise UnsupportedError(
        "kernels run on a CUDA device, and this computation is on JAX's CPU platform. Without a "
        "GPU, set NUMBA_ENABLE_CUDASIM=1 before Python starts"
    )


def register() -> None:
    """Make the handler known to XLA, for both platforms."""
    of_cpu, of_cuda = (run, refuse) if SIMULATED else (refuse, run)
    ffi.register(TARGET, "cpu", {"execute": ffi.handler(of_cpu)})
    of_cuda = {
        "execute": ffi.handler(of_cuda, ffi.COMMAND_BUFFER_COMPATIBLE),
        "initialize": ffi.handler(of_cuda),
    }
    ffi.register(TARGET, "CUDA", of_cuda)


register()
