"""`python -m bench decode` and `varlen`: caches, and sequences one after another, beside peers.

`decode` times 1, 4 and 16 queries over caches of 1k to 128k keys, 1 to 64 sequences, in pages or
not, and prints the bytes of K and V a second as a share of what a copy moves in the same run.
`varlen` times sequences of the papers' lengths and of long-tailed draws, forward and backward, in
TFLOP/s of the work that they have. Both write a JSON record. Without a GPU they say so, and print
the points with their bytes or operations.
"""

import argparse

from bench import timing
from bench.measuring.session import Session, point_tasks
from bench.peers import methods as peers
from bench.points import points, work
from bench.points.points import Point
from bench.tables import tables


def add_commands(commands) -> None:
    """Add `decode` and `varlen` to the commands of `python -m bench`."""
    for name, text in (
        ("decode", "time queries over caches, in pages or not, against every peer"),
        ("varlen", "time sequences one after another against every peer"),
    ):
        parser = commands.add_parser(name, help=text)
        timing.add_options(parser)
        parser.set_defaults(run=run, kind=name)


def points_of(kind: str, quick: bool) -> list[Point]:
    """The points of a command, in the order in which they are measured."""
    if kind == "decode":
        return points.caches(quick)
    by_direction = [points.sequences(direction, quick) for direction in points.DIRECTIONS]
    # One of each in turn: a run that is cut short has both.
    return [point for pair in zip(*by_direction, strict=True) for point in pair]


def run(arguments: argparse.Namespace) -> int:
    """Measure, or without a GPU print the points; the exit status."""
    kind, chosen = arguments.kind, points_of(arguments.kind, arguments.quick)

    def plan_of(names: list[str], machine: dict) -> timing.Plan:
        direction = "forward" if kind == "decode" else "both"
        return direction, kind, point_tasks(chosen, names), finish

    def finish(session: Session, deadline: float) -> None:
        measured = session.measured()
        if kind == "decode":
            speeds = tables.caches(measured, tables.ceilings_of(session.record))
        else:
            speeds = tables.sequences(measured)
        print(f"\n{speeds}\n\n{tables.ratios(measured)}")

    return timing.run(
        arguments, plan_of, lambda deadline: print(f"\n{counted(chosen)}"), peers.OF_SEQUENCES
    )


def counted(chosen: list[Point]) -> str:
    """The points, with what is counted of them: bytes of K and V, or operations."""
    rows = []
    for point in chosen:
        if point.is_packed:
            rows.append([point, f"{work.flops(point) / 1e12:.3g} TFLOP"])
        else:
            rows.append([point, f"{work.cache_bytes(point) / 1e9:.3g} GB of K and V"])
    return tables.markdown(["point", "counted"], rows)
