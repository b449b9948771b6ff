"""Sequences one after another, and caches, as methods to measure.

Results have the shape of q. FlashInfer's `plan`, which copies lengths to the host, is no part of
its time: it is done once for all layers of a step. numflash makes its list of tiles in each call.
"""

import importlib
from collections.abc import Callable
from typing import Any

from bench.points.interleave import Method
from bench.points.points import KVCACHE, VARLEN, Point

KINDS = (KVCACHE, VARLEN)
_WORKSPACE_BYTES = 2**27


def numflash(config: Any = None) -> Callable:
    """Preparation of numflash, with a config other than its own choice."""

    def prepare(point: Point, inputs: dict) -> Method:
        import numflash as library

        options = {"causal": point.causal, **({} if config is None else {"config": config})}
        if point.kind == KVCACHE:
            arrays = _caches(inputs)
            options |= {"cache_seqlens": inputs["cache_seqlens"]}
            options |= {n: inputs[n] for n in ("page_table",) if n in inputs}
            return Method(
                "numflash", lambda: {"out": library.attention_with_kvcache(*arrays, **options)}
            )
        ends, qkv = (inputs["cu_seqlens"],) * 2, [inputs[name] for name in "qkv"]
        if point.direction == "forward":
            return Method(
                "numflash", lambda: {"out": library.attention_varlen(*qkv, *ends, **options)}
            )
        arrays = inputs["dout"], *qkv, inputs["out"], inputs["lse"], *ends

        def gradients() -> dict:
            found = library.attention_varlen_backward(*arrays, **options)
            return dict(zip(("dq", "dk", "dv"), found, strict=True))

        return Method("numflash", gradients)

    return prepare


def flash_attention(module: str, name_of_table: str) -> Callable:
    """A function (point, inputs) -> attend of a version of FlashAttention, on tensors.

    Args:
        module: that has its functions.
        name_of_table: what it calls the table of pages.
    """

    def attend_of(point: Point, inputs: dict) -> Callable:
        interface, causal = importlib.import_module(module), point.causal
        if point.kind == KVCACHE:
            options = {"cache_seqlens": inputs["cache_seqlens"], "causal": causal}
            if "page_table" in inputs:
                options[name_of_table] = inputs["page_table"]

            def attend(q, k_cache, v_cache):
                return interface.flash_attn_with_kvcache(q, k_cache, v_cache, **options)

            return attend
        ends, longest = inputs["cu_seqlens"], max(point.seqlens)
        options = {f"cu_seqlens_{side}": ends for side in "qk"}
        options |= {f"max_seqlen_{side}": longest for side in "qk"} | {"causal": causal}

        def attend(q, k, v):
            return interface.flash_attn_varlen_func(q, k, v, **options)

        return attend

    return attend_of


def flashinfer(point: Point, inputs: dict) -> Method:
    """FlashInfer's wrappers of batches: of decoding for one query, else of prefill."""
    if point.kind != KVCACHE or not point.page_size:
        raise NotImplementedError("measured on caches in pages only")
    import flashinfer as library
    import torch

    q, k_cache, v_cache = _caches(inputs)
    device, table = q.device, inputs["page_table"]
    batch, width = table.shape

    def steps(step: int):
        return torch.arange(batch + 1, dtype=torch.int32, device=device) * step

    last = torch.full((batch,), point.page_size, dtype=torch.int32, device=device)
    pages = steps(width), table.reshape(-1), last
    heads = point.num_heads_q, point.num_heads_kv, point.head_dim, point.page_size
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    cache, rows = (k_cache, v_cache), q.reshape(-1, *q.shape[2:])
    if point.seqlen_q == 1:
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True
        )
        wrapper.plan(*pages, *heads, q_data_type=q.dtype, kv_data_type=q.dtype)
    else:
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(
            steps(point.seqlen_q), *pages, *heads, causal=point.causal, q_data_type=q.dtype
        )
    return Method("FlashInfer", lambda: {"out": wrapper.run(rows, cache).reshape(q.shape)})


def _caches(inputs: dict) -> tuple:
    return inputs["q"], inputs["k_cache"], inputs["v_cache"]
