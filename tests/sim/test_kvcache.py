"""Attention over caches: results against float64, and what lies in the cache afterwards."""

from functools import partial

import numpy as np
import pytest

import numflash
from numflash import reference
from numflash.calls import forward, launch, ready, sequences
from tests.support.cache_cases import CacheCase, cases, errors_of, expect_same_rows
from tests.support.covering import some, thorough

CASES = cases()


@pytest.mark.parametrize("case", some(CASES, every=24), ids=str)
def test_results_are_within_their_budgets_and_caches_hold_the_new_rows(case: CacheCase, on):
    on(case.arch)
    for error in errors_of(case, np.random.default_rng(len(str(case)))):
        assert error.passed, error


LENGTHS, PAGE, PAGES = (21, 16, 3), 8, 15


def shared_prefix(rng, heads=2, d=32):
    """(q, k_cache, v_cache, k, v, options): the first two sequences share two pages."""
    table = np.array([[4, 1, 7, 0, 9], [4, 1, 3, 99, -5], [2, 99, 99, -1, -1]], np.int32)
    caches = np.full((2, PAGES, PAGE, heads, d), np.nan, np.float16)
    for entry, length in enumerate(LENGTHS):
        for row in range(length):
            page = table[entry, row // PAGE]
            caches[:, page, row % PAGE] = rng.standard_normal((2, heads, d))
    q = rng.standard_normal((3, 2, 2 * heads, d)).astype(np.float16)
    k, v = rng.standard_normal((2, 3, 2, heads, d)).astype(np.float16)
    lengths = np.array(LENGTHS, np.int32)
    return q, *caches, k, v, {"page_table": table, "cache_seqlens": lengths, "causal": True}


def test_sequences_share_a_prefix_and_append_to_pages_of_their_own(on):
    on("sm_80")
    *arrays, options = shared_prefix(np.random.default_rng(0))
    before = [cache.copy() for cache in arrays[1:3]]
    out, lse, *caches = reference.attention_with_kvcache(*arrays, **options)
    got = numflash.attention_with_kvcache(*arrays, return_lse=True, check_lengths=True, **options)
    np.testing.assert_allclose(got[0], out, atol=2e-3)
    np.testing.assert_allclose(got[1], lse, atol=1e-5)
    expect_same_rows(arrays[1:3], before, caches, False)


@pytest.mark.parametrize(
    ("name", "entry", "value", "message"),
    [
        ("cache_seqlens", 1, 39, "cache_seqlens must lie within the 40 rows.* got 39 for seq.* 1"),
        ("cache_seqlens", 2, -1, "cache_seqlens must lie within.* got -1 for sequence 2"),
        (
            "page_table",
            (0, 2),
            15,
            "page_table must name one of the 15 pages.* got 15 for.* 0",
        ),
        (
            "page_table",
            (1, 2),
            7,
            "two sequences append to one page, got page 7 for.* 0 and 1",
        ),
        ("cache_leftpad", 2, 6, "cache_leftpad must lie between 0 and a.* length, got 6 for.* 2"),
    ],
)
def test_numbers_that_lead_out_of_the_cache_are_told(on, name, entry, value, message):
    on("sm_80")
    *arrays, options = shared_prefix(np.random.default_rng(0))
    options["cache_leftpad"] = np.array([0, 3, 1], np.int32)
    options[name][entry] = value
    with pytest.raises(ValueError, match=message):
        numflash.attention_with_kvcache(*arrays, check_lengths=True, **options)
    # Without the question nothing outside is touched: the simulator would tell.
    before = [cache.copy() for cache in arrays[1:3]]
    wanted, _, *caches = reference.attention_with_kvcache(*arrays, **options)
    out = numflash.attention_with_kvcache(*arrays, **options)
    if value != 7:
        np.testing.assert_allclose(out, wanted, atol=2e-3)
        expect_same_rows(arrays[1:3], before, caches, False)


def test_positions_that_the_tables_do_not_have_are_told(on):
    on("sm_80")
    *arrays, options = shared_prefix(np.random.default_rng(0))
    options["rotary_cos"], options["rotary_sin"] = numflash.rotary_tables(22, 32)
    with pytest.raises(ValueError, match="got 22 rows and a token at position 22 in sequence 0"):
        numflash.attention_with_kvcache(*arrays, check_lengths=True, **options)


@pytest.mark.parametrize("window", [(-1, None), (None, -1)], ids=str)
def test_a_window_of_all_is_none_however_it_is_said(on, window):
    """All queries are rotated at one position, as without a window."""
    on("sm_80")
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 2, 1, 16)).astype(np.float16)
    cos, sin = numflash.rotary_tables(12, 16)
    more = {"cache_seqlens": 3, "rotary_cos": cos, "rotary_sin": sin}
    cache = rng.standard_normal((2, 1, 8, 1, 16)).astype(np.float16)
    one, other = (
        numflash.attention_with_kvcache(q, *cache.copy(), k, v, **more, **options)
        for options in ({}, {"window_size": window})
    )
    np.testing.assert_array_equal(one, other)


def test_an_integer_is_the_length_of_all(on, monkeypatch):
    on("sm_80")
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 1, 2, 16)).astype(np.float16)
    cos, sin = numflash.rotary_tables(12, 16)
    one, other = (np.zeros((2, 2, 12, 2, 16), np.float16) for _ in range(2))
    tables = {"rotary_cos": cos, "rotary_sin": sin, "causal": True}
    for n in range(3):
        lengths = np.full(2, n, np.int32)
        first = numflash.attention_with_kvcache(q, *one, k, v, cache_seqlens=lengths, **tables)
        second = numflash.attention_with_kvcache(q, *other, k, v, cache_seqlens=n, **tables)
        np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(one, other)
    assert len(ready._ready) == 2
    for n, message in ((12, "the 12 rows that the cache has.* got 12"), (-1, "got -1")):
        with pytest.raises(ValueError, match=f"cache_seqlens must be at least 0.*{message}"):
            numflash.attention_with_kvcache(q, *one, k, v, cache_seqlens=n, **tables)
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("num_splits", some([None, 0, 1, 3], 3))
def test_keys_are_dealt_out_to_so_many_parts(on, monkeypatch, num_splits):
    on("sm_80")
    lists = []

    class Schedule(sequences.ScheduleKernel):
        def bind(self, operands, library):
            launch = super().bind(operands, library)

            def launched(stream):
                launch(stream)
                records = operands[self.names[0]].array
                lists.append(records[8 : 8 + 8 * records[0]].reshape(-1, 8)[:, 7] >> 20)

            return launched

    monkeypatch.setattr(forward, "ScheduleKernel", Schedule)
    rng = np.random.default_rng(1)
    caches = rng.standard_normal((2, 2, 400, 1, 16)).astype(np.float16)
    q = rng.standard_normal((2, 1, 2, 16)).astype(np.float16)
    options = {"cache_seqlens": np.array([400, 130], np.int32)}
    out = numflash.attention_with_kvcache(q, *caches, num_splits=num_splits, **options)
    np.testing.assert_allclose(
        out, reference.attention_with_kvcache(q, *caches, **options)[0], atol=1e-3
    )
    (splits,) = lists
    assert {1: splits.max() == 0, 3: splits.max() == 2}.get(num_splits, splits.max() > 0)
    if num_splits == 3:
        assert sorted(splits) == [0, 0, 1, 2]


@thorough
def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(on):
    on("sm_80")
    rng = np.random.default_rng(2)
    lengths = np.array([2100, 5, 300], np.int32)
    caches = rng.standard_normal((2, 3, 2112, 1, 16)).astype(np.float16)
    q = rng.standard_normal((3, 1, 2, 16)).astype(np.float16)
    call = partial(numflash.attention_with_kvcache, batch_invariant=True)
    together = call(q, *caches, cache_seqlens=lengths)
    for i in range(3):
        alone = call(q[i : i + 1], *caches[:, i : i + 1], cache_seqlens=lengths[i : i + 1])
        np.testing.assert_array_equal(alone[0], together[i])


def test_nothing_new_and_nobody(on):
    on("sm_80")
    cache = np.zeros((2, 0, 8, 1, 16), np.float16)
    q = np.zeros((0, 1, 1, 16), np.float16)
    nobody = np.zeros(0, np.int32)
    assert numflash.attention_with_kvcache(q, *cache, q, q, cache_seqlens=nobody).shape == q.shape
    caches = np.ones((2, 2, 8, 1, 16), np.float16)
    q = np.ones((2, 1, 1, 16), np.float16)
    out = numflash.attention_with_kvcache(q, *caches, q[:, :0], q[:, :0], cache_seqlens=0)
    assert not out.any()


@thorough
def test_a_graph_replays_with_other_lengths_pages_and_rows(on, monkeypatch):
    """What a call launches, launched again after everything that lies on the device is another."""
    on("sm_80")
    launches, bind = [], launch.SimulatedLaunch.bind

    def noted(self, operands):
        launches.append(bind(self, operands))
        return launches[-1]

    monkeypatch.setattr(launch.SimulatedLaunch, "bind", noted)
    *arrays, options = shared_prefix(np.random.default_rng(0))
    options["rotary_cos"], options["rotary_sin"] = numflash.rotary_tables(40, 32)
    out = numflash.attention_with_kvcache(*arrays, num_splits=2, **options)
    assert len(launches) == 3  # prepare, attention, combine
    rng = np.random.default_rng(1)
    for lengths in ((0, 38, 9), (0, 0, 0), (38, 20, 1)):
        options["cache_seqlens"][:] = lengths
        options["page_table"][:] = rng.permutation(15).reshape(3, 5)
        for array in arrays:
            array[...] = rng.standard_normal(array.shape)
        wanted, _, *caches = reference.attention_with_kvcache(*arrays, **options)
        for each in launches:
            each(0)
        np.testing.assert_allclose(out, wanted, atol=3e-3)
        for cache, other in zip(arrays[1:3], caches, strict=True):
            np.testing.assert_allclose(cache, other, atol=4e-3)
