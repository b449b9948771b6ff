"""Attention on 8-bit floats as methods to measure: numflash's own and FlashAttention-3's.

What is quantised before a call is no part of its time, except in `quantizing`. All have a forward
only.
"""

import importlib
from collections.abc import Callable
from typing import Any

from bench.points.interleave import Method
from bench.points.points import Point

_LARGEST = 448.0


def quantized(config: Any = None) -> Callable:
    """Preparation of numflash on q, k and v that are in 8 bits already, as in an FP8 KV cache.

    By the recipe of `precision="fp8"`, with v transposed.
    """

    def prepare(point: Point, inputs: dict) -> Method:
        import numflash as library

        _expect_forward(point)
        recipe, arrays = library.Fp8Recipe(), {}
        for name, x in _qkv(inputs).items():
            is_v = name == "v"
            share = recipe.granularity, recipe.block
            turn = recipe.hadamard and not is_v, recipe.seed
            arrays[name] = library.quantize_fp8(x, *share, *turn, transposed=is_v)
        options = {"causal": point.causal, **({} if config is None else {"config": config})}
        return Method("FP8", lambda: {"out": library.attention(*arrays.values(), **options)})

    return prepare


def quantizing(point: Point, inputs: dict) -> Method:
    """numflash on arrays of 16 bits: each call quantises them."""
    import numflash as library

    _expect_forward(point)
    arrays, options = _qkv(inputs).values(), {"causal": point.causal, "precision": "fp8"}
    return Method("FP8", lambda: {"out": library.attention(*arrays, **options)})


def flash_attention_3(module: str) -> Callable:
    """FlashAttention-3's kernels on e4m3, with a scale for each head of k and v."""

    def prepare(point: Point, inputs: dict) -> Method:
        interface = importlib.import_module(module)
        _expect_forward(point)
        arrays, options = [], {"causal": point.causal}
        for name, x in _qkv(inputs).items():
            codes, options[f"{name}_descale"] = per_head(x, point.num_heads_kv)
            arrays.append(codes)
        function = "flash_attn_with_kvcache" if point.kind == "decode" else "flash_attn_func"
        attend = getattr(interface, function)

        def call() -> dict:
            result = attend(*arrays, **options)
            return {"out": result[0] if isinstance(result, tuple) else result}

        return Method("FlashAttention-3 FP8", call)

    return prepare


def per_head(x, num_heads_kv: int):
    """(e4m3 tensor, its scales (batch, num_heads_kv)) of a tensor of PyTorch's.

    Heads of q that share one of k and v share a scale.
    """
    import torch

    if not isinstance(x, torch.Tensor):
        raise NotImplementedError("needs PyTorch to use the GPU")
    grouped = x.float().reshape(*x.shape[:2], num_heads_kv, -1)
    descale = grouped.abs().amax((1, 3)).clamp(min=1e-30) / _LARGEST
    codes = (grouped / descale[:, None, :, None]).to(torch.float8_e4m3fn)
    return codes.reshape(x.shape), descale


def _qkv(inputs: dict) -> dict:
    return {name: inputs[name] for name in "qkv"}


def _expect_forward(point: Point) -> None:
    if point.direction != "forward":
        raise NotImplementedError("there is no backward on 8-bit floats")
