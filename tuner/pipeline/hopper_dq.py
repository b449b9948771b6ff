"""dQ on Hopper: a block owns queries and walks over tiles of keys.

The order is that of `numflash.kernels.wgmma.backward_dq`.
"""

from collections.abc import Iterator, Sequence

from numflash.configs import WARPGROUP_ROWS, Traits
from numflash.configs.wgmma_backward import Sm90BackwardDqConfig

from .hopper_queries import produce
from .steps import (
    REGISTERS,
    Begin,
    Channel,
    Program,
    Release,
    Step,
    Until,
    Wait,
    Walk,
    Work,
    role,
)


def program(config: Sm90BackwardDqConfig, traits: Traits, walks: Sequence[Walk]) -> Program:
    """What a block does for its tile of queries."""
    (walk,) = walks
    groups, stages, tiles = config.num_warpgroups, config.num_stages, config.tiles(traits)
    rows, tile_n = WARPGROUP_ROWS, config.tile_n
    return Program(
        roles={
            **{f"WG {group}": role(_consume, walk, stages) for group in range(groups)},
            "producer": role(produce, walk, stages, ("K", "V")),
        },
        shapes={
            "S": (rows, tile_n, traits.head_dim),
            "dP": (rows, tile_n, traits.head_dim_v),
            "dQ": (rows, traits.head_dim, tile_n),
        },
        n_bytes={
            "OWNED": 4 * (tiles["q"] + tiles["do"]),
            "K": 4 * tiles["k"] // stages,
            "V": 4 * tiles["v"] // stages,
        },
        scores=rows * tile_n,
        stored=rows * traits.head_dim,
        channels={
            "OWNED": Channel("Q and dO", 1, 0),
            "K": Channel("K", stages, groups),
            "V": Channel("V", stages, groups),
        },
    )


def _consume(walk: Walk, stages: int) -> Iterator[Step]:
    """dQ of a warpgroup's queries."""
    if walk.tiles:
        yield Wait("OWNED", 0)
    for tile in range(walk.tiles):
        stage = tile % stages
        k, v = ("k", stage), ("v", stage)
        yield Wait("K", stage)
        yield Begin("S", tile, (("q", 0), k))
        yield Wait("V", stage)
        yield Begin("dP", tile, (("do", 0), v))
        yield Until(1)
        if tile in walk.masked:
            yield Work("mask", tile)
        yield Work("exp", tile)
        yield Until(0)
        yield Release("V", stage)
        yield Work("gradients", tile)
        yield Begin("dQ", tile, (REGISTERS, k))
        yield Until(0)
        yield Release("K", stage)
    yield Work("finish", 0)
