"""JAX on the CPU with four devices, and attention in a few lines of it.

Import it after `pytest.importorskip("jax")`, and before anything is computed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# These take effect when JAX starts its backend.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
# Compiling takes most of a test's time.
jax.config.update("jax_disable_most_optimizations", True)

BACKWARD = ["delta", "backward-dkdv", "backward-dq"]
"""The families that run for dq, dk and dv."""


def normal(*shapes, dtype="float32", seed=0):
    """Arrays of random numbers."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape).astype(jnp.dtype(dtype))) for shape in shapes]


def qkv(batch=2, seqlen=20, heads=2, heads_kv=None, dim=8, seqlen_k=None, **more):
    """q, k and v, (batch, seqlen, heads, dim)."""
    of_k = batch, seqlen_k or seqlen, heads_kv or heads, dim
    return normal((batch, seqlen, heads, dim), of_k, of_k, **more)


@functools.partial(jax.jit, static_argnames=("causal", "score", "lse"))
def exact(q, k, v, *, bias=None, sinks=None, slopes=None, causal=False, score=None, lse=False):
    """Attention of (batch, seqlen, heads, dim) in float32; equal lengths if it is causal."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, 2) for x in (k, v))
    s = jnp.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    b, h, i, j = (
        jnp.arange(n).reshape([-1 if a == x else 1 for a in range(4)])
        for x, n in enumerate(s.shape)
    )
    if slopes is not None:
        s -= jnp.broadcast_to(slopes, s.shape[:2])[:, :, None, None] * jnp.abs(i - j)
    s = s if bias is None else s + bias
    s = s if score is None else score(s, b, h, i, j)
    s = jnp.where(j <= i, s, -jnp.inf) if causal else s
    of_sinks = (
        s[..., :0]
        if sinks is None
        else jnp.broadcast_to(sinks[None, :, None, None], (*s.shape[:3], 1))
    )
    total = jax.nn.logsumexp(jnp.concatenate([s, of_sinks], -1), -1, keepdims=True)
    out = jnp.einsum("bhij,bjhd->bihd", jnp.exp(s - total), v)
    return (out, total[..., 0]) if lse else out


_compiled = jax.jit(
    jax.nn.dot_product_attention,
    static_argnames=("scale", "is_causal", "local_window_size", "return_residual"),
)


def of_jax(query, *arrays, **options):
    """JAX's own, which knows no float16 on a CPU when it is compiled."""
    function = jax.nn.dot_product_attention if query.dtype == "float16" else _compiled
    return function(query, *arrays, **options)


def done(result, launched) -> tuple:
    """(the result of JAX's, the families that made it): JAX does not wait by itself."""
    jax.block_until_ready(result)
    return result, launched.take()


def largest(x) -> float:
    """The largest absolute value."""
    return float(np.abs(np.asarray(x, np.float32)).max(initial=0))


def expect_close(found, expected, tolerance=2e-5):
    """Compare trees of arrays, relative to the largest value of each."""
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert largest(a - b) <= tolerance * max(largest(b), 1e-3), largest(a - b)
