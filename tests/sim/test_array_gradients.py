"""Gradients of a bias, and of arrays that a function of scores reads."""

import itertools

import ml_dtypes
import numpy as np
import pytest

import numflash
from numflash.calls import ready
from numflash.calls.launch import Launcher
from numflash.runtime.arrays import _NumPy
from tests.support.covering import covering

OF_SCORES = ("backward-rows", "backward-columns", "backward-tiles", "backward-scatter")
CONFIG = {"forward": "m16n16w2", **dict.fromkeys(OF_SCORES, "m16n16w2")}
BACKWARD = dict.fromkeys(OF_SCORES, "m16n16w2")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
BATCH, HEADS, QUERIES, KEYS = SHAPE = 2, 4, 21, 19


@pytest.fixture(autouse=True)
def poisoned_results(monkeypatch):
    """What is allocated holds 0xFF bytes, NaN, before it is written; no call is remembered."""
    empty = _NumPy.empty

    def poisoned(self, shape, dtype, device):
        array = empty(self, shape, dtype, device)
        array.view(np.uint8)[...] = 0xFF
        return array

    monkeypatch.setattr(_NumPy, "empty", poisoned)
    monkeypatch.setattr(ready, "_ready", {})


@pytest.fixture
def launched(monkeypatch):
    """The families of the kernels launched, in order."""
    found, bind = [], Launcher.bind

    def counted(self, operands):
        launch = bind(self, operands)

        def run(stream):
            found.append(self._config.family)
            launch(stream)

        return run

    monkeypatch.setattr(Launcher, "bind", counted)
    return found


def inputs(dtype="float32", heads_kv=2, head_dim=8, shape=SHAPE, seed=0):
    """q, k, v and dout."""
    batch, heads, queries, keys = shape
    rng = np.random.default_rng(seed)
    shapes = [(queries, heads), (keys, heads_kv), (keys, heads_kv), (queries, heads)]
    return [rng.standard_normal((batch, *each, head_dim)).astype(DTYPES[dtype]) for each in shapes]


def normal(shape, dtype="float32", seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPES[dtype])


def check(dtype="float32", wrt=("bias",), shape=SHAPE, heads_kv=2, **options):
    """The report of a call, which must be within budget; and no worse than a naive sum."""
    q, k, v, dout = inputs(dtype, heads_kv, shape=shape)
    report = numflash.check(q, k, v, dout=dout, wrt=wrt, config=CONFIG, **options)
    assert [error.name for error in report.errors] == ["out", "lse", *(f"d{x}" for x in wrt)]
    assert report.passed, f"\n{report}"
    return report


# Broadcasting of a bias

BROADCASTS = list(itertools.product((True, False), repeat=4))


def bias_cases():
    """Each set of axes, and with it causal or not, a dtype of q and one of the bias."""
    rows = itertools.product(BROADCASTS, (False, True), DTYPES, DTYPES)
    return covering(
        list(rows), lambda row: (row[0], (row[0][2:], row[1]), (row[0][2:], row[2], row[3]))
    )


@pytest.mark.parametrize(("kept", "causal", "dtype", "dtype_of_bias"), bias_cases())
def test_a_bias_has_a_gradient_of_its_own_shape(kept, causal, dtype, dtype_of_bias):
    shape = [n if is_kept else 1 for n, is_kept in zip(SHAPE, kept, strict=True)]
    bias = normal(shape, dtype_of_bias)
    check(dtype, bias=bias, causal=causal, heads_kv=2 if causal else 4)
