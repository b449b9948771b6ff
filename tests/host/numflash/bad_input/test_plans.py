"""Bad input of plans, warmup, check and explain_dispatch, and of the options around a call."""

import numpy as np
import pytest

import numflash
from tests.support.bad_calls import (
    BACKWARD,
    BAD_FORWARD,
    FORWARD,
    A,
    Q,
    cases,
    needs_gpu_mode,
    refused,
)

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
        ({"fp8": numflash.Fp8Recipe()}, ValueError, ["fp8 says how", "precision is None"]),
        ({"wrt": ("q",)}, ValueError, ["wrt is of gradients", "goes with backward=True"]),
        ({"grad_dtype": "float32"}, ValueError, ["grad_dtype is of gradients"]),
        ({"backward": True, "wrt": ("x",)}, ValueError, ["wrt must name gradients of", "'x'"]),
        ({"backward": True, "wrt": ("bias",)}, ValueError, ["wrt names 'bias'"]),
        ({"backward": True, "grad_dtype": "float64"}, ValueError, ["grad_dtype must be float16"]),
        ({"out_dtype": "float64"}, ValueError, ["out_dtype must be float16 or float32"]),
        ({"colour": 1}, TypeError, ["warmup got unknown options: colour", "alibi", "dlse"]),
        ({"alibi": 1}, TypeError, ["alibi must be True or False, got 1"]),
        ({"batch": 0}, ValueError, ["batch must be at least 1, got 0"]),
        ({"num_heads": 2.0}, TypeError, ["num_heads must be an integer, got 2.0"]),
        ({"num_heads": 3, "num_heads_kv": 2}, ValueError, ["positive multiple", "3 and 2"]),
        ({"seqlen_q": "8"}, TypeError, ["seqlen_q must be an integer, got '8'"]),
        ({"bias": np.zeros((3, 1, 1, 1), np.float16)}, ValueError, ["bias must", "(3, 1, 1, 1)"]),
        ({"schedule": 4}, TypeError, ["schedule must be what plan_varlen returns, got 4"]),
        ({"num_splits": 2}, ValueError, ["num_splits goes with sequences that have lengths"]),
    ],
)
def test_warmup_refuses(machine, arguments, error, words):
    refused(machine, numflash.warmup, arguments, error, words)


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"wrt": ("q",)}, ValueError, ["wrt is of gradients", "goes with a plan with dout"]),
        ({"dout": A((2, 100, 4, 96), index=np.s_[..., ::2])}, ValueError, ["dout of a plan must"]),
        ({"dout": FORWARD["q"], "wrt": "q"}, TypeError, ["wrt must be a tuple of names"]),
        (
            {"dout": FORWARD["q"], "precision": "fp8"},
            numflash.UnsupportedError,
            ["there is no backward on 8-bit floats"],
        ),
        (
            {"dout": FORWARD["q"], "config": {"sideways": "w8"}},
            ValueError,
            ["config of a backward has the keys", "'sideways'"],
        ),
    ],
)
def test_a_plan_refuses_wrong_options_of_gradients(machine, changes, error, words):
    with pytest.raises(error) as caught:
        machine.call(numflash.plan, **FORWARD, **changes)
    assert all(word in str(caught.value) for word in words) and machine.launched == []


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"wrt": ("bias",)}, ValueError, ["wrt names 'bias'", "does not have"]),
        ({"wrt": "q"}, TypeError, ["wrt must be a tuple of names"]),
        ({"grad_dtype": "float64"}, ValueError, ["grad_dtype must be"]),
        ({"dlse": A((1, 2, 3), "float32")}, ValueError, ["dlse must have shape"]),
        ({"delta": A(Q.shape)}, TypeError, ["delta must be float32"]),
        (
            {"precision": "fp8", "wrt": ("q",)},
            numflash.UnsupportedError,
            ["there is no backward on 8-bit floats"],
        ),
    ],
)
def test_explain_dispatch_refuses_what_gradients_refuse(machine, changes, error, words):
    refused(machine, numflash.explain_dispatch, FORWARD | changes, error, words)


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
        error, words = (
            ValueError,
            ["has the keys backward-dkdv, backward-dq, ", "or backward, got 'sideways'"],
        )
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
