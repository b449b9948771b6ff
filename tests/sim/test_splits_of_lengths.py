"""Long sequences whose keys are split, and the kernel that puts their parts together.

Which tiles are split is found on the device. Workspaces are NaN before they are written.
"""

import numpy as np
import pytest

import numflash
from numflash.selection import geometry
from tests.support.covering import some
from tests.support.page_cases import CAUSAL, Paged, arrays_of, called, compare, expected_of

ONE, TWO, STAGES = "sm80-m16n16w1s1x2", "sm80-m32n16w2s2x2", "sm80-m16n32w1s2x2"
# Of tiles of 16 keys: many parts, one, none, and several of which the last is of one key.
KEYS, FEW = (330, 5, 0, 49), (70, 5, 0, 33)
SINKS = np.array([0.5, -1.0], np.float32)


def _hides_the_first(b, h, i, j):
    return j >= 40


# `least` is the number of tiles in a part.
CASES = {
    "more parts than chains": (1, Paged(ONE, 16, KEYS, heads=(1, 1))),
    "two parts": (4, Paged(ONE, 5, (100, 64, 65))),
    "two warps": (1, Paged(TWO, 8, FEW, 3, (1, 1))),
    "a window of the last round": (1, Paged(ONE, 16, (600,), options={"window_size": (30, 0)})),
    "a window within a round": (1, Paged(ONE, 7, (300, 9), options={"window_size": (70, 0)})),
    "a window of two rounds": (1, Paged(ONE, 16, (370,), options={"window_size": (200, 0)})),
    "a window, many queries": (
        2,
        Paged(TWO, 16, (100, 5), 18, (1, 1), options={"window_size": (50, 9)}),
    ),
    "a part without keys": (1, Paged(ONE, 16, (90, 30), options={"mask_mod": _hides_the_first})),
    "grouped heads": (1, Paged(ONE, 16, (70, 3), 2, (4, 2))),
    "grouped heads, apart": (1, Paged(ONE + "-unpacked", 16, (90, 5), 2, (4, 2))),
    "packed queries": (2, Paged(TWO, 16, FEW, (2, 1, 1, 17), (2, 1))),
    "left out": (1, Paged(ONE, 7, (90, 20), left_out=(30, 3))),
    "stages": (1, Paged(STAGES, 16, FEW)),
    "float32 results": (1, Paged(ONE, 16, FEW, 2, options=CAUSAL | {"out_dtype": "float32"})),
    "bfloat16": (1, Paged(ONE, 16, FEW, dtype="bfloat16")),
    "tf32": (1, Paged(ONE, 16, (90,), dtype="float32", options={"precision": "tf32"})),
    "Turing": (1, Paged("sm75-m16n16w1s1x2", 16, (90, 3), arch="sm_75")),
    "not aligned": (1, Paged(ONE, 16, (90, 3), 2, aligned=False)),
    "odd head_dims": (1, Paged(ONE, 16, (90, 3), 2, head_dims=(33, 17))),
    "features": (1, Paged(TWO, 16, FEW, options=CAUSAL | {"softcap": 2.0, "sinks": SINKS})),
    "dropout": (1, Paged(ONE, 16, (90, 20), options={"dropout_p": 0.3, "seed": 5})),
}


KEPT = (
    "more parts than chains",
    "a window of two rounds",
    "a window, many queries",
    "a part without keys",
    "packed queries",
    "Turing",
    "not aligned",
    "features",
)


@pytest.mark.parametrize("name", some(CASES, *KEPT))
def test_each_sequence_is_right(name, on, monkeypatch):
    least, case = CASES[name]
    on(case.arch)
    monkeypatch.setattr(geometry, "LEAST_STAGES", least)
    arrays = arrays_of(case, len(name))
    *got, kernel = called(*arrays[:4])
    assert "x2" in kernel
    compare(case, got, expected_of(case, arrays))


def test_sequences_of_one_array(on, monkeypatch):
    """Without pages, and with gradients of what parts were put together to."""
    on("sm_80")
    monkeypatch.setattr(geometry, "LEAST_STAGES", 1)
    rng = np.random.default_rng(2)
    q, k, v, dout = (rng.standard_normal((n, 1, 16)).astype("f2") for n in (5, 170, 170, 5))
    ends = np.array([0, 2, 3, 5], np.int32), np.array([0, 120, 120, 170], np.int32)
    options = {"cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1], "layout": "thd", "causal": True}
    configs = {"forward": ONE, "backward-dq": "sm80-m16n16w1s1"}
    report = numflash.check(q, k, v, dout=dout, wrt=("q",), config=configs, **options)
    assert report.passed, f"\n{report}"


def test_a_result_of_the_callers_keeps_rows_that_no_sequence_has(on, monkeypatch):
    on("sm_80")
    monkeypatch.setattr(geometry, "LEAST_STAGES", 1)
    case = Paged(ONE, 16, (90, 3), 4)
    arrays = arrays_of(case)
    arrays.options["seqlens_q"] = np.array([2, 3], np.int32)
    out = np.full_like(arrays.q, 7)
    result, lse, _ = called(*arrays[:4], out)
    assert result is out
    for entry, n in enumerate((2, 3)):
        assert (out[entry, n:] == 7).all() and np.isneginf(lse[entry, :, n:]).all()
        assert (out[entry, :n] != 7).all() and np.isfinite(lse[entry, :, :n]).all()


def test_parts_that_have_no_room_are_not_read(on, monkeypatch):
    """Sequences that have all keys in common have more parts than there is room for."""
    on("sm_80")
    monkeypatch.setattr(geometry, "LEAST_STAGES", 1)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, 1, 16)).astype("f2") for n in (6, 90, 90))
    ends = np.arange(7, dtype=np.int32), np.array([0, *[90, 0] * 3], np.int32)
    out = np.zeros_like(q)
    numflash.attention_varlen(q, k, v, *ends, config=ONE, out=out)
