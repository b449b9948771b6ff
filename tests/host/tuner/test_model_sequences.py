"""The offline model of sequences with lengths of their own, against each sequence by itself."""

from dataclasses import replace

import pytest

from numflash.configs import parse_config
from numflash.problem.classes import ProblemClass
from tuner import model
from tuner.lengths import sequences_of
from tuner.model import errors, grid
from tuner.space import machines

ALONE = ProblemClass.parse("forward float16-d64-dv64-vec full q1 k1 bh1 g1")


@pytest.mark.parametrize("mask", ["full", "causal", "window16"])
@pytest.mark.parametrize(("q", "k"), [(64, 64), (33, 97), (1, 512)])
def test_tiles_of_sequences_are_those_of_each(mask, q, k):
    problem = ProblemClass.parse("forward float16-d64-dv64-vec-ragged full q1 k1 bh256 g2")
    problem = replace(problem, mask=mask, seqlen_q=q, seqlen_k=k)
    alone = [
        replace(ALONE, mask=mask, seqlen_q=a, seqlen_k=b)
        for a, b in zip(*sequences_of(problem), strict=True)
    ]
    assert len(alone) == 8
    for m, n in ((64, 32), (16, 48)):
        config = parse_config("forward", f"sm80-m{m}n{n}w1s1-unpacked")
        laid, each = grid.lay(problem, config), [grid.lay(a, config) for a in alone]
        tiles = sorted((t for one in each for t in one.walks.tiles.tolist()), reverse=True)
        assert laid.walks.tiles.tolist() == tiles and (laid.heads, laid.entries) == (32, 8)
        edges = sum(one.walks.edges * len(one.walks.tiles) for one in each)
        assert laid.walks.edges == pytest.approx(edges / len(tiles))
        config = parse_config("backward-dkdv", f"sm80-m{m}n{n}w1s1")
        back = replace(problem, family="backward-dkdv")
        laid = grid.lay(back, config)
        each = [grid.lay(replace(a, family="backward-dkdv", group_size=1), config) for a in alone]
        tiles = sorted((2 * t for one in each for t in one.walks.tiles.tolist()), reverse=True)
        assert laid.walks.tiles.tolist() == tiles and laid.heads == 16
    assert grid.visible_scores(problem) == 32 * sum(map(grid.visible_scores, alone))


def test_splits_of_sequences_even_the_walks_and_leave_parts():
    text = "forward float16-d64-dv64-vec-ragged-paged full q1 k65536 bh256 g8 p16"
    problem = ProblemClass.parse(text)
    whole = grid.lay(problem, parse_config("forward", "sm80-m16n64w1s1"))
    split = grid.lay(problem, parse_config("forward", "sm80-m16n64w1s1x2"))
    assert whole.walks.most == 1024 and whole.parts == 0
    assert split.walks.most < 128 and split.walks.total == whole.walks.total
    assert 2 < split.parts <= len(split.walks.tiles) / 8
    # Fewer bytes than there is room for, as sequences do not fill it.
    room = 4 * 8 * 65536 * 128 * 2
    assert 0.1 * room < grid.io_bytes(problem) < 0.8 * room


@pytest.mark.parametrize("device", ["NVIDIA H200", "NVIDIA A100-SXM4-80GB"])
def test_sequences_cost_about_what_equal_ones_of_their_work_would(device):
    machine = machines.find(device)
    text = "float16-d128-dv128-vec{} causal q1024 k1024 bh512 g1"
    for family, config in (
        ("forward", "sm80-m128n64w4s1"),
        ("backward-dq", "sm80-m64n64w4s1"),
        ("backward-dkdv", "sm80-m64n64w4s1"),
    ):
        classes = [ProblemClass.parse(f"{family} {text.format(x)}") for x in ("-ragged", "")]
        uneven, even = (
            model.estimate(machine, p, parse_config(family, config)).ms for p in classes
        )
        work = grid.visible_scores(classes[0]) / grid.visible_scores(classes[1])
        assert 1.3 < work < 3 and 0.75 * work < uneven / even < 1.25 * work


def test_nobody_has_compared_the_model_on_sequences():
    machine, config = machines.find("A100"), parse_config("forward", "sm80-m64n64w4s1")
    ragged = ProblemClass.parse("forward float16-d64-dv64-vec-ragged full q64 k64 bh64 g1")
    dense = replace(ragged, traits=replace(ragged.traits, ragged=False))
    assert errors.error(machine, ragged, config) == errors.UNKNOWN
    assert errors.error(machine, dense, config) < errors.UNKNOWN
