"""Bytes that travel and memory that methods take: against the formulas of a zigzag or a window."""

from itertools import product

import pytest

from numflash.distributed.layouts import Layout
from numflash.distributed.memory import (
    best_method,
    memory_of_gather,
    memory_of_heads,
    memory_of_ring,
)
from numflash.distributed.pairs import Band
from numflash.distributed.sizes import (
    Sizes,
    expect_heads,
    gathered_at_once,
    in_one_message,
    sent_in_backwards,
    shares_of,
    what_travels,
)
from numflash.distributed.turns import of_gather, of_heads, of_ring, share_of
from numflash.problem.fp8 import Fp8Recipe

CAUSAL = Band(None, 0)
MIB = 2**20
# DISTRIBUTED.md's cases: 96 tokens, 4 and 2 heads of 16, float32.
SMALL = Sizes(4, 2, 16, 16, 4)
# 128k tokens of 8 ranks, 32 and 8 heads of 128, 16 bits.
LARGE, LONG = Sizes(32, 8, 128, 128, 2), Layout.zigzag(2**17, 8)


def sent(turns):
    """By rank."""
    return [sum(turn.sent for turn in of_rank) for of_rank in turns]


def test_a_ring_sends_what_was_counted():
    """Forward; forward and backward: 18,432 and 61,440 bytes a rank."""
    layout = Layout.zigzag(96, 4)
    forward = sent(of_ring(layout, CAUSAL, SMALL))
    keys = sent(of_ring(layout, CAUSAL, SMALL, travels="keys"))
    assert forward == [18432] * 4
    assert [a + b for a, b in zip(forward, keys, strict=True)] == [61440] * 4
    half = SMALL._replace(itemsize=2)
    assert sent(of_ring(layout, CAUSAL, half)) == [9216] * 4


@pytest.mark.parametrize(
    "ranks, sizes",
    list(product([1, 2, 3, 4, 8, 16], [SMALL, LARGE, Sizes(8, 8, 64, 32, 2, batch=3)])),
)
def test_a_causal_zigzag_against_closed_formulas(ranks, sizes):
    """n ranks of t tokens: n - 1 hops of K and V; n of float32 dK and dV; the queries likewise."""
    t = 64
    n, layout = ranks, Layout.zigzag(t * ranks, ranks)
    b, hq, hk, d, dv, item, *_ = (sizes.batch, *sizes)
    key = b * hk * (d + dv)
    hops = n - 1
    assert sent(of_ring(layout, CAUSAL, sizes)) == [hops * t * key * item] * n
    home = n * (n > 1)
    expected = hops * t * key * item + home * t * key * 4
    assert sent(of_ring(layout, CAUSAL, sizes, travels="keys")) == [expected] * n
    query = b * hq * ((d + dv) * item + 8)
    expected_q = hops * t * query + home * t * b * hq * d * 4
    assert sent(of_ring(layout, CAUSAL, sizes, travels="queries")) == [expected_q] * n
    backwards = sent_in_backwards(layout, CAUSAL, False, sizes)
    assert backwards == {"keys": n * expected, "queries": n * expected_q}
    # Gathering: everything to everybody, but for chunks that a rank does not see.
    chunk = t // 2
    pairs = sum(
        peer != rank and (chunk_of <= 2 * n - 1 - peer)
        for rank in range(n)
        for chunk_of in (rank, 2 * n - 1 - rank)
        for peer in range(n)
    )
    assert sum(sent(of_gather(layout, CAUSAL, sizes))) == pairs * chunk * key * item
    both = sum(sent(of_gather(layout, CAUSAL, sizes, backward=True)))
    assert both == pairs * chunk * key * (item + 4)


def test_windows_send_what_is_seen():
    """One hop, and none of the last rank's keys: nobody else sees them."""
    layout = Layout.contiguous(96, 4)
    assert sent(of_ring(layout, Band(20, 0), SMALL)) == [6144] * 3 + [0]
    back = sent(of_ring(layout, Band(20, 0), SMALL, travels="keys"))
    # K and V go on, dK and dV there with the sum, and home.
    assert back == [6144 * 2, 6144 * 3, 6144 * 3, 6144]


@pytest.mark.parametrize(
    "wrt, keys", [(("q", "k", "v"), 42), (("q",), 18), (("k",), 30), ((), 18)]
)
def test_gradients_that_nobody_wants_stay(wrt, keys):
    found = sent_in_backwards(Layout.zigzag(96, 4), CAUSAL, False, SMALL, wrt)
    query = 24 * 3 * 4 * (32 * 4 + 8) + 24 * 4 * 4 * 16 * 4 * ("q" in wrt)
    assert found == {"keys": 4 * keys * 1024, "queries": 4 * query}


def test_what_travels_is_what_is_smaller():
    """Queries without grouped heads in 16 bits; keys where four heads share them."""
    for heads_kv, expected in ((32, "queries"), (8, "keys"), (1, "keys")):
        sizes = LARGE._replace(heads_kv=heads_kv)
        assert what_travels(LONG, CAUSAL, False, sizes) == expected


def test_heads_send_what_was_counted():
    """18,432 bytes forward with as many key-value heads as ranks; lse goes home besides."""
    layout, sizes = Layout.contiguous(96, 4), SMALL._replace(heads_kv=4)
    merged, mine = layout.merged(4), share_of(sizes, 4)
    across = of_gather(merged, CAUSAL, mine)
    turns = of_heads(layout, sizes, 4, across)
    lse = 24 * 3 * 4
    assert sent(turns) == [18432 + lse] * 4
    assert [turn.what for turn in turns[0]] == [
        "heads for tokens",
        "key-value heads 0 to 0",
        "tokens for heads",
    ]
    # dout with q, and float32 gradients in place of out; lse and delta.
    across = of_gather(merged, CAUSAL, mine, backward=True)
    back = of_heads(layout, sizes, 4, across, backward=True)
    assert sent(back) == [18432 // 4 * 7 + 2 * lse] * 4


def test_keys_that_ranks_share_are_sent_to_those_that_use_them():
    """One key-value head: each rank gets all of it, and none gets a repeated one."""
    layout, sizes = Layout.contiguous(96, 4), SMALL._replace(heads_kv=1)
    across = of_gather(layout.merged(4), CAUSAL, share_of(sizes, 4))
    row = 16 * 4
    assert sent(of_heads(layout, sizes, 4, across)) == [24 * 3 * (4 * row + 4)] * 4


@pytest.mark.parametrize("backward", [False, True])
def test_what_is_sent_is_received(backward):
    layout = Layout.zigzag_documents([41, 3, 30, 17], 4)
    rings = [None] if not backward else ["keys", "queries"]
    found = [of_ring(layout, CAUSAL, SMALL, travels=travels) for travels in rings]
    found.append(of_gather(layout, CAUSAL, SMALL, backward=backward))
    inner = share_of(SMALL, 2)
    across = of_ring(layout.merged(2), CAUSAL, inner, travels="keys" if backward else None)
    found.append(of_heads(layout, SMALL, 2, across, backward=backward))
    for turns in found:
        assert len({len(of_rank) for of_rank in turns}) == 1
        for turn in zip(*turns, strict=True):
            assert sum(t.sent for t in turn) == sum(t.received for t in turn)
        scores = sum(turn.scores for of_rank in turns for turn in of_rank)
        assert scores == 4 * sum(n * (n + 1) // 2 for n in layout.lengths)


def test_codes_are_smaller():
    """A scale for each token and head: 0.63 of 16 bits at head_dim 16, 0.52 at 128."""
    small, large = SMALL._replace(itemsize=2), LARGE
    for sizes, share in ((small, 0.625), (large, 0.516)):
        coded = sizes._replace(recipe=Fp8Recipe("token", hadamard=False))
        assert coded.keys(96) / sizes.keys(96) == pytest.approx(share, abs=0.001)
    in_blocks = LARGE._replace(recipe=Fp8Recipe("block", block=32, hadamard=False))
    assert in_blocks.keys(33) == 8 * (33 * 256 + 2 * 2 * 4)
    # A rotated row travels with its padding.
    rotated = small._replace(recipe=Fp8Recipe("token", hadamard=True))
    assert rotated.keys(1) == 2 * (64 + 16 + 8)


def test_arrays_of_a_message_are_aligned():
    assert in_one_message([]) == 0
    assert in_one_message([100]) == 100
    assert in_one_message([100, 8, 8]) == 264


def test_memory_is_that_of_the_table():
    """DISTRIBUTED.md, section 5, in MiB; lse and delta besides."""
    rows = LARGE.rows(2**14) / MIB
    ring = memory_of_ring(LONG, CAUSAL, 3, LARGE)
    assert {name: size / MIB for name, size in ring.items()} == {
        "keys and values": 128,
        "results in float32": 256,
        "a part": 256 + rows,
    }
    backward = memory_of_ring(LONG, CAUSAL, 3, LARGE, travels="keys")
    assert {name: size / MIB for name, size in backward.items()} == {
        "keys and values": 128,
        "dK and dV on their way": 3 * 128,
        "results in float32": 256,
        "a part": 256,
        "delta": rows,
    }
    assert {n: s / MIB for n, s in memory_of_gather(LONG, CAUSAL, 3, LARGE).items()} == {
        "keys and values": 128
    }
    # Each of the 7 others has a share of both chunks of the last rank, of 8 MiB each.
    shares = memory_of_gather(LONG, CAUSAL, 7, LARGE, backward=True)
    assert {name: size / MIB for name, size in shares.items()} == {
        "keys and values": 128,
        "shares of dK and dV": 128,
        "arriving shares": 7 * 2 * 8,
        # dQ of both chunks, which are neighbours, in the 4 heads of the group; dK and dV of the
        # 9 chunks that they see.
        "a part": 32 + 9 * 8,
        "results in float32": 256 + 2 * 64,
    }
    mine = share_of(LARGE, 8)
    assert memory_of_heads(mine, LARGE, 2**17, 2**14) == {
        "heads of all tokens": 320 * MIB + LARGE.rows(2**14)
    }


def test_ranks_that_share_a_head_have_it_each():
    """32 ranks, 8 key-value heads: of each key four copies leave."""
    share = share_of(LARGE, 32)
    assert (share.heads_q, share.heads_kv) == (1, 1)
    q, keys = 2**17 * 128 * 2, 2 * 2**17 * 128 * 2
    found = memory_of_heads(share, LARGE, 2**17, 2**12)
    assert found == {"heads of all tokens": q + 2 * keys}


def test_one_rank_takes_no_memory():
    alone = Layout.zigzag(64, 1)
    assert memory_of_gather(alone, CAUSAL, 0, SMALL) == {}
    assert sum(memory_of_ring(alone, CAUSAL, 0, SMALL).values()) == 0


def test_groups_of_heads_fit_the_workspace():
    one_head = 2 * 2**17 * 256 * 2
    assert gathered_at_once(LONG, LARGE) == 1
    assert gathered_at_once(LONG, LARGE, 4 * one_head) == 4
    # A divisor of the heads; one, where even that is too much.
    assert gathered_at_once(LONG, LARGE, 7 * one_head) == 4
    assert gathered_at_once(LONG, LARGE, 1) == 1
    assert gathered_at_once(LONG, LARGE, 4 * one_head, backward=True) == 1
    assert gathered_at_once(LONG, LARGE, 24 * one_head, backward=True) == 8


def test_auto_gathers_where_memory_allows():
    assert best_method(LONG, CAUSAL, LARGE) == "gather"
    # Long, few heads of queries: a ring takes less.
    narrow = Sizes(1, 1, 128, 128, 4)
    assert best_method(Layout.zigzag(2**17, 16), Band(), narrow) == "ring"
    assert best_method(LONG, CAUSAL, LARGE, max_workspace=127 * MIB) == "ring"
    assert best_method(LONG, CAUSAL, LARGE, max_workspace=128 * MIB) == "gather"


def test_auto_does_not_post_too_many_messages():
    documents = Layout.zigzag_documents([64] * 200, 8)
    assert best_method(documents, CAUSAL, SMALL) == "ring"


@pytest.mark.parametrize(
    "ranks, heads_q, heads_kv, words",
    [(4, 6, 2, "query heads .* got 6 heads and 4"), (4, 12, 3, "key-value heads .* got 3 heads")],
)
def test_heads_that_do_not_divide_are_refused(ranks, heads_q, heads_kv, words):
    with pytest.raises(ValueError, match=words):
        expect_heads(ranks, heads_q, heads_kv)


def test_shares_of_heads():
    assert [(s.q.start, s.kv.start, s.kv.stop) for s in shares_of(4, 8, 2)] == [
        (0, 0, 1),
        (2, 0, 1),
        (4, 1, 2),
        (6, 1, 2),
    ]
    assert [(s.kv.start, s.kv.stop) for s in shares_of(2, 8, 4)] == [(0, 2), (2, 4)]
