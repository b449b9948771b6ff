"""`numflash-inspect`: a kernel's machine code on a GPU that need not be here.

It shows registers, spills, shared memory, the blocks that fit on an SM and the resource that
limits them, the number of each instruction, and the compiler's warnings. For kernels with products
of warpgroups it also shows the work of their main loop for each tile (`main_loop`).
"""

import argparse
import json
import logging
import sys
from dataclasses import asdict, dataclass, field
from functools import partial

from numflash.configs import (
    DTYPES,
    FAMILIES,
    MAX_HEAD_DIM,
    QUANTIZE_CONFIGS,
    Config,
    DequantizeConfig,
    QuantizeConfig,
    Traits,
    fp8,
    padded_fp8_head_dim,
    padded_head_dim,
    parse_config,
    quantize_config,
)
from numflash.configs.formats import FORMATS
from numflash.machine_code.compiler import compile_ptx, get_cubin
from numflash.machine_code.main_loop import MainLoop, Registers, read_main_loop, read_setmaxnreg
from numflash.machine_code.sass import count_instructions, disassemble
from numflash.problem.fp8 import GRANULARITIES, Fp8Recipe
from numflash.runtime.commands import command
from numflash.runtime.devices import ARCHITECTURES, KB, Architecture, architecture, blocks_per_sm
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.mode import SIMULATED
from numflash.selection.rules import choose, force

_log = logging.getLogger("numflash")
_KERNELS = (*FAMILIES, *QUANTIZE_CONFIGS)
_NO_SIMULATOR = (
    "kernels cannot be compiled while NUMBA_ENABLE_CUDASIM is set, because it replaces Numba's "
    "compiler by its simulator; unset it"
)


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
        raise UnsupportedError(_NO_SIMULATOR)
    cubin = get_cubin(config, traits, limits)
    try:
        sass = disassemble(cubin.code)
    except UnsupportedError as error:
        _log.warning("instructions are not counted: %s", error)
        sass = None
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


class Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line, and exits with 2."""

    def error(self, message: str):
        """Print the message, and exit."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="numflash-inspect",
        description="What a kernel is on a GPU, without having that GPU: registers, spills, "
        "shared memory, occupancy, instructions, compiler warnings.",
    )
    parser.add_argument("kernel", choices=_KERNELS)
    parser.add_argument(
        "--arch", required=True, metavar="ARCH", help=f"one of {', '.join(ARCHITECTURES)}"
    )
    parser.add_argument(
        "--dtype",
        default="float16",
        choices=DTYPES,
        help="of the arrays, with --precision fp8 of the result; default: float16",
    )
    parser.add_argument(
        "--head-dim", type=int, default=64, metavar="N", help=f"1 to {MAX_HEAD_DIM}; default: 64"
    )
    parser.add_argument(
        "--head-dim-v", type=int, metavar="N", help="head dim of V; default: as --head-dim"
    )
    parser.add_argument(
        "--causal",
        action="store_true",
        help="accepted and without effect: a mask is data of the kernels, not code, so the same "
        "kernel runs",
    )
    parser.add_argument(
        "--window",
        type=int,
        nargs=2,
        metavar=("L", "R"),
        help="accepted and without effect, as --causal",
    )
    parser.add_argument("--softcap", action="store_true", help="with soft capping compiled in")
    parser.add_argument("--alibi", action="store_true", help="with ALiBi compiled in")
    parser.add_argument(
        "--unaligned",
        action="store_true",
        help="for rows that are not 16-byte aligned; implied by head dims that do not fill "
        "16 bytes",
    )
    parser.add_argument(
        "--precision",
        choices=("tf32", "fp8"),
        help="tf32: multiply float32 as tf32, on the tensor cores; fp8: the forward on e4m3",
    )
    parser.add_argument(
        "--key-scales",
        action="store_true",
        help="with --precision fp8, where fewer keys share a scale than lie in a tile",
    )
    parser.add_argument(
        "--config",
        metavar="STR",
        help="as in m64n32w4, sm80-m128n64w4s1 or fp8-sm89-m128n64w4s2; default: what numflash "
        "would use",
    )
    quantization = parser.add_argument_group(
        f"options of {', '.join(QUANTIZE_CONFIGS)}",
        "which of these kernels, where --config does not say it; quantize takes all of them, "
        "dequantize all but --granularity and --block",
    )
    quantization.add_argument(
        "--granularity",
        default="block",
        choices=GRANULARITIES,
        help="what shares a scale; default: block",
    )
    quantization.add_argument(
        "--block", type=int, default=128, metavar="N", help="tokens that do; default: 128"
    )
    quantization.add_argument("--hadamard", action="store_true", help="rows are rotated")
    quantization.add_argument("--transposed", action="store_true", help="tokens innermost, as V's")
    quantization.add_argument(
        "--format", default="e4m3", choices=tuple(FORMATS), help="default: e4m3"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print the report as JSON")
    output.add_argument("--sass", action="store_true", help="print the disassembly instead")
    output.add_argument("--ptx", action="store_true", help="print the PTX instead")
    return parser


def _traits(args: argparse.Namespace) -> Traits:
    head_dim_v = args.head_dim if args.head_dim_v is None else args.head_dim_v
    for option, value in (("--head-dim", args.head_dim), ("--head-dim-v", head_dim_v)):
        if not 1 <= value <= MAX_HEAD_DIM:
            raise ValueError(f"{option} must be 1 to {MAX_HEAD_DIM}, got {value}")
    vector = 4 if args.dtype == "float32" else 8
    aligned = args.head_dim % vector == 0 and head_dim_v % vector == 0
    is_fp8 = args.precision == "fp8"
    if is_fp8 and args.kernel not in ("forward", "combine"):
        raise ValueError(f"--precision fp8 is of the forward; {args.kernel} has no such kernel")
    if args.key_scales and not is_fp8:
        raise ValueError("--key-scales goes with --precision fp8")
    if is_fp8 or args.kernel in QUANTIZE_CONFIGS:
        # Only results have rows of their own; codes are filled up.
        aligned = head_dim_v % vector == 0 if is_fp8 else args.head_dim % vector == 0
        columns = (padded_fp8_head_dim(n) for n in (args.head_dim, head_dim_v))
    else:
        columns = map(padded_head_dim, (args.head_dim, head_dim_v))
    is_forward = args.kernel == "forward"
    return Traits(
        args.dtype,
        *columns,
        softcap=args.softcap,
        alibi=args.alibi,
        vectorized=aligned and not args.unaligned,
        tf32=args.precision == "tf32",
        fp8=is_fp8 and is_forward,
        key_scales=args.key_scales and is_forward,
    )


def _config(args: argparse.Namespace, traits: Traits, limits: Architecture) -> Config | None:
    """The config that is asked for by name or by its task; None if by neither.

    Raises:
        ValueError, UnsupportedError: there is none.
    """
    if args.config is not None:
        return parse_config(args.kernel, args.config)
    options = {name: getattr(args, name) for name in ("hadamard", "transposed", "format")}
    if args.kernel == DequantizeConfig.family:
        return DequantizeConfig(fp8.generation(limits), **options)
    if args.kernel != QuantizeConfig.family:
        return QUANTIZE_CONFIGS[args.kernel]() if args.kernel in QUANTIZE_CONFIGS else None
    recipe = Fp8Recipe(args.granularity, args.block)
    find = partial(quantize_config, fp8.generation(limits), traits.head_dim, **options)
    if recipe.granularity == "token":
        return find(scale="token")
    # Where a thread block does not own all that shares a scale, others have found the scale.
    own = find(recipe.block) if recipe.granularity == "block" else None
    return own or find(scale="given")


def _expect_fit(config: Config, traits: Traits, limits: Architecture) -> None:
    """Raise UnsupportedError for a config around attention that a GPU or head_dim rules out."""
    generation = getattr(config, "generation", "sm75")
    why = config.misfit(traits) if isinstance(config, QuantizeConfig) else None
    if config.implementation == "fp8" and generation > fp8.generation(limits):
        why = f"its instructions begin with {generation.replace('sm', 'sm_')}"
    if why is not None:
        raise UnsupportedError(f"config {config} cannot run this {config.family}: {why}")


@command
def main(argv: list[str] | None = None) -> int:
    """Run `numflash-inspect`; the exit status. Bad arguments exit with 2."""
    parser = _parser()
    args = parser.parse_args(argv)
    if SIMULATED:
        parser.error(_NO_SIMULATOR)
    try:
        limits, traits = architecture(args.arch), _traits(args)
        config = _config(args, traits, limits)
        if config is None:
            choice = choose(args.kernel, traits, limits)
        else:
            choice = force(args.kernel, config, traits, limits)
        config, traits = choice.config, choice.traits
        _expect_fit(config, traits, limits)
    except (ValueError, UnsupportedError) as error:
        parser.error(str(error))
    try:
        if args.ptx:
            print(compile_ptx(config, traits, limits))
        elif args.sass:
            print(disassemble(get_cubin(config, traits, limits).code))
        else:
            report = inspect_kernel(config, traits, limits)
            text = json.dumps(asdict(report), indent=2) if args.json else describe(report, limits)
            print(text)
    except UnsupportedError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
