"""A call with its gradients (`custom_vjp`) and its batching rule (`custom_vmap`).

A mapped axis is folded into the batch. Where that would change the meaning (random weights and
functions go by the number of the batch entry; values of heads have no batch axis) the entries run
one after another.
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from numflash.frontends.jax.buffers import Spec
from numflash.frontends.jax.calls import TARGET, Call, planned
from numflash.functions.program import Program
from numflash.functions.written import WrittenFunction
from numflash.problem.sequences import NAMES as OF_SEQUENCES
from numflash.runtime.errors import UnsupportedError

# Arrays whose first axis is the batch, and those that broadcast to one of four axes.
_BY_BATCH = {"q", "k", "v", "dout", "out", "lse", "dlse", "delta", *OF_SEQUENCES}
_BROADCAST = {"bias", "mask"}
_MOST_CALLS = 1024


def launched(call: Call, *arrays) -> tuple:
    """The results of a call, by XLA's foreign function. Raises as `numflash.attention`."""
    specs = tuple(Spec(x.dtype.name, tuple(x.shape)) for x in arrays)
    text, results = planned(call, specs)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for dtype, shape in results]
    found = jax.ffi.ffi_call(TARGET, shapes)(*arrays, call=text)
    axes = manual_axes(arrays)
    return tuple(varying(x, axes) for x in found[: len(call.results)])


def manual_axes(arrays) -> frozenset:
    """The axes of `shard_map`'s mesh along which some of the arrays differ."""
    found = frozenset()
    for each in arrays:
        # What jax.typeof gives; it is younger than the least jax.
        kind = getattr(each, "aval", None)
        of_axes = getattr(kind, "mat", None)
        found |= getattr(of_axes, "varying", getattr(kind, "vma", frozenset()))
    return found


def varying(array, axes: frozenset):
    """An array as one that differs along these axes: `shard_map` keeps account of that."""
    missing = tuple(axes - manual_axes([array]))
    if not missing:
        return array
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(array, missing, to="varying")
    return jax.lax.pvary(array, missing)


@lru_cache(_MOST_CALLS)
def batched(call: Call):
    """`launched` of a call, with its batching rule."""

    @custom_vmap
    def launch(*arrays):
        return launched(call, *arrays)

    @launch.def_vmap
    def rule(size, mapped, *arrays):
        if not _folds(call, mapped, arrays):
            results = _one_after_another(launch, mapped, arrays)
        else:
            given = zip(call.names, mapped, arrays, strict=True)
            batch = arrays[0].shape[1 if mapped[0] else 0]
            folded = [_folded(size, batch, *each, call.wrt or ()) for each in given]
            # Each has the batch first; a mapped axis may have no entries.
            results = tuple(x.reshape(size, batch, *x.shape[1:]) for x in launch(*folded))
        return results, (True,) * len(results)

    return launch


def _folds(call: Call, mapped: list[bool], arrays: tuple) -> bool:
    """Whether the call of a folded batch means what the calls of its parts mean."""
    options = call.decoded
    if options.dropout_p or options.precision == "auto" or options.layout == "thd":
        return False
    if options.block_mask is not None or "b" in _places(options.score_mod, options.mask_mod):
        return False
    batch = arrays[0].shape[1 if mapped[0] else 0]
    for name, is_mapped, array in zip(call.names, mapped, arrays, strict=True):
        rank, is_wanted = array.ndim - is_mapped, name in (call.wrt or ())
        if name in _BROADCAST:
            # A gradient of each entry must not be summed over the batch that it is folded into.
            if is_wanted and array.shape[is_mapped] != batch:
                return False
        elif not _is_by_batch(name, rank) and (is_mapped or is_wanted):
            return False
    return True


def _is_by_batch(name: str, rank: int) -> bool:
    return name in _BY_BATCH or (name == "alibi_slopes" and rank == 2)


def _places(*functions: WrittenFunction | None) -> frozenset[str]:
    """What functions go by: "b", "h", "i", "j"."""
    texts = {each.text for each in functions if each is not None}
    return frozenset().union(*(Program.parse(text).uses for text in texts))


def _folded(size: int, batch: int, name: str, is_mapped: bool, array, wrt: tuple[str, ...]):
    """An array of the folded batch."""
    if name in _BROADCAST:
        if not is_mapped and array.shape[0] == 1 and name not in wrt:
            return array
        if is_mapped and array.shape[1] == 1:
            array = jnp.broadcast_to(array, (size, batch, *array.shape[2:]))
    elif not _is_by_batch(name, array.ndim - is_mapped):
        return array
    if not is_mapped:
        array = jnp.broadcast_to(array, (size, *array.shape))
    return array.reshape(size * array.shape[1], *array.shape[2:])


def _one_after_another(launch, mapped: list[bool], arrays: tuple) -> tuple:
    def one(some):
        some = iter(some)
        given = zip(mapped, arrays, strict=True)
        return launch(*(next(some) if is_mapped else x for is_mapped, x in given))

    return jax.lax.map(one, [x for is_mapped, x in zip(mapped, arrays, strict=True) if is_mapped])


@lru_cache(_MOST_CALLS)
def only_once(call: Call):
    """`batched` of a call as a part of a derivative, which is not differentiated again."""

    @jax.custom_jvp
    def launch(*arrays):
        return batched(call)(*arrays)

    @launch.defjvp
    def refuse(primals, tangents):
        raise UnsupportedError(
            "numflash has first derivatives only: a gradient of attention cannot be "
            "differentiated again. For second derivatives take "
            'numflash.jax.dot_product_attention(..., implementation="xla")'
        )

    return launch


@lru_cache(_MOST_CALLS)
def differentiable(call: Call):
    """A forward as `batched`, (out, lse), with its gradients."""

    @jax.custom_vjp
    def attend(*arrays):
        return batched(call)(*arrays)

    def forward(*primals):
        arrays = tuple(each.value for each in primals)
        given = zip(call.names, arrays, primals, strict=True)
        # Keys of a dictionary: residuals are arrays, but their structure is not.
        wrt = {
            name: None
            for name, array, each in given
            if each.perturbed and jnp.issubdtype(array.dtype, jnp.floating)
        }
        out, lse = only_once(call)(*arrays)
        out, lse = checkpoint_name(out, "numflash_out"), checkpoint_name(lse, "numflash_lse")
        return (out, lse), (arrays, (out, lse), wrt)

    def backward(saved, cotangents):
        arrays, (out, lse), wrt = saved
        dout, dlse = cotangents
        if isinstance(dout, SymbolicZero):
            dout = jnp.zeros(dout.shape, arrays[0].dtype)
        names = [*call.names[:3], "dout", "lse", "out"]
        given = [*arrays[:3], dout.astype(arrays[0].dtype), lse, out]
        if not isinstance(dlse, SymbolicZero):
            names, given = [*names, "dlse"], [*given, dlse]
        wanted = tuple(name for name in call.names if name in wrt)
        asked = Call(call.options, (*names, *call.names[3:]), wanted)
        found = dict(zip(wanted, only_once(asked)(*given, *arrays[3:]), strict=True))
        return tuple(found.get(name) for name in call.names)

    attend.defvjp(forward, backward, symbolic_zeros=True)
    return attend


@lru_cache(_MOST_CALLS)
def _compiled(call: Call):
    return jax.jit(differentiable(call))


def attended(call: Call, *arrays) -> tuple:
    """(out, lse) of a forward. Outside of `jit` it is compiled by itself, which runs faster."""
    axes = manual_axes(arrays)
    return _compiled(call)(*(varying(x, axes) for x in arrays))
