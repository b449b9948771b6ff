"""What a page says of numerics, against what the kernels do."""

import numpy as np
import pytest

import numflash
from numflash.api.explain import Question
from numflash.kernels.quantize import estimate
from numflash.problem.fp8 import Fp8Recipe
from numflash.tiles.mma import softmax
from numflash.tiles.portable import softmax as portable_softmax
from tuner.explain.asked import ask
from tuner.explain.course.looking import watched
from tuner.explain.facts import fp8, numerics


def test_constants_are_those_of_the_kernels():
    assert float(softmax.LAG) == numerics.LAG
    assert float(estimate.P_NOISE) == np.float32(fp8.P_NOISE)


@pytest.mark.parametrize("config", ["sm80-m16n16w1s1", "m4n8w1"])
def test_the_walk_is_the_kernels(config, on):
    """Of the rows of thread 0: what is subtracted after each tile."""
    on("sm_80")
    rng = np.random.default_rng(1)
    q, k = (rng.standard_normal((1, n, 1, 32)).astype("float16") for n in (16, 64))
    k *= np.linspace(0.5, 6, 64, dtype=np.float16)[None, :, None, None]
    on_tensor_cores = config.startswith("sm80")
    name, module = ("shift_of_row", softmax) if on_tensor_cores else ("exp_f32", portable_softmax)
    with watched(module, name) as noted:
        numflash.attention(q, k, k, softmax_scale=1.0, config=config)
    scores = q[0, :, 0].astype(np.float32) @ k[0, :, 0].astype(np.float32).T
    step = 16 if on_tensor_cores else 8
    tiles = [slice(n, n + step) for n in range(0, 64, step)]
    lag = numerics.LAG if on_tensor_cores else None
    rows = [0, 8] if on_tensor_cores else [0]
    found = numerics._walk(scores if lag else scores[:1], tiles, np.float32(1), lag)
    if on_tensor_cores:
        shifts = np.array([result for _, result in noted], np.float32).reshape(-1, 2)
        seen = shifts[: len(tiles)] / np.float32(np.log2(np.e))
        assert np.allclose(seen, found.subtracted[:, rows], rtol=1e-5)
        # Some tiles rescale, some that have a larger maximum do not.
        assert found.grows[:, rows].any()
        assert (found.largest[:, rows] > found.subtracted[:, rows] + 0.1).any()
    else:
        assert np.array_equal(found.subtracted, found.largest)


def test_a_slice_is_checked_here_where_kernels_are_simulated(on, monkeypatch):
    on("sm_80")
    monkeypatch.setattr(numerics, "_SIMULATED_ELSE", 1024 * 64)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, n, 2, 64)).astype("float16") for n in (40, 70, 70))
    answer = numflash.explain(q, k, v, causal=True, gpu="A100")
    asked = ask(Question({"q": q, "k": k, "v": v}, {"causal": True}, "A100", True, None, answer))
    checked = numerics.find(asked).checked
    part = checked.part
    assert checked.place == "in the simulator" and (part.queries, part.keys) == (16, 64)
    report = numflash.check(q[:, 24:, :1], k[:, 6:, :1], v[:, 6:, :1], causal=True)
    for error in report.errors:
        assert checked.errors[error.name]["budget"].value == pytest.approx(error.budget)
        assert checked.errors[error.name]["share"].value <= 1


@pytest.mark.parametrize(
    "recipe",
    [
        Fp8Recipe("block", 16),
        pytest.param(Fp8Recipe("block", 16, hadamard=False), marks=pytest.mark.thorough),
    ],
)
def test_the_estimate_is_the_kernels(recipe, on):
    on("sm_89")
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 32, n, 64)).astype("float16") for n in (4, 2, 2))
    q[..., 1, 3] *= 30
    options = {"precision": "auto", "fp8": recipe, "return_decision": True}
    _, decision = numflash.attention(q, k, v, **options)
    found = fp8.estimates(q, k, v, 64**-0.5, recipe)
    assert np.allclose(found, decision.estimated_error, rtol=2e-3)
