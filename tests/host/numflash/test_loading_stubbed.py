"""Kernels loaded before they are launched, compiled ahead, or refused; the driver is stubbed."""

import sys
import types
from dataclasses import replace
from functools import cache

import pytest

import numflash
from numflash.calls import launch
from numflash.machine_code import compiler
from numflash.runtime import driver
from numflash.runtime.mode import SIMULATED
from tests.support import fake_gpu
from tests.support.fake_gpu import DV, SQ, B, D, H

pytestmark = pytest.mark.skipif(SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM unset")


def run_everything(gpu):
    """One call of each public function that launches; both GPUs of `gpu` and `hopper` do all."""
    q = gpu.array((B, SQ, H, D))
    out, lse = numflash.attention(q, q, q, return_lse=True)
    numflash.attention_backward(out, q, q, q, out, lse)
    numflash.plan(q, q, q, causal=True).launch()
    few, many = gpu.array((1, 1, H, D)), gpu.array((1, 65536, H, D))
    numflash.attention(few, many, many)
    numflash.dequantize_fp8(numflash.quantize_fp8(q, "head"))
    numflash.attention(q, q, q, precision="fp8")
    numflash.attention(q, q, q, precision="auto")


@pytest.mark.parametrize("current", [0, 1, None], ids=["here", "another-device", "no-context"])
@pytest.mark.parametrize("machine", ["gpu", "hopper"])
def test_every_kernel_is_loaded_before_its_first_launch(request, machine, current):
    driver = request.getfixturevalue(machine).driver
    driver.device = current
    run_everything(request.getfixturevalue(machine))
    assert driver.loaded_lazily == [] and driver.device == current
    assert len(driver.launches) >= 15
    # Once each, into the context of the device that it runs on.
    loads = [call[1] for call in driver.calls if call[0] == "cuFuncLoad"]
    assert sorted(loads) == sorted(driver.kernels)
    assert driver.loaded == {(number, 0) for number, _ in enumerate(driver.kernels, 1)}


def test_shared_memory_is_asked_for_before_a_kernel_is_loaded(hopper):
    q = hopper.array((B, SQ, H, 128))
    numflash.attention(q, q, q)
    names = [name for name, *_ in hopper.driver.calls]
    assert names == ["cuKernelSetAttribute", "cuKernelGetFunction", "cuFuncLoad", "cuLaunchKernel"]


def test_each_device_loads_for_itself(gpu):
    for device in (0, 1):
        q = gpu.array((B, SQ, H, D), device=device)
        numflash.attention(q, q, q)
    assert gpu.driver.loaded == {(1, 0), (2, 1)} and gpu.driver.loaded_lazily == []


def test_a_plan_has_loaded_its_kernels_before_it_is_launched(gpu, qkv):
    numflash.plan(*qkv)
    assert [name for name, *_ in gpu.driver.calls] == ["cuKernelGetFunction", "cuFuncLoad"]


def test_warmup_loads_what_attention_will_launch(gpu, compiled, qkv):
    numflash.warmup("float16", D, DV, backward=True)
    assert len(gpu.driver.loaded) == len(gpu.driver.kernels) == len(compiled) == 4
    gpu.driver.calls.clear()
    out, lse = numflash.attention(*qkv, return_lse=True)
    numflash.attention_backward(out, *qkv, out, lse)
    assert {name for name, *_ in gpu.driver.calls} == {"cuLaunchKernel"}


class OldDriver(fake_gpu.Driver):
    """CUDA 12.3: loads a kernel when its function is asked for."""

    def cuKernelGetFunction(self, kernel):
        status, function = super().cuKernelGetFunction(kernel)
        self.loaded.add((kernel, self.device))
        return status, function

    def cuFuncLoad(self, function):
        # The answer of cuda-bindings for a function that the driver lacks.
        raise RuntimeError("function cuFuncLoad is not found")


class OldBindings(OldDriver):
    @property
    def cuFuncLoad(self):
        raise AttributeError("cuFuncLoad")


@pytest.mark.parametrize("old", [OldDriver, OldBindings])
def test_a_driver_that_cannot_load_a_function_is_asked_for_it(gpu, qkv, old):
    gpu.driver.__class__ = old
    numflash.attention(*qkv)
    names = [name for name, *_ in gpu.driver.calls]
    assert names == ["cuKernelGetFunction", "cuLaunchKernel"]
    assert gpu.driver.loaded_lazily == []


def test_a_kernel_that_cannot_be_loaded_is_tried_again(gpu, qkv):
    gpu.driver.load_status = fake_gpu.Status(2)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        numflash.attention(*qkv)
    assert gpu.driver.launches == []
    gpu.driver.load_status = fake_gpu.OK
    numflash.attention(*qkv)
    assert gpu.driver.loaded_lazily == [] and len(gpu.driver.launches) == 1


def test_warmup_compiles_what_attention_will_launch(gpu, compiled, qkv):
    numflash.warmup("float16", D, DV, backward=True)
    ahead = list(compiled)
    out, lse = numflash.attention(*qkv, return_lse=True)
    numflash.attention_backward(out, *qkv, out, lse)
    assert list(compiled) == ahead and sorted(ahead) == sorted(gpu.driver.kernels)


@pytest.mark.parametrize("precision", [None, "tf32"])
def test_warmup_compiles_for_the_precision_of_the_calls(hopper, compiled, precision):
    numflash.warmup("float32", D, backward=True, precision=precision)
    ahead = list(compiled)
    q = hopper.array((16, 512, 8, D), "float32")
    out, lse = numflash.attention(q, q, q, return_lse=True, precision=precision)
    numflash.attention_backward(out, q, q, q, out, lse, precision=precision)
    assert list(compiled) == ahead and sorted(ahead) == sorted(hopper.driver.kernels)
    assert any("tf32" in kernel for kernel in compiled) is (precision is not None)


@pytest.mark.parametrize(
    ("bindings", "spills", "said"),
    [("12.9.10", 184, 1), ("12.9.10", 0, 0), ("13.5.0", 184, 0), (None, 184, 0)],
)
def test_what_spills_with_cuda_12_says_so_once(bindings, spills, said, gpu, monkeypatch, caplog):
    def get_cubin(*arguments):
        return replace(fake_gpu.fake_get_cubin(*arguments), spill_store_bytes=spills)

    monkeypatch.setattr(launch, "get_cubin", get_cubin)
    monkeypatch.setattr(compiler, "_version", lambda name: bindings)
    monkeypatch.setattr(compiler, "_warn_once", cache(compiler._warn_once.__wrapped__))
    for length in (SQ, 2 * SQ):
        q = gpu.array((B, length, H, D))
        numflash.attention(q, q, q)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == said
    assert all("forward" in m and "184 bytes" in m and "numflash[cu13]" in m for m in messages)


def test_a_gpu_older_than_turing_is_unsupported(monkeypatch):
    gpu = fake_gpu.install(monkeypatch, capability=(7, 0))
    q = gpu.array((B, SQ, H, D))
    with pytest.raises(numflash.UnsupportedError, match=r"device 0: .*sm_70.*not supported"):
        numflash.attention(q, q, q)


def _bindings(initialise):
    module = types.ModuleType("cuda.bindings")
    module.driver = types.SimpleNamespace(cuInit=initialise)
    return module


def _not_found(flags):
    raise RuntimeError("libcuda.so.1 was not found.")


@pytest.mark.parametrize(
    "bindings, reason",
    [
        (None, "cuda.bindings"),
        (_bindings(_not_found), "libcuda.so.1 was not found. Kernels"),
        (_bindings(lambda flags: (fake_gpu.Status(100),)), "CUDA_ERROR_UNKNOWN"),
    ],
    ids=["not-installed", "not-found", "no-device"],
)
def test_without_a_driver_the_error_says_why_and_what_to_do(monkeypatch, bindings, reason):
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setattr(driver, "open_driver", driver.open_driver.__wrapped__)
    monkeypatch.setattr(driver, "limits_of_device", driver.limits_of_device.__wrapped__)
    with pytest.raises(numflash.UnsupportedError) as error:
        numflash.warmup()
    words = ["the CUDA driver cannot be used", reason, "numflash[cu13]", "NUMBA_ENABLE_CUDASIM=1"]
    for word in words:
        assert word in str(error.value)
