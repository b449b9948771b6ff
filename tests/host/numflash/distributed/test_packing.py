"""Runs that are put together: both ends have the same rows in the same order; few messages."""

import random

import numpy as np
import pytest

from numflash.distributed import Layout, explain, steps
from numflash.distributed.arrays import Arrays
from numflash.distributed.memory import best_method
from numflash.distributed.packing import MOST_MESSAGES, Packed, are_packed, has_many_messages
from numflash.distributed.pairs import Band
from numflash.distributed.sizes import Sizes
from numflash.problem.fp8 import Fp8Recipe

CAUSAL, HOST = Band(None, 0), Arrays(np, None)


def lengths(documents: int) -> list[int]:
    draw = random.Random(0)
    return [draw.randrange(200, 3000) for _ in range(documents)]


@pytest.mark.parametrize("band", [CAUSAL, Band(), Band(40, 10)], ids=str)
def test_what_leaves_one_rank_arrives_at_the_other(band):
    layout = Layout.zigzag_documents([37, 1, 90, 12, 3], 4)
    plans, sent, received = steps.gathering(layout, band), {}, {}
    for rank, plan in enumerate(plans):
        places = dict(plan.own)
        sides = (
            [(m.peer, places[m.rows]) for m in plan.fetch.sends],
            [(m.peer, m.rows) for m in plan.fetch.receives],
        )
        leave, arrive = (Packed.of(HOST, side) for side in sides)
        for peer, (begin, end) in leave.extents:
            sent[rank, peer] = leave.index[begin:end].tolist()
        for peer, (begin, end) in arrive.extents:
            received[peer, rank] = arrive.index[begin:end].tolist()
        assert (leave.tokens, arrive.tokens) == (len(leave.index), len(arrive.index))
    assert sent == received and sent


def test_many_documents_are_a_message_for_each_rank():
    layout = Layout.zigzag_documents(lengths(200), 8)
    each = max(sum(map(len, plan.fetch)) for plan in steps.gathering(layout, CAUSAL))
    heads = {"num_heads_q": 32, "num_heads_kv": 8, "head_dim": 128}
    found = explain(layout, **heads, method="gather", causal=True, backward=True)
    assert each > 2000 and {turn.messages for turn in found.turns[3]} <= {14, 28}
    assert "rows put together" in found.memory[0]
    few = explain(Layout.zigzag(2**16, 8), **heads, method="gather", causal=True)
    assert "rows put together" not in few.memory[0]


def test_rows_that_share_a_scale_are_not_put_together():
    layout, recipe = Layout.zigzag_documents([256] * 100, 2, multiple=64), Fp8Recipe("block", 64)
    assert has_many_messages(layout, CAUSAL, recipe) and not are_packed(layout, CAUSAL, recipe)
    assert best_method(layout, CAUSAL, Sizes(32, 8, 128, 128, 2, recipe=recipe)) == "ring"
    assert MOST_MESSAGES == 256
