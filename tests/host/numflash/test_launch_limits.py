"""No public call asks a driver for a launch that it refuses: for a grid without blocks, above all.

The limits are those of `tests.support.launch_limits`. No kernel runs.
"""

from random import Random

import numpy as np
import pytest

import numflash
from numflash.calls.launch import Launcher
from numflash.configs import Traits, parse_config
from numflash.executor.launch import Launch
from numflash.executor.program import program_of
from numflash.runtime import driver
from numflash.runtime.mode import SIMULATED
from numflash.simulator import launch
from tests.executed.by_hand import module
from tests.support.covering import ALL
from tests.support.launch_calls import CONFIGS, KINDS
from tests.support.launch_limits import Launched, recorded, wrong_with

pytestmark = pytest.mark.skipif(not SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM=1")
SEEDS = range(200 if ALL else 60)
# Seldom is a random call refused for its config, or for what a GPU does not have.
LEAST_LAUNCHED = 0.6


@pytest.fixture(autouse=True)
def forget_the_machine():
    """What a test says of the machine is remembered until it ends."""
    yield
    driver.limits_of_device.cache_clear()
    driver.multiprocessors.cache_clear()


@pytest.mark.whole
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("arch", CONFIGS)
def test_a_driver_would_take_every_launch(kind, arch, monkeypatch):
    accepted = 0
    for seed in SEEDS:
        # Where there are many multiprocessors rows are split.
        launched = recorded(monkeypatch, arch, num_sms=(1, 132)[seed % 2])
        try:
            kind(Random(seed), arch)
            accepted += 1
        except numflash.UnsupportedError:
            pass
        for each in launched:
            assert not wrong_with(each, arch), f"seed {seed}: {each}"
    assert accepted > LEAST_LAUNCHED * len(SEEDS)


SMALL = parse_config("forward", "m16n16w2"), Traits("float16", 32, 32)
LARGE = parse_config("forward", "sm80-m128n128w4s2"), Traits("float16", 256, 256)
CLUSTER = parse_config("forward", "sm90-m64n64w4s2-c2-overlap"), Traits("float16", 64, 64)


@pytest.mark.parametrize(
    ("kernel", "blocks", "arch", "wrong"),
    [
        (SMALL, 1, "sm_75", []),
        (SMALL, 0, "sm_75", ["0 blocks"]),
        (SMALL, 2**31 - 1, "sm_75", []),
        (SMALL, 2**31, "sm_75", [f"{2**31} blocks"]),
        (LARGE, 1, "sm_89", [f"{LARGE[0].smem_bytes(LARGE[1])} bytes of shared memory"]),
        (CLUSTER, 4, "sm_90a", []),
        (CLUSTER, 5, "sm_90a", ["5 blocks in clusters of 2"]),
    ],
)
def test_what_a_driver_refuses(kernel, blocks, arch, wrong):
    assert wrong_with(Launched(*kernel, blocks), arch) == wrong


# Grids without blocks


def test_a_simulated_launch_without_blocks_is_refused():
    for grid in (0, (0, 1), (1, 0), (1, 1, 0)):
        with pytest.raises(ValueError, match="the driver refuses a launch without blocks"):
            launch(lambda: None, grid, 32, ())


def test_an_executed_launch_without_blocks_is_refused():
    program = program_of(module(""), None, 0)
    for grid in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="the driver refuses a launch without blocks"):
            Launch(program, grid, (32, 1, 1), [np.zeros(4), 0], seed=0).run()


def test_a_launcher_without_blocks_compiles_and_launches_nothing(monkeypatch):
    launched = recorded(monkeypatch, "sm_80")
    for blocks in (0, 3):
        Launcher(*SMALL, 0, blocks, {}).bind({})(0)
    assert [each.blocks for each in launched] == [3]


@pytest.mark.parametrize("arch", ["sm_75", "sm_90a"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_tokens_of_no_sequence(arch, dtype, monkeypatch):
    """Results are those of rows that no sequence has, and no gradient comes from anywhere."""
    monkeypatch.setenv("NUMFLASH_SIM_ARCH", arch)
    driver.limits_of_device.cache_clear()
    ends, x, sinks = np.zeros(1, np.int32), np.ones((5, 2, 64), dtype), np.zeros(2, np.float32)
    out, lse = numflash.attention_varlen(x, x, x, ends, ends, return_lse=True, sinks=sinks)
    assert (out == 0).all() and (lse == -np.inf).all()
    gradients = numflash.attention_varlen_backward(x, x, x, x, out, lse, ends, ends, sinks=sinks)
    assert len(gradients) == 4 and all((each == 0).all() for each in gradients)
