"""Wrong calls of `attention_with_kvcache` are refused, and nothing is launched."""

import numpy as np
import pytest

import numflash
from numflash.runtime.mode import SIMULATED
from tests.support.bad_calls import A, broadcast, cases, needs_gpu_mode, refused

Q, K_CACHE, V_CACHE = A((2, 3, 4, 16)), A((2, 40, 2, 16)), A((2, 40, 2, 24))
K, V = A((2, 3, 2, 16)), A((2, 3, 2, 24))
LENGTHS, TABLE = A((2,), "int32"), A((50, 8), "float32")
RIGHT = {"q": Q, "k_cache": K_CACHE, "v_cache": V_CACHE, "cache_seqlens": LENGTHS}
NEW, PAGES = {"k": K, "v": V}, A((2, 5), "int32")
TABLES = {"rotary_cos": TABLE, "rotary_sin": TABLE}

BAD = {
    # Types and dtypes
    "q-list": ({"q": [[1.0]]}, TypeError, "q must be", "list"),
    "k_cache-none": ({"k_cache": None}, TypeError, "k_cache must be", "NoneType"),
    "q-int32": ({"q": A(Q.shape, "int32")}, TypeError, "q must have one of", "int32"),
    "k_cache-dtype": (
        {"k_cache": A(K_CACHE.shape, "float32")},
        TypeError,
        "k_cache must have the dtype of q, float16, or e4m3 codes",
        "got float32",
    ),
    "v-dtype": (NEW | {"v": A(V.shape, "bfloat16")}, TypeError, "v must have the dtype of q"),
    "lengths-none": ({"cache_seqlens": None}, TypeError, "cache_seqlens must be", "None"),
    "lengths-true": ({"cache_seqlens": True}, TypeError, "cache_seqlens must be", "True"),
    "lengths-float": ({"cache_seqlens": 1.5}, TypeError, "cache_seqlens must be", "float"),
    "lengths-list": ({"cache_seqlens": [1, 2]}, TypeError, "cache_seqlens must be", "list"),
    "lengths-int64": (
        {"cache_seqlens": A((2,), "int64")},
        TypeError,
        "cache_seqlens must be int32, got int64",
    ),
    "leftpad-int64": (
        {"cache_leftpad": A((2,), "int64")},
        TypeError,
        "cache_leftpad must be int32, got int64",
    ),
    "pages-int64": ({"page_table": A((2, 5), "int64")}, TypeError, "page_table must be int32"),
    "interleaved": ({"rotary_interleaved": 1}, TypeError, "rotary_interleaved must be True", "1"),
    "splits-float": ({"num_splits": 2.0}, TypeError, "num_splits must be an integer", "2.0"),
    "splits-true": ({"num_splits": True}, TypeError, "num_splits must be an integer", "True"),
    "splits-below-0": ({"num_splits": -1}, ValueError, "num_splits must be at least 0, got -1"),
    "splits-invariant": (
        {"num_splits": 2, "batch_invariant": True},
        ValueError,
        "num_splits and batch_invariant=True cannot be given together",
        "got num_splits 2",
    ),
    "check-1": ({"check_lengths": 1}, TypeError, "check_lengths must be True or False", "1"),
    "layout": ({"layout": "bhsd"}, TypeError, "attention_with_kvcache has no layout"),
    "seqlens": ({"seqlens_k": LENGTHS}, TypeError, "attention_with_kvcache has no seqlens_k"),
    "unknown": ({"colour": 1}, TypeError, "attention_with_kvcache got unknown options: colour"),
    "precision-fp8": (
        {"precision": "fp8"},
        numflash.UnsupportedError,
        "precision must be None or tf32 with a cache",
        "'fp8'",
    ),
    "causal-1": ({"causal": 1}, TypeError, "causal must be True or False", "1"),
    # Shapes
    "q-rank": ({"q": A((3, 4, 16))}, ValueError, "q must have 4 dimensions", "got 3"),
    "k_cache-rank": (
        {"k_cache": A((2, 40, 16))},
        ValueError,
        "k_cache must have 4 dimensions (batch or pages, rows, heads, head_dim), got 3",
    ),
    "k_cache-head-dim": (
        {"k_cache": A((2, 40, 2, 8))},
        ValueError,
        "k_cache must have the head_dim of q, 16, got 8",
    ),
    "v_cache-rows": (
        {"v_cache": A((2, 41, 2, 24))},
        ValueError,
        "v_cache must have the shape of k_cache but for head_dim, (2, 40, 2), got (2, 41, 2)",
    ),
    "heads": (
        {"k_cache": A((2, 40, 3, 16)), "v_cache": A((2, 40, 3, 24))},
        ValueError,
        "heads of q must be a positive multiple",
        "4 and 3",
    ),
    "too-few-entries": (
        {"q": A((3, 3, 4, 16)), "cache_seqlens": A((3,), "int32")},
        ValueError,
        "k_cache must have an entry for each of the 3 sequences of q, got 2",
    ),
    "lengths-shape": (
        {"cache_seqlens": A((3,), "int32")},
        ValueError,
        "cache_seqlens must have an element for each of the 2 sequences of q, got 3",
    ),
    "lengths-rank": (
        {"cache_seqlens": A((2, 1), "int32")},
        ValueError,
        "cache_seqlens must have one dimension",
    ),
    "batch-idx-shape": (
        {"cache_batch_idx": A((1,), "int32")},
        ValueError,
        "cache_batch_idx must have an element for each of the 2 sequences of q, got 1",
    ),
    "pages-rank": ({"page_table": A((2,), "int32")}, ValueError, "page_table must have two"),
    "pages-rows": (
        {"page_table": A((3, 5), "int32")},
        ValueError,
        "page_table must have a row for each of the 2 sequences of q, got 3",
    ),
    "pages-and-batch-idx": (
        {"page_table": PAGES, "cache_batch_idx": LENGTHS},
        ValueError,
        "page_table and cache_batch_idx cannot be given together",
    ),
    # What is new
    "k-alone": ({"k": K}, ValueError, "k and v must be given together, got k alone"),
    "v-alone": ({"v": V}, ValueError, "k and v must be given together, got v alone"),
    "k-heads": (
        NEW | {"k": A((2, 3, 4, 16))},
        ValueError,
        "k must have shape (2, 3, 2, 16), got (2, 3, 4, 16)",
    ),
    "v-tokens": (NEW | {"v": A((2, 4, 2, 24))}, ValueError, "v must have shape (2, 3, 2, 24)"),
    "k-batch": (NEW | {"k": A((1, 3, 2, 16))}, ValueError, "k must have shape (2, 3, 2, 16)"),
    "too-many": (
        {"k": A((2, 41, 2, 16)), "v": A((2, 41, 2, 24))},
        ValueError,
        "k must have at most the 40 rows that the cache has for a sequence, got 41",
    ),
    "columns-apart": (
        {"k_cache": A((2, 40, 2, 32), index=(..., slice(None, None, 2)))},
        ValueError,
        "k_cache must have a contiguous last axis, stride 1, got stride 2",
    ),
    # Rotary
    "cos-alone": (
        NEW | {"rotary_cos": TABLE},
        ValueError,
        "rotary_cos and rotary_sin must be given together, got rotary_cos alone",
    ),
    "rotary-without-k": (TABLES, ValueError, "rotary_cos and rotary_sin", "need k and v"),
    "rotary-dim": (
        NEW | {"rotary_cos": A((50, 9), "float32"), "rotary_sin": A((50, 9), "float32")},
        ValueError,
        "rotary_cos must have rotary_dim / 2 columns, 1 to 8 for head_dim 16 of q, got 9",
    ),
    "sin-shape": (
        NEW | TABLES | {"rotary_sin": A((49, 8), "float32")},
        ValueError,
        "rotary_sin must have shape (50, 8), got (49, 8)",
    ),
    "cos-float64": (
        NEW | TABLES | {"rotary_cos": A((50, 8), "float64")},
        TypeError,
        "rotary_cos must be float32 or float16, got float64",
    ),
    # Results
    "out-shape": ({"out": A((2, 3, 4, 16))}, ValueError, "out must have shape (2, 3, 4, 24)"),
}


@cases(BAD)
def test_a_wrong_call_is_refused(machine, changes, error, words):
    refused(machine, numflash.attention_with_kvcache, RIGHT | changes, error, words)


def test_a_right_call_is_launched(machine):
    machine.call(numflash.attention_with_kvcache, **RIGHT | NEW | TABLES)
    assert machine.launched


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_a_cache_that_cannot_be_written_is_refused(machine, name):
    right = {each: machine.array(spec) for each, spec in (RIGHT | NEW).items()}
    call, wrong = numflash.attention_with_kvcache, dict(right)
    wrong[name] = broadcast(right[name][:, :1], right[name].shape)
    words = [f"{name} must not be a broadcast view, whose elements share memory"]
    refused(machine, call, wrong, ValueError, words)
    if SIMULATED:
        wrong[name] = right[name].copy()
        wrong[name].flags.writeable = False
        words = [f"{name} must be writeable, got a read-only array"]
        refused(machine, call, wrong, ValueError, words)
    # It may be read.
    call(**{each: x for each, x in wrong.items() if each not in ("k", "v")})


@pytest.mark.parametrize("name", ["q", "v_cache"])
def test_a_result_on_what_is_read_is_refused(machine, name):
    right = {each: machine.array(spec) for each, spec in RIGHT.items()}
    out = right[name][:, :3, :, :16]
    arrays = right | {"v_cache": right["v_cache"][..., :16], "out": out}
    arrays["q"] = right["q"][:, :, : out.shape[2]]
    words = [f"out must not overlap {name}"]
    refused(machine, numflash.attention_with_kvcache, arrays, ValueError, words)


@needs_gpu_mode
def test_a_page_table_on_another_device_is_refused(machine):
    for name, spec in (
        ("page_table", A((2, 5), "int32", device=1)),
        ("cache_seqlens", A((2,), "int32", device=1)),
        ("k_cache", A(K_CACHE.shape, device=1)),
        ("rotary_cos", A(TABLE.shape, "float32", device=1)),
    ):
        given = RIGHT | NEW | TABLES | {name: spec}
        words = [f"{name} must lie on the device of q, 0, got device 1"]
        refused(machine, numflash.attention_with_kvcache, given, ValueError, words)


def test_keys_and_values_are_not_appended_to_one_array(machine):
    cache, new = np.zeros((2, 9, 2, 32), "float16"), np.zeros((2, 1, 2, 32), "float16")
    if not SIMULATED:
        pytest.skip("arrays of the stubbed GPU have addresses of their own")
    lengths = np.zeros(2, "int32")
    with pytest.raises(ValueError, match="k_cache and v_cache must be two arrays"):
        numflash.attention_with_kvcache(new, cache, cache, new, new, cache_seqlens=lengths)
    numflash.attention_with_kvcache(new, cache, cache, cache_seqlens=lengths)  # reads only
