"""Where functions end: rows without keys, slopes without bound, the last element of arrays."""

import numpy as np
import pytest

import numflash
from numflash import masks
from numflash.math import log, maximum, where
from tests.support.attention_cases import SMALL_CONFIGS
from tests.support.covering import some
from tests.support.faults import Mutation, load

NEG_INF = -float("inf")
# The GPU, the options that lead to a kernel, head_dim, and whether there are gradients.
KERNELS = {
    "portable": ("sm_80", {"config": SMALL_CONFIGS["portable"][0]}, 8, True),
    "sm80": ("sm_80", {"config": SMALL_CONFIGS["sm80"][1]}, 16, True),
    "sm80-one-backward": ("sm_80", {"config": SMALL_CONFIGS["sm80"][4]}, 16, True),
    "sm90": ("sm_90a", {"config": {"forward": "sm90-m64n32w4s1x2-overlap"}}, 32, False),
    "fp8": ("sm_89", {"precision": "fp8"}, 32, False),
    "fp8-sm90": ("sm_90a", {"precision": "fp8"}, 32, False),
}
ROWS, KEYS = 19, 21


def inputs(head_dim, rows=ROWS, keys=KEYS, heads=2):
    """q, k, v and dout, of two query heads that share keys."""
    rng = np.random.default_rng(3)
    shapes = (rows, heads), (keys, 1), (keys, 1), (rows, heads)
    return [rng.standard_normal((1, *x, head_dim)).astype(np.float16) for x in shapes]


def hide_some(score, batch, head, q_idx, kv_idx):
    return where((q_idx >= 12) & (q_idx < 15), NEG_INF, score)


def see_some(batch, head, q_idx, kv_idx):
    return (q_idx < 8) | (q_idx >= 12)


@pytest.mark.parametrize("name", some(KERNELS, "sm80-one-backward"))
def test_rows_that_see_nothing(on, name):
    """By a mask the first four, by a bias four, by each function three; some see one key."""
    arch, options, head_dim, has_gradients = KERNELS[name]
    on(arch)
    q, k, v, dout = inputs(head_dim)
    mask = np.ones((ROWS, KEYS), bool)
    mask[:4] = False
    mask[4:6, 1:] = False
    bias = np.zeros((2, ROWS, KEYS), np.float32)
    bias[:, 5:8] = NEG_INF
    empty = [*range(4), *range(5, 15)]
    options = {
        **options,
        "mask": mask,
        "bias": bias,
        "score_mod": hide_some,
        "mask_mod": see_some,
    }
    forward = {**options}
    if "config" in options:
        forward["config"] = {n: c for n, c in options["config"].items() if "back" not in n}
    out, lse = numflash.attention(q, k, v, return_lse=True, **forward)
    assert not out[:, empty].any() and np.isneginf(lse[..., empty]).all()
    assert np.isfinite(out).all() and np.isfinite(lse[..., [4, *range(15, ROWS)]]).all()
    if has_gradients:
        backward = {n: c for n, c in options["config"].items() if "back" in n}
        options["config"] = backward
        dq, dk, dv = numflash.attention_backward(dout, q, k, v, out, lse, **options)
        assert not dq[:, empty].any() and dq[:, 15:].any()
        assert all(np.isfinite(x).all() for x in (dq, dk, dv))
        exact = numflash.reference.attention_backward(
            dout, q, k, v, **{n: x for n, x in options.items() if n != "config"}
        )
        for found, wanted in zip((dq, dk, dv), exact, strict=True):
            np.testing.assert_allclose(found, wanted, atol=0.02)


def logarithm(score, batch, head, q_idx, kv_idx):
    """Its slope is infinite or none where P is 0."""
    return log(maximum(score, 0.0))


def reciprocal(score, batch, head, q_idx, kv_idx):
    """It is infinite for the zeros that fill the last tile."""
    return 0.001 / abs(score)


ENDLESS = [
    ("portable", logarithm),
    ("sm80", logarithm),
    ("sm80-one-backward", logarithm),
    ("portable", reciprocal),
    ("sm80", reciprocal),
    ("sm80-one-backward", reciprocal),
]


@pytest.mark.parametrize(("name", "function"), some(ENDLESS, ENDLESS[1]))
def test_infinite_slopes_and_scores(on, name, function):
    arch, options, head_dim, _ = KERNELS[name]
    on(arch)
    q, k, v, dout = inputs(head_dim, 9, 18, 1)
    report = numflash.check(q, k, v, dout=dout, score_mod=function, **options)
    assert report.passed, f"\n{report}"


def test_precision_is_chosen_for_heads_with_functions(on):
    on("sm_89")
    q, k, v, _ = inputs(64, 9, 18)
    bias = np.ones((9, 18), np.float32)
    report = numflash.check(q, k, v, precision="auto", bias=bias, mask_mod=masks.causal)
    assert report.passed, f"\n{report}"


def table_and_flags(score, batch, head, q_idx, kv_idx, table, flags):
    return score + table[head, q_idx] * table[head, kv_idx]


def flags_of_keys(batch, head, q_idx, kv_idx, table, flags):
    return flags[kv_idx] | (q_idx == kv_idx)


@pytest.mark.parametrize("name", some(["sm80", "sm90"], "sm80"))
def test_reads_stay_inside_arrays_that_end_with_the_sequence(on, name):
    """What lies behind would be NaN or true; the simulator stops at the end of an allocation."""
    arch, options, head_dim, has_gradients = KERNELS[name]
    on(arch)
    q, k, v, dout = inputs(head_dim, 19, 19)
    rng = np.random.default_rng(1)
    room = np.full((2, 40), np.nan, np.float16)
    room[:, :19] = rng.standard_normal((2, 19))
    flags = rng.random(19) < 0.6
    bias = np.ascontiguousarray(rng.standard_normal((1, 1, 19, 19)).astype(np.float32))
    report = numflash.check(
        q,
        k,
        v,
        dout=dout if has_gradients else None,
        bias=bias[::-1, :, ::-1],
        score_mod=table_and_flags,
        mask_mod=flags_of_keys,
        aux=(room[:, :19], flags[::-1]),
        **options,
    )
    assert report.passed, f"\n{report}"


@pytest.mark.parametrize("keys", some([0, 1], 1))
def test_no_key_and_one(on, keys):
    on("sm_80")
    q, k, v, dout = inputs(16, 5, keys)
    bias = np.ones((5, keys), np.float32)
    options = {"bias": bias, "mask_mod": lambda b, h, i, j: i != 2}
    out, lse = numflash.attention(q, k, v, return_lse=True, **options)
    empty = [2] if keys else range(5)
    assert not out[:, empty].any() and np.isneginf(lse[..., empty]).all()
    gradients = numflash.attention_backward(dout, q, k, v, out, lse, **options)
    assert all(np.isfinite(x).all() for x in gradients)


SCORES, FEATURES = "numflash.tiles.scores", "numflash.tiles.features"
MMA, SOFTMAX = "numflash.tiles.mma.scores", "numflash.tiles.mma.softmax"
KERNELS_OF = "numflash.kernels.mma.forward", "numflash.kernels.mma.backward"
FAULTS = {
    "a query beyond the last": (SCORES, Mutation("i", "min(i, i32(sequence.seqlen_q - 1))", "i")),
    "a key beyond the last": (SCORES, Mutation("j", "min(j, i32(sequence.seqlen_k - 1))", "j")),
    "the slope forgotten": (
        FEATURES,
        Mutation("slope", "more if after_features else slope * more", "slope", 2),
    ),
    "a slope without bound where P is 0": (
        SOFTMAX,
        Mutation("P is 0", "gradient if probability > f32(0) else f32(0)", "gradient"),
    ),
    "kept what is hidden": (
        MMA,
        Mutation("keep", "s_acc[e] if is_kept else", "s_acc[e] if not is_kept else", 2),
    ),
    "the column before": (
        MMA,
        Mutation("column", "place_of_score(corner, r, c + 1", "place_of_score(corner, r, c"),
    ),
}


@pytest.mark.parametrize("name", [None, *FAULTS])
def test_a_fault_is_found(on, monkeypatch, name):
    on("sm_80")
    if name is not None:
        load((FEATURES, SCORES, MMA, SOFTMAX, *KERNELS_OF), *FAULTS[name], monkeypatch)
    q, k, v, dout = inputs(16, 17, 18, 1)
    options = {
        "bias": np.random.default_rng(0).standard_normal((17, 18)).astype(np.float32),
        "mask_mod": masks.causal,
        "score_mod": logarithm,
        "config": SMALL_CONFIGS["sm80"][4],
    }
    try:
        passed = numflash.check(q, k, v, dout=dout, **options).passed
    except IndexError as error:
        assert "bias" in str(error) and "beyond" in name
        passed = False
    assert passed == (name is None)
