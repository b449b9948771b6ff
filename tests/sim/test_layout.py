"""Whole kernels work where `selection.layout` says, block by block."""

import numpy as np
import pytest

import numflash
from numflash.configs import parse_config
from numflash.kernels.mma import backward as mma_fused
from numflash.kernels.mma import backward_dkdv as mma_dkdv
from numflash.kernels.wgmma import queries as wgmma_queries
from numflash.kernels.wgmma import skeleton
from numflash.problem.problem import AttentionProblem
from numflash.ptx import mov_ctaid_x, mov_tid_x
from numflash.selection.layout import launch_of, persistent_walks, places
from tests.support.covering import thorough

BATCH, Q, K, HEADS, HEADS_KV, DIM = 1, 40, 70, 2, 2, 32
PROBLEM = AttentionProblem(
    BATCH, Q, K, HEADS, HEADS_KV, DIM, DIM, "float16", 0.2, -Q, K - Q, K - Q
)
FORWARD = "sm80-m32n32w2s1"


@pytest.fixture
def watched(monkeypatch):
    """A function that has a module's own function recorded: (block, its first argument)."""

    def watch(module, name):
        found, own = [], getattr(module, name)

        def recorded(first, *others):
            if int(mov_tid_x()) == 0:
                found.append((int(mov_ctaid_x()), int(first)))
            return own(first, *others)

        monkeypatch.setattr(module, name, recorded)
        return found

    return watch


def arrays():
    rng = np.random.default_rng(0)
    sizes = (BATCH, Q, HEADS, DIM), (BATCH, K, HEADS_KV, DIM), (BATCH, K, HEADS_KV, DIM)
    return [rng.standard_normal(size).astype(np.float16) for size in sizes]


@thorough
@pytest.mark.parametrize(
    ("module", "family", "text", "in_flight"),
    [
        (mma_dkdv, "backward-dkdv", "sm80-m16n16w1s1-apart", 1),
        (mma_fused, "backward", "sm80-m16n16w1s1x2", 1),
        # As many heads as there are fit the L2.
        (wgmma_queries, "backward", "sm90-m64n64w4s1", HEADS_KV),
    ],
)
def test_blocks_that_own_keys(module, family, text, in_flight, on, watched):
    on("sm_90a")
    q, k, v = arrays()
    out, lse = numflash.attention(q, k, v, causal=True, config=FORWARD, return_lse=True)
    configs = {family: text}
    if family != "backward":
        configs["backward-dq"] = text.removesuffix("-apart")
    found = watched(module, "last_of")
    numflash.attention_backward(q, q, k, v, out, lse, causal=True, config=configs)
    laid = places(launch_of(parse_config(family, text), PROBLEM, 1, in_flight))
    expected = list(zip(laid.block.tolist(), laid.start.tolist(), strict=True))
    # A kernel may ask more than once.
    assert list(dict.fromkeys(found)) == expected


def test_persistent_blocks(on, watched):
    on("sm_90a")
    text = "sm90-m64n64w4s2-persistent"
    found = watched(skeleton, "next_place")
    numflash.attention(*arrays(), causal=True, config=text)
    laid = places(launch_of(parse_config("forward", text), PROBLEM))
    num_blocks = 1 + max(block for block, _ in found)
    walks = persistent_walks(len(laid), num_blocks)
    expected = [(block, int(n)) for block, walk in enumerate(walks) for n in walk]
    assert sorted(found) == sorted(expected)
    for number in range(num_blocks):
        own = [place for block, place in found if block == number]
        assert own == [place for block, place in expected if block == number]
