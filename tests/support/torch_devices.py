"""Real PyTorch tensors on the CPU as if they lay on the GPU of `fake_gpu`, and what calls cost.

    python -m tests.support.torch_devices

prints how many microseconds a warm call takes on the host, with a driver that does nothing: of
`numflash.attention`, and of numflash.torch; and how many PyTorch itself takes where nothing is
computed, by an `autograd.Function` and by a `custom_op`.
"""

import math
import time
import timeit

import torch

from numflash.runtime import arrays
from numflash.runtime.torch_tensors import Torch, dtype_name, expect_own_values
from numflash.runtime.views import ArrayView
from tests.support import fake_gpu


class HostTensors(Torch):
    """CPU tensors as if they lay on CUDA device 0, whose current stream is a number."""

    def __init__(self):
        super().__init__()
        self.current = 0x57

    def view(self, array, name="array"):
        expect_own_values(array, name)
        shape, strides = tuple(array.shape), tuple(array.stride())
        return ArrayView(array.data_ptr(), shape, strides, dtype_name(array), 0)

    def empty(self, shape, dtype, device):
        return torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")

    def stream(self, device):
        return self.current


def install(monkeypatch, *device) -> fake_gpu.Gpu:
    """As `fake_gpu.install`, with PyTorch's CPU tensors on the machine."""
    gpu = fake_gpu.install(monkeypatch, *device, own_torch=False)
    library = HostTensors()
    for kind in (torch.Tensor, torch.nn.Parameter):
        monkeypatch.setitem(arrays._libraries, kind, library)
    gpu.library = library
    return gpu


def least_us(functions: dict, rounds: int = 800, number: int = 5) -> dict[str, float]:
    """Microseconds of the processor that a call takes, the least of many rounds.

    Each round runs all of them, because others use the machine, too.
    """
    timers = {
        name: timeit.Timer(each, timer=time.process_time) for name, each in functions.items()
    }
    least = dict.fromkeys(timers, math.inf)
    for _ in range(rounds):
        for name, timer in timers.items():
            least[name] = min(least[name], timer.timeit(number) / number * 1e6)
    return least


def costs(gpu) -> dict[str, float]:
    """Microseconds of warm calls by name."""
    import numflash
    import numflash.torch as nt

    class Idle(list):
        def append(self, each):
            pass

    driver = gpu.driver
    driver.calls, driver.launches = Idle(), Idle()
    driver.cuLaunchKernel = lambda *_: (0,)
    q, k, v = (torch.randn(1, 16, 2, 64, dtype=torch.float16) for _ in range(3))
    learned = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = numflash.attention(q, k, v, causal=True, return_lse=True)
    dout = torch.randn_like(out)

    def own_backward():
        return numflash.attention_backward(dout, q, k, v, out, lse, causal=True)

    def made(q, k, v):
        return torch.empty_like(out), torch.empty_like(lse)

    class Empty(torch.autograd.Function):
        """The least that a function with a backward takes in PyTorch: neither does anything."""

        @staticmethod
        def forward(ctx, q, k, v):
            results = made(q, k, v)
            ctx.save_for_backward(q, k, v, *results)
            return results

        @staticmethod
        def backward(ctx, dout, dlse):
            q, k, v, _, _ = ctx.saved_tensors
            return q, k, v

    annotations = dict.fromkeys("qkv", torch.Tensor) | {
        "return": tuple[torch.Tensor, torch.Tensor]
    }
    made.__annotations__ = annotations
    operator = torch.library.custom_op("numflash_costs::empty", made, mutates_args=())
    operator.register_autograd(
        lambda ctx, dout, dlse: ctx.saved_tensors[:3],
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
    )

    def recorded(q, k, v):
        return nt.attention(q, k, v, causal=True)

    def plain(q, k, v):
        return Empty.apply(q, k, v)[0]

    def both(attend):
        return torch.autograd.grad(attend(*learned), learned, dout)

    found = least_us(
        {
            "numflash.attention": lambda: numflash.attention(q, k, v, causal=True),
            "torch.attention, no gradients": lambda: recorded(q, k, v),
            "torch.attention, recorded": lambda: recorded(*learned),
            "numflash.attention_backward": own_backward,
            "torch.attention, forward and backward": lambda: both(recorded),
            _MADE: lambda: made(q, k, v),
            "an empty Function, recorded": lambda: Empty.apply(*learned),
            "an empty custom_op, recorded": lambda: operator(*learned),
            "an empty Function, forward and backward": lambda: both(plain),
        }
    )
    results = found.pop(_MADE)
    return {name: us - results * name.startswith("an empty") for name, us in found.items()}


_MADE = "the results of what is empty"


if __name__ == "__main__":
    import pytest

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name, cost in costs(install(patch, (9, 0), 132, 50 * 2**20)).items():
            print(f"{name:40} {cost:7.1f} us")
