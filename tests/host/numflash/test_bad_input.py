"""Bad input is refused with the right error, whose message names subject, value and rule.

Every call here must fail before anything is compiled or launched. The arrays are NumPy's in the
simulator and those of a fake GPU otherwise; the checks are the same.
"""

import fractions
import math
import sys
import types
from typing import Any, NamedTuple

import numpy as np
import pytest

import numflash
from numflash.calls import backward, forward, ready
from numflash.configs import BackwardDqConfig, ForwardConfig
from numflash.runtime import arrays
from numflash.runtime.mode import SIMULATED
from numflash.runtime.views import numpy_dtype
from tests.support import fake_gpu

needs_gpu_mode = pytest.mark.skipif(SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM unset")
needs_simulator = pytest.mark.skipif(not SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM=1")


class A(NamedTuple):
    """An array to be made for a case."""

    shape: tuple
    dtype: str = "float16"
    index: Any = ()
    device: int = 0


class Machine:
    """Arrays of this process's kind, and a record of launchers made and launches done."""

    def __init__(self, monkeypatch):
        self.gpu = None if SIMULATED else fake_gpu.install(monkeypatch)
        self.made, self.launched = [], []
        machine = self

        class Launcher:
            def __init__(self, config, *_):
                machine.made.append(config)

            def build(self):
                pass

            def bind(self, operands):
                return machine.launched.append

        for module in (forward, backward):
            monkeypatch.setattr(module, "Launcher", Launcher)
        monkeypatch.setattr(ready, "_ready", {})

    def array(self, spec: A):
        """The array of a spec."""
        if self.gpu is None:
            return np.zeros(spec.shape, numpy_dtype(spec.dtype))[spec.index]
        array = self.gpu.array(spec.shape, spec.dtype, spec.device)
        return array[spec.index] if spec.index != () else array

    def call(self, function, **arguments):
        """Call with every `A` made an array."""
        made = {n: self.array(x) if isinstance(x, A) else x for n, x in arguments.items()}
        return function(**made)


@pytest.fixture
def machine(monkeypatch):
    """A `Machine`."""
    return Machine(monkeypatch)


Q, K, V = A((2, 9, 4, 16)), A((2, 11, 2, 16)), A((2, 11, 2, 24))
OUT, LSE = A((2, 9, 4, 24)), A((2, 4, 9), "float32")
FORWARD = {"q": Q, "k": K, "v": V}
BACKWARD = {"dout": OUT, **FORWARD, "out": OUT, "lse": LSE}
NAN, INF = math.nan, math.inf
TENSOR_LIKE = types.SimpleNamespace(shape=(2, 9, 4, 16), is_cuda=False)

# name: (what is different from a right call, the error, what the message must contain)
BAD_FORWARD = {
    # Types
    "q-list": ({"q": [[1.0]]}, TypeError, "q must be", "list"),
    "k-none": ({"k": None}, TypeError, "k must be", "NoneType"),
    "v-string": ({"v": "v"}, TypeError, "v must be", "str"),
    "q-number": ({"q": 1.0}, TypeError, "q must be", "float"),
    "v-tensor-like": ({"v": TENSOR_LIKE}, TypeError, "v must be", "SimpleNamespace"),
    "sinks-list": ({"sinks": [1.0] * 4}, TypeError, "sinks must be", "list"),
    "slopes-list": ({"alibi_slopes": [1.0] * 4}, TypeError, "alibi_slopes must be", "list"),
    "out-list": ({"out": [0.0]}, TypeError, "out must be", "list"),
    # Dtypes
    "q-float64": ({"q": A(Q.shape, "float64")}, TypeError, "q must", "float64", "bfloat16"),
    "q-int32": ({"q": A(Q.shape, "int32")}, TypeError, "q must", "int32", "float16"),
    "k-other-dtype": ({"k": A(K.shape, "bfloat16")}, TypeError, "k must", "float16", "bfloat16"),
    "v-other-dtype": ({"v": A(V.shape, "float32")}, TypeError, "v must", "float16", "float32"),
    # Shapes
    "rank-0": ({"q": A(()), "k": A(()), "v": A(())}, ValueError, "q must have 2", "got 0"),
    "rank-1": ({"q": A((9,)), "k": A((9,)), "v": A((9,))}, ValueError, "q must have 2", "got 1"),
    "rank-5": (dict.fromkeys("qkv", A((1, 2, 3, 4, 5))), ValueError, "q must have 2", "got 5"),
    "ranks-differ": ({"k": A((11, 2, 16))}, ValueError, "k must", "as q, 4", "got 3"),
    "batch-k": ({"k": A((3, 11, 2, 16))}, ValueError, "k must have the batch of q, 2", "got 3"),
    "batch-v": ({"v": A((1, 11, 2, 24))}, ValueError, "v must have the batch of q, 2", "got 1"),
    "seqlen-v": ({"v": A((2, 12, 2, 24))}, ValueError, "v must have the seqlen of k, 11", "12"),
    "heads-v": ({"v": A((2, 11, 4, 24))}, ValueError, "v must have the heads of k, 2", "got 4"),
    "head-dim-k": ({"k": A((2, 11, 2, 8))}, ValueError, "k must have the head_dim of q, 16", "8"),
    "heads-3-of-4": (
        {"k": A((2, 11, 3, 16)), "v": A((2, 11, 3, 24))},
        ValueError,
        "heads of q must be a positive multiple",
        "4 and 3",
    ),
    "heads-0": (
        {"q": A((2, 9, 0, 16)), "k": A((2, 11, 0, 16)), "v": A((2, 11, 0, 24))},
        ValueError,
        "heads of q must be a positive multiple",
        "0 and 0",
    ),
    "heads-kv-0": (
        {"k": A((2, 11, 0, 16)), "v": A((2, 11, 0, 24))},
        ValueError,
        "heads of q must be a positive multiple",
        "4 and 0",
    ),
    "heads-q-0": ({"q": A((2, 9, 0, 16))}, ValueError, "positive multiple", "0 and 2"),
    "head-dim-0": (
        {"q": A((2, 9, 4, 0)), "k": A((2, 11, 2, 0))},
        ValueError,
        "head_dim of q and k must be at least 1, got 0",
    ),
    "head-dim-v-0": ({"v": A((2, 11, 2, 0))}, ValueError, "head_dim of v must be at least 1"),
    "head-dim-257": (
        {"q": A((2, 9, 4, 257)), "k": A((2, 11, 2, 257))},
        numflash.UnsupportedError,
        "head_dim of q and k must be at most 256, got 257",
    ),
    "head-dim-v-264": (
        {"v": A((2, 11, 2, 264))},
        numflash.UnsupportedError,
        "head_dim of v must be at most 256, got 264",
    ),
    # Options
    "scale-nan": ({"softmax_scale": NAN}, ValueError, "softmax_scale must be finite", "nan"),
    "scale-inf": ({"softmax_scale": -INF}, ValueError, "softmax_scale must be finite", "-inf"),
    "scale-1e39": ({"softmax_scale": 1e39}, ValueError, "softmax_scale must be finite", "1e+39"),
    "scale-huge": ({"softmax_scale": 10**400}, ValueError, "softmax_scale must be finite"),
    "scale-string": ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a real", "'1'"),
    "scale-bool": ({"softmax_scale": True}, TypeError, "softmax_scale must be a real", "True"),
    "scale-complex": ({"softmax_scale": 1j}, TypeError, "softmax_scale must be a real", "1j"),
    "scale-array": (
        {"softmax_scale": np.array([1.0])},
        TypeError,
        "softmax_scale must be a real",
        "ndarray",
    ),
    "softcap-negative": ({"softcap": -1.5}, ValueError, "softcap must be positive", "-1.5"),
    "softcap-nan": ({"softcap": NAN}, ValueError, "softcap must be finite", "nan"),
    "softcap-none": ({"softcap": None}, TypeError, "softcap must be a real number", "None"),
    "softcap-bool": ({"softcap": False}, TypeError, "softcap must be a real number", "False"),
    "softcap-tiny": ({"softcap": 1e-45}, ValueError, "softcap must not be so small", "1e-45"),
    "causal-1": ({"causal": 1}, TypeError, "causal must be True or False", "1 (int)"),
    "causal-none": ({"causal": None}, TypeError, "causal must be True or False", "None"),
    "causal-string": ({"causal": "yes"}, TypeError, "causal must be True or False", "'yes'"),
    "causal-array": ({"causal": np.array([True])}, TypeError, "causal must be True or False"),
    "align-name": ({"causal_align": "left"}, ValueError, "causal_align must be one of", "'left'"),
    "align-none": ({"causal_align": None}, TypeError, "causal_align must be a string", "None"),
    "shift-real": ({"shift": 1.5}, TypeError, "shift must be an integer", "1.5"),
    "shift-bool": ({"shift": True}, TypeError, "shift must be an integer", "True"),
    "shift-far": ({"shift": 2**30}, ValueError, "shift must lie between", "1073741824"),
    "align-list": ({"causal_align": ["top_left"]}, TypeError, "causal_align must be a string"),
    "layout-name": ({"layout": "sbhd"}, ValueError, "layout must be one of bshd", "'sbhd'"),
    "layout-none": ({"layout": None}, TypeError, "layout must be a string", "None"),
    "layout-array": ({"layout": np.array(["bshd"])}, TypeError, "layout must be a string"),
    "window-3": (
        {"window_size": (1, 2, 3)},
        ValueError,
        "window_size must be a pair",
        "(1, 2, 3)",
    ),
    "window-empty": ({"window_size": ()}, ValueError, "window_size must be a pair", "()"),
    "window-minus-2": ({"window_size": (-2, 0)}, ValueError, "window_size must", "(-2, 0)"),
    "window-float": ({"window_size": (1.0, 2)}, TypeError, "window_size must", "(1.0, 2)"),
    "window-nan": ({"window_size": (0, NAN)}, TypeError, "window_size must", "(0, nan)"),
    "window-bool": ({"window_size": (True, 0)}, TypeError, "window_size must", "(True, 0)"),
    "window-string": ({"window_size": "ab"}, TypeError, "window_size must be a pair", "'ab'"),
    "window-int": ({"window_size": 7}, TypeError, "window_size must be a pair", "7 (int)"),
    "window-none": ({"window_size": None}, TypeError, "window_size must be a pair", "None"),
    "window-nested": ({"window_size": ([1], 2)}, TypeError, "window_size must", "([1], 2)"),
    "window-set": ({"window_size": {1, 2}}, TypeError, "window_size must be a pair", "set"),
    "slopes-dtype": (
        {"alibi_slopes": A((4,), "float16")},
        TypeError,
        "alibi_slopes must be float32",
        "float16",
    ),
    "slopes-heads": (
        {"alibi_slopes": A((2,), "float32")},
        ValueError,
        "alibi_slopes must have shape (4,) or (2, 4), got (2,)",
    ),
    "slopes-batch": (
        {"alibi_slopes": A((3, 4), "float32")},
        ValueError,
        "alibi_slopes must have shape (4,) or (2, 4), got (3, 4)",
    ),
    "sinks-dtype": ({"sinks": A((4,), "float16")}, TypeError, "sinks must be float32", "float16"),
    "sinks-heads": (
        {"sinks": A((2,), "float32")},
        ValueError,
        "sinks must have shape (4,), got (2,)",
    ),
    "sinks-batch": (
        {"sinks": A((2, 4), "float32")},
        ValueError,
        "sinks must have shape (4,), got (2, 4)",
    ),
    # Where to write
    "out-shape": ({"out": A(Q.shape)}, ValueError, "out must have shape (2, 9, 4, 24)", "16)"),
    "out-rank": ({"out": A((9, 4, 24))}, ValueError, "out must have shape", "got (9, 4, 24)"),
    "out-dtype": ({"out": A(OUT.shape, "float32")}, TypeError, "out must be float16", "float32"),
    "out-spread": (
        {"out": A((2, 9, 4, 48), index=np.s_[..., ::2])},
        ValueError,
        "out must have a contiguous last axis",
        "got stride 2",
    ),
    "out-reversed": (
        {"out": A(OUT.shape, index=np.s_[..., ::-1])},
        ValueError,
        "out must have a contiguous last axis",
        "got stride -1",
    ),
    # Streams
    "stream-string": ({"stream": "main"}, TypeError, "stream must be a CUDA stream", "'main'"),
    "stream-float": ({"stream": 1.5}, TypeError, "stream must be a CUDA stream", "1.5 (float)"),
    "stream-bool": ({"stream": True}, TypeError, "stream must be a CUDA stream", "True (bool)"),
    "stream-object": ({"stream": object()}, TypeError, "stream must be a CUDA stream", "object"),
    "stream-negative": ({"stream": -1}, ValueError, "stream must be", "-1"),
    "stream-bad-ptr": (
        {"stream": types.SimpleNamespace(ptr="here")},
        TypeError,
        "stream must be a CUDA stream",
        "here",
    ),
    "stream-bad-protocol": (
        {"stream": types.SimpleNamespace(__cuda_stream__=lambda: None)},
        TypeError,
        "stream must be a CUDA stream",
    ),
    # Precision and config
    "precision-name": ({"precision": "fp4"}, ValueError, "precision must be one of tf32", "'fp4'"),
    "precision-float16": (
        {"precision": "tf32"},
        ValueError,
        'precision="tf32" is a way to multiply float32',
        "float16",
    ),
    "precision-bool": ({"precision": True}, TypeError, "precision must be a string", "True"),
    "precision-list": ({"precision": ["tf32"]}, TypeError, "precision must be a string", "['tf32"),
    "config-text": (
        {"config": "64x64"},
        ValueError,
        "a forward config must look like m64n32w4",
        "'64x64'",
    ),
    "config-mma-text": (
        {"config": "sm80-64x64"},
        ValueError,
        "a forward config must look like m64n32w4 or sm80-m64n32w4s2",
        "'sm80-64x64'",
    ),
    "config-empty": ({"config": ""}, ValueError, "a forward config must look like", "got ''"),
    "config-tiles": ({"config": "sm80-m60n64w4s1"}, ValueError, "tile_m = 60", "16 x num_warps"),
    "config-generation": ({"config": "sm91-m64n64w4s1"}, ValueError, "sm75, sm80", "'sm91'"),
    "config-hopper": (
        {"config": "sm90-m64n64w2s1"},
        ValueError,
        "tile_m must be 16 x num_warps, 4, 8 or 12",
    ),
    "config-of-another-family": (
        {"config": BackwardDqConfig(64, 32, 4)},
        TypeError,
        "config must be a string or a config of forward",
        "BackwardDqConfig",
    ),
    "config-number": ({"config": 64}, TypeError, "config must be a string or a config", "64"),
    "config-list": ({"config": ["m64n32w4"]}, TypeError, "config must be a string", "['m64n32w4"),
    "config-dict": (
        {"config": {"backward-dq": "m64n32w4"}},
        ValueError,
        "config of a forward has the keys forward or combine",
        "'backward-dq'",
    ),
    "config-too-large": (
        {"config": "m512n512w32"},
        numflash.UnsupportedError,
        "config m512n512w32 cannot run this forward",
        "needs 1286144 bytes of shared memory per block with head dims 32 and 32",
    ),
    "config-of-tensor-cores-for-float32": (
        {name: A(spec.shape, "float32") for name, spec in FORWARD.items()}
        | {"config": "sm75-m64n64w4s1"},
        numflash.UnsupportedError,
        "config sm75-m64n64w4s1 cannot run this forward",
        'float32 is multiplied exactly unless precision="tf32"',
    ),
    "config-of-tensor-cores-for-a-negative-scale": (
        {"softmax_scale": -1.0, "config": "sm75-m64n64w4s1"},
        numflash.UnsupportedError,
        "config sm75-m64n64w4s1 cannot run this forward",
        "softmax_scale is not positive",
    ),
    "config-of-tensor-cores-for-tf32-on-turing": (
        {name: A(spec.shape, "float32") for name, spec in FORWARD.items()}
        | {"config": "sm75-m64n64w4s1", "precision": "tf32"},
        numflash.UnsupportedError,
        "Turing's tensor cores have float16, not tf32",
    ),
    # Names
    "unknown-option": ({"dropout": 0.1}, TypeError, "dropout"),
}
BAD_BACKWARD = {
    "dout-list": ({"dout": [0.0]}, TypeError, "dout must be", "list"),
    "dout-shape": ({"dout": Q}, ValueError, "dout must have shape (2, 9, 4, 24)", "4, 16)"),
    "dout-dtype": ({"dout": A(OUT.shape, "float32")}, TypeError, "dout must be float16, got"),
    "out-none": ({"out": None}, TypeError, "out must be", "NoneType"),
    "out-shape": ({"out": Q}, ValueError, "out must have shape (2, 9, 4, 24)", "4, 16)"),
    "out-dtype": ({"out": A(OUT.shape, "float32")}, TypeError, "out must be float16, got"),
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
        "config of a backward has the keys backward-dkdv, backward-dq or backward, got 'forward'",
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


def cases(table):
    """Parametrize over a table."""
    return pytest.mark.parametrize(
        "changes, error, words",
        [(changes, error, words) for changes, error, *words in table.values()],
        ids=table.keys(),
    )


def refused(machine, function, arguments, error, words):
    """Check that a call fails as it should, and that nothing was made or launched."""
    machine.made.clear()
    machine.launched.clear()
    with pytest.raises(error) as caught:
        machine.call(function, **arguments)
    # A TypeError is a TypeError, but an UnsupportedError is not a ValueError.
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)
    assert machine.made == machine.launched == []


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


# Overlap


def packed(machine, n: int):
    """n arrays of one shape, interleaved in one buffer."""
    whole = machine.array(A((2, 9, n, 4, 16)))
    return [whole[:, :, i] for i in range(n)]


def test_out_may_interleave_with_the_inputs(machine):
    q, k, v, out = packed(machine, 4)
    for _ in range(2):
        assert numflash.attention(q, k, v, out=out) is out
    assert len(machine.launched) == 2


@pytest.mark.parametrize("name", "qkv")
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_out_must_not_be_an_input(machine, name, warm):
    q, k, v, out = packed(machine, 4)
    if warm:
        numflash.attention(q, k, v, out=out)
    arrays = {"q": q, "k": k, "v": v}
    refused(
        machine,
        numflash.attention,
        {**arrays, "out": arrays[name]},
        ValueError,
        [f"out must not overlap {name}"],
    )


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("name", "qkv")
def test_out_must_not_share_a_single_element_with_an_input(machine, name, warm):
    whole = machine.array(A((100, 16)))
    arrays = {n: machine.array(A((20, 16))) for n in "qkv"}
    arrays[name] = whole[:20]
    apart, touching = whole[20:40], whole[19:39]
    if warm:
        numflash.attention(**arrays, out=apart)
    refused(
        machine,
        numflash.attention,
        {**arrays, "out": touching},
        ValueError,
        [f"out must not overlap {name}"],
    )
    numflash.attention(**arrays, out=apart)
    assert len(machine.launched) == 1


def test_out_must_not_share_columns_with_an_input(machine):
    rows = machine.array(A((9, 64)))
    q, k = rows[:, :16], rows[:, 16:32]
    v, out = rows[:, 32:40], rows[:, 40:48]
    numflash.attention(q, k, v, out=out)
    overlapping = {"q": q, "k": k, "v": v, "out": rows[:, 39:47]}
    refused(machine, numflash.attention, overlapping, ValueError, ["out must not overlap v"])


def test_out_must_not_be_the_slopes(machine):
    whole = machine.array(A((9, 4, 16), "float32"))
    arrays = {"q": whole, "k": machine.array(A((9, 4, 16), "float32"))}
    arrays |= {"v": arrays["k"], "alibi_slopes": whole[0, :, 0], "out": whole}
    arrays["q"] = arrays["k"]
    refused(machine, numflash.attention, arrays, ValueError, ["out must not overlap alibi_slopes"])


def test_out_must_have_room_for_each_element(machine):
    out = machine.array(A((2, 9, 1, 24)))
    spread = broadcast(out, (2, 9, 4, 24))
    words = ["out must not be a broadcast view", "(216, 24, 0, 1)"]
    refused(machine, numflash.attention, {**FORWARD, "out": spread}, ValueError, words)


def test_an_input_may_be_a_broadcast_view(machine):
    k = broadcast(machine.array(A((2, 1, 1, 16))), (2, 11, 2, 16))
    machine.call(numflash.attention, **{**FORWARD, "k": k})
    assert machine.launched


def broadcast(array, shape):
    """A view with stride 0 along the axes that grow."""
    if isinstance(array, np.ndarray):
        return np.lib.stride_tricks.as_strided(array, shape, _strides_of(array, shape))
    return fake_gpu.CuPyArray(shape, array.dtype, array.data.ptr, _strides_of(array, shape))


def _strides_of(array, shape):
    grown = zip(array.shape, array.strides, shape, strict=True)
    return tuple(stride if old == new else 0 for old, stride, new in grown)


# Plans, warmup and what stands around a call


def test_a_plan_refuses_what_it_would_have_to_copy(machine):
    for name, spec in FORWARD.items():
        spread = A((*spec.shape[:-1], 2 * spec.shape[-1]), index=np.s_[..., ::2])
        arguments = {**FORWARD, name: spread}
        words = [f"{name} of a plan must have a contiguous last axis", "stride 2"]
        refused(machine, numflash.plan, arguments, ValueError, words)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"dtype": "float64"}, ValueError, ["dtype must be one of", "'float64'"]),
        ({"head_dim": 0}, ValueError, ["head_dim must be at least 1, got 0"]),
        ({"head_dim_v": -3}, ValueError, ["head_dim_v must be at least 1, got -3"]),
        ({"head_dim": 257}, numflash.UnsupportedError, ["head_dim must be at most 256, got 257"]),
        ({"head_dim": 64.0}, TypeError, ["head_dim must be an integer", "64.0"]),
        ({"head_dim": "64"}, TypeError, ["head_dim must be an integer", "'64'"]),
        ({"precision": "tf32"}, ValueError, ['precision="tf32"', "float16"]),
        (
            {"dtype": "float32", "precision": "fp8"},
            ValueError,
            ['float16 or bfloat16 for precision="fp8"', "'float32'"],
        ),
        ({"precision": "int8"}, ValueError, ["precision must be one of tf32", "'int8'"]),
        ({"precision": "fp8", "backward": True}, numflash.UnsupportedError, ["no backward"]),
    ],
)
def test_warmup_refuses(machine, arguments, error, words):
    refused(machine, numflash.warmup, arguments, error, words)


def test_check_refuses_what_attention_refuses(machine):
    for name in ("q-list", "stream-string", "precision-name", "config-text", "config-too-large"):
        changes, error, *words = BAD_FORWARD[name]
        refused(machine, numflash.check, FORWARD | changes, error, words)


@cases(
    {name: BAD_FORWARD[name] for name in BAD_FORWARD if not name.startswith(("out-", "stream"))}
)
def test_explain_dispatch_refuses_what_attention_refuses(machine, changes, error, words):
    if isinstance(changes.get("config"), dict):
        changes = {"config": {"sideways": "m64n32w4"}}
        error, words = ValueError, ["backward-dkdv, backward-dq or backward, got 'sideways'"]
    refused(machine, numflash.explain_dispatch, FORWARD | changes, error, words)


@pytest.mark.parametrize(
    "config, error, words",
    [
        ({"sideways": "w8"}, ValueError, ["got 'sideways'"]),
        ({"forward": "w8"}, ValueError, ["a forward config must look like", "'w8'"]),
        ({"backward-dq": "w8"}, ValueError, ["a backward-dq config must look like", "'w8'"]),
        ({"backward-dq": 8}, TypeError, ["config must be a string or a config of backward-dq"]),
    ],
    ids=str,
)
def test_configs_by_family_are_refused(machine, config, error, words):
    refused(machine, numflash.explain_dispatch, FORWARD | {"config": config}, error, words)
    if "backward-dq" not in config:
        refused(machine, numflash.check, FORWARD | {"config": config}, error, words)


@pytest.mark.parametrize("wrong", [(("backward-dq", "m64n32w4"),), "m64n32w4"], ids=str)
def test_a_wrong_config_is_refused_though_one_of_equal_parts_is_ready(machine, wrong):
    right = {"config": {"backward-dq": "m64n32w4"}}
    machine.call(numflash.attention_backward, **BACKWARD, **right)
    changes = {"config": wrong}
    words = ["config of a backward must map families to configs"]
    refused(machine, numflash.attention_backward, BACKWARD | changes, TypeError, words)


@needs_gpu_mode
def test_numpy_arrays_without_the_simulator_are_told_what_to_do(machine):
    q = np.zeros(Q.shape, np.float16)
    words = ["q must be an array on a CUDA device", "numpy.ndarray"]
    words += ["cupy.asarray(array)", "NUMBA_ENABLE_CUDASIM=1"]
    refused(machine, numflash.attention, {**FORWARD, "q": q}, TypeError, words)


@needs_gpu_mode
def test_tensors_on_the_cpu_are_refused_though_others_are_ready(machine):
    shape = Q.shape
    tensors = {name: machine.gpu.tensor(shape) for name in "qkv"}
    numflash.attention(**tensors)
    tensors["k"] = machine.gpu.tensor(shape, device=("cpu", None))
    words = ["k must be a tensor on a CUDA device", "cpu"]
    refused(machine, numflash.attention, tensors, TypeError, words)
    refused(machine, numflash.plan, tensors, TypeError, words)


# Tensors that require a gradient, which nothing would record


def tensors_of(machine, specs: dict, *requiring: str) -> dict:
    """Tensors of the fake PyTorch, some of which require a gradient."""
    made = {name: machine.gpu.tensor(spec.shape, spec.dtype) for name, spec in specs.items()}
    for name in requiring:
        made[name].requires_grad = True
    return made


SLOPES = A((4,), "float32")
RECORDED = {
    **{
        f"{function.__name__}-{name}": (
            function,
            FORWARD | {"out": OUT, "alibi_slopes": SLOPES},
            name,
        )
        for function in (numflash.attention, numflash.plan)
        for name in ("q", "k", "v", "out", "alibi_slopes")
    },
    **{
        f"backward-{name}": (numflash.attention_backward, BACKWARD, name)
        for name in ("dout", "q", "k", "v", "out", "lse")
    },
    "check": (numflash.check, FORWARD, "k"),
    "explain": (numflash.explain_dispatch, FORWARD, "k"),
    "quantize": (numflash.quantize_fp8, {"x": Q}, "x"),
}


@needs_gpu_mode
@pytest.mark.parametrize("case", RECORDED)
def test_a_tensor_that_requires_a_gradient_is_refused(machine, case):
    function, specs, name = RECORDED[case]
    words = [f"{name} requires a gradient", "torch.no_grad()", f"{name}.detach()"]
    words += ["attention_backward"]
    for is_ready in (False, True):
        refused(
            machine, function, tensors_of(machine, specs, name), numflash.UnsupportedError, words
        )
        if function is numflash.check:
            return  # a fake has no numbers to compare
        if not is_ready:
            function(**tensors_of(machine, specs))
            machine.launched.clear()


@needs_gpu_mode
@pytest.mark.parametrize("case", [c for c in RECORDED if c != "check"])
def test_a_tensor_that_requires_a_gradient_is_taken_where_none_is_recorded(machine, case):
    function, specs, name = RECORDED[case]
    machine.gpu.torch.grad_enabled = False
    function(**tensors_of(machine, specs, name))


@needs_gpu_mode
def test_a_tensor_in_8_bits_that_requires_a_gradient_is_refused(machine):
    q = machine.gpu.tensor(Q.shape)
    x = numflash.quantize_fp8(q)
    x.descale.requires_grad = True
    with pytest.raises(numflash.UnsupportedError, match=r"x\.descale requires a gradient"):
        numflash.dequantize_fp8(x)
    with pytest.raises(numflash.UnsupportedError, match="k_descale requires a gradient"):
        numflash.attention(q, x, q)


class HostTensor:
    """A PyTorch tensor on the CPU, as NumPy and numflash see it."""

    def __init__(self, array, requires_grad=False, problem=None):
        self.array, self.requires_grad, self.problem = array, requires_grad, problem
        self.dtype = f"torch.{array.dtype.name}"

    def detach(self):
        return HostTensor(self.array, False, self.problem)

    def numpy(self):
        if self.requires_grad:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
        if self.problem:
            raise self.problem
        return self.array

    def __array__(self, dtype=None, copy=None):
        return self.numpy()


@pytest.fixture
def torch(monkeypatch):
    """A PyTorch without a GPU, as a module."""
    module = types.ModuleType("torch")
    module.Tensor, module.grad_enabled = HostTensor, True
    module.is_grad_enabled = lambda: module.grad_enabled
    monkeypatch.setitem(sys.modules, "torch", module)
    monkeypatch.setattr(arrays, "_libraries", {})
    return module


@needs_simulator
@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
@pytest.mark.parametrize("function", [numflash.attention, numflash.plan])
def test_a_simulated_tensor_that_requires_a_gradient_is_refused(machine, torch, name, function):
    words = [f"{name} requires a gradient", "torch.no_grad()"]
    for is_ready in (False, True):
        tensors = {n: HostTensor(machine.array(x)) for n, x in (FORWARD | {"out": OUT}).items()}
        if is_ready:
            function(**tensors)
            machine.launched.clear()
        tensors[name].requires_grad = True
        refused(machine, function, tensors, numflash.UnsupportedError, words)
    torch.grad_enabled = False
    function(**tensors)


@needs_simulator
@pytest.mark.parametrize(
    "problem",
    [
        TypeError("Got unsupported ScalarType BFloat16"),
        TypeError("can't convert cuda:0 device type tensor to numpy."),
        RuntimeError("Can't call numpy() on Tensor that has conjugate bit set."),
    ],
    ids=["bfloat16", "cuda", "conjugate"],
)
@pytest.mark.parametrize("is_tensor", [True, False], ids=["tensor", "another-library's"])
def test_what_numpy_cannot_see_is_refused(machine, torch, problem, is_tensor):
    if not is_tensor:
        torch.Tensor = dict
    tensors = {name: HostTensor(machine.array(x)) for name, x in FORWARD.items()}
    numflash.attention(**tensors)
    machine.launched.clear()
    tensors["k"].problem, tensors["k"].dtype = problem, "torch.bfloat16"
    words = ["k must be an array that NumPy can see in the simulator", "HostTensor of torch."]
    words += [str(problem).rstrip("."), "ml_dtypes.bfloat16"]
    for function in (numflash.attention, numflash.plan, numflash.explain_dispatch):
        refused(machine, function, tensors, TypeError, words)


@needs_gpu_mode
def test_arrays_that_dlpack_says_are_on_the_cpu_are_refused(machine):
    class Foreign:
        def __init__(self, device, seen):
            self.device, self.seen = device, seen

        def __dlpack_device__(self):
            return self.device, 0

        def __dlpack__(self):
            return self.seen

    on_gpu, on_cpu = Foreign(2, machine.array(Q)), Foreign(1, machine.array(Q))
    words = ["k must be an array on a CUDA device"]
    for _ in range(2):
        arguments = {"q": on_gpu, "k": on_cpu, "v": on_gpu}
        refused(machine, numflash.attention, arguments, TypeError, words)
        # The type is now known; that array of it is still not on a GPU.
        numflash.attention(on_gpu, on_gpu, on_gpu)


@needs_simulator
def test_arrays_of_another_byte_order_are_refused(machine):
    q = np.zeros(Q.shape, np.dtype(np.float16).newbyteorder())
    words = ["q must have this machine's byte order", ">f2"]
    refused(machine, numflash.attention, {**FORWARD, "q": q}, TypeError, words)


@needs_simulator
def test_an_out_that_cannot_be_written_is_refused(machine):
    out = np.zeros(OUT.shape, np.float16)
    out.flags.writeable = False
    refused(
        machine, numflash.attention, {**FORWARD, "out": out}, ValueError, ["out must be writeable"]
    )


def test_more_blocks_than_a_grid_has_are_refused(machine):
    # Strides of 0: so large a problem needs no memory.
    q = broadcast(machine.array(A((1, 1, 1, 8))), (2**20, 2**20, 1, 8))
    words = ["the problem needs", "thread blocks; a grid has at most 2147483647"]
    arguments = {"q": q, "k": q, "v": q}
    refused(machine, numflash.attention, arguments, numflash.UnsupportedError, words)
