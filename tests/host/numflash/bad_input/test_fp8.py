"""FP8 calls refuse bad input with the right error, whose message names subject, value and rule.

As `test_calls`: every call here must fail before anything is compiled or launched.
"""

from dataclasses import replace

import numpy as np
import pytest

import numflash
from numflash import UnsupportedError
from numflash.calls import ready
from numflash.calls.launch import Launcher
from numflash.problem.fp8 import Fp8Recipe
from numflash.runtime.mode import SIMULATED
from tests.support.bad_fp8_calls import (
    ARRAYS,
    BAD_CALLS,
    FORWARD,
    K8,
    KS,
    OWN,
    Q8,
    SPREAD,
    TOKENS,
    V8,
    K,
    Q,
    V,
    in_8_bits,
    zeros,
)

pytestmark = pytest.mark.skipif(not SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM=1")

cases = pytest.mark.parametrize(
    ("call", "changes", "error", "words"),
    [
        pytest.param(*(call, changes, error, words), id=name)
        for name, (call, changes, error, *words) in BAD_CALLS.items()
    ],
)


@pytest.fixture(autouse=True)
def nothing_may_be_launched(monkeypatch):
    """Launches fail; nothing of other tests is ready."""

    def bind(self, operands):
        raise AssertionError(f"{self} was launched")

    monkeypatch.setattr(Launcher, "bind", bind)
    monkeypatch.setattr(ready, "_ready", {})


def refused(function, arguments, error, words):
    """Check that a call fails as it should."""
    with pytest.raises(error) as caught:
        function(**arguments)
    # An UnsupportedError must not pass for another error.
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)


@cases
def test_attention_refuses(call, changes, error, words):
    refused(numflash.attention, {**call, **changes}, error, words)


@cases
def test_a_plan_refuses(call, changes, error, words):
    if "return_decision" in changes:
        error, words = TypeError, ["return_decision"]  # plans have no such option
    refused(numflash.plan, {**call, **changes}, error, words)


@pytest.mark.parametrize("call", [FORWARD, ARRAYS, OWN], ids=["16-bit", "arrays", "codes"])
def test_the_calls_are_right_but_for_their_changes(call):
    # Nothing is refused: only the launch is missing.
    with pytest.raises(AssertionError, match="was launched"):
        numflash.attention(**call)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"granularity": "row"}, ValueError, "granularity must be one of tensor, .*, got 'row'"),
        ({"granularity": None}, TypeError, "granularity must be a string, got None"),
        ({"block": 48}, ValueError, "block must be a power of two from 16 to 1024, got 48"),
        ({"block": 8}, ValueError, "from 16 to 1024, got 8"),
        ({"block": 2048}, ValueError, "from 16 to 1024, got 2048"),
        ({"block": 64.0}, TypeError, "block must be an integer, got 64.0"),
        ({"block": True}, TypeError, "block must be an integer, got True"),
        ({"seed": -1}, ValueError, "seed must not be negative, got -1"),
        ({"seed": "0"}, TypeError, "seed must be an integer, got '0'"),
        ({"seed": None}, TypeError, "seed must be an integer, got None"),
        ({"hadamard": 1}, TypeError, "hadamard must be True or False, got 1"),
    ],
    ids=str,
)
def test_a_recipe_refuses(changes, error, message):
    for make in (Fp8Recipe, lambda **c: numflash.quantize_fp8(Q, **c)):
        with pytest.raises(error, match=message) as caught:
            make(**changes)
        assert type(caught.value) is error


@pytest.mark.parametrize("name", "qkv")
def test_a_plan_refuses_what_it_would_have_to_copy(name):
    calls = {
        "16-bit": (FORWARD, np.repeat(FORWARD[name], 2, -1)[..., ::2]),
        "codes": (OWN, np.repeat(OWN[name], 2, -1)[..., ::2]),
        "arrays": (
            {"q": Q8, "k": K8, "v": V8},
            replace(
                {"q": Q8, "k": K8, "v": V8}[name],
                data=np.repeat({"q": Q8, "k": K8, "v": V8}[name].data, 2, -1)[..., ::2],
            ),
        ),
    }
    for call, spread in calls.values():
        words = [f"{name} of a plan must have a contiguous last axis", "stride 2"]
        refused(numflash.plan, {**call, name: spread}, ValueError, words)


@pytest.mark.parametrize(
    "changes",
    [{"precision": "fp8"}, {"precision": "auto"}, {"q": Q8}, {"k": K8}, {"v": V8}],
    ids=["fp8", "auto", "q", "k", "v"],
)
def test_backward_refuses(changes):
    out = zeros(2, 9, 4, 48)
    call = {
        "dout": out,
        "q": Q,
        "k": K,
        "v": V,
        "out": out,
        "lse": zeros(2, 4, 9, dtype="float32"),
    }
    words = ["no backward on 8-bit floats", "numflash.dequantize_fp8"]
    refused(numflash.attention_backward, {**call, **changes}, UnsupportedError, words)


def broadcast(*shape):
    """An array of any size that takes little memory, with contiguous rows."""
    return np.broadcast_to(zeros(64), shape)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2**30, 64), "seqlen of x must be below 1073741824, got 1073741824"),
        ((2**20, 2**14, 2**10, 64), "thread blocks; a grid has at most 2147483647"),
    ],
)
def test_what_is_too_large_is_refused(shape, message):
    with pytest.raises(UnsupportedError, match=message):
        numflash.quantize_fp8(broadcast(*shape))


def test_the_way_back_refuses_scales_that_lie_apart():
    x = replace(in_8_bits(KS, TOKENS), descale=SPREAD)
    with pytest.raises(ValueError, match=r"x\.descale must have a contiguous last axis"):
        numflash.dequantize_fp8(x)
