"""`python -m numflash_tuner.shipping`: make the tables of configs that come with numflash again.

Predicted by the offline model, one file for each GPU; GPUs of one architecture share machine code,
so that the second costs little. A table measured on the GPU itself, by `numflash-tune export`,
takes the place of a predicted one. Only configs other than the default are shipped. With `--strip`
nothing is predicted: entries that would not be shipped today leave the existing tables.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from numflash.configs import parse_config
from numflash.runtime.commands import command
from numflash.selection import store
from numflash.selection.entries import DeviceKey, Entry

from . import cli, model, tables
from .space import machines
from .space.configs import Space
from .space.machines import Machine

_PROBLEMS = (
    "--head-dim 64 128 --seqlen 4096",
    # Decoding: one query of each sequence, and many keys.
    "--pass forward --head-dim 64 128 --mask full --seqlen-q 1 --seqlen 65536 --batch 2",
    "--pass forward --head-dim 128 --mask full --seqlen-q 1 --seqlen 65536 --heads-kv 4",
)
"""float16 only: bfloat16 finds it near."""
_SEARCH = ["--offline", "--dtype", "float16", "--trials", "24", "--seed", "0"]


def make_table(name: str, quiet: bool) -> None:
    """Predict the table of a GPU. Raises RuntimeError if a class cannot be tuned."""
    with tempfile.TemporaryDirectory() as folder:
        for problem in _PROBLEMS:
            journal = str(Path(folder) / "studies.journal")
            options = ["--device", name, "--storage", journal, *(["--quiet"] if quiet else [])]
            if cli.main([*_SEARCH, *options, *problem.split()]):
                raise RuntimeError(f"the table of {name} could not be made")
    machine, device = _device(name)
    entries = [each for each in store.read(device) if not _is_default(machine, each)]
    tables.write(tables.path_of(name), {device: entries}, tables.made_now())


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
        tables.write(path, table, made)
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


def _device(name: str) -> tuple[Machine, DeviceKey]:
    machine = machines.find(name)
    return machine, DeviceKey(machine.name, machine.arch, machine.num_sms)


@command
def main(argv: list[str] | None = None) -> int:
    """Make the tables of some or all GPUs; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gpus", nargs="*", default=tables.GPUS, help="default: all")
    parser.add_argument(
        "--strip", action="store_true", help="predict nothing, only take out what is not shipped"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    if args.strip:
        for name in args.gpus:
            print("\n".join(strip(tables.path_of(name)) or [f"{name}: nothing to take out"]))
        return 0
    if "NUMFLASH_CACHE_DIR" not in os.environ:
        parser.error("set NUMFLASH_CACHE_DIR to a new folder: tables must not hold what was tuned")
    for name in args.gpus:
        make_table(name, args.quiet)
        print(tables.path_of(name), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
