"""Options of `numflash.jax.attention`, with their gradients."""

import functools

import pytest

jax = pytest.importorskip("jax", reason='needs JAX: pip install "numflash[jax]"')

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import numflash  # noqa: E402
from numflash import math  # noqa: E402
from numflash.jax import attention  # noqa: E402
from tests.support.covering import ALL  # noqa: E402
from tests.support.jax_cases import done, exact, expect_close, normal, qkv  # noqa: E402

SHAPE = 1, 16, 2, 1, 8
B, T, N = 1, 16, 2


def bent(s, b, h, i, j, gate, table):
    """A score that two arrays change: one by head, one by distance."""
    return s * gate[h] + table[math.minimum(abs(i - j), 7)]


def bent_in_jax(s, b, h, i, j, gate, table):
    return s * gate[None, :, None, None] + table[jnp.minimum(jnp.abs(i - j), 7)]


LEARNED = {
    "bias": ("bias", (1, N, T, T)),
    "bias of the keys": ("bias", (T,)),
    "sinks": ("sinks", (N,)),
    "slopes": ("alibi_slopes", (N,)),
    "slopes of entries": ("alibi_slopes", (B, N)),
}


@pytest.mark.parametrize("name", LEARNED if ALL else ["bias", "sinks", "slopes of entries"])
def test_gradients_of_arrays_among_the_options(launched, name):
    (option, shape), given = LEARNED[name], qkv(*SHAPE)
    (learned,) = normal(shape, seed=1)
    renamed = {"alibi_slopes": "slopes"}.get(option, option)

    def of(function, option):
        def loss(given, learned):
            return (function(*given, causal=True, **{option: learned}) ** 2).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(given, learned)

    found, families = done(of(attention, option), launched)
    assert families[0] == "forward" and "backward-dq" in families
    expect_close(found, of(exact, renamed))


def test_gradients_of_arrays_that_a_function_reads(launched):
    given = qkv(*SHAPE)
    gate, table = normal((N,), (8,), seed=1)

    def ours(q, k, v, gate, table):
        return attention(q, k, v, score_mod=bent, aux=(gate, table))

    def theirs(q, k, v, gate, table):
        return exact(q, k, v, score=lambda *places: bent_in_jax(*places, gate, table))

    def of(function):
        return jax.jit(jax.grad(lambda x: (function(*x) ** 2).sum()))((*given, gate, table))

    found, families = done(of(ours), launched)
    assert families[0] == "forward" and "backward-scatter" in families
    expect_close(found, of(theirs), 1e-4)


def test_a_mask_a_function_and_blocks_hide_keys(launched):
    q, k, v = qkv(1, 32, 1, 1, 8)
    hidden = exact(q, k, v, score=lambda s, b, h, i, j: jnp.where(i // 16 == j // 16, s, -jnp.inf))
    same = lambda b, h, i, j: i // 16 == j // 16  # noqa: E731
    tiles = np.eye(2, dtype=bool)
    for options in (
        {"mask": np.kron(tiles, np.ones((16, 16), bool))},
        {"mask_mod": same},
        {"block_mask": numflash.BlockMask.from_tiles(tiles, block_size=16)},
        {"block_mask": numflash.create_block_mask(same, 1, 1, 32, 32, block_size=16)},
    ):
        launched.clear()
        out, families = done(jax.jit(functools.partial(attention, **options))(q, k, v), launched)
        assert families == ["forward"]
        expect_close(out, hidden)


def test_dropout_is_that_of_the_seed(launched):
    q, k, v = qkv(*SHAPE)
    step = jax.jit(lambda seed: attention(q, k, v, dropout_p=0.25, seed=seed))
    found, families = done(step(jnp.array([5], jnp.int32)), launched)
    assert families == ["forward"]
    numpys = [np.asarray(x) for x in (q, k, v)]
    assert (np.asarray(found) == numflash.attention(*numpys, dropout_p=0.25, seed=5)).all()
    assert (step(jnp.array([6], jnp.int32)) != found).any()


@pytest.mark.parametrize(
    "layout, axes", [("bhsd", 4), ("bshd", 3), ("bhsd", 3), ("bshd", 2), ("bhsd", 2)]
)
def test_layouts_and_missing_axes(launched, layout, axes):
    q, k, v = qkv(1, 16, 2 if axes > 2 else 1, 1, 8)
    expected, of_lse = exact(q, k, v, causal=True, lse=True)
    if layout == "bhsd":
        q, k, v, expected = (jnp.swapaxes(x, 1, 2) for x in (q, k, v, expected))
    one_head = 1 if layout == "bhsd" else 2
    missing = {4: (), 3: (0,), 2: (0, one_head)}[axes]
    q, k, v, expected = (jnp.squeeze(x, missing) for x in (q, k, v, expected))
    found = attention(q, k, v, causal=True, layout=layout, return_lse=True)
    found, families = done(found, launched)
    assert families == ["forward"] and found[0].ndim == axes
    expect_close(found, (expected, jnp.squeeze(of_lse, (0, 1)[: 4 - axes])))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"] if ALL else ["bfloat16"])
def test_dtypes_and_float32_results(launched, dtype):
    q, k, v = qkv(*SHAPE, dtype=dtype)
    step = functools.partial(attention, out_dtype="float32")
    out, families = done(step(q, k, v), launched)
    assert families == ["forward"] and isinstance(out, jax.Array)
    assert (out.dtype, attention(q, k, v).dtype) == ("float32", dtype)
    expect_close(out, exact(q, k, v), {"float32": 2e-5, "float16": 1e-3, "bfloat16": 1e-2}[dtype])
    found = jax.grad(lambda q: (step(q, k, v) ** 2).sum())(q)
    assert found.dtype == dtype
    expect_close(found, jax.grad(lambda q: (exact(q, k, v) ** 2).sum())(q), 2e-2)


def test_8_bits(launched):
    q, k, v = qkv(1, 16, 1, 1, 16, dtype="bfloat16")
    out, families = done(attention(q, k, v, precision="fp8"), launched)
    assert families[-1] == "forward" and len(families) > 1
    expect_close(out, exact(q, k, v), 0.15)
    with pytest.raises(numflash.UnsupportedError, match="no backward on 8-bit floats"):
        jax.grad(lambda q: attention(q, k, v, precision="fp8").sum())(q)


def test_split_keys_and_lengths_lie_in_the_programs_memory(launched):
    q, k, v = qkv(2, 2, 1, 1, 8, seqlen_k=40)
    lengths = jnp.array([40, 9], jnp.int32)
    out, families = done(attention(q, k, v, seqlens_k=lengths), launched)
    assert families[:2] == ["schedule", "forward"]
    expect_close(out[1], exact(q[1:], k[1:, :9], v[1:, :9])[0])
    expect_close(out[0], exact(q[:1], k[:1], v[:1])[0])


def test_there_may_be_no_key_and_no_batch(launched):
    q, k, v = qkv(1, 16, 1, 1, 8)
    out, families = done(attention(q, k[:, :0], v[:, :0]), launched)
    assert families == ["forward"] and (out == 0).all()
    assert attention(q[:0], k[:0], v[:0]).shape == (0, 16, 1, 8)
    assert attention(q[:, :0], k, v).shape == (1, 0, 1, 8)


def test_numpys_arrays_and_numbers_are_taken(launched):
    q, k, v = (np.asarray(x) for x in qkv(*SHAPE))
    scale = np.float32(0.5)
    out, families = done(attention(q, k, v, softmax_scale=scale), launched)
    assert families == ["forward"] and isinstance(out, jax.Array)
    assert (np.asarray(out) == numflash.attention(q, k, v, softmax_scale=0.5)).all()
    again = attention(q, k, v, softmax_scale=jnp.float32(0.5))
    assert (out == again).all()
