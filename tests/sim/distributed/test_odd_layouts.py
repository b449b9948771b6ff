"""Layouts that nobody would choose: cut anywhere, in any order, with ranks that have no tokens.

Forward and gradients by each method, with calls as dense arithmetic.
"""

import random
from itertools import pairwise

import numpy as np
import pytest

from numflash.distributed import Layout, attention, attention_backward, local_calls, ring
from tests.support import dense_calls
from tests.support.covering import ALL
from tests.support.ranks import Late, on_ranks

EACH = 40 if ALL else 5
METHODS = ("gather", "ring", "heads", "auto")


def layout_of(choose: random.Random, ranks: int) -> Layout:
    """Of documents of up to 20 tokens, whose pieces ranks have got at random; or a usual one."""
    lengths = [choose.randint(0, 20) for _ in range(choose.randint(1, 5))]
    if choose.random() < 0.3:
        return Layout.zigzag_documents(lengths, ranks)
    pieces = []
    for document, length in enumerate(lengths):
        cuts = sorted({0, length, *(choose.randint(0, length) for _ in range(4))})
        pieces += [(document, a, b - a) for a, b in pairwise(cuts)]
    choose.shuffle(pieces)
    who = choose.sample(range(ranks), choose.randint(1, ranks))  # the others have none
    held = [[] for _ in range(ranks)]
    for piece in pieces:
        held[choose.choice(who)].append(piece)
    return Layout.of_segments(lengths, held)


def expected(layout: Layout, window: tuple[int, int], q, k, v, dout) -> dict[str, np.ndarray]:
    """On one GPU."""
    positions = np.concatenate([np.arange(n) for n in layout.lengths])
    documents = np.repeat(np.arange(len(layout.lengths)), layout.lengths)
    ahead, (left, right) = positions - positions[:, None], window
    seen = documents == documents[:, None]
    seen &= (ahead <= (right if right >= 0 else 99)) & (-ahead <= (left if left >= 0 else 99))
    out, lse = dense_calls.results(q, k, v, seen)
    delta = dense_calls.row_sums(dout, out)
    return {"out": out} | dense_calls.gradients(dout, q, k, v, lse, delta, seen)


@pytest.mark.parametrize("seed", range(EACH))
@pytest.mark.parametrize("method", METHODS)
def test_every_layout_gives_what_one_gpu_gives(monkeypatch, method, seed):
    dense_calls.replace_calls(monkeypatch, local_calls, ring)
    choose, rng = random.Random(f"{method} {seed}"), np.random.default_rng(seed)
    ranks = choose.choice([2, 3, 4])
    layout = layout_of(choose, ranks)
    heads = choose.choice([(4, 4), (4, 2), (4, 1), (6, 3)])
    if method == "heads":
        heads = choose.choice([(ranks, 1), (ranks, ranks), (2 * ranks, ranks)])
    batch, window = (
        choose.choice([1, 2]),
        choose.choice([(-1, -1), (-1, 0), (5, 0), (3, 2), (0, 0)]),
    )
    travels, is_late = choose.choice(["auto", "keys", "queries"]), choose.random() < 0.2
    wrt = choose.choice([("q", "k", "v"), ("k",), ("v", "q"), ("q",)])
    dims = (heads[0], 16), (heads[1], 16), (heads[1], 8), (heads[0], 8)
    whole = [rng.standard_normal((batch, layout.seqlen, *x)).astype("f4") for x in dims]
    more = {} if method == "heads" else {"travels": travels}

    def work(comm) -> list[np.ndarray]:
        own = [layout.shard(x, comm.rank) for x in whole]
        used = Late(comm, seed, 0.001) if is_late else comm
        given = {"layout": layout, "comm": used, "method": method, "window_size": window}
        for _ in range(2):  # cold, and warm
            out, lse = attention(*own[:3], return_lse=True, **given)
            found = attention_backward(own[3], *own[:3], out, lse, wrt=wrt, **more, **given)
        return [layout.gather(x, comm) for x in (out, *found)]

    right = expected(layout, window, *whole)
    for of_rank in on_ranks(ranks, work):
        for name, x in zip(("out", *wrt), of_rank, strict=True):
            np.testing.assert_allclose(x, right[name], atol=2e-5, err_msg=name)
