"""The forward on Hopper: a producer that fetches, warpgroups that consume.

The order is that of `numflash.kernels.wgmma`: `producer`, `skeleton` around `forward.attend`. On
8-bit floats `fp8_forward` attends.
"""

from collections.abc import Callable, Iterator, Sequence

from numflash.configs import WARPGROUP_ROWS, Sm90ForwardConfig, Traits

from .hopper_fp8 import attend_to_codes, fetch_scales, fp8_shapes
from .ring import Ring
from .steps import (
    REGISTERS,
    Arrive,
    Begin,
    Channel,
    Claim,
    Fetch,
    Program,
    Release,
    Step,
    Sync,
    Until,
    Wait,
    Walk,
    Work,
    role,
)


def program(config: Sm90ForwardConfig, traits: Traits, walks: Sequence[Walk]) -> Program:
    """What a block does for tiles of rows, one `Walk` over stages of keys for each."""
    groups, attend = config.num_warpgroups, attend_to_codes if traits.fp8 else _attend
    roles: dict[str, Callable[[], Iterator[Step]]] = {
        f"WG {group}": role(_consume, config, traits, walks, group, attend)
        for group in range(groups)
    }
    roles["producer"] = role(_produce, config, walks)
    channels = {
        "Q": Channel("Q", groups),
        "K": Channel("K", config.num_stages, groups),
        "V": Channel("V", config.stages_of_v, groups),
    }
    if traits.key_scales:
        roles["scales"] = role(fetch_scales, config, walks)
        channels["SCALES"] = Channel("scales", config.num_stages, groups)
    rows, columns, tiles = WARPGROUP_ROWS, config.tile_n, config.tiles(traits)
    shapes = {
        "S": (rows, columns, traits.head_dim),
        "PV": (rows, traits.head_dim_v, columns),
    }
    return Program(
        roles=roles,
        shapes=fp8_shapes(config, traits) if traits.fp8 else shapes,
        n_bytes={
            "Q": 4 * tiles["q"] // groups,
            "K": 4 * tiles["k"] // config.num_stages,
            "V": 4 * tiles["v"] // config.stages_of_v,
        },
        scores=rows * columns,
        stored=rows * traits.head_dim_v,
        channels=channels,
        barriers={f"turn {group}": 2 for group in range(groups)} if config.pingpong else {},
    )


def _produce(config: Sm90ForwardConfig, walks: Sequence[Walk]) -> Iterator[Step]:
    """K of the first tile, Q, and then K and V: the next K before this V."""
    ring, leads = Ring(config), config.num_stages > 1 or config.stage_n == config.tile_n
    for walk in walks:
        if walk.tiles:
            yield from _fetch("K", ring.k, ring.tile)
        for group in range(config.num_warpgroups):
            yield from _fetch("Q", group, group)
        for tile in range(walk.tiles):
            v, number = ring.v, ring.tile
            ring.advance()
            more = tile + 1 < walk.tiles
            if leads and more:
                yield from _fetch("K", ring.k, ring.tile)
            yield from _fetch("V", v, number)
            if not leads and more:
                yield from _fetch("K", ring.k, ring.tile)


def _fetch(channel: str, buffer: int, tile: int) -> Iterator[Step]:
    yield Claim(channel, buffer)
    yield Fetch(channel, buffer, tile)


class Turns:
    """The turns of a warpgroup; none where it has no need to wait for others."""

    def __init__(self, config: Sm90ForwardConfig, group: int):
        self._alternate, self._group = config.pingpong, group
        self._following = (group + 1) % config.num_warpgroups

    def take(self) -> Iterator[Step]:
        """Wait for the turn."""
        if self._alternate:
            yield Sync(f"turn {self._group}")

    def give(self) -> Iterator[Step]:
        """Pass it on."""
        if self._alternate:
            yield Arrive(f"turn {self._following}")

    def give_first(self) -> Iterator[Step]:
        """The last warpgroup lets the first begin."""
        if self._alternate and self._following == 0:
            yield Arrive("turn 0")


def _consume(
    config: Sm90ForwardConfig,
    traits: Traits,
    walks: Sequence[Walk],
    group: int,
    attend: Callable[..., Iterator[Step]],
) -> Iterator[Step]:
    """All tiles of rows of a warpgroup."""
    ring, turns = Ring(config), Turns(config, group)
    gives_q_late = config.num_splits == 1 and not config.o_is_apart(traits)
    per_stage = config.stage_n // config.tile_n
    yield from turns.give_first()
    for walk in walks:
        first, end = walk.of_group(group)
        yield Wait("Q", group)
        yield from _skip(ring, turns, first, per_stage, traits)
        if first < end:
            masked = {ring.tile + tile - first for tile in walk.masked}
            yield from attend(config, traits, ring, turns, group, end - first, masked)
        yield from _skip(ring, turns, walk.tiles - end, per_stage, traits)
        if not gives_q_late:
            yield Release("Q", group)
        yield Work("finish", 0)
        if gives_q_late:
            yield Release("Q", group)


def _skip(ring: Ring, turns: Turns, stages: int, per_stage: int, traits: Traits) -> Iterator[Step]:
    """Leave stages of keys to the other warpgroups."""
    for _ in range(stages):
        for _ in range(per_stage):
            yield from turns.take()
            yield from turns.give()
        scales = [("SCALES", ring.k)] if traits.key_scales else []
        for channel, buffer in (("K", ring.k), ("V", ring.v), *scales):
            yield Wait(channel, buffer)
            yield Release(channel, buffer)
        ring.advance()


def _attend(
    config: Sm90ForwardConfig,
    traits: Traits,
    ring: Ring,
    turns: Turns,
    group: int,
    tiles: int,
    masked: set[int],
) -> Iterator[Step]:
    """O += softmax(Q K^T) V over some tiles of keys."""

    def begin_s():
        yield Wait("K", ring.k)
        yield Begin("S", ring.tile, (("q", group), ("k", ring.k)))

    def begin_pv(v, tile):
        yield Wait("V", v)
        yield Begin("PV", tile, (REGISTERS, ("v", v)))

    def softmax():
        if ring.tile in masked:
            yield Work("mask", ring.tile)
        yield Work("max", ring.tile)
        yield Work("exp", ring.tile)

    yield from turns.take()
    yield from begin_s()
    yield from turns.give()
    yield Until(0)
    yield Release("K", ring.k)
    yield from softmax()
    yield Work("pack", ring.tile)
    for _ in range(1, tiles):
        v, tile = ring.v, ring.tile
        ring.advance()
        yield from turns.take()
        if config.overlap:
            yield from begin_s()
        yield from begin_pv(v, tile)
        if not config.overlap:
            yield Until(0)
            yield Release("V", v)
            yield from begin_s()
        yield from turns.give()
        yield Until(1 if config.overlap else 0)
        yield Release("K", ring.k)
        yield from softmax()
        if config.overlap:
            yield Until(0)
            yield Release("V", v)
        yield Work("pack", ring.tile)
    yield from begin_pv(ring.v, ring.tile)
    yield Until(0)
    yield Release("V", ring.v)
    ring.advance()
