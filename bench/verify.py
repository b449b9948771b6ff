"""`python -m bench verify`: everything that needs a GPU, in one call of eight minutes at most.

Runs every check of the gpu test layer that has no hardware record yet (all with --all),
instructions first, then kernels, then gradients; goes on after failures, crashes and hangs, and
writes a JSON record, with a count for each config that is forced on Hopper. Then times the forward
on the quick part of the papers' grid (`bench.speed`), which has a record of its own.
"""

import argparse
import time
from pathlib import Path

from bench import speed
from bench.peers import methods as peers
from bench.records import checks, record
from tuner.measuring.child import DeviceUnavailableError, FailedError

_TIMING_SECONDS = 120
# Those that need no compiling, but numflash's own.
_TIMING_PEERS = f"{peers.FP8},{peers.FP8_QUANTIZING},torch-cudnn,torch-flash,cupy"


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
    try:
        found = checks.collect(checks.GROUPS)
    except (DeviceUnavailableError, FailedError) as error:
        print(f"nothing is verified: {error}")
        return 1
    for group in checks.GROUPS:
        ids = [name for name in found[group.name] if name not in known]
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

    configs = checks.by_config(outcomes)
    for config, counts in configs.items():
        print(f"  {config}: {', '.join(f'{n} {outcome}' for outcome, n in counts.items())}")
    result = {
        **machine,
        "checks": outcomes,
        "configs": configs,
        "clocks_after": record.clocks(),
    }
    print(f"record: {record.write(result, arguments.out)}", flush=True)
    if not arguments.no_timing and (left := deadline - time.monotonic()) > 0:
        _time_forward(arguments.out, left)
    return 0 if set(tally) <= {"passed", "skipped"} else 1


def _print_outcome(name: str, check: dict) -> None:
    if check["outcome"] != "passed":
        reason = check["reason"].strip().splitlines()
        print(f"  {check['outcome'].upper()} {name}: {reason[-1] if reason else ''}", flush=True)


def _time_forward(out: Path, seconds: float) -> None:
    """Run `python -m bench forward --quick` for so long."""
    options = ["--quick", f"--out={out}", f"--peers={_TIMING_PEERS}", f"--time-limit={seconds}"]
    print(f"\nforward {' '.join(options)}", flush=True)
    try:
        speed.run_forward(options)
    except Exception as error:
        # The checks' results decide the exit status, and are on disk.
        print(f"timing stopped: {error!r}")
