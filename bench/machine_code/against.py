"""Other compilers' kernels and ours side by side, from machine code: a turn of each main loop.

A row is a main loop, as `numflash.machine_code.main_loop` reads it: a turn for each tile, of one
warpgroup or, with products of single warps, of one warp. Numbers are instructions that the
turn issues, a slot of a scheduler each. A kernel whose warps have several roles has a row of each.

    clocks          that the turn's products take of the SM's tensor cores at least; of warpgroups
    slots, /score   all instructions, and these for each score of a thread. Scores are counted by
                    their exponentials, rounded down to a multiple of 4: the rest rescale sums
    overlapped      exponentials issued while the warpgroup's own products are under way, of all
    uniform         descriptors and addresses in uniform registers, moves to these included
    registers       at the start, and the highest that warps which multiply name after `setmaxnreg`
    local           loads and stores of local memory, in the turn and in the whole kernel

It is no speed: it says what a scheduler must issue, not how long anything waits.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.machine_code.fat_binaries import ForeignKernel, kernels_in
from bench.machine_code.kernels import NamedKernel
from bench.tables import tables
from numflash.configs import Traits, parse_config
from numflash.machine_code.compiler import get_cubin
from numflash.machine_code.main_loop import (
    WARP_PRODUCTS,
    MainLoop,
    read_main_loops,
    read_setmaxnreg,
)
from numflash.machine_code.sass import disassemble, opcodes
from numflash.runtime.devices import architecture
from numflash.runtime.errors import UnsupportedError
from numflash.selection.rules import choose

MOST_KERNELS = 64
"""A disassembler takes seconds for each."""
FAMILIES = ("forward", "backward", "backward-dq", "backward-dkdv")
HEAD_DIMS = (64, 96, 128, 192, 256)
_LOCAL = ("LDL", "STL")
_PIPES = {
    "MUFU": "MUFU",
    "FFMA": "FFMA",
    "FMUL": "FMUL",
    "FADD": "FADD",
    "FMNMX": "FMNMX",
    "FMNMX3": "FMNMX",
    "F2FP": "F2FP",
    "SHFL": "SHFL",
    **dict.fromkeys(("LDS", "LDSM", "STS", "STSM"), "LDS, STS"),
    **dict.fromkeys(("HGMMA", "QGMMA", "HMMA", "QMMA"), "products"),
    **dict.fromkeys(("R2UR", "S2UR", "REDUX"), "uniform"),
    **dict.fromkeys(("SYNCS", "BAR", "WARPGROUP", "WARPSYNC", "DEPBAR", "FENCE"), "barriers"),
    **dict.fromkeys(("BRA", "BRX", "BSSY", "BSYNC", "BREAK", "CALL", "RET"), "branches"),
}
_COPIES = ("UTMA", "UBLK", "USETMAXREG")
PIPES = (*dict.fromkeys(_PIPES.values()), "others")
"""Groups of opcodes in the order of the columns; the last are integers, predicates and copies."""
COLUMNS = (
    "kernel",
    "products",
    "clocks",
    "slots",
    "/score",
    "overlapped",
    *(pipe for pipe in PIPES if pipe != "products"),
    "registers",
    "local",
    "stack",
)


@dataclass(frozen=True)
class Budget:
    """A kernel's machine code in what the table shows.

    Attributes:
        loops: of its main loops, one of each role.
        registers: at the start.
        multiplying: the most that are named after `setmaxnreg`; None without one.
        stack_bytes: per thread.
        local: loads and stores of local memory in the whole kernel.
    """

    loops: list[MainLoop]
    registers: int
    multiplying: int | None
    stack_bytes: int
    local: int


def budget_of(sass: str, registers: int, stack_bytes: int) -> Budget:
    """The budget of a kernel, of nvdisasm's text."""
    loops = read_main_loops(sass) or read_main_loops(sass, WARP_PRODUCTS)
    taking = read_setmaxnreg(sass).get("inc")
    return Budget(
        loops,
        registers,
        None if taking is None else taking.named,
        stack_bytes,
        sum(opcode.split(".")[0] in _LOCAL for opcode in opcodes(sass)),
    )


def pipe_of(opcode: str) -> str:
    """The group of `PIPES` of an opcode without modifiers."""
    if opcode in _PIPES:
        return _PIPES[opcode]
    return "uniform" if opcode.startswith("U") and not opcode.startswith(_COPIES) else "others"


def scores_of(loop: MainLoop) -> int:
    """Scores of a thread a turn; 0 where a loop has no exponentials."""
    return loop.exponentials // 4 * 4


def rows_of(label: str, budget: Budget) -> list[list[str]]:
    """Cells of `COLUMNS`, a row for each main loop."""
    return [_row(label, budget, loop) for loop in budget.loops]


def _row(label: str, budget: Budget, loop: MainLoop) -> list[str]:
    counts = dict.fromkeys(PIPES, 0)
    for opcode, count in loop.opcodes.items():
        counts[pipe_of(opcode)] += count
    scores, of_warpgroups = scores_of(loop), loop.clocks["tensor"] > 0
    later = "" if budget.multiplying is None else f", {budget.multiplying}"
    in_loop = sum(loop.opcodes.get(name, 0) for name in _LOCAL)
    return [
        label,
        " + ".join(loop.shapes),
        str(loop.clocks["tensor"]) if of_warpgroups else "",
        str(loop.issued),
        f"{loop.issued / scores:.2f}" if scores else "",
        f"{loop.overlapped_exponentials} of {loop.exponentials}" if of_warpgroups else "",
        *(str(counts[pipe]) for pipe in PIPES if pipe != "products"),
        f"{budget.registers}{later}",
        f"{in_loop} of {budget.local}",
        str(budget.stack_bytes),
    ]


def foreign_budgets(paths: Iterable[Path], matching: str) -> Iterator[tuple[str, str, Budget]]:
    """(label, name, budget) of other compilers' kernels that have a main loop.

    Raises:
        ValueError: as `kernels_in`; or so many kernels match that a disassembler takes for ever.
    """
    found: list[tuple[Path, ForeignKernel]] = []
    for path in paths:
        found += [(path, kernel) for kernel in kernels_in(path, matching)]
    if len(found) > MOST_KERNELS:
        listed = "\n".join(f"  {kernel}" for _, kernel in found[:: len(found) // 8 + 1])
        raise ValueError(
            f"{len(found)} kernels match, at most {MOST_KERNELS} are disassembled: say which by "
            f"--matching REGEX, as it is found in names such as\n{listed}"
        )
    numbers: dict[str, int] = {}
    for path, kernel in found:
        sass = disassemble(kernel.code, kernel.symbol)
        budget = budget_of(sass, kernel.registers, kernel.stack_bytes)
        if budget.loops:
            stem = _stem(Path(kernel.file) if path.is_dir() else path)
            numbers[stem] = numbers.get(stem, 0) + 1
            yield f"{stem} {numbers[stem]}", str(kernel), budget


def _stem(path: Path) -> str:
    """What a file's kernels are called: a cubin's name, or the first word of a wheel's."""
    return path.stem if path.suffix == ".cubin" else path.name.split("-")[0].removesuffix(".so")


def defaults(archs: Iterable[str]) -> list[NamedKernel]:
    """Our kernels of bfloat16 that `choose` takes for many rows on these GPUs."""
    found: dict[NamedKernel, None] = {}
    for arch in archs:
        for head_dim in HEAD_DIMS:
            for family in FAMILIES:
                try:
                    traits = Traits("bfloat16", head_dim, head_dim)
                    choice = choose(family, traits, architecture(arch))
                except UnsupportedError:
                    continue
                config = getattr(choice.config, "compiled", choice.config)
                found[NamedKernel(family, arch, str(choice.traits), str(config))] = None
    return list(found)


def budget_of_ours(kernel: NamedKernel) -> Budget:
    """Compile one of our kernels, or find it in the cache; its budget."""
    config, limits = parse_config(kernel.family, kernel.config), architecture(kernel.arch)
    cubin = get_cubin(config, Traits.parse(kernel.traits), limits)
    return budget_of(disassemble(cubin.code), cubin.registers, cubin.stack_bytes)


def report(paths: Iterable[Path], matching: str, ours: list[NamedKernel] | None) -> str:
    """The table: other compilers' kernels, then `ours`, or the defaults for the same GPUs.

    Raises:
        ValueError, UnsupportedError, OSError: as `kernels_in`; or no kernel has a main loop.
    """
    foreign = list(foreign_budgets(paths, matching))
    if not foreign:
        raise ValueError("no kernel that matches has a loop with products of tensor cores")
    if ours is None:
        names = {name.split("/")[0] for _, name, _ in foreign}
        ours = defaults("sm_90a" if name == "sm_90" else name for name in sorted(names))
    # Kernels that differ outside of their main loops only are one row.
    merged: dict[tuple, list[str]] = {}
    for label, _, budget in foreign:
        for row in rows_of(label, budget):
            merged.setdefault(tuple(row[1:]), []).append(label)
    rows = [[_together(labels), *cells] for cells, labels in merged.items()]
    for kernel in ours:
        rows += rows_of(f"{kernel.family} {kernel.traits} {kernel.config}", budget_of_ours(kernel))
    names = [f"{label}: {name}" for label, name, _ in foreign]
    return "\n".join([tables.markdown(COLUMNS, rows), "", *names])


def _together(labels: list[str]) -> str:
    """Labels with the number of a kernel each: fa3 1, 4 for fa3 1 and fa3 4."""
    first, *others = dict.fromkeys(labels)
    stem = first.rpartition(" ")[0]
    return ", ".join([first, *(each.removeprefix(f"{stem} ") for each in others)])
