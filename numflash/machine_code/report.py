"""The report on a kernel's machine code on a GPU that need not be here.

It shows registers, spills, shared memory, the blocks that fit on an SM and the resource that
limits them, the number of each instruction, and the compiler's warnings. For kernels with products
of warpgroups it also shows the work of their main loop for each tile (`main_loop`).
"""

import logging
from dataclasses import dataclass, field

from numflash.configs import Config, Traits
from numflash.machine_code.compiler import Cubin, get_cubin
from numflash.machine_code.main_loop import MainLoop, Registers, read_main_loop, read_setmaxnreg
from numflash.machine_code.sass import count_instructions, disassemble
from numflash.runtime.devices import KB, Architecture, blocks_per_sm
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.mode import SIMULATED

_log = logging.getLogger("numflash")
NO_SIMULATOR = (
    "kernels cannot be compiled while NUMBA_ENABLE_CUDASIM is set, because it replaces Numba's "
    "compiler by its simulator; unset it"
)
"""Why there is no report on a kernel in the simulator."""


@dataclass(frozen=True)
class Report:
    """A kernel's machine code on one architecture, in figures.

    Attributes:
        kernel: family, as in `configs.FAMILIES` and `configs.QUANTIZE_CONFIGS`.
        arch: as in "sm_90a".
        config, traits: string forms.
        registers, spill_store_bytes, spill_load_bytes, stack_bytes: per thread, when it starts.
        smem_bytes, threads: per block.
        blocks_per_sm: blocks that fit on an SM at once; 0 if the kernel cannot run.
        limited_by: "threads", "blocks", "registers" or "shared memory".
        instructions: see `sass.count_instructions`; empty where there is no disassembler.
        warnings: lines of the compiler's log.
        compile_ms: when it was compiled, from Python source to machine code.
        setmaxnreg: of warps that give registers back ("dec") and of those that take them ("inc").
        main_loop: of products of warpgroups; None where there are none, or no disassembler.
    """

    kernel: str
    arch: str
    config: str
    traits: str
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    smem_bytes: int
    threads: int
    blocks_per_sm: int
    limited_by: str
    instructions: dict[str, int]
    warnings: tuple[str, ...]
    compile_ms: float
    setmaxnreg: dict[str, Registers] = field(default_factory=dict)
    main_loop: MainLoop | None = None

    @property
    def faults(self) -> tuple[str, ...]:
        """Faults of a kernel, in words: spills, local memory, float64, warnings, no room."""
        counts = {name: self.instructions.get(name, 0) for name in ("LDL", "STL", "F64")}
        found = {
            "spill stores": self.spill_store_bytes,
            "spill loads": self.spill_load_bytes,
            "stack": self.stack_bytes,
            "loads from local memory": counts["LDL"],
            "stores to local memory": counts["STL"],
            "float64 instructions": counts["F64"],
            "compiler warnings": len(self.warnings),
        }
        faults = [f"{what}: {amount}" for what, amount in found.items() if amount]
        if self.blocks_per_sm == 0:
            faults.append(f"no block fits: {self.limited_by}")
        return tuple(faults)


def inspect_kernel(config: Config, traits: Traits, limits: Architecture) -> Report:
    """Compile a kernel (or find it in the cache) and report on it.

    Without a disassembler `instructions` is empty and a warning is logged.

    Raises:
        UnsupportedError: the compiler packages are missing, or this is the simulator.
    """
    if SIMULATED:
        raise UnsupportedError(NO_SIMULATOR)
    cubin = get_cubin(config, traits, limits)
    return report_of(cubin, disassembled(cubin), config, traits, limits)


def disassembled(cubin: Cubin) -> str | None:
    """The text of a kernel; None and a warning in the log where there is no disassembler."""
    try:
        return disassemble(cubin.code)
    except UnsupportedError as error:
        _log.warning("instructions are not counted: %s", error)
        return None


def report_of(
    cubin: Cubin, sass: str | None, config: Config, traits: Traits, limits: Architecture
) -> Report:
    """The report on a compiled kernel and its text; without one `instructions` is empty."""
    blocks, limited_by = blocks_per_sm(
        limits, cubin.num_threads, cubin.registers, cubin.smem_bytes
    )
    return Report(
        kernel=config.family,
        arch=limits.arch,
        config=str(config),
        traits=str(traits),
        registers=cubin.registers,
        spill_store_bytes=cubin.spill_store_bytes,
        spill_load_bytes=cubin.spill_load_bytes,
        stack_bytes=cubin.stack_bytes,
        smem_bytes=cubin.smem_bytes,
        threads=cubin.num_threads,
        blocks_per_sm=blocks,
        limited_by=limited_by,
        instructions={} if sass is None else count_instructions(sass),
        warnings=cubin.warnings,
        compile_ms=round(cubin.compile_ms, 1),
        setmaxnreg={} if sass is None else read_setmaxnreg(sass),
        main_loop=None if sass is None else read_main_loop(sass),
    )


def describe(report: Report, limits: Architecture) -> str:
    """A report to be read by people."""
    spills = f"{report.spill_store_bytes} B stored, {report.spill_load_bytes} B loaded"
    present = {name: n for name, n in report.instructions.items() if n}
    counts = "   ".join(f"{name} {n}" for name, n in present.items())
    occupied = report.blocks_per_sm * report.threads
    warps = {"dec": "warps that copy", "inc": "warps that multiply"}
    later = [
        f"{registers.available} in {warps[action]} ({registers.named} used)"
        for action, registers in report.setmaxnreg.items()
    ]
    rows = {
        "traits": report.traits,
        "registers": "\nthen ".join([f"{report.registers} per thread", *later]),
        "spills": spills if report.spill_store_bytes or report.spill_load_bytes else "none",
        "stack": f"{report.stack_bytes} B per thread" if report.stack_bytes else "none",
        "shared memory": f"{report.smem_bytes / KB:.1f} KiB per block "
        f"(limit {limits.max_smem_per_block // KB} KiB)",
        "threads": f"{report.threads} per block",
        "blocks per SM": f"{report.blocks_per_sm}, limited by {report.limited_by} "
        f"({occupied} of {limits.max_threads_per_sm} threads)",
        "instructions": _wrap(counts) or "not counted",
        **({} if report.main_loop is None else _main_loop_rows(report.main_loop)),
        "warnings": "\n".join(report.warnings) or "none",
        "compile time": f"{report.compile_ms / 1e3:.2f} s",
    }
    indent = "\n" + " " * 17
    lines = [f"  {name:<15}{text.replace(chr(10), indent)}" for name, text in rows.items()]
    return "\n".join([f"{report.kernel} {report.config} on {report.arch}", *lines])


def cost_of_functions(report: Report, plain: Report) -> str:
    """What functions cost: the report next to that of the same kernel without them."""
    figures = {
        "registers": (plain.registers, report.registers),
        "spilled bytes": (plain.spill_store_bytes, report.spill_store_bytes),
        "instructions": tuple(sum(each.instructions.values()) for each in (plain, report)),
    }
    if plain.main_loop is not None and report.main_loop is not None:
        figures["issued in a turn of the main loop"] = tuple(
            sum(each.main_loop.instructions.values()) for each in (plain, report)
        )
    listed = "   ".join(f"{name} {a} -> {b}" for name, (a, b) in figures.items())
    return f"  {'functions':<15}{_wrap(listed).replace(chr(10), chr(10) + ' ' * 17)}"


def _main_loop_rows(loop: MainLoop) -> dict[str, str]:
    """Rows on a turn of the main loop: its instructions, and the least time of each kind."""

    def listed(counts: dict[str, int]) -> str:
        present = [f"{name.replace('_', ' ')} {n}" for name, n in counts.items() if n]
        return _wrap("   ".join(present)) or "nothing"

    groups, waits = " + ".join(map(str, loop.groups)), ", then ".join(map(str, loop.waits))
    tensor = loop.clocks["tensor"]
    names = {"tensor": "products", "special": "exponentials", "half_rate": "maxima, conversions"}
    clocks = [
        f"{names.get(unit, unit)} {n} clocks ({n / tensor:.0%})" for unit, n in loop.clocks.items()
    ]
    return {
        "main loop": f"{groups} products; waits until {waits} groups are under way",
        "overlap": f"{loop.overlapped_exponentials} of {loop.exponentials} exponentials while "
        "products are under way",
        "a turn takes": _wrap("   ".join(clocks)),
        "a turn issues": listed(loop.instructions),
        "it skips": listed(loop.skipped),
    }


def _wrap(text: str, width: int = 78) -> str:
    """Entries that are three blanks apart, on as many lines as they need."""
    lines = [""]
    for entry in filter(None, text.split("   ")):
        longer = f"{lines[-1]}   {entry}" if lines[-1] else entry
        if len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(entry)
    return "\n".join(lines)
