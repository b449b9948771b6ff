"""Attention over the devices of a mesh axis, inside `shard_map`: keys and values go round.

All devices run one program. What each of them computes in a step, and whom it sends to, comes from
`numflash.distributed.steps`: `ppermute` moves the arrays, and `lax.switch` takes the calls of the
device.
"""

from collections.abc import Hashable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from numflash.distributed import steps
from numflash.distributed.layouts import Layout
from numflash.distributed.pairs import Band
from numflash.frontends.encoding import decode, encode, names_of
from numflash.frontends.jax.attention import as_array, as_option, attention
from numflash.frontends.jax.calls import Call
from numflash.frontends.jax.transforms import batched, manual_axes, only_once, varying
from numflash.problem.options import AttentionOptions, expect_one_of
from numflash.runtime.philox import ALIGNMENT

ORDERS = ("zigzag", "contiguous")
_OPERANDS = ("q", "k", "v")
_TAKEN = (
    "causal",
    "window_size",
    "softmax_scale",
    "softcap",
    "alibi_slopes",
    "sinks",
    "dropout_p",
    "seed",
    "precision",
    "config",
)
_MOST_PROBLEMS = 256


def ring_attention(
    q,
    k,
    v,
    *,
    axis_name: Hashable,
    order: str = "zigzag",
    return_lse: bool = False,
    **options: Any,
):
    """Attention of a sequence whose tokens lie on several devices: call it in `jax.shard_map`.

    Each device holds an equal share of the tokens, and computes the result of its own queries.
    Keys and values go from device to device, those that somebody still sees, while each computes
    with the ones that it has. Results are put together in float32, in the order of the steps.

    Args:
        q: (batch, tokens, heads, head_dim), this device's part; float16, bfloat16 or float32.
        k: (batch, tokens, heads_kv, head_dim): of the same tokens as q.
        v: (batch, tokens, heads_kv, head_dim_v).
        axis_name: of the mesh axis, or axes, along which the tokens lie.
        order: "zigzag": the sequence is cut in two pieces for each device, and device r of n
            holds pieces r and 2 * n - 1 - r, as `to_zigzag` lays them out. Under a causal mask
            all devices then have the same work. "contiguous": device r holds piece r of n; for
            full masks and windows.
        return_lse: also return the log-sum-exp, which has a gradient, too.
        options: causal, window_size, softmax_scale, softcap, alibi_slopes, sinks, dropout_p,
            seed, precision and config of `numflash.jax.attention`, for the whole sequence.
            alibi_slopes and sinks are those of all heads, and have gradients. Dropout takes the
            mask that one device has: the pieces then are multiples of 16 tokens, and the program
            holds a call for each pair of devices.

    Positions, as rotary embeddings need them, are those of the whole sequence:
    `to_zigzag(jnp.arange(seqlen), devices, axis=0)`, sharded as q is.

    Returns:
        out: (batch, tokens, heads, head_dim_v) in the dtype of q.
        lse: with return_lse, (batch, heads, tokens) float32.

    Raises:
        TypeError: an option that is not among these, or of a wrong type.
        ValueError: shapes that do not fit together; an odd number of tokens in zigzag order;
            pieces that do not suit dropout; axis_name is no axis of a `shard_map` around the call.
        UnsupportedError: as `numflash.jax.attention`.

    Memory beyond inputs and results: the keys and values of two devices, out in float32 twice; in
    the backward dq in float32, and dk and dv in float32 of two devices.

    Source: Ring Attention, arXiv 2310.01889.

    Example:
        >>> import jax, numflash.jax
        >>> from jax.sharding import Mesh, PartitionSpec as P
        >>> mesh = Mesh(jax.devices()[:1], ("seq",))
        >>> attend = jax.shard_map(
        ...     lambda x: numflash.jax.ring_attention(x, x, x, axis_name="seq", causal=True),
        ...     mesh=mesh, in_specs=P(None, "seq"), out_specs=P(None, "seq"),
        ... )
        >>> x = numflash.jax.to_zigzag(jax.random.normal(jax.random.key(0), (1, 16, 2, 8)), 1)
        >>> numflash.jax.from_zigzag(attend(x), 1).shape
        (1, 16, 2, 8)
    """
    expect_one_of("order", order, ORDERS)
    if not isinstance(return_lse, bool):
        raise TypeError(f"return_lse must be True or False, got {return_lse!r}")
    if unknown := sorted({*options} - {*_TAKEN}):
        raise TypeError(
            f"numflash.jax.ring_attention got options that it does not take: "
            f"{', '.join(unknown)}; it takes {', '.join(_TAKEN)}"
        )
    operands = tuple(as_array(name, x) for name, x in zip(_OPERANDS, (q, k, v), strict=True))
    options = {name: as_option(name, value) for name, value in options.items()}
    asked = AttentionOptions.of("numflash.jax.ring_attention", options)
    encoded = encode(asked, None)
    _expect_shapes(*(x.shape for x in operands))
    if not operands[0].shape[1]:
        return attention(*operands, return_lse=return_lse)
    layout = _layout(order, operands[0].shape[1], _size_of(axis_name))
    band = Band.of(asked.causal, asked.window_size)
    if asked.dropout_p:
        _expect_pieces_of_dropout(layout, band)
    problem = _Problem(axis_name, layout, band, encoded.text)
    arrays = *operands, *encoded.arrays.values()
    axes = manual_axes(arrays)
    out, lse = _compiled(problem)(*(varying(x, axes) for x in arrays))
    return (out, lse) if return_lse else out


def to_zigzag(x, ranks: int, *, axis: int = 1):
    """A whole array in the order in which `ring_attention` takes it, order="zigzag".

    Args:
        x: an array with the tokens of the whole sequence along `axis`, a multiple of 2 * ranks.
        ranks: how many devices share the tokens.
        axis: of the tokens.

    Returns:
        an array of the same shape; its `ranks` equal parts along `axis` are those of the devices.

    Raises:
        TypeError, ValueError: no such axis, another number of tokens, ranks below 1.

    Example:
        >>> import jax.numpy as jnp, numflash.jax
        >>> numflash.jax.to_zigzag(jnp.arange(8), 2, axis=0).tolist()
        [0, 1, 6, 7, 2, 3, 4, 5]
    """
    return jnp.take(x, _zigzag_rows(x, ranks, axis), axis)


def from_zigzag(x, ranks: int, *, axis: int = 1):
    """The inverse of `to_zigzag`; arguments and errors as there.

    Example:
        >>> import jax.numpy as jnp, numflash.jax
        >>> x = jnp.array([0, 1, 6, 7, 2, 3, 4, 5])
        >>> numflash.jax.from_zigzag(x, 2, axis=0).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    return jnp.take(x, np.argsort(_zigzag_rows(x, ranks, axis)), axis)


def _zigzag_rows(x, ranks: int, axis: int) -> np.ndarray:
    """The rows of the whole sequence, in zigzag order. Raises TypeError, ValueError."""
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis must be one of x of shape {x.shape}, got {axis}")
    layout = Layout.zigzag(x.shape[axis], ranks)
    if layout.seqlen % (2 * ranks):
        raise ValueError(
            f"x must have a multiple of 2 * ranks = {2 * ranks} tokens along axis {axis}, got "
            f"shape {x.shape}: pad the sequence"
        )
    return np.concatenate([layout.indices(rank) for rank in range(ranks)])


class _Problem(NamedTuple):
    """All that a program of XLA's depends on, but for shapes.

    Attributes:
        axis_name: of the mesh.
        layout: who holds which tokens.
        band: what a query sees.
        text: of the options (`frontends.encoding`).
    """

    axis_name: Hashable
    layout: Layout
    band: Band
    text: str

    @property
    def names(self) -> tuple[str, ...]:
        """Of the arrays, in order."""
        return *_OPERANDS, *names_of(self.text)

    def steps(self) -> list[tuple[tuple[steps.Step, ...], tuple["_Asked", ...]]]:
        """For each step those of the ranks, and what they compute."""
        options = decode(self.text, names_of(self.text))
        by_origin = bool(options.dropout_p)
        by_position = by_origin or options.alibi_slopes is not None
        by_rank = steps.ring(self.layout, self.band, by_position)
        found = []
        for each in zip(*by_rank, strict=True):
            asked = [_asked(step.calls, by_position, by_origin) for step in each]
            found.append((each, tuple(asked)))
        return found


class _Part(NamedTuple):
    """A call on some rows, the same for all ranks that have an equal one.

    Attributes:
        q, k: (begin, end) of the rows of the queries, and of the keys.
        options: those that differ from the whole problem's.
        is_own: whether its queries' sinks are part of it.
    """

    q: tuple[int, int]
    k: tuple[int, int]
    options: tuple[tuple[str, Any], ...]
    is_own: bool


_Asked = tuple[_Part, ...]


def _asked(calls, by_position: bool, by_origin: bool) -> _Asked:
    found = []
    for call in calls:
        row, column = call.origin
        options = {
            "causal": False,
            "causal_align": "top_left",
            "window_size": tuple(-1 if side is None else side for side in call.window),
            "shift": row - column if by_position else call.shift,
        }
        if by_origin:
            options["origin"] = row, column, 0
        found.append(_Part(call.q, call.k, tuple(options.items()), call.is_own))
    return tuple(found)


@lru_cache(4096)
def _text_of(text: str, part: _Part, *, float32: bool) -> str:
    """The text of the options of a part: float32 says that its result is to be."""
    options = decode(text, names_of(text))._replace(**dict(part.options))
    if not part.is_own:
        options = options._replace(sinks=None)
    return encode(options._replace(out_dtype="float32" if float32 else None), None).text


@lru_cache(_MOST_PROBLEMS)
def _differentiable(problem: _Problem):
    """(out, lse) of a problem's arrays, with its gradients."""

    @jax.custom_vjp
    def attend(*arrays):
        out, lse = _forward(problem, batched, arrays)
        return out.astype(arrays[0].dtype), lse

    def forward(*primals):
        arrays = tuple(each.value for each in primals)
        given = zip(problem.names, arrays, primals, strict=True)
        # Keys of a dictionary: residuals are arrays, but their structure is not.
        wrt = {
            name: None
            for name, array, each in given
            if each.perturbed and jnp.issubdtype(array.dtype, jnp.floating)
        }
        out, lse = _forward(problem, only_once, arrays)
        out, lse = out.astype(arrays[0].dtype), checkpoint_name(lse, "numflash_lse")
        out = checkpoint_name(out, "numflash_out")
        return (out, lse), (arrays, (out, lse), wrt)

    def backward(saved, cotangents):
        arrays, (out, lse), wrt = saved
        dout, dlse = cotangents
        if isinstance(dout, SymbolicZero):
            dout = jnp.zeros_like(out, arrays[0].dtype)
        delta = jnp.swapaxes((dout.astype("float32") * out.astype("float32")).sum(-1), 1, 2)
        if not isinstance(dlse, SymbolicZero):
            delta = delta - dlse
        found = _backward(problem, tuple(wrt), arrays, (dout, lse, delta))
        given = dict(zip(problem.names, arrays, strict=True))
        found = {name: x.astype(given[name].dtype) for name, x in found.items()}
        return tuple(found.get(name) for name in problem.names)

    attend.defvjp(forward, backward, symbolic_zeros=True)
    return attend


@lru_cache(_MOST_PROBLEMS)
def _compiled(problem: _Problem):
    # Outside of `jit`, too: there `shard_map` has no rule for such functions.
    return jax.jit(_differentiable(problem))


def _forward(problem: _Problem, launcher, arrays: tuple) -> tuple:
    """out, float32, and lse."""
    q, *kv = arrays[:3]
    float32 = q.dtype != jnp.float32
    of_options = dict(zip(problem.names[3:], arrays[3:], strict=True))

    def attended(parts: _Asked, state, k, v):
        for part in parts:
            text = _text_of(problem.text, part, float32=float32)
            names = names_of(text)
            call = Call(text, (*_OPERANDS, *names))
            operands = q[:, slice(*part.q)], k[:, slice(*part.k)], v[:, slice(*part.k)]
            found = launcher(call)(*operands, *(of_options[name] for name in names))
            state = _merged(state, found, part.q, q.shape[1])
        return state

    state = None
    for step, parts in problem.steps():
        following = _hop(problem.axis_name, [each.fetch for each in step], kv)
        state = _by_rank(problem.axis_name, attended, parts, state, *kv)
        kv = following
    return state


def _backward(problem: _Problem, wrt: tuple[str, ...], arrays: tuple, given: tuple) -> dict:
    """Gradients by name, float32, of dout, lse and delta."""
    q, *kv = arrays[:3]
    dout, lse, delta = given
    grad_dtype = "float32" if q.dtype != jnp.float32 else None
    of_options = dict(zip(problem.names[3:], arrays[3:], strict=True))

    def attended(parts: _Asked, sums: dict, k, v):
        for part in parts:
            text = _text_of(problem.text, part, float32=False)
            names = names_of(text)
            wanted = tuple(name for name in wrt if name in (*_OPERANDS, *names))
            if not wanted:
                continue
            rows, keys = slice(*part.q), slice(*part.k)
            call = Call(text, (*_OPERANDS, "dout", "lse", "delta", *names), wanted, grad_dtype)
            found = only_once(call)(
                q[:, rows],
                k[:, keys],
                v[:, keys],
                dout[:, rows],
                lse[:, :, rows],
                delta[:, :, rows],
                *(of_options[name] for name in names),
            )
            for name, x in zip(wanted, found, strict=True):
                at = {"q": part.q, "k": part.k, "v": part.k}.get(name)
                sums = {**sums, name: _added(sums.get(name), x, at, q.shape[1])}
        return sums

    travels, home = tuple(name for name in wrt if name in ("k", "v")), {}
    sums: dict[str, Any] = {}
    for number, (step, parts) in enumerate(problem.steps()):
        following = _hop(problem.axis_name, [each.fetch for each in step], kv)
        sums = _by_rank(problem.axis_name, attended, parts, sums, *kv)
        kv = following
        travelling = [sums[name] for name in travels]
        if not number:
            stays = jnp.asarray([not each.give.sends for each in step])
            stays = stays[jax.lax.axis_index(problem.axis_name)]
            home = [jnp.where(stays, x, 0) for x in travelling]
        ends, onwards = _parted([each.give for each in step])
        if any(each.sends for each in ends):
            arrived = _hop(problem.axis_name, ends, travelling)
            home = [x + y for x, y in zip(home, arrived, strict=True)]
        if any(each.sends for each in onwards):
            travelling = _hop(problem.axis_name, onwards, travelling)
            sums = {**sums, **dict(zip(travels, travelling, strict=True))}
    return {**sums, **dict(zip(travels, home, strict=True))}


def _parted(given: list[steps.Exchange]) -> tuple[list[steps.Exchange], list[steps.Exchange]]:
    """What goes to its owner, and what goes on."""
    ends, onwards = [], []
    for each in given:
        home = tuple(message for message in each.sends if message.peer == message.owner)
        others = tuple(message for message in each.sends if message.peer != message.owner)
        ends.append(steps.Exchange(home))
        onwards.append(steps.Exchange(others))
    return ends, onwards


def _hop(axis_name: Hashable, exchanges: list[steps.Exchange], arrays):
    """The arrays that arrive; a rank that nobody sends to has zeros, or its own."""
    pairs = [(rank, message.peer) for rank, each in enumerate(exchanges) for message in each.sends]
    return jax.lax.ppermute(arrays, axis_name, pairs) if pairs else arrays


def _by_rank(axis_name: Hashable, work, parts: tuple[_Asked, ...], *operands):
    """`work` of this rank's parts and the operands."""
    kinds = list(dict.fromkeys(parts))
    branches = [partial(work, each) for each in kinds]
    if len(kinds) == 1:
        return branches[0](*operands)
    numbers = jnp.asarray([kinds.index(each) for each in parts])
    return jax.lax.switch(numbers[jax.lax.axis_index(axis_name)], branches, *operands)


def _merged(state, part, rows: tuple[int, int], tokens: int) -> tuple:
    """out and lse with those of a part, of these rows; both are float32."""
    (out, lse), where = part, slice(*rows)
    if state is None:
        if rows == (0, tokens):
            return part
        before, of_keys = rows[0], tokens - rows[1]
        pad = [(0, 0), (before, of_keys), (0, 0), (0, 0)]
        pad_lse = [(0, 0), (0, 0), (before, of_keys)]
        return jnp.pad(out, pad), jnp.pad(lse, pad_lse, constant_values=-jnp.inf)
    all_out, all_lse = state
    old_out, old_lse = all_out[:, where], all_lse[:, :, where]
    total = jnp.logaddexp(old_lse, lse)
    # Where both are -inf their difference would be NaN.
    of_exponent = jnp.where(jnp.isneginf(total), 0, total)
    old_weight, weight = (
        jnp.swapaxes(jnp.exp(x - of_exponent), 1, 2)[..., None] for x in (old_lse, lse)
    )
    merged = old_out * old_weight + out * weight
    if rows == (0, tokens):
        return merged, total
    return all_out.at[:, where].set(merged), all_lse.at[:, :, where].set(total)


def _added(total, x, rows: tuple[int, int] | None, tokens: int):
    """A sum with one more term, of these rows; None are all."""
    if rows is None or rows == (0, tokens):
        return x if total is None else total + x
    if total is None:
        return jnp.pad(x, [(0, 0), (rows[0], tokens - rows[1]), (0, 0), (0, 0)])
    return total.at[:, slice(*rows)].add(x)


def _layout(order: str, tokens: int, size: int) -> Layout:
    """Raises ValueError."""
    if order == "contiguous":
        return Layout.contiguous(tokens * size, size)
    if tokens % 2:
        raise ValueError(
            f"in zigzag order each device holds two pieces of the sequence, and an even number of "
            f"tokens; q has {tokens}: pad the sequence to a multiple of {2 * size}"
        )
    return Layout.zigzag(tokens * size, size)


def _expect_pieces_of_dropout(layout: Layout, band: Band) -> None:
    """Raises ValueError."""
    if layout.ranks > 1 and (band.right or 0) % ALIGNMENT:
        raise ValueError(
            f"dropout_p needs a window_size whose right side is a multiple of {ALIGNMENT} tokens, "
            f"to which its random bits belong, or -1, got {band.right}"
        )
    length = min(piece.length for held in layout.segments for piece in held)
    if layout.ranks > 1 and length % ALIGNMENT:
        raise ValueError(
            f"dropout_p needs pieces of a multiple of {ALIGNMENT} tokens on each device, to which "
            f"its random bits belong, got pieces of {length}: pad the sequence"
        )


def _size_of(axis_name: Hashable) -> int:
    """The number of devices along an axis, or several. Raises ValueError."""
    try:
        # A number: the axis is known when the call is traced.
        return int(jax.lax.psum(1, axis_name))
    except NameError as error:
        raise ValueError(
            f"axis_name must be an axis of a jax.shard_map around the call, got {axis_name!r}"
        ) from error


def _expect_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    """Raises ValueError; what remains, each call checks."""
    for name, shape in zip(_OPERANDS, (q, k, v), strict=True):
        if len(shape) != 4:
            raise ValueError(f"{name} must be (batch, tokens, heads, head_dim), got shape {shape}")
        if shape[1] != q[1]:
            raise ValueError(
                f"{name} must have the tokens of q, {q[1]} on each device, got shape {shape}"
            )
