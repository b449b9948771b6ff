"""Bias, masks and functions that are wrong: each message names what, its value and the rule."""

import math

import numpy as np
import pytest

import numflash
from tests.support.bad_calls import BACKWARD, FORWARD, A, cases, needs_gpu_mode, refused

# Of the calls of `bad_calls`.
SCORES = (2, 4, 9, 11)
BROADCAST = "must broadcast to (batch, num_heads_q, seqlen_q, seqlen_k) = (2, 4, 9, 11), got shape"
TABLE = np.zeros(40, np.float32)
PLAIN = {"score_mod": lambda s, b, h, i, j, x: s + x[i]}


def branching(score, batch, head, q_idx, kv_idx):
    if score > 0:
        return score
    return 2 * score


def exponential(score, batch, head, q_idx, kv_idx):
    return math.exp(score)


def closed_over(score, batch, head, q_idx, kv_idx):
    return score + TABLE[q_idx]


def nothing(score, batch, head, q_idx, kv_idx):
    score + 1


def endless(score, batch, head, q_idx, kv_idx):
    for n in range(3000):
        score = score * (q_idx + n)
    return score


BAD = {
    "bias-list": ({"bias": [[0.0]]}, TypeError, "bias must be", "list"),
    "bias-int32": ({"bias": A(SCORES, "int32")}, TypeError, "bias must be float16", "got int32"),
    "bias-bool": ({"bias": A((9, 11), "bool")}, TypeError, "bias must be float16", "got bool"),
    "bias-float64": ({"bias": A((9, 11), "float64")}, TypeError, "bias must be", "got float64"),
    "bias-keys": ({"bias": A((9, 12))}, ValueError, f"bias {BROADCAST} (9, 12)"),
    "bias-queries": ({"bias": A((8, 11))}, ValueError, f"bias {BROADCAST} (8, 11)"),
    "bias-heads-kv": ({"bias": A((2, 2, 9, 11))}, ValueError, f"bias {BROADCAST} (2, 2, 9, 11)"),
    "bias-batch": ({"bias": A((3, 1, 1, 11))}, ValueError, f"bias {BROADCAST} (3, 1, 1, 11)"),
    "bias-rank-5": ({"bias": A((1, *SCORES))}, ValueError, f"bias {BROADCAST} (1, 2, 4, 9, 11)"),
    "bias-empty": ({"bias": A((0, 11))}, ValueError, f"bias {BROADCAST} (0, 11)"),
    "mask-list": ({"mask": [[True]]}, TypeError, "mask must be", "list"),
    "mask-int32": ({"mask": A((9, 11), "int32")}, TypeError, "mask must be bool, got int32"),
    "mask-uint8": ({"mask": A((9, 11), "uint8")}, TypeError, "mask must be bool, got uint8"),
    "mask-float16": ({"mask": A((9, 11))}, TypeError, "mask must be bool, got float16"),
    "mask-keys": ({"mask": A((2, 11), "bool")}, ValueError, f"mask {BROADCAST} (2, 11)"),
    "score-mod-number": ({"score_mod": 1}, TypeError, "score_mod must be a function, got 1 (int)"),
    "mask-mod-string": ({"mask_mod": "causal"}, TypeError, "mask_mod must be a function", "(str)"),
    "mask-mod-array": (
        {"mask_mod": np.ones((9, 11), bool)},
        TypeError,
        "mask_mod must be a function",
        "ndarray",
    ),
    "score-mod-arguments": (
        {"score_mod": lambda score: score},
        TypeError,
        "score_mod",
        "is called with (score, batch, head, q_idx, kv_idx), and takes (score)",
        "test_functions.py",
    ),
    "score-mod-no-aux": (
        {"score_mod": lambda s, b, h, i, j: s, "aux": (1.0,)},
        TypeError,
        "score_mod",
        "is called with (score, batch, head, q_idx, kv_idx, aux0), and takes (s, b, h, i, j)",
    ),
    "mask-mod-more-aux": (
        {"mask_mod": lambda b, h, i, j, x: x[i], "aux": ()},
        TypeError,
        "mask_mod",
        "is called with (batch, head, q_idx, kv_idx), and takes (b, h, i, j, x)",
    ),
    "score-mod-boolean": (
        {"score_mod": lambda s, b, h, i, j: s > 0},
        TypeError,
        "score_mod",
        "returns a truth value, where a number is wanted",
    ),
    "mask-mod-number": (
        {"mask_mod": lambda b, h, i, j: i - j},
        TypeError,
        "mask_mod",
        "returns a number, where a truth value is wanted",
    ),
    "score-mod-nothing": (
        {"score_mod": nothing},
        TypeError,
        "score_mod nothing",
        f"test_functions.py:{nothing.__code__.co_firstlineno}",
        "returns nothing",
    ),
    "score-mod-if": (
        {"score_mod": branching},
        TypeError,
        "score_mod branching",
        "if score > 0:",
        "where()",
        "score_mod_grad=",
    ),
    "score-mod-python-math": (
        {"score_mod": exponential},
        TypeError,
        "score_mod exponential",
        "return math.exp(score)",
        "numflash.math",
    ),
    "score-mod-closed-over": (
        {"score_mod": closed_over},
        TypeError,
        "score_mod closed_over",
        "return score + TABLE[q_idx]",
        "aux",
    ),
    "score-mod-arctan": (
        {"score_mod": lambda s, b, h, i, j: np.arctan(s)},
        TypeError,
        "arctan is not among the functions that can be traced",
    ),
    "score-mod-endless": ({"score_mod": endless}, TypeError, "score_mod endless", "2000"),
    "score-mod-grad-alone": (
        {"score_mod_grad": lambda s, b, h, i, j: 1.0},
        ValueError,
        "score_mod_grad is the derivative of score_mod, which is not given",
    ),
    "aux-array": ({**PLAIN, "aux": A((9,))}, TypeError, "aux must be a tuple of the arrays"),
    "aux-alone": ({"aux": (1.0,)}, ValueError, "aux goes with score_mod or mask_mod"),
    "aux-with-bias": (
        {"bias": A((9, 11)), "aux": (1.0,)},
        ValueError,
        "aux goes with score_mod or mask_mod",
    ),
    "aux-float64": ({**PLAIN, "aux": (A((9,), "float64"),)}, TypeError, "aux0", "got float64"),
    "aux-list": ({**PLAIN, "aux": ([1.0] * 9,)}, TypeError, "aux0 must be", "list"),
    "aux-string": ({**PLAIN, "aux": ("x",)}, TypeError, "aux0 must be", "str"),
    "aux-complex": ({**PLAIN, "aux": (1j,)}, TypeError, "aux0 must be", "complex"),
    "aux-large": (
        {**PLAIN, "aux": (2**31,)},
        ValueError,
        "aux0 must fit into 32 bits",
        "2147483648",
    ),
    "aux-rank-9": ({**PLAIN, "aux": (A((1,) * 9),)}, ValueError, "aux0", "up to 8 axes, got 9"),
    "aux-number": (
        {**PLAIN, "aux": (1.0,)},
        TypeError,
        "score_mod <lambda>",
        "a number has no elements",
    ),
    "aux-indices": (
        {"score_mod": lambda s, b, h, i, j, x: s + x[i, j], "aux": (A((9,)),)},
        TypeError,
        "aux0, of shape (9,), got 2 indices",
    ),
    "aux-not-indexed": (
        {"score_mod": lambda s, b, h, i, j, x: s + x, "aux": (A((9,)),)},
        TypeError,
        "aux0 is an array; index it",
    ),
    "aux-short": ({**PLAIN, "aux": (A((8,)),)}, ValueError, "aux0", "9", "(8,)"),
    "aux-short-heads": (
        {"mask_mod": lambda b, h, i, j, x: x[h] > j, "aux": (A((2,), "int32"),)},
        ValueError,
        "aux0",
        "4",
        "(2,)",
    ),
    "packed": (
        {"mask_mod": lambda b, h, i, j: j <= i, "config": "sm75-m16n16w1s1-packed"},
        numflash.UnsupportedError,
        "packed",
        "function",
    ),
}


@cases(BAD)
def test_forward(machine, changes, error, words):
    refused(machine, numflash.attention, {**FORWARD, **changes}, error, words)


@cases({name: row for name, row in BAD.items() if "config" not in row[0]})
def test_backward(machine, changes, error, words):
    refused(machine, numflash.attention_backward, {**BACKWARD, **changes}, error, words)


@needs_gpu_mode
@pytest.mark.parametrize("name", ["bias", "mask", "aux"])
def test_arrays_on_another_device(machine, name):
    array = A((9, 11), "bool" if name == "mask" else "float16", device=1)
    changes = {name: array}
    if name == "aux":
        changes = {"aux": (array,), "score_mod": lambda s, b, h, i, j, x: s + x[i, j]}
    words = "must lie on the device of q, 0, got device 1", name
    refused(machine, numflash.attention, {**FORWARD, **changes}, ValueError, words)
