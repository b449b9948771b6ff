"""Decoding over ranks: results against float64, bytes, and calls that are refused."""

import doctest
from functools import partial

import numpy as np
import pytest

from numflash import UnsupportedError, dequantize_fp8, quantize_fp8, reference
from numflash.distributed.communicators.local import local
from numflash.distributed.decode import decode, shard_lengths, shard_positions, token_owner
from tests.support.counting import counting
from tests.support.covering import some, thorough
from tests.support.ranks import on_ranks

BATCH, HEADS, HEADS_KV, DIM, DIM_V = 2, 4, 2, 16, 8
PAGE = 4
SPLIT = slice(0, 8), slice(8, 12)


def operands(seqlen, tokens=1, dtype="float16", seed=0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((BATCH, tokens, HEADS, DIM)).astype(dtype)
    k = rng.standard_normal((BATCH, seqlen, HEADS_KV, DIM)).astype(dtype)
    v = rng.standard_normal((BATCH, seqlen, HEADS_KV, DIM_V)).astype(dtype)
    return q, k, v


def exact(q, k, v, lengths=None, **options):
    """(out, lse) in float64; of each sequence its own length."""
    lengths = [k.shape[1]] * BATCH if lengths is None else lengths
    found = [
        reference.attention(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], **options)
        for b, n in enumerate(lengths)
    ]
    return tuple(np.concatenate(each) for each in zip(*found, strict=True))


def dealt(x, lengths, rank, ranks, pages_more=1):
    """A rank's pages of x, in a mixed order, NaN where no token lies, and their table."""
    most = -(-x.shape[1] // PAGE)
    width = -(-most // ranks)
    order = np.random.default_rng(rank).permutation(BATCH * width + pages_more)
    table = order[: BATCH * width].reshape(BATCH, width).astype(np.int32)
    pages = np.full((len(order), PAGE, *x.shape[2:]), np.nan, x.dtype)
    for entry, length in enumerate(lengths):
        for row in range(shard_lengths(length, PAGE, rank, ranks)):
            position = shard_positions(row, PAGE, rank, ranks)
            pages[table[entry, row // PAGE], row % PAGE] = x[entry, position]
    return pages, table


def expect_close(got, wanted, atol=2e-3):
    np.testing.assert_allclose(got[0], wanted[0], atol=atol)
    np.testing.assert_allclose(got[1], wanted[1], atol=1e-5)


def expect_same_bits(results):
    for other in results[1:]:
        for one, another in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, another)


@pytest.mark.parametrize("ranks", [1, 3])
def test_dense_shards_one_of_them_empty(ranks, on):
    """Rank 1 has an array of 0 tokens; the lengths of the last leave one sequence there empty."""
    on("sm_80")
    q, k, v = operands(20)
    at = [0, 20] if ranks == 1 else [0, 9, 9, 20]
    lengths = [20, 9]
    more = {"softcap": 5.0, "softmax_scale": 0.3}

    def work(comm):
        begin, end = at[comm.rank : comm.rank + 2]
        shards = k[:, begin:end], v[:, begin:end]
        mine = np.clip(np.array(lengths) - begin, 0, end - begin).astype(np.int32)
        given = {} if (mine == end - begin).all() else {"seqlens_k": mine}
        return decode(q, *shards, comm=comm, return_lse=True, **given, **more)

    results = on_ranks(ranks, work)
    expect_close(results[0], exact(q, k, v, lengths, **more))
    assert results[0][0].dtype == np.float16
    expect_same_bits(results)


@pytest.mark.parametrize("scatter_heads", some([False, True], True))
def test_pages_are_dealt_sinks_count_once_and_bytes_are_as_said(scatter_heads, on):
    on("sm_80")
    ranks, lengths = 2, [21, 3]  # of the second sequence rank 1 has nothing
    q, k, v = operands(21, tokens=2)
    sinks = np.array([0.5, -1.0, 2.0, -np.inf], np.float32)
    seqlens = np.array(lengths, np.int32)
    comms = counting(ranks)

    def work(comm):
        deal = partial(dealt, lengths=lengths, rank=comm.rank, ranks=ranks)
        (pages_k, table), (pages_v, _) = deal(k), deal(v)
        mine = shard_lengths(seqlens, PAGE, comm.rank, ranks)
        assert mine.dtype == np.int32 and (comm.rank == 0 or mine[1] == 0)
        call = partial(decode, q, pages_k, pages_v, comm=comm, seqlens_k=mine, page_table=table)
        more = {"scatter_heads": scatter_heads, "return_lse": True, "out_dtype": "float32"}
        call(sinks=sinks, **more)
        return call(sinks=sinks, **more)

    results = on_ranks(ranks, work, comms)
    wanted = exact(q, k, v, lengths, sinks=sinks)
    heads = HEADS // ranks if scatter_heads else HEADS
    for rank, got in enumerate(results):
        mine = slice(rank * heads, (rank + 1) * heads) if scatter_heads else slice(None)
        expect_close(got, (wanted[0][:, :, mine], wanted[1][:, mine]), atol=1e-3)
        assert got[0].shape == (BATCH, 2, heads, DIM_V) and got[0].dtype == np.float32
        assert got[1].shape == (BATCH, heads, 2)
    if not scatter_heads:
        expect_same_bits(results)
    for comm in comms:
        assert comm.sent == 2 * (ranks - 1) * BATCH * 2 * heads * (DIM_V + 1) * 4  # two calls
        assert comm.agreements == 1


@thorough
@pytest.mark.parametrize("has_lengths", some([False, True], True))
def test_shards_of_codes_have_scales_of_their_own(has_lengths, on):
    on("sm_80")
    q, k, v = operands(12)
    v[:, 8:] *= 10
    shards = [[quantize_fp8(x[:, rows], "head") for x in (k, v)] for rows in SPLIT]

    def work(comm):
        k8, v8 = shards[comm.rank]
        codes = k8.data[..., :DIM].copy(), v8.data[..., :DIM_V].copy()
        more = {"k_descale": k8.descale[..., 0], "v_descale": v8.descale[..., 0]}
        if has_lengths:
            more["seqlens_k"] = np.full(BATCH, codes[0].shape[1], np.int32)
        return decode(q, *codes, comm=comm, return_lse=True, **more)

    k, v = (
        np.concatenate([dequantize_fp8(each[i], "float32") for each in shards], 1) for i in (0, 1)
    )
    results = on_ranks(2, work)
    np.testing.assert_allclose(results[0][0], exact(q, k, v)[0], atol=2e-2)
    expect_same_bits(results)


def test_sequences_without_a_key_give_zeros(on):
    on("sm_80")
    q, k, v = operands(0)
    results = on_ranks(2, lambda comm: decode(q, k, v, comm=comm, return_lse=True))
    assert not results[0][0].any() and np.isneginf(results[0][1]).all()
    expect_same_bits(results)


def test_a_mask_by_positions_lets_several_queries_be_causal(on):
    on("sm_80")
    ranks, seqlen, tokens = 2, 13, 3
    q, k, v = operands(seqlen, tokens=tokens)

    def work(comm):
        deal = partial(dealt, lengths=[seqlen] * BATCH, rank=comm.rank, ranks=ranks)
        (pages_k, table), (pages_v, _) = deal(k), deal(v)
        mine = shard_lengths(np.full(BATCH, seqlen, np.int32), PAGE, comm.rank, ranks)

        def is_seen(batch, head, q_idx, kv_idx):
            position = shard_positions(kv_idx, PAGE, comm.rank, ranks)
            return position <= q_idx + (seqlen - tokens)

        of_shard = {"seqlens_k": mine, "page_table": table, "mask_mod": is_seen}
        return decode(q, pages_k, pages_v, comm=comm, return_lse=True, **of_shard)

    results = on_ranks(ranks, work)
    expect_close(results[0], exact(q, k, v, causal=True))
    expect_same_bits(results)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_position_is_on_one_rank_at_its_row(ranks):
    for seqlen in range(40):
        lengths = [shard_lengths(seqlen, PAGE, rank, ranks) for rank in range(ranks)]
        held = {}
        for rank, length in enumerate(lengths):
            for row in range(length):
                held[shard_positions(row, PAGE, rank, ranks)] = rank
        assert sum(lengths) == len(held) == seqlen
        assert held == {p: token_owner(p, PAGE, ranks) for p in range(seqlen)}
        owner = token_owner(seqlen, PAGE, ranks)
        assert shard_positions(lengths[owner], PAGE, owner, ranks) == seqlen
    many = np.arange(40, dtype=np.int32)
    for rank in range(ranks):
        found = shard_lengths(many, PAGE, rank, ranks)
        assert found.dtype == np.int32
        assert found.tolist() == [shard_lengths(n, PAGE, rank, ranks) for n in range(40)]


POSITIONS = "a rank knows the rows of its shard, not the positions"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window_size": (4, None)}, UnsupportedError, f"decode has no window_size: {POSITIONS}"),
        ({"window_size": 5}, UnsupportedError, f"decode has no window_size: {POSITIONS}"),
        ({"alibi_slopes": np.ones(4, "f4")}, UnsupportedError, "decode has no alibi_slopes"),
        ({"causal": True}, UnsupportedError, f"no causal with 2 queries: {POSITIONS}"),
        ({"dropout_p": 0.5}, UnsupportedError, "decode has no dropout_p"),
        ({"shift": 1}, UnsupportedError, "decode has no shift"),
        ({"page_table": np.zeros((2, 1), "i4")}, ValueError, "page_table needs seqlens_k"),
        ({"scatter_heads": 1}, TypeError, "scatter_heads must be True or False, got 1"),
        ({"out_dtype": "float64"}, ValueError, "out_dtype must be one of float16, float32"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"colour": 1}, TypeError, "colour"),
    ],
)
def test_what_it_cannot_do_is_refused(options, error, message):
    q, k, v = operands(4, tokens=2)
    (comm,) = local(1)
    with pytest.raises(error, match=message):
        decode(q, k, v, comm=comm, **options)


def test_options_that_say_nothing_are_taken(on):
    on("sm_80")
    q, k, v = operands(5)
    (comm,) = local(1)
    nothing = {"window_size": (-1, None), "causal": True, "alibi_slopes": None, "shift": 0}
    expect_close(
        decode(q, k, v, comm=comm, return_lse=True, **nothing),
        exact(q, k, v),
    )


def test_heads_that_do_not_divide_are_refused_on_all_ranks():
    q, k, v = operands(4)

    def work(comm):
        with pytest.raises(ValueError, match="scatter_heads gives each of 3 ranks as many"):
            decode(q, k, v, comm=comm, scatter_heads=True)

    on_ranks(3, work)


def test_a_refusal_on_one_rank_and_ranks_that_differ_raise_on_all(on):
    on("sm_80")
    q, k, v = operands(4)
    comms = counting(2)

    def refused(comm):
        lengths = np.zeros(BATCH, np.int64 if comm.rank else np.int32)
        with pytest.raises(TypeError, match=r"rank 1 refuses.*int32"):
            decode(q, k, v, comm=comm, seqlens_k=lengths)

    def differing(comm):
        with pytest.raises(ValueError, match=r"softcap.*rank . has 2\.0"):
            decode(q, k, v, comm=comm, softcap=2.0 * comm.rank)

    on_ranks(2, refused, comms)
    on_ranks(2, differing, comms)
    assert [comm.sent for comm in comms] == [0, 0]


@pytest.mark.parametrize("function", [decode, token_owner, shard_lengths, shard_positions])
def test_examples_run(function):
    test = doctest.DocTestParser().get_doctest(function.__doc__, {}, "example", None, None)
    report: list[str] = []
    assert test.examples
    assert not doctest.DocTestRunner(verbose=False).run(test, out=report.append).failed, report
