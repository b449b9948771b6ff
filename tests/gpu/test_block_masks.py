"""Block masks where only a device shows it: made on it, at full size, in little memory."""

import numpy as np
import pytest

import numflash
from numflash.runtime.arrays import to_numpy
from numflash.runtime.views import numpy_dtype

MIB = 2**20


def causal(batch, head, q_idx, kv_idx):
    return q_idx >= kv_idx


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy")


def inputs(cupy, dtype, seqlen_q, seqlen_k, heads=4, heads_kv=2, head_dim=128):
    rng = cupy.random.default_rng(0)
    shapes = (seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv), (seqlen_q, heads)
    return [
        rng.standard_normal((2, *shape, head_dim), dtype="float32").astype(numpy_dtype(dtype))
        for shape in shapes
    ]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_random_blocks_of_each_head_are_within_budget(cupy, poisoned_pool, dtype, head_dim):
    q, k, v, dout = inputs(cupy, dtype, 1000, 777, head_dim=head_dim)
    tiles = np.random.default_rng(3).random((2, 4, 8, 7)) < 0.4
    tiles[:, :, 3], tiles[:, :, :, 2] = False, False
    mask = numflash.BlockMask.from_tiles(cupy.asarray(tiles))
    np.testing.assert_array_equal(mask.tiles() != 0, tiles)
    report = numflash.check(q, k, v, dout=dout, block_mask=mask)
    assert report.passed, f"\n{report}"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_causal_as_a_function_with_its_blocks(cupy, poisoned_pool, dtype):
    q, k, v, dout = inputs(cupy, dtype, 1111, 1111)
    mask = numflash.create_block_mask(causal, 1, 1, 1111, 1111, like=q)
    report = numflash.check(q, k, v, dout=dout, block_mask=mask)
    assert report.passed, f"\n{report}"
    out = numflash.attention(q, k, v, block_mask=mask)
    wanted = numflash.attention(q, k, v, causal=True)
    assert float(abs(out.astype("f4") - wanted.astype("f4")).max()) < 4e-3


def test_hidden_blocks_are_not_read(cupy, poisoned_pool):
    q, k, v, _ = inputs(cupy, "float16", 1024, 1024)
    tiles = np.random.default_rng(5).random((8, 8)) < 0.5
    tiles[:, 3] = False
    mask = numflash.BlockMask.from_tiles(cupy.asarray(tiles))
    clean = numflash.attention(q, k, v, block_mask=mask)
    k[:, 384:512], v[:, 384:512] = np.nan, np.nan
    hidden = numflash.attention(q, k, v, block_mask=mask)
    np.testing.assert_array_equal(*(to_numpy(x).view(np.uint16) for x in (clean, hidden)))


def test_a_long_mask_takes_lists_and_nothing_else(cupy):
    """65,536 x 65,536: less than 8 MiB to make it, and nothing to use it."""
    pool = cupy.get_default_memory_pool()
    q, k, v, _ = inputs(cupy, "float16", 2**16, 2**16, heads=1, heads_kv=1, head_dim=64)
    out = cupy.empty_like(q)

    def window(batch, head, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (q_idx - kv_idx < 1024)

    pool.free_all_blocks()
    before = pool.total_bytes()
    mask = numflash.create_block_mask(window, 1, 1, 2**16, 2**16, like=q)
    numflash.attention(q, k, v, block_mask=mask, out=out)
    cupy.cuda.Device().synchronize()
    assert pool.total_bytes() - before < 8 * MIB
    assert mask.sparsity() > 98
    wanted = numflash.attention(q, k, v, window_size=(1023, 0))
    assert float(abs(out.astype("f4") - wanted.astype("f4")).max()) < 4e-3
