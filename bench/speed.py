"""`python -m bench forward` and `backward`: the FlashAttention papers' grid against every peer.

Prints a line for each point as it is measured, then tables; writes a JSON record and, with
matplotlib, plots. Without a GPU it says so and prints what can be said without one: machine code,
and for --traffic and --memory the counts.
"""

import argparse
import time
from functools import partial

from bench import timing
from bench.measuring import profiler
from bench.measuring.session import Session, point_tasks
from bench.peers import methods as peers
from bench.points import points
from bench.records import record
from bench.records.entries import is_right
from bench.studies import ablation, analytic, static
from bench.tables import figures, quantization, tables
from numflash.runtime.devices import ARCHITECTURES, Architecture, architecture_of

_STATIC_ARCH = "sm_80"
_MEMORY_PEERS = [peers.OURS, "torch-flash", "torch-math", "cupy"]


def add_commands(commands) -> None:
    """Add `forward` and `backward` to the commands of `python -m bench`."""
    for direction in points.DIRECTIONS:
        parser = commands.add_parser(direction, help=f"time the {direction} against every peer")
        timing.add_options(parser)
        parser.add_argument("--seqlen", type=int, nargs="+", help="of the grid")
        parser.add_argument("--head-dim", type=int, nargs="+", help="of the grid")
        parser.add_argument("--dtype", nargs="+", choices=points.DTYPES, help="of the grid")
        mode = parser.add_mutually_exclusive_group()
        for option, text in (
            ("--ablate", "turn off one idea at a time"),
            ("--block-sizes", "the sensitivity to tile sizes"),
            ("--memory", "bytes over seqlen against standard attention"),
            ("--quantize", "how fast arrays are quantised, against a device copy"),
            ("--traffic", "FLOPs and global-memory bytes against standard attention"),
        ):
            flag = option[2:].replace("-", "_")
            mode.add_argument(option, dest="mode", action="store_const", const=flag, help=text)
        parser.set_defaults(run=run, direction=direction)


def run_forward(options: list[str]) -> int:
    """Run `python -m bench forward` with these options; the exit status."""
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    return run(parser.parse_args(["forward", *options]))


def run(arguments: argparse.Namespace) -> int:
    """Measure, or without a GPU print the static figures; the exit status."""

    def plan_of(names: list[str], machine: dict) -> timing.Plan:
        capability = tuple(map(int, (machine["compute_capability"] or "9.0").split(".")))
        tasks, tell = _TASKS[arguments.mode](arguments, names, architecture_of(capability))
        mode = (arguments.mode or "").replace("_", "-")
        kind = "-".join(filter(None, [arguments.direction, mode]))

        def finish(session: Session, deadline: float) -> None:
            tell(session, deadline)
            _print_ceilings(session)

        return arguments.direction, kind, tasks, finish

    return timing.run(arguments, plan_of, partial(without_gpu, arguments))


def without_gpu(arguments: argparse.Namespace, deadline: float) -> None:
    """Print what can be said without a GPU."""
    direction = arguments.direction
    dims = arguments.head_dim or (points.QUICK_HEAD_DIMS if arguments.quick else points.HEAD_DIMS)
    dtypes = arguments.dtype or (points.QUICK_DTYPES if arguments.quick else points.DTYPES)
    limits = ARCHITECTURES[_STATIC_ARCH]
    if arguments.mode == "traffic":
        _print_traffic(arguments, limits)
    elif arguments.mode == "memory":
        print(analytic.memory_table(_one_head_dim(arguments)))
    elif arguments.mode == "quantize":
        static.print_rows(static.quantize_rows(), static.COLUMNS, deadline)
    elif arguments.mode == "ablate":
        _print_ideas(direction, limits)
        static.print_rows(ablation.static_rows(direction), ablation.STATIC_COLUMNS, deadline)
    elif arguments.mode == "block_sizes":
        rows = (
            static.row(family, static.traits_of("bfloat16", head_dim), limits, config)
            for family in static.FAMILIES[direction]
            for head_dim in dims
            for config in ablation.block_sizes(family, head_dim, "bfloat16", limits)
        )
        static.print_rows(rows, static.COLUMNS, deadline)
    else:
        static.print_rows(static.rows(direction, dims, dtypes), static.COLUMNS, deadline)
        if direction == "forward":
            print(tables.FP8_NOTE)


def _grid_tasks(arguments, names, limits):
    chosen = points.plan(
        arguments.direction,
        arguments.quick,
        arguments.seqlen,
        arguments.head_dim,
        arguments.dtype,
    )
    tasks = point_tasks(chosen, names)
    # After what a short visit is for, before the rest of the grid.
    at = sum(p.kind != "grid" or points.is_quick(p) for p in chosen)
    extra = [{"kind": "host", "peers": names}]
    if arguments.direction == "forward":
        extra.append({"kind": "quantize"})
    tasks[at:at] = extra

    def finish(session: Session, deadline: float) -> None:
        grid = session.measured("grid")
        ceilings = tables.ceilings_of(session.record)
        print(f"\n{tables.speeds(grid)}\n\n{tables.point_ratios(grid)}\n\n{tables.ratios(grid)}")
        if ceilings is not None:
            print(f"\n{tables.fractions(session.measured(), ceilings)}")
        if speeds := tables.fp8(grid):
            print(f"\n{speeds}")
        _print_quantization(session)
        if decoding := session.measured("decode"):
            print(f"\n{tables.decode(decoding, ceilings)}")
        host = session.record["host_microseconds"]
        if host and "failed" not in host:
            print(f"\n{tables.host(host)}")
        _draw(session, grid, ceilings)

    return tasks, finish


def _draw(session: Session, grid: list[dict], ceilings) -> None:
    for dtype in sorted({entry["dtype"] for entry in grid}):
        title = f"{session.record['device']}, {session.record['direction']}, {dtype}"
        chosen = [entry for entry in grid if entry["dtype"] == dtype]
        stem = f"{session.path.stem}-{dtype}"
        try:
            drawn = figures.draw(chosen, ceilings, title, stem, session.path.parent)
        except ImportError:
            print(figures.NO_MATPLOTLIB)
            return
        print("\n".join(f"plot: {path}" for path in drawn))


def _ablation_tasks(arguments, names, limits):
    ideas = ablation.ideas(arguments.direction, limits)
    by_point: dict[points.Point, list[str]] = {}
    for idea in ideas:
        wanted = by_point.setdefault(idea.point, [peers.OURS])
        wanted += [n for n in (idea.with_it, idea.without) if n and n not in wanted]
    tasks = [task for p, wanted in by_point.items() for task in point_tasks([p], wanted)]

    def finish(session: Session, deadline: float) -> None:
        found = {points.Point.from_dict(e): e["methods"] for e in session.measured()}
        print(f"\n{ablation.table(ideas, found)}")

    return tasks, finish


def _block_size_tasks(arguments, names, limits):
    tasks = []
    for point in _sensitivity_points(arguments):
        wanted = ablation.block_size_peers(point, limits)
        tasks += point_tasks([point], [peers.OURS, *wanted])

    def finish(session: Session, deadline: float) -> None:
        for entry in session.measured():
            timed = {n: m for n, m in entry["methods"].items() if is_right(m)}
            ranked = sorted(timed.items(), key=lambda item: item[1]["median_ms"])
            rows = [[n, f"{m['median_ms']:.3f}", f"{m['tflops']:.0f}"] for n, m in ranked]
            header = [points.Point.from_dict(entry), "ms", "TFLOP/s"]
            print(f"\n{tables.markdown(header, rows)}")

    return tasks, finish


def _memory_tasks(arguments, names, limits):
    chosen = _one_head_dim(arguments)

    def finish(session: Session, deadline: float) -> None:
        measured = {
            points.Point.from_dict(entry): {
                name: method["peak_bytes"]
                for name, method in entry["methods"].items()
                if "peak_bytes" in method
            }
            for entry in session.measured()
        }
        print(f"\n{analytic.memory_table(chosen, measured)}")

    return point_tasks(chosen, _MEMORY_PEERS), finish


def _quantize_tasks(arguments, names, limits):
    return [{"kind": "quantize"}], lambda session, deadline: _print_quantization(session)


def _print_quantization(session: Session) -> None:
    found = session.record.get("quantize")
    if quantization.is_measured(found):
        print(f"\n{quantization.table(found)}")


def _traffic_tasks(arguments, names, limits):
    chosen = [points.gpt2_medium(arguments.direction)]

    def finish(session: Session, deadline: float) -> None:
        _print_traffic(arguments, limits)
        for point in [*_sensitivity_points(arguments), *chosen]:
            try:
                counted = profiler.count(point, max(10.0, deadline - time.monotonic()))
            except RuntimeError as error:
                print(f"not measured by a profiler: {error}")
                return
            session.record.setdefault("profiled", []).append({**point.as_dict(), **counted})
            record.save(session.record, session.path)
            total = sum(counted.values()) / 1e9
            print(f"measured by ncu: {point}: {total:.3f} GB of device memory", flush=True)

    return point_tasks(chosen, [peers.OURS, "torch-math", "cupy"]), finish


_TASKS = {
    None: _grid_tasks,
    "ablate": _ablation_tasks,
    "block_sizes": _block_size_tasks,
    "memory": _memory_tasks,
    "quantize": _quantize_tasks,
    "traffic": _traffic_tasks,
}


def _sensitivity_points(arguments) -> list[points.Point]:
    """Seqlen 4,096 for each head dim."""
    dims = tuple(arguments.head_dim or points.QUICK_HEAD_DIMS)
    dtypes = tuple(arguments.dtype or points.QUICK_DTYPES)
    grid = points.grid(arguments.direction, (4096,), dims, dtypes)
    return [point for point in grid if not point.causal]


def _one_head_dim(arguments) -> list[points.Point]:
    dims = tuple(arguments.head_dim or (128,))
    # float16, because CuPy's bfloat16 is minimal.
    grid = points.grid(arguments.direction, points.SEQLENS, dims, ("float16",))
    return sorted((p for p in grid if not p.causal), key=lambda p: (p.head_dim, p.seqlen_q))


def _print_traffic(arguments, limits: Architecture) -> None:
    dims = tuple(arguments.head_dim or points.QUICK_HEAD_DIMS)
    grid = points.grid(arguments.direction, points.QUICK_SEQLENS, dims, ("bfloat16",))
    print(f"Counted from the tile schedule on {limits.arch}, not measured:")
    print(analytic.traffic_table([*grid, points.gpt2_medium(arguments.direction)], limits))
    print(f"\nForward and backward:\n{analytic.gpt2_table(limits)}")
    if profiler.find() is None:
        print("\nThere is no profiler (ncu) here: no bytes are measured.")


def _print_ideas(direction: str, limits: Architecture) -> None:
    """The comparisons that would run, and the effect of the swizzle on banks."""
    rows = [
        [i.name, i.point, i.with_it, i.without or "-", i.how]
        for i in ablation.ideas(direction, limits)
    ]
    header = ["idea", "point", "with it", "without it", "how it is turned off"]
    print(f"What would be timed on a GPU:\n{tables.markdown(header, rows)}\n")
    for head_dim in (64, 128, 256):
        on, off = (ablation.bank_conflicts(head_dim, swizzled) for swizzled in (True, False))
        if on is None:
            print("bank conflicts: these kernels have no layout function to count them with")
            break
        print(
            f"bank conflicts of ldmatrix at head_dim {head_dim}: {on}-way with the swizzle, "
            f"{off}-way without"
        )
    print()


def _print_ceilings(session: Session) -> None:
    ceilings = tables.ceilings_of(session.record)
    if ceilings is not None:
        print(
            f"\nIn this run: matrix product {ceilings.matmul_tflops:.0f} TFLOP/s "
            f"({session.record['ceilings']['matmul']}), copy {ceilings.copy_gbps:.0f} GB/s"
        )
