"""One point, measured: every method prepared, checked, timed in turn with the others, recorded.

Nothing that a method does wrong goes further than its own entry, except a fault that breaks the
device for the whole process: that one ends the process (`BrokenDeviceError`), and
`bench.measuring.supervisor` goes on without the method.

An entry has a `status`: "measured", "unavailable", "failed", "out of memory", "crashed" or "left
out", with a `reason` where it is not the first. What is measured says in `check` whether its
results were right; a time whose check failed is in the record, and in no table.
"""

import statistics
import time
import warnings
from collections.abc import Callable

from bench.measuring import agreement, inputs
from bench.measuring.device import Device
from bench.peers import methods as peers
from bench.points import interleave, work
from bench.points.interleave import Method
from bench.points.points import Point
from bench.records.entries import is_right
from numflash.runtime.errors import in_one_line
from tuner.measuring.channel import recovers

_HOST_CALLS, _HOST_BATCH = 300, 50


class BrokenDeviceError(Exception):
    """A kernel's fault has made every further use of the device fail."""


def expect_working(device: Device, reason: str) -> None:
    """Raise BrokenDeviceError, for this reason, if the device no longer does anything."""
    if not recovers(device):
        raise BrokenDeviceError(reason)


def measure_point(
    device: Device,
    point: Point,
    names: list[str],
    *,
    exclude: dict[str, str],
    begin: Callable[[str], None],
    deadline: float,
    budget_ms: float,
) -> dict:
    """Measure the methods on one point.

    Args:
        device: what to measure on.
        point: what to measure.
        names: of the methods, as `peers.find` takes them.
        exclude: name -> reason of methods that have ended a process on this point.
        begin: told a method's name whenever that is about to run.
        deadline: of time.monotonic; later methods are left out.
        budget_ms: time for all rounds.

    Returns:
        "methods": name -> entry; "ratios": name -> how many times as fast numflash was; "timed":
        when the timing began and ended, as of time.time().

    Raises:
        BrokenDeviceError: the process must end.
    """
    run = _Run(device, point, begin, deadline, budget_ms)
    entries = {name: {"status": "crashed", "reason": reason} for name, reason in exclude.items()}
    entries |= run.measure([name for name in names if name not in exclude])
    for name in [n for n, entry in entries.items() if entry["status"] == "out of memory"]:
        if name != peers.OURS:
            # The others' matrices may have taken the memory: once more, next to numflash alone.
            alone = [n for n in (peers.OURS, name) if n not in exclude]
            again = run.measure(alone)
            if again[name]["status"] == "measured":
                entries[name] = {**again[name], "alone": True}
    return {"methods": entries, "ratios": run.ratios, "timed": run.timed}


class _Run:
    """The inputs and samples of a point, and the measurements on them."""

    def __init__(self, device, point, begin, deadline, budget_ms):
        self.device, self.point, self.begin = device, point, begin
        self.deadline, self.budget_ms = deadline, budget_ms
        self.ratios: dict[str, float] = {}
        self.timed: list[float] = []
        self.inputs = inputs.make(device, point)
        round_to = device.round_to(point.dtype)
        exact_of = {name: x for name, x in self.inputs.items() if name != "cu_seqlens"}
        self.samples = agreement.make_samples(device.xp, point, round_to, **exact_of)
        del exact_of
        inputs.into_cache(device, point, self.inputs)

    def measure(self, names: list[str]) -> dict[str, dict]:
        """Entries of the methods; those that can run are timed together."""
        entries: dict[str, dict] = {}
        methods = []
        for name in names:
            if time.monotonic() > self.deadline:
                entries[name] = {"status": "left out", "reason": "out of time"}
                continue
            self.begin(name)
            method, entries[name] = self._prepare(name)
            if method is not None:
                methods.append(Method(name, method.call, method.context))
        self._time(methods, entries)
        methods.clear()
        self.device.release()
        return entries

    def _prepare(self, name: str) -> tuple[Method | None, dict]:
        """Make a method ready and check what it computes."""
        peer = peers.find(name)
        if (reason := peer.unavailable()) is not None:
            return None, {"status": "unavailable", "reason": reason}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                started = time.perf_counter()
                self._add_forward(name)
                method = peer.prepare(self.point, self.inputs)
                with method.context():
                    results = method.call()
                self.device.synchronize()
                entry = {"status": "measured", "prepare_s": time.perf_counter() - started}
                entry["check"] = agreement.compare(results, self.samples, peer.max_rel_rms)
                del results
                entry["peak_bytes"] = self.device.peak_bytes(method)
            except Exception as error:
                return None, self._failure(error, [str(w.message) for w in caught])
        return method, entry

    def _add_forward(self, name: str) -> None:
        """Give numflash's backward the results of its forward."""
        if self.point.direction == "backward" and name.startswith(peers.OURS):
            import numflash

            run = numflash.attention_varlen if self.point.is_packed else numflash.attention
            arrays, given = inputs.of_call(self.point, self.inputs)
            results = run(*arrays, causal=self.point.causal, return_lse=True, **given)
            self.inputs["out"], self.inputs["lse"] = results

    def _time(self, methods: list[Method], entries: dict[str, dict]) -> None:
        """Time the methods in turn, and write the times into their entries."""

        def timer(method: Method) -> float:
            self.begin(method.name)
            return self.device.time_method(method)

        def fail(name: str, error: Exception) -> None:
            entries[name] = self._failure(error)

        started = time.time()
        samples = interleave.time_interleaved(
            methods, timer, budget_ms=self.budget_ms, on_failure=fail
        )
        self.timed = self.timed or [started, time.time()]
        for name, times in samples.items():
            entry = entries[name]
            entry |= interleave.summarise(times)
            entry["samples_ms"] = [round(t, 5) for t in times]
            entry["tflops"] = work.tflops(self.point, entry["median_ms"])
            operand_bytes = peers.find(name).operand_bytes
            entry["gbps"] = work.gbps(self.point, entry["median_ms"], operand_bytes)
        ours = samples.get(peers.OURS)
        if ours is not None and is_right(entries[peers.OURS]):
            for name, times in samples.items():
                if name != peers.OURS and is_right(entries[name]):
                    self.ratios[name] = interleave.paired_ratio(ours, times)

    def _failure(self, error: Exception, warned: list[str] | None = None) -> dict:
        """The entry of a method that raised. Raises BrokenDeviceError if the device is broken."""
        reason = in_one_line(error)
        # PyTorch says in warnings why a back end was not available.
        reason = "; ".join([reason, *(" ".join(w.split()) for w in warned or ())])[:600]
        is_memory = "outofmemory" in type(error).__name__.lower() or "out of memory" in reason
        # Drop what the frames of the traceback hold.
        error.__traceback__ = None
        expect_working(self.device, reason)
        return {"status": "out of memory" if is_memory else "failed", "reason": reason}


def host_microseconds(device: Device, names: list[str], begin: Callable[[str], None]) -> dict:
    """Median host time of a call on one small head, in microseconds; a reason where it fails.

    The device is waited for every few calls, outside the measured time, so that its queue never
    holds the host up.
    """
    point = Point("forward", "host", "bfloat16", 1, 128, 128, 1, 1, 64, False)
    arrays = {name: device.normal(point.q_shape, point.dtype, i) for i, name in enumerate("qkv")}
    found: dict[str, dict] = {}
    for name in names:
        begin(name)
        try:
            peer = peers.find(name)
            if (reason := peer.unavailable()) is not None:
                found[name] = {"reason": reason}
                continue
            method = peer.prepare(point, arrays)
            with method.context():
                found[name] = {"median_us": _host_time(device, method.call)}
        except Exception as error:
            found[name] = {"reason": in_one_line(error)}
            expect_working(device, found[name]["reason"])
    return found


def _host_time(device: Device, call: Callable) -> float:
    samples = []
    for i in range(_HOST_CALLS + _HOST_BATCH):
        if i % _HOST_BATCH == 0:
            device.synchronize()
        start = time.perf_counter_ns()
        call()
        samples.append((time.perf_counter_ns() - start) / 1e3)
    device.synchronize()
    return statistics.median(samples[_HOST_BATCH:])


def kernels_of(device: Device, point: Point) -> str | None:
    """Which of numflash's kernels runs a point, in its own words; None if it does not say."""
    import numflash

    made = inputs.make(device, point)
    inputs.into_cache(device, point, made)
    arrays, given = inputs.of_call(point, made)
    try:
        explain = getattr(numflash, "explain_dispatch", None)
        if explain is not None:
            return str(explain(*arrays, causal=point.causal, **given))
        if point.direction == "backward":
            return None
        return numflash.plan(*arrays, causal=point.causal).kernel
    except Exception:
        return None
