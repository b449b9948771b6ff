"""`numflash.jax.ring_attention` on host devices, against float64 and one device's results."""

import functools
import re

import pytest

jax = pytest.importorskip("jax", reason='needs JAX: pip install "numflash[jax]"')

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, PartitionSpec  # noqa: E402

import numflash  # noqa: E402
from numflash import reference  # noqa: E402
from numflash.distributed.layouts import Layout  # noqa: E402
from numflash.frontends.jax import ring  # noqa: E402
from numflash.jax import attention, from_zigzag, ring_attention, to_zigzag  # noqa: E402
from tests.support.covering import some, thorough  # noqa: E402
from tests.support.jax_cases import expect_close, normal, qkv  # noqa: E402


def sharded(function, **specs):
    """`jax.shard_map`, by its older name where there is no other."""
    if hasattr(jax, "shard_map"):
        return jax.shard_map(function, **specs)
    from jax.experimental.shard_map import shard_map

    # An old one's account of what differs has no rule for foreign calls.
    return shard_map(function, check_rep=False, **specs)


def on_devices(devices, **options):
    """`ring_attention` with lse, of each device's part."""
    tokens, heads_first = PartitionSpec(None, "seq"), PartitionSpec(None, None, "seq")
    return sharded(
        functools.partial(ring_attention, axis_name="seq", return_lse=True, **options),
        mesh=Mesh(np.array(jax.devices()[:devices]), ("seq",)),
        in_specs=(tokens,) * 3,
        out_specs=(tokens, heads_first),
    )


def over_devices(devices, order="zigzag", **options):
    """(out, lse) of whole arrays in the order of the sequence; arrays of heads by name."""

    def attend(q, k, v, **of_heads):
        step = on_devices(devices, order=order, **options, **of_heads)
        if order == "contiguous":
            return step(q, k, v)
        out, lse = step(*(to_zigzag(x, devices) for x in (q, k, v)))
        return from_zigzag(out, devices), from_zigzag(lse, devices, axis=2)

    return attend


def with_gradients(function, given, of_heads):
    """(out, lse), and the gradients of a loss of both, by all arrays."""
    arrays = dict(zip("qkv", given, strict=True)) | of_heads

    def loss(arrays):
        out, lse = function(**arrays)
        weights = normal(out.shape, lse.shape, seed=9)
        return sum((w * x).sum() for w, x in zip(weights, (out, lse), strict=True)), (out, lse)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, results), found = step(arrays)
    return results, found


def in_float64(given, of_heads, **options):
    """The same by the specification."""
    q, k, v = (np.asarray(x, np.float64) for x in given)
    options = options | {name: np.asarray(x) for name, x in of_heads.items()}
    out, lse = reference.attention(q, k, v, **options)
    dout, dlse = normal(out.shape, lse.shape, seed=9)
    wrt = "q", "k", "v", *of_heads
    found = reference.attention_backward(
        np.asarray(dout), q, k, v, dlse=np.asarray(dlse), wrt=wrt, **options
    )
    return (out, lse), dict(zip(wrt, found, strict=True))


CASES = {
    # devices, tokens, heads, order, options
    "four devices": (4, 32, 1, "zigzag", {"causal": True}),
    "causal, in order": (2, 20, 2, "contiguous", {"causal": True}),
    "full": (2, 20, 2, "zigzag", {}),
    "window": (2, 20, 1, "contiguous", {"window_size": (3, 0)}),
    "window, zigzag": (2, 20, 1, "zigzag", {"window_size": (5, 2), "softcap": 3.0}),
    "three devices": (3, 18, 2, "zigzag", {"causal": True, "softmax_scale": 0.3}),
    "window of four devices": (4, 24, 1, "contiguous", {"window_size": (8, 0)}),
}


@pytest.mark.parametrize("name", some(CASES, "four devices", "causal, in order", "window, zigzag"))
def test_results_and_gradients(launched, name):
    devices, tokens, heads, order, options = CASES[name]
    given = qkv(1, tokens, heads, 1, 8)
    found = with_gradients(over_devices(devices, order, **options), given, {})
    expect_close(found, in_float64(given, {}, **options))
    assert "forward" in launched.families and "backward-dq" in launched.families


def test_arrays_of_heads_have_the_gradients_of_one_device():
    given = qkv(1, 16, 2, 1, 8)
    sinks, slopes = normal((2,), (2,), seed=1)
    of_heads = {"sinks": sinks, "alibi_slopes": slopes}
    found = with_gradients(over_devices(2, "contiguous", causal=True), given, of_heads)
    expect_close(found, in_float64(given, of_heads, causal=True))


def test_dropout_has_one_devices_mask():
    given = qkv(1, 32, 1, 1, 8)
    options = {"causal": True, "dropout_p": 0.3, "seed": jnp.asarray([5], "int32")}
    found = with_gradients(over_devices(2, "contiguous", **options), given, {})
    expect_close(found, in_float64(given, {}, **options | {"seed": 5}))


def test_results_of_16_bits_are_rounded_once():
    """Their errors are those of one device, whose sums are float32."""
    given = qkv(1, 32, 1, 1, 8, dtype="bfloat16")
    alone = functools.partial(attention, causal=True, return_lse=True)
    whole = [x.astype("float32") for x in given]
    (exact, _), gradients = in_float64(whole, {}, causal=True)

    def errors(function):
        (out, _), found = with_gradients(function, given, {})
        assert out.dtype == found["q"].dtype == "bfloat16"
        pairs = (out, exact), *((found[name], gradients[name]) for name in "qkv")
        return [np.sqrt(((np.asarray(a, np.float64) - b) ** 2).mean()) for a, b in pairs]

    for ours, theirs in zip(
        errors(over_devices(4, "contiguous", causal=True)), errors(alone), strict=True
    ):
        assert ours <= 1.1 * theirs


def test_other_axes_of_the_mesh_stay_apart():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "seq"))
    spec = PartitionSpec("data", "seq")
    # Not compiled by the caller, either.
    attend = sharded(
        lambda q, k, v: ring_attention(q, k, v, axis_name="seq", causal=True),
        mesh=mesh,
        in_specs=(spec,) * 3,
        out_specs=spec,
    )
    given = qkv(2, 16, 1, 1, 8)
    found = attend(*(to_zigzag(x, 2) for x in given))
    expect_close(from_zigzag(found, 2), reference.attention(*given, causal=True)[0])


@thorough
def test_a_mapped_axis_and_a_checkpoint_change_nothing():
    given = normal(*[(2, 1, 16, 1, 8)] * 3)

    def gradients(function, spec):
        step = sharded(
            function,
            mesh=Mesh(np.array(jax.devices()[:2]), ("seq",)),
            in_specs=(spec,) * 3,
            out_specs=spec,
        )
        return jax.jit(jax.grad(lambda x: (step(*x) ** 2).sum()))

    def attend(q, k, v):
        return ring_attention(q, k, v, axis_name="seq", causal=True)

    mapped = gradients(jax.vmap(attend), PartitionSpec(None, None, "seq"))(given)
    alone = gradients(jax.checkpoint(attend), PartitionSpec(None, "seq"))
    for n in range(2):
        expect_close([x[n] for x in mapped], alone([x[n] for x in given]))


def test_one_device_has_the_bits_of_attention():
    given = qkv(1, 24, 2, 1, 8)
    found = with_gradients(over_devices(1, causal=True), given, {})
    alone = functools.partial(attention, causal=True, return_lse=True)
    expected = with_gradients(alone, given, {})
    for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(expected[0]), strict=True):
        assert (np.asarray(a) == np.asarray(b)).all()
    expect_close(found, expected)


def test_parts_in_which_a_row_sees_nothing_leave_it_empty():
    nothing = jnp.zeros((1, 4, 1, 2)), jnp.full((1, 1, 4), -jnp.inf)
    out, lse = ring._merged(nothing, nothing, (0, 4), 4)
    assert (out == 0).all() and jnp.isneginf(lse).all()


def hops(function, *given):
    """How many arrays go round, and how many foreign calls there are."""
    text = jax.jit(function).lower(*given).as_text()
    return [len(re.findall(f"{name}\\b", text)) for name in ("collective_permute", "@numflash")]


def test_only_what_somebody_sees_travels():
    given = qkv(1, 32, 1, 1, 8)
    assert hops(over_devices(4, causal=True), *given) == [6, 7]
    # Keys of the neighbour; the first device has none before it.
    assert hops(over_devices(4, "contiguous", window_size=(3, 0)), *given) == [2, 2]

    def gradient(names):
        loss = lambda q, k, v: over_devices(4, causal=True)(q, k, v)[0].sum()  # noqa: E731
        return jax.grad(loss, argnums=names)

    # In the backward keys and values once more, and their gradients four times: the last is home.
    assert hops(gradient((0, 1, 2)), *given) == [6 + 6 + 8, 14]
    assert hops(gradient((0,)), *given) == [6 + 6, 14]


def test_orders_are_those_of_a_layout_and_inverse():
    x = jnp.arange(48).reshape(2, 24)
    layout = Layout.zigzag(24, 3)
    parts = jnp.split(to_zigzag(x, 3, axis=-1), 3, axis=1)
    assert all((parts[r][0] == layout.indices(r)).all() for r in range(3))
    assert (from_zigzag(to_zigzag(x, 3), 3) == x).all()


def test_second_derivatives_are_refused():
    (x,) = normal((1, 16, 1, 8))
    loss = lambda x: over_devices(2, causal=True)(x, x, x)[0].sum()  # noqa: E731
    with pytest.raises(numflash.UnsupportedError, match="first derivatives only"):
        jax.grad(lambda x: jax.grad(loss)(x).sum())(x)


Q, K, V = qkv(1, 16, 2, 1, 8)
BAD = {
    "tokens": (
        lambda: over_devices(2)(Q, K, V[:, :12]),
        "v must have the tokens of q, 8 on each device",
    ),
    "order": (lambda: over_devices(2, "random")(Q, K, V), "order must be one of zigzag"),
    "padding": (lambda: to_zigzag(Q, 3), "a multiple of 2 \\* ranks = 6 tokens along axis 1"),
    "axis of tokens": (lambda: from_zigzag(Q, 2, axis=4), "axis must be one of x of shape"),
    "no mesh": (
        lambda: ring_attention(Q, K, V, axis_name="seq"),
        "an axis of a jax.shard_map around the call, got 'seq'",
    ),
    "dimensions": (
        lambda: ring_attention(Q[0], K[0], V[0], axis_name="seq"),
        "q must be \\(batch, tokens, heads, head_dim\\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_an_odd_share_is_refused_in_zigzag_order():
    with pytest.raises(ValueError, match=r"an even number of tokens; q has 5: pad .* of 4"):
        on_devices(2)(*qkv(1, 10, 1, 1, 8))


def test_dropout_needs_pieces_that_its_random_bits_share():
    with pytest.raises(ValueError, match=r"pieces of a multiple of 16 tokens .* got pieces of 4"):
        on_devices(2, dropout_p=0.5, seed=1)(Q, K, V)
    with pytest.raises(ValueError, match=r"right side is a multiple of 16 tokens.* got 3"):
        on_devices(2, dropout_p=0.5, seed=1, window_size=(-1, 3))(*qkv(1, 64, 1, 1, 8))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"bias": jnp.zeros((1, 1, 8, 8))}, "does not take: bias; it takes causal, window_size"),
        ({"causal": 1}, "causal must be True or False, got 1"),
        ({"return_lse": 1}, "return_lse must be True or False, got 1"),
    ],
)
def test_bad_options(given, message):
    with pytest.raises(TypeError, match=message):
        ring_attention(Q, K, V, axis_name="seq", **given)
