"""The mask of a page: its counts and squares against scores one by one."""

from xml.etree import ElementTree

import numpy as np
import pytest

from numflash.api.block_masks import BlockMask
from numflash.problem.block_masks import blocks_of_sequences
from numflash.selection.layout import EDGE, EMPTY, WHOLE
from tests.support.drawings import SVG
from tests.support.explained_calls import CALLS, asked, asked_about, asked_arrays, unread
from tests.support.pages import page_faults
from tuner.drawing.document import document
from tuner.drawing.figures import arranged
from tuner.explain.asked import NotShownError
from tuner.explain.facts import mask as facts
from tuner.explain.facts.laid import laid, places_of
from tuner.explain.sections import mask as section

SIZES = [
    ("H200", (1, 300, 2, 64), 500),
    ("A100", (2, 130, 4, 64), 70),
    ("T4", (1, 65, 2, 64), 257),
]
OPTIONS = [
    {},
    {"causal": True},
    {"window_size": (70, 0)},
    {"window_size": (0, 40)},
    {"window_size": (33, 17), "causal_align": "top_left"},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path / "cache"))


def kinds_by_scores(found, rows=None):
    """EMPTY, EDGE or WHOLE of each tile, by asking of each score whether the band leaves it."""
    tiling = found.tiling
    i = np.arange(tiling.rows)[:, None] // tiling.pack
    j = np.arange(tiling.columns)
    seen = (tiling.lo <= j - i) & (j - i <= tiling.hi)
    tile, step = rows or tiling.row_tile, tiling.column_tile
    kinds = np.full((-(-tiling.rows // tile), tiling.column_tiles), EMPTY, np.uint8)
    for m, n in np.ndindex(kinds.shape):
        of_tile = seen[m * tile : (m + 1) * tile, n * step : (n + 1) * step]
        # A tile that reaches beyond the last column has scores to mask.
        is_whole = of_tile.all() and (n + 1) * step <= tiling.columns
        kinds[m, n] = WHOLE if is_whole else EDGE if of_tile.any() else EMPTY
    return kinds


def each_kernel(call):
    return [(call, kernel) for kernel in call.kernels.values() if kernel.is_tiled]


@pytest.mark.parametrize("gpu, shape, keys", SIZES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_counts_squares_and_walk_are_those_of_scores(gpu, shape, keys, options):
    for call, kernel in each_kernel(asked(gpu, shape, seqlen_k=keys, dtype=np.float16, **options)):
        found, mask = laid(call, kernel), facts.find(call, kernel)
        kinds = kinds_by_scores(found)
        visited = np.stack([found.row(n) for n in range(found.tiling.row_tiles)])
        # Kernels visit the last tile also where the band begins in it, beyond the last column.
        beyond = visited > kinds
        assert not beyond[:, :-1].any() and (kinds[beyond] == EMPTY).all()
        kinds[beyond] = EDGE
        counts = [int((kinds == kind).sum()) for kind in (EMPTY, EDGE, WHOLE)]
        assert [mask.empty.value, mask.masked.value, mask.whole.value] == counts
        assert (found.work == (kinds != EMPTY).sum(axis=1)).all()
        assert mask.step == (1, 1) and (mask.squares == kinds).all()
        assert mask.imbalance.value == pytest.approx(found.work.max() / found.work.mean())
        walk = mask.walk
        assert (kinds[walk.row_tile.value, walk.tiles] != EMPTY).all()
        for (_, first, last), of_unit in zip(walk.units, walk.kinds, strict=True):
            rows = last - first + 1
            alone = kinds_by_scores(found, rows)[first // rows] if first % rows == 0 else None
            if alone is not None and not beyond.any():
                assert (of_unit == alone[walk.tiles]).all()


def test_a_square_stands_for_several_tiles():
    call = asked_about("long")
    found, mask = laid(call, call.forward), facts.find(call, call.forward)
    kinds = np.stack([found.row(n) for n in range(found.tiling.row_tiles)])
    assert mask.step == (11, 11) and mask.squares.shape == (47, 47)
    for m, n in np.ndindex(mask.squares.shape):
        square = kinds[11 * m : 11 * (m + 1), 11 * n : 11 * (n + 1)]
        expected = square.min() if square.min() == square.max() else EDGE
        assert mask.squares[m, n] == expected, (m, n)
    assert mask.whole.value == (kinds == WHOLE).sum() == 512 * 511 // 2
    assert mask.work.value[0] == np.arange(1, 12).mean()
    assert -1 in mask.walk.shown and len(mask.walk.shown) == 41


def test_memory_of_a_mask_that_cannot_be_laid_out():
    """32,768 tiles of rows by as many of columns: nothing of that size is made."""
    call = asked("A100", (1, 2**22, 1, 64), causal=True)
    mask = facts.find(call, call.forward)
    assert mask.row_tiles.value * mask.column_tiles.value > 5e8
    assert mask.squares.shape[0] <= facts.MOST_SQUARES


def test_a_split_walks_over_its_share():
    call = asked_about("decode")
    walk = facts.find(call, call.forward).walk
    assert (walk.parts.value, len(walk.tiles)) == (23, 23)
    assert walk.tiles[0] == 11 * 23 and walk.part.value == 11


def test_transposed_for_kernels_that_own_keys():
    call = asked_about("two slots")
    mask = facts.find(call, call.kernels["backward-dkdv"])
    queries = facts.find(call, call.kernels["backward-dq"])
    assert mask.owns_keys and not queries.owns_keys
    assert (np.triu(mask.squares) == mask.squares).all()
    (title, *_) = (figure.title for figure in section.figures(mask))
    assert "transposed" in title


# --- block masks


def block_mask(tiles, batch=1, heads=1, size=128, seqlen=512):
    """A mask of these kinds (0, 1, 2) of blocks, without a function."""
    blocks = blocks_of_sequences((size, size), seqlen, seqlen, batch, heads)

    def lists(kinds):
        entries = np.zeros(kinds.shape, np.int32)
        counts = (kinds > 0).sum(-1).astype(np.int32)
        for place in np.ndindex(kinds.shape[:-1]):
            listed = np.flatnonzero(kinds[place])
            entries[place][: len(listed)] = 2 * listed + (kinds[place][listed] == 2)
        return entries, counts

    return BlockMask(blocks, (seqlen, seqlen), *lists(tiles), *lists(tiles.swapaxes(2, 3)))


@pytest.mark.parametrize("gpu", ["H200", "A100"])
def test_a_block_mask_leaves_tiles_out(gpu):
    tiles = np.random.default_rng(0).integers(0, 3, (1, 4, 4, 4))
    options = {"causal": True, "block_mask": block_mask(tiles, heads=4), "dtype": np.float16}
    for call, kernel in each_kernel(asked(gpu, (1, 512, 4, 64), data=True, **options)):
        found = laid(call, kernel)
        of_head = tiles[0].swapaxes(1, 2) if found.owns_keys else tiles[0]
        band = kinds_by_scores(found)
        m, n = 128 // found.tiling.row_tile, 128 // found.tiling.column_tile
        kinds = [np.minimum(head.repeat(m, 0).repeat(n, 1), band) for head in of_head]
        assert (found.kinds == kinds[0]).all()
        at, visited = places_of(found, 4)
        for head, row in np.ndindex(4, found.tiling.row_tiles):
            shares = visited[(at.head == head) & (at.start == row * found.tiling.row_tile)]
            assert shares.sum() == (kinds[head][row] != EMPTY).sum()
            assert len(shares) == found.splits and sorted(shares, reverse=True) == list(shares)
        assert facts.find(call, kernel).notes == ["of batch entry 0, head 0"]


def test_a_block_mask_that_is_not_read():
    mask = block_mask(np.ones((1, 1, 4, 4), int))
    call = asked("H200", (1, 512, 4, 64), block_mask=mask)
    (note,) = facts.find(call, call.forward).notes
    assert "not read" in note


def test_a_mask_that_is_empty_has_no_walk():
    mask = block_mask(np.zeros((1, 1, 4, 4), int))
    call = asked("H200", (1, 512, 4, 64), data=True, block_mask=mask)
    found = facts.find(call, call.forward)
    assert found.walk is None and found.empty.value == 16
    assert page_faults(document("page", arranged(section.figures(found)))) == []


# --- sequences with lengths of their own


def test_lengths_that_are_read():
    ends = np.array([0, 100, 1124, 1200], np.int32)
    arrays = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "layout": "thd"}
    call = packed(data=True, **arrays)
    for kernel in (kernel for _, kernel in each_kernel(call)):
        found = laid(call, kernel)
        assert found.tiling.rows == 1024 * found.tiling.pack
        (note,) = found.notes
        assert note == "of sequence 1 of 3, the largest: 1,024 queries, 1,024 keys"
        at, tiles = places_of(found, 4)
        assert set(at.head // 4) == {0, 1, 2} and (tiles > 0).all()
    unread = laid(packed(**arrays), call.forward).notes
    assert "lengths were not read" in unread[1]


def packed(data=False, **options):
    x = unread((1200, 4, 64), np.float16)
    return asked_arrays("H200", {"q": x, "k": x, "v": x}, data, causal=True, **options)


# --- drawn


@pytest.mark.parametrize("name", CALLS)
def test_figures_have_no_faults(name):
    call = asked_about(name)
    for kernel in (kernel for _, kernel in each_kernel(call)):
        try:
            mask = facts.find(call, kernel)
        except NotShownError as reason:
            assert name == "no keys" and "no scores" in str(reason)
            continue
        found = section.figures(mask)
        text = document("page", arranged(found))
        assert page_faults(text, most_bytes=60_000) == []
        shown = " ".join("".join(ElementTree.fromstring(text[16:]).itertext()).split())
        for number in (mask.whole, mask.masked, mask.empty):
            assert f"({number})" in shown
        squares = ElementTree.fromstring(found[0].svg)
        runs = {e.get("class"): e.get("d") for e in squares.iter(SVG + "path")}
        assert bool(runs["edge"]) == bool(mask.masked.value)
