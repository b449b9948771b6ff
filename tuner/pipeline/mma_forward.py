"""The forward on `mma.sync`: the warps of a block, which copy and multiply.

The order is that of `numflash.kernels.mma`: `forward`, and `fp8_forward` on 8-bit floats, whose
blocks first put numbers that all need into shared memory. Blocks share an SM: while the warps of
one wait, those of another work.
"""

from collections.abc import Iterator, Sequence

from numflash.configs import MmaForwardConfig, Traits

from .mma import BLOCK, WARPS, Copies, copies_of
from .steps import REGISTERS, Multiply, Program, Step, Sync, Walk, Work, role


def program(config: MmaForwardConfig, traits: Traits, walks: Sequence[Walk]) -> Program:
    """What a block does for its tile of rows."""
    (walk,) = walks
    stages, tiles = config.num_stages, config.tiles(traits)
    into = ("k_codes", "v_codes") if traits.codes else ("k", "v")
    buffers = {"q": 1} | dict.fromkeys(into, stages)
    rows, columns = config.tile_m, config.tile_n
    # Codes of 8 bits may be float16 in shared memory.
    fetched = 4 // config.operand_bytes if traits.fp8 else 4
    return Program(
        roles={WARPS: role(_steps, walk, stages, copies_of(config, traits), into, traits.fp8)},
        shapes={
            "S": (rows, columns, traits.head_dim),
            "PV": (rows, traits.head_dim_v, columns),
        },
        n_bytes={name: fetched * tiles[name] // count for name, count in buffers.items()},
        scores=rows * columns,
        stored=rows * traits.head_dim_v,
        barriers={BLOCK: 1},
        buffers=buffers,
        is_in_step=True,
    )


def _steps(
    walk: Walk, stages: int, copies: Copies, into: tuple[str, str], fp8: bool
) -> Iterator[Step]:
    (k, v), coded = into, into != ("k", "v")
    if fp8:
        yield Sync(BLOCK)
    if walk.tiles:
        yield from copies.begin("q", 0, 0)
    for stage in range(stages):
        if stage < walk.tiles:
            yield from copies.begin(k, stage, stage)
        yield from copies.commit()
        if stage < stages - 1:
            if stage < walk.tiles:
                yield from copies.begin(v, stage, stage)
            yield from copies.commit()
    for tile in range(walk.tiles):
        stage, ahead = tile % stages, tile + stages - 1
        # Of codes only these have stages: tiles that are decoded have one buffer.
        of_stage = 0 if coded else stage
        yield from copies.arrive(2 * stages - 2)
        if coded:
            yield Work("decode", tile, (k, stage))
        yield Sync(BLOCK)
        if ahead < walk.tiles:
            yield from copies.begin(v, ahead % stages, ahead)
        yield from copies.commit()
        yield Multiply("S", tile, (("q", 0), ("k", of_stage)))
        yield from copies.arrive(2 * stages - 2)
        if coded:
            yield Work("decode", tile, (v, stage))
        yield Sync(BLOCK)
        if tile + stages < walk.tiles:
            yield from copies.begin(k, stage, tile + stages)
        yield from copies.commit()
        if tile in walk.masked:
            yield Work("mask", tile)
        yield Work("max", tile)
        yield Work("exp", tile)
        yield Work("pack", tile)
        yield Multiply("PV", tile, (REGISTERS, ("v", of_stage)))
    yield Work("finish", 0)
