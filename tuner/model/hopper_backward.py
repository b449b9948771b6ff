"""The offline model of the backward on Hopper: shared memory, turns, and sums of dQ in the L2.

A tile of queries and keys costs all warpgroups of a block together

- clocks of the tensor cores: a product of 64 x n x 16 takes n / 2;
- bytes of shared memory, 128 a clock: such a product reads 32 n of operand B, and 2048 of A unless
  A is in registers; dS and dQ are written and read again, what is copied is written. With n = 64
  and A in shared memory this is all that there is: mostly it binds, not the tensor cores;
- instructions of P and dS, in part under products of the same warpgroup (`HIDDEN`);
- bytes of dQ that are added in the L2, where one kernel makes all three gradients.

These combine as in `hopper`: at best the smooth maximum of all, in lockstep products and the rest
one after the other, and a part of the difference is lost. Blocks that add dQ in turns are played
through (`turns`).

`errors` says how near published speeds are. Constants that were fitted to them say so.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from numflash.configs import Config, Traits
from numflash.problem.classes import ProblemClass
from numflash.selection.layout import Tiling, order_of, tiles_seen

from ..records import ResourceUsage
from ..space.machines import Machine
from . import turns
from .clocks import BlockClocks
from .counts import feature_counts
from .dispatch import closed_form
from .grid import Grid, l2_share, lay, memory_bytes, walks_in_turn
from .hopper import (
    COPIES_NORM,
    LEFT_TO_CHANCE,
    OVERLAP_NORM,
    SPILLED_TIMES,
    WGMMA_EFFICIENCY,
)
from .kept import Kept, walks_of
from .machine_code import Counts, MachineCode
from .prediction import (
    BARRIER_LATENCY,
    BLOCK_LATENCY,
    L2_LATENCY,
    LAUNCH_MS,
    MEMORY_EFFICIENCY,
    MEMORY_LATENCY,
    PIPES,
    SOFTMAX_LATENCY,
    Prediction,
    combine,
    row_bandwidth,
    smooth_maximum,
)

SHARED_EFFICIENCY = 0.91
"""Share of the bandwidth of shared memory that products with their copies reach. Fitted."""
HIDDEN = 0.5
"""Share of the work beside products that is hidden under them where the loop is written for it,
as ours is; in FlashAttention-3's, compiled, none of it. Assumed: as `hopper.HIDDEN_BY_OVERLAP`."""
ADDED_BYTES = 17
"""Bytes of float32 that an SM adds in the L2 a clock. Source: flash-attention's pull request 2889,
about 30 GB/s."""
TURN_NS, COMPLETE_NS, UNTIL_FREE_NS = 1400, 800, 600
"""Nanoseconds from a block's addition of a tile to the next block's, to its own next one, and
until its buffer of dQ is free again. Assumed: latencies of the L2 and of a bulk reduction."""

_THREADS, _ROWS, _FLOAT_BYTES, _ELEMENT_BYTES = 128, 64, 4, 2
_OPERAND_BYTES, _STEP = 2048, 16
_OTHER_REGISTERS = 16
# Of a tile: from the end of S to that of P and dS, and the meeting of all warpgroups over dS.
_LATENCY = SOFTMAX_LATENCY + 2 * BARRIER_LATENCY
# Instructions of a warp, by disassembly: beside 4.5 a score, for waiting and for a step of 16.
_ISSUED_PER_SCORE, _ISSUED_PER_TILE, _ISSUED_PER_STEP = 4.5, 90, 5
_MASK_ISSUED, _MASK_ALU, _MASK_PLACE = 4, 3, 40
# Of a block: its indices, and a column of its results.
_ISSUED_PER_BLOCK, _ISSUED_PER_OUTPUT = 300, 2


@dataclass(frozen=True)
class Form:
    """Work for one tile of the walk, and how a kernel goes about it.

    Attributes:
        row_tile, column_tile: rows that a block owns, and of a tile that it walks over.
        groups: warpgroups that multiply.
        multiply_adds: of the tensor cores, of all warpgroups.
        shared: bytes through shared memory.
        counts: instructions of one warp.
        rare: more for a tile that an edge crosses.
        fetched: bytes copied from the L2, of each of the two operands of scores.
        stages: tiles that are fetched ahead, and the one in use.
        added: bytes of dQ that are added in the L2.
        outputs: accumulators that a thread stores at the end.
        hidden: share of the work beside products that is under them.
        buffers: of dQ.
        order: of `turns.ORDERS`, in which dQ is added; None if nobody waits.
        in_flight: heads whose blocks start in turn.
        blocks_order: of `layout.ORDERS`, in which blocks work.
        persistent: whether blocks draw one place after another.
    """

    row_tile: int
    column_tile: int
    groups: int
    multiply_adds: float
    shared: float
    counts: Counts
    rare: Counts
    fetched: tuple[int, int]
    stages: int = 2
    added: int = 0
    outputs: int = 0
    hidden: float = HIDDEN
    buffers: int = 1
    order: str | None = None
    in_flight: int = 1
    blocks_order: str = "first keys first"
    persistent: bool = False


class Product(NamedTuple):
    """A matrix product: its multiply-adds, bytes of shared memory, and instructions."""

    terms: float
    read: float
    steps: float


def product(atoms: float, n: int, k: int, in_registers: bool = False) -> Product:
    """64 `atoms` x n x k, operand A from registers or from shared memory."""
    steps = atoms * -(-k // _STEP)
    read = steps * (2 * _STEP * n + (0 if in_registers else _OPERAND_BYTES))
    return Product(steps * _ROWS * n * _STEP, read, steps)


def make_form(
    traits: Traits,
    tiles: tuple[int, int],
    by_keys: bool,
    groups: int,
    products: list[Product],
    stored: float,
    **more,
) -> Form:
    """A form from its products.

    Args:
        traits: of the class.
        tiles: rows that a block owns, and of a tile that it walks over.
        by_keys: whether it owns keys.
        groups: warpgroups that multiply.
        products: of all of them.
        stored: bytes that go through shared memory beside products and copies.
        more: attributes of `Form`.
    """
    rows, columns = tiles
    scores = rows * columns / (_THREADS * groups)
    fetched = tuple(columns * n * _ELEMENT_BYTES for n in (traits.head_dim, traits.head_dim_v))
    # lse and delta of the columns of S^T, 16 bytes a load; of rows of S they are in registers.
    statistics = 2 * columns * _FLOAT_BYTES * 8 * groups if by_keys else 0
    terms, read, steps = (sum(each) for each in zip(*products, strict=True))
    counts = Counts(
        issued=_ISSUED_PER_SCORE * scores + _ISSUED_PER_TILE + _ISSUED_PER_STEP * steps / groups,
        matrix=steps / groups,
        special=scores,
        exponentials=scores,
        fma=3 * scores,
        ffma=scores,
        conversions=scores if by_keys else scores / 2,
    ).plus(feature_counts(traits), scores)
    rare = Counts(issued=_MASK_ISSUED * scores + _MASK_PLACE, alu=_MASK_ALU * scores + _MASK_PLACE)
    return Form(
        rows,
        columns,
        groups,
        terms,
        read + stored + sum(fetched) + statistics,
        counts,
        rare,
        fetched,
        **more,
    )


def form_of(machine: Machine, config: Config, problem: ProblemClass) -> Form:
    """The form of a config."""
    traits, family = problem.traits, problem.family
    d, dv, groups = traits.head_dim, traits.head_dim_v, config.num_warpgroups
    rows, columns = tiles = config.row_tile, config.column_tile
    scores = [product(1, columns, n) for n in (d, dv)]
    more = {"stages": config.num_stages, "blocks_order": order_of(config)}
    if family == "backward-dq":
        products = groups * [*scores, product(1, d, columns, in_registers=True)]
        return make_form(traits, tiles, False, groups, products, 0, outputs=d // 2, **more)
    results = [product(1, n, columns, in_registers=True) for n in (dv, d)]
    products, stored, more["outputs"] = groups * (scores + results), 0, (d + dv) // 2
    if getattr(config, "roles", False):
        # Both work on the same rows, and P goes from one to the other.
        products, stored = scores + results, 2 * rows * columns * _ELEMENT_BYTES
        more["outputs"] //= 2
    if family == "backward":
        more["added"] = columns * d * _FLOAT_BYTES
        stored = rows * columns * _ELEMENT_BYTES + 2 * more["added"]
        products += config.dq_groups(traits) * [product(1, config.dq_columns(traits), rows)]
        more |= {"buffers": config.dq_buffers(traits), "order": "last first"}
        more["in_flight"] = _heads_in_flight(machine, problem)
        more["persistent"] = config.persistent
    return make_form(traits, tiles, True, groups, products, stored, **more)


def _heads_in_flight(machine: Machine, problem: ProblemClass) -> int:
    """Heads of keys whose blocks start in turn, by the rule of `selection.geometry`."""
    traits, heads = problem.traits, problem.batch_heads // problem.group_size
    of_a_query = 2 * (traits.head_dim + traits.head_dim_v) + _FLOAT_BYTES * traits.head_dim
    head_bytes = problem.seqlen_q * problem.group_size * of_a_query
    return max(1, min(machine.l2_bytes // 2 // head_bytes, heads))


def predict(
    machine: Machine,
    problem: ProblemClass,
    config: Config,
    resources: ResourceUsage,
    code: MachineCode | None,
    kept: Kept | None = None,
) -> Prediction:
    """Predict the time of a compiled kernel, as `prediction.predict`.

    Raises:
        ValueError: not even one block fits on an SM, or it has no wgmma.
    """
    form = _compiled(machine, problem, config, resources, code)
    return predict_form(machine, problem, form, kept=kept)


def block_clocks(
    machine: Machine,
    problem: ProblemClass,
    config: Config,
    resources: ResourceUsage,
    code: MachineCode | None,
    kept: Kept | None = None,
) -> BlockClocks:
    """The clocks of a block of a compiled kernel, of which `predict` makes its time.

    Args and raises as `predict`.
    """
    form = _compiled(machine, problem, config, resources, code)
    return _costs(machine, problem, form, 1.0, kept).clocks


def _compiled(
    machine: Machine,
    problem: ProblemClass,
    config: Config,
    resources: ResourceUsage,
    code: MachineCode | None,
) -> Form:
    """The form of a compiled kernel. Raises ValueError if no block fits."""
    if resources.blocks_per_sm < 1:
        raise ValueError(f"no block of {config} fits on an SM of {machine.name}")
    form = form_of(machine, config, problem)
    if code is None or code.main is None:
        return form
    # Where warpgroups have loops of their own, the busiest may have no exponentials.
    counts, special = code.main.counts, form.counts.special
    counts = replace(counts, special=max(special, counts.special))
    return replace(form, counts=counts, rare=code.main.rare)


def estimate(
    machine: Machine, problem: ProblemClass, config: Config, kept: Kept | None = None
) -> Prediction:
    """Predict a kernel's time by formula only, as `prediction.estimate`.

    Raises:
        ValueError: as `predict`.
    """
    traits, limits = problem.traits, machine.limits
    if (needed := config.smem_bytes(traits)) > limits.max_smem_per_block:
        raise ValueError(f"no block of {config} fits on an SM of {machine.name}: {needed} bytes")
    slower = SPILLED_TIMES if config.registers[1] < expected_registers(config, traits) else 1.0
    return predict_form(machine, problem, form_of(machine, config, problem), slower, kept)


def at_best(machine: Machine, problem: ProblemClass, config: Config) -> Prediction:
    """Predict a kernel's time by formula if nothing spills, as `prediction.at_best`.

    Raises:
        ValueError: as `predict`.
    """
    traits, limits = problem.traits, machine.limits
    if (needed := config.smem_bytes(traits)) > limits.max_smem_per_block:
        raise ValueError(f"no block of {config} fits on an SM of {machine.name}: {needed} bytes")
    return predict_form(machine, problem, form_of(machine, config, problem))


def expected_registers(config: Config, traits: Traits) -> int:
    """Registers that a warp that multiplies takes: with fewer, most spilled. By compiling."""
    return config.accumulators_per_thread(traits) + _OTHER_REGISTERS


class _Costs(NamedTuple):
    """What a launch costs.

    Attributes:
        grid: its blocks.
        clocks: of a block.
        around: clocks of a block beside its tiles.
        busy: clocks of a tile that each of PIPES is busy.
        from_memory: bytes.
    """

    grid: Grid
    clocks: BlockClocks
    around: float
    busy: tuple[float, ...]
    from_memory: float


def _costs(
    machine: Machine, problem: ProblemClass, form: Form, slower: float, kept: Kept | None
) -> _Costs:
    if not machine.wgmma_f16:
        raise ValueError(f"{machine.name} has no wgmma")
    grid, traits, groups = lay(problem, form, kept), problem.traits, form.groups
    l2 = l2_share(machine, grid.blocks)
    busy, clocks = _tile(machine, form, l2)
    clocks *= slower
    from_memory = memory_bytes(problem, form, grid, machine.num_sms, machine.l2_bytes)
    # Of blocks that walk over the same tiles at once, all wait for the first one's loads.
    at_once = min(machine.num_sms, grid.blocks * problem.group_size / problem.batch_heads)
    asked = grid.blocks * grid.mean_tiles * sum(form.fetched)
    missed = min(1.0, at_once * from_memory / max(1.0, asked))
    clocks += _stall(form, clocks, L2_LATENCY + missed * (MEMORY_LATENCY - L2_LATENCY), l2)
    masked = grid.walks.edges * max(form.rare.issued, _THREADS * form.rare.alu / machine.alu_lanes)
    # Rows that stay, and the first tile.
    owned = form.row_tile * (traits.head_dim + traits.head_dim_v) * _ELEMENT_BYTES
    arrives = MEMORY_LATENCY + (owned + sum(form.fetched)) / l2
    start = BLOCK_LATENCY + MEMORY_LATENCY + arrives
    stored = groups * (_ISSUED_PER_BLOCK + _ISSUED_PER_OUTPUT * form.outputs)
    between = stored + start
    if form.persistent:
        # The next ones come while results are stored; not behind the last place, counted ahead.
        between = max(stored, arrives)
        start += stored - between
    around = between + groups * masked
    block = BlockClocks(
        start, lambda tiles, _: tiles * clocks + around, 1, form.persistent, form.persistent
    )
    return _Costs(grid, block, around, busy, from_memory)


def predict_form(
    machine: Machine,
    problem: ProblemClass,
    form: Form,
    slower: float = 1.0,
    kept: Kept | None = None,
) -> Prediction:
    """Predict the time of a form; a tile takes `slower` times as long as without spills.

    Raises:
        ValueError: the machine has no wgmma.
    """
    grid, clocks, around, busy, from_memory = _costs(machine, problem, form, slower, kept)
    per_ms = machine.clock_mhz * 1e3
    if form.order is None:
        spread = closed_form(grid, machine.num_sms, 1, clocks.place)
    else:
        of_a_list = problem.traits.ragged
        heads = grid.heads if of_a_list else problem.batch_heads // problem.group_size
        spread = turns.clocks_of(
            _walks(problem, form, grid, heads),
            problem.group_size,
            heads,
            machine.num_sms,
            clocks.turn,
            around,
            *(ns * machine.clock_mhz / 1e3 for ns in (TURN_NS, COMPLETE_NS, UNTIL_FREE_NS)),
            form.buffers,
            heads if of_a_list else form.in_flight,
            clocks.start if form.persistent else 0.0,
        )
    if form.added:
        from_memory += _FLOAT_BYTES * _sums(problem)
    memory_ms = from_memory / (machine.memory_gbps * MEMORY_EFFICIENCY * 1e6)
    ms = combine(spread / per_ms, memory_ms) + LAUNCH_MS
    if form.added:
        ms += conversion_ms(machine, problem)
    tiles = grid.blocks / machine.num_sms * grid.mean_tiles / per_ms
    parts = {pipe: tiles * each for pipe, each in zip(PIPES, busy, strict=True)}
    parts["memory"] = memory_ms
    alone = max(grid.walks.most, grid.mean_tiles * grid.blocks / machine.num_sms)
    parts["latency"] = float(alone * _chain(machine, form, busy)) / per_ms
    return Prediction(ms, parts, max(parts, key=parts.get), 1)


def _walks(problem: ProblemClass, form: Form, grid: Grid, heads: int) -> turns.Walks:
    """The walks of the blocks of keys, in the order in which they start and add."""
    if problem.traits.ragged:
        found = walks_in_turn(problem, form.row_tile, form.column_tile)
        return (tuple((each,) for each in found),)
    upwards = _walks_upwards(grid.launch.tiling, problem.group_size, heads, grid.kept)
    if form.order == "last first":
        return tuple(each[::-1] for each in upwards)
    return upwards


@lru_cache(maxsize=64)
def _walks_upwards(tiling: Tiling, group: int, heads: int, kept: Kept | None) -> turns.Walks:
    """Of the first keys first: one list for all heads of keys, or the lists that there are."""
    if kept is None:
        begin, end, _, _ = tiles_seen(tiling)
        return (tuple(((x, y),) for x, y in zip(begin.tolist(), end.tolist(), strict=True)),)
    blocks, size = kept.by_keys.of_groups(group), kept.by_keys.size
    lists = [[walks_of(tiling, each, size) for each in of_entry] for of_entry in blocks]
    if len(lists[0]) == 1:
        return tuple(each for (each,) in lists)
    return tuple(lists[n * len(lists) // heads][n % len(lists[0])] for n in range(heads))


def conversion_ms(machine: Machine, problem: ProblemClass) -> float:
    """Milliseconds of the kernel that makes dQ of its float32 sums."""
    moved = (_FLOAT_BYTES + _ELEMENT_BYTES) * _sums(problem)
    return LAUNCH_MS + moved / row_bandwidth(machine, moved) / 1e6


def _sums(problem: ProblemClass) -> int:
    """Elements of dQ."""
    return problem.batch_heads * problem.seqlen_q * problem.traits.head_dim


def _tile(machine: Machine, form: Form, l2: float) -> tuple[tuple[float, ...], float]:
    """Clocks of a tile: that each of PIPES is busy, and until the next one."""
    c, groups = form.counts, form.groups
    matrix = form.multiply_adds / machine.wgmma_f16 / WGMMA_EFFICIENCY
    shared = form.shared / machine.smem_bytes_per_clock / SHARED_EFFICIENCY
    others = (
        groups * _THREADS * c.special / machine.sfu_lanes,
        groups * _THREADS * c.fma / machine.fp32_lanes,
        groups * _THREADS * (c.alu + c.conversions) / machine.alu_lanes,
        groups * float(c.issued),
    )
    busy = (matrix, *others, shared, sum(form.fetched) / l2 + form.added / ADDED_BYTES)
    products = max(matrix, shared)
    beside = groups * _beside(machine, form)
    lockstep = products + beside + _LATENCY - form.hidden * min(products, beside)
    added = form.added / ADDED_BYTES
    chain = _chain(machine, form, busy)
    best = smooth_maximum(OVERLAP_NORM, chain, products, *others, added)
    best = smooth_maximum(COPIES_NORM, best, sum(form.fetched) / l2)
    lost = LEFT_TO_CHANCE ** (groups - 1)
    return busy, best + lost * max(0.0, lockstep - best)


def _stall(form: Form, clocks: float, latency: float, l2: float) -> float:
    """Clocks of a tile in which an operand of scores is waited for.

    A buffer is filled again while the other stages are used. With one, what S and the last product
    read (K, or Q) is needed at once, the other (V, or dO) half a tile later.
    """
    ahead = (form.stages - 1) * clocks
    first, second = (latency + each / l2 - ahead for each in form.fetched)
    return max(0.0, first, second - clocks / 2)


def _beside(machine: Machine, form: Form) -> float:
    """Clocks of a warpgroup's own work beside its products."""
    return max(_THREADS * form.counts.special / machine.sfu_lanes, form.counts.issued)


def _chain(machine: Machine, form: Form, busy: tuple[float, ...]) -> float:
    """Clocks of a tile for a warpgroup that has an SM for itself."""
    products, beside = max(busy[0], busy[5]) / form.groups, _beside(machine, form)
    return products + beside + _LATENCY - form.hidden * min(products, beside)
