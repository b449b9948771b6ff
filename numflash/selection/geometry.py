"""The layout of a problem over a grid: packed heads, split keys, heads in flight."""

from dataclasses import dataclass, replace

from numflash.configs import MmaConfig, Traits, implementation_of
from numflash.problem.problem import AttentionProblem
from numflash.runtime.devices import Architecture, blocks_per_sm

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
        blocks: of the grid; those of persistent kernels take tile after tile.
    """

    pack: int = 1
    num_splits: int = 1
    heads_in_flight: int = 1
    blocks: int = 0


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
        few = problem.seqlen_q <= PACKED_SEQLEN
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
        fits = max(fits, num_sms * config.block_rows * sharing // _FLOP_PER_BYTE)
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
    pack = heads_packed(config, problem)
    heads = problem.num_heads_q // pack
    blocks = problem.num_blocks(problem.seqlen_q * pack, heads, config.block_rows)
    # Keys that a tile of rows sees through a window, wherever that begins in a block of keys.
    tokens = min(problem.seqlen_q, 1 + -(-config.block_rows // pack))
    seen = max(0, problem.band_hi - problem.band_lo + tokens) + config.stage_n
    keys = min(problem.seqlen_k, seen)
    splits = num_splits(config, traits, limits, num_sms, blocks, keys)
    return replace(config, num_splits=splits)


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
