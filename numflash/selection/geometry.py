"""The layout of a problem over a grid: packed heads, split keys, heads in flight."""

from dataclasses import dataclass, replace

from numflash.configs import Config, MmaConfig, Traits, implementation_of
from numflash.problem.problem import AttentionProblem, num_blocks
from numflash.problem.sequences import MAX_SPLITS, ListShape, most_records
from numflash.runtime.devices import Architecture, blocks_per_sm
from numflash.runtime.switches import whole_number

INVARIANT_KEYS = 2048
"""Keys of a split where sums must not depend on other sequences (`batch_invariant`)."""
LEAST_STAGES = 4
"""Stages of keys that a split of a sequence with a length of its own has at least."""
# Records, besides one a tile, for each block that the machine has room for: with four the busiest
# SM has 1.02 to 1.04 of the mean work, with two up to 1.18 (counted).
_SHARES_PER_BLOCK = 4
PACKED_SEQLEN = 32
"""Query heads are packed into the rows of a tile while one head would fill at most half of one."""
_MAX_SPLITS = 128
_MIN_BLOCKS_PER_SPLIT = 2
# Four times what a byte of memory costs on Hopper: 788 TFLOP/s of matrix products by 4.3 TB/s.
_FLOP_PER_BYTE = 732


@dataclass(frozen=True)
class Geometry:
    """The layout of a forward over the machine.

    Attributes:
        pack: query heads that are neighbouring rows of a tile.
        num_splits: parts that the keys are dealt out to.
        heads_in_flight: heads whose blocks are interleaved.
        blocks: of the grid; those of persistent kernels take tile after tile. They are a multiple
            of those of a cluster.
        listed: the list of its tiles, of sequences with lengths of their own, else None.
    """

    pack: int = 1
    num_splits: int = 1
    heads_in_flight: int = 1
    blocks: int = 0
    listed: ListShape | None = None


def apart_by_blocks(problem: AttentionProblem) -> str | None:
    """Why heads of a block mask cannot share the rows of a tile; None if they can."""
    blocks = problem.blocks
    if blocks is None or problem.group_size == 1:
        return None
    if blocks.heads > 1:
        return "block_mask has a list for each head"
    if blocks.rows > 1:
        return f"block_mask has {blocks.rows} rows of blocks, and rows of a tile are of one"
    return None


def rows_packed(problem: AttentionProblem, packed: bool | None = None) -> int:
    """Query heads to pack into the rows of a tile: all of a group, or one.

    `packed` is the config's choice; None packs where there are few queries.
    """
    if apart_by_blocks(problem) is not None:
        return 1
    if packed is None:
        few = problem.tokens_q <= PACKED_SEQLEN
        packed = few and problem.traits(vectorized=True).of_a_head is None
    return problem.group_size if packed else 1


def heads_packed(config: MmaConfig, problem: AttentionProblem) -> int:
    """Query heads that a forward config packs into the rows of a tile."""
    pack = rows_packed(problem, config.packed)
    return pack if implementation_of(config).packs(pack) else 1


def heads_in_flight(problem: AttentionProblem, dtype_bytes: int, l2_bytes: int) -> int:
    """Heads whose K and V fit half of the L2 cache together; at least one."""
    head_bytes = problem.seqlen_k * (problem.head_dim + problem.head_dim_v) * dtype_bytes
    # Query heads of a group share K and V, and follow each other.
    heads = l2_bytes // 2 // max(1, head_bytes) * problem.group_size
    return max(1, min(heads, problem.num_heads_q * problem.batch))


def heads_of_backward(problem: AttentionProblem, l2_bytes: int) -> int:
    """Key-value heads whose Q, dO and float32 dQ fit half of the L2 cache together; at least one.

    Blocks of a head add to its dQ one after the other. The more heads take turns, the fewer of one
    head are there at once, which wait for each other.
    """
    columns = problem.head_dim + problem.head_dim_v
    head_bytes = problem.seqlen_q * problem.group_size * (2 * columns + 4 * problem.head_dim)
    heads = l2_bytes // 2 // max(1, head_bytes)
    return max(1, min(heads, problem.num_heads_kv * problem.batch))


def sms_of_persistent_kernels(num_sms: int) -> int:
    """Multiprocessors for a persistent kernel: but those that NUMFLASH_SPARE_SMS leaves to others.

    It starts no more blocks than run together. Where NCCL's kernels hold a multiprocessor, its
    block begins when they end, and unless blocks draw places it has all of its tiles still to do.

    Raises:
        ValueError: the switch is no integer from 0 on.
    """
    return max(1, num_sms - (whole_number("NUMFLASH_SPARE_SMS", at_least=0) or 0))


def blocks_at_once(config: MmaConfig, num_sms: int, room: int) -> int:
    """Blocks of a persistent kernel's grid where it has places for all: those that run at once.

    They are a multiple of those of a cluster, and at least one cluster; an SM has `room` for so
    many.
    """
    at_once = sms_of_persistent_kernels(num_sms) * room
    return max(1, at_once // config.cluster) * config.cluster


def heads_of_a_bundle(config: MmaConfig, fits: int, heads: int, num_sms: int, sharing: int) -> int:
    """Heads whose blocks are interleaved in a forward, heads that are packed counted as one.

    Blocks of `wgmma` go through bundles in rounds of alternating direction (`tiles.blocks`), which
    gives each the same work where bundles are large and of one size. They may be larger than the
    cache: blocks that run at once read the same tiles of K and V, and more rows of them make up
    for the memory.

    Args:
        config: the forward's.
        fits: heads whose K and V fit the cache.
        heads: all there are.
        num_sms: multiprocessors of the GPU.
        sharing: query heads that share K and V.
    """
    if implementation_of(config).needs_maps:
        # FLOP a byte of K and V, where each block that runs is a tile of rows.
        fits = max(fits, num_sms * config.tile_m * sharing // _FLOP_PER_BYTE)
        bundles = max(1, -(-heads // max(1, fits)))
        fits = -(-heads // bundles)
    return max(1, min(fits, heads))


def with_splits(
    config: MmaConfig,
    problem: AttentionProblem,
    traits: Traits,
    limits: Architecture,
    num_sms: int,
) -> MmaConfig:
    """A forward config with as many splits over keys as fill the machine."""
    if problem.lengths is not None:
        return replace(
            config, num_splits=_splits_of_lengths(config, problem, traits, limits, num_sms)
        )
    pack = heads_packed(config, problem)
    heads = problem.num_heads_q // pack
    blocks = blocks_of(problem, config, heads, pack)
    # Keys that a tile of rows sees through a window, wherever that begins in a block of keys.
    tokens = min(problem.seqlen_q, 1 + -(-config.block_rows // pack))
    seen = max(0, problem.band_hi - problem.band_lo + tokens) + config.stage_n
    keys = min(problem.seqlen_k, seen)
    splits = num_splits(config, traits, limits, num_sms, blocks, keys)
    return replace(config, num_splits=splits)


def _splits_of_lengths(
    config: MmaConfig,
    problem: AttentionProblem,
    traits: Traits,
    limits: Architecture,
    num_sms: int,
) -> int:
    """1, or 2 where tiles of sequences with lengths of their own may be split.

    Lengths are not known here: a tile is split on the device, and only if its keys are many.
    """
    if implementation_of(config).needs_maps:
        return 1
    if problem.num_splits:
        return min(problem.num_splits, 2)
    if problem.batch_invariant:
        return 2 if problem.seqlen_k > INVARIANT_KEYS else 1
    pack = heads_packed(config, problem)
    slots = num_sms * max(1, resident_blocks(config, traits, limits))
    few = blocks_of(problem, config, problem.num_heads_q // pack, pack) < slots
    is_decoding = problem.tokens_q * pack <= config.block_rows
    is_long = problem.seqlen_k > 2 * LEAST_STAGES * config.stage_n
    return 2 if is_long and (few or is_decoding) else 1


def resident_blocks(config: MmaConfig, traits: Traits, limits: Architecture) -> int:
    """Blocks of a kernel that an SM has room for, before it is compiled; 0 if it cannot run."""
    registers = implementation_of(config).resident(config, limits)
    return blocks_per_sm(limits, config.num_threads, registers, config.smem_bytes(traits))[0]


def num_splits(
    config: MmaConfig, traits: Traits, limits: Architecture, num_sms: int, blocks: int, seqlen_k
) -> int:
    """Parts to split the keys into, so that few blocks still fill the machine.

    The fewest splits whose last wave is at least 85 % as full as the best number's, of the numbers
    that leave no split without keys.
    Source: `num_splits_heuristic` of FlashAttention-3.
    """
    fit = resident_blocks(config, traits, limits)
    slots = num_sms * max(1, min(fit, 8 // config.num_warps))
    num_n_blocks = -(-seqlen_k // config.stage_n)
    if blocks == 0 or blocks >= 0.8 * slots or num_n_blocks <= 2 * _MIN_BLOCKS_PER_SPLIT:
        return 1
    # Of blocks of one warp it takes more to fill an SM.
    most = _MAX_SPLITS * max(1, 4 // config.num_warps)
    most = min(most, num_n_blocks // _MIN_BLOCKS_PER_SPLIT, -(-slots // blocks))
    fullness = {}
    for splits in {with_keys(num_n_blocks, asked) for asked in range(1, most + 1)}:
        waves = blocks * splits / slots
        fullness[splits] = waves / -(-blocks * splits // slots)
    return min(s for s in fullness if fullness[s] >= 0.85 * max(fullness.values()))


def with_keys(num_n_blocks: int, num_splits: int) -> int:
    """The splits that have keys: each but the last has the same number of blocks of keys."""
    return -(-num_n_blocks // -(-num_n_blocks // num_splits))


def tiles_listed(
    problem: AttentionProblem,
    config: Config,
    pack: int = 1,
    by_keys: bool = False,
    blocks: int = 0,
    in_turn: bool = False,
) -> ListShape:
    """The list of tiles that a kernel goes through, of sequences with lengths of their own.

    `blocks` is the number that the machine has room for, of a forward; `in_turn` is as
    `ListShape` has it.
    """
    # Of queries, also where blocks own keys: those add dQ of such a tile in turn.
    own = config.tile_m * config.cluster
    other = getattr(config, "stage_n", config.tile_n)
    if by_keys:
        own, other = config.tile_n, config.tile_m
    listed = problem.list_shape(own, other, pack, by_keys)._replace(in_turn=in_turn)
    if by_keys or getattr(config, "num_splits", 1) == 1:
        return listed
    if problem.num_splits > 1:
        tiles = -(-problem.seqlen_k // other)
        splits = min(problem.num_splits, MAX_SPLITS)
        return listed._replace(least=max(1, -(-tiles // splits)))
    if problem.batch_invariant:
        return listed._replace(least=max(1, INVARIANT_KEYS // other))
    heads = problem.num_heads_q // pack
    shares = max(1, _SHARES_PER_BLOCK * blocks // heads)
    return listed._replace(least=LEAST_STAGES, shares=shares)


def blocks_of(
    problem: AttentionProblem,
    config: Config,
    heads: int,
    pack: int = 1,
    by_keys: bool = False,
    listed: ListShape | None = None,
) -> int:
    """The grid of a kernel whose blocks each own a tile of queries, or keys, of one of `heads`.

    The blocks of a cluster own one together.
    """
    heads *= config.cluster
    if problem.lengths is not None:
        listed = listed or problem.list_shape(config.block_rows, 1, pack, by_keys)
        records = most_records(problem.lengths, listed)
        return num_blocks("the problem", records, heads, 1)
    rows = problem.seqlen_k if by_keys else problem.seqlen_q * pack
    return problem.num_blocks(rows, heads, config.block_rows)
