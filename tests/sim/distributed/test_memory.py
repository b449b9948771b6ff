"""Memory that methods take at a time is what `memory` says, and no more than the issue's table."""

import threading
import weakref
from collections import defaultdict

import numpy as np
import pytest

from numflash.distributed import Layout, attention, attention_backward, packing
from numflash.distributed.arrays import Arrays
from numflash.distributed.memory import memory_of_gather, memory_of_heads
from numflash.distributed.pairs import Band
from numflash.distributed.sizes import Sizes
from tests.support.covering import some
from tests.support.ranks import on_ranks

TOKENS, RANKS, CAUSAL = 24, 2, Band(None, 0)
WHOLE = Sizes(2, 2, 16, 8, itemsize=2)
SHAPES = {"q": (2, 16), "k": (2, 16), "v": (2, 8), "dout": (2, 8)}


@pytest.fixture
def peaks(monkeypatch):
    """By thread the most bytes of arrays that methods held at a time."""
    live, most, empty = defaultdict(int), defaultdict(int), Arrays.empty
    # Whichever rank drops an array last frees it, and a collection may do so while we count.
    counting = threading.RLock()

    def counted(self, shape, dtype):
        array, thread = empty(self, shape, dtype), threading.current_thread()

        def freed(size=array.nbytes):
            with counting:
                live[thread] -= size

        weakref.finalize(array, freed)
        with counting:
            live[thread] += array.nbytes
            most[thread] = max(most[thread], live[thread])
        return array

    monkeypatch.setattr(Arrays, "empty", counted)
    return live, most


def beyond_results(peaks, backward: bool, **asked) -> list[int]:
    """Bytes that each rank held beyond operands and results."""
    live, most = peaks
    layout = Layout.zigzag(TOKENS, RANKS)
    rng = np.random.default_rng(0)
    whole = {n: rng.standard_normal((1, TOKENS, *x)).astype("f2") for n, x in SHAPES.items()}

    def work(comm) -> int:
        me = threading.current_thread()
        q, k, v, dout = (layout.shard(x, comm.rank).copy() for x in whole.values())
        given = {"layout": layout, "comm": comm, "causal": True, **asked}
        out, lse = attention(q, k, v, return_lse=True, **given)
        if not backward:
            return most[me] - out.nbytes - lse.nbytes
        # The other rank may still hold what it copied from here.
        comm.agree("both have left the forward")
        most[me] = live[me]
        before = live[me]
        attention_backward(dout, q, k, v, out, lse, grad_dtype="float32", **given)
        return most[me] - before - 4 * (q.size + k.size + v.size)

    return on_ranks(RANKS, work)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("max_workspace", [None, 0, 10**6])
def test_gather(peaks, backward, max_workspace):
    """Two buffers of a group of heads; one where all heads are one group."""
    layout = Layout.zigzag(TOKENS, RANKS)
    found = beyond_results(peaks, backward, method="gather", max_workspace=max_workspace)
    for rank, taken in enumerate(found):
        asked = layout, CAUSAL, rank, WHOLE, max_workspace
        memory = memory_of_gather(*asked, backward=backward)
        # Those of a call itself, and gradients, which are results here.
        for name in ("a part", "results in float32"):
            memory.pop(name, None)
        # A bundle of arrays begins them at multiples of 128 bytes.
        assert abs(taken - sum(memory.values())) <= 256, (taken, memory)


@pytest.mark.parametrize("backward", [False, True])
def test_heads(peaks, backward):
    found = beyond_results(peaks, backward, method="heads")
    sizes = WHOLE.of_heads(1)
    most = sum(memory_of_heads(sizes, TOKENS, WHOLE, backward=backward).values())
    # What is sent is there until the other rank has it: of one exchange, and of that before it.
    sent = sizes.queries(TOKENS // RANKS) + sizes.keys(TOKENS // RANKS)
    assert all(0 < taken <= most + sent for taken in found), (found, most, sent)


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
