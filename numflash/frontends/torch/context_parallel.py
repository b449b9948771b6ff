"""`scaled_dot_product_attention` over a DeviceMesh whose ranks share the tokens of a sequence.

`sdpa.attended` asks here whether its thread is within such a context. What a thread of autograd
recomputes (activation checkpoints) belongs to the context around the call of `backward`.
"""

import threading
import weakref
from contextvars import ContextVar
from functools import lru_cache
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from numflash.distributed import Layout, of_torch
from numflash.distributed.communicators import Communicator
from numflash.frontends.torch.distributed import distributed_attention
from numflash.frontends.torch.untraced import untraced
from numflash.problem.options import expect_one_of, kind_of
from numflash.runtime.errors import UnsupportedError

ORDERS = {"zigzag": Layout.zigzag, "contiguous": Layout.contiguous}
opened = 0
"""How many contexts are open in this process: 0 is the usual case, in which nothing is asked."""
_counting = threading.Lock()


def context_parallel(
    mesh,
    *,
    order: str = "zigzag",
    method: str | tuple[str, str] = "auto",
    wire=None,
    max_workspace: int | None = None,
) -> "ContextParallel":
    """A context, for `with`: in it attention is that of a sequence spread over a DeviceMesh.

    `numflash.torch.scaled_dot_product_attention`, and where `enable` or `replacing_sdpa` is on
    torch's, then take query, key and value as this rank's share of the tokens, and return its
    share of the result. Every rank holds as many tokens, and makes the same calls. It is a context
    of the thread; of several that are open the innermost holds.

    Args:
        mesh: a `DeviceMesh` of one dimension, or of two: then heads are changed for tokens along
            the second ("heads"), and keys and values travel along the first. Its ranks hold the
            tokens in the order of its flattened ranks.
        order: "zigzag", as torch's head-tail balancing lays tokens out: the sequence in two pieces
            for each rank, of which rank r of n holds pieces r and 2 * n - 1 - r. "contiguous":
            rank r holds piece r of n.
        method, wire, max_workspace: as of `numflash.distributed.attention`; the method of two
            dimensions is ("heads", "gather") or ("heads", "ring").

    A backward that computes results again (activation checkpointing) must run inside, too. Not for
    code that `torch.compile` has made into one graph: attention is a break between two.

    Returns:
        the context, which may be entered again; with `layout(seqlen)` and `rank`, so that
        `context.layout(seqlen).shard(x, context.rank, axis=2)` is a rank's share of a whole x.

    Raises:
        TypeError: mesh is no DeviceMesh.
        ValueError: a mesh of three dimensions or more, an unknown order or method.
        UnsupportedError, of a call within: attn_mask; lengths of query and key that differ; an odd
            number of tokens in zigzag order; and where torch's own would run, which would attend
            within the rank's share alone.
        CommunicatorError, of a call within: as of `numflash.distributed.attention`.

    Example:
        >>> import torch, numflash.torch
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        >>> q = torch.randn(1, 2, 16, 8)
        >>> with numflash.torch.context_parallel(init_device_mesh("cpu", (1,))):
        ...     out = numflash.torch.scaled_dot_product_attention(q, q, q, is_causal=True)
        >>> out.shape
        torch.Size([1, 2, 16, 8])
        >>> dist.destroy_process_group()
    """
    expect_one_of("order", order, ORDERS)
    for name in ("ndim", "get_group", "size"):
        if not hasattr(mesh, name):
            raise TypeError(f"mesh must be a DeviceMesh of torch.distributed, got {kind_of(mesh)}")
    if mesh.ndim not in (1, 2):
        raise ValueError(f"mesh must have one dimension or two, got {mesh.ndim}")
    is_pair = isinstance(method, tuple | list)
    if method != "auto" and is_pair != (mesh.ndim == 2):
        raise ValueError(
            f'method must be a pair, as ("heads", "gather"), for a mesh of two dimensions and one '
            f"name for one dimension, got {method!r} and {mesh.ndim}"
        )
    groups = [mesh.get_group(dimension) for dimension in reversed(range(mesh.ndim))]
    comms = tuple(_communicator(group) for group in groups)
    return ContextParallel(comms, order, method, wire, max_workspace)


_communicators: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _communicator(group) -> Communicator:
    """That of a group: always the same, so that it knows what its ranks have agreed on."""
    if group not in _communicators:
        _communicators[group] = of_torch(group)
    return _communicators[group]


class ContextParallel:
    """What `context_parallel` returns.

    Attributes:
        rank: this process's number among those of the mesh, flattened.
        size: how many they are.
    """

    def __init__(self, comms: tuple[Communicator, ...], order: str, method, wire, max_workspace):
        self._comms, self._order, self._method = comms, order, method
        self._more = {"wire": wire, "max_workspace": max_workspace}
        self.rank, self.size = 0, 1
        for comm in comms:
            self.rank += comm.rank * self.size
            self.size *= comm.size

    def layout(self, seqlen: int) -> Layout:
        """Who holds which tokens of a sequence. Raises ValueError: shares would differ."""
        pieces = self.size * (2 if self._order == "zigzag" else 1)
        if seqlen % pieces:
            raise ValueError(
                f"seqlen must be a multiple of {pieces} for {self.size} ranks in {self._order} "
                f"order, got {seqlen}: pad the sequence"
            )
        return _layout(self._order, seqlen, self.size)

    def __enter__(self) -> "ContextParallel":
        _enter(_Open(self, _current.get()), +1)
        return self

    def __exit__(self, *_) -> None:
        is_open = _current.get()
        _enter(None if is_open is None else is_open.outer, -1)

    def attended(self, arranged) -> Tensor:
        """The result of a call, which `sdpa.arrange` has turned into one of attention."""
        q, k, v, options, shape = arranged
        options = dict(options)
        heads_first = options.pop("layout") == "bhsd"
        if heads_first:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        tokens = q.shape[1]
        if refused := [name for name in ("mask", "bias") if name in options]:
            raise UnsupportedError(
                f"{_INSIDE} takes no attn_mask (a {refused[0]}): it cannot tell which rows and "
                "columns of the whole sequence it has. Give is_causal, or call "
                "numflash.torch.distributed_attention"
            )
        if k.shape[1] != tokens:
            raise UnsupportedError(
                f"{_INSIDE} takes query and key of the same tokens, got {tokens} and {k.shape[1]}"
            )
        if self._order == "zigzag" and tokens % 2:
            raise UnsupportedError(
                f"{_INSIDE} in zigzag order takes an even number of tokens on each rank, got "
                f'{tokens}: pad the sequence, or lay it out in order ("contiguous")'
            )
        # Of equal lengths both alignments are one.
        options.pop("causal_align", None)
        out = distributed_attention(
            q,
            k,
            v,
            layout=_layout(self._order, tokens * self.size, self.size),
            comm=self._comms if len(self._comms) == 2 else self._comms[0],
            method=self._method_for(k.shape[2]),
            **self._more,
            **options,
        ).transpose(1, 2)
        return out.reshape(shape) if heads_first else out

    def _method_for(self, heads_kv: int) -> str | tuple[str, str]:
        if len(self._comms) == 1 or self._method != "auto":
            return self._method
        inner, outer = (comm.size for comm in self._comms)
        return "heads", "gather" if max(1, heads_kv // inner) >= outer else "ring"


_INSIDE = "attention inside numflash.torch.context_parallel"


class _Open(NamedTuple):
    """A context that is open, and that around it."""

    context: ContextParallel
    outer: Optional["_Open"]


_current: ContextVar[_Open | None] = ContextVar("numflash_context_parallel", default=None)
# PyTorch gives a backward's threads what the thread that called it has kept there.
_KEY = "numflash_context_parallel"
_keep = getattr(torch._C, "_stash_obj_in_tls", None)
_in_backward = getattr(torch._C, "_current_graph_task_id", lambda: -1)


def _enter(now_open: _Open | None, step: int) -> None:
    global opened
    _current.set(now_open)
    if _keep is not None:
        _keep(_KEY, now_open)
    with _counting:
        opened += step


def _innermost() -> ContextParallel | None:
    """The context that this thread is in."""
    found = _current.get()
    if found is None and _in_backward() != -1 and _keep is not None:
        found = torch._C._get_obj_in_tls(_KEY) if torch._C._is_key_in_tls(_KEY) else None
    return None if found is None else found.context


@untraced
def attended(arranged, otherwise):
    """The result of a call where this thread is in a context, else `otherwise(arranged)`.

    Args:
        arranged: what `sdpa.arrange` made of the call: an `Arranged`, or the `Reason` why torch's
            own would run.
        otherwise: the call on one device.

    Raises:
        UnsupportedError: torch's own would run.
    """
    context = _innermost()
    if context is None:
        return otherwise(arranged)
    if hasattr(arranged, "is_error"):
        if arranged.is_error:
            return arranged
        raise UnsupportedError(
            f"{_INSIDE} must be numflash's: torch's own would see this rank's tokens alone. "
            f"{arranged.text}"
        )
    return context.attended(arranged)


@lru_cache(maxsize=256)
def _layout(order: str, seqlen: int, ranks: int) -> Layout:
    return ORDERS[order](seqlen, ranks)
