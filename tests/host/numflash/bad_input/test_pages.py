"""Bad input of calls whose keys lie in pages, and of options of a cache where there is none."""

import pytest

import numflash
from numflash.problem.options import PACKED
from tests.support.bad_calls import FORWARD, A, Q, cases, refused

K_PAGES, V_PAGES = A((50, 8, 2, 16)), A((50, 8, 2, 24))
TABLE, LENGTHS = A((2, 5), "int32"), A((2,), "int32")
RIGHT = {"q": Q, "k": K_PAGES, "v": V_PAGES, "page_table": TABLE, "seqlens_k": LENGTHS}
QUERIES = {"q": A((18, 4, 16)), "layout": PACKED, "cu_seqlens_q": A((3,), "int32")}

BAD = {
    "no-lengths": (
        {"seqlens_k": None},
        ValueError,
        "page_table goes with seqlens_k, how many keys of its pages each sequence has, got no",
    ),
    "only-lengths-of-queries": (
        {"seqlens_k": None, "seqlens_q": LENGTHS},
        ValueError,
        "page_table goes with seqlens_k",
    ),
    "packed-no-lengths": (
        QUERIES | {"seqlens_k": None},
        ValueError,
        "page_table goes with seqlens_k",
    ),
    "packed-keys": (
        QUERIES | {"cu_seqlens_k": A((3,), "int32")},
        ValueError,
        "cu_seqlens_k and page_table cannot be given together",
    ),
    "rows": (
        {"page_table": A((3, 5), "int32")},
        ValueError,
        "page_table must have a row for each of the 2 sequences, got 3",
    ),
    "one-row": (
        {"page_table": A((1, 5), "int32")},
        ValueError,
        "page_table must have a row for each of the 2 sequences, got 1",
    ),
    "packed-rows": (
        QUERIES | {"page_table": A((18, 5), "int32")},
        ValueError,
        "page_table must have a row for each of the 2 sequences, got 18",
    ),
    "int64": ({"page_table": A((2, 5), "int64")}, TypeError, "page_table must be int32, got int6"),
    "rank": ({"page_table": A((10,), "int32")}, ValueError, "page_table must have two dimensions"),
    "columns-apart": (
        {"page_table": A((2, 10), "int32", (..., slice(None, None, 2)))},
        ValueError,
        "page_table must have a contiguous last axis, stride 1, got stride 2",
    ),
    "many-keys": (
        {"page_table": A((2, 2**25), "int32")},
        numflash.UnsupportedError,
        "page_table has 33554432 pages of 8 keys for a sequence",
    ),
    "k-rank": (
        {"k": A((50, 2, 16))},
        ValueError,
        "k must have 4 dimensions (pages, page_size, heads, head_dim) with page_table, got 3",
    ),
    "no-keys": (
        {"k": A((50, 0, 2, 16)), "v": A((50, 0, 2, 24))},
        ValueError,
        "a page of k must have at least one key, got shape (50, 0, 2, 16)",
    ),
    "v-pages": ({"v": A((49, 8, 2, 24))}, ValueError, "v must have the pages of k, 50", "got 49"),
    "v-size": ({"v": A((50, 4, 2, 24))}, ValueError, "v must have the seqlen of k, 8", "got 4"),
    "bias": (
        {"bias": A((1, 1, 1, 8), "float32")},
        ValueError,
        "bias must broadcast to (batch, num_heads_q, seqlen_q, seqlen_k) = (2, 4, 9, 40)",
    ),
    "fp8": (
        {"precision": "fp8"},
        numflash.UnsupportedError,
        "do not go with seqlens_k",
    ),
}
OF_A_CACHE = {
    "appended": ({"appended": 2}, ValueError, "appended goes with seqlens_k, the keys that"),
    "cached": ({"cached": True}, ValueError, "cached goes with seqlens_k, the rows that cached"),
    "appended-only-queries": (
        {"appended": 2, "seqlens_q": LENGTHS},
        ValueError,
        "appended goes with seqlens_k, the keys that appended does not count, got no seqlens_k",
    ),
    "cached-only-starts": (
        {"cached": True, "starts_k": LENGTHS},
        ValueError,
        "cached goes with seqlens_k",
    ),
    "appended-below-0": (
        {"appended": -1, "seqlens_k": LENGTHS},
        ValueError,
        "appended must be at least 0, got -1",
    ),
    "appended-true": (
        {"appended": True, "seqlens_k": LENGTHS},
        TypeError,
        "appended must be an integer, got True",
    ),
    "cached-1": ({"cached": 1, "seqlens_k": LENGTHS}, TypeError, "cached must be True or False"),
}


@cases(BAD)
@pytest.mark.parametrize("function", [numflash.plan, numflash.explain_dispatch])
def test_wrong_pages_are_refused(machine, function, changes, error, words):
    refused(machine, function, RIGHT | changes, error, words)


@cases(OF_A_CACHE)
def test_options_of_a_cache_go_with_its_lengths(machine, changes, error, words):
    refused(machine, numflash.plan, FORWARD | changes, error, words)


@pytest.mark.parametrize("changes", [{}, QUERIES], ids=["padded", "packed"])
def test_right_pages_are_made_ready(machine, changes):
    machine.call(numflash.plan, **RIGHT | changes)
    assert machine.made and machine.launched == []


@pytest.mark.parametrize("name", ["layout", "block_mask", "appended", "cached"])
@pytest.mark.parametrize(
    "function", [numflash.attention_varlen, numflash.attention_varlen_backward]
)
def test_what_packed_sequences_do_not_have(machine, function, name):
    arrays = {"q": A((18, 4, 16)), "k": A((22, 2, 16)), "v": A((22, 2, 24))}
    ends = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), A((3,), "int32"))
    if function is numflash.attention_varlen_backward:
        out = A((18, 4, 24))
        arrays |= {"dout": out, "out": out, "lse": A((4, 18), "float32")}
    given = arrays | ends | {"seqlens_k": LENGTHS, name: True}
    refused(machine, function, given, TypeError, [f"{function.__name__} has no {name}"])


@pytest.mark.parametrize("name", ["block_mask", "appended", "cached", "starts_k", "cu_seqlens_q"])
def test_what_a_cache_does_not_have(machine, name):
    given = {"q": Q, "k_cache": K_PAGES, "v_cache": V_PAGES, "page_table": TABLE}
    given |= {"cache_seqlens": LENGTHS, name: LENGTHS}
    words = [f"attention_with_kvcache has no {name}"]
    refused(machine, numflash.attention_with_kvcache, given, TypeError, words)


def test_no_backward_knows_pages(machine):
    words = ["page_table does not go with a backward: keys in pages have no gradients"]
    with_gradients = RIGHT | {"dout": A((2, 9, 4, 24))}
    with pytest.raises(numflash.UnsupportedError, match=words[0]):
        machine.call(numflash.plan, **with_gradients)
    assert machine.launched == []
    packed = {"dout": A((18, 4, 24)), "out": A((18, 4, 24)), "lse": A((4, 18), "float32")}
    given = RIGHT | packed | {n: x for n, x in QUERIES.items() if n != "layout"}
    call = numflash.attention_varlen_backward
    refused(machine, call, given, numflash.UnsupportedError, words)
    words = ["a cache in pages has no gradients: check it without dout"]
    refused(machine, numflash.check, with_gradients, ValueError, words)
