"""`python -m bench verify`: everything that needs a GPU, in one call of eight minutes at most.

Runs every check of the gpu test layer that has no hardware record yet (all with --all),
instructions first, then kernels, then gradients; goes on after failures, crashes and hangs; then
times the kernels, and writes one JSON record.
"""

import argparse
import time
from pathlib import Path

from bench import checks, record, timing

_TIMING_SECONDS = 100


def add_command(commands) -> None:
    """Add `verify` to the commands of `python -m bench`."""
    parser = commands.add_parser("verify", help=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the record")
    parser.add_argument("--all", action="store_true", help="also checks that have a record")
    parser.add_argument("--minutes", type=float, default=8.0, help="when to stop")
    parser.add_argument("--no-timing", action="store_true", help="checks only")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Verify; 0 if every check that ran has passed."""
    start = time.monotonic()
    deadline = start + 60 * arguments.minutes
    checks_deadline = deadline - (0 if arguments.no_timing else _TIMING_SECONDS)
    machine = record.describe_machine()
    if machine["device"] is None:
        print("There is no NVIDIA GPU here (nvidia-smi finds none): nothing to verify.")
        return 1
    print(f"{machine['device']}, driver {machine['driver']}, commit {machine['commit']}")

    known = set()
    if not arguments.all:
        known = record.verified_checks(machine["device"], machine["source_hash"])
    outcomes: dict[str, dict] = {}
    left_out = 0
    for group in checks.GROUPS:
        ids = [name for name in checks.collect(group) if name not in known]
        print(f"{group.name}: {len(ids)} checks without a record", flush=True)
        if ids:
            done = checks.run(ids, group.children, checks_deadline, _print_outcome)
            outcomes |= done
            left_out += len(ids) - len(done)
    tally: dict[str, int] = {}
    for check in outcomes.values():
        tally[check["outcome"]] = tally.get(check["outcome"], 0) + 1
    seconds = time.monotonic() - start
    print(f"{tally or 'nothing to check'} in {seconds:.0f} s; out of time for {left_out}")

    result = {**machine, "checks": outcomes, "timings": [], "host_microseconds": {}}
    if not arguments.no_timing:
        result["clocks_before"] = record.clocks()
        try:
            result["host_microseconds"] = timing.host_microseconds()
            print(f"host time: {result['host_microseconds']}")
            result["timings"] = timing.measure(deadline, _print_timing)
        except Exception as error:
            # The checks' outcomes must be written whatever happens to the timings.
            result["timing_error"] = repr(error)
            print(f"timing stopped: {error!r}")
        result["clocks_after"] = record.clocks()
    print(f"record: {record.write(result, arguments.out)}")
    return 0 if set(tally) <= {"passed", "skipped"} else 1


def _print_outcome(name: str, check: dict) -> None:
    if check["outcome"] != "passed":
        reason = check["reason"].strip().splitlines()
        print(f"  {check['outcome'].upper()} {name}: {reason[-1] if reason else ''}", flush=True)


def _print_timing(result: dict) -> None:
    size = f"{result['dtype']} b{result['batch']} s{result['seqlen']} h{result['heads']}"
    what = f"{size} d{result['head_dim']}{' causal' if result['causal'] else ''}"
    speed = f"{result['tflops']:8.1f} TFLOP/s" if "tflops" in result else ""
    time_ms = f"{result['median_ms']:10.3f} ms" if "median_ms" in result else result["error"]
    print(f"  {what:40} {result['method']:18} {time_ms} {speed}", flush=True)
