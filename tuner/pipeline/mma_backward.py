"""The backward on `mma.sync`: in two kernels, or in one.

The order is that of `numflash.kernels.mma`: `backward_dq`, `backward_dkdv` and `backward`.
"""

from collections.abc import Iterator, Sequence

from numflash.configs import MmaConfig, Traits

from .mma import BLOCK, WARPS, Copies, copies_of, only_tile_arrives, tile_arrives
from .steps import REGISTERS, Multiply, Program, Step, Sync, Walk, Work, role


def dq_program(config: MmaConfig, traits: Traits, walks: Sequence[Walk]) -> Program:
    """What a block does for its tile of queries."""
    (walk,) = walks
    steps = role(_dq, walk, config.num_stages, copies_of(config, traits))
    shapes = {"dQ": (config.tile_m, traits.head_dim, config.tile_n)}
    return _program(config, traits, steps, shapes, walked=("k", "v"))


def dkdv_program(config: MmaConfig, traits: Traits, walks: Sequence[Walk]) -> Program:
    """What a block does for its tile of keys; with `apart` a block that computes dK."""
    (walk,) = walks
    steps = role(_dkdv, walk, config.num_stages, copies_of(config, traits), not config.apart)
    shapes = {"dK": (config.tile_n, traits.head_dim, config.tile_m)}
    if not config.apart:
        shapes["dV"] = (config.tile_n, traits.head_dim_v, config.tile_m)
    return _program(config, traits, steps, shapes, walked=("q", "do"))


def fused_program(config: MmaConfig, traits: Traits, walks: Sequence[Walk]) -> Program:
    """What a block does for all tiles of keys of its split, one `Walk` for each."""
    steps = role(_fused, walks, config.num_stages, copies_of(config, traits))
    shapes = {
        "dK": (config.tile_n, traits.head_dim, config.tile_m),
        "dV": (config.tile_n, traits.head_dim_v, config.tile_m),
        "dQ": (config.tile_m, traits.head_dim, config.tile_n),
    }
    return _program(config, traits, steps, shapes, walked=("q", "do"))


def _program(
    config: MmaConfig, traits: Traits, steps, shapes: dict, walked: tuple[str, str]
) -> Program:
    """With the products that all have; `walked` are the tiles that come one after another."""
    tiles = config.tiles(traits)
    buffers = {name: config.num_stages if name in walked else 1 for name in ("q", "do", "k", "v")}
    rows, columns = config.tile_m, config.tile_n
    return Program(
        roles={WARPS: steps},
        shapes={
            "S": (rows, columns, traits.head_dim),
            "dP": (rows, columns, traits.head_dim_v),
            **shapes,
        },
        n_bytes={name: 4 * tiles[name] // count for name, count in buffers.items()},
        scores=rows * columns,
        stored=rows * traits.head_dim,
        barriers={BLOCK: 1},
        buffers=buffers,
        is_in_step=True,
    )


def _dq(walk: Walk, stages: int, copies: Copies) -> Iterator[Step]:
    if walk.tiles:
        yield from copies.begin("q", 0, 0)
        yield from copies.begin("do", 0, 0)
    for tile in range(stages - 1):
        yield from _fetch(copies, ("k", "v"), tile, stages, walk.tiles)
    for tile in range(walk.tiles):
        stage = tile % stages
        yield from tile_arrives(copies, stages)
        yield from _fetch(copies, ("k", "v"), tile + stages - 1, stages, walk.tiles)
        yield from only_tile_arrives(copies, stages)
        yield Multiply("S", tile, (("q", 0), ("k", stage)))
        yield Multiply("dP", tile, (("do", 0), ("v", stage)))
        if tile in walk.masked:
            yield Work("mask", tile)
        yield Work("exp", tile)
        yield Work("gradients", tile)
        yield Multiply("dQ", tile, (REGISTERS, ("k", stage)))
    yield Work("finish", 0)


def _fetch(
    copies: Copies, names: tuple[str, str], tile: int, stages: int, tiles: int
) -> Iterator[Step]:
    """Both matrices of a tile, if there is one, as a group of copies."""
    if tile < tiles:
        for name in names:
            yield from copies.begin(name, tile % stages, tile)
    yield from copies.commit()


def _dkdv(walk: Walk, stages: int, copies: Copies, with_dv: bool) -> Iterator[Step]:
    if walk.tiles or not copies.asynchronous:
        yield from copies.begin("k", 0, 0)
        yield from copies.begin("v", 0, 0)
    yield from _over_queries(walk, stages, copies, with_dv, with_dq=False)
    yield Work("finish", 0)


def _fused(walks: Sequence[Walk], stages: int, copies: Copies) -> Iterator[Step]:
    for walk in walks:
        yield Sync(BLOCK)
        if walk.tiles:
            yield from copies.begin("k", 0, 0)
            yield from copies.begin("v", 0, 0)
        yield from _over_queries(walk, stages, copies, with_dv=True, with_dq=True)
        yield Work("finish", 0)


def _over_queries(
    walk: Walk, stages: int, copies: Copies, with_dv: bool, with_dq: bool
) -> Iterator[Step]:
    """The walk of a block that owns keys."""
    for tile in range(1 - stages, walk.tiles):
        stage = tile % stages
        if tile >= 0:
            yield from tile_arrives(copies, stages)
        yield from _fetch(copies, ("q", "do"), tile + stages - 1, stages, walk.tiles)
        if tile < 0:
            continue
        yield from only_tile_arrives(copies, stages)
        yield Multiply("S", tile, (("k", 0), ("q", stage)))
        yield Multiply("dP", tile, (("v", 0), ("do", stage)))
        if tile in walk.masked:
            yield Work("mask", tile)
        yield Work("exp", tile)
        yield Work("gradients", tile)
        if with_dq:
            yield Work("store", tile)
        if with_dv:
            yield Multiply("dV", tile, (REGISTERS, ("do", stage)))
        yield Multiply("dK", tile, (REGISTERS, ("q", stage)))
        if with_dq:
            yield Sync(BLOCK)
            yield Multiply("dQ", tile, (("ds", 0), ("k", 0)))
            yield Work("leave", tile)
