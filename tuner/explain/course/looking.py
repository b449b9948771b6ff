"""How to look into a kernel in the simulator: what it never stores, and what it decides.

A kernel stores O and lse, the logarithm of each row's sum. With V the identity O is P, and then
log P + lse is S. What a thread passes to a function of `numflash.tiles` can be noted, because in
the simulator such a function is a plain one that is looked up when it is called.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import numpy as np

import numflash
from numflash.ptx import cuda

PORTABLE = "m4n8w1"
"""The smallest tiles of the portable kernel: 4 queries, 8 keys, one warp."""
TENSOR_CORES = "sm80-m16n16w1s1"
"""The smallest tiles on tensor cores: 16 queries, 16 keys, one warp."""


class Seen(NamedTuple):
    """What a forward hides: (queries, keys) scores and P, (queries,) lse, all float64."""

    scores: np.ndarray
    p: np.ndarray
    lse: np.ndarray


def rows(x, dtype=np.float32) -> np.ndarray:
    """(1, seqlen, 1, head_dim) of a matrix: one batch entry, one head."""
    return np.ascontiguousarray(np.asarray(x, dtype)[None, :, None, :])


def matrix(x) -> np.ndarray:
    """(seqlen, head_dim) float64 of an array with one batch entry and one head."""
    return np.asarray(x, np.float64)[0, :, 0]


def see(q, k, scale: float = 1.0, config: str = PORTABLE, dtype=np.float32, **options) -> Seen:
    """Run the forward on two matrices with V the identity; see the module's docstring.

    Args:
        q: (queries, head_dim).
        k: (keys, head_dim).
        scale: softmax_scale. exp(scale * score) must not underflow where S is to be seen.
        config: the kernel.
        dtype: of Q, K and V.
        options: more of `numflash.attention`.
    """
    out, lse = numflash.attention(
        rows(q, dtype),
        rows(k, dtype),
        rows(np.eye(len(k)), dtype),
        softmax_scale=scale,
        return_lse=True,
        config=config,
        **options,
    )
    p, lse = matrix(out), np.asarray(lse, np.float64).reshape(-1)
    with np.errstate(divide="ignore"):
        return Seen((np.log(p) + lse[:, None]) / scale, p, lse)


@contextmanager
def watched(module: ModuleType, name: str) -> Iterator[list]:
    """Note what thread 0 passes to a function of a module, and gets: (arguments, result)."""
    found, function = [], getattr(module, name)

    def noting(*arguments):
        result = function(*arguments)
        if cuda.threadIdx.x == 0:
            found.append((arguments, result))
        return result

    with mock.patch.object(module, name, noting):
        yield found
