"""What `numflash.distributed.attention` refuses, before anything travels and on all ranks."""

import threading

import numpy as np
import pytest

from numflash import UnsupportedError
from numflash.distributed import (
    CommunicatorError,
    Layout,
    attention,
    attention_backward,
    call,
    local,
    local_calls,
)
from tests.support.ranks import grid, on_ranks

SHAPE = 1, 8, 2, 16
X = np.zeros(SHAPE, np.float16)
LAYOUT, DOCUMENTS = Layout.zigzag(8, 1), Layout.zigzag_documents([3, 5], 1)
ONES = np.ones(2, np.int32)


def _identity(score, b, h, i, j):
    return score


# (what is given otherwise, the error, what its message says)
REFUSED = {
    "shift": ({"shift": 1}, ValueError, "no shift: positions are those that the layout says"),
    "causal_align": ({"causal_align": "top_left"}, ValueError, "no causal_align"),
    "origin": ({"origin": (0, 0, 0)}, ValueError, "no origin"),
    "block_mask": ({"block_mask": object()}, TypeError, "block_mask must be a BlockMask"),
    "lengths": ({"seqlens_k": ONES}, UnsupportedError, "no seqlens_k: the layout says"),
    "starts": ({"starts_q": ONES}, UnsupportedError, "no starts_q: the layout says"),
    "auto": (
        {"precision": "auto"},
        UnsupportedError,
        "no precision='auto': it decides on the device, by each rank's own numbers",
    ),
    "budget of auto": (
        {"max_rel_error": 0.1},
        UnsupportedError,
        'no max_rel_error: it is for precision="auto": it decides on the device',
    ),
    "unknown option": (
        {"casual": True},
        TypeError,
        "unknown option casual; it takes softmax_scale",
    ),
    "layout of arrays": ({"layout": "bshd"}, TypeError, "layout must be a .*Layout, got str"),
    "ranks": ({"layout": Layout.zigzag(8, 2)}, ValueError, "as many ranks as comm, 1, got 2"),
    "tokens": ({"layout": Layout.zigzag(9, 1)}, ValueError, "q must have the 9 tokens .* got 8"),
    "tokens of v": ({"v": X[:, :7]}, ValueError, "v must have the 8 tokens .* rank 0, got 7"),
    "dimensions": ({"k": X[0]}, ValueError, "k must have 4 dimensions, as q has 4, got 3"),
    "two dimensions": ({"q": X[0, 0]}, ValueError, "q must have 3 dimensions .*, got 2"),
    "dtype": ({"k": X.astype(np.float32)}, TypeError, "k must have the dtype of q"),
    "heads": ({"k": np.zeros((1, 8, 3, 16), "f2")}, ValueError, "heads"),
    "no array": ({"q": [1.0]}, TypeError, "q must be"),
    "method": ({"method": "rings"}, ValueError, "method must be one of auto, gather, ring, heads"),
    "pair": ({"method": ("gather", "ring")}, ValueError, "a pair of methods must be"),
    "comms": ({"method": ("heads", "ring")}, ValueError, "comm must be a pair of communicators"),
    "comm": ({"comm": "nccl"}, TypeError, "comm must be a communicator"),
    "workspace": ({"max_workspace": -1}, ValueError, "max_workspace must be at least 0"),
    "workspace in MB": ({"max_workspace": 0.5}, TypeError, "max_workspace must be a number"),
    "wire": ({"wire": "e5m2"}, ValueError, "wire must be"),
    "window": ({"window_size": (1,)}, ValueError, "window_size must be a pair"),
    "out_dtype": ({"out_dtype": "bfloat16"}, ValueError, "out_dtype must be"),
    "sinks": ({"sinks": np.zeros(3, "f4")}, ValueError, "sinks"),
    "dropout in documents of a batch": (
        {**dict.fromkeys("qkv", np.zeros((2, 8, 2, 16), "f2")), "layout": DOCUMENTS}
        | {"dropout_p": 0.5, "seed": 1},
        UnsupportedError,
        "dropout_p over several ranks with 2 documents: its batch entry .* q has 2 entries",
    ),
    "batch_invariant": (
        {"layout": DOCUMENTS, "batch_invariant": True},
        UnsupportedError,
        "takes no batch_invariant: each rank has calls of its own",
    ),
    "functions in documents of codes": (
        {"layout": DOCUMENTS, "score_mod": _identity, "precision": "fp8", "wire": "e4m3"},
        UnsupportedError,
        "score_mod over several ranks with 2 documents: kernels on 8-bit floats",
    ),
}


def call_with(given: dict):
    given = dict(given)
    operands = [given.pop(name, X) for name in ("q", "k", "v")]
    return attention(*operands, **({"layout": LAYOUT, "comm": local(1)[0]} | given))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    given, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call_with(given)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"wrt": ("bias",)}, ValueError, "wrt names 'bias', which this call does not have"),
        ({"wrt": ("aux0",)}, ValueError, "wrt names 'aux0', which this call does not have"),
        ({"wrt": ("sinks",)}, ValueError, "wrt names 'sinks', which this call does not have"),
        ({"travels": "values"}, ValueError, "travels must be one of auto, keys, queries"),
        ({"dlse": np.zeros((1, 2, 7), "f4")}, ValueError, "dlse must have the 8 tokens"),
        ({"grad_dtype": "float64"}, ValueError, "grad_dtype must be"),
    ],
    ids=str,
)
def test_what_a_backward_refuses(given, error, message):
    lse = np.zeros((1, 2, 8), np.float32)
    with pytest.raises(error, match=message):
        attention_backward(X, X, X, X, X, lse, layout=LAYOUT, comm=local(1)[0], **given)


def _all_raise(work, ranks: int, comms=None) -> list[str]:
    """The messages of the ValueErrors that `work(comm)` raises on each rank."""

    def message(comm) -> str:
        with pytest.raises(ValueError) as caught:
            work(comm)
        return str(caught.value)

    return on_ranks(ranks, message, comms=comms)


def test_a_refusal_on_one_rank_raises_on_all():
    def work(comm):
        x = X[:, : 4 - comm.rank]
        return attention(x, x, x, layout=Layout.zigzag(8, 2), comm=comm)

    first, second = _all_raise(work, 2)
    assert first == second and "rank 1 refuses the call: q must have the 4 tokens" in first


def test_a_rank_whose_call_ends_in_the_middle_cannot_call_again(monkeypatch):
    """Its peers wait for the rest of that call, and would take the next one's messages for it."""
    own, given = X[:, :2], {"layout": Layout.contiguous(6, 3), "method": "ring"}

    def compute(*operands, **options):
        if threading.current_thread().name == "rank 0":
            raise MemoryError("no room")
        return on_one_gpu(*operands, **options)

    on_one_gpu = local_calls.attention
    monkeypatch.setattr(local_calls, "attention", compute)

    def work(comm):
        threading.current_thread().name = f"rank {comm.rank}"
        with pytest.raises(CommunicatorError if comm.rank else MemoryError):
            attention(own, own, own, comm=comm, **given)
        with pytest.raises(CommunicatorError, match="after a fault") as caught:
            attention(own, own, own, comm=comm, **given)
        return str(caught.value)

    # Long before the deadline.
    found = on_ranks(3, work, comms=local(3, timeout=300.0))
    of_others = "rank 0 left: attention ended there with MemoryError: no room"
    assert "ended on this rank with MemoryError: no room" in found[0]
    assert all(of_others in said for said in found[1:])


def test_heads_that_cannot_be_shared_are_named():
    def work(comm):
        q, k = np.zeros((1, 4, 6, 16), "f2"), np.zeros((1, 4, 3, 16), "f2")
        return attention(q, k, k, layout=Layout.zigzag(8, 2), comm=comm, method="heads")

    messages = _all_raise(work, 2)
    assert all("3 heads and 2 ranks" in message for message in messages)


def test_ranks_of_a_grid_that_differ_all_hear_of_it():
    """Rank 3 differs, and rank 0 has no communicator with it."""

    def work(comm):
        rank = comm[1].rank * 2 + comm[0].rank
        x, asked = X[:, :2], {"method": ("heads", "gather"), "causal": rank != 3}
        return attention(x, x, x, layout=Layout.contiguous(8, 4), comm=comm, **asked)

    messages = _all_raise(work, 4, grid(2, 2))
    assert len(set(messages)) == 1 and "causal: rank 3 has False" in messages[0]


def test_random_bits_need_segments_at_their_multiples():
    def work(comm):
        x = np.zeros((1, 16, 2, 16), np.float16)
        layout = Layout.zigzag(32, 2)
        return attention(x, x, x, layout=layout, comm=comm, dropout_p=0.5, seed=1)

    assert all("multiple=16" in message for message in _all_raise(work, 2))


def test_a_warm_call_checks_nothing_again(monkeypatch):
    comm = local(1)[0]
    given = {"layout": LAYOUT, "comm": comm, "causal": True, "return_lse": True}
    out, lse = attention(X, X, X, **given)
    given.pop("return_lse")
    attention_backward(X, X, X, X, out, lse, **given)
    monkeypatch.delattr(call.RankedCall, "_check")
    attention(X, X, X, **given)
    attention_backward(X, X, X, X, out, lse, **given)
    with pytest.raises(AttributeError):
        attention(X, X, X, softcap=1.0, **given)


def test_arrays_without_a_batch_axis():
    q, k, v = np.random.default_rng(0).standard_normal((3, 8, 2, 16)).astype(np.float16)
    given = {"layout": LAYOUT, "comm": local(1)[0], "causal": True}
    out, lse = attention(q, k, v, return_lse=True, **given)
    whole = attention(q[None], k[None], v[None], **given)
    np.testing.assert_array_equal(out, whole[0])
    gradients = attention_backward(q, q, k, v, out, lse, grad_dtype="float32", **given)
    assert lse.shape == (2, 8) and [x.shape for x in gradients] == [(8, 2, 16)] * 3
    assert {x.dtype.name for x in gradients} == {"float32"}
    assert attention(q, k, v, out_dtype="float32", **given).dtype == np.float32
