"""Arrays that are refused: with gradients that are recorded, on a CPU, of another byte order."""

import sys
import types

import numpy as np
import pytest

import numflash
from numflash.runtime import arrays
from numflash.runtime.mode import SIMULATED
from tests.support.bad_calls import (
    BACKWARD,
    FORWARD,
    OUT,
    A,
    Q,
    broadcast,
    needs_gpu_mode,
    refused,
)

needs_simulator = pytest.mark.skipif(not SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM=1")


# Tensors that require a gradient, which nothing would record


def tensors_of(machine, specs: dict, *requiring: str) -> dict:
    """Tensors of the fake PyTorch, some of which require a gradient."""
    made = {name: machine.gpu.tensor(spec.shape, spec.dtype) for name, spec in specs.items()}
    for name in requiring:
        made[name].requires_grad = True
    return made


SLOPES = A((4,), "float32")
RECORDED = {
    **{
        f"{function.__name__}-{name}": (
            function,
            FORWARD | {"out": OUT, "alibi_slopes": SLOPES},
            name,
        )
        for function in (numflash.attention, numflash.plan)
        for name in ("q", "k", "v", "out", "alibi_slopes")
    },
    **{
        f"backward-{name}": (numflash.attention_backward, BACKWARD, name)
        for name in ("dout", "q", "k", "v", "out", "lse")
    },
    "check": (numflash.check, FORWARD, "k"),
    "explain": (numflash.explain_dispatch, FORWARD, "k"),
    "quantize": (numflash.quantize_fp8, {"x": Q}, "x"),
}


@needs_gpu_mode
@pytest.mark.parametrize("case", RECORDED)
def test_a_tensor_that_requires_a_gradient_is_refused(machine, case):
    function, specs, name = RECORDED[case]
    words = [f"{name} requires a gradient", "torch.no_grad()", f"{name}.detach()"]
    words += ["attention_backward"]
    for is_ready in (False, True):
        refused(
            machine, function, tensors_of(machine, specs, name), numflash.UnsupportedError, words
        )
        if function is numflash.check:
            return  # a fake has no numbers to compare
        if not is_ready:
            function(**tensors_of(machine, specs))
            machine.launched.clear()


@needs_gpu_mode
@pytest.mark.parametrize("case", [c for c in RECORDED if c != "check"])
def test_a_tensor_that_requires_a_gradient_is_taken_where_none_is_recorded(machine, case):
    function, specs, name = RECORDED[case]
    machine.gpu.torch.grad_enabled = False
    function(**tensors_of(machine, specs, name))


@needs_gpu_mode
def test_a_tensor_in_8_bits_that_requires_a_gradient_is_refused(machine):
    q = machine.gpu.tensor(Q.shape)
    x = numflash.quantize_fp8(q)
    x.descale.requires_grad = True
    with pytest.raises(numflash.UnsupportedError, match=r"x\.descale requires a gradient"):
        numflash.dequantize_fp8(x)
    with pytest.raises(numflash.UnsupportedError, match="k_descale requires a gradient"):
        numflash.attention(q, x, q)


class HostTensor:
    """A PyTorch tensor on the CPU, as NumPy and numflash see it."""

    device = types.SimpleNamespace(type="cpu")
    is_nested = is_quantized = False
    layout = "torch.strided"

    def __init__(self, array, requires_grad=False, problem=None):
        self.array, self.requires_grad, self.problem = array, requires_grad, problem
        self.dtype, self.itemsize = f"torch.{array.dtype.name}", array.itemsize

    def detach(self):
        return HostTensor(self.array, False, self.problem)

    def is_neg(self):
        return False

    def view(self, dtype):
        raise self.problem

    def numpy(self):
        if self.requires_grad:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
        if self.problem:
            raise self.problem
        return self.array

    def __array__(self, dtype=None, copy=None):
        return self.numpy()


@pytest.fixture
def torch(monkeypatch):
    """A PyTorch without a GPU, as a module."""
    module = types.ModuleType("torch")
    module.Tensor, module.grad_enabled = HostTensor, True
    module.is_grad_enabled = lambda: module.grad_enabled
    module.from_numpy, module.uint16 = HostTensor, "torch.uint16"
    module.strided = HostTensor.layout
    monkeypatch.setitem(sys.modules, "torch", module)
    monkeypatch.setattr(arrays, "_libraries", {})
    return module


@needs_simulator
@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
@pytest.mark.parametrize("function", [numflash.attention, numflash.plan])
def test_a_simulated_tensor_that_requires_a_gradient_is_refused(machine, torch, name, function):
    words = [f"{name} requires a gradient", "torch.no_grad()"]
    for is_ready in (False, True):
        tensors = {n: HostTensor(machine.array(x)) for n, x in (FORWARD | {"out": OUT}).items()}
        if is_ready:
            function(**tensors)
            machine.launched.clear()
        tensors[name].requires_grad = True
        refused(machine, function, tensors, numflash.UnsupportedError, words)
    torch.grad_enabled = False
    function(**tensors)


@needs_simulator
@pytest.mark.parametrize(
    "problem",
    [
        TypeError("Got unsupported ScalarType BFloat16"),
        TypeError("can't convert cuda:0 device type tensor to numpy."),
        RuntimeError("Can't call numpy() on Tensor that has conjugate bit set."),
    ],
    ids=["bfloat16", "cuda", "conjugate"],
)
@pytest.mark.parametrize("is_tensor", [True, False], ids=["tensor", "another-library's"])
def test_what_numpy_cannot_see_is_refused(machine, torch, problem, is_tensor):
    if not is_tensor:
        torch.Tensor = dict
    tensors = {name: HostTensor(machine.array(x)) for name, x in FORWARD.items()}
    numflash.attention(**tensors)
    machine.launched.clear()
    tensors["k"].problem, tensors["k"].dtype = problem, "torch.bfloat16"
    words = ["k must be an array that NumPy can see in the simulator", "HostTensor of torch."]
    words += [str(problem).rstrip("."), "ml_dtypes.bfloat16"]
    for function in (numflash.attention, numflash.plan, numflash.explain_dispatch):
        refused(machine, function, tensors, TypeError, words)


@needs_gpu_mode
def test_arrays_that_dlpack_says_are_on_the_cpu_are_refused(machine):
    class Foreign:
        def __init__(self, device, seen):
            self.device, self.seen = device, seen

        def __dlpack_device__(self):
            return self.device, 0

        def __dlpack__(self):
            return self.seen

    on_gpu, on_cpu = Foreign(2, machine.array(Q)), Foreign(1, machine.array(Q))
    words = ["k must be an array on a CUDA device"]
    for _ in range(2):
        arguments = {"q": on_gpu, "k": on_cpu, "v": on_gpu}
        refused(machine, numflash.attention, arguments, TypeError, words)
        # The type is now known; that array of it is still not on a GPU.
        numflash.attention(on_gpu, on_gpu, on_gpu)


@needs_simulator
def test_arrays_of_another_byte_order_are_refused(machine):
    q = np.zeros(Q.shape, np.dtype(np.float16).newbyteorder())
    words = ["q must have this machine's byte order", ">f2"]
    refused(machine, numflash.attention, {**FORWARD, "q": q}, TypeError, words)


@needs_simulator
def test_an_out_that_cannot_be_written_is_refused(machine):
    out = np.zeros(OUT.shape, np.float16)
    out.flags.writeable = False
    refused(
        machine, numflash.attention, {**FORWARD, "out": out}, ValueError, ["out must be writeable"]
    )


def test_more_blocks_than_a_grid_has_are_refused(machine):
    # Strides of 0: so large a problem needs no memory.
    q = broadcast(machine.array(A((1, 1, 1, 8))), (2**20, 2**20, 1, 8))
    words = ["the problem needs", "thread blocks; a grid has at most 2147483647"]
    arguments = {"q": q, "k": q, "v": q}
    refused(machine, numflash.attention, arguments, numflash.UnsupportedError, words)
