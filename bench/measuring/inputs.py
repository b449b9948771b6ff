"""The arrays of a point."""

from typing import Any

import numpy as np

from bench.measuring.device import Device
from bench.points.points import KVCACHE, Point

_PAGES_SEED = 7


def make(device: Device, point: Point) -> dict[str, Any]:
    """q, k and v of a point, dout of a backward, and of packed sequences `cu_seqlens`."""
    shapes = {"q": point.q_shape, "k": point.kv_shape, "v": point.kv_shape}
    if point.direction == "backward":
        shapes["dout"] = point.q_shape
    inputs = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        if point.is_packed:
            inputs[name] = device.normal((1, *shape), point.dtype, seed)[0]
        else:
            inputs[name] = device.normal(shape, point.dtype, seed)
    if point.is_packed:
        ends = np.concatenate([[0], np.cumsum(point.seqlens)]).astype(np.int32)
        inputs["cu_seqlens"] = device.upload(ends)
    return inputs


def into_cache(device: Device, point: Point, inputs: dict[str, Any]) -> None:
    """Put k and v of a KVCACHE point into the caches that methods read.

    They become `k_cache` and `v_cache`, with `cache_seqlens`, and with pages `page_table`; pages
    lie in any order.
    """
    if point.kind != KVCACHE:
        return
    inputs["cache_seqlens"] = device.upload(np.array(point.seqlens, np.int32))
    if not point.page_size:
        inputs |= {f"{name}_cache": inputs.pop(name) for name in "kv"}
        return
    width = point.seqlen_k // point.page_size
    places = np.random.default_rng(_PAGES_SEED).permutation(point.batch * width)
    inputs["page_table"] = device.upload(places.reshape(point.batch, width).astype(np.int32))
    order = device.upload(np.argsort(places))
    for name in "kv":
        x = inputs.pop(name)
        inputs[f"{name}_cache"] = x.reshape(-1, point.page_size, *x.shape[2:])[order]


def of_call(point: Point, inputs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """(q, k, v), and what says where sequences lie, as `numflash.explain_dispatch` takes them."""
    if point.kind == KVCACHE:
        given = {"seqlens_k": inputs["cache_seqlens"]}
        if point.page_size:
            given["page_table"] = inputs["page_table"]
        return (inputs["q"], inputs["k_cache"], inputs["v_cache"]), given
    given = {}
    if point.is_packed:
        given = {f"cu_seqlens_{side}": inputs["cu_seqlens"] for side in "qk"}
    return tuple(inputs[name] for name in "qkv"), given
