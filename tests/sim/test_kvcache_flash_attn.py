"""flash-attn's own grid of `test_flash_attn_kvcache`, at small sizes, with its rule of tolerance.

An error against float64 may be three times that of the same in the arrays' precision, with ALiBi
five times, and 1e-5; caches are compared as it does.
"""

import math
import random

import numpy as np
import pytest

import numflash
from numflash.reference import attention_with_kvcache
from tests.support.covering import covering, some

AXES = {
    "heads_kv": (6, 1, 3),
    "new_kv": (False, True),
    "alibi": (False, True),
    "local": (False, True),
    "causal": (False, True),
    "seqlen_new_eq_seqlen_q": (True, False),
    "interleaved": (False, True),
    "fraction": (0.0, 0.5, 1.0),
    "page": (None, 256),
    "leftpad": (False, True),
    "batch_idx": (False, True),
    "d": (32, 59, 64, 80),
    "seqlens": ((1, 128), (1, 139), (3, 100), (16, 50), (3, 99), (20, 20)),
    "num_splits": (1, 0),
}


def _runs(row) -> bool:
    """What flash-attn's test does not skip."""
    case = dict(zip(AXES, row, strict=True))
    if not case["new_kv"] and case["fraction"]:
        return False
    return not (case["page"] and (case["leftpad"] or case["batch_idx"]))


def _cases():
    draw = random.Random(3).choice
    rows = [tuple(map(draw, AXES.values())) for _ in range(4000)]
    rows = list(dict.fromkeys(row for row in rows if _runs(row)))

    def labels(row):
        case = dict(zip(AXES, row, strict=True))
        of_rotary = case["fraction"], case["interleaved"], case["causal"] or case["local"]
        return (*row, of_rotary, (case["alibi"], case["leftpad"]), (case["page"], case["new_kv"]))

    return [dict(zip(AXES, row, strict=True)) for row in covering(rows, labels, together=1)]


@pytest.mark.parametrize(
    "case",
    some(_cases(), every=4),
    ids=lambda case: "-".join(map(str, case.values())).replace(" ", ""),
)
def test_its_own_grid_by_its_own_rule(case, on):
    on("sm_80")
    rng = np.random.default_rng(0)
    (seqlen_q, seqlen_k), d, heads_kv = case["seqlens"], case["d"], case["heads_kv"]
    new = seqlen_q if case["seqlen_new_eq_seqlen_q"] else int(rng.integers(1, seqlen_q + 1))
    rotary_dim = math.floor(int(case["fraction"] * d) / 16) * 16

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float16)

    q = normal(2, seqlen_q, 6, d)
    k, v = (normal(2, new, heads_kv, d) if case["new_kv"] else None for _ in "kv")
    options = {"causal": case["causal"]}
    if case["local"]:
        options["window_size"] = tuple(int(n) for n in rng.integers(0, seqlen_k, 2))
    if case["page"]:
        pages = 2 * -(-seqlen_k // case["page"])
        caches = [normal(3 * pages, case["page"], heads_kv, d) for _ in "kv"]
        table = rng.permutation(3 * pages)[:pages].reshape(2, -1)
        options["page_table"] = table.astype(np.int32)
    else:
        caches = [normal(4 if case["batch_idx"] else 2, seqlen_k, heads_kv, d) for _ in "kv"]
    # Where q is rotated token by token its positions must be in the tables, too.
    longest = seqlen_q if (case["causal"] or case["local"]) and rotary_dim else new
    most = seqlen_k - longest if case["new_kv"] else seqlen_k
    lengths = rng.integers(0 if case["new_kv"] else 1, most + 1, 2).astype(np.int32)
    options["cache_seqlens"] = lengths
    if case["leftpad"]:
        options["cache_leftpad"] = np.array(
            [rng.integers(0, n) if n else 0 for n in lengths], np.int32
        )
    if case["batch_idx"]:
        options["cache_batch_idx"] = rng.permutation(4)[:2].astype(np.int32)
    if case["alibi"]:
        options["alibi_slopes"] = (rng.random((2, 6)) * 0.3).astype(np.float32)
    if rotary_dim:
        angles = rng.random((seqlen_k, rotary_dim // 2)) * 2 * math.pi
        options["rotary_cos"] = np.cos(angles).astype(np.float16)
        options["rotary_sin"] = np.sin(angles).astype(np.float16)
        options["rotary_interleaved"] = case["interleaved"]
    exact, _, *wanted = attention_with_kvcache(q, *caches, k, v, **options)
    rounded, *_ = attention_with_kvcache(q, *caches, k, v, precision="float16", **options)
    out = numflash.attention_with_kvcache(
        q, *caches, k, v, num_splits=case["num_splits"], **options
    )
    np.testing.assert_allclose(caches[0], wanted[0], rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(caches[1], wanted[1])
    factor = 5 if case["alibi"] else 3
    assert np.abs(out - exact).max() <= factor * np.abs(rounded - exact).max() + 1e-5
