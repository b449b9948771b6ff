"""`python -m bench tuner`: is the tuner's choice the best there is, and what does it save?

The witness is an exhaustive run: every feasible config of a problem class, measured. On a GPU it
is made and recorded; searches are then replayed from the recording with several seeds, for a
quarter of the time that the exhaustive run took. A recording can be replayed without a GPU.
"""

import argparse
import statistics
from pathlib import Path

from bench.records import record
from bench.tables import tables

CLASSES = (
    "forward float16-d64-dv64-vec causal q1024 k1024 bh32 g1",
    "backward-dq float16-d128-dv128-vec full q1024 k1024 bh32 g1",
)
"""Spaces small enough for an exhaustive run of a few minutes."""
PART = 0.25
"""Of the exhaustive run's time, for a search."""
_SAMPLERS = ("tpe", "random")


def add_command(commands) -> None:
    """Add `tuner` to the commands of `python -m bench`."""
    parser = commands.add_parser("tuner", help=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of recordings")
    parser.add_argument("--replay", type=Path, nargs="+", metavar="FILE", help="recordings")
    parser.add_argument("--class", dest="classes", nargs="+", metavar="CLASS", default=CLASSES)
    parser.add_argument("--seeds", type=int, default=5, help="searches of each recording")
    parser.add_argument("--time-limit", type=float, default=540.0, help="of exhaustive runs, s")
    parser.add_argument("--device", type=int, default=0)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Record where there is a GPU, then replay; 0 if every search came within two percent."""
    paths = arguments.replay
    if paths is None:
        paths = _record(arguments)
    if not paths:
        return 1
    from bench.studies.exhaustive import replay

    rows, worst = [], 0.0
    for path in paths:
        for sampler in _SAMPLERS:
            losses = [replay(path, sampler, seed, PART) for seed in range(arguments.seeds)]
            rows.append(_row(path, sampler, losses))
            if sampler == "tpe":
                worst = max(worst, *losses)
    print(tables.markdown(("recording", "sampler", "median loss", "worst loss"), rows))
    print(f"loss: the winner's time over the exhaustive best, in {PART:.0%} of the time")
    return 0 if worst <= 0.02 else 1


def _row(path: Path, sampler: str, losses: list[float]) -> list[str]:
    return [
        path.stem,
        sampler,
        f"{statistics.median(losses):.2%}",
        f"{max(losses):.2%}",
    ]


def _record(arguments: argparse.Namespace) -> list[Path]:
    """Measure every config of the classes; the recordings."""
    from bench.studies.exhaustive import exhaust
    from numflash.problem.classes import ProblemClass
    from numflash.runtime.errors import UnsupportedError
    from tuner.space.target import find_target

    try:
        target = find_target(str(arguments.device), offline=False)
    except UnsupportedError as error:
        print(f"no exhaustive run: {error} A recording is replayed with --replay FILE.")
        return []
    arguments.out.mkdir(parents=True, exist_ok=True)
    paths = []
    for text in arguments.classes:
        name = text.replace(" ", "-")
        path = arguments.out / f"tuner-{target.key.name.replace(' ', '_')}-{name}.json"
        print(exhaust(target, ProblemClass.parse(text), arguments.time_limit, path), flush=True)
        paths.append(path)
    return paths
