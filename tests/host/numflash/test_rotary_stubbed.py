"""Rotary embeddings as they arrive at a stubbed driver and at stubbed array libraries."""

import numpy as np
import pytest

import numflash
from numflash.configs import RotaryConfig, Traits
from numflash.problem.rotary import make_tables
from numflash.runtime.mode import SIMULATED

pytestmark = pytest.mark.skipif(SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM unset")

B, S, H, D = 2, 100, 5, 64


@pytest.fixture
def arrays(gpu):
    """(x, cos, sin)."""
    return gpu.array((B, S, H, D)), *(gpu.array((200, 16), "float32") for _ in range(2))


def test_arguments_arrive_where_the_driver_reads_them(gpu, arrays):
    x, cos, sin = arrays
    out = numflash.apply_rotary(x, cos, sin, conjugate=True, offsets=7, stream=0x77)
    (run,) = gpu.driver.launches
    assert run.arguments == {
        "x": x.data.ptr,
        "x.batch": S * H * D,
        "x.row": H * D,
        "x.head": D,
        "out": out.data.ptr,
        "out.batch": S * H * D,
        "out.row": H * D,
        "out.head": D,
        "cos": cos.data.ptr,
        "cos.row": 16,
        "sin": sin.data.ptr,
        "sin.row": 16,
        "positions.cu_seqlens": 0,
        "positions.offsets": 0,
        "positions.offset": 7,
        "positions.entries": B,
        "positions.is_packed": 0,
        "positions.has_offsets": 0,
        "sizes.num_tokens": B * S,
        "sizes.seqlen": S,
        "sizes.num_heads": H,
        "sizes.half": 16,
        "sizes.positions": 200,
        "sizes.copied": D,
        "sign": -1.0,
    }
    assert (run.family, run.traits, run.stream) == ("rotary", "float16-d64-dv64-vec", 0x77)
    config, traits = RotaryConfig.parse(run.config), Traits.parse(run.traits)
    assert (config.tokens(traits), config.num_heads) == (32, 4)
    # Seven tiles of 32 tokens, and two groups of heads.
    assert (run.grid, run.block) == ((7 * 2, 1, 1), (128, 1, 1))


def test_in_place_copies_nothing_and_allocates_nothing(gpu, arrays):
    x, cos, sin = arrays
    gpu.cupy.allocations.clear()
    assert numflash.apply_rotary(x, cos, sin, out=x) is x
    other = gpu.array(x.shape)
    assert numflash.apply_rotary(x, cos, sin, out=other) is other
    runs = gpu.driver.launches
    assert [run.arguments["sizes.copied"] for run in runs] == [0, D]
    assert [run.arguments["out"] for run in runs] == [x.data.ptr, other.data.ptr]
    assert gpu.cupy.allocations == []


def test_other_offsets_and_lengths_are_the_same_launch(gpu, arrays):
    """An integer is a number of the launch; arrays stay on the device, for graphs to change."""
    x, cos, sin = arrays
    for offset in (0, 99, np.int32(100)):
        numflash.apply_rotary(x, cos, sin, offsets=offset)
    assert [run.arguments["positions.offset"] for run in gpu.driver.launches] == [0, 99, 100]
    assert len(gpu.driver.kernels) == 1
    packed, bounds = gpu.array((S, H, D)), gpu.array((4,), "int32")
    offsets = gpu.array((3,), "int32")
    numflash.apply_rotary(packed, cos, sin, cu_seqlens=bounds, offsets=offsets)
    given = gpu.driver.launches[-1].arguments
    assert given["positions.cu_seqlens"] == bounds.data.ptr
    assert given["positions.offsets"] == offsets.data.ptr
    names = ("positions.entries", "positions.is_packed", "positions.has_offsets")
    assert [given[name] for name in names] == [3, 1, 1]
    assert len(gpu.driver.kernels) == 1
    gpu.driver.calls.clear()
    numflash.apply_rotary(packed, cos, sin, cu_seqlens=bounds, offsets=offsets)
    assert [name for name, *_ in gpu.driver.calls] == ["cuLaunchKernel"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tables_are_copied_to_the_library_and_device_of_like(gpu, dtype):
    scaling = numflash.YarnScaling(4.0, 64)
    wanted = make_tables(30, 16, 1e4, scaling, dtype)
    options = {"scaling": scaling, "dtype": dtype}
    of_cupy = numflash.rotary_tables(30, 16, like=gpu.array((3,), device=1), **options)
    of_torch = numflash.rotary_tables(30, 16, like=gpu.tensor((3,)), **options)
    for table, other, content in zip(of_cupy, of_torch, wanted, strict=True):
        assert (table.shape, table.data.device_id) == ((30, 8), 1)
        assert (other.shape, str(other.device)) == ((30, 8), "cuda:0")
        for array in (table.content, other.content):
            assert array.tobytes() == content.tobytes() and array.dtype == content.dtype
    assert len(gpu.driver.launches) == 0
    gpu.cupy.allocations.clear()
    numflash.rotary_tables(30, 16, like=gpu.array((3,)), stream=0xAB0)
    assert gpu.cupy.allocations == [(0xAB0, 0)] * 2
