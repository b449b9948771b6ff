"""What a warm call over several ranks does on the host: counted, for the machine may be busy."""

import sys
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from numflash import distributed
from numflash.distributed import (
    Layout,
    attention,
    attention_backward,
    explain,
    local_calls,
    ring,
)
from numflash.distributed.communicators import Agreed
from tests.support.covering import thorough

RANKS, TOKENS, HEADS_Q, HEADS_KV, HEAD_DIM = 8, 8, 8, 8, 16
LAYOUT = Layout.zigzag(RANKS * TOKENS, RANKS)
FOLDER = str(Path(distributed.__file__).parent)
PLANS = ("steps.py", "sizes.py", "memory.py", "whole.py")


class Still:
    """Rank 3 of 8; nothing moves, and what arrives is undefined."""

    rank, size = 3, RANKS

    def __init__(self):
        self.agreed = Agreed()

    def exchange(self, sends, receives, what):
        return lambda: None

    def all_gather(self, array, what):
        return np.stack([array] * self.size)

    def agree(self, text):
        return None


@pytest.fixture(autouse=True)
def _undefined_numbers():
    """Are added without a warning."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def asked(monkeypatch):
    """The calls of attention, which compute nothing: all results are the same zeros."""
    found = []
    zeros = lru_cache(lambda shape: np.zeros(shape, "float32"))

    def forward(q, k, v, **options):
        found.append(options)
        return zeros(q.shape), zeros((q.shape[0], q.shape[2], q.shape[1]))

    def backward(dout, q, k, v, out, lse, **options):
        found.append(options)
        shapes = {"q": q.shape, "k": k.shape, "v": v.shape}
        return tuple(zeros(shapes[name]) for name in options["wrt"])

    monkeypatch.setattr(local_calls, "attention", forward)
    monkeypatch.setattr(local_calls, "attention_backward", backward)
    monkeypatch.setattr(ring, "merge_onto", lambda *_: None)
    return found


def functions(call) -> Counter:
    """How often a call enters each function of numflash.distributed, by (file, name)."""
    found = Counter()

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(FOLDER):
            found[Path(code.co_filename).name, code.co_name] += 1

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def calls_of(method: str, **more) -> dict:
    """The forward and the backward, by name."""
    given = {"layout": LAYOUT, "comm": Still(), "method": method, "causal": True, **more}
    q = np.zeros((1, TOKENS, HEADS_Q, HEAD_DIM), "float16")
    k, lse = q[:, :, :HEADS_KV], np.zeros((1, HEADS_Q, TOKENS), "float32")
    return {
        "forward": lambda: attention(q, k, k, **given),
        "backward": lambda: attention_backward(q, q, k, k, q, lse, **given),
    }


@pytest.mark.parametrize(
    ("method", "one_way", "fixed", "each"),
    [
        ("gather", "forward", 50, 7),
        ("gather", "backward", 65, 20),
        ("ring", "forward", 45, 27),
        ("ring", "backward", 85, 48),
        ("heads", "forward", 130, 20),
        ("heads", "backward", 200, 30),
    ],
)
def test_a_warm_call_enters_few_functions(asked, method, one_way, fixed, each):
    call = calls_of(method)[one_way]
    call()
    asked.clear()
    found = functions(call)
    assert asked and found.total() <= fixed + each * len(asked)


@pytest.mark.parametrize("one_way", ["forward", "backward"])
@pytest.mark.parametrize("method", ["gather", "ring", "heads"])
def test_a_warm_call_plans_nothing_again(asked, method, one_way):
    call = calls_of(method)[one_way]
    cold, warm = functions(call), functions(call)
    agreed = "agreement.py", "agree"
    assert agreed in cold and agreed not in warm
    assert {name for file, name in warm if file in PLANS} <= {"__bool__"}


@pytest.mark.parametrize("method", ["gather", "ring", "heads"])
def test_options_of_each_call_are_its_own(asked, method):
    """Equal calls find what is made; arrays and seeds are not remembered with it."""
    q = np.zeros((1, 16, HEADS_Q, HEAD_DIM), "float16")
    given = {"layout": Layout.zigzag(16 * RANKS, RANKS, multiple=16), "comm": Still()}
    if method != "gather":
        given["layout"] = Layout.contiguous(16 * RANKS, RANKS, multiple=16)
    for seed in (1, 2):
        asked.clear()
        sinks = np.full(HEADS_Q, seed, "float32")
        more = {"sinks": sinks, "dropout_p": 0.5, "seed": seed, "method": method}
        attention(q, q, q, **given, **more)
        assert {options["seed"] for options in asked} == {seed}
        of_sinks = [options["sinks"] for options in asked if "sinks" in options]
        assert of_sinks and all(each is sinks for each in of_sinks)


@pytest.mark.parametrize("kind", [float, np.float32, np.float64])
def test_numbers_of_each_call_are_its_own(asked, kind):
    q = np.zeros((1, TOKENS, HEADS_Q, HEAD_DIM), "float16")
    given = {"layout": LAYOUT, "comm": Still(), "method": "ring"}
    for scale in (0.5, 0.25, 0.5):
        asked.clear()
        attention(q, q, q, softmax_scale=kind(scale), **given)
        assert {options["softmax_scale"] for options in asked} == {scale}


def test_a_warm_call_refuses_what_a_cold_one_does(asked):
    q = np.zeros((1, TOKENS, HEADS_Q, HEAD_DIM), "float16")
    given = {"layout": LAYOUT, "comm": Still(), "method": "ring"}
    attention(q, q, q, causal=True, **given)
    attention(q, q, q, **given)
    for causal in (np.bool_(True), np.bool_(False)):
        with pytest.raises(TypeError, match="causal must be"):
            attention(q, q, q, causal=causal, **given)
    with pytest.raises(TypeError, match="aux"):
        attention(q, q, q, aux=None, **given)


X = np.zeros((4, 4, 4), "float32")
YARDSTICK = 240e-6
"""Seconds of `yardstick` on the machine whose microseconds the next test has, when it was idle."""


def yardstick() -> None:
    """Some work of the host, such as calls do."""
    for n in range(250):
        views = {"a": X[n % 4 :, :], "b": X.swapaxes(0, 1)}
        (views["a"], views["b"], n)[0].reshape(-1)


def least_seconds(call, rounds: int = 400) -> float:
    """The processor's seconds of a call, by a yardstick that is as much slowed down by others."""
    ours, theirs = [], []
    for _ in range(rounds):
        begin = time.thread_time()
        call()
        between = time.thread_time()
        yardstick()
        ours.append(between - begin)
        theirs.append(time.thread_time() - between)
    return min(ours) / min(theirs) * YARDSTICK


@thorough
@pytest.mark.parametrize(
    ("method", "one_way", "most"),
    [
        ("gather", "forward", 60),
        ("gather", "backward", 100),
        ("ring", "forward", 60),
        ("ring", "backward", 60),
        ("heads", "forward", 90),
        ("heads", "backward", 130),
    ],
)
def test_a_turn_takes_few_microseconds(monkeypatch, asked, method, one_way, most):
    """Of the host, besides its calls, on average of all turns; checks count; 60 is the aim.

    Arrays are so small that NumPy's arithmetic hides nothing.
    """
    monkeypatch.setattr(sys.modules[__name__], "TOKENS", 2)
    backward = one_way == "backward"
    layout = Layout.zigzag(2 * RANKS, RANKS)
    heads = {"num_heads_q": HEADS_Q, "num_heads_kv": HEADS_KV, "head_dim": HEAD_DIM}
    turns = explain(layout, **heads, method=method, causal=True, backward=backward).turns[0]
    call = calls_of(method, layout=layout)[one_way]
    call()
    found = least_seconds(call) / len(turns)
    assert 1e6 * found <= most, f"{1e6 * found:.0f} microseconds for each of {len(turns)} turns"
