"""numflash's own kernels, compiled and executed: against float64, and bits with the simulator."""

import ml_dtypes
import numpy as np
import pytest

import numflash
from numflash import masks
from numflash.problem.fp8 import Fp8Recipe
from numflash.simulator import SimulationError
from tests.executed.conftest import normal
from tests.support.covering import some, thorough

BF16 = ml_dtypes.bfloat16
# Small ones compile fast.
_SMALL = {
    "portable": {
        "forward": "m16n16w2",
        "backward-dq": "m16n16w2",
        "backward-dkdv": "m16n16w2",
    },
    "sm75": {
        "forward": "sm75-m32n16w2s1",
        "backward-dq": "sm75-m16n16w1s1",
        "backward-dkdv": "sm75-m16n16w1s1-apart",
    },
    "sm80": {
        "forward": "sm80-m32n16w2s2",
        "backward-dq": "sm80-m16n16w1s1",
        "backward-dkdv": "sm80-m16n32w2s2",
    },
    # Parts of the forward are put together, and so are those of dq.
    "combine": {"forward": "sm80-m32n16w1s1x2", "backward": "sm80-m16n16w1s2x2"},
}


def _scaled(score, batch, head, q_idx, kv_idx, table, scale):
    return score * scale + table[(q_idx - kv_idx) % 7]


BIAS = {"bias": normal((150,), np.float16, 4)}
PROGRAM = {
    "bias": normal((1, 40, 40), BF16, 5),
    "mask": normal((40, 1), np.float32, 6) < 1,
    "score_mod": _scaled,
    "mask_mod": lambda b, h, i, j, *aux: (i + j) % 3 != 0,
    "aux": (normal((7,), np.float32, 7), 0.75),
}
# Calls, and the GPU of their code: dtype, tokens, head_dim, whether gradients, options.
CASES = {
    "portable": (
        "sm_80",
        np.float32,
        40,
        16,
        True,
        {"causal": True, "config": _SMALL["portable"]},
    ),
    "sm80": ("sm_80", np.float16, 40, 32, True, {"causal": True}),
    "sm75": ("sm_75", np.float16, 40, 32, True, {"window_size": (9, 4), "config": _SMALL["sm75"]}),
    "bfloat16": ("sm_80", BF16, 40, 32, False, {"softcap": 5.0}),
    "tf32": ("sm_80", np.float32, 40, 32, True, {"precision": "tf32", "config": _SMALL["sm80"]}),
    "combine": ("sm_80", np.float16, 70, 32, True, {"config": _SMALL["combine"]}),
    "sm90": ("sm_90a", np.float16, 150, 64, False, {"causal": True}),
    "clusters-sm90": (
        "sm_90a",
        BF16,
        150,
        128,
        False,
        {"causal": True, "config": {"forward": "sm90-m64n32w4s2-c2-overlap-persistent"}},
    ),
    "backward-sm90": (
        "sm_90a",
        BF16,
        90,
        64,
        True,
        {
            "causal": True,
            "config": {
                "backward-dq": "sm90-m64n32w4s2",
                "backward-dkdv": "sm90-m64n64w4s2",
            },
        },
    ),
    "fused-sm90": (
        "sm_90a",
        BF16,
        130,
        64,
        True,
        {"causal": True, "config": {"backward": "sm90-m64n64w4s2"}},
    ),
    # dK and dV by roles, of head dims above 128.
    **{
        f"roles-sm90-{head_dim}": (
            "sm_90a",
            (np.float16, BF16)[head_dim % 64 == 0],
            70 if head_dim < 200 else 20,
            head_dim,
            True,
            {
                "causal": True,
                "config": {
                    "forward": "sm80-m32n32w2s1",
                    "backward-dq": "sm90-m64n32w4s1",
                    "backward-dkdv": "sm90-m32n64w8s1-roles",
                },
            },
        )
        for head_dim in (136, 192, 200, 256)
    },
    # The sink joins in `combine`, once; its gradient comes of `delta` and `array_sums`.
    "sinks": (
        "sm_80",
        np.float16,
        70,
        32,
        True,
        {"sinks": np.array([1.5], np.float32), "config": _SMALL["combine"]},
    ),
    "sinks-sm90": (
        "sm_90a",
        np.float16,
        150,
        64,
        False,
        {"sinks": np.array([1.5], np.float32), "causal": True},
    ),
    "dropout": (
        "sm_80",
        np.float16,
        70,
        32,
        True,
        {"dropout_p": 0.3, "seed": -7, "causal": True, "config": _SMALL["sm80"]},
    ),
    "dropout-portable": (
        "sm_80",
        np.float32,
        40,
        16,
        True,
        {"dropout_p": 0.3, "seed": np.array([-7], np.int32), "config": _SMALL["portable"]},
    ),
    "dropout-sm90": (
        "sm_90a",
        np.float16,
        150,
        64,
        False,
        {
            "dropout_p": 0.3,
            "seed": np.array([-7]),
            "config": {"forward": "sm90-m64n32w4s2-overlap"},
        },
    ),
    "backward-dropout-sm90": (
        "sm_90a",
        np.float16,
        90,
        32,
        True,
        {
            "dropout_p": 0.3,
            "seed": -7,
            "causal": True,
            "config": {
                "backward-dq": "sm90-m64n80w4s1",
                "backward-dkdv": "sm90-m32n64w4s2",
            },
        },
    ),
    # Bias, mask, a table and a closed-over number: what a program reads and computes.
    "program": ("sm_80", np.float16, 40, 32, True, {**PROGRAM, "config": _SMALL["sm80"]}),
    "program-sm90": ("sm_90a", np.float16, 150, 64, False, {"mask_mod": masks.causal, **BIAS}),
    "fp8-sm89": ("sm_89", np.float16, 70, 64, False, {"precision": "fp8"}),
    "fp8-sm90": ("sm_90a", np.float16, 128, 128, False, {"precision": "fp8"}),
    "fp8-sm90-keys": (
        *("sm_90a", np.float16, 140, 64, False),
        {"precision": "fp8", "fp8": Fp8Recipe("token"), "causal": True},
    ),
}


def inputs_of(dtype, tokens, head_dim):
    return [normal((1, tokens, 1, head_dim), dtype, seed) for seed in range(4)]


# Where bits are the simulator's, the budget is kept there; logarithms and tanh are others.
@pytest.mark.parametrize("name", some(CASES, "bfloat16"))
def test_a_family_is_within_its_error_budget(executed, name):
    arch, dtype, tokens, head_dim, gradients, options = CASES[name]
    executed(arch)
    q, k, v, dout = inputs_of(dtype, tokens, head_dim)
    report = numflash.check(q, k, v, dout=dout if gradients else None, **options)
    assert report.passed, report


KEPT = "bfloat16", "sm90"


@pytest.mark.parametrize("name", some(CASES, *KEPT))
def test_the_simulator_computes_the_same_bits(executed, name):
    """Products, sums and exponentials are the same; logarithms and tanh are not.

    Those are libdevice's on the GPU and NumPy's in the simulator, a few units in the last place
    apart: the log-sum-exp, and with softcap every score.
    """
    arch, dtype, tokens, head_dim, gradients, options = CASES[name]
    q, k, v, dout = inputs_of(dtype, tokens, head_dim)
    forward, backward = _configs(options)
    executed(arch)
    out, lse = numflash.attention(q, k, v, return_lse=True, **forward)
    # Both backwards begin from these.
    given = dout, q, k, v, out, lse
    found = numflash.attention_backward(*given, **backward) if gradients else ()
    executed(arch, code="python")
    same, same_lse = numflash.attention(q, k, v, return_lse=True, **forward)
    same_gradients = numflash.attention_backward(*given, **backward) if gradients else ()
    for one, other in zip((out, *found), (same, *same_gradients), strict=True):
        if "softcap" in options:
            np.testing.assert_allclose(one.astype("f4"), other.astype("f4"), rtol=2**-7, atol=1e-5)
        else:
            bits = f"u{one.itemsize}"
            np.testing.assert_array_equal(one.view(bits), other.view(bits))
    np.testing.assert_array_max_ulp(lse, same_lse, 4)


def _configs(options: dict) -> tuple[dict, dict]:
    """The options of the forward, and those of the backward."""
    configs = options.get("config", {})
    backward = {family: each for family, each in configs.items() if family != "forward"}
    return {**options, "config": configs.get("forward")}, {**options, "config": backward or None}


@thorough
@pytest.mark.parametrize("name", some(["sm75", "combine", "sm90"], "sm90"))
def test_what_the_linker_makes_computes_the_same_bits(executed, name):
    """nvJitLink optimises LTO-IR once more and fuses as little as NVVM."""
    arch, dtype, tokens, head_dim, _, options = CASES[name]
    q, k, v, _ = inputs_of(dtype, tokens, head_dim)
    options, _ = _configs(options)
    texts, results = {}, {}
    for code in ("ptx", "lto"):
        texts[code] = []
        executed(arch, lambda ptx, ran=texts[code]: ran.append(ptx) or ptx, code)
        results[code] = numflash.attention(q, k, v, return_lse=True, **options)
    assert len(texts["ptx"]) == len(texts["lto"]) > 0
    assert not set(texts["ptx"]) & set(texts["lto"])
    for one, other in zip(results["ptx"], results["lto"], strict=True):
        np.testing.assert_array_equal(one.view(f"u{one.itemsize}"), other.view(f"u{one.itemsize}"))


@pytest.mark.parametrize("seed", some(range(3), 0))
def test_the_order_of_warps_does_not_matter(executed, monkeypatch, seed):
    from numflash.simulator import SEED

    arch, dtype, tokens, head_dim, _, options = CASES["sm90"]
    q, k, v, _ = inputs_of(dtype, tokens, head_dim)
    executed(arch)
    results = []
    for value in (seed, seed + 100):
        monkeypatch.setattr(SEED, "value", value)
        results.append(numflash.attention(q, k, v, **options))
    np.testing.assert_array_equal(*[x.view(np.uint16) for x in results])


def test_strides_beyond_two_to_the_31st(executed):
    executed("sm_80")
    q, k, v, _ = inputs_of(np.float16, 40, 32)
    expected = numflash.attention(q, k, v)
    far = []
    for x in (q, k, v):
        room = np.zeros(32 + 3 * 2**30, np.float16)  # untouched pages cost nothing
        y = np.lib.stride_tricks.as_strided(room, (1, 4, 1, 32), (2, 2**31, 2, 2))
        y[...] = x[:, :4]
        far.append(y)
    got = numflash.attention(*far)
    near = numflash.attention(*(np.ascontiguousarray(x[:, :4]) for x in (q, k, v)))
    np.testing.assert_array_equal(got.view(np.uint16), near.view(np.uint16))
    assert expected.shape == q.shape


def test_a_switch_that_is_neither_is_named(executed):
    executed("sm_80", code="sass")
    q, k, v, _ = inputs_of(np.float16, 8, 32)
    with pytest.raises(ValueError, match="must be python, ptx or lto, got 'sass"):
        numflash.attention(q, k, v)


def test_the_switch_chooses_compiled_code(executed):
    executed("sm_80", lambda ptx: ptx.replace("ret;", "trap;"))
    q, k, v, _ = inputs_of(np.float16, 40, 32)
    with pytest.raises(SimulationError, match="trap"):
        numflash.attention(q, k, v)
    executed("sm_80", lambda ptx: ptx.replace("ret;", "trap;"), code="python")
    numflash.attention(q, k, v)
