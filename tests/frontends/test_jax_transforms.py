"""JAX's transformations of `numflash.jax.attention`, against those of a few lines of jax.numpy."""

import functools
import threading

import pytest

jax = pytest.importorskip("jax", reason='needs JAX: pip install "numflash[jax]"')

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

import numflash  # noqa: E402
from numflash.frontends.jax import calls  # noqa: E402
from numflash.frontends.jax.calls import TARGET  # noqa: E402
from numflash.jax import attention  # noqa: E402
from tests.support.covering import ALL  # noqa: E402
from tests.support.jax_cases import (  # noqa: E402
    BACKWARD,
    done,
    exact,
    expect_close,
    normal,
    qkv,
)

ONE = 1, 16, 1, 1, 8
"""The smallest q, k and v: a tile."""
causal = functools.partial(attention, causal=True)
expected = functools.partial(exact, causal=True)


def gradient(function):
    """The gradients of a loss of (q, k, v), as a tuple."""
    return jax.grad(lambda given: (function(*given) ** 2).sum())


def stacked(count=2):
    """q, k and v with an axis in front."""
    shape = 2, 16, 2, 8
    return tuple(normal(*[(count, *shape)] * 3))


TRANSFORMED = {
    "jit": (jax.jit, qkv(*ONE), ["forward"]),
    "vmap": (jax.vmap, stacked(), ["forward"]),
    "vmap of q": (
        lambda f: jax.vmap(f, (0, None, None)),
        (stacked()[0], *qkv(2, 16)[1:]),
        ["forward"],
    ),
    "vmap of vmap": (
        lambda f: jax.vmap(jax.vmap(f)),
        tuple(normal(*[(2, 2, 1, 9, 1, 8)] * 3)),
        ["forward"],
    ),
    "vmap of the last axis": (
        lambda f: jax.vmap(f, -1, 1),
        tuple(normal(*[(1, 16, 1, 8, 2)] * 3)),
        ["forward"],
    ),
    "jit(grad)": (
        lambda f: jax.jit(lambda *x: gradient(f)(x)),
        qkv(2, 20, 2, 1),
        ["forward", *BACKWARD],
    ),
    "vmap(grad)": (
        lambda f: jax.vmap(lambda *x: gradient(f)(x)),
        stacked(),
        ["forward", *BACKWARD],
    ),
    "grad(vmap)": (
        lambda f: lambda *x: gradient(jax.vmap(f))(x),
        stacked(),
        ["forward", *BACKWARD],
    ),
    "map": (
        lambda f: lambda *x: jax.lax.map(lambda each: f(*each), x),
        stacked(),
        ["forward"] * 2,
    ),
}


# The others are parts of these.
SOME = ["jit", "vmap of q", "vmap of vmap", "vmap(grad)", "grad(vmap)"]


@pytest.mark.parametrize("name", TRANSFORMED if ALL else SOME)
def test_transformed(launched, name):
    transform, given, runs = TRANSFORMED[name]
    found, families = done(transform(causal)(*given), launched)
    assert families == runs
    expect_close(found, transform(expected)(*given))


def test_a_checkpoint_in_a_scan_is_computed_again(launched):
    (x,) = normal((1, 16, 1, 8))

    def loss(function):
        def step(carry, _):
            return jax.checkpoint(lambda x: function(x, x, x))(carry), None

        return jax.jit(jax.grad(lambda x: jax.lax.scan(step, x, None, length=2)[0].sum()))

    found, families = done(loss(causal)(x), launched)
    assert families == ["forward"] * 2 + ["forward", *BACKWARD] * 2
    expect_close(found, loss(expected)(x))


def test_a_policy_keeps_the_results_of_a_checkpoint(launched):
    (x,) = normal((1, 16, 1, 8))
    keep = jax.checkpoint_policies.save_only_these_names("numflash_out", "numflash_lse")
    kept = jax.checkpoint(lambda x: causal(x, x, x), policy=keep)
    _, families = done(jax.jit(jax.grad(lambda x: kept(x).sum()))(x), launched)
    assert families == ["forward", *BACKWARD]


def test_only_the_gradients_that_are_asked_for_are_computed(launched):
    q, k, v = qkv(*ONE)
    found, families = done(jax.grad(lambda q: causal(q, k, v).sum())(q), launched)
    assert families == ["forward", "delta", "backward-dq"]
    expect_close(found, jax.grad(lambda q: expected(q, k, v).sum())(q))
    found, families = done(jax.grad(lambda v: causal(q, k, v).sum())(v), launched)
    assert families == ["forward", "delta", "backward-dkdv"]
    expect_close(found, jax.grad(lambda v: expected(q, k, v).sum())(v))


def test_lse_has_a_gradient(launched):
    given = qkv(1, 16, 2, 1, 8)

    def loss(function, **asked):
        def of(given):
            out, lse = function(*given, **asked)
            return jnp.sin(lse).sum() + (out**2).sum()

        return jax.grad(of)

    found, families = done(loss(causal, return_lse=True)(given), launched)
    assert families == ["forward", *BACKWARD]
    expect_close(found, loss(expected, lse=True)(given))

    def of_lse(function, **asked):
        return jax.grad(lambda given: jnp.sin(function(*given, **asked)[1]).sum())(given)

    expect_close(of_lse(causal, return_lse=True), of_lse(expected, lse=True))


def test_an_axis_of_no_entries():
    none = jnp.zeros((0, 2, 16, 1, 8))
    step = jax.vmap(jax.grad(lambda x: causal(x, x, x).sum()))
    assert step(none).shape == jax.vmap(causal)(none, none, none).shape == none.shape


def test_mapped_dropout_is_that_of_each_entry(launched):
    """Random weights go by the batch entry: folded into a batch, entries would get others."""
    given, seed = stacked(), jnp.array(7, jnp.int32)
    dropped = functools.partial(attention, dropout_p=0.5)
    found = jax.vmap(lambda q, k, v: dropped(q, k, v, seed=seed))(*given)
    found, families = done(found, launched)
    assert families == ["forward"] * 2
    for n in range(2):
        assert (found[n] == dropped(*(x[n] for x in given), seed=7)).all()
    seeds = jnp.array([7, 8], jnp.int32)
    found = jax.vmap(lambda q, k, v, seed: dropped(q, k, v, seed=seed))(*given, seeds)
    assert (found[1] == dropped(*(x[1] for x in given), seed=8)).all()


def test_mapped_sinks_bias_and_functions_are_those_of_each_entry(launched):
    given = stacked()
    sinks, bias = normal((2, 2), (2, 1, 2, 16, 16), seed=1)
    found = jax.vmap(lambda q, k, v, s: attention(q, k, v, sinks=s))(*given, sinks)
    found, families = done(found, launched)
    assert families == ["forward"] * 2
    expect_close(found, jax.vmap(lambda q, k, v, s: exact(q, k, v, sinks=s))(*given, sinks))
    found = jax.vmap(lambda q, k, v, b: attention(q, k, v, bias=b))(*given, bias)
    found, families = done(found, launched)
    assert families == ["forward"]
    expect_close(found, jax.vmap(lambda q, k, v, b: exact(q, k, v, bias=b))(*given, bias))

    def by_entry(s, b, h, i, j):
        return s * (1 + b)

    found = jax.vmap(lambda q, k, v: attention(q, k, v, score_mod=by_entry))(*given)
    found, families = done(found, launched)
    assert families == ["forward"] * 2
    expect_close(found, jax.vmap(lambda q, k, v: exact(q, k, v, score=by_entry))(*given))


@pytest.mark.parametrize("rows", [1, 2])
def test_mapped_gradients_of_a_bias_are_of_each_entry(launched, rows):
    given = stacked()
    (bias,) = normal((rows, 2, 16, 16), seed=1)

    def of(function):
        def loss(bias, *given):
            return (function(*given, bias=bias) ** 2).sum()

        return jax.vmap(jax.grad(loss), (None, 0, 0, 0))(bias, *given)

    found, families = done(of(attention), launched)
    # One row for the two of the batch: its gradient is a sum over these, and no more.
    assert families.count("delta") == (2 if rows == 1 else 1)
    expect_close(found, of(exact))


def test_a_second_derivative_is_refused():
    (x,) = normal((1, 16, 1, 8))
    loss = lambda x: causal(x, x, x).sum()  # noqa: E731
    for twice in (
        lambda x: jax.grad(lambda x: (jax.grad(loss)(x) ** 2).sum())(x),
        lambda x: jax.jit(jax.jacfwd(jax.grad(loss)))(x),
    ):
        with pytest.raises(numflash.UnsupportedError, match="first derivatives only"):
            twice(x)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss, (x,), (x,))


def test_shards_run_on_their_own_devices(launched):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    place = NamedSharding(mesh, PartitionSpec("data"))
    given = tuple(jax.device_put(x, place) for x in qkv(2, 16, 1, 1, 8))
    shard_map = getattr(jax, "shard_map", None)
    if shard_map is None:
        from jax.experimental.shard_map import shard_map

        # An old one's account of what differs has no rule for foreign calls.
        shard_map = functools.partial(shard_map, check_rep=False)
    spec, everywhere = PartitionSpec("data"), PartitionSpec()
    (bias,) = normal((1, 1, 16, 16), seed=1)

    def step(function):
        def loss(given, bias):
            return (function(*given, bias) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

    # The bias is every device's, and its gradient the sum over them.
    sharded = shard_map(
        lambda q, k, v, bias: causal(q, k, v, bias=bias),
        mesh=mesh,
        in_specs=(spec, spec, spec, everywhere),
        out_specs=spec,
    )
    found, families = done(step(sharded)(given, bias), launched)
    assert families.count("forward") == families.count("backward-dq") == 2
    assert [x.sharding.spec for x in found[1][0]] == [spec] * 3
    whole = step(lambda q, k, v, bias: expected(q, k, v, bias=bias))
    expect_close(found, whole(qkv(2, 16, 1, 1, 8), bias))
    text = jax.jit(sharded).lower(*given, bias).compile().as_text()
    assert "all-gather" not in text and "numflash" in text


def test_threads_and_devices_at_once(launched):
    given = qkv(*ONE)
    step = jax.jit(lambda *given: causal(*given))
    found = {}

    def work(number):
        there = [jax.device_put(x, jax.devices()[number % 2]) for x in given]
        found[number] = np.asarray(step(*there))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert launched.take() == ["forward"] * 4
    for each in found.values():
        expect_close(each, expected(*given))


def test_a_call_costs_the_program_one_foreign_call():
    text = jax.jit(jax.grad(lambda x: causal(x, x, x).sum())).lower(qkv(*ONE)[0]).as_text()
    assert text.count("stablehlo.custom_call @numflash") == 2


def test_an_exported_program_means_the_same_in_another_process(launched, monkeypatch):
    """It holds the options as a text, functions included: nothing of this process."""
    # An old one needs a package that its pip does not install.
    export = pytest.importorskip("jax.export", exc_type=ImportError)
    given, shift = qkv(*ONE), 3

    def attend(q, k, v):
        return attention(q, k, v, mask_mod=lambda b, h, i, j: j <= i + shift, softmax_scale=0.5)

    checks = [export.DisabledSafetyCheck.custom_call(TARGET)]
    exported = export.export(jax.jit(attend), disabled_checks=checks)(*given)
    assert b"keep=" in exported.mlir_module_serialized
    monkeypatch.setattr(calls, "_ready", {})
    found, families = done(exported.call(*given), launched)
    assert families == ["forward"]
    expect_close(found, attend(*given))
