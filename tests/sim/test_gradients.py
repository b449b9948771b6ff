"""What a backward returns gradients of, and what it is given: dlse, delta, wrt."""

import itertools
from functools import cache

import numpy as np
import pytest

import numflash
from numflash import reference
from numflash.calls import ready
from numflash.calls.launch import Launcher
from numflash.runtime.driver import limits_of_device
from numflash.runtime.numpy_arrays import NumPy
from tests.support.covering import some, thorough
from tests.support.faults import Mutation, load

SINKS = np.array([-1.0, 0.5, 2.0, 4.0], np.float32)
SLOPES = np.array([0.5, 0.25, 0.125, 1.0], np.float32)
# Gradients of each implementation, by one kernel or by two.
KERNELS = {
    "portable": ("sm_80", "float32", {"backward-dq": "m8n8w2", "backward-dkdv": "m8n8w2"}),
    "sm80": (
        "sm_80",
        "bfloat16",
        {"backward-dq": "sm80-m16n16w1s2", "backward-dkdv": "sm80-m16n16w1s1"},
    ),
    "sm80-together": ("sm_80", "float16", {"backward": "sm80-m16n16w1s2x2"}),
    "sm75": (
        "sm_75",
        "float16",
        {"backward-dq": "sm75-m16n16w1s1", "backward-dkdv": "sm75-m16n16w1s1-apart"},
    ),
}
each_kernel = pytest.mark.parametrize("name", some(KERNELS, "sm80-together"))


def inputs(dtype="float32", seqlen_q=None, seqlen_k=None, heads=4, heads_kv=2, head_dim=None):
    """q, k, v and dout, one batch entry; and dlse. Two small tiles each way, and more queries."""
    from numflash.runtime.views import numpy_dtype

    tile, columns = (16, 20) if numpy_dtype(dtype).itemsize == 2 else (8, 12)
    seqlen_q = tile + 5 if seqlen_q is None else seqlen_q
    seqlen_k = tile + 1 if seqlen_k is None else seqlen_k
    head_dim = columns if head_dim is None else head_dim
    rng = np.random.default_rng(7)
    shapes = [(seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv), (seqlen_q, heads)]
    arrays = [rng.standard_normal((1, *shape, head_dim)) for shape in shapes]
    dlse = rng.standard_normal((1, heads, seqlen_q)).astype(np.float32)
    return [x.astype(numpy_dtype(dtype)) for x in arrays], dlse


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


# The gradient of lse


@each_kernel
def test_a_gradient_of_lse_goes_into_every_gradient(on, name):
    """Of grouped heads; the first queries see no key, but a sink."""
    arch, dtype, config = KERNELS[name]
    on(arch)
    (q, k, v, dout), dlse = inputs(dtype)
    options = {"causal": True, "config": config, "dlse": dlse}
    for more in ({}, {"sinks": SINKS}):
        report = numflash.check(q, k, v, dout=dout, **options, **more)
        assert len(report.errors) == 5 + len(more)
        assert report.passed, f"\n{report}"
    without = numflash.check(q, k, v, dout=dout, causal=True, config=config)
    assert without.errors[2].error != report.errors[2].error


def test_the_gradient_of_lse_is_finite_differences():
    (q, k, v, dout), dlse = inputs("float64", 6, 9, head_dim=8)
    arrays = {"q": q, "k": k, "v": v, "sinks": SINKS.astype(np.float64)}
    arrays["alibi_slopes"] = SLOPES.astype(np.float64)
    options = {"softcap": 3.0, "causal": True}

    def loss(**changed):
        out, lse = reference.attention(**(arrays | changed), **options)
        return (out * dout).sum() + (lse * dlse).sum()

    gradients = reference.attention_backward(
        dout, **arrays, **options, dlse=dlse, wrt=tuple(arrays)
    )
    rng, step = np.random.default_rng(1), 1e-5
    for (name, array), gradient in zip(arrays.items(), gradients, strict=True):
        assert gradient.shape == array.shape
        for _ in range(4):
            way = rng.standard_normal(array.shape)
            up, down = (loss(**{name: array + h * way}) for h in (step, -step))
            assert np.isclose((up - down) / (2 * step), (gradient * way).sum(), rtol=1e-5), name


@thorough
@pytest.mark.parametrize("dtype", some(["float32", "float16"], "float16"))
def test_lse_of_a_query_without_keys_is_a_constant(on, dtype):
    on("sm_80")
    (q, k, v, dout), dlse = inputs(dtype)
    out, lse = numflash.attention(q, k, v, causal=True, return_lse=True)
    hidden = np.isneginf(lse)
    assert hidden.any()
    call = dout, q, k, v, out, lse
    expected = numflash.attention_backward(*call, causal=True, dlse=dlse)
    for value in (np.nan, np.inf):
        changed = np.where(hidden, np.float32(value), dlse)
        found = numflash.attention_backward(*call, causal=True, dlse=changed)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)


@thorough
def test_a_gradient_of_lse_may_have_any_strides_and_fewer_axes():
    (q, k, v, dout), dlse = inputs()
    out, lse = numflash.attention(q, k, v, return_lse=True)

    def bits(dlse, index=()):
        call = [x[index] for x in (dout, q, k, v, out)]
        at = lse[0] if index == (0,) else lse
        gradients = numflash.attention_backward(*call, at, dlse=dlse)
        return [x.tobytes() for x in gradients]

    expected = bits(dlse)
    assert bits(dlse[..., ::-1].copy()[..., ::-1]) == expected
    assert bits(np.asfortranarray(dlse)) == expected
    assert bits(dlse[0], (0,)) == expected
    flat = np.broadcast_to(np.float32(0.5), lse.shape)
    assert 0 in flat.strides and bits(flat) == bits(flat.copy())


# The product of dO and O


@thorough
@each_kernel
def test_a_delta_of_the_caller_s_replaces_out(on, name):
    arch, dtype, config = KERNELS[name]
    on(arch)
    (q, k, v, dout), dlse = inputs(dtype)
    options = {"causal": True, "sinks": SINKS, "config": config, "dlse": dlse}
    out, lse = numflash.attention(q, k, v, causal=True, sinks=SINKS, return_lse=True)
    expected = numflash.attention_backward(dout, q, k, v, out, lse, **options)
    delta = (dout.astype(np.float64) * out.astype(np.float64)).sum(-1).swapaxes(1, 2)
    delta = np.repeat(delta.astype(np.float32), 2, -1)[..., ::2]
    found = numflash.attention_backward(dout, q, k, v, None, lse, delta=delta, **options)
    for a, b in zip(found, expected, strict=True):
        a, b = a.astype(np.float64), b.astype(np.float64)
        np.testing.assert_allclose(a, b, atol=2.0**-7 * abs(b).max())
    # And out is not even looked at.
    again = numflash.attention_backward(dout, q, k, v, "out", lse, delta=delta, **options)
    for a, b in zip(found, again, strict=True):
        np.testing.assert_array_equal(a, b)


# What gradients are of

LAUNCHES = {
    ("q",): ["delta", "backward-dq"],
    ("k",): ["delta", "backward-dkdv"],
    ("v",): ["delta", "backward-dkdv"],
    ("v", "k"): ["delta", "backward-dkdv"],
    ("k", "q"): ["delta", "backward-dkdv", "backward-dq"],
    ("sinks",): ["delta", "array-sums"],
    ("sinks", "q"): ["delta", "array-sums", "backward-dq"],
    ("q", "k", "v"): ["delta", "backward-dkdv", "backward-dq"],
}


@cache
def every_gradient() -> tuple[tuple, dict[str, np.ndarray]]:
    """A call with sinks, and all gradients of it by name."""
    (q, k, v, dout), _ = inputs()
    out, lse = numflash.attention(q, k, v, sinks=SINKS, return_lse=True)
    call = dout, q, k, v, out, lse
    found = numflash.attention_backward(*call, sinks=SINKS)
    return call, dict(zip(("q", "k", "v", "sinks"), found, strict=True))


@pytest.mark.parametrize("wrt", some(LAUNCHES, ("sinks",)), ids="-".join)
def test_only_wanted_gradients_are_computed_in_the_order_asked_for(launched, wrt):
    call, by_name = every_gradient()
    launched.clear()
    found = numflash.attention_backward(*call, sinks=SINKS, wrt=wrt)
    assert launched == LAUNCHES[wrt]
    assert type(found) is tuple and len(found) == len(wrt)
    for name, gradient in zip(wrt, found, strict=True):
        np.testing.assert_array_equal(gradient, by_name[name])


@thorough
def test_one_kernel_for_all_leaves_out_what_nobody_wants(launched, on):
    on("sm_80")
    (q, k, v, dout), _ = inputs("float16")
    out, lse = numflash.attention(q, k, v, sinks=SINKS, return_lse=True)
    options = {"sinks": SINKS, "config": {"backward": "sm80-m16n16w1s1x2"}}
    call = dout, q, k, v, out, lse
    *every, dsinks = numflash.attention_backward(*call, **options)
    launched.clear()
    found = numflash.attention_backward(*call, **options, wrt=["v", "k"])
    assert launched == ["delta", "backward"]
    np.testing.assert_array_equal(found[0], every[2])
    np.testing.assert_array_equal(found[1], every[1])
    launched.clear()
    (dq,) = numflash.attention_backward(*call, **options, wrt=("q",))
    assert launched == ["delta", "backward", "reduce-dq"]
    np.testing.assert_array_equal(dq, every[0])
    launched.clear()
    (found,) = numflash.attention_backward(*call, **options, wrt=("sinks",))
    assert launched == ["delta", "array-sums"]
    np.testing.assert_array_equal(found, dsinks)


@thorough
def test_the_memory_of_gradients_that_nobody_wants_is_not_allocated(monkeypatch):
    (q, k, v, dout), _ = inputs()
    out, lse = numflash.attention(q, k, v, return_lse=True)
    empty, shapes = NumPy.empty, []

    def counted(self, shape, dtype, device):
        shapes.append(tuple(shape))
        return empty(self, shape, dtype, device)

    monkeypatch.setattr(NumPy, "empty", counted)
    numflash.attention_backward(dout, q, k, v, out, lse, wrt=("q",))
    assert q.shape in shapes and k.shape not in shapes
    shapes.clear()
    numflash.attention_backward(dout, q, k, v, out, lse, wrt=("v",))
    assert q.shape not in shapes


def test_gradients_of_nothing():
    for sizes in ({"seqlen_q": 0}, {"seqlen_k": 0}):
        (q, k, v, dout), dlse = inputs(**sizes)
        out, lse = numflash.attention(q, k, v, sinks=SINKS, return_lse=True)
        found = numflash.attention_backward(
            dout, q, k, v, out, lse, sinks=SINKS, dlse=dlse, wrt=("sinks", "v", "q")
        )
        exact = reference.attention_backward(
            dout, q, k, v, sinks=SINKS, dlse=dlse, wrt=("sinks", "v", "q")
        )
        for a, b in zip(found, exact, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# The gradient of ALiBi's slopes

ALIBI_CASES = {
    "causal, queries without keys": ({"causal": True}, (4,)),
    "by batch entry, banded, capped": (
        {"softcap": 2.0, "window_size": (9, 3), "shift": 2, "causal_align": "top_left"},
        (2, 4),
    ),
    "scores that are all 0": ({"softmax_scale": 0}, (4,)),
}


ALIBI_KERNELS = {
    "portable": ("sm_80", "float32", "m8n8w2", tuple(ALIBI_CASES)),
    "sm80": ("sm_80", "bfloat16", "sm80-m32n16w1s2", tuple(ALIBI_CASES)[:2]),
    "sm75": ("sm_75", "float16", "sm75-m16n32w1s1", tuple(ALIBI_CASES)[:1]),
}


ALIBI = [(kernel, name) for kernel, (*_, names) in ALIBI_KERNELS.items() for name in names]


@pytest.mark.parametrize(("kernel", "name"), some(ALIBI, ALIBI[3]))
def test_slopes_have_a_gradient(on, kernel, name):
    arch, dtype, config, _ = ALIBI_KERNELS[kernel]
    on(arch)
    options, shape = ALIBI_CASES[name]
    (q, k, v, dout), dlse = inputs(dtype)
    q, k, v, dout = (np.concatenate([x, x[:, ::-1]]) for x in (q, k, v, dout))
    slopes = np.resize(SLOPES, shape).astype(np.float32)
    report = numflash.check(
        *(q, k, v),
        dout=dout,
        alibi_slopes=slopes,
        dlse=np.concatenate([dlse, -dlse]),
        wrt=("alibi_slopes", "v"),
        config={"backward-rows": config},
        **options,
    )
    assert [error.name for error in report.errors] == ["out", "lse", "dalibi_slopes", "dv"]
    assert report.passed, f"\n{report}"
    if kernel == "portable":
        # The budget is wide where much cancels: the error is no more than that of a naive sum.
        error = report.errors[2]
        assert error.error < 4 * error.naive_error


@thorough
def test_the_gradient_of_slopes_takes_its_kernels_only(launched):
    (q, k, v, dout), _ = inputs()
    options = {"alibi_slopes": SLOPES, "sinks": SINKS}
    out, lse = numflash.attention(q, k, v, return_lse=True, **options)
    call = dout, q, k, v, out, lse
    launched.clear()
    (found,) = numflash.attention_backward(*call, **options, wrt=("alibi_slopes",))
    assert launched == ["delta", "backward-rows", "array-sums"]
    launched.clear()
    both = numflash.attention_backward(*call, **options, wrt=("sinks", "alibi_slopes"))
    assert launched == ["delta", "array-sums", "backward-rows", "array-sums"]
    np.testing.assert_array_equal(both[1], found)
    # By default it is not returned.
    launched.clear()
    assert len(numflash.attention_backward(*call, **options)) == 4
    assert "backward-rows" not in launched


@thorough
def test_the_gradient_of_slopes_is_the_same_bits_in_every_run(monkeypatch):
    from numflash.simulator import SEED

    (q, k, v, dout), _ = inputs()
    found = set()
    for seed, slopes in ((1, SLOPES), (2, SLOPES), (3, np.repeat(SLOPES, 2)[::2])):
        monkeypatch.setattr(SEED, "value", seed)
        out, lse = numflash.attention(q, k, v, alibi_slopes=slopes, return_lse=True)
        (dslopes,) = numflash.attention_backward(
            dout, q, k, v, out, lse, alibi_slopes=slopes, wrt=("alibi_slopes",)
        )
        assert dslopes.shape == (4,) and dslopes.dtype == np.float32
        found.add(dslopes.tobytes())
    assert len(found) == 1


# Faults

DELTA = "numflash.kernels.shared.delta"
FAULTS = {
    "a gradient of lse that is left out": Mutation(
        "left", "has_dlse = traits.dlse", "has_dlse = 0"
    ),
    "of the wrong sign": Mutation("sign", "total - of_rows.dlse", "total + of_rows.dlse"),
    "of another head": Mutation(
        "head",
        "first_of_rows(of_rows.dlse, batch, head, row)",
        "first_of_rows(of_rows.dlse, batch, 0, row)",
    ),
}


ROWS, FEATURES = "numflash.kernels.shared.backward_rows", "numflash.tiles.features"
FACTORIES = "numflash.kernels.portable.of_arrays"
FAULTS_OF_SLOPES = {
    "a distance with a sign": (FEATURES, Mutation("abs", "ds * -abs(distance)", "ds * -distance")),
    "a distance without the shift": (
        ROWS,
        Mutation("shift", "corner.row + scores.shift", "corner.row"),
    ),
    "lanes that are not added up": (
        ROWS,
        Mutation("lanes", "sum_of_row(shares[r])", "shares[r]"),
    ),
}


@pytest.mark.parametrize("fault", some([None, *FAULTS_OF_SLOPES], every=2))
def test_a_wrong_gradient_of_slopes_is_found(monkeypatch, fault):
    if fault is not None:
        module, mutation = FAULTS_OF_SLOPES[fault]
        load((FEATURES, ROWS, FACTORIES), module, mutation, monkeypatch)
    (q, k, v, dout), _ = inputs(seqlen_q=9, seqlen_k=12, head_dim=8)
    options = {"alibi_slopes": SLOPES, "wrt": ("alibi_slopes",)}
    report = numflash.check(q, k, v, dout=dout, shift=2, **options)
    assert report.passed == (fault is None), f"\n{report}"


@pytest.mark.parametrize("fault", some([None, *FAULTS], every=2))
def test_a_wrong_gradient_of_lse_is_found(monkeypatch, fault):
    if fault is not None:
        load((DELTA,), DELTA, FAULTS[fault], monkeypatch)
    (q, k, v, dout), dlse = inputs(seqlen_q=5, seqlen_k=8)
    report = numflash.check(q, k, v, dout=dout, dlse=dlse, sinks=SINKS)
    assert report.passed == (fault is None), f"\n{report}"


@pytest.mark.parametrize("error", [0, 1])
def test_a_delta_of_the_caller_is_checked(error):
    (q, k, v, dout), dlse = inputs(seqlen_q=5, seqlen_k=8)
    out = numflash.attention(q, k, v, sinks=SINKS)
    delta = (dout.astype(np.float32) * out).sum(-1).swapaxes(1, 2) + np.float32(error)
    report = numflash.check(q, k, v, dout=dout, dlse=dlse, delta=delta, sinks=SINKS)
    assert report.passed == (error == 0), f"\n{report}"


@thorough
def test_combinations_of_wrt_are_other_calls():
    (q, k, v, dout), _ = inputs(seqlen_q=3, seqlen_k=4)
    out, lse = numflash.attention(q, k, v, return_lse=True)
    for wrt in itertools.permutations("qkv", 2):
        found = numflash.attention_backward(dout, q, k, v, out, lse, wrt=wrt)
        shapes = [{"q": q, "k": k, "v": v}[name].shape for name in wrt]
        assert [x.shape for x in found] == shapes
