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
