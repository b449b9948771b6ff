"""What calls on caches ask of the driver, which is stubbed."""

import numpy as np
import pytest

import numflash
from numflash.runtime.mode import SIMULATED
from tests.support.fake_gpu import HKV, D, H

pytestmark = pytest.mark.skipif(SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM unset")

B, PAGE, PAGES, WIDTH, NEW = 3, 16, 40, 12, 2


@pytest.fixture
def call(gpu):
    """A function that makes arrays, and calls with them."""
    tables = [gpu.array((PAGE * WIDTH, D // 2), "float32") for _ in range(2)]

    def make(**changes):
        caches = [gpu.array((PAGES, PAGE, HKV, D)) for _ in "kv"]
        new = [gpu.array((B, NEW, HKV, D)) for _ in "kv"]
        options = {
            "cache_seqlens": gpu.array((B,), "int32"),
            "page_table": gpu.array((B, WIDTH), "int32"),
            "rotary_cos": tables[0],
            "rotary_sin": tables[1],
            "causal": True,
        }
        q = gpu.array((B, NEW, H, D))
        return numflash.attention_with_kvcache(q, *caches, *new, **options | changes)

    return make


def test_arguments_arrive_where_the_driver_reads_them(gpu, call):
    lengths, table = gpu.array((B,), "int32"), gpu.array((B, WIDTH), "int32")
    call(cache_seqlens=lengths, page_table=table, num_splits=1, stream=0x77)
    prepare, forward = gpu.driver.launches
    assert [run.family for run in gpu.driver.launches] == ["prepare", "forward"]
    assert gpu.driver.sets == []
    slots = {n.partition(".")[2]: x for n, x in prepare.arguments.items() if "slots." in n}
    assert slots == {
        "table": table.data.ptr,
        "lengths": lengths.data.ptr,
        "pitch": WIDTH,
        "count": PAGES,
        "size": PAGE,
        "rows": PAGE * WIDTH,
        "has_table": 1,
    }
    assert prepare.arguments["rotated_q"] == forward.arguments["q"]
    assert prepare.arguments["k"] == forward.arguments["k"]
    assert forward.arguments["shape.pages.table"] == table.data.ptr
    assert prepare.arguments["lengths.k.lengths"] == lengths.data.ptr
    assert prepare.arguments["lengths.k.added"] == NEW
    assert {run.stream for run in gpu.driver.launches} == {0x77}


def test_an_integer_is_filled_in_on_the_device(gpu, call):
    for length in (0, 5, np.int64(100)):
        call(cache_seqlens=length)
    assert [(each.value, each.count) for each in gpu.driver.sets] == [(0, 4 * B), (5, B), (100, B)]
    assert len({run.arguments["slots.rows"] for run in gpu.driver.launches[::3]}) == 1


def test_a_warm_call_can_be_captured(gpu, call):
    """Nothing is loaded, allocated by the driver or waited for."""
    call()
    first = [(run.family, run.grid, run.smem_bytes) for run in gpu.driver.launches]
    assert len(first) <= 3
    gpu.driver.calls.clear()
    gpu.driver.launches.clear()
    call()
    assert [(run.family, run.grid, run.smem_bytes) for run in gpu.driver.launches] == first
    assert {each[0] for each in gpu.driver.calls} == {"cuLaunchKernel"}


def test_an_entry_of_a_batch_is_a_page(gpu, call):
    batch_idx = gpu.array((B,), "int32")
    call(page_table=None, cache_batch_idx=batch_idx, num_splits=1)
    prepare, forward = gpu.driver.launches
    assert prepare.arguments["slots.table"] == batch_idx.data.ptr
    assert forward.arguments["shape.pages.table"] == batch_idx.data.ptr
    assert (prepare.arguments["slots.pitch"], prepare.arguments["slots.rows"]) == (1, PAGE)
