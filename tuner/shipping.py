"""`python -m numflash_tuner.shipping`: make anew the tables of configs that come with numflash.

Predicted by the offline model, one file for each GPU; GPUs of one architecture share machine code,
so that the second costs little. A table measured on the GPU itself, by `numflash-tune export`,
takes the place of a predicted one.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

import numflash.shipped
from numflash import store
from numflash.commands import command
from numflash_tuner import cli, machines

GPUS = (
    "Tesla T4",
    "NVIDIA A100-SXM4-80GB",
    "NVIDIA A10",
    "NVIDIA GeForce RTX 3090",
    "NVIDIA L4",
    "NVIDIA L40S",
    "NVIDIA GeForce RTX 4090",
    "NVIDIA H100 80GB HBM3",
    "NVIDIA H200",
    "NVIDIA B200",
    "NVIDIA GeForce RTX 5090",
)
_PROBLEMS = (
    "--head-dim 64 128 --seqlen 4096",
    # Decoding: one query of each sequence, and many keys.
    "--pass forward --head-dim 64 128 --mask full --seqlen-q 1 --seqlen 65536 --batch 2",
    "--pass forward --head-dim 128 --mask full --seqlen-q 1 --seqlen 65536 --heads-kv 4",
)
"""float16 only: bfloat16 finds it near."""
_SEARCH = ["--offline", "--dtype", "float16", "--trials", "24", "--seed", "0"]


def path_of(name: str) -> Path:
    """The file of a GPU."""
    folder = Path(numflash.shipped.__file__).parent
    return folder / (re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") + ".json")


def make_table(name: str, quiet: bool) -> None:
    """Predict the table of a GPU. Raises RuntimeError if a class cannot be tuned."""
    with tempfile.TemporaryDirectory() as folder:
        for problem in _PROBLEMS:
            journal = str(Path(folder) / "studies.journal")
            options = ["--device", name, "--storage", journal, *(["--quiet"] if quiet else [])]
            if cli.main([*_SEARCH, *options, *problem.split()]):
                raise RuntimeError(f"the table of {name} could not be made")
    machine = machines.find(name)
    device = store.DeviceKey(machine.name, machine.arch, machine.num_sms)
    store.export(path_of(name), [device])


@command
def main(argv: list[str] | None = None) -> int:
    """Make the tables of some or all GPUs; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gpus", nargs="*", default=GPUS, help="default: all")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    if "NUMFLASH_CACHE_DIR" not in os.environ:
        parser.error("set NUMFLASH_CACHE_DIR to a new folder: tables must not hold what was tuned")
    for name in args.gpus:
        make_table(name, args.quiet)
        print(path_of(name), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
