"""The grid of JAX's own tests of `dot_product_attention` (nn_test.py), with smaller arrays."""

import inspect
import itertools

import pytest

jax = pytest.importorskip("jax", reason='needs JAX: pip install "numflash[jax]"')

import jax.numpy as jnp  # noqa: E402

from numflash.jax import dot_product_attention  # noqa: E402
from tests.support.covering import ALL, covering  # noqa: E402
from tests.support.jax_cases import BACKWARD, done, expect_close, normal, of_jax, qkv  # noqa: E402

# There 2, 128, 128, 4, 32.
B, T, S, N, H = 2, 16, 16, 2, 8
GRID = covering(
    itertools.product(["bfloat16", "float16"], [1, 2, 4] if ALL else [1, 2], [False, True]),
    lambda row: row,
)


@pytest.mark.parametrize("dtype, group_num, use_vmap", GRID)
def test_dot_product_attention(launched, dtype, group_num, use_vmap):
    q, k, v = qkv(B, T, max(N, group_num), max(N, group_num) // group_num, H, dtype=dtype)
    (grad,) = normal(q.shape, dtype=dtype, seed=1)
    answer = dot_product_attention
    if use_vmap:
        answer = jax.vmap(answer, in_axes=(0, 0, 0, None, None), out_axes=0)
    out, vjp = jax.vjp(answer, q, k, v, None, None)
    found, families = done(vjp(grad)[:3], launched)
    assert families == ["forward", *BACKWARD]
    expected, vjp = jax.vjp(of_jax, q, k, v)
    assert out.dtype == dtype and [x.dtype for x in found] == [dtype] * 3
    expect_close((out, *found), (expected, *vjp(grad)), 0.02)


MODES = ["bias causal", "causal padding", "custom padding", "causal sliding_window"]
if ALL:
    MODES += ["bias", "causal", "padding", "custom", "sliding_window"]


@pytest.mark.parametrize("modes", MODES)
def test_dot_product_attention_mask(launched, modes):
    q, k, v = qkv(B, T, N, N, H, dtype="bfloat16")
    (grad,) = normal(q.shape, dtype="bfloat16", seed=1)
    bias = mask = q_seqlen = kv_seqlen = window = None
    if "padding" in modes:
        q_seqlen = jnp.array([T // 2, T // 4], dtype=jnp.int32)
        kv_seqlen = jnp.array([S // 4, S // 2], dtype=jnp.int32)
    if "custom" in modes:
        mask = jnp.tril(jnp.ones((T, S), dtype=jnp.bool_))[None, None]
    if "bias" in modes:
        (bias,) = normal((1, N, T, S), dtype="bfloat16", seed=2)
    if "sliding_window" in modes:
        window = (3, 2) if "causal" in modes else (3, 0)

    def of(function):
        def call(q, k, v, bias):
            return function(
                q,
                k,
                v,
                bias,
                mask,
                is_causal="causal" in modes,
                query_seq_lengths=q_seqlen,
                key_value_seq_lengths=kv_seqlen,
                local_window_size=window,
            )

        return jax.vjp(call, q, k, v, bias)

    out, vjp = of(dot_product_attention)
    found, families = done(vjp(grad), launched)
    assert {"forward", *BACKWARD} <= {*families}
    assert ("schedule" in families) == ("padding" in modes)
    expected, vjp = of(of_jax)
    if "padding" not in modes:
        expect_close((out, found), (expected, vjp(grad)), 0.02)
        return
    # Where a query of the sequence sees no key JAX takes the mean of all values: nobody relies on
    # that, and here it is 0. In each of these cases there is a key for all that there is.
    expect_close((out, found[:3]), (expected, vjp(grad)[:3]), 0.02)


@pytest.mark.parametrize(
    "batch, use_vmap",
    [(1, False), (1, True), (2, False), (2, True)] if ALL else [(1, False), (2, True)],
)
def test_dot_product_attention_bias_gradient(launched, batch, use_vmap):
    x, bias = normal((batch, T, N, H), (batch, N, T, T), dtype="bfloat16")
    mask = jnp.ones((1, 1, T), dtype=jnp.bool_)

    def loss(function):
        def attended(x, bias, mask):
            return function(x, x, x, bias=bias, mask=mask)

        if use_vmap:
            attended = jax.vmap(attended, in_axes=(0, 0, None))
        return jax.jit(lambda x, bias: jax.vjp(attended, x, bias, mask)[1](x)[:2])

    if use_vmap:
        bias = bias[:, None]
    found, families = done(loss(dot_product_attention)(x, bias), launched)
    assert {"forward", *BACKWARD} <= {*families}
    expect_close(found, loss(of_jax)(x, bias), 0.03)


SHAPES = {
    "three axes": ((T, N, H), (S, N, H)),
    "one key-value head": ((1, T, N, H), (1, S, 1, H)),
    "more keys": ((1, 5, N, H), (1, 20, N, H)),
    "more queries": ((1, 20, N, H), (1, 7, N, H)),
}


OPTIONS = {"is_causal": True}, {"local_window_size": 4, "scale": 0.3}


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
@pytest.mark.parametrize("shapes", SHAPES)
def test_shapes_and_residual(launched, shapes, options):
    of_q, of_k = SHAPES[shapes]
    q, k, v = normal(of_q, of_k, of_k)
    if shapes == "more queries":
        # Behind the last key's window JAX averages; no such row here.
        options = {name: value for name, value in options.items() if name != "local_window_size"}
    found = dot_product_attention(q, k, v, return_residual=True, **options)
    found, families = done(found, launched)
    assert families == ["forward"]
    expected = of_jax(q, k, v, return_residual=True, **options)
    expect_close(found, expected)
    assert found[1].dtype == q.dtype


def test_a_query_without_keys_gives_0(launched):
    q, k, v = qkv(1, 16, 1, 1, 8)
    mask = jnp.zeros((1, 1, 16, 16), bool).at[..., 1:, :].set(True)
    out, families = done(dot_product_attention(q, k, v, mask=mask), launched)
    assert families == ["forward"]
    expect_close(out[:, 1:], of_jax(q, k, v)[:, 1:])
    assert (out[:, 0] == 0).all()


@pytest.mark.parametrize("implementation, runs", [("numflash", ["forward"]), ("xla", [])])
def test_an_implementation_can_be_named(launched, implementation, runs):
    q, k, v = qkv(1, 16, 1, 1, 8)
    out = dot_product_attention(q, k, v, implementation=implementation)
    out, families = done(out, launched)
    assert families == runs
    expect_close(out, of_jax(q, k, v))


def test_the_signature_is_jaxs():
    """An older JAX has no return_residual."""
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    ours = inspect.signature(dot_product_attention).parameters
    assert {*ours} - {*theirs} <= {"return_residual"} and {*theirs} <= {*ours}
    positional = [name for name in ours if ours[name].kind is not ours[name].KEYWORD_ONLY]
    assert list(theirs)[: len(positional)] == positional
    for name, each in theirs.items():
        assert (ours[name].kind, ours[name].default) == (each.kind, each.default)
