"""The offline model: a kernel's time on a machine, from counts and rates alone.

`estimate` counts by formula, before anything is compiled; `predict` takes the counts from machine
code. Otherwise they are the same:

1. A block's work for a tile, and once, is spread over the pipes of an SM: tensor cores, special
   functions, float32, ALU, instruction issue, shared memory, L2. With r blocks on an SM a pipe is
   busy r times as long.
2. Pipes overlap within a phase: products with the loads of their operands, and exponentials with
   the rest of the softmax. Kernels for tensor cores do one phase after the other: FlashAttention-2
   is as fast as if the two never overlapped, on an A100 as on an H100.
3. A warp's chain S -> softmax -> O for a tile has a length of its own, with latencies, barriers
   and the part of the copies that nothing hides. More warps hide it.
4. A block takes the smooth maximum of its phases, its chain and its copies. Blocks are dealt out
   to SMs in waves; the last one, and unequal blocks under a mask, leave SMs idle.
5. Bytes from device memory bound the whole; kernels that join parts follow.

No measurement of these kernels went into it. Constants that nobody publishes are marked as
assumed. Those marked as fitted are from published speeds; `errors` names the fitted points, the
others, and the model's errors.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from numflash.configs import Config, Traits, implementation_of
from numflash.problem.classes import ProblemClass
from numflash.runtime.devices import blocks_per_sm

from ..records import ResourceUsage
from ..space.machines import Machine
from . import counts
from .clocks import BlockClocks
from .dispatch import closed_form
from .grid import Grid, io_bytes, l2_share, lay, memory_bytes, part_bytes, visible_scores
from .kept import Kept
from .machine_code import Counts, MachineCode

PARTITIONS = 4
"""Of an SM, each with its own pipes; a warp stays in one. One instruction is issued per clock."""
SHUFFLE_LANES = 32
"""Per clock and SM. Source: CUDA C++ Programming Guide, arithmetic throughput."""
OVERLAP_NORM = 3.0
"""Times t of work done at once combine to (sum t ** norm) ** (1 / norm): of the pipes of
portable kernels, and of a kernel and its bytes from device memory. Assumed."""
PIPES_NORM = 12.0
"""Likewise of the pipes in one phase of a kernel for tensor cores, and of its phases, chain and
copies. Fitted to the forward of FlashAttention-2."""
MEMORY_EFFICIENCY = 0.8
"""Share of the bandwidth that kernels reach. Fitted to Flash-Decoding on an A100: 67 MB more take
42 microseconds more. Large copies reach 0.9: 4.3 of 4.8 TB/s measured on an H200."""
BROADCAST = 0.5
"""Share of the nominal bytes of shared memory that the portable kernels' loads take: their lanes
read 4 or 8 different addresses of 16 bytes, and half a warp reads equal ones once. Assumed."""

MATRIX_LATENCY, FMA_LATENCY, SHARED_LATENCY = 33, 4, 30
"""Clocks until a result can be used: of a 16 x 8 x 16 product, an FFMA, a load from shared memory.
Source: Sun et al., arXiv 2206.02874, for the A100; other machines are assumed to be alike."""
SOFTMAX_LATENCY = 200
"""Clocks of a chain maximum, two shuffles, vote, exponential, sum, conversion. Assumed."""
BARRIER_LATENCY = 40
"""Clocks that the warps of a block lose at a barrier. Assumed."""
L2_LATENCY, MEMORY_LATENCY = 300, 700
"""Clocks of a load from the L2 and from device memory. Source: Luo et al., arXiv 2402.13499."""
BLOCK_LATENCY = 600
"""Clocks to start a block and to drain its stores, beside its first loads. Assumed."""
LAUNCH_MS = 0.005
"""Time of a kernel that does nothing. Fitted to decoding with few keys on an H100: 12 to 15
microseconds for two kernels."""
COMBINED_SPLITS = 8
"""Parts that a `combine` joins, where their number is not known. Assumed."""

_WARP, _FLOAT_BYTES, _MAX_REGISTERS = 32, 4, 255
# Registers beside accumulators: operands, addresses, bounds. By compiling.
_OTHER_REGISTERS = {"sm89": 64, "sm80": 64, "sm75": 100, "portable": 110}
_FEWEST_OTHER_REGISTERS = 24
ROW_KERNELS = ("combine", "delta", "reduce-dq")
"""Families that stream rows, and multiply nothing."""
_PRODUCTS = {"forward": 2, "backward-dq": 3, "backward-dkdv": 4, "backward": 5}


@dataclass(frozen=True)
class Prediction:
    """The model's prediction for a config.

    Attributes:
        ms: milliseconds.
        parts: milliseconds that each resource alone would take: "matrix", "exponential", "fma",
            "alu", "issue", "shared memory", "L2", "memory"; "latency" if every other resource
            were free.
        bound_by: the largest part.
        blocks_per_sm: that fit at once.
    """

    ms: float
    parts: dict[str, float]
    bound_by: str
    blocks_per_sm: int


def predict(
    machine: Machine,
    problem: ProblemClass,
    config: Config,
    resources: ResourceUsage,
    code: MachineCode | None,
    kept: Kept | None = None,
) -> Prediction:
    """Predict the time of a compiled kernel.

    Args:
        machine: the GPU.
        problem: the class; it stands for the problem with its rounded sizes.
        config: of the problem's family.
        resources: of the compiled kernel.
        code: its instructions; None counts by formula.
        kept: what its block mask keeps; None takes all that the band leaves.

    Raises:
        ValueError: not even one block fits on an SM, or its tensor cores have no such product.
    """
    fit = _fit_of(machine, config, resources)
    if problem.family in ROW_KERNELS:
        return _rows(machine, problem, config, fit)
    work = _work_of(machine, problem, config, code)
    return _tiled(machine, problem, config, work, fit, kept)


def block_clocks(
    machine: Machine,
    problem: ProblemClass,
    config: Config,
    resources: ResourceUsage,
    code: MachineCode | None,
    kept: Kept | None = None,
) -> BlockClocks:
    """The clocks of a block of a compiled kernel, of which `predict` makes its time.

    Args and raises as `predict`; a kernel that streams rows has no tiles.
    """
    if problem.family in ROW_KERNELS:
        raise ValueError(f"{config} of {problem.family} has no tiles")
    fit = _fit_of(machine, config, resources)
    work = _work_of(machine, problem, config, code)
    return _costs(machine, problem, config, work, fit, kept).clocks


def _fit_of(machine: Machine, config: Config, resources: ResourceUsage) -> int:
    """Blocks that fit on an SM. Raises ValueError if none does."""
    if resources.blocks_per_sm < 1:
        raise ValueError(f"no block of {config} fits on an SM of {machine.name}")
    return resources.blocks_per_sm


def _work_of(
    machine: Machine, problem: ProblemClass, config: Config, code: MachineCode | None
) -> counts.Work:
    work = counts.on_machine(machine, config, problem.traits)
    if code is not None and code.main is not None:
        work = counts.complete(work, code.main, code.outside)
    return work


def estimate(
    machine: Machine, problem: ProblemClass, config: Config, kept: Kept | None = None
) -> Prediction:
    """Predict a kernel's time by formula only. Registers that cannot suffice count as spilled.

    Args and raises as `predict`.
    """
    traits = problem.traits
    smem = config.smem_bytes(traits)
    if problem.family in ROW_KERNELS:
        fit, _ = blocks_per_sm(machine.limits, config.num_threads, 48, smem)
        return _rows(machine, problem, config, max(1, fit))
    registers, spilled = expected_registers(config, traits)
    fit, limited_by = blocks_per_sm(machine.limits, config.num_threads, registers, smem)
    if fit < 1:
        raise ValueError(f"no block of {config} fits on an SM of {machine.name}: {limited_by}")
    work = counts.on_machine(machine, config, problem.traits)
    if spilled:
        # Accumulators that do not fit are loaded and stored, through the L1, at every step.
        moved = Counts(issued=2, shared=2, shared_bytes=2 * _WARP * _FLOAT_BYTES, local=2)
        times = spilled * max(1.0, work.steps / work.products)
        work = replace(work, tile=work.tile.plus(moved, times))
    return _tiled(machine, problem, config, work, fit, kept)


def at_best(machine: Machine, problem: ProblemClass, config: Config) -> Prediction:
    """Predict a kernel's time by formula if its registers are as few as can be.

    They are those of the accumulators and some addresses, none spills, and as many blocks share
    an SM as that allows, or fewer where that is faster.

    Raises:
        ValueError: as `predict`.
    """
    traits, limits, smem = problem.traits, machine.limits, config.smem_bytes(problem.traits)
    is_rows = problem.family in ROW_KERNELS
    kept = 0 if is_rows else config.accumulators_per_thread(traits)
    registers = min(_MAX_REGISTERS, kept + _FEWEST_OTHER_REGISTERS)
    most, limited_by = blocks_per_sm(limits, config.num_threads, registers, smem)
    if most < 1:
        raise ValueError(f"no block of {config} fits on an SM of {machine.name}: {limited_by}")
    fits = range(1, most + 1)
    if is_rows:
        found = [_rows(machine, problem, config, fit) for fit in fits]
    else:
        work = counts.on_machine(machine, config, problem.traits)
        found = [_tiled(machine, problem, config, work, fit) for fit in fits]
    return min(found, key=lambda prediction: prediction.ms)


def expected_registers(config: Config, traits: Traits) -> tuple[int, int]:
    """Registers of a tiled kernel before it is compiled, and how many more it would need."""
    accumulators = config.accumulators_per_thread(traits)
    kind, min_blocks = getattr(config, "generation", "portable"), getattr(config, "min_blocks", 0)
    most = _MAX_REGISTERS
    if min_blocks:
        most = min(most, 65536 // (min_blocks * config.num_threads) // 8 * 8)
    wanted = accumulators + _OTHER_REGISTERS[kind]
    fewest = accumulators + _FEWEST_OTHER_REGISTERS
    return min(wanted, most), max(0, fewest - most)


def floor_ms(
    machine: Machine, problem: ProblemClass, kept: Kept | None = None
) -> dict[str, float]:
    """Milliseconds that no kernel can beat: of each resource alone, and the largest as "floor".

    Products and exponentials are those of scores that are not masked, bytes those of inputs read
    and results written once. The matrix rate is that of `mma.sync`, of `wgmma` where there is
    one, or of FFMA where the tensor cores have no such product.
    """
    per_ms = machine.num_sms * machine.clock_mhz * 1e3
    parts = {"memory": io_bytes(problem) / machine.memory_gbps / 1e6}
    if terms := multiply_adds(problem, kept):
        parts["matrix"] = terms / (_matrix_rate(machine, problem) * per_ms)
        parts["exponential"] = visible_scores(problem, kept) / (machine.sfu_lanes * per_ms)
    return {**parts, "floor": max(parts.values())}


def multiply_adds(problem: ProblemClass, kept: Kept | None = None) -> int:
    """Those of a family's matrix products, of scores that are not masked; 0 if it has none."""
    products, traits = _PRODUCTS.get(problem.family, 0), problem.traits
    columns = products // 2 * (traits.head_dim + traits.head_dim_v)
    columns += products % 2 * traits.head_dim
    return visible_scores(problem, kept) * columns if products else 0


def _matrix_rate(machine: Machine, problem: ProblemClass) -> float:
    """Multiply-adds per clock and SM of the fastest way to multiply the elements of a class."""
    traits = problem.traits
    if traits.dtype == "float32":
        return (machine.mma_tf32 if traits.tf32 else 0) or machine.fp32_lanes
    if traits.fp8:
        return max(machine.mma_f16, machine.mma_e4m3, machine.wgmma_e4m3)
    if traits.dtype == "bfloat16" and machine.arch == "sm_75":
        return machine.fp32_lanes
    return max(machine.mma_f16, machine.wgmma_f16)


PIPES = ("matrix", "exponential", "fma", "alu", "issue", "shared memory", "L2")


def _busy(
    machine: Machine, c: Counts, warps: int, shared_share: float, l2: float
) -> tuple[float, ...]:
    """Clocks that each of PIPES needs for one block whose warps all do `c`."""
    matrix = c.multiply_adds / machine.mma_f16
    if c.multiply_adds_tf32:
        matrix += c.multiply_adds_tf32 / machine.mma_tf32
    if c.multiply_adds_e4m3:
        matrix += c.multiply_adds_e4m3 / machine.mma_e4m3
    return (
        warps * matrix / machine.mma_efficiency,
        warps * _WARP * c.special / machine.sfu_lanes,
        warps * _WARP * c.fma / machine.fp32_lanes,
        warps * _WARP * (c.alu + c.conversions) / machine.alu_lanes,
        warps * c.issued / PARTITIONS,
        warps
        * (
            shared_share * c.shared_bytes / machine.smem_bytes_per_clock
            + _WARP * c.shuffles / SHUFFLE_LANES
        ),
        warps * c.global_bytes / l2,
    )


def _chain(
    machine: Machine,
    config: Config,
    work: counts.Work,
    busy: tuple[float, ...],
    load_latency: float,
) -> float:
    """Clocks of one tile for a block that is alone on an SM: its warps wait for each other."""
    c, warps = work.tile, config.num_warps
    # Warps of a block in one partition do the same at the same time.
    per_partition = -(-warps // PARTITIONS) * PARTITIONS / warps
    tensor = bool(c.matrix)
    step = MATRIX_LATENCY if tensor else 4 * FMA_LATENCY + SHARED_LATENCY
    pipe = busy[0] if tensor else busy[2]
    multiplying = max(
        per_partition * pipe,
        busy[5],
        work.steps * step,
        (c.matrix + c.shared) if tensor else per_partition * busy[4],
    )
    multiplying += work.products * SHARED_LATENCY
    rest = max(c.issued - c.matrix - c.shared, 0) * -(-warps // PARTITIONS)
    softmax = max(per_partition * busy[1], rest if tensor else 0.0)
    own = multiplying + softmax + SOFTMAX_LATENCY + c.barriers * BARRIER_LATENCY
    if work.loads:
        return own + work.loads * load_latency
    # An asynchronous copy has the time of the phase before it, and with more stages whole tiles.
    ahead = (config.num_stages - 1) * own + (own / 2 if work.phases == 2 else 0.0)
    return own + work.phases * max(0.0, load_latency - ahead)


def _beside_products(c: Counts, warps: int) -> float:
    """Clocks in which one block issues all but products and the loads of their operands."""
    return warps * (c.issued - c.matrix - c.shared) / PARTITIONS


class _Costs(NamedTuple):
    """What a launch costs.

    Attributes:
        grid: its blocks.
        clocks: of a block.
        tile, once: clocks that each of PIPES is busy, for a tile and for the rest of a block.
        chain, first: clocks of a block's chain for a tile, and before the first.
        from_memory: bytes.
    """

    grid: Grid
    clocks: BlockClocks
    tile: tuple[float, ...]
    once: tuple[float, ...]
    chain: float
    first: float
    from_memory: float


def _costs(
    machine: Machine,
    problem: ProblemClass,
    config: Config,
    work: counts.Work,
    fit: int,
    kept: Kept | None = None,
) -> _Costs:
    if work.tile.multiply_adds_tf32 and not machine.mma_tf32:
        raise ValueError(f"the tensor cores of {machine.name} have no tf32, which {config} needs")
    grid = lay(problem, config, kept)
    blocks = grid.blocks
    resident = min(fit, -(-blocks // machine.num_sms))
    slots = machine.num_sms * resident
    l2 = l2_share(machine, blocks)
    warps = config.num_warps
    shared_share = 1.0 if implementation_of(config).has_tensor_cores else BROADCAST
    from_memory = memory_bytes(problem, config, grid, slots, machine.l2_bytes)

    tile = _busy(machine, work.tile, warps, shared_share, l2)
    # Each walk begins and ends, tiles at an edge are masked, a forward's first tile rescales.
    walks = grid.walks.row_blocks
    special = grid.walks.edges + (walks if problem.family == "forward" else 0)
    around = Counts().plus(work.once, walks).plus(work.rare, special)
    once = _busy(machine, around, warps, shared_share, l2)
    asked = blocks * warps * (grid.mean_tiles * work.tile.global_bytes + around.global_bytes)
    # Of blocks that walk over the same tiles at once, all wait for the first one's loads.
    at_once = min(slots, blocks * problem.group_size / problem.batch_heads)
    missed = min(1.0, at_once * from_memory / max(1.0, asked))
    latency = L2_LATENCY + missed * (MEMORY_LATENCY - L2_LATENCY)
    transfer = warps * work.tile.global_bytes / max(1, work.phases) / l2
    chain = _chain(machine, config, work, tile, latency + transfer)
    start = BLOCK_LATENCY + 2 * MEMORY_LATENCY
    first = walks * start + once[4] * PARTITIONS / warps

    issued = [_beside_products(each, warps) for each in (work.tile, around)]
    in_phases = bool(work.tile.matrix)

    def place(tiles: float, together: int) -> float:
        *pipes, copies = (together * (tiles * t + o) for t, o in zip(tile, once, strict=True))
        if in_phases:
            matrix, *others, _, shared = pipes
            others.append(together * (tiles * issued[0] + issued[1]))
            working = smooth_maximum(PIPES_NORM, matrix, shared)
            working += smooth_maximum(PIPES_NORM, *others)
        else:
            working = smooth_maximum(OVERLAP_NORM, *pipes)
        return smooth_maximum(PIPES_NORM, tiles * chain + first, working, copies)

    clocks = BlockClocks(start, place, resident)
    return _Costs(grid, clocks, tile, once, chain, first, from_memory)


def _tiled(
    machine: Machine,
    problem: ProblemClass,
    config: Config,
    work: counts.Work,
    fit: int,
    kept: Kept | None = None,
) -> Prediction:
    costs = _costs(machine, problem, config, work, fit, kept)
    grid, clocks, tile, once, chain, first, from_memory = costs
    blocks, slots = grid.blocks, machine.num_sms * clocks.resident
    spread = closed_form(grid, machine.num_sms, clocks.resident, clocks.place)
    to_ms = 1 / (machine.clock_mhz * 1e3)
    memory_ms = from_memory / (machine.memory_gbps * MEMORY_EFFICIENCY * 1e6)
    ms = combine(spread * to_ms, memory_ms) + LAUNCH_MS
    joined = part_bytes(problem, grid)
    if joined:
        ms += LAUNCH_MS + joined / row_bandwidth(machine, joined) / 1e6
    per_sm = blocks / machine.num_sms * to_ms
    parts = {
        pipe: per_sm * (grid.mean_tiles * each + t)
        for pipe, each, t in zip(PIPES, tile, once, strict=True)
    }
    parts["memory"] = memory_ms
    alone = max(grid.walks.most, grid.mean_tiles * blocks / slots) * chain
    parts["latency"] = float(alone + first * max(1.0, blocks / slots)) * to_ms
    return Prediction(ms, parts, max(parts, key=parts.get), fit)


def smooth_maximum(norm: float, *times: float) -> float:
    """The time of things together that take these times alone."""
    return sum(t**norm for t in times) ** (1 / norm)


def combine(*times: float) -> float:
    """The smooth maximum."""
    return smooth_maximum(OVERLAP_NORM, *times)


def row_bandwidth(machine: Machine, moved: float) -> float:
    """1e9 bytes per second for data that another kernel has just written."""
    if moved <= machine.l2_bytes:
        return machine.l2_bytes_per_clock * machine.clock_mhz / 1e3
    return machine.memory_gbps * MEMORY_EFFICIENCY


def _rows(machine: Machine, problem: ProblemClass, config: Config, fit: int) -> Prediction:
    """Of kernels that stream rows: bandwidth, or the latency of their loads."""
    traits, rows = problem.traits, problem.batch_heads * problem.seqlen_q
    moved, rounds = io_bytes(problem), 2
    if problem.family == "combine":
        moved += rows * (COMBINED_SPLITS - 2) * (traits.head_dim_v + 1) * _FLOAT_BYTES
        # A block loads a split of each chain at once.
        rounds += -(-COMBINED_SPLITS // config.num_chains)
    elif problem.family == "reduce-dq":
        moved += rows * (config.num_splits - 1) * traits.head_dim * _FLOAT_BYTES
        rounds += config.num_splits
    per_block = config.block_rows
    blocks = -(-problem.seqlen_q // per_block) * problem.batch_heads
    waves = -(-blocks // (machine.num_sms * fit))
    latency = waves * (BLOCK_LATENCY + rounds * MEMORY_LATENCY) / (machine.clock_mhz * 1e3)
    memory = moved / (machine.memory_gbps * MEMORY_EFFICIENCY * 1e6)
    parts = {"memory": memory, "latency": latency}
    ms = combine(memory, latency) + LAUNCH_MS
    return Prediction(ms, parts, max(parts, key=parts.get), fit)
