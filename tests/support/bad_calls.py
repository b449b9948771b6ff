"""Calls of which one thing is wrong, on NumPy's arrays or those of a fake GPU."""

import math
import types
from typing import Any, NamedTuple

import numpy as np
import pytest

import numflash
from numflash.calls import backward, forward, ready, rotary, sequences
from numflash.configs import BackwardDqConfig
from numflash.runtime.mode import SIMULATED
from numflash.runtime.views import numpy_dtype
from tests.support import fake_arrays, fake_gpu

needs_gpu_mode = pytest.mark.skipif(SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM unset")


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

        for module in (forward, backward, rotary, sequences):
            monkeypatch.setattr(module, "Launcher", Launcher)
        monkeypatch.setattr(ready, "_ready", {})

    def array(self, spec: A):
        """The array of a spec."""
        if self.gpu is None:
            return np.zeros(spec.shape, numpy_dtype(spec.dtype))[spec.index]
        array = self.gpu.array(spec.shape, spec.dtype, spec.device)
        return array[spec.index] if spec.index != () else array

    def call(self, function, **arguments):
        """Call with every `A`, also those in tuples, made an array."""
        return function(**{name: self._made(x) for name, x in arguments.items()})

    def _made(self, x):
        if isinstance(x, A):
            return self.array(x)
        return tuple(map(self._made, x)) if type(x) is tuple else x


Q, K, V = A((2, 9, 4, 16)), A((2, 11, 2, 16)), A((2, 11, 2, 24))
OUT, LSE = A((2, 9, 4, 24)), A((2, 4, 9), "float32")
FORWARD = {"q": Q, "k": K, "v": V}
BACKWARD = {"dout": OUT, **FORWARD, "out": OUT, "lse": LSE}
NAN, INF = math.nan, math.inf
TENSOR_LIKE = types.SimpleNamespace(shape=(2, 9, 4, 16), is_cuda=False)


# name: (what is different from a right call, the error, what the message must contain)
BAD_FORWARD = {
    # A number is no array; only a seed may be one.
    "mask-true": ({"mask": True}, TypeError, "mask must be", "bool"),
    "bias-number": ({"bias": 2}, TypeError, "bias must be", "int"),
    "sinks-number": ({"sinks": 0}, TypeError, "sinks must be", "int"),
    "alibi-number": ({"alibi_slopes": 1}, TypeError, "alibi_slopes must be", "int"),
    "seqlens-number": ({"seqlens_k": 5}, TypeError, "seqlens_k must be", "int"),
    "starts-number": ({"starts_q": 5}, TypeError, "starts_q must be", "int"),
    "invariant-without-lengths": (
        {"batch_invariant": True},
        ValueError,
        "batch_invariant=True goes with sequences that have lengths of their own",
    ),
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
    "origin-number": ({"origin": 3}, TypeError, "origin must be three numbers", "3 (int)"),
    "origin-two": ({"origin": (1, 2)}, ValueError, "origin must be three numbers", "(1, 2)"),
    "origin-real": ({"origin": (0, 1.5, 0)}, TypeError, "origin must be three", "(0, 1.5, 0)"),
    "origin-bool": ({"origin": (0, 0, True)}, TypeError, "origin must be three", "True"),
    "origin-negative": ({"origin": (-1, 0, 0)}, ValueError, "origin must", "from 0 up", "(-1, "),
    "origin-far": ({"origin": (0, 2**30, 0)}, ValueError, "origin must", "1073741824"),
    "origin-beyond-sinks": (
        {"origin": (0, 0, 3), "sinks": A((6,), "float32")},
        ValueError,
        "sinks must have shape (heads,) with at least 7 heads, origin's 3 and 4 of q, got (6,)",
    ),
    "origin-beyond-slopes": (
        {"origin": (0, 0, 0), "alibi_slopes": A((2, 3), "float32")},
        ValueError,
        "alibi_slopes must have shape (heads,) or (2, heads) with at least 4 heads",
        "got (2, 3)",
    ),
    "origin-batch": (
        {"origin": (0, 0, 0), "alibi_slopes": A((3, 4), "float32")},
        ValueError,
        "alibi_slopes must have shape (heads,) or (2, heads)",
        "got (3, 4)",
    ),
    "out-dtype-name": (
        {"out_dtype": "float64"},
        ValueError,
        "out_dtype must be float16 or float32, got 'float64'",
    ),
    "out-dtype-of-another": (
        {"out_dtype": "bfloat16"},
        ValueError,
        "out_dtype must be float16 or float32, got 'bfloat16'",
    ),
    "out-dtype-type": ({"out_dtype": np.float32}, TypeError, "out_dtype must be a string"),
    "out-dtype-list": ({"out_dtype": ["float32"]}, TypeError, "out_dtype must be a string"),
    "out-of-out-dtype": (
        {"out_dtype": "float32", "out": OUT},
        TypeError,
        "out must be float32, got float16",
    ),
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
    "dropout-one": ({"dropout_p": 1.0}, ValueError, "dropout_p must be at least 0", "got 1.0"),
    "dropout-negative": ({"dropout_p": -0.1, "seed": 1}, ValueError, "dropout_p must be at least"),
    "dropout-nan": ({"dropout_p": NAN, "seed": 1}, ValueError, "dropout_p must be finite", "nan"),
    "dropout-nearly-one": (
        {"dropout_p": 1 - 2.0**-18, "seed": 1},
        ValueError,
        "dropout_p must stay below 1",
        "multiple of 2**-16",
    ),
    "dropout-string": ({"dropout_p": "0.1", "seed": 1}, TypeError, "dropout_p must be a real"),
    "dropout-bool": (
        {"dropout_p": True, "seed": 1},
        TypeError,
        "dropout_p must be a real",
        "True",
    ),
    "dropout-array": (
        {"dropout_p": A((1,), "float32"), "seed": 1},
        TypeError,
        "dropout_p must be",
    ),
    "dropout-without-seed": ({"dropout_p": 0.1}, ValueError, "dropout_p needs a seed"),
    "seed-float": ({"dropout_p": 0.1, "seed": 1.0}, TypeError, "seed must be an integer", "1.0"),
    "seed-bool": ({"dropout_p": 0.1, "seed": True}, TypeError, "seed must be an integer", "True"),
    "seed-string": ({"dropout_p": 0.1, "seed": "1"}, TypeError, "seed must be an integer", "'1'"),
    "seed-list": ({"dropout_p": 0.1, "seed": [1]}, TypeError, "seed must be", "list"),
    "seed-65-bits": ({"dropout_p": 0.1, "seed": 2**64}, ValueError, "seed must have at most 64"),
    "seed-dtype": (
        {"dropout_p": 0.1, "seed": A((1,), "float32")},
        TypeError,
        "seed must be int64, int32 or uint64, got float32",
    ),
    "seed-shape": (
        {"dropout_p": 0.1, "seed": A((2,), "int64")},
        ValueError,
        "seed must be an array of one element, got shape (2,)",
    ),
    "dropout-in-8-bits": (
        {"dropout_p": 0.1, "seed": 1, "precision": "fp8"},
        numflash.UnsupportedError,
        "dropout_p goes with 16 and 32 bits",
        'precision="fp8"',
    ),
    "dropout-packed": (
        {"dropout_p": 0.1, "seed": 1, "config": "sm75-m32n16w2s1-packed"},
        numflash.UnsupportedError,
        "random bits of their own cannot be packed",
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


def broadcast(array, shape):
    """A view with stride 0 along the axes that grow."""
    if isinstance(array, np.ndarray):
        return np.lib.stride_tricks.as_strided(array, shape, _strides_of(array, shape))
    return fake_arrays.CuPyArray(shape, array.dtype, array.data.ptr, _strides_of(array, shape))


def _strides_of(array, shape):
    grown = zip(array.shape, array.strides, shape, strict=True)
    return tuple(stride if old == new else 0 for old, stride, new in grown)
