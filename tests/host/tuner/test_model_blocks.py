"""The offline model of block masks whose lists were read, against every score and every turn."""

from dataclasses import replace

import numpy as np
import pytest

import numflash
from numflash.configs import parse_config
from numflash.problem.classes import ProblemClass
from numflash.selection.layout import EDGE, EMPTY, WHOLE
from tests.host.tuner.test_hopper_backward import tile_by_tile, tiles_of
from tests.support.explained_calls import asked
from tuner import model
from tuner.model import grid, hopper_backward, turns
from tuner.model.kept import Kept
from tuner.space import machines

H100 = machines.find("H100")
ONE = "sm90-m64n128w8s2"
KERNELS = (
    ("forward", "sm80-m64n32w4s1-unpacked"),
    ("forward", "sm80-m16n64w1s1x3-unpacked"),
    ("forward", "sm90-m128n64w8s2-overlap-persistent"),
    ("backward-dq", "sm80-m64n32w4s1"),
    ("backward-dkdv", "sm80-m64n64w4s1-apart"),
    ("backward-dkdv", "sm90-m64n128w8s2"),
    ("backward", "sm80-m32n64w4s1x2"),
    ("backward", ONE),
)


def problem_class(family, mask="full", seqlen=512, heads=4, group=1, size=128):
    traits = f"float16-d64-dv64-vec-blocks{size}x{size}"
    text = f"{family} {traits} {mask} q{seqlen} k{seqlen} bh{heads} g{group}"
    return ProblemClass.parse(text)


def random_kinds(batch, heads, rows=4, seed=0):
    return np.random.default_rng(seed).integers(0, 3, (batch, heads, rows, rows)).astype(np.uint8)


def scores_of(problem, kept):
    """(lists, queries, keys) of what is computed, by the band and by blocks."""
    n = problem.seqlen_q
    i, j = np.arange(n)[:, None], np.arange(n)
    low, high = grid.band(problem)
    m = kept.size[0]
    blocks = (kept.kinds != EMPTY).reshape(-1, *kept.kinds.shape[2:])
    return blocks.repeat(m, 1).repeat(m, 2) & (low <= j - i) & (j - i <= high)


@pytest.mark.parametrize("mask", ["full", "causal", "window256"])
@pytest.mark.parametrize("lists", [(1, 1), (2, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize(("family", "text"), KERNELS, ids=str)
def test_tiles_of_lists_are_those_with_a_score(family, text, mask, lists):
    problem, config = problem_class(family, mask, heads=8), parse_config(family, text)
    kept = Kept(random_kinds(*lists), (128, 128))
    laid, scores = grid.lay(problem, config, kept), scores_of(problem, kept)
    by_keys = family in ("backward", "backward-dkdv")
    scores = scores.swapaxes(1, 2) if by_keys else scores
    rows, columns = grid.rows_of(config), config.column_tile
    cut = scores.reshape(len(scores), -1, rows, 512 // columns, columns)
    of_rows = cut.any(axis=(2, 4)).sum(-1)
    assert laid.walks.total == of_rows.sum()
    blocks = 8 * len(of_rows[0]) * (1 + getattr(config, "apart", False))
    if not getattr(config, "num_splits", 1) > 1:
        assert laid.blocks == blocks
        assert laid.walks.tiles.tolist() == sorted(of_rows.ravel().tolist(), reverse=True)
    assert grid.visible_scores(problem, kept) == scores.sum() * 8 // len(scores)


def test_edges_are_tiles_of_blocks_in_part_or_on_the_band():
    kinds = np.array([[WHOLE, EMPTY], [EDGE, WHOLE]], np.uint8)[None, None]
    problem, config = problem_class("backward-dq", seqlen=256), parse_config(*KERNELS[3])
    of_full, of_band = (
        grid.lay(replace(problem, mask=mask), config, Kept(kinds, (128, 128))).walks.edges
        for mask in ("full", "causal")
    )
    # 4 blocks of 64 queries: 8 tiles of 32 keys of the block in part, 8 on the diagonal.
    assert of_full == 8 / 4 and of_band == 16 / 4


@pytest.mark.parametrize(("lists", "group"), [((1, 1), 1), ((1, 1), 2), ((2, 1), 1), ((1, 2), 1)])
def test_turns_are_those_of_the_lists(monkeypatch, lists, group):
    """What `predict` plays, against the tiles with a score, one after the other."""
    problem = problem_class("backward", "causal", seqlen=1024, heads=4 * group, group=group)
    kept = Kept(random_kinds(*lists, rows=8, seed=3), (128, 128))
    played, clocks_of = [], turns.clocks_of

    def spied(walks, *more):
        played.append((walks, more, clocks_of(walks, *more)))
        return played[-1][-1]

    monkeypatch.setattr(turns, "clocks_of", spied)
    model.estimate(H100, problem, parse_config("backward", ONE), kept)
    ((walks, (repeats, heads, sms, *times, buffers, _, _), found),) = played
    tiles = scores_of(problem, kept).reshape(-1, 16, 64, 8, 128).any(axis=(2, 4))
    last_first = [[np.flatnonzero(row).tolist() for row in each.T[::-1]] for each in tiles]
    by_head = [tiles_of(walks)[head * len(walks) // heads] for head in range(heads)]
    entries = [head * lists[0] // heads * lists[1] + head % lists[1] for head in range(heads)]
    assert by_head == [last_first[entry] for entry in entries]
    assert (repeats, heads) == (group, 4)
    assert found == pytest.approx(tile_by_tile(by_head, repeats, heads, sms, *times, buffers))


@pytest.mark.parametrize(("family", "text"), KERNELS, ids=str)
@pytest.mark.parametrize("mask", ["causal", "window1024"])
def test_a_band_in_lists_takes_as_long_as_the_band(family, text, mask):
    machine = H100 if "sm90" in text else machines.find("A100")
    problem, config = problem_class(family, mask, 8192, 32), parse_config(family, text)
    band = model.estimate(machine, problem, config).ms
    i, j = np.arange(64)[:, None], np.arange(64)
    distance = 0 if mask == "causal" else 8
    edge, seen = (j == i) | (j == i - distance), (j <= i) & (j >= i - (distance or 64))
    kinds = np.where(seen, np.where(edge, EDGE, WHOLE), EMPTY).astype(np.uint8)[None, None]
    listed = model.estimate(
        machine, replace(problem, mask="full"), config, Kept(kinds, (128, 128))
    ).ms
    # Of a list the whole blocks of an edge are visited.
    assert 0.97 * band < listed < (1.1 if mask == "causal" else 1.25) * band


def test_all_blocks_kept_are_no_block_mask():
    kept = Kept(np.full((1, 1, 32, 32), WHOLE, np.uint8), (128, 128))
    for family, text in KERNELS:
        machine = H100 if "sm90" in text else machines.find("A100")
        problem, config = problem_class(family, "causal", 4096, 16), parse_config(family, text)
        times = [model.estimate(machine, problem, config, each).ms for each in (kept, None)]
        assert times[0] == pytest.approx(times[1], rel=0.01)
        assert grid.visible_scores(problem, kept) == grid.visible_scores(problem)
        floors = [model.floor_ms(machine, problem, each) for each in (kept, None)]
        assert floors[0] == floors[1]


def test_blocks_that_share_no_tiles_do_not_wait():
    """Documents of one block of keys each; and columns of blocks, in which all wait."""
    problem, config = (
        problem_class("backward", seqlen=8192, heads=16),
        parse_config("backward", ONE),
    )
    form = hopper_backward.form_of(H100, config, problem)
    waits = []
    for kinds in (np.eye(64), np.arange(64)[:, None] * np.ones(64) < 4):
        kept = Kept((2 * kinds).astype(np.uint8)[None, None], (128, 128))
        ms, alone = (
            hopper_backward.predict_form(H100, problem, each, kept=kept).ms
            for each in (form, replace(form, order=None))
        )
        waits.append(ms / alone)
    assert waits[0] < 1.05 and waits[1] > 1.2


def test_a_call_that_is_explained_has_the_time_of_its_lists():
    tiles = np.eye(16, dtype=bool)
    mask = numflash.BlockMask.from_tiles(tiles, block_size=128)
    read, unread = (
        asked("H200", (1, 2048, 8, 128), block_mask=mask, data=data) for data in (True, False)
    )
    assert (read.kept.kinds[0, 0] == 2 * tiles).all() and unread.kept is None
    assert read.forward.prediction.ms < 0.7 * unread.forward.prediction.ms
