"""`numflash-inspect`: the report on a kernel's machine code (`machine_code.report`)."""

import argparse
import json
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from numflash.api.inspect_functions import program_of
from numflash.api.pages import Inspection, page_writer
from numflash.configs import (
    DTYPES,
    FAMILIES,
    MAX_HEAD_DIM,
    QUANTIZE_CONFIGS,
    Config,
    DequantizeConfig,
    MergeOntoConfig,
    PrepareConfig,
    QuantizeConfig,
    RotaryConfig,
    Traits,
    fp8,
    padded_fp8_head_dim,
    padded_head_dim,
    parse_config,
    quantize_config,
)
from numflash.configs.features import FEATURES
from numflash.configs.formats import FORMATS
from numflash.machine_code.compiler import compile_ptx, get_cubin
from numflash.machine_code.report import (
    NO_SIMULATOR,
    cost_of_functions,
    describe,
    inspect_kernel,
)
from numflash.machine_code.sass import disassemble
from numflash.problem.block_masks import block_size_of
from numflash.problem.fp8 import GRANULARITIES, Fp8Recipe
from numflash.problem.programs import BIAS_DTYPES
from numflash.runtime.commands import command
from numflash.runtime.devices import ARCHITECTURES, Architecture, architecture
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.files import require_replaceable
from numflash.runtime.mode import SIMULATED
from numflash.selection.rules import choose, force

_OF_ROWS = {config.family: config for config in (RotaryConfig, PrepareConfig, MergeOntoConfig)}
_DEFAULTS = QUANTIZE_CONFIGS | _OF_ROWS
_KERNELS = (*FAMILIES, *_DEFAULTS)


class Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line, and exits with 2."""

    def error(self, message: str):
        """Say what is wrong."""
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
    for row in FEATURES:
        text = f"with {row.title} compiled in"
        parser.add_argument(f"--{row.name}", action="store_true", help=text)
    functions = parser.add_argument_group(
        "functions of the caller", "compiled in; the report then also says what they cost"
    )
    for name in ("score", "mask"):
        functions.add_argument(
            f"--{name}-mod", metavar="FUNCTION", help="FILE.py:NAME, which is run, or MODULE:NAME"
        )
    functions.add_argument(
        "--aux",
        nargs="+",
        default=[],
        metavar="WHAT",
        help="what they get: arrays as DTYPE[AXES], as in float32[2], or numbers",
    )
    functions.add_argument("--bias", choices=BIAS_DTYPES, help="with a bias of this dtype")
    functions.add_argument("--mask", action="store_true", help="with a boolean mask")
    parser.add_argument(
        "--block-mask",
        type=int,
        nargs=2,
        metavar=("M", "N"),
        help="with a block mask, whose blocks have M queries and N keys",
    )
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
    output.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write the report as a page: the main loop, shared memory and registers drawn",
    )
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
        tuple(row.name for row in FEATURES if getattr(args, row.name)),
        vectorized=aligned and not args.unaligned,
        tf32=args.precision == "tf32",
        fp8=is_fp8 and is_forward,
        key_scales=args.key_scales and is_forward,
        blocks=block_size_of(args.block_mask) if args.block_mask else (),
        program=program_of(args.score_mod, args.mask_mod, args.aux, args.bias, args.mask),
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
        return _DEFAULTS[args.kernel]() if args.kernel in _DEFAULTS else None
    recipe = Fp8Recipe(args.granularity, args.block)
    find = partial(quantize_config, fp8.generation(limits), traits.head_dim, **options)
    if recipe.granularity == "token":
        return find(scale="token")
    # Where a thread block does not own all that shares a scale, others have found the scale.
    own = find(recipe.block) if recipe.granularity == "block" else None
    return own or find(scale="given")


def _writer(path: Path):
    """The function that writes a page, once it is known that the file can be written.

    Raises:
        OSError: it cannot.
        UnsupportedError: nothing here writes pages.
    """
    require_replaceable(path)
    return page_writer()


@command
def main(argv: list[str] | None = None) -> int:
    """Run `numflash-inspect`; the exit status. Bad arguments exit with 2."""
    parser = _parser()
    args = parser.parse_args(argv)
    if SIMULATED:
        parser.error(NO_SIMULATOR)
    try:
        limits, traits = architecture(args.arch), _traits(args)
        config = _config(args, traits, limits)
        if config is None:
            choice = choose(args.kernel, traits, limits)
        else:
            choice = force(args.kernel, config, traits, limits)
        config, traits = choice.config, choice.traits
    except (TypeError, ValueError, UnsupportedError) as error:
        parser.error(str(error))
    try:
        write = None if args.html is None else _writer(args.html)
        if args.ptx:
            print(compile_ptx(config, traits, limits))
        elif args.sass:
            print(disassemble(get_cubin(config, traits, limits).code))
        else:
            report = inspect_kernel(config, traits, limits)
            if args.json:
                print(json.dumps(asdict(report), indent=2))
            elif args.html is not None:
                write(Inspection(config, traits, limits, report, args.html))
                print(args.html)
            else:
                print(describe(report, limits))
                if traits.program:
                    plain = inspect_kernel(config, replace(traits, program=""), limits)
                    print(cost_of_functions(report, plain))
    except UnsupportedError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    except BrokenPipeError:
        raise  # of stdout, which `command` knows
    except OSError as error:
        parser.exit(1, f"{parser.prog}: error: {args.html}: {error.strerror or error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
