"""What `explain` says of each rank, its table, and bad input."""

import dataclasses

import pytest

from numflash.distributed import Layout, explain
from numflash.problem.fp8 import Fp8Recipe
from numflash.runtime.errors import UnsupportedError

HEADS = {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": 16}
LAYOUT = Layout.zigzag(96, 4)


def test_numbers_of_a_ring():
    found = explain(LAYOUT, **HEADS, dtype="float32", method="ring", causal=True)
    assert found.method == ("ring",) and found.travels is None
    assert found.sent == found.received == (18432,) * 4
    # 4 operations for each of 16 columns, in each of 4 heads.
    assert sum(found.work) == 96 * 97 // 2 * 4 * 4 * 16
    assert found.balance == pytest.approx((1, 1), abs=0.02)
    assert found.workspace == 12288 + 24 * 4 * 16 * 4 + 24 * 4 * 4
    back = explain(LAYOUT, **HEADS, dtype="float32", method="ring", causal=True, backward=True)
    assert back.travels == "keys" and set(back.sent) == {61440 - 18432}
    assert sum(back.work) == 2.5 * sum(found.work)


def test_a_batch_multiplies_everything():
    one, three = (
        explain(LAYOUT, **HEADS, method="ring", causal=True, batch=batch) for batch in (1, 3)
    )
    for name in ("sent", "received", "work"):
        assert getattr(three, name) == tuple(3 * x for x in getattr(one, name))
    assert three.workspace == 3 * one.workspace


def test_a_forced_traveller_is_heeded():
    asked = {**HEADS, "method": "ring", "backward": True, "causal": True, "dtype": "float32"}
    queries = explain(LAYOUT, **asked, travels="queries")
    assert queries.travels == "queries"
    assert max(queries.sent) == 3 * 24 * 4 * (32 * 4 + 8) + 4 * 24 * 4 * 16 * 4


def test_auto_says_what_it_chose():
    assert explain(LAYOUT, **HEADS, causal=True).method == ("gather",)
    documents = Layout.zigzag_documents([64] * 300, 4)
    assert explain(documents, **HEADS, causal=True).method == ("ring",)
    assert explain(LAYOUT, **HEADS, causal=True, max_workspace=1).method == ("ring",)


@pytest.mark.parametrize("across", ["gather", "ring"])
def test_two_methods(across):
    found = explain(LAYOUT, **HEADS, method=("heads", across), groups=2, causal=True)
    assert found.method == ("heads", across)
    first, *_, last = found.turns[3]
    assert (first.what, last.what) == ("heads for tokens", "tokens for heads")
    # A rank gives half its heads of q, k and v to its neighbour, in 16 bits.
    assert first.sent == 24 * (2 + 2 * 1) * 16 * 2
    assert last.sent == 24 * 2 * (16 * 2 + 4)
    assert {turn.heads for turn in found.turns[0] if turn.calls} <= {1, 2}
    assert sum(found.work) == sum(explain(LAYOUT, **HEADS, causal=True).work)


def test_heads_alone_and_groups_of_one():
    sizes = {**HEADS, "num_heads_kv": 4}
    found = explain(LAYOUT, **sizes, method="heads", causal=True)
    assert found.method == ("heads",)
    assert list(found.memory[0]) == ["heads of all tokens"]
    ring = explain(LAYOUT, **sizes, method=("heads", "ring"), groups=1, causal=True)
    assert ring.method == ("ring",)


def test_codes_on_the_wire():
    numbers, codes = (
        explain(LAYOUT, **HEADS, method="ring", causal=True, wire=wire) for wire in (None, "e4m3")
    )
    assert codes.sent[0] / numbers.sent[0] == 0.625
    assert "keys and values as numbers" in codes.memory[0]
    with pytest.raises(ValueError, match="multiple=16"):
        recipe = Fp8Recipe("block", block=16, hadamard=False)
        explain(LAYOUT, **HEADS, method="ring", wire=recipe)


@pytest.mark.parametrize(("head_dim", "copied"), [(128, 0), (40, 2 * 64)])
def test_codes_that_calls_multiply_become_no_numbers(head_dim, copied):
    asked = {**HEADS, "head_dim": head_dim, "method": "ring", "wire": "e4m3"}
    numbers, codes = (explain(LAYOUT, **asked, precision=x).memory[0] for x in (None, "fp8"))
    assert numbers["keys and values as numbers"] and "keys and values as numbers" not in codes
    tokens = LAYOUT.tokens(0)
    assert codes.get("padded codes", 0) == tokens * HEADS["num_heads_kv"] * copied


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, UnsupportedError, 'explain takes no precision=.fp8.: .*wire="e4m3" quantises'),
        ({"wire": "e4m3", "backward": True}, UnsupportedError, "in a backward"),
        ({"wire": "e4m3", "method": "heads"}, UnsupportedError, "got method='heads'"),
        ({"wire": "e4m3", "dtype": "float32"}, TypeError, "float16 and bfloat16"),
        ({"precision": "auto"}, UnsupportedError, "no precision='auto'"),
        ({"precision": "int8"}, ValueError, "precision must be one of"),
    ],
    ids=str,
)
def test_a_precision_that_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        explain(LAYOUT, **HEADS, **{"precision": "fp8"} | given)


def test_time_is_predicted_from_given_figures_alone():
    asked = {**HEADS, "method": "ring", "causal": True, "dtype": "float32"}
    assert explain(LAYOUT, **asked).seconds is None
    assert "predicted" not in str(explain(LAYOUT, **asked))
    wires = explain(LAYOUT, **asked, bandwidth=1e6)
    assert wires.seconds == pytest.approx((6.144e-3,) * 3 + (0,))
    both = explain(LAYOUT, **asked, bandwidth=1e6, flops=1e6)
    calls = [max(t.scores for t in now) * 64 / 1e6 for now in zip(*both.turns, strict=True)]
    assert both.seconds == pytest.approx(
        [max(pair) for pair in zip(calls, wires.seconds, strict=True)]
    )
    assert str(both).splitlines()[-1].startswith("predicted from 1e-06 TFLOP/s and 0.001 ")


def test_the_table_of_a_window():
    layout = Layout.contiguous(4096, 4)
    found = explain(layout, **HEADS, method="ring", window_size=(500, 0))
    assert str(found).splitlines() == [
        "ring, forward: 4096 tokens on 4 ranks",
        "busiest rank 1.07 of the mean, in lockstep 1.07",
        "",
        "turn               calls    mean work    most work  most sent  most received",
        "   1  step 1 of 2      1  99.27 MFLOP  99.27 MFLOP    128 KiB        128 KiB",
        "   2  step 2 of 2    0-1  24.05 MFLOP  32.06 MFLOP          0              0",
        "",
        "sent by a rank, at most: 128 KiB",
        "memory beyond operands and results: 644.8 KiB (keys and values 256 KiB, results in "
        "float32 256 KiB, a part 132.8 KiB)",
    ]


def test_the_table_of_a_rank():
    layout = Layout.contiguous(4096, 4)
    found = explain(layout, **HEADS, method="ring", window_size=(500, 0))
    assert found.of_rank(1).splitlines() == [
        "rank 1 of 4, 1024 tokens",
        "  1 step 1 of 2: sends 128 KiB, receives 128 KiB",
        "      queries 0 to 1023, keys 0 to 1023, 4 heads, sees 500 before and 0 after, shift 0, "
        "99.27 MFLOP",
        "  2 step 2 of 2: sends 0, receives 0",
        "      queries 0 to 499, keys 0 to 1023, 4 heads, sees 500 before and 0 after, "
        "shift 1024, 32.06 MFLOP",
    ]
    with pytest.raises(ValueError, match="rank must be from 0 to 3, got 4"):
        found.of_rank(4)


def test_an_explanation_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        explain(LAYOUT, **HEADS).layout = None


def test_nothing_to_do():
    found = explain(Layout.zigzag(0, 2), **HEADS, causal=True)
    assert (found.work, found.sent, found.balance) == ((0, 0), (0, 0), (1, 1))
    assert "0 tokens on 2 ranks" in str(found)


@pytest.mark.parametrize(
    "changed, error, words",
    [
        ({"layout": 8}, TypeError, "layout must be a Layout, got 8"),
        ({"num_heads_q": 4.0}, TypeError, "num_heads_q must be an integer"),
        ({"num_heads_kv": 0}, ValueError, "num_heads_kv must be at least 1"),
        ({"num_heads_kv": 3}, ValueError, "num_heads_q must be a multiple of num_heads_kv"),
        ({"head_dim": 0}, ValueError, "head_dim must be at least 1"),
        ({"head_dim_v": 512}, UnsupportedError, "head_dim_v must be at most 256"),
        ({"dtype": "float64"}, ValueError, "dtype must be one of float16"),
        ({"batch": -1}, ValueError, "batch must be at least 0"),
        ({"method": "star"}, ValueError, "method must be one of auto, gather, ring, heads"),
        ({"method": ("ring", "heads")}, ValueError, "method must be .*for two"),
        ({"method": ("heads", "ring")}, ValueError, "groups must be given"),
        ({"method": ("heads", "ring"), "groups": 3}, ValueError, "divide the 4 ranks, got 3"),
        ({"groups": 2}, ValueError, "groups must be None with method='auto'"),
        ({"method": "heads", "num_heads_q": 6}, ValueError, "query heads that its ranks"),
        ({"causal": 1}, TypeError, "causal must be"),
        ({"window_size": 5}, TypeError, "window_size must be a pair"),
        ({"window_size": (-2, 0)}, ValueError, "window_size must be a pair"),
        ({"backward": None}, TypeError, "backward must be True or False"),
        ({"by_position": 0}, TypeError, "by_position must be True or False"),
        ({"travels": "values"}, ValueError, "travels must be one of auto, keys, queries"),
        ({"wire": "e5m2"}, ValueError, "wire must be None"),
        ({"max_workspace": -1}, ValueError, "max_workspace must be at least 0"),
        ({"flops": "600"}, TypeError, "flops must be a number"),
        ({"bandwidth": 0}, ValueError, "bandwidth must be above 0"),
        ({"bandwidth": float("inf")}, ValueError, "bandwidth must be above 0"),
    ],
    ids=str,
)
def test_bad_input_is_refused(changed, error, words):
    asked = {"layout": LAYOUT, **HEADS, **changed}
    with pytest.raises(error, match=words):
        explain(asked.pop("layout"), **asked)
