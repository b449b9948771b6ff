"""Calls as XLA makes them on the GPU of `fake_gpu`, and what they cost.

    python -m tests.support.jax_devices

prints how many microseconds the handler of numflash.jax takes on the host, with a driver that does
nothing, and XLA's own functions in C.
"""

import ctypes
import json
import math
import time
import timeit

from numflash.frontends.encoding import encode
from numflash.frontends.jax import calls, ffi
from numflash.frontends.jax.buffers import Spec
from numflash.frontends.jax.calls import Call, planned
from numflash.problem.options import AttentionOptions
from numflash.runtime.views import fresh
from tests.support import fake_gpu
from tests.support.xla_calls import Xla

HANDLER = ffi.handler(calls.run, ffi.COMMAND_BUFFER_COMPATIBLE)


class Calling:
    """A call as JAX traces it: its text, and buffers with addresses.

    Attributes:
        arguments, results: (address, dtype, shape), the workspace last.
    """

    def __init__(self, gpu, shapes, dtype="float16", wrt=None, arrays=None, **options):
        arrays = arrays or {}
        placed = {name: Spec(*each) for name, each in arrays.items()}
        view = lambda x, name: fresh(x.shape, x.dtype, 0)  # noqa: E731
        encoded = encode(AttentionOptions(**options, **placed), view)
        specs = {name: Spec(dtype, shape) for name, shape in shapes.items()}
        if wrt:
            q, v = shapes["q"], shapes["v"]
            out = (*q[:3], v[3])
            specs |= {"dout": Spec(dtype, out), "lse": Spec("float32", (q[0], q[2], q[1]))}
            specs["out"] = Spec(dtype, out)
        specs |= encoded.arrays
        self.call = Call(encoded.text, tuple(specs), wrt)
        self.text, results = planned(self.call, tuple(specs.values()))
        self.workspace = json.loads(self.text)["workspace"]
        self.arguments = [self._place(gpu, each) for each in specs.values()]
        self.results = [self._place(gpu, each) for each in results]
        names = [*self.call.results, *["workspace"] * bool(self.workspace)]
        placed = zip((*specs, *names), self.arguments + self.results, strict=True)
        self.at = {name: pointer for name, (pointer, _, _) in placed}

    @staticmethod
    def _place(gpu, spec):
        return gpu.memory.take(spec.bytes), *spec

    def run(self, xla, **how):
        """Call the handler; the error that it returned."""
        return xla.call(HANDLER, self.text, self.arguments, self.results, **how)


def costs(gpu, rounds: int = 2000, number: int = 5) -> dict[str, float]:
    """Microseconds of the processor that the handler takes, the least of many rounds, by name."""
    status = (fake_gpu.OK,)
    gpu.driver.cuLaunchKernel = lambda *_: status
    timers, kept = {}, []
    shapes = dict.fromkeys("qkv", (2, 128, 4, 64))
    for name, wrt in (("forward", None), ("backward", ("q", "k", "v"))):
        made, xla = Calling(gpu, shapes, wrt=wrt, causal=True), Xla(answers_in_c=True)
        frame, buffers = xla.frame(made.text, made.arguments, made.results)
        kept += xla, frame, buffers
        address = ctypes.addressof(frame)
        assert HANDLER(address) is None
        call = lambda address=address: HANDLER(address)  # noqa: E731
        timers[f"the handler, {name}"] = timeit.Timer(call, timer=time.process_time)
    least = dict.fromkeys(timers, math.inf)
    for _ in range(rounds):
        for name, timer in timers.items():
            least[name] = min(least[name], timer.timeit(number) / number * 1e6)
    return least


if __name__ == "__main__":
    import pytest

    with pytest.MonkeyPatch.context() as patch:
        gpu = fake_gpu.install(patch, (9, 0), 132, 50 * 2**20)
        patch.setattr(calls, "devices_of_process", lambda: (0,))
        for name, cost in costs(gpu).items():
            print(f"{name:40} {cost:7.1f} us")
