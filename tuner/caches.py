"""`numflash-tune show | validate | export | merge | clear`: the config cache by command line."""

import argparse
import sys
from pathlib import Path
from typing import TextIO

from numflash.api.inspect import Parser
from numflash.runtime.cache_folder import cache_dir, refusal
from numflash.runtime.printable import printable
from numflash.selection import store
from numflash.selection.entries import DeviceKey, Entry

from . import tables

COMMANDS = ("show", "validate", "export", "merge", "clear")


def main(argv: list[str]) -> int:
    """Run a subcommand; the exit status. Bad arguments exit with 2."""
    parser = Parser(prog="numflash-tune", description=f"The config cache, {store.config_dir()}.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="what is remembered for each device")
    show.add_argument("--device", help="only devices whose name contains this")
    show.add_argument("--shipped", action="store_true", help="the tables that come with numflash")
    validate = commands.add_parser("validate", help="what is wrong with files; exit 1 if anything")
    validate.add_argument("files", nargs="*", help="default: those of the cache")
    validate.add_argument(
        "--shipped",
        action="store_true",
        help="the tables that come with numflash; also whether they are stale",
    )
    export = commands.add_parser("export", help="write the cache to one file")
    export.add_argument("file")
    export.add_argument("--device", help="only devices whose name contains this")
    merge = commands.add_parser("merge", help="add the entries of files to the cache")
    merge.add_argument("files", nargs="+")
    clear = commands.add_parser("clear", help="forget what was tuned")
    clear.add_argument("--device", help="only devices whose name contains this")
    clear.add_argument(
        "--studies", action="store_true", help="also what was tried, of all devices"
    )
    for command, run in (
        (show, _show),
        (validate, _validate),
        (export, _export),
        (merge, _merge),
        (clear, _clear),
    ):
        command.set_defaults(run=run)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except BrokenPipeError:
        raise  # of stdout: nobody reads on
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog} {args.command}: error: {printable(str(error))}\n")


def _print(*lines: str, file: TextIO | None = None) -> None:
    """Print lines in which names come from files."""
    print(*map(printable, lines), sep="\n", file=file)


def _show(args: argparse.Namespace) -> int:
    found = store.read_shipped() if args.shipped else store.read_all()
    chosen = _chosen(found, args.device)
    for device in chosen:
        _print(str(device), *_lines(found[device]))
    if not chosen:
        of = f" of a device like {args.device!r}" if args.device else ""
        where = "the shipped tables" if args.shipped else store.config_dir()
        _print(f"no entries{of} in {where}", file=sys.stderr)
    if args.shipped:
        for line in (*_defaults(), *_stale()):
            _print(line)
    return 0


def _defaults() -> list[str]:
    """A line for each shipped table in which some defaults were not displaced."""
    counts = {path.name: len(tables.default_stays(path)) for path in tables.paths()}
    return [f"{name}: the default stays in {n} classes" for name, n in counts.items() if n]


def _stale() -> list[str]:
    """A line for each shipped table that is stale."""
    return [warning for path in tables.paths() if (warning := tables.warning(path))]


def _lines(entries: list[Entry]) -> list[str]:
    header = ("problem class", "config", "ms", "default", "ms", "speed-up", "origin", "date")
    rows = [header]
    for entry in sorted(entries, key=lambda entry: str(entry.problem)):
        rows.append(
            (
                str(entry.problem),
                entry.config,
                f"{entry.time_ms:.4g}",
                entry.default_config,
                "-" if entry.default_ms is None else f"{entry.default_ms:.4g}",
                "-" if entry.default_ms is None else f"{entry.default_ms / entry.time_ms:.2f}",
                entry.origin,
                str(entry.moment.date()),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _validate(args: argparse.Namespace) -> int:
    paths = args.files or sorted(map(str, store.config_dir().glob("*.json")))
    paths = list(map(str, tables.paths())) if args.shipped else paths
    wrong = [problem for path in paths for problem in store.validate(path)]
    if not (args.files or args.shipped):
        refused = [refusal(), *(refusal(Path(path)) for path in paths)]
        wrong = [*dict.fromkeys(filter(None, refused)), *wrong]
    wrong += _stale() if args.shipped else []
    _print(*wrong or [f"{len(paths)} files, nothing wrong"])
    return 1 if wrong else 0


def _export(args: argparse.Namespace) -> int:
    devices = None
    if args.device:
        devices = _chosen(store.read_all(), args.device)
        if not devices:
            raise ValueError(f"the config cache has no device like {args.device!r}")
    _print(f"{store.export(args.file, devices)} entries in {args.file}")
    return 0


def _merge(args: argparse.Namespace) -> int:
    counts = store.merge(args.files)
    _print(
        f"{counts.added} added, {counts.replaced} replaced, {counts.unchanged} unchanged, "
        f"{counts.skipped} skipped"
    )
    return 0


def _clear(args: argparse.Namespace) -> int:
    removed = []
    if args.device is None:
        removed = store.clear()
    else:
        for device in _chosen(store.read_all(), args.device):
            removed += store.clear(device)
    if args.studies:
        folder = cache_dir() / "studies"
        found = sorted(folder.glob("*.journal*")) if folder.is_dir() else []
        for path in found:
            path.unlink()
        removed += found
    _print(*[f"removed {path}" for path in removed] or ["nothing to remove"])
    return 0


def _chosen(tables: dict[DeviceKey, list[Entry]], part: str | None) -> list[DeviceKey]:
    wanted = (part or "").lower()
    return sorted((d for d in tables if wanted in d.name.lower()), key=str)
