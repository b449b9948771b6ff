"""The portable kernels: on the FMA units, with one buffer of everything.

The order is that of `numflash.kernels.portable`: `forward`, `backward_dq` and `backward_dkdv`.
Tiles come through registers. Probabilities go through shared memory to the lanes of their own
warp.
"""

from collections.abc import Callable, Iterator, Sequence

from numflash.configs import Config, Traits

from .mma import BLOCK, WARPS
from .steps import Load, Multiply, Program, Step, Sync, Walk, Work, role


def forward_program(config: Config, traits: Traits, walks: Sequence[Walk]) -> Program:
    """What a block does for its tile of rows."""
    shapes = {"PV": (config.tile_m, traits.head_dim_v, config.tile_n)}
    return _program(config, traits, role(_forward, *walks), shapes, ("q", "k", "v"))


def dq_program(config: Config, traits: Traits, walks: Sequence[Walk]) -> Program:
    """What a block does for its tile of queries."""
    shapes = {
        "dP": (config.tile_m, config.tile_n, traits.head_dim_v),
        "dQ": (config.tile_m, traits.head_dim, config.tile_n),
    }
    return _program(config, traits, role(_dq, *walks), shapes, ("q", "do", "k", "v"))


def dkdv_program(config: Config, traits: Traits, walks: Sequence[Walk]) -> Program:
    """What a block does for its tile of keys."""
    shapes = {
        "dP": (config.tile_n, config.tile_m, traits.head_dim_v),
        "dV": (config.tile_n, traits.head_dim_v, config.tile_m),
        "dK": (config.tile_n, traits.head_dim, config.tile_m),
    }
    return _program(config, traits, role(_dkdv, *walks), shapes, ("k", "v", "q", "do"))


def _program(
    config: Config,
    traits: Traits,
    steps: Callable[[], Iterator[Step]],
    shapes: dict[str, tuple[int, int, int]],
    loaded: tuple[str, ...],
) -> Program:
    rows, columns = config.tile_m, config.tile_n
    of_queries = ("q", "do")
    wide = {"q": traits.head_dim, "k": traits.head_dim}
    return Program(
        roles={WARPS: steps},
        shapes={"S": (rows, columns, traits.head_dim), **shapes},
        n_bytes={
            name: traits.dtype_bytes
            * (rows if name in of_queries else columns)
            * wide.get(name, traits.head_dim_v)
            for name in loaded
        },
        scores=rows * columns,
        stored=rows * traits.head_dim_v,
        barriers={BLOCK: 1},
        buffers=dict.fromkeys(loaded, 1),
        unit="FMA",
        is_in_step=True,
    )


def _tile(names: tuple[str, str], tile: int) -> Iterator[Step]:
    """The matrices of a tile, once all have read those before, and until all have arrived."""
    yield Sync(BLOCK)
    for name in names:
        yield Load(name, 0, tile)
    yield Sync(BLOCK)


def _forward(walk: Walk) -> Iterator[Step]:
    yield Load("q", 0, 0)
    for tile in range(walk.tiles):
        yield from _tile(("k", "v"), tile)
        yield Multiply("S", tile, (("q", 0), ("k", 0)))
        if tile in walk.masked:
            yield Work("mask", tile)
        yield Work("max", tile)
        yield Work("exp", tile)
        yield Work("store", tile)
        yield Multiply("PV", tile, (("p", 0), ("v", 0)))
    yield Work("finish", 0)


def _dq(walk: Walk) -> Iterator[Step]:
    yield Load("q", 0, 0)
    yield Load("do", 0, 0)
    for tile in range(walk.tiles):
        yield from _tile(("k", "v"), tile)
        yield Multiply("S", tile, (("q", 0), ("k", 0)))
        yield Multiply("dP", tile, (("do", 0), ("v", 0)))
        if tile in walk.masked:
            yield Work("mask", tile)
        yield Work("exp", tile)
        yield Work("gradients", tile)
        yield Work("store", tile)
        yield Multiply("dQ", tile, (("p", 0), ("k", 0)))
    yield Work("finish", 0)


def _dkdv(walk: Walk) -> Iterator[Step]:
    yield Load("k", 0, 0)
    yield Load("v", 0, 0)
    for tile in range(walk.tiles):
        yield from _tile(("q", "do"), tile)
        yield Multiply("S", tile, (("k", 0), ("q", 0)))
        yield Multiply("dP", tile, (("v", 0), ("do", 0)))
        if tile in walk.masked:
            yield Work("mask", tile)
        yield Work("exp", tile)
        yield Work("gradients", tile)
        yield Work("store", tile)
        yield Multiply("dV", tile, (("p", 0), ("do", 0)))
        yield Work("store", tile)
        yield Multiply("dK", tile, (("p", 0), ("q", 0)))
    yield Work("finish", 0)
