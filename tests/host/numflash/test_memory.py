"""Memory: masks and scores of 65,536 x 65,536 need nothing quadratic that the caller did not give.

The allocator counts all that a call asks for, and gives nothing beyond its limit.
"""

import pytest

import numflash
from numflash.runtime.mode import SIMULATED

pytestmark = pytest.mark.skipif(SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM unset")

SEQLEN, HEADS, HEAD_DIM = 65_536, 2, 64
ROWS = SEQLEN * HEADS
BEYOND_RESULTS = 64 * 2**20


@pytest.fixture(params=["gpu", "hopper"])
def limited(request, monkeypatch):
    """A fake GPU, and a function that limits what it allocates from now on."""
    gpu = request.getfixturevalue(request.param)
    take = gpu.memory.take

    def limit(n_bytes: int) -> None:
        left = [n_bytes]

        def take_some(size: int) -> int:
            left[0] -= size
            if left[0] < 0:
                raise MemoryError(f"{-left[0]} bytes too many")
            return take(size)

        monkeypatch.setattr(gpu.memory, "take", take_some)

    return gpu, limit


def within(window):
    def mask_mod(batch, head, q_idx, kv_idx):
        return abs(q_idx - kv_idx) <= window

    return mask_mod


def rises(score, batch, head, q_idx, kv_idx, slopes):
    return numflash.math.tanh(score) * 20.0 + slopes[head] * (kv_idx - q_idx)


def options_of(case: str, gpu, q) -> dict:
    if case == "a mask of keys":
        return {"mask": gpu.array((1, 1, 1, SEQLEN), "bool")}
    if case == "a score_mod":
        return {"score_mod": rises, "aux": (gpu.array((HEADS,), "float32"),)}
    return {"block_mask": numflash.create_block_mask(within(1000), 1, 1, SEQLEN, SEQLEN, like=q)}


@pytest.mark.parametrize("case", ["a mask of keys", "a block mask", "a score_mod"])
def test_calls_allocate_little_beyond_results(limited, case):
    gpu, limit = limited
    q, k, v, dout = (gpu.array((1, SEQLEN, HEADS, HEAD_DIM)) for _ in range(4))
    sixteen_bits, statistics = 2 * ROWS * HEAD_DIM, 4 * ROWS
    limit(sixteen_bits + statistics + BEYOND_RESULTS)
    options = options_of(case, gpu, q)
    out, lse = numflash.attention(q, k, v, return_lse=True, **options)
    limit(3 * sixteen_bits + BEYOND_RESULTS)
    numflash.attention_backward(dout, q, k, v, out, lse, **options)
    families = {run.family for run in gpu.driver.launches}
    assert {"forward", "backward-dq", "backward-dkdv"} <= families


def test_the_allocator_would_refuse_a_quadratic_array(limited):
    gpu, limit = limited
    limit(BEYOND_RESULTS)
    with pytest.raises(MemoryError):
        gpu.array((SEQLEN, SEQLEN), "bool")
