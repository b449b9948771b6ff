"""Where the time of a kernel goes: roofs, pipes, a turn of its main loop, its part of an SM."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from numflash.configs import Config, Traits, implementation_of
from numflash.runtime.devices import Architecture
from numflash.selection.layout import order_of, owns_keys

from ...model import counts, floor_ms, hopper, multiply_adds
from ...model.grid import lay, memory_bytes
from ...model.machine_code import Counts, MachineCode
from ...model.prediction import PARTITIONS
from ...space.machines import Machine
from ..asked import TILED, Asked, Kernel
from ..numbers import Number
from .bytes import standard_bytes

_WARP, _WORD_BYTES, _WARPGROUP = 32, 4, 128


@dataclass(frozen=True)
class Roofline:
    """A kernel under three roofs.

    Attributes:
        flop: of products, of scores that are not masked.
        bytes: from and to device memory.
        intensity: the first by the second.
        reached: FLOP a second, in the predicted time.
        memory: bytes a second of device memory, 1e9 of them.
        tensor: the roof of the fastest products.
        exponential: FLOP of products that go with as many exponentials as the machine has.
        standard_intensity, standard: likewise of attention that writes and reads S and P; the most
            that device memory lets it reach.
    """

    flop: Number
    bytes: Number
    intensity: Number
    reached: Number
    memory: Number
    tensor: Number
    exponential: Number
    standard_intensity: Number
    standard: Number


@dataclass(frozen=True)
class Turn:
    """A turn of the main loop: one tile of the side that a block walks over.

    Attributes:
        of: whose clocks they are: "a warpgroup", or "a block".
        clocks: the least of each unit, by its name.
        instructions: of a warp, by kind.
        skipped: of those that a steady turn passes over, by their purpose.
        exponentials, overlapped: of a warp, and how many of them are issued while its warpgroup
            has products under way; the latter is None where products are not asynchronous.
    """

    of: str
    clocks: Mapping[str, Number]
    instructions: Mapping[str, Number]
    skipped: Mapping[str, Number]
    exponentials: Number
    overlapped: Number | None


@dataclass(frozen=True)
class Buffer:
    """A tile of shared memory.

    Attributes:
        name: what lies there, as in "K 1".
        bytes: of one block.
    """

    name: str
    bytes: Number


@dataclass(frozen=True)
class Holder:
    """Threads of a block and their registers.

    Attributes:
        name: as in "warpgroup 0".
        registers: that they have together.
        available, named: a thread's, and how many of these its code names; None if unknown.
    """

    name: str
    registers: Number
    available: Number
    named: Number | None


@dataclass(frozen=True)
class Share:
    """What a block takes of an SM.

    Attributes:
        buffers: of its shared memory, in order.
        holders: of its registers.
        smem_bytes: of its shared memory, static and dynamic.
        reserved: bytes that the system takes for each block.
        sm_bytes, sm_registers: of an SM.
        blocks: that fit on an SM at once; None without machine code.
        limited_by: what allows no more; "" without machine code.
        threads: of a block.
        spilled: bytes stored and loaded by a thread because registers were missing.
    """

    buffers: Sequence[Buffer]
    holders: Sequence[Holder]
    smem_bytes: Number
    reserved: Number
    sm_bytes: Number
    sm_registers: Number
    blocks: Number | None
    limited_by: str
    threads: Number
    spilled: Number | None


@dataclass(frozen=True)
class ResourceFacts:
    """Where the time of a kernel goes.

    Attributes:
        predicted: its time by the model; None where the model knows no such kernel.
        measured: where it was tuned on this GPU, else None.
        floor: no kernel is faster; None likewise.
        parts: what each part of the machine takes if all others are free, by name.
        roofline: None where nothing is multiplied, and likewise.
        turn: of the main loop; None where the model knows no such loop.
        share: of an SM.
        no_code: why the turn and the share are by formula; "" if they are of machine code.
    """

    predicted: Number | None
    measured: Number | None
    floor: Number | None
    parts: Mapping[str, Number]
    roofline: Roofline | None
    turn: Turn | None
    share: Share
    no_code: str


def find(asked: Asked, kernel: Kernel) -> ResourceFacts:
    """The facts of a kernel."""
    found, measured = kernel.prediction, kernel.choice.measured_ms
    predicted = floor = roofline = None
    parts: list[tuple[str, float]] = []
    if found is not None:
        predicted = Number(found.ms, "model", "ms")
        floor = Number(floor_ms(asked.machine, kernel.problem, asked.kept)["floor"], "model", "ms")
        parts = sorted(found.parts.items(), key=lambda part: -part[1])
        roofline = _roofline(asked, kernel)
    return ResourceFacts(
        predicted=predicted,
        measured=None if measured is None else Number(measured, "measured", "ms"),
        floor=floor,
        parts={name: Number(ms, "model", "ms") for name, ms in parts},
        roofline=roofline,
        turn=turn_of(asked.machine, kernel),
        share=share_of(kernel, asked.machine.limits),
        no_code=kernel.no_code,
    )


def _roofline(asked: Asked, kernel: Kernel) -> Roofline | None:
    """TFLOP/s over FLOP a byte."""
    problem, config, predicted = kernel.problem, kernel.config, kernel.prediction
    machine, kept = asked.machine, asked.kept
    terms = multiply_adds(problem, kept)
    if not terms:
        return None
    flop, parts = 2 * terms, floor_ms(machine, problem, kept)
    slots = machine.num_sms * predicted.blocks_per_sm
    moved = memory_bytes(problem, config, lay(problem, config, kept), slots, machine.l2_bytes)
    least = flop / standard_bytes(problem)

    def tera(flop_per_ms: float, origin="model") -> Number:
        return Number(flop_per_ms / 1e9, origin, "TFLOP/s")

    return Roofline(
        flop=Number(flop, "counted", "FLOP"),
        bytes=Number(moved, "model", "bytes"),
        intensity=Number(flop / moved, "model", "FLOP/byte"),
        reached=tera(flop / predicted.ms),
        memory=Number(machine.memory_gbps, "assumed", "GB/s"),
        # A roof is the rate at which the part alone would do these products.
        tensor=tera(flop / parts["matrix"], "assumed"),
        exponential=tera(flop / parts["exponential"], "assumed"),
        standard_intensity=Number(least, "counted", "FLOP/byte"),
        standard=tera(least * machine.memory_gbps * 1e6),
    )


def turn_of(machine: Machine, kernel: Kernel) -> Turn | None:
    """A turn of the main loop: from machine code where there is some, else by formula."""
    loop = None if kernel.report is None else kernel.report.main_loop
    if loop is None:
        return _turn_by_counts(machine, kernel)
    names = {"tensor": "products", "special": "exponentials", "half_rate": "maxima, conversions"}

    def of_code(counted: Mapping[str, int]) -> dict[str, Number]:
        present = {name.replace("_", " "): n for name, n in counted.items() if n}
        return {name: Number(n, "machine code") for name, n in present.items()}

    return Turn(
        of="a warpgroup",
        clocks={
            names.get(unit, "issue slots"): Number(n, "machine code", "clocks")
            for unit, n in loop.clocks.items()
        },
        instructions=of_code(loop.instructions),
        skipped=of_code(loop.skipped),
        exponentials=Number(loop.exponentials, "machine code"),
        overlapped=Number(loop.overlapped_exponentials, "machine code"),
    )


def _turn_by_counts(machine: Machine, kernel: Kernel) -> Turn | None:
    """Of a kernel whose warps multiply by themselves, or that was not compiled."""
    config = kernel.config
    found = _work(machine, config, kernel.traits, kernel.code)
    if found is None:
        return None
    c, rare = found
    of_code = kernel.code is not None and kernel.code.main is not None
    origin, warps = "machine code" if of_code else "model", config.num_warps
    products = c.multiply_adds / max(machine.mma_f16, machine.wgmma_f16)
    if c.multiply_adds_tf32:
        products += c.multiply_adds_tf32 / machine.mma_tf32
    if c.multiply_adds_e4m3:
        products += c.multiply_adds_e4m3 / max(machine.mma_e4m3, machine.wgmma_e4m3)
    clocks = {
        "products": warps * products,
        "exponentials": warps * _WARP * c.special / machine.sfu_lanes,
        "multiply-adds": warps * _WARP * c.fma / machine.fp32_lanes,
        "maxima, conversions": warps * _WARP * (c.alu + c.conversions) / machine.alu_lanes,
        "issue slots": warps * c.issued / PARTITIONS,
        "shared memory": warps * c.shared_bytes / machine.smem_bytes_per_clock,
    }
    kinds = {
        "products": c.matrix,
        "exponentials": c.exponentials,
        "multiply-adds": c.fma,
        "maxima, comparisons": c.alu,
        "conversions": c.conversions,
        "loads and stores of shared memory": c.shared,
        "shuffles": c.shuffles,
        "all": c.issued,
    }
    return Turn(
        of="a block",
        clocks={name: Number(n, origin, "clocks") for name, n in clocks.items() if n},
        instructions={name: Number(round(n), origin) for name, n in kinds.items() if n},
        skipped={"mask and rescaling": Number(round(rare.issued), origin)} if rare.issued else {},
        exponentials=Number(round(c.exponentials), origin),
        overlapped=None,
    )


def _work(
    machine: Machine, config: Config, traits: Traits, code: MachineCode | None
) -> tuple[Counts, Counts] | None:
    """(a warp's work of a turn, more of it for a tile that an edge crosses); None if unknown."""
    if implementation_of(config).needs_maps:
        if config.family != "forward":
            return None
        found = hopper.by_formula(config, traits)
        return found.tile, found.rare
    found = counts.on_machine(machine, config, traits)
    if code is not None and code.main is not None:
        found = counts.complete(found, code.main, code.outside)
    return found.tile, found.rare


# What a block takes of an SM


def share_of(kernel: Kernel, limits: Architecture) -> Share:
    """The shared memory and registers of a block."""
    config, traits, report = kernel.config, kernel.traits, kernel.report
    origin = "counted" if report is None else "machine code"
    smem = config.smem_bytes(traits) if report is None else report.smem_bytes
    threads = config.num_threads if report is None else report.threads
    spilled = None
    if report is not None:
        lost = report.spill_store_bytes + report.spill_load_bytes
        spilled = Number(lost, "machine code", "bytes")
    return Share(
        buffers=_buffers(config, traits, smem),
        holders=_holders(kernel),
        smem_bytes=Number(smem, origin, "bytes"),
        reserved=Number(limits.reserved_smem_per_block, "assumed", "bytes"),
        sm_bytes=Number(limits.smem_per_sm, "assumed", "bytes"),
        sm_registers=Number(limits.registers_per_sm, "assumed"),
        blocks=None if report is None else Number(report.blocks_per_sm, "machine code"),
        limited_by="" if report is None else report.limited_by,
        threads=Number(threads, origin),
        spilled=spilled,
    )


def _buffers(config: Config, traits: Traits, smem_bytes: int) -> list[Buffer]:
    """The tiles of a block's shared memory, each buffer of a ring by itself."""
    sizes = _tile_bytes(config, traits)
    found = []
    for name, size in sizes.items():
        times = _times(config, name, sizes) if size else 0
        label = name.replace("_", " ")
        label = label.upper() if len(label) == 1 else label
        for i in range(times):
            shown = label if times == 1 else f"{label} {i}"
            found.append(Buffer(shown, Number(size / times, "counted", "bytes")))
    rest = smem_bytes - sum(sizes.values())
    return [*found, Buffer("rest", Number(rest, "counted", "bytes"))] if rest > 0 else found


def _tile_bytes(config: Config, traits: Traits) -> dict[str, int]:
    if config.family not in TILED:
        return {"rows": config.smem_bytes(traits)}
    if hasattr(config, "tiles"):
        return {name: _WORD_BYTES * words for name, words in config.tiles(traits).items()}
    layout = config.smem_layout(traits)
    ends = [*list(layout.offsets.values())[1:], layout.smem_bytes // _WORD_BYTES]
    begins = layout.offsets.items()
    return {n: _WORD_BYTES * (end - at) for (n, at), end in zip(begins, ends, strict=True)}


def _times(config: Config, name: str, sizes: Mapping[str, int]) -> int:
    """How many buffers of a kind a block has: of what it walks over, its stages."""
    if config.family not in TILED:
        return 1
    stages, groups = getattr(config, "num_stages", 1), getattr(config, "num_warpgroups", 1)
    if owns_keys(order_of(config)):
        return stages if name in ("q", "do", "lse", "delta") else 1
    if name in ("q", "o") and config.family == "forward":
        return groups
    walked = ("k_codes", "v_codes") if "k_codes" in sizes else ("k", "v")
    if name not in walked:
        return 1
    return getattr(config, "stages_of_v", stages) if name == "v" else stages


def _holders(kernel: Kernel) -> list[Holder]:
    """The threads of a block: those that copy and each warpgroup, or all alike."""
    report, config = kernel.report, kernel.config
    if report is None:
        return []
    given = report.setmaxnreg
    if not {"inc", "dec"} <= given.keys():
        held = -(-report.registers // 8) * 8
        all_of_it = Number(report.threads * held, "machine code")
        named = Number(report.registers, "machine code")
        return [Holder("block", all_of_it, Number(held, "machine code"), named)]

    def holder(name: str, threads: int, action: str) -> Holder:
        each = given[action]
        together = Number(threads * each.available, "machine code")
        available, named = each.available, min(each.named, each.available)
        return Holder(
            name, together, Number(available, "machine code"), Number(named, "machine code")
        )

    groups = config.num_warps * _WARP // _WARPGROUP
    multiply = [holder(f"warpgroup {n}", _WARPGROUP, "inc") for n in range(groups)]
    return [*multiply, holder("copies", report.threads - groups * _WARPGROUP, "dec")]
