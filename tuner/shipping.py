"""`python -m numflash_tuner.shipping`: make the tables of configs that come with numflash again.

Predicted by the offline model, one file for each GPU. Only configs other than the default are
shipped. A class costs the compilation of its default, and of the configs that could displace it;
GPUs of one architecture share machine code. What was compiled is kept in a folder, and tables that
are fresh stay as they are, so that a run that was stopped soon is where it was. A
table measured on the GPU itself, by `numflash-tune export`, takes the place of a predicted one.
With `--strip` nothing is predicted: entries that would not be shipped today leave the tables.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from numflash.configs import parse_config
from numflash.problem.classes import ProblemClass
from numflash.runtime.commands import command
from numflash.selection import store
from numflash.selection.entries import Entry

from . import cli, model, tables
from .problems import problems_of
from .search.progress import format_duration
from .search.results import Result
from .search.search import StoppingRules
from .search.session import Options, Session
from .search.studies import ENVIRONMENT
from .space import machines
from .space.configs import Space
from .space.machines import Machine
from .space.target import Target, find_target

_PROBLEMS = (
    "--head-dim 64 128 256 --seqlen 4096",
    "--head-dim 192 --head-dim-v 128 --seqlen 4096",
    # Decoding: one query of each sequence, and many keys.
    "--pass forward --head-dim 64 128 --mask full --seqlen-q 1 --seqlen 65536 --batch 2",
    "--pass forward --head-dim 128 --mask full --seqlen-q 1 --seqlen 65536 --heads-kv 4",
)
"""float16 only: bfloat16 finds it near."""
_TRIALS = 12
_FOLDER = Path("build", "tables")


def make_table(name: str, jobs: int, quiet: bool) -> list[Entry]:
    """Predict the table of a GPU and write it; returns its entries.

    Args:
        name: of the GPU.
        jobs: compiler processes.
        quiet: show no progress.

    Raises:
        LookupError: a class cannot be tuned, or a config not be compiled.
    """
    target, rules = find_target(name, offline=True), StoppingRules(_TRIALS)
    with TemporaryDirectory() as folder:
        options = Options(rules, seed=0, jobs=jobs, storage=str(Path(folder, "studies.journal")))
        session = _tuned(name, target, options, quiet)
    entries = [entry for entry in session.entries if why_not(target.machine, entry) is None]
    found, tried = {entry.problem for entry in entries}, session.results
    stays = [str(result.problem) for result in tried if result.problem not in found]
    tables.write(tables.path_of(name), {target.key: entries}, tables.made_now(), stays)
    return entries


def _tuned(name: str, target: Target, options: Options, quiet: bool) -> Session:
    """A session that has tuned the classes of a table. Raises LookupError as `make_table`."""
    with Session(target.key, target.machine, None, options) as session:
        spaces = session.spaces(_problems())
        session.compile_ahead(spaces)
        for number, space in enumerate(spaces, 1):
            title = f"{name} [{number}/{len(spaces)}] {space.problem}"
            _expect_compiled(session.tune(space, len(spaces), title, quiet))
    return session


def _expect_compiled(result: Result) -> None:
    """Raise LookupError if a config was given up for reasons that are hardly its own."""
    for record in result.records:
        if record.outcome in ENVIRONMENT:
            raise LookupError(
                f"{record.config} of {result.problem} could not be looked at ({record.outcome}: "
                f"{record.reason}); the same command tries it again"
            )


def _problems() -> list[ProblemClass]:
    """The classes of a table."""
    parser, found = cli.make_parser(), []
    for options in _PROBLEMS:
        found += problems_of(parser.parse_args(["--dtype", "float16", *options.split()]))
    return list(dict.fromkeys(found))


def strip(path: Path) -> list[str]:
    """Take out of a table the entries that would not be shipped today; returns the reasons.

    Raises:
        ValueError: it is no table, or of a GPU that is unknown.
        OSError: it cannot be read or written.
    """
    made, table, removed = tables.made(path), store.read_file(path), []
    for device, entries in table.items():
        machine = machines.find(device.name)
        reasons = [why_not(machine, entry) for entry in entries]
        found = list(zip(entries, reasons, strict=True))
        table[device] = [entry for entry, why in found if why is None]
        removed += [f"{device.name}: {e.problem}: {e.config} {why}" for e, why in found if why]
    if removed:
        tables.write(path, table, made, tables.default_stays(path))
    return removed


def why_not(machine: Machine, entry: Entry) -> str | None:
    """Why an entry would not be shipped today; None if it would.

    Its times are those of the day when it was made. A prediction is judged by today's formulas,
    and by the gain that today's model must have.
    """
    if _is_default(machine, entry):
        return "is the default"
    space = Space(entry.problem, machine)
    config = parse_config(entry.problem.family, entry.config)
    if (failure := space.failure(config)) is not None:
        return "is not possible: " + failure[1]
    if entry.origin != "predicted":
        return None
    times = [model.estimate(machine, entry.problem, each).ms for each in (space.default, config)]
    needed = model.gain_needed(machine, entry.problem, config, space.default)
    gain = times[0] / times[1] - 1
    if gain <= needed:
        return f"gains {gain:.0%} over the default by formula, more than {needed:.0%} are needed"
    return None


def _is_default(machine: Machine, entry: Entry) -> bool:
    """Whether an entry's config runs without it, too."""
    return entry.config == str(Space(entry.problem, machine).default)


@command
def main(argv: list[str] | None = None) -> int:
    """Make the tables of some or all GPUs; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gpus", nargs="*", default=tables.GPUS, help="default: all")
    parser.add_argument("--all", action="store_true", help="also tables that are fresh")
    parser.add_argument(
        "--strip", action="store_true", help="predict nothing, only take out what is not shipped"
    )
    parser.add_argument(
        "--folder", type=Path, default=_FOLDER, help=f"for machine code: {_FOLDER}"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compiler processes")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    if args.strip:
        for name in args.gpus:
            print("\n".join(strip(tables.path_of(name)) or [f"{name}: nothing to take out"]))
        return 0
    # Apart from the user's, whose tuned configs would be tried first.
    os.environ["NUMFLASH_CACHE_DIR"] = str(args.folder.resolve())
    args.folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(args.gpus, 1):
        path, began = tables.path_of(name), time.monotonic()
        if path.exists() and not tables.staleness(path) and not args.all:
            done = "is fresh"
        else:
            try:
                made = make_table(name, args.jobs, args.quiet)
            except LookupError as error:
                parser.exit(1, f"{path.name} is not made: {error.args[0]}\n")
            done = f"{len(made)} entries, {format_duration(time.monotonic() - began)}"
        print(f"[{number}/{len(args.gpus)}] {path.name}: {done}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
