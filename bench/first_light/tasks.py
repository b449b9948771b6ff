"""The kinds of steps that only first light has, and the worker that runs them.

`python -P -m bench.first_light.tasks DEVICE` is a `bench.measuring.worker` on the GPU of an
ordinal, or on the simulator in a rehearsal.
"""

import importlib.util
import math
import subprocess
import sys
import tempfile
import time
from functools import cache, partial
from pathlib import Path

import numpy as np

from bench.first_light import background, rehearsal, turn_times
from bench.measuring import measure, worker
from bench.measuring.device import open_device
from bench.peers import methods as peers
from bench.points import interleave
from bench.points.interleave import Method
from bench.points.points import Point
from bench.records.checks import ROOT
from bench.studies import static
from numflash.runtime.errors import in_one_line

_NO_EXPECTATION = (
    "nothing to compare with: the simulator did not run here (it needs greenlet), and no "
    f"rehearsal of these sources has left its file in {background.PREPARED.name}"
)

_NOTHING_COLLECTED = 5
"""The exit status of pytest where a whole file is skipped."""
_LAST_LINES = 4


# Instructions


def _instructions(device, task, settings, begin) -> dict:
    """Outcome and reason of each case, by its name."""
    found = {}
    for name in task["names"]:
        if name in task["exclude"]:
            found[name] = {"outcome": "crashed", "reason": task["exclude"][name]}
            continue
        begin(name)
        try:
            found[name] = _instruction(device, name, settings)
        except Exception as error:
            reason = in_one_line(error)
            measure.expect_working(device, reason)
            found[name] = {"outcome": "failed", "reason": reason}
    return {"cases": found}


def _instruction(device, name: str, settings: dict) -> dict:
    from tests.support.instruction_harness import refusal

    case, limits = background.cases()[name], _limits(settings)
    if (why := refusal(case, limits)) is not None:
        return {"outcome": "skipped", "reason": why}
    got = _run_case(device, case, name, settings, limits)
    simulated = _simulated(settings["expected"])
    if simulated is None:
        return {"outcome": "skipped", "reason": _NO_EXPECTATION}
    expected = [simulated[f"{name}/{number}"] for number in range(len(got))]
    difference = case.difference(expected, got)
    if difference is None:
        return {"outcome": "passed", "reason": ""}
    return {"outcome": "failed", "reason": difference}


def _run_case(device, case, name: str, settings: dict, limits) -> list[np.ndarray]:
    from tests.support.instruction_harness import run_on_gpu, run_simulated

    if settings["rehearsal"]:
        return run_simulated(case)
    cubin = background.compiled(settings["compiled"], name, limits.arch)
    return run_on_gpu(case, cubin, device.upload, device.download, settings["device"])


@cache
def _simulated(path: str) -> dict | None:
    """The simulated outputs; waits for them while they are being made, then None."""
    if not background.wait_for(Path(path)):
        return None
    with np.load(path) as outputs:
        return dict(outputs)


def _limits(settings: dict):
    from numflash.runtime.driver import limits_of_device

    return limits_of_device(settings["device"])


# Whole kernels against float64


def _check(device, task, settings, begin) -> dict:
    """Errors and budgets of a forward, and with "gradients" of a backward."""
    import numflash
    from numflash.selection.rules import choose

    batch, seqlen, heads, head_dim, head_dim_v = task["shape"]
    q, k, v = (
        device.normal((batch, seqlen, heads, dim), "float16", seed)
        for seed, dim in enumerate((head_dim, head_dim, head_dim_v))
    )
    options = {"causal": task["causal"], "config": task.get("config")}
    if task.get("is_packed"):
        q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        # Three sequences, the second without tokens.
        first = seqlen // 3
        ends = device.upload(np.array([0, first, first, batch * seqlen], np.int32))
        options |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
    elif size := task.get("page_size"):
        width = seqlen // size
        q, lengths = q[:, :1], np.linspace(width * size - 1, 1, batch).astype(np.int32)
        k, v = (x[:, : width * size].reshape(-1, size, *x.shape[2:]) for x in (k, v))
        table = np.arange(batch * width, dtype=np.int32)[::-1].reshape(batch, width).copy()
        options |= {"seqlens_k": device.upload(lengths), "page_table": device.upload(table)}
    kernel = str(numflash.explain_dispatch(q, k, v, **options).forward.config)
    if task.get("gradients"):
        options["dout"] = device.normal(v.shape, "float16", 3)
    if task.get("fused"):
        traits = static.traits_of("float16", head_dim)
        fused = choose("backward", traits, _limits(settings), seqlen).config
        options["config"], kernel = {"backward": fused}, f"{kernel}, {fused}"
    report = numflash.check(q, k, v, **options)
    errors = {e.name: [_finite(e.error), _finite(e.budget)] for e in report.errors}
    outcome = "passed" if report.passed else "failed"
    reason = "" if report.passed else " ".join(str(report).split())
    return {"check": outcome, "reason": reason, "errors": errors, "kernel": kernel}


def _finite(x: float) -> float | str:
    """JSON has no infinity."""
    return x if math.isfinite(x) else "not finite"


# Kernels one by one


def _parts(device, task, settings, begin) -> dict:
    """Milliseconds of each kernel of a call, and of them together."""
    import numflash
    from numflash.calls.backward import Backward
    from numflash.calls.forward import Forward
    from numflash.problem.options import AttentionOptions
    from numflash.runtime.arrays import library_of

    point = Point.from_dict(task["point"])
    shapes = {"q": point.q_shape, "k": point.kv_shape, "v": point.kv_shape}
    arrays = {n: device.normal(s, point.dtype, i) for i, (n, s) in enumerate(shapes.items())}
    of_direction = Forward
    if point.direction == "backward":
        begin("forward")
        out, lse = numflash.attention(**arrays, causal=point.causal, return_lse=True)
        dout = device.normal(point.q_shape, point.dtype, 3)
        arrays |= {"dout": dout, "out": out, "lse": lse}
        of_direction = Backward
    library = library_of(arrays["q"], "q")
    views = {name: library.view(array, name) for name, array in arrays.items()}
    operands = {name: library.operand(array) for name, array in arrays.items()}
    ready = of_direction(views, AttentionOptions(causal=point.causal, config=task["config"]))
    # The results must outlive the launches, which only know their addresses.
    *results, launches = ready.bind(operands, library)
    stream = library.stream(ready.device)
    methods = [Method(name, partial(launch, stream)) for name, launch in launches.items()]
    methods.append(Method("together", lambda: [launch(stream) for launch in launches.values()]))
    begin("together")
    methods[-1].call()
    device.synchronize()
    samples = interleave.time_interleaved(
        methods, device.time_method, budget_ms=settings["budget_ms"], on_failure=_raise
    )
    parts = {name: interleave.summarise(times) for name, times in samples.items()}
    del results
    return {"parts": parts, "kernel": ready.kernel}


def _turn_times(device, task, settings, begin) -> dict:
    """Milliseconds of a turn, and until a buffer is free, as "parts"."""

    def milliseconds_of(name: str, call) -> float:
        begin(name)
        samples = interleave.time_interleaved(
            [Method(name, call)],
            device.time_method,
            budget_ms=settings["budget_ms"] / len(turn_times.TIMES),
            on_failure=_raise,
        )
        return interleave.summarise(samples[name])["median_ms"]

    begin(None)
    given = settings["device"], settings["rehearsal"], milliseconds_of
    found = turn_times.measure(device, *given)
    return {"parts": {name: {"median_ms": each} for name, each in found.items()}}


def _raise(name: str, error: Exception) -> None:
    raise error


# Front ends


def _tests(device, task, settings, begin) -> dict:
    """The outcome of a file of tests, in a process of its own; in a rehearsal they do not run."""
    if importlib.util.find_spec(task["module"]) is None:
        return {"check": "skipped", "reason": f"{task['module']} is not installed"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", task["path"]]
    if settings["rehearsal"]:
        command.append("--collect-only")
    begin(None)
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                if time.monotonic() > settings["deadline"]:
                    return {"check": "skipped", "reason": "out of time"}
                time.sleep(0.2)
                # What is silent is taken to hang; a test that does is stopped by the deadline.
                begin(None)
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        lines = output.read().strip().splitlines()
    summary = lines[-1] if lines else "no output"
    if process.returncode not in (0, _NOTHING_COLLECTED):
        return {"check": "failed", "reason": " ".join(" ".join(lines[-_LAST_LINES:]).split())}
    return {"check": "passed" if " passed" in summary else "skipped", "reason": summary}


# The tuner's predictions


def _predicted(device, task, settings, begin) -> dict:
    """The configs that the model likes best, measured beside the default."""
    from numflash.problem.classes import ProblemClass

    try:
        from tuner.search.candidates import Candidates
        from tuner.space import machines
        from tuner.space.configs import Space
        from tuner.space.target import local_machine
    except ImportError as error:
        return {"unavailable": f"not importable: {error}"}
    begin(None)
    if settings["rehearsal"]:
        machine = machines.find(rehearsal.PREDICTED_GPU)
    else:
        machine = local_machine(settings["device"])
    candidates = Candidates(Space(ProblemClass.parse(task["class"]), machine))
    best = candidates.favourites(task["count"])
    names = [f"{peers.OURS}:{candidates.texts[number]}" for number in best]
    predicted = {name: float(candidates.estimates[n]) for name, n in zip(names, best, strict=True)}
    result = measure.measure_point(
        device,
        Point.from_dict(task["point"]),
        [peers.OURS, *names],
        exclude=task["exclude"],
        begin=begin,
        deadline=settings["deadline"],
        budget_ms=settings["budget_ms"],
    )
    return {**result, "predicted_ms": predicted}


KINDS: dict[str, worker.Kind] = {
    **worker.KINDS,
    "instructions": _instructions,
    "check": _check,
    "parts": _parts,
    "turns": _turn_times,
    "tests": _tests,
    "predicted": _predicted,
}


def main(device: str) -> int:
    """Run tasks on a device, until the parent is gone; 1 if there is none."""
    if device == rehearsal.DEVICE:
        return worker.serve(rehearsal.SimulatedDevice, KINDS)
    return worker.serve(partial(open_device, int(device)), KINDS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
