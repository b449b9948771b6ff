"""dK and dV on Hopper, by warpgroups that own keys, or by roles.

The order is that of `numflash.kernels.wgmma.backward_dkdv` and of `roles`.
"""

from collections.abc import Iterator, Sequence

from numflash.configs import WARPGROUP_ROWS, Traits
from numflash.configs.wgmma_backward import Sm90BackwardDkDvConfig

from .hopper_queries import assist, produce
from .steps import (
    REGISTERS,
    Begin,
    Channel,
    Fill,
    Program,
    Release,
    Step,
    Until,
    Wait,
    Walk,
    Work,
    role,
)


def program(config: Sm90BackwardDkDvConfig, traits: Traits, walks: Sequence[Walk]) -> Program:
    """What a block does for its tile of keys."""
    (walk,) = walks
    groups, stages, tiles = config.num_warpgroups, config.num_stages, config.tiles(traits)
    rows, tile_m = WARPGROUP_ROWS, config.tile_m
    multiply = [_own_dv, _own_dk] if config.roles else [_consume] * groups
    channels = {
        "OWNED": Channel("K and V", 1, 0),
        "Q": Channel("Q", stages, groups),
        "DO": Channel("dO", stages, groups),
        "ROWS": Channel("lse, delta", stages, groups),
    }
    if config.roles:
        channels["P"] = Channel("P", stages, 0)
    return Program(
        roles={
            **{f"WG {i}": role(steps, walk, stages) for i, steps in enumerate(multiply)},
            "producer": role(produce, walk, stages),
            "statistics": role(assist, walk, stages),
        },
        shapes={
            "S": (rows, tile_m, traits.head_dim),
            "dP": (rows, tile_m, traits.head_dim_v),
            "dV": (rows, traits.head_dim_v, tile_m),
            "dK": (rows, traits.head_dim, tile_m),
        },
        n_bytes={
            "OWNED": 4 * (tiles["k"] + tiles["v"]),
            "Q": 4 * tiles["q"] // stages,
            "DO": 4 * tiles["do"] // stages,
        },
        scores=rows * tile_m,
        stored=rows * max(traits.head_dim, traits.head_dim_v),
        channels=channels,
    )


def _consume(walk: Walk, stages: int) -> Iterator[Step]:
    """dK and dV of a warpgroup's keys."""
    if walk.tiles:
        yield Wait("OWNED", 0)
    for tile in range(walk.tiles):
        stage = tile % stages
        q, do = ("q", stage), ("do", stage)
        yield Wait("Q", stage)
        yield Begin("S", tile, (("k", 0), q))
        yield Wait("DO", stage)
        yield Begin("dP", tile, (("v", 0), do))
        yield Wait("ROWS", stage)
        yield Until(1)
        yield from _probabilities(walk, tile)
        yield Begin("dV", tile, (REGISTERS, do))
        yield Until(1)
        yield Work("gradients", tile)
        yield Begin("dK", tile, (REGISTERS, q))
        yield Until(1)
        yield Release("DO", stage)
        yield Until(0)
        yield Release("Q", stage)
        yield Release("ROWS", stage)
    yield Work("finish", 0)


def _own_dv(walk: Walk, stages: int) -> Iterator[Step]:
    """dV, by the first of two roles; P of each tile is left for the second."""
    if walk.tiles:
        yield Wait("OWNED", 0)
    for tile in range(walk.tiles):
        stage = tile % stages
        yield Wait("Q", stage)
        yield Begin("S", tile, (("k", 0), ("q", stage)))
        yield Wait("ROWS", stage)
        yield Until(0)
        yield from _probabilities(walk, tile)
        yield Wait("DO", stage)
        yield Begin("dV", tile, (REGISTERS, ("do", stage)))
        yield Fill("P", stage, tile, "store")
        yield Until(0)
        yield Release("DO", stage)
        yield Release("Q", stage)
        yield Release("ROWS", stage)
    yield Work("finish", 0)


def _own_dk(walk: Walk, stages: int) -> Iterator[Step]:
    """dK, by the second of two roles, with the P of the first."""
    if walk.tiles:
        yield Wait("OWNED", 0)
    for tile in range(walk.tiles):
        stage = tile % stages
        yield Wait("DO", stage)
        yield Begin("dP", tile, (("v", 0), ("do", stage)))
        yield Wait("P", stage)
        yield Work("store", tile)
        yield Until(0)
        yield Work("gradients", tile)
        yield Wait("Q", stage)
        yield Begin("dK", tile, (REGISTERS, ("q", stage)))
        yield Until(0)
        yield Release("Q", stage)
        yield Release("DO", stage)
        yield Release("ROWS", stage)
    yield Work("finish", 0)


def _probabilities(walk: Walk, tile: int) -> Iterator[Step]:
    if tile in walk.masked:
        yield Work("mask", tile)
    yield Work("exp", tile)
    yield Work("pack", tile)
