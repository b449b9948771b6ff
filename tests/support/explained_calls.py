"""Calls to explain, on GPUs that are not here; nothing is read or compiled."""

import ml_dtypes
import numpy as np

from numflash.api.explain import Question, explain
from tuner.explain.asked import Asked, ask
from tuner.explain.unread import unread

BFLOAT16 = ml_dtypes.bfloat16
CALLS = {
    "causal": ("H200", (2, 4096, 16, 128), {"causal": True}),
    "two slots": ("A100", (1, 2048, 16, 128), {"causal": True}),
    "window": ("H200", (2, 3000, 16, 128), {"window_size": (512, 0)}),
    "grouped": ("H200", (2, 2048, 32, 128), {"causal": True, "kv_heads": 8}),
    "decode": ("A100", (4, 1, 32, 128), {"causal": True, "kv_heads": 8, "seqlen_k": 8192}),
    "fp8": ("H200", (2, 4096, 16, 128), {"causal": True, "precision": "fp8"}),
    "float32": ("H200", (1, 1000, 8, 64), {"causal": True, "dtype": np.float32}),
    "no keys": ("H200", (1, 300, 4, 64), {"causal": True, "seqlen_k": 0}),
    "one query": ("RTX 4090", (1, 1, 2, 64), {"seqlen_k": 1000}),
    "long": ("H200", (1, 65536, 8, 128), {"causal": True, "kv_heads": 2}),
    "turing": ("T4", (1, 1000, 8, 64), {"seqlen_k": 3000, "dtype": np.float16}),
}
"""Name -> (GPU, shape of q, options)."""


def asked_about(name: str, **more) -> Asked:
    """One of `CALLS`, with more options or others."""
    gpu, shape, options = CALLS[name]
    return asked(gpu, shape, **(options | more))


def asked(
    gpu: str, shape, *, kv_heads=None, seqlen_k=None, dtype=BFLOAT16, data=False, **options
) -> Asked:
    """A call whose elements nobody reads, unless `data` says that options may be."""
    batch, seqlen_q, heads, head_dim = shape
    keys = seqlen_q if seqlen_k is None else seqlen_k
    kv_shape = batch, keys, kv_heads or heads, head_dim
    arrays = {"q": shape, "k": kv_shape, "v": kv_shape}
    arrays = {name: unread(each, np.dtype(dtype).name) for name, each in arrays.items()}
    return asked_arrays(gpu, arrays, data, **options)


def asked_arrays(gpu: str, arrays: dict, data=False, **options) -> Asked:
    """A call with these arrays."""
    answer = explain(*arrays.values(), gpu=gpu, data=data, **options)
    return ask(Question(arrays, options, gpu, data, None, answer), "none")
