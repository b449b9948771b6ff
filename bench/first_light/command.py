"""`python -m bench first-light`: the first minutes on a GPU, in order of worth, in one call.

Instructions first, those that no other compiler's kernel has confirmed before the others; then a
forward of each kind and gradients against float64; speeds beside cuDNN and FlashAttention; the
questions that only speed answers, as forced configs in the same run; the model's best configs.
After each step the record (JSON) and the page (Markdown) are written again. A step that crashes,
or is silent for 25 seconds, costs itself; what no longer fits the time is skipped.

With --rehearse all of it runs without a GPU, small and in the simulator, under a clock that is
fake. That also leaves the simulated outputs of instructions in build/first-light, for machines on
which the simulator cannot run.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from bench.first_light import background, page, plan, rehearsal
from bench.measuring import supervisor
from bench.measuring.session import (
    BUDGET_MS,
    clock_log,
    clocks_of,
    line_of,
    raise_on_termination,
)
from bench.records import record
from bench.records.checks import ROOT, child_environment
from numflash.runtime.devices import Architecture, architecture_of
from numflash.runtime.files import replace_file

HANG_SECONDS = 25
_CHECK_ID = "tests/gpu/test_instructions.py::test_hardware_agrees_with_the_simulator[{}]"
# Cores that are left to the steps while instructions are compiled ahead.
_CORES_LEFT = 3


def add_command(commands) -> None:
    """Add `first-light` to the commands of `python -m bench`."""
    parser = commands.add_parser("first-light", help=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=_minutes, default=9.0, help="when to stop (default: 9)")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the record and the page (default: bench/results, or build/first-light)",
    )
    parser.add_argument("--device", type=int, default=0, help="ordinal of the GPU")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, in the simulator")
    parser.set_defaults(run=run)


def _minutes(text: str) -> float:
    """A positive number of minutes. Raises argparse.ArgumentTypeError."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number of minutes, got {text!r}")
    return minutes


def run(arguments: argparse.Namespace) -> int:
    """Run the steps; 0 if nothing that ran was wrong."""
    began = time.monotonic()
    if arguments.rehearse:
        machine = record.describe_machine() | rehearsal.MACHINE
        limits = rehearsal.LIMITS
    else:
        machine = record.describe_machine(arguments.device)
        if machine["device"] is None:
            print("There is no NVIDIA GPU here (nvidia-smi finds none); --rehearse needs none.")
            return 1
        capability = machine["compute_capability"] or "9.0"
        limits = architecture_of(tuple(map(int, capability.split("."))))
    out = arguments.out or (background.PREPARED if arguments.rehearse else record.RESULTS)
    cases = background.cases().values()
    steps = plan.steps(cases, limits, arguments.rehearse)
    try:
        visit = Visit(machine, steps, out, arguments.minutes, arguments.device, limits)
    except ValueError as error:
        print(f"--out: {error}")
        return 2
    visit.run(began=began)
    if "no_device" in visit.record:
        print(f"no device could be opened: {visit.record['no_device']}")
    print(f"\n{visit.page_path.read_text()}\nrecord: {visit.path}\npage: {visit.page_path}")
    return 0 if visit.is_right() else 1


class Visit:
    """One run of the steps, its record and its page.

    Attributes:
        record: what has been found so far; "steps" are in the order of the plan, with an "outcome"
            each: "done", "failed", "crashed", "skipped" or "not reached".
        path, page_path: where the record and the page are written.
    """

    def __init__(
        self,
        machine: dict,
        steps: list[dict],
        out: Path,
        minutes: float,
        device: int,
        limits: Architecture,
    ):
        """Writes the record for the first time.

        Raises:
            ValueError: a rehearsal would write to where records are.
        """
        is_rehearsal = machine.get("rehearsal", False)
        self.record = {
            **machine,
            "kind": "first-light-rehearsal" if is_rehearsal else "first-light",
            "rehearsal": is_rehearsal,
            "clocks_before": {} if is_rehearsal else record.clocks(device),
            "minutes": minutes,
            "seconds": 0.0,
            "ceilings": {},
            "points": [],
            "checks": {},
            "steps": [{**step, "outcome": "not reached"} for step in steps],
        }
        self.path = record.reserve(self.record, out)
        self.page_path = self.path.with_suffix(".md")
        self._steps, self._device, self._limits = steps, device, limits
        self._save()

    def run(
        self,
        command: list[str] | None = None,
        began: float | None = None,
    ) -> None:
        """Run the steps until done or out of time; a signal to stop ends it with its record.

        Args:
            command: that runs a worker, as in `supervisor.run`.
            began: when the time began to run, as of time.monotonic(); None is now.
        """
        restore = raise_on_termination()
        try:
            with tempfile.TemporaryDirectory() as folder:
                self._run(Path(folder), command, began)
        except KeyboardInterrupt:
            self.record["stopped"] = "interrupted"
        finally:
            restore()
            if not self.record["rehearsal"]:
                self.record["clocks_after"] = record.clocks(self._device)
            self._save()

    def _run(self, folder: Path, command, began: float | None) -> None:
        is_rehearsal = self.record["rehearsal"]
        clock = rehearsal.FakeClock() if is_rehearsal else time.monotonic
        start = clock() if is_rehearsal or began is None else began
        environment = rehearsal.environment() if is_rehearsal else {}
        expected = background.expected_path()
        settings = {
            "device": self._device,
            "deadline": start + 60 * self.record["minutes"],
            "budget_ms": BUDGET_MS,
            "rehearsal": is_rehearsal,
            "expected": str(expected),
            "compiled": None if is_rehearsal else str(folder),
        }
        helpers = [] if command else self._helpers(folder, expected)
        device = rehearsal.DEVICE if is_rehearsal else str(self._device)
        try:
            # By a rehearsal's clock it takes no time to simulate what all others wait for.
            for helper in helpers if is_rehearsal else ():
                helper.wait()
            with nullcontext() if is_rehearsal else clock_log(self._device) as log:
                no_device = supervisor.run(
                    self._steps,
                    settings,
                    on_result=lambda task, result: self._note(
                        task,
                        result if is_rehearsal else {**result, **clocks_of(result, log)},
                        clock() - start,
                    ),
                    command=command
                    or supervisor.worker_command("bench.first_light.tasks", device),
                    clock=clock,
                    spend=clock.spend if is_rehearsal else None,
                    hang_seconds=HANG_SECONDS,
                    environment=environment,
                )
        finally:
            for helper in helpers:
                helper.kill()
                helper.wait()
        if no_device is not None:
            self.record["no_device"] = no_device

    def _helpers(self, folder: Path, expected: Path) -> list[subprocess.Popen]:
        """Processes beside the steps: one simulates instructions, others compile them ahead."""
        module = [sys.executable, "-m", "bench.first_light.background"]
        plain = child_environment()
        commands = []
        if not expected.exists():
            background.failed_path(expected).unlink(missing_ok=True)
            commands.append(([*module, "simulate", str(expected)], rehearsal.environment()))
        if not self.record["rehearsal"]:
            shards = max(0, (os.cpu_count() or 1) - _CORES_LEFT)
            commands += [
                ([*module, "compile", str(folder), self._limits.arch, str(i), str(shards)], {})
                for i in range(shards)
            ]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT}
        return [subprocess.Popen(each, env=plain | more, **quiet) for each, more in commands]

    def _note(self, task: dict, result: dict, seconds: float) -> None:
        """Put a step's result into the record, write it, and print a line."""
        if self.record["rehearsal"]:
            result = rehearsal.without_times(result)
        step = self.record["steps"][task["index"]]
        if "failed" in result:
            is_dead = result["failed"].startswith(supervisor.DEATHS)
            step |= {"outcome": "crashed" if is_dead else "failed", "reason": result["failed"]}
        elif "skipped" in result:
            step |= {"outcome": "skipped", "reason": result["skipped"]}
        else:
            step |= {"outcome": "done", **result}
        self.record["seconds"] = round(seconds, 1)
        if step["outcome"] == "done":
            self._gather(step, result)
        self._save()
        text = f"{step['title']}: {_brief(step, self.record['rehearsal'])}"
        print(f"[{task['index'] + 1}/{len(self._steps)} {seconds:4.0f} s] {text}", flush=True)

    def _gather(self, step: dict, result: dict) -> None:
        """Put a result to where `verify` and `report` look for it."""
        if step["kind"] == "ceilings":
            self.record["ceilings"] = result
        elif step["kind"] == "point":
            self.record["points"].append({**step["point"], **result})
        elif step["kind"] == "instructions":
            cases = {_CHECK_ID.format(name): case for name, case in result["cases"].items()}
            self.record["checks"] |= cases

    def _save(self) -> None:
        record.save(self.record, self.path)
        replace_file(self.page_path, page.render(self.record))

    def is_right(self) -> bool:
        """Whether something ran, and nothing of it was wrong or broke."""
        found = [o for step in self.record["steps"] for o in page.outcomes(step).values()]
        return "passed" in found and not {"failed", "crashed"} & set(found)


def _brief(step: dict, is_rehearsal: bool) -> str:
    if step["outcome"] != "done":
        return f"{step['outcome']}: {step['reason'][:160]}"
    if step["kind"] == "point" and not is_rehearsal:
        return line_of({**step["point"], **step})
    found = list(page.outcomes(step).values())
    if found:
        return ", ".join(f"{found.count(each)} {each}" for each in dict.fromkeys(found))
    return "done"
