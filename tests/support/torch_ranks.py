"""Processes over gloo that compute attention together: `python -m ... RANK RANKS FOLDER`.

Each process goes through all cases, and writes what it saw of each: how far its results and
gradients are from float64, or what a case says itself.
"""

import json
import os
import sys
import threading
import time
from datetime import timedelta
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional

import numflash
import numflash.torch as nt
from numflash import reference
from numflash.distributed import Layout, decode, of_torch
from numflash.frontends.torch import context_parallel
from tests.support.small_kernels import prefer_small_kernels

DIM = 16


def normal(*shape, seed=0) -> torch.Tensor:
    """Random numbers, the same on all ranks."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype("float32"))


def operands(tokens: int, heads: int = 2, heads_kv: int = 1) -> dict:
    """q, k, v, dout and dlse of a whole sequence."""
    shapes = {"q": heads, "k": heads_kv, "v": heads_kv, "dout": heads}
    made = {
        name: normal(1, tokens, each, DIM, seed=seed)
        for seed, (name, each) in enumerate(shapes.items())
    }
    return made | {"dlse": normal(1, heads, tokens, seed=9)}


def in_float64(whole: dict, lengths, wrt=("q", "k", "v"), **options) -> dict:
    """out, lse and gradients of documents that follow each other, by the specification."""
    of_documents = []
    for begin, end in pairwise(accumulate(lengths, initial=0)):
        cut = {name: x[:, begin:end].double().numpy() for name, x in whole.items()}
        cut["dlse"] = whole["dlse"][..., begin:end].double().numpy()
        q, k, v = (cut[name] for name in "qkv")
        out, lse = reference.attention(q, k, v, **options)
        gradients = reference.attention_backward(
            cut["dout"], q, k, v, dlse=cut["dlse"], wrt=wrt, **options
        )
        of_documents.append({"out": out, "lse": lse, **dict(zip(wrt, gradients, strict=True))})
    found = {}
    for name, first in of_documents[0].items():
        axis = 2 if name == "lse" else 1
        parts = [each[name] for each in of_documents]
        found[name] = first if first.ndim == 1 else np.concatenate(parts, axis)
    return found


def error(found: torch.Tensor, expected) -> float:
    """The root mean square of the error, relative to that of what is expected."""
    expected = torch.as_tensor(expected)
    difference = (found.detach().double() - expected).square().mean()
    return float((difference / expected.square().mean()).sqrt())


def attended(comm, layout: Layout, rank: int, *, lengths=None, heads=2, heads_kv=1, **options):
    """Errors of this rank's out, lse and gradients; `of_heads` are tensors with gradients."""
    of_heads = {name: options[name] for name in ("sinks", "alibi_slopes") if name in options}
    whole = operands(layout.seqlen, heads, heads_kv)
    own = {name: layout.shard(x, rank).clone() for name, x in whole.items() if name != "dlse"}
    learned = {name: own[name].requires_grad_() for name in "qkv"}
    learned |= {name: options[name].requires_grad_() for name in of_heads}
    out, lse = nt.distributed_attention(
        *(own[name] for name in "qkv"), layout=layout, comm=comm, return_lse=True, **options
    )
    dlse = layout.shard(whole["dlse"], rank, axis=2)
    ((out * own["dout"]).sum() + (lse * dlse).sum()).backward()
    ours = ("method", "travels", "max_workspace")
    asked = {name: x for name, x in options.items() if name not in ours}
    asked |= {name: x.detach().numpy() for name, x in of_heads.items()}
    exact = in_float64(whole, lengths or [layout.seqlen], tuple(learned), **asked)
    for name, x in learned.items():
        if name in of_heads:
            dist.all_reduce(x.grad)
    found = {"out": out, "lse": lse} | {name: x.grad for name, x in learned.items()}
    return {
        name: error(x, exact[name] if name in of_heads else _own(layout, rank, name, exact[name]))
        for name, x in found.items()
    }


def _own(layout: Layout, rank: int, name: str, x):
    return layout.shard(torch.from_numpy(x), rank, axis=2 if name == "lse" else 1)


def drawn_dropout(comm, layout: Layout, rank: int) -> dict:
    """With no seed given every rank has the first one's, whatever its own generator says."""
    torch.manual_seed(rank)
    whole = operands(layout.seqlen, 1)
    own = [layout.shard(whole[name], rank) for name in "qkv"]
    out = nt.distributed_attention(*own, layout=layout, comm=comm, dropout_p=0.5)
    torch.manual_seed(0)
    exact = nt.attention(*(whole[name] for name in "qkv"), dropout_p=0.5)
    return {"out": error(out, layout.shard(exact, rank).double())}


def disagreement(comm, layout: Layout, rank: int) -> str:
    """What a rank is told where another asks for something else, before a seed is drawn."""
    own = [layout.shard(x, rank) for x in list(operands(layout.seqlen).values())[:3]]
    options = {"dropout_p": 0.25} if rank else {"causal": True}
    try:
        nt.distributed_attention(*own, layout=layout, comm=comm, **options)
    except ValueError as refusal:
        return str(refusal)
    return ""


def decoded(comm, layout: Layout, rank: int) -> dict:
    """A query over a cache of which each rank has some tokens."""
    whole = operands(layout.seqlen)
    q = whole["q"][:, :1]
    out, lse = decode(
        q, *(layout.shard(whole[name], rank) for name in "kv"), comm=comm, return_lse=True
    )
    arrays = (x.double().numpy() for x in (q, whole["k"], whole["v"]))
    exact, exact_lse = reference.attention(*arrays)
    return {"out": error(out, exact), "lse": error(lse, exact_lse)}


class Model(torch.nn.Module):
    """A layer of attention and one of numbers, over tokens at positions."""

    def __init__(self, attend):
        super().__init__()
        torch.manual_seed(0)
        self.attend, width = attend, 2 * DIM
        self.embed = torch.nn.Embedding(11, width)
        self.places = torch.nn.Embedding(64, width)
        self.to_heads, self.back = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, 11)

    def forward(self, tokens, positions):
        x = self.embed(tokens) + self.places(positions)
        heads = self.to_heads(x).unflatten(-1, (3, 2, DIM)).unbind(-3)
        return self.back(x + self.attend(*heads).flatten(-2))


def trained(comm, layout: Layout, rank: int) -> dict:
    """A step's loss and gradients, added over ranks, against those of one process."""
    tokens = torch.arange(layout.seqlen)[None] * 7 % 11

    def step(attend, own, positions):
        model = Model(attend)
        scores = model(own(tokens), positions)
        targets = own(tokens.roll(-1, 1))
        loss = functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="sum")
        loss.backward()
        return loss.detach(), dict(model.named_parameters())

    def alone(*heads):
        q, k, v = (x.transpose(1, 2) for x in heads)
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def together(q, k, v):
        return nt.distributed_attention(q, k, v, layout=layout, comm=comm, causal=True)

    expected, exact = step(alone, lambda x: x, torch.arange(layout.seqlen))
    positions = torch.from_numpy(layout.positions(rank))
    loss, found = step(together, lambda x: layout.shard(x, rank), positions)
    dist.all_reduce(loss)
    for each in found.values():
        dist.all_reduce(each.grad)
    errors = {name: error(x.grad, exact[name].grad.double()) for name, x in found.items()}
    return errors | {"loss": error(loss, expected.double())}


def in_context(mesh, seqlen: int, call=None, order="zigzag", learns=True, **more) -> dict:
    """Errors of scaled_dot_product_attention and its gradients within `context_parallel`."""
    whole = operands(seqlen)
    exact = in_float64(whole | {"dlse": whole["dlse"] * 0}, [seqlen], causal=True)
    call = call or nt.scaled_dot_product_attention
    with nt.context_parallel(mesh, order=order, **more) as context:
        # A mesh's own order, flattened.
        assert (context.rank, context.size) == (dist.get_rank(), dist.get_world_size())
        layout = context.layout(seqlen)
        q, k, v, dout = (
            layout.shard(whole[name], context.rank).transpose(1, 2).clone().requires_grad_()
            for name in ("q", "k", "v", "dout")
        )
        out = call(q, k, v, is_causal=True, enable_gqa=True)
        found = {"out": out}
        if learns:
            (out * dout).sum().backward()
            found |= {"q": q.grad, "k": k.grad, "v": v.grad}
    return {
        name: error(x.transpose(1, 2), _own(layout, context.rank, name, exact[name]))
        for name, x in found.items()
    }


def in_place_of_torchs(mesh) -> dict:
    """Torch's own function, where numflash is in its place."""

    def error_of_out() -> float:
        call = functional.scaled_dot_product_attention
        return in_context(mesh, 32, call, learns=False)["out"]

    with nt.replacing_sdpa():
        found = {"in a block": error_of_out()}
    nt.enable()
    try:
        return found | {"in the process": error_of_out()}
    finally:
        nt.disable()


def refusals(mesh) -> dict:
    """What calls within a context raise, and whether something of it is left afterwards."""
    q = normal(1, 2, 8, DIM)
    calls = {
        "mask": (q, q, q, torch.ones(8, 8) > 0),
        "bias": (q, q, q, torch.zeros(8, 8)),
        "other lengths": (q, q[:, :, :4], q[:, :, :4]),
        "odd": (q[:, :, :5],) * 3,
        "torch's own": (q.double(),) * 3,
        "torch's error": (q, q[..., :4], q),
    }
    found = {}
    for name, call in calls.items():
        try:
            with nt.context_parallel(mesh):
                nt.scaled_dot_product_attention(*call)
        except (numflash.UnsupportedError, RuntimeError) as refusal:
            found[name] = f"{type(refusal).__name__}: {refusal}"
    found["left behind"] = context_parallel.opened, str(context_parallel._innermost())
    return found


def scopes(mesh) -> dict:
    """Whose attention runs: outside, on another thread, in a context inside of another."""
    q = normal(1, 2, 8, DIM, seed=dist.get_rank())
    attend = lambda: nt.scaled_dot_product_attention(q, q, q)  # noqa: E731
    alone, found = attend(), {}

    def is_alone() -> bool:
        return torch.equal(attend(), alone)

    context = nt.context_parallel(mesh)
    with context:
        found["inside"] = is_alone()
        thread = threading.Thread(target=lambda: found.update({"another thread": is_alone()}))
        thread.start()
        thread.join()
        with nt.context_parallel(mesh, order="contiguous"), context:
            pass
        found["inside again"] = is_alone()
    found["outside"] = is_alone()
    return found


def torchs_ring(size: int, rank: int) -> dict | str:
    """Torch's own ring with numflash as its attention; whether its order is not a layout's."""
    try:
        from torch.distributed.tensor.experimental._context_parallel import _attention as torchs
        from torch.distributed.tensor.experimental._context_parallel._load_balancer import (
            _HeadTailLoadBalancer,
        )

        balance, ring = torchs._cp_options, torchs._templated_ring_attention
        ring_backward, balancer = torchs._templated_ring_attention_backward, _HeadTailLoadBalancer
    except (ImportError, AttributeError) as gone:
        return f"gone: {gone}"

    def op(q, k, v, is_causal=False, **_):
        q, k, v = (x.contiguous() for x in (q, k, v))
        more = {"causal": bool(is_causal), "layout": "bhsd", "return_lse": True}
        return numflash.attention(q, k, v, **more)

    def op_backward(grad_out, query, key, value, out, logsumexp, is_causal=False, **_):
        given = (x.contiguous() for x in (grad_out, query, key, value, out, logsumexp))
        return numflash.attention_backward(*given, causal=bool(is_causal), layout="bhsd")

    layout = Layout.zigzag(32, size)
    order = balancer(32, size, "cpu")._generate_indices().flatten().tolist()
    ours = np.concatenate([layout.indices(each) for each in range(size)]).tolist()
    whole = operands(32, 2, 2)
    exact = in_float64(whole | {"dlse": whole["dlse"] * 0}, [32], causal=True)
    q, k, v, dout = (
        layout.shard(whole[n], rank).transpose(1, 2).contiguous() for n in ("q", "k", "v", "dout")
    )
    before, balance.enable_load_balance = balance.enable_load_balance, True
    try:
        with torch.no_grad():
            group = dist.group.WORLD
            out, lse = ring(group, 2, op, q, k, v, is_causal=True)
            found = ring_backward(
                group, 2, op_backward, dout, "grad_out", q, k, v, out, lse, is_causal=True
            )
    finally:
        balance.enable_load_balance = before
    named = dict(zip(("out", "q", "k", "v"), (out, *found), strict=True))
    errors = {
        name: error(x.transpose(1, 2), _own(layout, rank, name, exact[name]))
        for name, x in named.items()
    }
    return errors | {"order": float(order != ours)}


def cases_of_two(rank: int) -> dict:
    """By name what computes a case."""
    comm, mesh = of_torch(), init_device_mesh("cpu", (2,))
    causal = {"causal": True}
    zigzag, in_order = Layout.zigzag(32, 2), Layout.contiguous(32, 2)
    lengths = [13, 11]
    documents = Layout.zigzag_documents(lengths, 2)

    def run(layout=zigzag, **options):
        return lambda: attended(comm, layout, rank, **options)

    of_heads = lambda: {"sinks": normal(2, seed=5), "alibi_slopes": normal(2, seed=6).abs()}  # noqa: E731
    return {
        "gather": run(method="gather", **causal),
        "ring, keys": run(method="ring", travels="keys", **causal),
        "ring, queries": run(method="ring", travels="queries", **causal),
        "heads": run(method="heads", heads_kv=2, **causal),
        "window": run(in_order, method="ring", window_size=(5, 2)),
        "documents": run(documents, method="ring", lengths=lengths, **causal),
        "arrays of heads": run(method="gather", **of_heads(), **causal),
        "dropout": run(in_order, heads=1, method="gather", dropout_p=0.3, seed=7, **causal),
        "drawn dropout": lambda: drawn_dropout(comm, in_order, rank),
        "disagreement": lambda: disagreement(comm, zigzag, rank),
        "decode": lambda: decoded(comm, Layout.contiguous(24, 2), rank),
        "training": lambda: trained(comm, zigzag, rank),
        "context": lambda: in_context(mesh, 32),
        "context in order": lambda: in_context(mesh, 30, order="contiguous", method="ring"),
        "in place of torch's": lambda: in_place_of_torchs(mesh),
        "refusals": lambda: refusals(mesh),
        "scopes": lambda: scopes(mesh),
        "torch's ring": lambda: torchs_ring(2, rank),
    }


def cases_of_four(rank: int) -> dict:
    """The same for four processes, two pairs of which are neighbours."""
    mesh = init_device_mesh("cpu", (2, 2))
    pair = of_torch(mesh.get_group(1)), of_torch(mesh.get_group(0))
    layout, options = Layout.zigzag(32, 4), {"heads_kv": 2, "causal": True}
    return {
        "ring": lambda: attended(of_torch(), layout, rank, method="ring", causal=True),
        "heads and gather": lambda: attended(
            pair, layout, rank, method=("heads", "gather"), **options
        ),
        "context, heads and ring": lambda: in_context(mesh, 32),
    }


def main(rank: int, ranks: int, folder: Path) -> None:
    """Go through the cases; write what this rank saw, and the seconds that each took."""
    torch.set_num_threads(1)
    prefer_small_kernels(pytest.MonkeyPatch())
    store = dist.FileStore(str(folder / "store"), ranks)
    limit = timedelta(seconds=300)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=limit)
    seen: dict = {"seconds": {"start": time.process_time()}}
    for name, case in {2: cases_of_two, 4: cases_of_four}[ranks](rank).items():
        began = time.process_time()
        seen[name] = case()
        seen["seconds"][name] = round(time.process_time() - began, 2)
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    os._exit(0)  # without waiting for threads of groups


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
