"""`python -m bench COMMAND`: what to do with the rare hour on a GPU machine."""

import argparse
import sys

from bench import report, serving, speed, verify
from bench.distributed import command as distributed
from bench.first_light import command as first_light
from bench.fp8_accuracy import study as fp8_accuracy
from bench.machine_code import command as machine_code
from bench.studies import balance, toolchains, tuner
from numflash.runtime.commands import command


@command
def main(argv: list[str] | None = None) -> int:
    """Run a command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    first_light.add_command(commands)
    verify.add_command(commands)
    speed.add_commands(commands)
    serving.add_commands(commands)
    report.add_command(commands)
    tuner.add_command(commands)
    fp8_accuracy.add_command(commands)
    toolchains.add_command(commands)
    balance.add_command(commands)
    distributed.add_command(commands)
    machine_code.add_command(commands)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
