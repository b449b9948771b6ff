"""The kernels that `explain_dispatch` names are those that run."""

import numpy as np
import pytest

import numflash
from numflash.selection import choice as selection
from tests.support.api_calls import (
    FP8_CONFIG,
    HKV,
    TENSOR_CORES,
    B,
    H,
    arrays,
    codes_with_scales,
    fp8_arrays,
)

pytestmark = pytest.mark.usefixtures("shipped_kernels")


def test_what_is_explained_is_what_runs(rng, monkeypatch):
    q, k, v = arrays(rng, dtype=np.float16)
    explanation = numflash.explain_dispatch(q, k, v, causal=True)
    choice = explanation.forward
    plan = numflash.plan(q, k, v, causal=True)
    assert plan.kernel == f"forward {choice.config} {choice.traits}"
    assert str(choice.config) == TENSOR_CORES["forward"]
    assert explanation.geometry.pack == H // HKV
    for family, choice in explanation.backward.items():
        assert str(choice.config) == TENSOR_CORES[family]


def test_what_is_explained_on_8_bit_floats_is_what_runs(rng):
    q, k, v = arrays(rng, dtype=np.float16)
    explanation = numflash.explain_dispatch(q, k, v, precision="fp8", config=FP8_CONFIG)
    choice, plan = explanation.forward, numflash.plan(q, k, v, precision="fp8", config=FP8_CONFIG)
    assert plan.kernel == f"forward {choice.config} {choice.traits}"
    assert str(choice.config) == FP8_CONFIG and choice.traits.fp8
    assert explanation.geometry.pack == H // HKV
    assert (explanation.combine, explanation.backward) == (None, {})
    text = str(explanation)
    assert "no backward on 8-bit floats" in text and "multiplied as float16" in text
    # Blocks of 16 keys share a scale, tiles have 32.
    quantized = fp8_arrays(rng)
    choice = numflash.explain_dispatch(*quantized, config={"forward": FP8_CONFIG}).forward
    assert choice.traits.key_scales
    plan = numflash.plan(*quantized, config=FP8_CONFIG)
    assert plan.kernel == f"forward {choice.config} {choice.traits}"
    codes, scales = codes_with_scales(rng)
    assert not numflash.explain_dispatch(*codes, **scales).forward.traits.key_scales


def test_both_kernels_of_a_chosen_precision_are_explained(rng):
    q, k, v = arrays(rng, dtype=np.float16)
    explanation = numflash.explain_dispatch(q, k, v, precision="auto", max_rel_error=0.2)
    plan = numflash.plan(q, k, v, precision="auto", max_rel_error=0.2)
    choice, other = explanation.forward, explanation.in_16_bits
    assert plan.kernel == f"forward {choice.config} {choice.traits}"
    assert (choice.traits.fp8, other.traits.fp8) == (True, False)
    assert choice.traits.selected and other.traits.selected
    assert str(other.config) == TENSOR_CORES["forward"] and str(other) in str(explanation)
    with pytest.raises(ValueError, match="max_rel_error"):
        numflash.explain_dispatch(q, k, v, precision="auto", max_rel_error=-1)


def test_splits_on_8_bit_floats_are_explained(rng):
    q, k, v = arrays(rng, dtype=np.float16)
    options = {"precision": "fp8", "config": f"{FP8_CONFIG}x2"}
    explanation = numflash.explain_dispatch(q, k, v, **options)
    assert explanation.geometry.num_splits == 2
    assert explanation.combine.family == "combine" and not explanation.combine.traits.fp8
    assert "split over 2 blocks" in str(explanation)


def test_what_is_asked_about_8_bit_floats_is_checked(rng):
    q, k, v = arrays(rng, dtype=np.float16)
    with pytest.raises(ValueError, match='precision="fp8"'):
        numflash.explain_dispatch(q, k, v, fp8=numflash.Fp8Recipe())
    with pytest.raises(ValueError, match="backward-dq"):
        numflash.explain_dispatch(q, k, v, precision="fp8", config={"backward-dq": "m16n16w2"})
    codes, scales = codes_with_scales(rng)
    with pytest.raises(ValueError, match="v_descale must have"):
        numflash.explain_dispatch(*codes, **scales | {"v_descale": np.ones((B, 7), np.float32)})
    assert numflash.explain_dispatch(q[:, :0], k, v, precision="fp8").forward.traits.fp8


def test_forced_calls_on_8_bit_floats_are_neither_captured_nor_tuned(rng, monkeypatch):
    noted = []
    monkeypatch.setattr(selection.capture, "note", noted.append)
    monkeypatch.setattr(selection.autotune, "tune", lambda *args: noted.append(args))
    monkeypatch.setattr(selection.tuned, "find", lambda *args: noted.append(args))
    monkeypatch.setattr(selection.tuned, "enabled", lambda: True)
    q, k, v = arrays(rng, dtype=np.float16)
    for config in (FP8_CONFIG,):
        numflash.plan(q, k, v, precision="fp8", config=config)
        numflash.explain_dispatch(q, k, v, precision="fp8", config=config)
    assert noted == []
