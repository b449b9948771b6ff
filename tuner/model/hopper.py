"""The offline model of the forward on Hopper: warpgroups that multiply asynchronously.

As in `prediction`, pipes of an SM are busy with the work of all its warpgroups, and each warpgroup
has a chain of its own; here the tensor cores work beside both. For one tile of keys a warpgroup
needs them for T clocks, and X clocks for its softmax; with W warpgroups on an SM:

1. At best a turn of all takes the smooth maximum of W T, the other pipes, and the chain T + X.
2. In lockstep, all multiplying and then all computing their softmax, it takes W T + W X.
3. A part of the difference is lost to chance. It falls with each further warpgroup, and once more
   where they take turns (`pingpong`).
4. `overlap` shortens the chain and the lockstep by the work beside a warpgroup's own P V.
5. A tile of rows begins and ends with a softmax and an epilogue; blocks that are not `persistent`
   also start and fetch their first tiles, which nothing hides. Persistent blocks walk over several
   tiles of rows, so that how these are dealt out decides instead of waves.

No measurement of these kernels went into it. The constants marked as fitted make FlashAttention-3
as fast as its authors measured on an H100 with 1830 MHz: arXiv 2407.08608, Table 2 and section
3.1 (head_dim 128: 570 TFLOP/s without turns or overlap, 620 to 640 with turns, 640 to 661 with
both), Figure 5 (head_dim 64 and 256: 497 and 756), and, without either, ThunderKittens' figure
for three warpgroups (about 610); `errors` says how near all other points come. Where
FlashAttention-3 runs pairs of blocks, which fetch K and V once for both, it stands for a machine
whose L2 is twice as fast: at head_dim 256 ours, which fetch twice, are bound by the L2, as it is
itself with a causal mask. Its assembler overlaps less than the instructions would allow; where
ours does better, `overlap` is worth more than is said here.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from numflash.configs import Sm90ForwardConfig, Traits
from numflash.problem.classes import ProblemClass
from numflash.runtime.devices import blocks_per_sm

from ..records import ResourceUsage
from ..space.machines import Machine
from .clocks import BlockClocks
from .counts import feature_counts
from .dispatch import closed_form
from .grid import Grid, dealt_out, heads_in_flight, l2_share, lay, memory_bytes, part_bytes
from .kept import Kept
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

WGMMA_EFFICIENCY = 0.97
"""Share of the peak that the tensor cores reach while they are busy. Fitted."""
OVERLAP_NORM = 2.25
"""As `prediction.OVERLAP_NORM`. Fitted."""
COPIES_NORM = 12.0
"""Likewise of bulk copies and the rest, which do not disturb each other. Assumed."""
LEFT_TO_CHANCE = 0.6
"""Factor of the loss in lockstep for each warpgroup but the first. Fitted."""
WITH_TURNS = 0.5
"""Factor of that loss where warpgroups take turns. Fitted."""
HIDDEN_BY_OVERLAP = 0.5
"""Share of the shorter of P V and softmax that runs beside the other. Fitted."""
SPILLED_TIMES = 2.0
"""Factor of a turn's time where registers spill: products are serialised then. Assumed."""

_WARP, _WARPGROUP_ROWS, _THREADS = 32, 64, 128
# Instructions of a warp, by disassembly: beside 4.5 a score, for waiting and for a step of 16.
_ISSUED_PER_SCORE, _ISSUED_PER_TILE, _ISSUED_PER_STEP = 4.5, 90, 5
_ALU_PER_TILE, _FMA_PER_TILE = 45, 20
# The rest of a tile of rows: indices and barriers, and a column of O.
_ISSUED_PER_PLACE, _ISSUED_PER_OUTPUT = 300, 2
# A masked score, and where in the mask a thread's scores lie.
_MASK_ALU, _MASK_ISSUED, _MASK_PLACE = 3, 4, 40


@dataclass(frozen=True)
class Work:
    """Work of a warp that multiplies.

    Attributes:
        tile: for each tile of keys.
        rare: more for a tile that an edge crosses.
        place: more for each tile of rows.
    """

    tile: Counts
    rare: Counts
    place: Counts


@dataclass(frozen=True)
class Turn:
    """Clocks of one tile of keys, for one warpgroup.

    Attributes:
        busy: of each of PIPES.
        products: of the tensor cores, with their wait for operands.
        softmax: from the end of S to the end of P, alone on an SM.
        lockstep: of that, the clocks that each further warpgroup adds if all do it at once.
        packing: from the end of O += P V to the next one. On 8-bit floats O's share of a tile is
            added, too.
        loads: until K, or V, arrives after its buffer is free.
    """

    busy: tuple[float, ...]
    products: float
    softmax: float
    lockstep: float
    packing: float
    loads: float


def by_formula(config: Sm90ForwardConfig, traits: Traits) -> Work:
    """The counts before anything is compiled."""
    scores, outputs = config.tile_n // 2, traits.head_dim_v // 2
    multiply_adds = 16 * config.tile_n * (traits.head_dim + traits.head_dim_v)
    special, added = scores, added_to_o(traits)
    if traits.fp8:
        # O's share of a tile comes in parts, and has a weight for each of a thread's two rows.
        parts = traits.head_dim_v // config.part_columns(traits)
        steps, special = (traits.head_dim + parts * config.tile_n) // 32, scores + 2
        products = {"multiply_adds_e4m3": multiply_adds}
    else:
        steps, products = (traits.head_dim + config.tile_n) // 16, {"multiply_adds": multiply_adds}
    issued = _ISSUED_PER_SCORE * scores + _ISSUED_PER_TILE + _ISSUED_PER_STEP * steps + added
    tile = Counts(
        **products,
        issued=issued,
        matrix=steps,
        special=special,
        exponentials=special,
        fma=2 * scores + _FMA_PER_TILE + added,
        ffma=scores + added,
        alu=scores + _ALU_PER_TILE,
        conversions=scores // 2,
        shuffles=4 + (traits.head_dim > 128),
    )
    return Work(
        tile.plus(feature_counts(traits), scores),
        Counts(
            issued=_MASK_ISSUED * scores + outputs + _MASK_PLACE,
            alu=_MASK_ALU * scores + _MASK_PLACE,
            fma=outputs,
        ),
        Counts(issued=_ISSUED_PER_PLACE + _ISSUED_PER_OUTPUT * 2 * outputs, fma=outputs),
    )


def added_to_o(traits: Traits) -> int:
    """Multiply-adds of a thread that add a tile's share to O: 8-bit floats are summed apart."""
    return traits.head_dim_v // 2 if traits.fp8 else 0


def from_machine_code(code: MachineCode) -> Work:
    """The counts of a compiled kernel: the loop over tiles of rows holds one tile of keys, too."""
    tile, around = code.main.counts, code.around
    return Work(tile, code.main.rare, around.plus(tile, -1))


def predict(
    machine: Machine,
    problem: ProblemClass,
    config: Sm90ForwardConfig,
    resources: ResourceUsage,
    code: MachineCode | None,
    kept: Kept | None = None,
) -> Prediction:
    """Predict the time of a compiled kernel, as `prediction.predict`.

    Raises:
        ValueError: not even one block fits on an SM, or it has no wgmma.
    """
    work = _work_of(machine, problem, config, resources, code)
    return _predicted(machine, problem, config, work, resources.blocks_per_sm, 1.0, kept)


def block_clocks(
    machine: Machine,
    problem: ProblemClass,
    config: Sm90ForwardConfig,
    resources: ResourceUsage,
    code: MachineCode | None,
    kept: Kept | None = None,
) -> BlockClocks:
    """The clocks of a block of a compiled kernel, of which `predict` makes its time.

    Args and raises as `predict`.
    """
    work = _work_of(machine, problem, config, resources, code)
    return _costs(machine, problem, config, work, resources.blocks_per_sm, 1.0, kept).clocks


def _work_of(
    machine: Machine,
    problem: ProblemClass,
    config: Sm90ForwardConfig,
    resources: ResourceUsage,
    code: MachineCode | None,
) -> Work:
    """The work of a compiled kernel. Raises ValueError if no block fits."""
    if resources.blocks_per_sm < 1:
        raise ValueError(f"no block of {config} fits on an SM of {machine.name}")
    if code is not None and code.main is not None:
        return from_machine_code(code)
    return by_formula(config, problem.traits)


def estimate(
    machine: Machine, problem: ProblemClass, config: Sm90ForwardConfig, kept: Kept | None = None
) -> Prediction:
    """Predict a kernel's time by formula only, as `prediction.estimate`.

    Raises:
        ValueError: as `predict`.
    """
    traits = problem.traits
    spills = config.registers_of(traits)[1] < expected_registers(config, traits)
    slower = SPILLED_TIMES if spills else 1.0
    return _by_formula(machine, problem, config, slower, kept)


def at_best(machine: Machine, problem: ProblemClass, config: Sm90ForwardConfig) -> Prediction:
    """Predict a kernel's time by formula if nothing spills, as `prediction.at_best`.

    How many blocks share an SM follows from the config: a kernel gives registers away and takes
    them, so that the compiler cannot save any.

    Raises:
        ValueError: as `predict`.
    """
    return _by_formula(machine, problem, config, 1.0)


def _by_formula(
    machine: Machine,
    problem: ProblemClass,
    config: Sm90ForwardConfig,
    slower: float,
    kept: Kept | None = None,
) -> Prediction:
    """By formula, where a turn takes `slower` times as long as without spills."""
    traits, limits = problem.traits, machine.limits
    threads = config.num_threads * config.min_blocks_per_sm
    registers = min(255, limits.registers_per_sm // threads // 8 * 8)
    smem = config.smem_bytes(traits)
    fit, limited_by = blocks_per_sm(limits, config.num_threads, registers, smem)
    if fit < 1:
        raise ValueError(f"no block of {config} fits on an SM of {machine.name}: {limited_by}")
    return _predicted(machine, problem, config, by_formula(config, traits), fit, slower, kept)


def expected_registers(config: Sm90ForwardConfig, traits: Traits) -> int:
    """Registers that a warp that multiplies takes: with fewer, most spilled. By compiling."""
    outputs, kept = traits.head_dim_v // 2, config.accumulators_per_thread(traits)
    if config.overlap:
        # S, P and O are there at once.
        return kept + config.probability_registers + 20 + outputs // 6
    packed = config.probability_registers // (2 if config.num_warpgroups == 3 else 1)
    return kept + packed + outputs // 4


def _turn(
    machine: Machine, config: Sm90ForwardConfig, traits: Traits, work: Work, l2: float
) -> Turn:
    c, n, scores = work.tile, config.tile_n, config.tile_n // 2
    d, dv, size = traits.head_dim, traits.head_dim_v, traits.operand_bytes
    fetched = n * (d + dv) * size / config.num_warpgroups
    # S reads Q and K, O reads V; the tensor cores wait for their operands.
    operands = _WARPGROUP_ROWS * d * size + n * (d + dv) * size
    shared = (operands + fetched) / machine.smem_bytes_per_clock
    rate = machine.wgmma_e4m3 if traits.fp8 else machine.wgmma_f16
    products = _WARPGROUP_ROWS * n * (d + dv) / rate / WGMMA_EFFICIENCY
    mufu = _THREADS * c.special / machine.sfu_lanes
    one_a_score = _THREADS * scores / machine.alu_lanes
    busy = (
        products,
        mufu,
        _THREADS * c.fma / machine.fp32_lanes,
        _THREADS * (c.alu + c.conversions) / machine.alu_lanes,
        float(c.issued),
        shared,
        fetched / l2,
    )
    softmax = max(mufu, c.issued) + one_a_score
    packing = _THREADS * c.conversions / machine.alu_lanes + added_to_o(traits)
    return Turn(
        busy,
        max(products, shared),
        SOFTMAX_LATENCY + softmax,
        softmax + packing,
        packing + BARRIER_LATENCY,
        config.stage_n * max(d, dv) * size / l2,
    )


def _clocks_of_turn(config: Sm90ForwardConfig, turn: Turn, warpgroups: int) -> float:
    """Clocks until each of so many warpgroups on an SM is a tile of keys further."""
    products = turn.products
    chain, lockstep = _chain(config, turn), warpgroups * (products + turn.lockstep)
    lockstep += SOFTMAX_LATENCY
    if config.overlap:
        beside = min(warpgroups * products / 2, lockstep - warpgroups * products)
        lockstep -= HIDDEN_BY_OVERLAP * beside
    pipes = (products, *turn.busy[1:5])
    best = smooth_maximum(OVERLAP_NORM, chain, *(warpgroups * each for each in pipes))
    best = smooth_maximum(COPIES_NORM, best, warpgroups * turn.busy[6])
    lost = LEFT_TO_CHANCE ** (warpgroups - 1) * (WITH_TURNS if config.pingpong else 1.0)
    return best + lost * max(0.0, lockstep - best)


def _chain(config: Sm90ForwardConfig, turn: Turn) -> float:
    """Clocks of a tile of keys for a warpgroup that has an SM for itself."""
    hidden = min(turn.products / 2, turn.softmax) if config.overlap else 0.0
    return turn.products + turn.softmax + turn.packing - HIDDEN_BY_OVERLAP * hidden


def _stall(config: Sm90ForwardConfig, turn: Turn, clocks: float, latency: float) -> float:
    """Clocks of a turn in which K or V are waited for.

    A buffer is filled again while the other stages of K, or of V, are used. With one there is half
    a turn until the next product needs it, less the more warpgroups are still to read it; with
    overlap V is needed at once. That more stages of V than of K are ever faster is not known: here
    they count only where loads are late. Of 8-bit floats a stage may hold two tiles of keys.
    """
    slack, arrives = clocks / (2 * config.num_warpgroups), latency + turn.loads
    per_stage = config.stage_n // config.tile_n
    of_k = arrives - (config.num_stages - 1) * per_stage * clocks - slack
    of_v = arrives - (config.stages_of_v - 1) * per_stage * clocks
    of_v -= 0.0 if config.overlap else slack
    return (max(0.0, of_k) + max(0.0, of_v)) / per_stage


def _of_clusters(machine: Machine, config: Sm90ForwardConfig) -> Machine:
    """The machine with an SM for each cluster that it has SMs for.

    The blocks of a cluster go through the same stages at once, on as many SMs, which all have as
    much to do as one. For all of them K and V are read once from the L2, whose bandwidth is left.
    """
    return replace(machine, num_sms=machine.num_sms // config.cluster)


class _Costs(NamedTuple):
    """What a launch costs: its blocks, the clocks of one, of a turn, and bytes from memory."""

    grid: Grid
    clocks: BlockClocks
    turn: Turn
    from_memory: float


def _costs(
    machine: Machine,
    problem: ProblemClass,
    config: Sm90ForwardConfig,
    work: Work,
    fit: int,
    slower: float,
    kept: Kept | None,
) -> _Costs:
    if not machine.wgmma_f16:
        raise ValueError(f"{machine.name} has no wgmma, which {config} needs")
    machine = _of_clusters(machine, config)
    grid, groups = lay(problem, config, kept), config.num_warpgroups
    places, traits = grid.blocks, problem.traits
    resident = min(fit, -(-places // machine.num_sms))
    slots = machine.num_sms * resident
    turn = _turn(machine, config, traits, work, l2_share(machine, places))
    from_memory = memory_bytes(problem, config, grid, slots * config.cluster, machine.l2_bytes)
    fetched = config.tile_n * (traits.head_dim + traits.head_dim_v) * traits.operand_bytes
    at_once = min(slots, places * problem.group_size / problem.batch_heads)
    missed = min(1.0, at_once * from_memory / max(1.0, places * grid.mean_tiles * fetched))
    latency = L2_LATENCY + missed * (MEMORY_LATENCY - L2_LATENCY)
    masked = grid.walks.edges * max(work.rare.issued, _THREADS * work.rare.alu / machine.alu_lanes)
    # Q and the first K, and their way through the barriers.
    start = BLOCK_LATENCY + 2 * MEMORY_LATENCY
    refill = 0.0 if config.o_is_apart(traits) else latency

    @cache
    def each_turn(together: int) -> float:
        clocks = slower * _clocks_of_turn(config, turn, groups * together)
        return clocks + _stall(config, turn, clocks, latency) / together

    def each_place(together: int) -> float:
        around = groups * together * (work.place.issued + masked) + turn.softmax
        return around + (refill if config.persistent else 0.0)

    # Blocks that follow each other start while those beside them work.
    starts = start if places <= slots else start / resident
    before = 0.0 if config.persistent else starts

    def place(tiles: float, together: int) -> float:
        return tiles * each_turn(together) + each_place(together) + before

    clocks = BlockClocks(start, place, resident, config.persistent)
    return _Costs(grid, clocks, turn, from_memory)


def _predicted(
    machine: Machine,
    problem: ProblemClass,
    config: Sm90ForwardConfig,
    work: Work,
    fit: int,
    slower: float,
    kept: Kept | None,
) -> Prediction:
    costs = _costs(machine, problem, config, work, fit, slower, kept)
    grid, clocks, turn, from_memory = costs
    places, groups = grid.blocks, config.num_warpgroups
    in_flight = heads_in_flight(problem, grid, config, machine)
    machine = _of_clusters(machine, config)
    slots = machine.num_sms * clocks.resident
    if config.persistent:
        tiles, walks = dealt_out(grid, in_flight, slots)
        spread = clocks.start + clocks.places(tiles, walks)
    else:
        spread = closed_form(grid, machine.num_sms, clocks.resident, clocks.place)
    to_ms = 1 / (machine.clock_mhz * 1e3)
    memory_ms = from_memory / (machine.memory_gbps * MEMORY_EFFICIENCY * 1e6)
    ms = combine(spread * to_ms, memory_ms) + LAUNCH_MS
    if joined := part_bytes(problem, grid):
        ms += LAUNCH_MS + joined / row_bandwidth(machine, joined) / 1e6
    parts = _parts(machine, grid, turn, groups) | {"memory": memory_ms}
    alone = max(grid.walks.most, grid.mean_tiles * places / slots) * _chain(config, turn)
    parts["latency"] = float(alone + turn.softmax * max(1.0, places / slots)) * to_ms
    return Prediction(ms, parts, max(parts, key=parts.get), fit)


def _parts(machine: Machine, grid: Grid, turn: Turn, groups: int) -> dict[str, float]:
    """Milliseconds that each pipe alone would take."""
    tiles = grid.blocks / machine.num_sms * grid.mean_tiles * groups
    to_ms = 1 / (machine.clock_mhz * 1e3)
    return {pipe: tiles * busy * to_ms for pipe, busy in zip(PIPES, turn.busy, strict=True)}
