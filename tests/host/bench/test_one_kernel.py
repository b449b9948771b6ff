"""The one kernel for gradients with a change: right, in turn, and of today's sources."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from bench.peers import methods as peers
from bench.peers import one_kernel
from bench.points.points import Point
from numflash import reference
from numflash.calls import launch, ready
from numflash.configs import Traits
from numflash.configs.wgmma_backward import Sm90BackwardConfig
from numflash.machine_code.compiler import letter_of
from numflash.runtime import driver
from numflash.runtime.mode import SIMULATED
from tests.support import fake_gpu
from tests.support.covering import thorough

in_the_simulator = pytest.mark.skipif(not SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM=1")
CONFIG = "sm90-m64n64w4s2"
# Three tiles of keys and of queries, the last of them not whole; so many blocks run together.
POINT = Point("backward", "question", "float16", 1, 150, 150, 1, 1, 32, False)
RESIDENT = 2
NAMES = "dq", "dk", "dv"


@pytest.fixture
def on_hopper(monkeypatch):
    """A simulated Hopper with as many SMs as blocks that run together."""
    monkeypatch.setenv("NUMFLASH_SIM_ARCH", "sm_90a")
    monkeypatch.setenv("NUMFLASH_SIM_BLOCKS", str(RESIDENT))
    monkeypatch.setattr(ready, "_ready", {})
    driver.limits_of_device.cache_clear()
    monkeypatch.setattr(driver, "machine_of", lambda device: SimpleNamespace(num_sms=RESIDENT))
    yield
    driver.limits_of_device.cache_clear()


@pytest.fixture(scope="module")
def inputs():
    """The arrays of POINT, and what its forward gives."""
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.standard_normal(POINT.q_shape).astype(np.float16)
        for name in ("q", "k", "v", "dout")
    }
    out, lse = reference.attention(*(arrays[name] for name in "qkv"))
    return arrays | {"out": out.astype(np.float16), "lse": lse.astype(np.float32)}


def _gradients(name, inputs, seed, monkeypatch):
    from numflash.simulator import SEED

    monkeypatch.setattr(SEED, "value", seed)
    return peers.find(name).prepare(POINT, inputs).call()


@thorough
@in_the_simulator
@pytest.mark.parametrize("change", one_kernel.CHANGES)
def test_gradients_of_a_changed_kernel(change, inputs, on_hopper, monkeypatch):
    as_it_is = f"numflash:backward={CONFIG}"
    plain = _gradients(as_it_is, inputs, 0, monkeypatch)
    found, again = (
        _gradients(f"{as_it_is},dq={change}", inputs, seed, monkeypatch) for seed in (1, 2)
    )
    assert all(found[name].tobytes() == again[name].tobytes() for name in NAMES)
    # Sums in another order have other bits.
    same = all(found[name].tobytes() == plain[name].tobytes() for name in NAMES)
    assert same == (change != "shifted")
    exact = reference.attention_backward(inputs["dout"], *(inputs[name] for name in "qkv"))
    for name, expected in zip(NAMES, exact, strict=True):
        np.testing.assert_allclose(found[name].astype(np.float32), expected, atol=4e-3)


@thorough
@in_the_simulator
def test_a_group_that_does_not_run_together_waits_for_ever(inputs, on_hopper, monkeypatch):
    from numflash.simulator.errors import DeadlockError

    monkeypatch.setattr(driver, "machine_of", lambda device: SimpleNamespace(num_sms=RESIDENT + 1))
    with pytest.raises(DeadlockError, match="1 blocks have not begun"):
        _gradients(f"numflash:backward={CONFIG},dq=shifted", inputs, 0, monkeypatch)


@pytest.mark.skipif(SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM unset")
def test_a_gpu_launches_the_changed_kernel_with_the_arguments_of_the_other(monkeypatch):
    gpu = fake_gpu.install(monkeypatch, (9, 0), num_sms=132, l2_bytes=50 * 2**20)

    def compile_kernel(make, limits, min_blocks):
        assert (limits.arch, min_blocks) == ("sm_90a", 1)
        kernel, code = make(), "backward|changed|traits"
        leaves = tuple((path, letter_of(kind)) for path, kind in kernel.leaves.items())
        monkeypatch.setitem(fake_gpu._parameters, code, leaves)
        cubin = fake_gpu.fake_get_cubin(config, Traits("float16", 128, 128), limits)
        return replace(cubin, code=code.encode(), smem_bytes=kernel.smem_bytes)

    monkeypatch.setattr(launch, "compile_kernel", compile_kernel)
    config = Sm90BackwardConfig.parse("sm90-m64n128w8s2")
    point = Point("backward", "question", "float16", 1, 512, 512, 2, 2, 128, False)
    arrays = {name: gpu.array(point.q_shape) for name in ("q", "k", "v", "dout", "out")}
    arrays["lse"] = gpu.array((1, 2, 512), "float32")
    ways = []
    for name in (f"numflash:backward={config}", f"numflash:backward={config},dq=one-buffer"):
        gpu.driver.launches.clear()
        results = peers.find(name).prepare(point, arrays).call()
        assert {each: array.shape for each, array in results.items()} == dict.fromkeys(
            NAMES, point.q_shape
        )
        ways.append({run.family: run for run in gpu.driver.launches})
    plain, changed = (runs["backward"] for runs in ways)
    assert list(ways[0]) == list(ways[1]) == ["delta", "backward", "reduce-dq"]
    assert (changed.config, changed.grid, changed.block) == ("changed", plain.grid, plain.block)
    # A buffer of 64 x 128 float32, and its two barriers.
    assert plain.smem_bytes - changed.smem_bytes == 4 * 64 * 128 + 16
    # All but what each call allocates.
    kept = {"shape", "scores", "mask", "q_map", "k_map", "v_map", "do_map"}
    arguments = [
        {name: x for name, x in run.arguments.items() if name.partition(".")[0] in kept}
        for run in (plain, changed)
    ]
    assert arguments[0] == arguments[1] and len(arguments[0]) > 10


def test_blocks_begin_in_groups_that_run_together():
    config = Sm90BackwardConfig.parse("sm90-m64n128w8s2")
    point = Point("backward", "question", "bfloat16", 4, 4096, 4096, 16, 16, 128, False)
    assert one_kernel.start_of(point, config, 132, 5) == (32, 64, 26)
    assert one_kernel.start_of(point, config, 132, 1) == (32, 64, 32)
    assert one_kernel.start_of(point, config, 4, 5) == (32, 64, 1)


def test_what_cannot_be_changed_says_why():
    with pytest.raises(ValueError, match="one-buffer, at-end, shifted, got 'late'"):
        peers.find(f"numflash:backward={CONFIG},dq=late")
    large, small = Traits("bfloat16", 128, 128), Sm90BackwardConfig.parse("sm90-m128n128w8s2")
    with pytest.raises(ValueError, match="has one buffer of dQ"):
        one_kernel.make_kernel("one-buffer", small, large)
    causal = Point("backward", "question", "float16", 1, 200, 200, 1, 1, 32, True)
    with pytest.raises(ValueError, match="must see all queries"):
        one_kernel.start_of(causal, small, 4, 1)
    with pytest.raises(ValueError, match="does not hold this once"):
        one_kernel._executed("numflash.kernels.wgmma.backward", ("no such line", ""))
