"""The forward on Hopper on 8-bit floats: how a warpgroup attends to codes.

The order is that of `numflash.kernels.wgmma.fp8_forward.attend`. A stage holds one tile of keys or
two; without overlap O is added in parts of its columns, each waited for. Where keys have scales of
their own, warps beside the producer bring those of a stage (`key_scales`).
"""

from collections.abc import Iterator, Sequence

from numflash.configs import WARPGROUP_ROWS, Sm90Fp8ForwardConfig, Traits

from .ring import Ring
from .steps import REGISTERS, Begin, Claim, Fill, Release, Step, Until, Wait, Walk, Work


def fp8_shapes(config: Sm90Fp8ForwardConfig, traits: Traits) -> dict[str, tuple[int, int, int]]:
    """(rows, columns, depth) of S and of a part of P V."""
    return {
        "S": (WARPGROUP_ROWS, config.tile_n, traits.head_dim),
        "PV": (WARPGROUP_ROWS, config.part_columns(traits), config.tile_n),
    }


def fetch_scales(config: Sm90Fp8ForwardConfig, walks: Sequence[Walk]) -> Iterator[Step]:
    """The scales of each stage of keys: read before there is room for them."""
    ring = Ring(config)
    for walk in walks:
        for _ in range(walk.tiles):
            yield Work("statistics", ring.tile)
            yield Claim("SCALES", ring.k)
            yield Fill("SCALES", ring.k, ring.tile, "place")
            ring.advance()


def attend_to_codes(
    config: Sm90Fp8ForwardConfig,
    traits: Traits,
    ring: Ring,
    turns,
    group: int,
    stages: int,
    masked: set[int],
) -> Iterator[Step]:
    """O += weights * (P V) over the tiles of some stages of keys."""
    per_stage = config.stage_n // config.tile_n
    parts, last = traits.head_dim_v // config.part_columns(traits), per_stage - 1

    def begin_s(number):
        yield Wait("K", ring.k)
        yield Begin("S", number, (("q", group), ("k", ring.k)))

    def add_tile(v, number):
        for _ in range(parts):
            yield Begin("PV", number, (REGISTERS, ("v", v)))
            yield Until(0)

    def softmax(number, tile):
        if traits.key_scales:
            yield Wait("SCALES", ring.k)
            yield Work("scale", number)
        if ring.tile in masked:
            yield Work("mask", number)
        yield Work("max", number)
        yield Work("exp", number)
        if traits.key_scales and tile == last:
            yield Release("SCALES", ring.k)

    number, tile = ring.tile * per_stage, 0
    yield from turns.take()
    yield from begin_s(number)
    yield from turns.give()
    yield Until(0)
    if tile == last:
        yield Release("K", ring.k)
    yield from softmax(number, tile)
    yield Work("pack", number)
    for _ in range(1, stages * per_stage):
        v, v_tile, before = ring.v, tile, number
        number += 1
        if tile == last:
            tile = 0
            ring.advance()
        else:
            tile += 1
        yield from turns.take()
        if config.overlap:
            yield from begin_s(number)
        yield Wait("V", v)
        if config.overlap:
            yield Begin("PV", before, (REGISTERS, ("v", v)))
        else:
            yield from add_tile(v, before)
            if v_tile == last:
                yield Release("V", v)
            yield from begin_s(number)
        yield from turns.give()
        yield Until(1 if config.overlap else 0)
        if tile == last:
            yield Release("K", ring.k)
        yield from softmax(number, tile)
        if config.overlap:
            yield Until(0)
            yield Release("V", v)
        yield Work("pack", number)
    yield Wait("V", ring.v)
    yield from add_tile(ring.v, number)
    yield Release("V", ring.v)
    ring.advance()
