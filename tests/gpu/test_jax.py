"""`numflash.jax` where XLA itself calls the handler on a GPU."""

import functools
import os

import pytest

# Other tests of this process need memory, too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
jax = pytest.importorskip("jax", reason='needs JAX: pip install "numflash[jax]"')

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402


@pytest.fixture(autouse=True)
def on_gpu():
    """Skips where JAX has no CUDA platform."""
    try:
        jax.local_devices(backend="cuda")
    except RuntimeError:
        pytest.skip('JAX sees no CUDA device: pip install "jax[cuda13]" (or [cuda12])')


@pytest.fixture
def attention():
    from numflash.jax import dot_product_attention

    return functools.partial(dot_product_attention, is_causal=True)


theirs = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="xla")


def given(*lead, dtype="bfloat16", seqlen=257, heads=4, heads_kv=2, dim=64):
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = zip(keys, (heads, heads_kv, heads_kv), strict=True)
    return tuple(jax.random.normal(k, (*lead, 2, seqlen, n, dim), dtype) for k, n in sizes)


def expect_close(found, expected, tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def step_of(function):
    return jax.value_and_grad(lambda given: (function(*given).astype(jnp.float32) ** 2).sum())


@pytest.mark.parametrize(
    "dtype, tolerance", [("float16", 1e-2), ("bfloat16", 3e-2), ("float32", 5e-3)]
)
def test_results_and_gradients(attention, dtype, tolerance):
    x = given(dtype=dtype)
    expect_close(jax.jit(attention)(*x), theirs(*x), tolerance)
    expect_close(jax.jit(step_of(attention))(x), step_of(theirs)(x), tolerance)


def test_results_stay_on_the_device_and_in_order(attention):
    """Each call reads what the one before wrote, all enqueued at once."""
    q, k, v = given(heads=2)

    def chain(function):
        return jax.jit(lambda q: jax.lax.fori_loop(0, 20, lambda _, x: function(x, k, v), q))

    found = chain(attention)(q)
    assert isinstance(found, jax.Array) and found.devices() == q.devices()
    expect_close(found, chain(theirs)(q), 3e-2)


def test_calls_repeat_bit_for_bit_with_fresh_memory(attention):
    x = given()
    step = jax.jit(step_of(attention))
    first = jax.device_get(step(x))
    for n in range(5):
        jax.block_until_ready(jnp.full((n + 1, 1 << 20), jnp.nan))  # so that memory is dirty
        again = jax.device_get(step(x))
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
            assert (np.asarray(a) == np.asarray(b)).all()


def test_mapped_and_with_lengths(attention):
    x = given(3)
    expect_close(jax.jit(jax.vmap(attention))(*x), jax.vmap(theirs)(*x), 3e-2)
    lengths = jnp.array([100, 257], jnp.int32)
    cut = functools.partial(attention, key_value_seq_lengths=lengths, query_seq_lengths=lengths)
    of_xla = functools.partial(theirs, key_value_seq_lengths=lengths, query_seq_lengths=lengths)
    x = given()
    expect_close(jax.jit(step_of(cut))(x), step_of(of_xla)(x), 3e-2)


def test_split_keys_have_their_workspace(attention):
    q, k, v = given(seqlen=8192, dim=128)
    few = functools.partial(attention, is_causal=False)
    expect_close(
        jax.jit(few)(q[:, :1], k, v),
        jax.nn.dot_product_attention(q[:, :1], k, v, implementation="xla"),
        3e-2,
    )


def test_every_device_runs_its_own(attention):
    x = given()
    expected = theirs(*x)
    step = jax.jit(attention)
    found = [step(*jax.device_put(x, device)) for device in jax.local_devices(backend="cuda")]
    for each in found:
        expect_close(each, expected, 3e-2)


def test_wrong_shapes_are_refused_before_anything_runs(attention):
    q, k, _ = given()
    with pytest.raises(ValueError, match="multiple of the heads"):
        jax.jit(attention)(k, q, q)
