"""What ranks send is what `explain` says, to the byte."""

import numpy as np
import pytest

from bench.distributed.wires import Counting
from numflash.distributed import Layout, attention, attention_backward, explain, local
from tests.support.covering import some
from tests.support.ranks import on_ranks

HEADS = {"num_heads_q": 2, "num_heads_kv": 2, "head_dim": 16, "head_dim_v": 8}
CAUSAL = {"causal": True}
ZIGZAG = Layout.zigzag(12, 2)
CASES = {
    "ring": (ZIGZAG, CAUSAL, {"method": "ring"}),
    "gather": (ZIGZAG, CAUSAL, {"method": "gather"}),
    "heads": (ZIGZAG, CAUSAL, {"method": "heads"}),
    "auto": (ZIGZAG, CAUSAL, {}),
    "ring of codes": (ZIGZAG, CAUSAL, {"method": "ring", "wire": "e4m3"}),
    "gather codes": (ZIGZAG, CAUSAL, {"method": "gather", "wire": "e4m3"}),
    "heads and codes": (ZIGZAG, CAUSAL, {"method": "heads", "wire": "e4m3"}),
    "window": (Layout.contiguous(12, 3), {"window_size": (3, 0)}, {"method": "ring"}),
    "window gathered": (Layout.contiguous(12, 3), {"window_size": (3, 0)}, {"method": "gather"}),
    "documents": (Layout.zigzag_documents([9, 0, 5], 2), CAUSAL, {"method": "ring"}),
    "documents gathered": (Layout.zigzag_documents([9, 5], 2), CAUSAL, {"method": "gather"}),
    "one rank empty": (Layout.of_segments([8], [[(0, 0, 8)], []]), {}, {"method": "ring"}),
    "two methods": (Layout.zigzag(8, 4), CAUSAL, {"method": ("heads", "ring")}),
    "two methods, codes": (
        Layout.zigzag(8, 4),
        CAUSAL,
        {"method": ("heads", "ring"), "wire": "e4m3"},
    ),
}


def comms_of(layout, options):
    """For each rank its communicators, which count."""
    if not isinstance(options.get("method"), tuple):
        return [(Counting(comm),) for comm in local(layout.ranks)]
    within, across = ([local(2), local(2)] for _ in range(2))
    return [(Counting(within[r // 2][r % 2]), Counting(across[r % 2][r // 2])) for r in range(4)]


def sent(layout, mask, options, backward):
    """Bytes that each rank sends."""
    comms = comms_of(layout, options)
    rng = np.random.default_rng(0)
    q, k, v, out = (
        rng.standard_normal((1, layout.seqlen, 2, dim)).astype("float16") for dim in (16, 16, 8, 8)
    )

    def work(comm):
        rank = comm.rank
        mine = [layout.shard(x, rank) for x in (q, k, v, out)]
        pair = comms[rank]
        given = {"layout": layout, "comm": pair if len(pair) > 1 else pair[0]}
        given |= {**mask, **options}
        if backward:
            lse = np.full((1, 2, layout.tokens(rank)), 3, "float32")
            attention_backward(mine[3], *mine, lse, **given)
        else:
            attention(*mine[:3], **given)

    on_ranks(layout.ranks, work)
    return tuple(sum(comm.sent for comm in pair) for pair in comms)


def explained(layout, mask, options, backward):
    groups = {"groups": 2} if isinstance(options.get("method"), tuple) else {}
    return explain(layout, **HEADS, backward=backward, **mask, **options, **groups)


KEPT = ("ring", "gather", "heads", "auto", "window", "documents gathered", "two methods")


@pytest.mark.parametrize("name", some(CASES, *KEPT, "ring of codes", "one rank empty"))
def test_forward(name):
    found = sent(*CASES[name], backward=False)
    assert found == explained(*CASES[name], backward=False).sent
    assert any(found) or name == "one rank empty"


@pytest.mark.parametrize(
    "name",
    some([name for name in CASES if "codes" not in name], "ring", "gather", "heads", "window"),
)
def test_backward(name):
    assert sent(*CASES[name], backward=True) == explained(*CASES[name], backward=True).sent


@pytest.mark.parametrize("travels", some(["keys", "queries"], "queries"))
def test_a_ring_in_which_either_travels(travels):
    case = ZIGZAG, CAUSAL, {"method": "ring", "travels": travels}
    assert sent(*case, backward=True) == explained(*case, backward=True).sent
