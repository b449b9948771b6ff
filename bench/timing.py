"""What `bench`'s `forward`, `backward`, `decode` and `varlen` share: options, and a run."""

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.measuring.session import NO_GPU, Session
from bench.peers import methods as peers
from bench.records import record
from bench.tables import tables

Plan = tuple[str, str, list[dict], Callable[[Session, float], None]]
"""What a command measures: direction and kind of its record, its tasks, and what prints tables of
the session, until a deadline of time.monotonic()."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that these commands share."""
    parser.add_argument("--device", type=int, default=0, help="ordinal of the GPU")
    parser.add_argument("--peers", default=peers.ALL, help="names with commas; default: all")
    parser.add_argument("--quick", action="store_true", help="a useful part of the points")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of records")
    parser.add_argument("--time-limit", type=float, default=540.0, metavar="SECONDS")


def run(
    arguments: argparse.Namespace,
    plan_of: Callable[[list[str], dict], Plan],
    without_gpu: Callable[[float], None],
    everyone: Iterable[str] | None = None,
) -> int:
    """Measure, or print what can be said without a GPU; the exit status.

    Args:
        arguments: those of `add_options`.
        plan_of: the plan, of the names of methods and the machine.
        without_gpu: prints, until a deadline of time.monotonic().
        everyone: the methods of `--peers all`; by default all there are.
    """
    deadline = time.monotonic() + arguments.time_limit
    try:
        names = peers.chosen(arguments.peers, everyone)
    except ValueError as error:
        print(f"--peers: {error}")
        return 2
    machine = record.describe_machine(arguments.device)
    if machine["device"] is None:
        print(NO_GPU)
        without_gpu(deadline)
        return 0
    print(f"{machine['device']}, driver {machine['driver']}, commit {machine['commit']}")
    direction, kind, tasks, finish = plan_of(names, machine)
    session = Session(machine, direction, kind, arguments.out, arguments.device)
    session.run([{"kind": "ceilings"}, *tasks], deadline)
    if session.no_device is not None:
        print(f"no device could be opened: {session.no_device}")
        return 1
    finish(session, deadline)
    if troubles := tables.problems(session.measured()):
        print(f"\nWithout a time:\n{troubles}")
    print(f"\nrecord: {session.path}")
    return 0
