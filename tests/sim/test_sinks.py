"""Attention sinks: against float64 and finite differences, with splits, empty rows, in 8 bits."""

import numpy as np
import pytest

import numflash
from numflash import reference
from numflash.calls import ready
from numflash.runtime.driver import limits_of_device
from numflash.runtime.numpy_arrays import NumPy
from tests.support.covering import some, thorough
from tests.support.faults import Mutation, load

SINKS = np.array([-1.0, 0.5, 2.0, 4.0], np.float32)
SMALL = {"backward-dq": "sm80-m16n16w1s1", "backward-dkdv": "sm80-m16n16w1s1"}
# Rows of a group are packed, keys are split, gradients are made by one kernel or by two.
SPLIT = {
    "sm80": ("sm_80", "sm80-m16n16w1s3x3-packed", {"backward": "sm80-m16n16w1s2x2"}),
    "sm75": ("sm_75", "sm75-m16n16w1s1x2", {"backward": "sm75-m16n16w1s1"}),
    "sm90": ("sm_90a", "sm90-m64n32w4s1x2-packed-overlap", SMALL),
    "fp8": ("sm_89", "fp8-sm89-m16n64w1s1x2-packed", None),
    "fp8-sm90": ("sm_90a", "fp8-sm90-m64n64w4s2x2-packed", None),
}


def inputs(dtype=np.float16, seqlen_q=5, seqlen_k=130, heads=4, heads_kv=2, head_dim=64):
    """q, k, v and dout, one batch entry."""
    rng = np.random.default_rng(7)
    shapes = [(seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv), (seqlen_q, heads)]
    return [rng.standard_normal((1, *shape, head_dim)).astype(dtype) for shape in shapes]


@pytest.fixture(autouse=True)
def on(monkeypatch):
    """A function that chooses the simulated GPU. Results hold NaN before they are written."""
    empty = NumPy.empty

    def poisoned(self, shape, dtype, device):
        array = empty(self, shape, dtype, device)
        array.view(np.uint8)[...] = 0xFF
        return array

    def be(arch):
        monkeypatch.setenv("NUMFLASH_SIM_ARCH", arch)
        limits_of_device.cache_clear()

    monkeypatch.setattr(NumPy, "empty", poisoned)
    monkeypatch.setattr(ready, "_ready", {})
    yield be
    limits_of_device.cache_clear()


@pytest.mark.parametrize("name", some(SPLIT, "sm80", "fp8"))
def test_a_sink_joins_a_row_once_however_its_keys_are_split(on, name):
    arch, forward, backward = SPLIT[name]
    on(arch)
    q, k, v, dout = inputs(seqlen_q=2, seqlen_k=70, head_dim=64 if backward is None else 32)
    config = {"forward": forward, "combine": "w2", **(backward or {})}
    options = {"sinks": SINKS, "config": config}
    if backward is None:
        report = numflash.check(q, k, v, precision="fp8", **options)
    else:
        report = numflash.check(q, k, v, dout=dout, **options)
        assert report.errors[-1].name == "dsinks"
    assert report.passed, f"\n{report}"


@pytest.mark.parametrize(
    "config",
    some(["m16n16w2", "sm80-m16n16w1s1", "sm80-m16n16w1s1x2"], "m16n16w2", "sm80-m16n16w1s1"),
)
def test_a_row_without_keys_has_its_sink_as_lse_and_output_0(config):
    q, k, v, dout = inputs(seqlen_q=24, seqlen_k=7, head_dim=16)
    sinks = np.array([-1.0, -np.inf, 2.0, 4.0], np.float32)
    options = {"sinks": sinks, "causal": True}
    config = {"forward": config, "combine": "w2"}
    out, lse = numflash.attention(q, k, v, return_lse=True, config=config, **options)
    assert not out[:, :17].any() and out[:, 17:].any()
    np.testing.assert_array_equal(lse[0, :, :17], np.repeat(sinks[:, None], 17, 1))
    *gradients, dsinks = numflash.attention_backward(
        dout, q, k, v, out, lse, config=SMALL, **options
    )
    assert all(np.isfinite(x).all() for x in gradients)
    assert not gradients[0][:, :17].any()
    # What is no sink takes nothing, and has no gradient.
    assert dsinks[1] == 0 and np.isfinite(dsinks).all()
    without = numflash.attention(q, k, v, return_lse=True, config=config, causal=True)
    np.testing.assert_array_equal(out[:, :, 1], without[0][:, :, 1])
    np.testing.assert_allclose(lse[:, 1], without[1][:, 1], rtol=1e-6)


def test_sinks_are_the_reference_s_extra_column():
    """As transformers has them: a column of logits beside the scores, dropped after softmax."""
    q, k, v, _ = inputs(np.float64, 6, 9, 4, 2, 8)
    out, lse = reference.attention(q, k, v, sinks=SINKS, causal=True)
    s = np.einsum("bihd,bjhd->bhij", q, np.repeat(k, 2, 2)) * 8**-0.5
    s = np.where(reference.visible(6, 9, causal=True), s, -np.inf)
    column = np.broadcast_to(SINKS.astype(np.float64)[None, :, None, None], (1, 4, 6, 1))
    e = np.exp(np.concatenate([s, column], -1))
    p = (e / e.sum(-1, keepdims=True))[..., :-1]
    np.testing.assert_allclose(out, np.einsum("bhij,bjhd->bihd", p, np.repeat(v, 2, 2)))
    np.testing.assert_allclose(lse, np.log(e.sum(-1)))


def test_the_gradients_are_finite_differences():
    q, k, v, dout = inputs(np.float64, 6, 9, 4, 2, 8)
    arrays = {"q": q, "k": k, "v": v, "sinks": SINKS.astype(np.float64)}

    def loss(**changed):
        given = arrays | changed
        out, _ = reference.attention(
            given["q"], given["k"], given["v"], sinks=given["sinks"], softcap=3.0, causal=True
        )
        return (out * dout).sum()

    gradients = reference.attention_backward(dout, q, k, v, sinks=SINKS, softcap=3.0, causal=True)
    assert len(gradients) == 4 and gradients[3].shape == (4,)
    rng, step = np.random.default_rng(1), 1e-5
    for (name, array), gradient in zip(arrays.items(), gradients, strict=True):
        for _ in range(4):
            way = rng.standard_normal(array.shape)
            up, down = (loss(**{name: array + h * way}) for h in (step, -step))
            assert np.isclose((up - down) / (2 * step), (gradient * way).sum(), rtol=1e-5), name


@thorough
def test_dsinks_are_the_same_bits_in_every_run_and_for_any_strides(monkeypatch):
    from numflash.simulator import SEED

    q, k, v, dout = inputs(seqlen_q=9, seqlen_k=20, head_dim=16)
    room = np.full(8, np.nan, np.float32)
    room[::2] = SINKS
    found = []
    for seed, sinks in ((1, SINKS), (2, SINKS), (3, room[::2])):
        monkeypatch.setattr(SEED, "value", seed)
        out, lse = numflash.attention(
            q, k, v, sinks=sinks, return_lse=True, config="sm80-m16n16w1s1"
        )
        *_, dsinks = numflash.attention_backward(
            dout, q, k, v, out, lse, sinks=sinks, config=SMALL
        )
        assert dsinks.dtype == np.float32 and dsinks.shape == (4,)
        found.append((out.tobytes(), lse.tobytes(), dsinks.tobytes()))
    assert len(set(found)) == 1


def test_nothing_to_add_up_is_0():
    q, k, v, dout = inputs(seqlen_q=0, head_dim=16)
    out, lse = numflash.attention(q, k, v, sinks=SINKS, return_lse=True)
    *_, dsinks = numflash.attention_backward(dout, q, k, v, out, lse, sinks=SINKS)
    assert not dsinks.any()
    q, k, v, dout = inputs(seqlen_k=0, head_dim=16)
    out, lse = numflash.attention(q, k, v, sinks=SINKS, return_lse=True)
    np.testing.assert_array_equal(lse[0], np.repeat(SINKS[:, None], 5, 1))
    assert not out.any()


def test_a_plan_reads_its_sinks_again():
    q, k, v, _ = inputs(head_dim=16)
    sinks = SINKS.copy()
    plan = numflash.plan(q, k, v, sinks=sinks)
    sinks += 1
    np.testing.assert_array_equal(plan.launch(), numflash.attention(q, k, v, sinks=sinks))


ROWS, FEATURES = "numflash.tiles.rows", "numflash.tiles.features"
FAULTS = {
    "joined by each part, and once more": (
        ROWS,
        Mutation("part", "features = () if is_part else features", "features = features"),
    ),
    "forgotten in lse": (
        ROWS,
        Mutation(
            "lse",
            "return factor, top, total",
            "return factor, row_max * unit_before, row_sum",
        ),
    ),
    "O not brought to the new maximum": (ROWS, Mutation("kept", "kept / total", "f32(1) / total")),
    "of another head": (
        FEATURES,
        Mutation("head", "features.sinks.data[head *", "features.sinks.data[0 *"),
    ),
    "a gradient of the wrong sign": (
        FEATURES,
        Mutation("sign", "-_exp(sink - lse) * product", "_exp(sink - lse) * product"),
    ),
}
KERNELS = (
    "numflash.kernels.mma.forward",
    "numflash.kernels.shared.combine",
    "numflash.kernels.shared.delta",
)


@pytest.mark.parametrize("name", some([None, *FAULTS], every=2))
def test_a_sink_that_joins_wrongly_is_found(on, monkeypatch, name):
    on("sm_80")
    if name is not None:
        module, fault = FAULTS[name]
        load((FEATURES, ROWS, *KERNELS), module, fault, monkeypatch)
    q, k, v, dout = inputs(seqlen_k=40, head_dim=16)
    config = {"forward": "sm80-m16n16w1s1x3", "combine": "w2", **SMALL}
    report = numflash.check(q, k, v, dout=dout, sinks=SINKS, config=config)
    assert report.passed == (name is None), f"\n{report}"
