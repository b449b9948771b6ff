"""Bad input is refused with the right error, whose message names subject, value and rule.

Every call here must fail before anything is compiled or launched. The arrays are NumPy's in the
simulator and those of a fake GPU otherwise; the checks are the same.
"""

import fractions

import numpy as np
import pytest

import numflash
from numflash.configs import BackwardDqConfig, ForwardConfig
from tests.support.bad_calls import (
    BACKWARD,
    BAD_FORWARD,
    FORWARD,
    OUT,
    A,
    K,
    Q,
    V,
    cases,
    needs_gpu_mode,
    refused,
)

BAD_BACKWARD = {
    "dout-list": ({"dout": [0.0]}, TypeError, "dout must be", "list"),
    "dout-shape": ({"dout": Q}, ValueError, "dout must have shape (2, 9, 4, 24)", "4, 16)"),
    "dout-dtype": ({"dout": A(OUT.shape, "float32")}, TypeError, "dout must be float16, got"),
    "out-none": ({"out": None}, TypeError, "out must be", "NoneType"),
    "out-shape": ({"out": Q}, ValueError, "out must have shape (2, 9, 4, 24)", "4, 16)"),
    "out-dtype": ({"out": A(OUT.shape, "bfloat16")}, TypeError, "out must be float16, got"),
    "grad-dtype-name": (
        {"grad_dtype": "bfloat16"},
        ValueError,
        "grad_dtype must be float16 or float32, got 'bfloat16'",
    ),
    "grad-dtype-type": ({"grad_dtype": 32}, TypeError, "grad_dtype must be a string", "32 (int)"),
    "lse-none": ({"lse": None}, TypeError, "lse must be", "NoneType"),
    "lse-shape": ({"lse": A((2, 9, 4), "float32")}, ValueError, "lse must have shape (2, 4, 9)"),
    "lse-rank": ({"lse": A((4, 9), "float32")}, ValueError, "lse must have shape (2, 4, 9)"),
    "lse-dtype": ({"lse": A((2, 4, 9))}, TypeError, "lse must be float32, got float16"),
    "lse-rows": (
        {"lse": A((2, 8, 9), "float32", np.s_[:, ::2])},
        ValueError,
        "lse must be contiguous",
        "(72, 18, 1)",
    ),
    "lse-columns": (
        {"lse": A((2, 4, 18), "float32", np.s_[..., ::2])},
        ValueError,
        "lse must be contiguous",
        "(72, 18, 2)",
    ),
    "lse-broadcast": (
        {"lse": A((1, 4, 9), "float32", np.s_[:, :1])},
        ValueError,
        "lse must have shape (2, 4, 9), got (1, 1, 9)",
    ),
    "dlse-list": ({"dlse": [0.0]}, TypeError, "dlse must be", "list"),
    "dlse-dtype": ({"dlse": A((2, 4, 9))}, TypeError, "dlse must be float32, got float16"),
    "dlse-shape": (
        {"dlse": A((2, 9, 4), "float32")},
        ValueError,
        "dlse must have shape (2, 4, 9)",
    ),
    "delta-list": ({"delta": [0.0]}, TypeError, "delta must be", "list"),
    "delta-dtype": ({"delta": A((2, 4, 9))}, TypeError, "delta must be float32, got float16"),
    "delta-shape": (
        {"delta": A((4, 9), "float32"), "out": None},
        ValueError,
        "delta must have shape (2, 4, 9), got (4, 9)",
    ),
    "wrt-string": ({"wrt": "q"}, TypeError, "wrt must be a tuple of names", "'q' (str)"),
    "wrt-numbers": ({"wrt": (0, 1)}, TypeError, "wrt must be a tuple of names", "(0, 1)"),
    "wrt-set": ({"wrt": {"q"}}, TypeError, "wrt must be a tuple of names", "set"),
    "wrt-lists": ({"wrt": (["q"],)}, TypeError, "wrt must be a tuple of names", "['q']"),
    "wrt-empty": ({"wrt": ()}, ValueError, "wrt must name something of q, k, v, got ()"),
    "wrt-unknown": (
        {"wrt": ("q", "dk")},
        ValueError,
        "wrt must name gradients of q, k, v, alibi_slopes, sinks, bias, aux0, aux1, ..., got 'dk'",
    ),
    "wrt-absent": (
        {"wrt": ("sinks",)},
        ValueError,
        "wrt names 'sinks', which this call does not have; it has gradients of q, k, v",
    ),
    "wrt-twice": ({"wrt": ("q", "v", "q")}, ValueError, "wrt must name each gradient once", "'q'"),
    "q-float64": ({"q": A(Q.shape, "float64")}, TypeError, "q must", "float64"),
    "k-heads": ({"k": A((2, 11, 3, 16))}, ValueError, "v must have the heads of k, 3", "got 2"),
    "scale-bool": ({"softmax_scale": True}, TypeError, "softmax_scale must be a real", "True"),
    "stream": ({"stream": "main"}, TypeError, "stream must be a CUDA stream", "'main'"),
    "precision-name": ({"precision": "fp4"}, ValueError, "precision must be one of tf32", "'fp4'"),
    "precision-float16": ({"precision": "tf32"}, ValueError, 'precision="tf32"', "float16"),
    "config-string": (
        {"config": "m64n32w4"},
        TypeError,
        "config of a backward must map families to configs, got 'm64n32w4'",
    ),
    "config-list": ({"config": ["m64n32w4"]}, TypeError, "must map families to configs"),
    "config-pairs": ({"config": (("backward-dq", "m64n32w4"),)}, TypeError, "must map families"),
    "config-family": (
        {"config": {"forward": "m64n32w4"}},
        ValueError,
        "config of a backward has the keys backward-dkdv, backward-dq, backward-rows, ",
        "got 'forward'",
    ),
    "config-one-and-two": (
        {"config": {"backward": "sm80-m32n32w2s2", "backward-dq": "m64n32w4"}},
        ValueError,
        "config has 'backward', one kernel for dq, dk and dv, and 'backward-dq'",
        "give one of them",
    ),
    "config-delta": ({"config": {"delta": "w8"}}, ValueError, "has the keys", "got 'delta'"),
    "config-text": (
        {"config": {"backward-dq": "64x64"}},
        ValueError,
        "a backward-dq config must look like",
        "'64x64'",
    ),
    "config-number": (
        {"config": {"backward-dkdv": 7}},
        TypeError,
        "config must be a string or a config of backward-dkdv",
        "7",
    ),
    "config-of-another-family": (
        {"config": {"backward-dkdv": BackwardDqConfig(64, 32, 4)}},
        TypeError,
        "config must be a string or a config of backward-dkdv",
        "BackwardDqConfig",
    ),
    "config-unhashable": (
        {"config": {"backward-dq": ["m64n32w4"]}},
        TypeError,
        "config must be a string or a config of backward-dq",
    ),
    "config-too-large": (
        {"config": {"backward-dq": "m512n512w32"}},
        numflash.UnsupportedError,
        "config m512n512w32 cannot run this backward-dq",
        "bytes of shared memory",
    ),
    "unknown-option": ({"return_lse": True}, TypeError, "return_lse"),
}


# Only arrays of a GPU can lie on another device.
BAD_DEVICES = {
    "device-k": ({"k": A(K.shape, device=1)}, ValueError, "k must lie on the device of q, 0", "1"),
    "device-v": ({"v": A(V.shape, device=1)}, ValueError, "v must lie on the device of q, 0", "1"),
    "device-sinks": (
        {"sinks": A((4,), "float32", device=1)},
        ValueError,
        "sinks must lie on the device of q, 0",
        "got device 1",
    ),
    "device-slopes": (
        {"alibi_slopes": A((4,), "float32", device=1)},
        ValueError,
        "alibi_slopes must lie on the device of q, 0",
        "got device 1",
    ),
    "device-out": (
        {"out": A(OUT.shape, device=1)},
        ValueError,
        "out must lie on the device of q, 0",
        "got device 1",
    ),
}


@cases(BAD_FORWARD)
def test_forward_refuses(machine, changes, error, words):
    refused(machine, numflash.attention, FORWARD | changes, error, words)


@cases(BAD_FORWARD)
def test_forward_refuses_also_when_a_right_call_is_ready(machine, changes, error, words):
    machine.call(numflash.attention, **FORWARD)
    assert machine.launched
    refused(machine, numflash.attention, FORWARD | changes, error, words)


@cases(BAD_FORWARD)
def test_a_plan_refuses(machine, changes, error, words):
    refused(machine, numflash.plan, FORWARD | changes, error, words)


@cases(BAD_BACKWARD)
def test_backward_refuses(machine, changes, error, words):
    machine.call(numflash.attention_backward, **BACKWARD)
    assert len(machine.launched) == 3
    refused(machine, numflash.attention_backward, BACKWARD | changes, error, words)


@needs_gpu_mode
@cases(BAD_DEVICES)
def test_arrays_on_several_devices_are_refused(machine, changes, error, words):
    refused(machine, numflash.attention, FORWARD | changes, error, words)


@pytest.mark.parametrize(
    "right, wrong",
    [
        ({"causal": True}, {"causal": 1}),
        ({"causal": False}, {"causal": 0.0}),
        ({"softmax_scale": 1.0}, {"softmax_scale": True}),
        ({"softcap": 1}, {"softcap": True}),
        ({"window_size": (1, 0)}, {"window_size": (1.0, 0)}),
        ({"window_size": (1, 0)}, {"window_size": (True, 0)}),
        ({"config": "m64n32w4"}, {"config": b"m64n32w4"}),
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_though_an_equal_right_one_is_ready(machine, right, wrong):
    machine.call(numflash.attention, **FORWARD, **right)
    refused(machine, numflash.attention, FORWARD | wrong, TypeError, [])


@pytest.mark.parametrize(
    "options",
    [
        {"window_size": [1, 2]},
        {"window_size": (None, -1)},
        {"window_size": (10**30, np.int64(3))},
        {"softmax_scale": np.float32(0.5)},
        {"softmax_scale": 2},
        {"softmax_scale": 0},
        {"softmax_scale": -1.5},
        {"softmax_scale": fractions.Fraction(1, 8)},
        {"softcap": 0},
        {"softcap": 30},
        {"alibi_slopes": A((4,), "float32")},
        {"alibi_slopes": A((2, 4), "float32")},
        {"alibi_slopes": A((8,), "float32", np.s_[::2])},
        {"sinks": A((4,), "float32")},
        {"sinks": A((8,), "float32", np.s_[::2])},
        {"stream": 0},
        {"out": OUT},
        {"out": A((2, 9, 4, 32), index=np.s_[..., :24])},
        {"precision": None, "config": None},
        {"config": "m64n32w4"},
        {"config": ForwardConfig(64, 32, 4)},
        {"config": "sm75-m64n64w4s1"},
        {"softmax_scale": -1.5, "config": "m64n32w4"},
    ],
    ids=str,
)
def test_unusual_but_right_calls_pass(machine, options):
    for _ in range(2):
        machine.call(numflash.attention, **FORWARD, **options)
    assert len(machine.launched) == 2
    assert len(machine.made) == 1


def test_a_contiguous_lse_passes_whatever_its_strides_along_axes_of_one(machine):
    one_head = {"dout": A((1, 9, 1, 24)), "q": A((1, 9, 1, 16)), "out": A((1, 9, 1, 24))}
    one_head |= {"k": A((1, 11, 1, 16)), "v": A((1, 11, 1, 24))}
    lse = A((3, 4, 9), "float32", np.s_[1:2, 1:2])
    machine.call(numflash.attention_backward, **one_head, lse=lse)
    assert len(machine.launched) == 3
