"""`python -m bench distributed`: attention over 1, 2, 4 and 8 ranks, beside other libraries'.

Under torchrun, with a GPU for each process, it measures time, the share of one GPU's speed,
exposed communication (the time less that with a communicator that moves nothing), and bytes
against those of `numflash.distributed.explain`, next to ring-flash-attention, yunchang and
PyTorch's context_parallel:

    torchrun --nproc-per-node 8 -m bench distributed

On one GPU ranks take turns, as threads: that is what compute and merges cost, without wires.
Without a GPU it prints a table of arithmetic with assumed figures. What is measured is a record.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from bench.distributed import model
from bench.distributed.cases import DIRECTIONS, METHODS, OF_BOTH, RANKS, Case, cases
from bench.distributed.measuring import STILL, measure
from bench.distributed.ranks import Processes, Ranks, Threads, is_under_torchrun, local_rank
from bench.measuring.device import open_device
from bench.measuring.session import NO_GPU
from bench.records import record
from bench.tables.tables import markdown

COLUMNS = (*OF_BOTH, "as explained")


def add_command(commands) -> None:
    """Add `distributed` to the commands of `python -m bench`."""
    parser = commands.add_parser("distributed", help="attention over 1, 2, 4 and 8 ranks")
    parser.add_argument("--device", type=int, default=0, help="ordinal of the GPU of threads")
    parser.add_argument("--quick", action="store_true", help="one problem")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of records")
    parser.add_argument("--time-limit", type=float, default=540.0, metavar="SECONDS")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, or without a GPU print the model's table; the exit status."""
    deadline = time.monotonic() + arguments.time_limit
    torchrun = is_under_torchrun()
    machine = record.describe_machine(local_rank() if torchrun else arguments.device)
    if machine["device"] is None:
        print(f"{NO_GPU}\n\n{model.table(cases(arguments.quick))}")
        return 0
    device = open_device(local_rank() if torchrun else arguments.device)
    if torchrun:
        ranks = Processes(device)
    else:
        ranks = Threads(device, machine["device"])
    found = {**machine, "kind": "distributed", "on": ranks.name, "points": []}
    if ranks.is_first:
        print(f"{machine['device']}, commit {machine['commit']}; {ranks.name}")
    path = record.reserve(found, arguments.out) if ranks.is_first else None
    for point in measured(ranks, cases(arguments.quick), deadline):
        if path is not None:
            found["points"].append(point)
            record.save(found, path)
    if torchrun:
        ranks.close()
    if path is not None:
        print(f"\n{table(found['points'], in_turn=not torchrun)}\n\nrecord: {path}")
    return 0


def measured(ranks: Ranks, chosen: list[Case], deadline: float) -> Iterator[dict]:
    """Points as they are measured, until a deadline of time.monotonic() on all ranks alike."""
    sizes = [size for size in RANKS if size <= ranks.most]
    for case in chosen:
        for direction in DIRECTIONS:
            for size in sizes:
                if ranks.is_late(deadline):
                    return
                point = measure(ranks, case, size, direction)
                if point:
                    yield point


def table(points: list[dict], in_turn: bool) -> str:
    """The points in Markdown.

    Args:
        points: of `measured`.
        in_turn: whether ranks shared one GPU, so that their times are added.
    """
    alone = {
        (p["case"], p["direction"]): p["methods"][METHODS[0]].get("median_ms")
        for p in points
        if p["ranks"] == 1
    }
    rows = []
    for point in points:
        one = alone.get((point["case"], point["direction"]))
        for name, entry in point["methods"].items():
            if not name.endswith(STILL):
                rows.append(_row(point, name, entry, one, 1 if in_turn else point["ranks"]))
    return markdown(COLUMNS, rows)


def _row(point: dict, name: str, entry: dict, one: float | None, parts: int) -> list[str]:
    head = [point["case"], point["direction"], str(point["ranks"]), name]
    if "median_ms" not in entry:
        return [*head, f"{entry['status']}: {entry['reason']}", *[""] * (len(COLUMNS) - 5)]
    took = entry["median_ms"]
    counted = ["", ""]
    if "sent" in entry:
        equal = entry["sent"] == entry["expected"]
        counted = [f"{max(entry['sent']) / 2**20:.4g}", "yes" if equal else "NO"]
    return [
        *head,
        f"{took:.4g}",
        f"{one / took / parts:.2f}" if one else "",
        f"{entry['exposed_ms']:.3f}" if "exposed_ms" in entry else "",
        f"{entry['lockstep']:.2f}" if "lockstep" in entry else "",
        *counted,
    ]
