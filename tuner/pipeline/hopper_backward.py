"""The backward on Hopper in one kernel: producer, statistics, consumers, and who adds dQ.

The order is that of `numflash.kernels.wgmma.backward`. A block owns keys and walks over tiles of
queries; turns of blocks that add to the same dQ are taken to have come.
"""

from collections.abc import Iterator, Sequence

from numflash.configs import WARPGROUP_ROWS, Traits
from numflash.configs.wgmma_backward import Sm90BackwardConfig

from .hopper_queries import assist, produce
from .steps import (
    REGISTERS,
    Begin,
    Channel,
    Claim,
    Fill,
    Program,
    Release,
    Send,
    Step,
    Sync,
    Until,
    Wait,
    Walk,
    Work,
    role,
)


def program(config: Sm90BackwardConfig, traits: Traits, walks: Sequence[Walk]) -> Program:
    """What a block does for its tile of keys.

    Raises:
        ValueError: blocks of the config draw their places, in an order that only a run knows.
    """
    if config.persistent:
        raise ValueError(f"blocks of {config} draw places while they run, which is not followed")
    (walk,) = walks
    groups, stages, writers = config.num_warpgroups, config.num_stages, config.dq_groups(traits)
    tiles, rows, tile_m = config.tiles(traits), WARPGROUP_ROWS, config.tile_m
    buffers, columns = config.dq_buffers(traits), config.dq_columns(traits)
    return Program(
        roles={
            **{
                f"WG {group}": role(_consume, walk, group < writers, stages, buffers)
                for group in range(groups)
            },
            "producer": role(produce, walk, stages),
            "statistics": role(assist, walk, stages),
            "adder": role(_add_dq, walk, buffers),
        },
        shapes={
            "S": (rows, tile_m, traits.head_dim),
            "dP": (rows, tile_m, traits.head_dim_v),
            "dV": (rows, traits.head_dim_v, tile_m),
            "dK": (rows, traits.head_dim, tile_m),
            "dQ": (rows, columns, config.tile_n),
        },
        n_bytes={
            "OWNED": 4 * (tiles["k"] + tiles["v"]),
            "Q": 4 * tiles["q"] // stages,
            "DO": 4 * tiles["do"] // stages,
            "DQ": 4 * tiles["dq"] // buffers,
        },
        scores=rows * tile_m,
        stored=rows * columns,
        channels={
            "OWNED": Channel("K and V", 1, 0),
            "Q": Channel("Q", stages, groups),
            "DO": Channel("dO", stages, groups),
            "ROWS": Channel("lse, delta", stages, groups),
            "DQ": Channel("dQ", buffers, 1, writers),
        },
        barriers={"dS complete": groups},
    )


def _consume(walk: Walk, adds: bool, stages: int, buffers: int) -> Iterator[Step]:
    """dK and dV of a warpgroup's keys; `adds` says that it computes dQ."""
    if walk.tiles:
        yield Wait("OWNED", 0)
    for tile in range(walk.tiles):
        stage = tile % stages
        q, do = ("q", stage), ("do", stage)
        yield Wait("Q", stage)
        yield Begin("S", tile, (("k", 0), q))
        if adds and tile:
            yield from _leave_dq(tile - 1, buffers)
        yield Wait("DO", stage)
        yield Begin("dP", tile, (("v", 0), do))
        yield Wait("ROWS", stage)
        yield Until(1)
        if tile in walk.masked:
            yield Work("mask", tile)
        yield Work("exp", tile)
        yield Work("pack", tile)
        yield Begin("dV", tile, (REGISTERS, do))
        yield Until(1)
        yield Work("gradients", tile)
        yield Work("store", tile)
        yield Begin("dK", tile, (REGISTERS, q))
        yield Sync("dS complete")
        if adds:
            yield Begin("dQ", tile, (("ds", tile % 2), ("k", 0)))
        yield Until(2 if adds else 1)
        yield Release("DO", stage)
        yield Until(1 if adds else 0)
        yield Release("Q", stage)
        yield Release("ROWS", stage)
        if adds:
            yield Until(0)
    if adds and walk.tiles:
        yield from _leave_dq(walk.tiles - 1, buffers)
    yield Work("finish", 0)


def _leave_dq(tile: int, buffers: int) -> Iterator[Step]:
    yield Claim("DQ", tile % buffers)
    yield Fill("DQ", tile % buffers, tile, "leave")


def _add_dq(walk: Walk, buffers: int) -> Iterator[Step]:
    """Add dQ of each tile to the sums in global memory."""
    for tile in range(walk.tiles):
        yield Wait("DQ", tile % buffers)
        yield Send("DQ", tile % buffers, tile)
        yield Release("DQ", tile % buffers)
