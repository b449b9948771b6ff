"""Sequences with lengths of their own, on a GPU at full size: results, gradients, a graph."""

import numpy as np
import pytest

import numflash
from numflash.runtime.arrays import to_numpy
from numflash.runtime.views import numpy_dtype
from tests.support.sequence_cases import cumulative

LONG_TAILED = np.random.default_rng(7).lognormal(4.5, 1.2, 40).astype(int)
LENGTHS = {
    "long-tailed": (LONG_TAILED, LONG_TAILED[::-1]),
    "decoding": (np.minimum(LONG_TAILED, 1), LONG_TAILED),
    "empty among equal": ([256, 0, 256, 0], [0, 256, 256, 0]),
}
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window, top left": {"window_size": (70, 9), "causal_align": "top_left"},
    "dropout": {"causal": True, "dropout_p": 0.2, "seed": 11},
    "score_mod": {"score_mod": lambda s, b, h, i, j: s * (1 + 0.01 * b) - 0.01 * abs(i - j)},
}


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy")


def _arrays(cupy, dtype, tokens_q, tokens_k, head_dim):
    rng, shapes = cupy.random.default_rng(0), ((tokens_q, 4), (tokens_k, 2), (tokens_k, 2))
    return [
        rng.standard_normal((*shape, head_dim), dtype="float32").astype(numpy_dtype(dtype))
        for shape in (*shapes, shapes[0])
    ]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    ("dtype", "head_dim"), [("bfloat16", 128), ("float16", 64), ("float32", 64)]
)
def test_each_sequence_is_within_budget(cupy, poisoned_pool, dtype, head_dim, lengths, option):
    ends = [cumulative(x) for x in LENGTHS[lengths]]
    q, k, v, dout = _arrays(cupy, dtype, int(ends[0][-1]), int(ends[1][-1]), head_dim)
    given = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), map(cupy.asarray, ends), strict=True))
    report = numflash.check(q, k, v, dout=dout, **given, **OPTIONS[option])
    assert report.passed, f"\n{report}"


def test_a_padded_batch_is_within_budget(cupy, poisoned_pool):
    """What no sequence has is NaN."""
    q, k, v, dout = (x.reshape(3, 300, -1, 64) for x in _arrays(cupy, "float16", 900, 900, 64))
    starts, lengths = np.array([7, 0, 299], np.int32), np.array([200, 0, 1], np.int32)
    for x in (q, k, v, dout):
        for entry, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            x[entry, :start], x[entry, start + length :] = np.nan, np.nan
    given = {f"starts_{side}": cupy.asarray(starts) for side in "qk"}
    given |= {f"seqlens_{side}": cupy.asarray(lengths) for side in "qk"}
    report = numflash.check(q, k, v, dout=dout, causal=True, **given)
    assert report.passed, f"\n{report}"


def test_a_graph_is_replayed_with_other_lengths(cupy):
    q, k, v, dout = _arrays(cupy, "float16", 700, 900, 64)
    ends = [cupy.asarray(cumulative(x)) for x in ([300, 400], [500, 400])]

    def call():
        out, lse = numflash.attention_varlen(q, k, v, *ends, causal=True, return_lse=True)
        return out, *numflash.attention_varlen_backward(
            dout, q, k, v, out, lse, *ends, causal=True
        )

    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        # Compiles, and leaves the stream's pool with all that the capture takes from it.
        call()
        stream.synchronize()
        stream.begin_capture()
        captured = call()
        graph = stream.end_capture()
        for lengths in (([0, 700], [900, 0]), ([1, 20], [300, 333]), ([699, 1], [1, 899])):
            for end, of_side in zip(ends, lengths, strict=True):
                end[...] = cupy.asarray(cumulative(of_side))
            graph.launch()
            stream.synchronize()
            for got, wanted in zip(captured, call(), strict=True):
                np.testing.assert_array_equal(to_numpy(got), to_numpy(wanted))
