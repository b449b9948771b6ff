"""Each method on several ranks: results and gradients against float64, by one GPU's budgets."""

from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest

from numflash import math
from numflash.api.comparison import compare, compare_each
from numflash.distributed import (
    CommunicatorError,
    Layout,
    attention,
    attention_backward,
    local,
)
from numflash.distributed import steps as schedules
from numflash.distributed.steps import Exchange
from tests.support.covering import ALL, FULL, covering, some, thorough
from tests.support.ranks import grid, late, on_ranks

HEADS = {"alike": (2, 2), "one key-value head": (2, 1), "grouped": (4, 2)}
LENGTHS = (6, 1, 5, 2)


class Asked(NamedTuple):
    """An option, and the layout that goes with it."""

    options: dict
    layout: str = "zigzag"
    tokens: int = 14
    batch: int = 1
    wrt: tuple[str, ...] = ("q", "k", "v")
    dlse: bool = False


def _rising(heads: int) -> np.ndarray:
    return np.linspace(-1, 2, heads, dtype=np.float32)


# In an order in which dear ones meet methods of few calls: see `rows`.
ASKED = {
    "documents": Asked({"causal": True}, "documents"),
    "alibi": Asked(
        {"causal": True, "alibi_slopes": _rising(4)}, wrt=("q", "k", "v", "alibi_slopes")
    ),
    "window": Asked({"window_size": (5, 2)}, "contiguous"),
    "causal window": Asked({"causal": True, "window_size": (7, -1)}),
    "softcap, scale": Asked({"causal": True, "softcap": 2.0, "softmax_scale": 0.5}),
    "few tokens": Asked({"causal": True}, tokens=5),
    "score_mod": Asked(
        {"causal": True, "score_mod": lambda s, b, h, i, j: s - 0.05 * (i - j) * h}
    ),
    "full": Asked({}, "contiguous"),
    "window in documents": Asked({"window_size": (3, 1)}, "documents"),
    "causal": Asked({"causal": True}),
    "dropout": Asked({"causal": True, "dropout_p": 0.25, "seed": 7}, "16", tokens=40),
    "bias": Asked(
        {"bias": np.random.default_rng(3).standard_normal((4, 14, 14)).astype(np.float32)},
        wrt=("bias", "q", "k", "v"),
    ),
    "batch": Asked({"causal": True}, batch=2, tokens=9),
    "mask": Asked({"mask": np.random.default_rng(4).random((14, 14)) < 0.6}),
    "dlse": Asked({"causal": True}, dlse=True),
    "sinks": Asked(
        {"window_size": (6, 0), "sinks": _rising(4)}, "contiguous", wrt=("sinks", "q", "k", "v")
    ),
    "mask_mod": Asked({"mask_mod": lambda b, h, i, j: math.abs(i - j) < 4 + h}, "contiguous"),
    "table": Asked(
        {
            "causal": True,
            "score_mod": lambda s, b, h, i, j, table: s + table[h, i - j],
            "aux": (np.random.default_rng(6).standard_normal((4, 14)).astype(np.float32),),
        },
        wrt=("aux0", "q"),
    ),
    "slopes in documents": Asked(
        {"causal": True, "alibi_slopes": _rising(4)}, "documents", wrt=("alibi_slopes", "q")
    ),
    "functions in documents": Asked(
        {
            "window_size": (4, 1),
            "score_mod": lambda s, b, h, i, j: s * (1 + 0.2 * b) - 0.05 * (i + j) * h,
            "mask_mod": lambda b, h, i, j: i + j + b != 5,
        },
        "documents",
    ),
}
METHODS = {
    "gather": ("gather", (2, 3, 4)),
    "ring": ("ring", (2, 3, 4)),
    "heads": ("heads", (2, 4)),
    "heads and gather": (("heads", "gather"), (4,)),
    "heads and ring": (("heads", "ring"), (4,)),
}
PLACES = [(name, n) for name, (_, counts) in METHODS.items() for n in counts]


def rows() -> list[tuple[str, int, str, str]]:
    """Each option, and each method on each number of ranks: (method, ranks, option, heads)."""
    every = [
        (name, n, option, heads)
        for (name, n), option, heads in product(PLACES, ASKED, HEADS)
        if name != "heads" or HEADS[heads][0] % n == 0
    ]
    if FULL:
        return covering(every, lambda row: (row[:2], *row[2:]), cost=lambda row: row[1])
    found = []
    for n, option in enumerate(ASKED):
        # Two methods far from each other; all take turns.
        for place in (PLACES[n % len(PLACES)], PLACES[(n + 5) % len(PLACES)])[: 1 + ALL]:
            heads = [row[3] for row in every if row[:3] == (*place, option)]
            # Four query heads take twice as long as two.
            found.append((*place, option, heads[n % max(1, len(heads) - 1)]))
    # `test_ring` has most other options.
    kept = "causal", "window", "mask_mod", "dropout"
    return [row for row in found if ALL or row[2] in kept]


def of_heads(asked: Asked, heads: str) -> Asked:
    """With arrays of as many query heads as there are."""
    options = {
        name: x[: HEADS[heads][0]] if name in ("alibi_slopes", "sinks", "bias") else x
        for name, x in asked.options.items()
    }
    return asked._replace(options=options)


def layout_of(asked: Asked, ranks: int) -> Layout:
    if asked.layout == "documents":
        return Layout.zigzag_documents(LENGTHS, ranks)
    if asked.layout == "contiguous":
        return Layout.contiguous(asked.tokens, ranks)
    return Layout.zigzag(asked.tokens, ranks, multiple=16 if asked.layout == "16" else 1)


def inputs(asked: Asked, heads: str) -> dict[str, np.ndarray]:
    """q, k, v, dout of all tokens, and dlse."""
    rng, (heads_q, heads_kv) = np.random.default_rng(1), HEADS[heads]
    found = {
        name: rng.standard_normal((asked.batch, asked.tokens, n, dim)).astype(np.float16)
        for name, n, dim in (
            ("q", heads_q, 16),
            ("k", heads_kv, 16),
            ("v", heads_kv, 24),
            ("dout", heads_q, 24),
        )
    }
    if asked.dlse:
        shape = asked.batch, heads_q, asked.tokens
        found["dlse"] = rng.standard_normal(shape).astype(np.float32)
    return found


def results_of(comms, method, layout: Layout, asked: Asked, whole: dict, **more) -> dict:
    """out, lse and gradients of all tokens, by name."""

    def work(comm) -> dict:
        pair = comm if isinstance(comm, tuple) else (comm,)
        rank = sum(c.rank * n for c, n in zip(pair, (1, pair[0].size), strict=False))
        of_tokens = {name: layout.shard(x, rank) for name, x in whole.items() if name != "dlse"}
        dout, *operands = (of_tokens.pop(name) for name in ("dout", "q", "k", "v"))
        given = {"layout": layout, "comm": comm, "method": method, **asked.options, **more}
        out, lse = attention(*operands, return_lse=True, **given)
        found = {"out": out, "lse": lse}
        if asked.wrt:
            if "dlse" in whole:
                given["dlse"] = layout.shard(whole["dlse"], rank, axis=2)
            given["wrt"] = asked.wrt
            gradients = attention_backward(dout, *operands, out, lse, **given)
            found |= {f"d{n}": x for n, x in zip(asked.wrt, gradients, strict=True)}
        return found

    parts = on_ranks(layout.ranks, work, comms=comms)
    found = {}
    for name, first in parts[0].items():
        if name not in ("out", "lse", "dq", "dk", "dv"):
            assert all((part[name] == first).all() for part in parts)
            found[name] = first
            continue
        axis = 2 if name == "lse" else 1
        shape = (*first.shape[:axis], layout.seqlen, *first.shape[axis + 1 :])
        found[name] = np.full(shape, np.nan, first.dtype)
        for rank, part in enumerate(parts):
            found[name].swapaxes(0, axis)[layout.indices(rank)] = part[name].swapaxes(0, axis)
    return found


def report_of(found: dict, asked: Asked, whole: dict):
    """The errors against float64, next to their budgets."""
    whole, options = dict(whole), dict(asked.options)
    if asked.wrt:
        options["wrt"] = asked.wrt
    if "dlse" in whole:
        options["dlse"] = whole.pop("dlse")
    if asked.layout != "documents":
        return compare(found, **whole, precision="float16", **options)
    ends = np.cumsum((0, *LENGTHS), dtype=np.int32)
    options |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "layout": "thd"}
    found, whole = (
        {name: x if x.ndim == 1 else x[0] for name, x in each.items()} for each in (found, whole)
    )
    return compare_each(found, **whole, precision="float16", **options)


def comms_of(name: str, ranks: int, seed: int = 0):
    make = partial(late, seed=seed)
    return make(ranks) if isinstance(METHODS[name][0], str) else grid(2, ranks // 2, make)


@pytest.mark.parametrize(("name", "ranks", "option", "heads"), rows())
def test_results_and_gradients_are_within_one_gpus_budgets(name, ranks, option, heads):
    """Under communicators that deliver late, at random times."""
    asked = of_heads(ASKED[option], heads)
    whole, layout = inputs(asked, heads), layout_of(asked, ranks)
    found = results_of(comms_of(name, ranks), METHODS[name][0], layout, asked, whole)
    report = report_of(found, asked, whole)
    assert report.passed, f"\n{report}"


@thorough
@pytest.mark.parametrize("name", some(METHODS, "gather", "ring"))
def test_sinks_of_documents_have_the_gradient_of_each_row_once(name):
    """Each rank has two pieces of a document, in calls of their own that take all its rows."""
    asked = of_heads(
        Asked({"causal": True, "sinks": _rising(4)}, "documents", wrt=("sinks",)), "alike"
    )
    whole, layout = inputs(asked, "alike"), layout_of(asked, 2)
    found = results_of(comms_of(name, 2), METHODS[name][0], layout, asked, whole)
    report = report_of(found, asked, whole)
    assert report.passed, f"\n{report}"


@thorough
@pytest.mark.parametrize("name", some(METHODS, "heads and ring"))
def test_the_bits_do_not_depend_on_when_messages_come(name):
    ranks = METHODS[name][1][-2:][0]
    asked, layout = ASKED["causal"]._replace(tokens=10), Layout.zigzag(10, ranks)
    whole = inputs(asked, "alike")
    first, second = (
        results_of(comms_of(name, ranks, seed), METHODS[name][0], layout, asked, whole)
        for seed in (1, 2)
    )
    for key, x in first.items():
        np.testing.assert_array_equal(x, second[key], err_msg=key)


def _without_a_message(gathering):
    """A schedule in which rank 1 gets nothing of rank 0, and rank 0 sends it nothing."""

    def broken(layout, band):
        found = list(gathering(layout, band))
        for rank, side, peer in ((0, "sends", 1), (1, "receives", 0)):
            kept = tuple(m for m in getattr(found[rank].fetch, side) if m.peer != peer)
            fetch = found[rank].fetch._replace(**{side: kept})
            found[rank] = found[rank]._replace(fetch=fetch, is_whole=False)
        return tuple(found)

    return broken


def _in_another_order(gathering):
    """A schedule that takes the first and the second segment of rank 0 for each other."""

    def broken(layout, band):
        found = list(gathering(layout, band))
        (rows, place), (other_rows, other) = found[0].own
        found[0] = found[0]._replace(own=((rows, other), (other_rows, place)))
        return tuple(found)

    return broken


@pytest.mark.parametrize("breaks", [_without_a_message, _in_another_order])
def test_a_wrong_schedule_gives_wrong_results(breaks, monkeypatch):
    monkeypatch.setattr(schedules, "gathering", breaks(schedules.gathering))
    asked, layout = ASKED["causal"]._replace(wrt=(), tokens=16), Layout.zigzag(16, 2)
    whole = inputs(asked, "grouped")
    found = results_of(comms_of("gather", 2), "gather", layout, asked, whole)
    del whole["dout"]
    assert not report_of(found, asked, whole).passed


def test_a_message_that_never_comes_is_an_error(monkeypatch):
    def broken(layout, band):
        found = list(gathering(layout, band))
        found[0] = found[0]._replace(fetch=Exchange((), found[0].fetch.receives))
        return tuple(found)

    gathering = schedules.gathering
    monkeypatch.setattr(schedules, "gathering", broken)
    asked, layout = ASKED["causal"]._replace(wrt=(), tokens=8), Layout.zigzag(8, 2)
    whole = inputs(asked, "grouped")
    with pytest.raises(CommunicatorError, match=r"keys and values of heads 0 to 0 of 2: rank"):
        results_of(local(2, timeout=1.0), "gather", layout, asked, whole)
