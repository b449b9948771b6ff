"""dQ = dS K of a tile on wgmma, exactly, and what its mistakes show."""

import numpy as np
import pytest

from numflash.ptx import device_function, i32, stmatrix_x4
from numflash.simulator import SEED, GlobalPointer, SimulationError, launch
from numflash.tiles.unrolled import make_unrolled
from tests.support import backward_tiles
from tests.support.faults import Dropped, load


def dq(form, **options):
    ds, k, expected = backward_tiles.arrays(*form)
    kernel = backward_tiles.make_kernel(*form, **options)
    got = np.full(expected.size, np.nan, np.float32)
    pointers = [GlobalPointer(x, x.dtype) for x in (ds, k, got)]
    launch(kernel.function, 1, kernel.num_threads, pointers, kernel.smem_bytes)
    return expected, got


FORMS = [
    ("float16", 1, 64),
    ("bfloat16", 2, 96),
    ("bfloat16", 2, 128),
    ("float16", 3, 64),
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_dq_of_a_tile_is_exact(form, each_seed):
    expected, got = dq(form)
    assert (expected == got).all()


def test_a_missing_fence_is_found(each_seed):
    with pytest.raises(SimulationError, match="without a fence_proxy_async"):
        dq(FORMS[0], without="fence")


def test_some_order_shows_a_missing_barrier():
    def is_wrong(seed):
        SEED.value = seed
        try:
            expected, got = dq(FORMS[2], without="barrier")
        except SimulationError:
            return True
        return not (expected == got).all()

    assert any(is_wrong(seed) for seed in range(8))


@pytest.mark.parametrize("called", ["wgmma_fence", "wgmma_commit_group"])
def test_a_product_needs_its_fence_and_its_commit(called, monkeypatch):
    module, fault = "numflash.tiles.wgmma.products", Dropped("make_product_kn.product_kn", called)
    changed = load([module], module, fault, monkeypatch)
    with pytest.raises(SimulationError):
        dq(FORMS[0], make_product=changed.make_product_kn)


def test_stored_as_it_is_it_is_wrong():
    @device_function
    def store_step(step, packed, smem, first):
        stmatrix_x4(smem, i32(first + 16 * 32 * step), packed)

    loop = make_unrolled(store_step, 4, 4)
    expected, got = dq(FORMS[0], store=lambda packed, smem, first: loop(0, packed, smem, first))
    assert not (expected == got).all()
