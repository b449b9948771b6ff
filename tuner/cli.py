"""`numflash-tune`: find, prove and remember the best config of each kernel on a GPU.

numflash-tune                                        this machine's GPU, common problems
numflash-tune --device "NVIDIA A100" --offline       predict for a GPU that is not here
numflash-tune --capture FILE -- python program.py    note the problems of a program
numflash-tune --from-capture FILE                    and tune that
numflash-tune --precision fp8                        the forward on 8-bit floats
numflash-tune show | validate | export | merge | clear
"""

import argparse
import difflib
import logging
import os
import subprocess
import sys
from pathlib import Path

from numflash.configs import DTYPES
from numflash.configs.features import FEATURES
from numflash.runtime.commands import command
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.files import require_replaceable
from numflash.runtime.printable import printable
from numflash.selection.capture import read as read_capture

from . import SAMPLERS, caches
from .problems import FAMILIES, expect_positive, problems_of

_log = logging.getLogger("numflash")

_TRIALS = 48
_INTERRUPTED = 130
# As `ProblemClass.of` rounds.
_UNITS = {"": 1, "K": 1024, "M": 1024**2}


def make_parser() -> argparse.ArgumentParser:
    """The options of a run."""
    parser = caches.Parser(
        prog="numflash-tune",
        description="Find, prove and remember the best config of each kernel on a GPU. "
        f"Subcommands for the config cache: {', '.join(caches.COMMANDS)}.",
    )
    where = parser.add_argument_group("where")
    where.add_argument(
        "--device",
        metavar="D",
        help='a GPU of this machine by number (default: 0), or by name, as in "NVIDIA A100", or '
        "an architecture, as in sm_89",
    )
    where.add_argument(
        "--offline",
        action="store_true",
        help="predict from machine code instead of measuring; needs no GPU",
    )
    where.add_argument("--list-devices", action="store_true", help="the GPUs known by name")
    what = parser.add_argument_group("what: every combination of these is a class of problems")
    what.add_argument(
        "--pass", dest="passes", nargs="+", choices=tuple(FAMILIES), help="default: all there are"
    )
    what.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float16", "bfloat16"])
    what.add_argument("--head-dim", nargs="+", type=int, default=[64, 128], metavar="N")
    what.add_argument("--head-dim-v", type=int, metavar="N", help="default: as --head-dim")
    what.add_argument(
        "--mask",
        nargs="+",
        default=["full", "causal"],
        metavar="MASK",
        help="full, causal, or windowN: a query sees N keys (default: full causal)",
    )
    what.add_argument("--seqlen", nargs="+", type=int, default=[4096], metavar="N", help="keys")
    what.add_argument("--seqlen-q", type=int, metavar="N", help="queries; default: as --seqlen")
    what.add_argument("--batch", type=int, default=4, metavar="N", help="default: 4")
    what.add_argument("--heads", type=int, default=16, metavar="N", help="default: 16")
    what.add_argument("--heads-kv", type=int, metavar="N", help="default: as --heads")
    what.add_argument(
        "--varlen",
        action="store_true",
        help="sequences with lengths of their own: --batch of them, with --seqlen keys on average",
    )
    what.add_argument(
        "--page-size",
        type=int,
        metavar="N",
        help="a cache in pages of N keys, with room for --seqlen keys of each sequence; forward",
    )
    for row in FEATURES:
        what.add_argument(f"--{row.name}", action="store_true", help=f"with {row.title}")
    what.add_argument(
        "--precision",
        choices=("tf32", "fp8"),
        help="tf32: float32 on the tensor cores; fp8: the forward of 16-bit arrays on 8-bit "
        "floats, which only a GPU can judge",
    )
    what.add_argument(
        "--key-scales",
        action="store_true",
        help="with --precision fp8: fewer keys share a scale than lie in a tile",
    )
    what.add_argument(
        "--from-capture", metavar="FILE", help="the classes that --capture noted, instead"
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--trials", type=int, default=_TRIALS, metavar="N", help=f"per class; default: {_TRIALS}"
    )
    how.add_argument("--time-budget", type=float, metavar="SECONDS", help="of the whole run")
    how.add_argument(
        "--target",
        type=float,
        metavar="PERCENT",
        help="stop a class that is within so much of the time no kernel can beat",
    )
    how.add_argument("--sampler", choices=SAMPLERS, default="tpe", help="default: tpe")
    how.add_argument("--seed", type=int, metavar="N", help="of the sampler")
    how.add_argument(
        "--sram-budget", metavar="BYTES", help="shared memory a block may take, as in 48K"
    )
    how.add_argument(
        "--min-occupancy",
        type=float,
        default=0.0,
        metavar="PART",
        help="part of an SM's threads that must be resident, 0 to 1",
    )
    how.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="compiler processes"
    )
    how.add_argument(
        "--storage",
        metavar="URL",
        help="a database, as in postgresql://user@host/name, or a journal file, that several "
        "processes and hosts work on together; default: a journal in the user's cache",
    )
    how.add_argument(
        "--report", metavar="FILE", help="write a page with everything that was tried"
    )
    how.add_argument("--quiet", action="store_true", help="no plan and no progress bar")
    how.add_argument(
        "--capture",
        metavar="FILE",
        help="run the program after -- and note the classes of problems that it runs",
    )
    return parser


class _Formatter(logging.Formatter):
    """Warnings name files, devices and reasons that come from elsewhere."""

    def format(self, record: logging.LogRecord) -> str:
        """The message, safe for a terminal."""
        return "\n".join(map(printable, super().format(record).split("\n")))


@command
def main(argv: list[str] | None = None) -> int:
    """Run `numflash-tune`; the exit status. Bad arguments exit with 2, Ctrl-C with 130."""
    argv = list(sys.argv[1:] if argv is None else argv)
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("numflash: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    if argv and argv[0] in caches.COMMANDS:
        return caches.main(argv)
    program = []
    if "--" in argv:
        at = argv.index("--")
        argv, program = argv[:at], argv[at + 1 :]
    parser = make_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_about_unknown(unknown))
    if (args.capture is None) != (not program):
        parser.error("--capture FILE goes with a program: --capture FILE -- python program.py")
    try:
        if program:
            return _capture(args.capture, program, parser)
        return _tune(args, parser)
    except KeyboardInterrupt:
        hint = "" if program else "; the same command goes on from here"
        print(f"stopped{hint}", file=sys.stderr)
        return _INTERRUPTED


def _about_unknown(arguments: list[str]) -> str:
    """The message about unknown arguments: a word may be meant as a subcommand."""
    said = f"unrecognized arguments: {' '.join(arguments)}"
    words = [word for word in arguments if not word.startswith("-")]
    if not words:
        return said
    near = difflib.get_close_matches(words[0], caches.COMMANDS, n=1)
    hint = f"; did you mean numflash-tune {near[0]}?" if near else "."
    return f"{said}{hint} Subcommands, which come first, are {', '.join(caches.COMMANDS)}"


def _capture(path: str, program: list[str], parser: argparse.ArgumentParser) -> int:
    """Run a program that notes its problem classes; its exit status."""
    environment = {**os.environ, "NUMFLASH_CAPTURE": os.path.abspath(path)}
    try:
        status = subprocess.run(program, env=environment, check=False).returncode
    except OSError as error:
        parser.error(f"cannot run {program[0]}: {error}")
    try:
        count = len(read_capture(path))
    except FileNotFoundError:
        print(f"{program[0]} ran no attention: {path} was not written", file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f"numflash-tune: {path} is no capture: {error}", file=sys.stderr)
    else:
        print(f"{count} classes of problems are in {path}")
    # As a shell has it of a program that a signal ended.
    return status if status >= 0 else 128 - status


def _tune(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    try:
        from optuna.exceptions import OptunaError

        from . import report
        from .measuring.measurer import DeviceMeasurer, DeviceUnavailableError
        from .search.pool import NoCompilerError
        from .search.search import StoppingRules, make_sampler
        from .search.session import Options, Session
        from .search.studies import StorageError
        from .space.configs import Budgets
        from .space.machines import names
        from .space.target import find_target
    except ImportError as error:
        parser.error(f'{error}; the tuner needs: pip install "numflash[tune]"')
    if args.list_devices:
        print("\n".join(names()))
        return 0
    try:
        problems = problems_of(args)
        target = find_target(args.device, args.offline)
        options = Options(
            rules=StoppingRules(
                expect_positive("--trials", args.trials),
                expect_positive("--time-budget", args.time_budget),
                None if args.target is None else expect_positive("--target", args.target) / 100,
            ),
            budgets=Budgets(_bytes(args.sram_budget), args.min_occupancy),
            sampler=args.sampler,
            seed=args.seed,
            jobs=expect_positive("--jobs", args.jobs),
            storage=args.storage,
        )
        make_sampler(args.sampler, args.seed)
        _expect_writable(args.report)
    except UnsupportedError as error:
        parser.error(
            f"{str(error).rstrip('.')}. To tune for a GPU that is not here: "
            '--device "NVIDIA A100" --offline'
        )
    except (ValueError, ImportError, OSError) as error:
        parser.error(str(error))
    measurer = (
        None if target.ordinal is None else DeviceMeasurer(target.ordinal, expected=target.key)
    )
    session, failed = Session(target.key, target.machine, measurer, options), 0
    try:
        with session:
            spaces = session.spaces(problems)
            for space in spaces:
                if (why := space.without_tf32) is not None:
                    parser.error(why)
            if not spaces:
                parser.error("nothing to tune: keys are not split in these problems")
            if not args.quiet:
                print(printable(str(session.plan(spaces))), file=sys.stderr, flush=True)
            if measurer is None:
                session.compile_ahead(spaces)
            for number, space in enumerate(spaces):
                title = f"[{number + 1}/{len(spaces)}] {space.problem}"
                left = len(spaces) - number
                try:
                    session.tune(space, left, title, args.quiet)
                except LookupError as error:
                    print(f"numflash-tune: {printable(error.args[0])}", file=sys.stderr)
                    failed += 1
    except (
        ValueError,
        OSError,
        OptunaError,
        StorageError,
        DeviceUnavailableError,
        NoCompilerError,
    ) as error:
        reason = printable(" ".join(str(error).split()))
        parser.exit(1, f"{parser.prog}: error: {reason}\n")
    finally:
        if measurer is not None:
            measurer.close()
        if session.results:
            print(report.table(session.results))
            _write_report(args.report, session.results)
    return 1 if failed else 0


def _expect_writable(path: str | None) -> None:
    """Raise ValueError if a report cannot be written there; what is there stays as it is."""
    if path is None:
        return
    try:
        require_replaceable(Path(path))
    except OSError as error:
        raise ValueError(f"--report cannot be written: {error}") from error


def _write_report(path: str | None, results: list) -> None:
    """Write the report, and beside it the page of each winner."""
    if path is None:
        return
    from . import report

    try:
        report.write_html(path, results, _write_pages(Path(path), results))
    except OSError as error:
        print(f"numflash-tune: cannot write the report: {error}", file=sys.stderr)
    else:
        print(f"report: {Path(path).resolve()}")


def _write_pages(path: Path, results: list) -> dict[int, str]:
    """Explain each winner in a file beside the report; addresses by the place of the result."""
    from .explain.asked import TILED
    from .explain.classes import write_page_of_class

    pages = {}
    for number, result in enumerate(results):
        if result.winner is None or result.problem.family not in TILED:
            continue
        page = path.with_name(f"{path.stem}-{number + 1}{path.suffix}")
        try:
            write_page_of_class(page, result.problem, result.device, result.best.config)
        except (ValueError, UnsupportedError) as error:
            _log.warning("no page explains %s: %s", result.problem, error)
        else:
            pages[number] = page.name
    return pages


def _bytes(text: str | None) -> int | None:
    """A number of bytes, as in 49152 or 48K."""
    if text is None:
        return None
    unit = text[-1:].upper() if text[-1:].isalpha() else ""
    digits = text.removesuffix(text[-1:]) if unit else text
    if unit not in _UNITS or not digits.isdecimal():
        raise ValueError(f"--sram-budget must be a number of bytes, as in 48K, got {text!r}")
    return int(digits) * _UNITS[unit]


if __name__ == "__main__":
    sys.exit(main())
