"""Memory that methods take at a time is what `memory` says, and no more than the issue's table."""

import gc
import threading
import weakref
from collections import defaultdict

import numpy as np
import pytest

from numflash.distributed import Layout, attention, attention_backward, local_calls, packing
from numflash.distributed.arrays import Arrays
from numflash.distributed.memory import memory_of_gather, memory_of_heads
from numflash.distributed.pairs import Band
from numflash.distributed.sizes import Sizes
from numflash.distributed.turns import share_of
from tests.support.covering import some, thorough
from tests.support.ranks import on_ranks

TOKENS, RANKS, CAUSAL = 24, 2, Band(None, 0)
WHOLE = Sizes(2, 2, 16, 8, itemsize=2)


@pytest.fixture
def peaks(monkeypatch):
    """By thread bytes of the arrays of methods, and of gradients of calls: now, and the most."""
    live, most = defaultdict(int), defaultdict(int)
    empty, gradients = Arrays.empty, local_calls.attention_backward
    # Whichever rank drops an array last frees it, and a collection may do so while we count.
    counting = threading.RLock()
    gc.collect()
    gc.freeze()

    def count(array):
        gc.collect()  # the simulator's launches are cycles, and have the arrays of their calls
        thread = threading.current_thread()

        def freed(size=array.nbytes):
            with counting:
                live[thread] -= size

        weakref.finalize(array, freed)
        with counting:
            live[thread] += array.nbytes
            most[thread] = max(most[thread], live[thread])
        return array

    def backward(*operands, **options):
        return tuple(map(count, gradients(*operands, **options)))

    monkeypatch.setattr(Arrays, "empty", lambda *asked: count(empty(*asked)))
    monkeypatch.setattr(local_calls, "attention_backward", backward)
    yield live, most
    gc.unfreeze()


def held(
    peaks, backward: bool, ranks: int = RANKS, sizes: Sizes = WHOLE, **asked
) -> list[tuple[int, int]]:
    """The most bytes that each rank held beyond operands, and those of its results."""
    live, most = peaks
    layout = Layout.zigzag(TOKENS, ranks)
    rng = np.random.default_rng(0)
    q, kv = (sizes.heads_q, sizes.head_dim), (sizes.heads_kv, sizes.head_dim)
    v, dout = (sizes.heads_kv, sizes.head_dim_v), (sizes.heads_q, sizes.head_dim_v)
    whole = [rng.standard_normal((1, TOKENS, *x)).astype("f2") for x in (q, kv, v, dout)]

    def work(comm) -> tuple[int, int]:
        me = threading.current_thread()
        q, k, v, dout = (layout.shard(x, comm.rank).copy() for x in whole)
        given = {"layout": layout, "comm": comm, "causal": True, **asked}
        out, lse = attention(q, k, v, return_lse=True, **given)
        if not backward:
            return most[me], out.nbytes + lse.nbytes
        gc.collect()
        before = most[me] = live[me]
        attention_backward(dout, q, k, v, out, lse, grad_dtype="float32", **given)
        return most[me] - before, 4 * (q.size + k.size + v.size)

    return on_ranks(ranks, work)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("max_workspace", some([None, 0, 10**6], 0))
def test_gather(peaks, backward, max_workspace):
    """Two buffers of a group of heads; one where all heads are one group."""
    layout = Layout.zigzag(TOKENS, RANKS)
    found = held(peaks, backward, method="gather", max_workspace=max_workspace)
    for rank, (taken, results) in enumerate(found):
        asked = layout, CAUSAL, rank, WHOLE, max_workspace
        memory = memory_of_gather(*asked, backward=backward)
        memory.pop("results in float32", None)  # gradients, which are results here
        # A bundle of arrays begins them at multiples of 128 bytes.
        beyond = taken - results
        assert abs(beyond - sum(memory.values())) <= 256, (beyond, memory)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("ranks", "heads_q", "heads_kv"), some([(2, 2, 2), (4, 4, 2), (4, 4, 1)], (2, 2, 2))
)
def test_heads(peaks, backward, ranks, heads_q, heads_kv):
    """Also with ranks that share a key-value head, of which each has a copy."""
    sizes = WHOLE._replace(heads_q=heads_q, heads_kv=heads_kv)
    found = held(peaks, backward, ranks, sizes, method="heads")
    share, own = share_of(sizes, ranks), TOKENS // ranks
    memory = memory_of_heads(share, sizes, TOKENS, own, backward=backward)
    # They take the most before there are results.
    assert {taken for taken, _ in found} == {memory["heads of all tokens"]}


@thorough
@pytest.mark.parametrize("backward", some([False, True], True))
def test_gather_of_many_messages(peaks, monkeypatch, backward):
    """Besides, what leaves and what arrives, put together."""
    monkeypatch.setattr(packing, "MOST_MESSAGES", 0)
    packing.are_packed.cache_clear()
    try:
        test_gather(peaks, backward, 0)
        memory = memory_of_gather(Layout.zigzag(TOKENS, RANKS), CAUSAL, 0, WHOLE, 0)
        assert memory["rows put together"]
    finally:
        packing.are_packed.cache_clear()
