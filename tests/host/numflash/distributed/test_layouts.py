"""Which rank holds which tokens."""

import random
from itertools import pairwise

import numpy as np
import pytest

from numflash.distributed.layouts import Layout, Segment
from tests.support.layouts import random_layout, shuffled


def head_tail(seqlen: int, ranks: int) -> list[int]:
    """The order of PyTorch, after `_HeadTailLoadBalancer._generate_indices` of torch 2.13."""
    chunk, found = seqlen // (2 * ranks), []
    for rank in range(ranks):
        first = rank * chunk
        found.extend(range(first, first + chunk))
        second = (2 * ranks - rank - 1) * chunk
        found.extend(range(second, second + chunk))
    return found


@pytest.mark.parametrize("ranks", range(1, 17))
def test_zigzag_is_the_head_tail_order_of_torch(ranks):
    layout = Layout.zigzag(6 * ranks, ranks)
    held = [layout.indices(rank) for rank in range(ranks)]
    assert np.concatenate(held).tolist() == head_tail(6 * ranks, ranks)


def test_zigzag_as_torch_documents_it():
    held = [Layout.zigzag(8, 2).indices(rank).tolist() for rank in range(2)]
    assert held == [[0, 1, 6, 7], [2, 3, 4, 5]]


@pytest.mark.parametrize("ranks", range(1, 17))
def test_each_token_is_on_one_rank_and_every_number_says_where(ranks):
    draw = random.Random(ranks)
    for _ in range(40):
        layout = random_layout(ranks, draw)
        assert (layout.ranks, layout.seqlen) == (ranks, sum(layout.lengths))
        indices = [layout.indices(rank) for rank in range(ranks)]
        assert sorted(np.concatenate(indices).tolist()) == list(range(layout.seqlen))
        for rank in range(ranks):
            assert layout.tokens(rank) == len(indices[rank])
            positions = layout.positions(rank)
            assert positions.dtype == np.int32
            held = layout.segments[rank]
            starts = np.repeat([layout.starts[s.document] for s in held], [s.length for s in held])
            assert (positions + starts == indices[rank]).all()
            for (begin, end), (first, last) in zip(
                layout.rows(rank), layout.places(rank), strict=True
            ):
                assert indices[rank][begin:end].tolist() == list(range(first, last))


@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_chunks_begin_at_multiples_and_differ_by_one_at_most(multiple):
    for ranks in range(1, 9):
        for seqlen in range(0, 200, 7):
            of_ranks = Layout.contiguous(seqlen, ranks, multiple=multiple)
            sizes = [of_ranks.tokens(rank) for rank in range(ranks)]
            assert max(sizes) - min(sizes) <= multiple
            for layout in (of_ranks, Layout.zigzag(seqlen, ranks, multiple=multiple)):
                firsts = [s.first for held in layout.segments for s in held]
                assert all(first % multiple == 0 for first in firsts)


def test_each_document_is_cut():
    layout = Layout.zigzag_documents([8, 0, 5], ranks=2)
    assert layout.segments == (
        (Segment(0, 0, 2), Segment(0, 6, 2), Segment(2, 0, 1), Segment(2, 3, 2)),
        (Segment(0, 2, 4), Segment(2, 1, 2)),
    )


def test_documents_follow_each_other_in_one_stream():
    layout = Layout.contiguous([3, 0, 5], ranks=2)
    assert layout.segments == ((Segment(0, 0, 3), Segment(2, 0, 1)), (Segment(2, 1, 4),))
    assert Layout.contiguous([8], 3) == Layout.contiguous(8, 3)


def test_segments_of_the_caller_keep_their_order():
    layout = Layout.of_segments([4, 2], [[(1, 0, 2), (0, 2, 2)], [], [(0, 0, 1), (0, 1, 1)]])
    assert [layout.indices(rank).tolist() for rank in range(3)] == [[4, 5, 2, 3], [], [0, 1]]
    # Those that continue each other are one.
    assert layout.segments[2] == (Segment(0, 0, 2),)


def test_equal_layouts_are_one_key():
    one, other = Layout.zigzag(32, 2), Layout.zigzag_documents([32], 2)
    assert one == other and hash(one) == hash(other)
    assert one != Layout.contiguous(32, 2)


@pytest.mark.parametrize("ranks, size", [(1, 1), (4, 2), (6, 3), (8, 4), (8, 8)])
def test_a_group_is_one_rank_with_its_tokens_in_order(ranks, size):
    draw = random.Random(ranks)
    for _ in range(20):
        layout = random_layout(ranks, draw)
        merged = layout.merged(size)
        assert merged.ranks == ranks // size
        for group in range(merged.ranks):
            parts = [layout.indices(group * size + rank) for rank in range(size)]
            assert merged.indices(group).tolist() == sorted(np.concatenate(parts).tolist())
            for one, next_one in pairwise(merged.segments[group]):
                assert (one.document, one.end) < next_one[:2]


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: Layout.zigzag(8, 0), ValueError, "ranks must be at least 1, got 0"),
        (lambda: Layout.zigzag(-1, 2), ValueError, "a length must be at least 0, got -1"),
        (
            lambda: Layout.zigzag(8.0, 2),
            TypeError,
            r"a length must be an integer, got 8.0 \(float",
        ),
        (lambda: Layout.zigzag(True, 2), TypeError, "a length must be an integer, got True"),
        (lambda: Layout.zigzag(8, 2.0), TypeError, "ranks must be an integer, got 2.0"),
        (lambda: Layout.zigzag(8, 2, multiple=0), ValueError, "multiple must be at least 1"),
        (lambda: Layout.zigzag_documents(8, 2), TypeError, "lengths must be those of the docu"),
        (lambda: Layout.zigzag_documents([8, None], 2), TypeError, "a length .* got None"),
        (lambda: Layout.contiguous(None, 2), TypeError, "a length .* got None"),
        (lambda: Layout.contiguous("8", 2), TypeError, "a length .* got '8'"),
        (lambda: Layout.of_segments([8], []), ValueError, "ranks must be at least 1, got 0"),
        (lambda: Layout.of_segments([8], [[(0, 8)]]), TypeError, "rank 0 must be .document, fi"),
        (lambda: Layout.of_segments([8], [[(0, 0, 8.0)]]), TypeError, "the length of a segment"),
        (lambda: Layout.of_segments([8], [[], [(0, -1, 8)]]), ValueError, "position of a segment"),
        (lambda: Layout.of_segments([8], [[(1, 0, 8)]]), ValueError, "one of 1 documents"),
        (lambda: Layout.of_segments([8], [[(0, 1, 8)]]), ValueError, "inside document 0, of 8"),
        (lambda: Layout.of_segments([8], [[(0, 0, 7)]]), ValueError, "nobody holds token 7 of d"),
        (lambda: Layout.of_segments([8], [[(0, 1, 7)]]), ValueError, "nobody holds token 0"),
        (lambda: Layout.of_segments([8], [[(0, 0, 2)], [(0, 3, 5)]]), ValueError, "token 2"),
        (lambda: Layout.of_segments([8], [[(0, 0, 5)], [(0, 4, 4)]]), ValueError, "two ranks hol"),
        (lambda: Layout.of_segments([8, 1], [[(0, 0, 8)]]), ValueError, "token 0 of document 1"),
        (lambda: Layout.zigzag(8, 2).positions(2), ValueError, "rank must be from 0 to 1, got 2"),
        (lambda: Layout.zigzag(8, 2).indices(-1), ValueError, "rank must be from 0 to 1, got -1"),
        (lambda: Layout.zigzag(8, 2).tokens(2), ValueError, "rank must be from 0 to 1, got 2"),
        (lambda: Layout.zigzag(8, 6).merged(4), ValueError, "divide the number of ranks, 6, go"),
    ],
)
def test_bad_input_is_refused_in_words(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_numbers_of_numpy_are_whole_numbers():
    assert Layout.zigzag(np.int64(8), np.int32(2)) == Layout.zigzag(8, 2)
    assert type(Layout.zigzag_documents(np.array([8, 3]), 2).lengths[1]) is int


def test_shuffled_segments_leave_ranks_empty_and_split_documents():
    """The other tests rely on it."""
    draw = random.Random(0)
    made = [shuffled([20, 0, 9], 8, draw) for _ in range(30)]
    assert any(layout.tokens(rank) == 0 for layout in made for rank in range(8))
    assert any(held != tuple(sorted(held)) for layout in made for held in layout.segments)
