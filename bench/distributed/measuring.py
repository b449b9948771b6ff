"""One problem on some ranks: each method checked, counted, and timed in turn with the others.

A time is from a meeting of all ranks to the end of the work of the slowest. Exposed communication
is the time less that with a communicator that moves nothing.
"""

import statistics
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numflash
from bench.distributed.cases import METHODS, Case
from bench.distributed.peers import PEERS
from bench.distributed.ranks import Rank, Ranks
from bench.distributed.wires import Counting, Still
from bench.points.interleave import Method, time_interleaved
from numflash import distributed
from numflash.distributed.arrays import Arrays
from numflash.runtime.errors import in_one_line

STILL = " without wires"
MAX_REL_RMS = 2e-2
"""Of results against those of one GPU: 16 bits, and others' partial results in 16 bits."""


def measure(
    ranks: Ranks, case: Case, size: int, direction: str, rounds: int = 10
) -> dict[str, Any]:
    """Measure a problem on so many ranks.

    Args:
        ranks: to measure on.
        case: the problem.
        size: ranks that share it.
        direction: "forward" or "backward".
        rounds: of times.

    Returns:
        An entry of a record: "methods" by name, each with a `status` and, where it was measured,
        `median_ms`, and of numflash's `exposed_ms`, `sent`, `expected` (bytes of each rank, and
        what `explain` says) and `lockstep`. Empty in a process that is none of these ranks.
    """
    whole = _Whole(case, direction)
    found = ranks.run(size, lambda rank: _on_rank(rank, case, direction, rounds, whole))
    if not found:
        return {}
    methods = {name: _together([each[name] for each in found]) for name in found[0]}
    for method in METHODS:
        entry = methods.get(method)
        if entry is None or entry["status"] != "measured":
            continue
        explained = case.explained(size, method, direction)
        still = methods.get(method + STILL, {})
        if "median_ms" in still:
            entry["exposed_ms"] = entry["median_ms"] - still["median_ms"]
        entry |= {"expected": list(explained.sent), "lockstep": explained.balance.lockstep}
    asked = {"kind": "distributed", "case": str(case), "ranks": size, "direction": direction}
    return {**asked, "methods": methods}


def _together(entries: list[dict]) -> dict:
    """Ranks' entries of one method: in each round the time of the slowest."""
    failed = [entry for entry in entries if entry["status"] != "measured"]
    if failed:
        return failed[0]
    slowest = [max(times) for times in zip(*(entry["ms"] for entry in entries), strict=True)]
    entry = {
        "status": "measured",
        "median_ms": statistics.median(slowest),
        "samples_ms": [round(each, 5) for each in slowest],
    }
    if entries[0]["rel_rms"] is not None:
        entry["rel_rms"] = max(each["rel_rms"] for each in entries)
    if entries[0]["sent"] is not None:
        entry["sent"] = [each["sent"] for each in entries]
    return entry


class _Whole:
    """Operands of all tokens, and one GPU's results: made once for all ranks of a process."""

    def __init__(self, case: Case, direction: str):
        self._asked, self._lock = (case, direction), threading.Lock()
        self._found: tuple[dict, dict] | None = None

    def on(self, device) -> tuple[dict[str, Any], dict[str, Any]]:
        """Both, by name, on a device; the same numbers in each process."""
        with self._lock:
            if self._found is None:
                arrays = _wholes(device, *self._asked)
                self._found = arrays, _attend(*self._asked, arrays)
                device.synchronize()
            return self._found


def _on_rank(
    rank: Rank, case: Case, direction: str, rounds: int, whole: _Whole
) -> dict[str, dict]:
    """Entries of this rank's methods."""
    layout = case.layout(rank.comm.size)
    own, expected = (
        {name: layout.shard(x, rank.comm.rank) for name, x in arrays.items()}
        for arrays in whole.on(rank.device)
    )
    if direction == "backward":
        out, lse = _forward(case, layout, rank.comm, METHODS[0], own)
        own |= {"out": out, "lse": lse}
    prepared, entries = [], {}
    for name, (prepare, comm) in _methods(rank, case, direction, layout).items():
        method, entries[name] = _prepare(rank, name, prepare, comm, own, expected)
        if method is not None:
            prepared.append(method)

    def timer(method: Method) -> float:
        rank.device.synchronize()
        rank.comm.agree("meet")
        with method.context():
            start = time.perf_counter()
            method.call()
            rank.device.synchronize()
            return 1e3 * (time.perf_counter() - start)

    def fail(name: str, error: Exception) -> None:
        raise error

    times = time_interleaved(prepared, timer, budget_ms=0, on_failure=fail, rounds=rounds)
    for name, each in times.items():
        entries[name]["ms"] = each
    return entries


def _prepare(
    rank: Rank, name: str, prepare: Callable, comm, own: dict[str, Any], expected: dict[str, Any]
) -> tuple[Method | None, dict]:
    """Run a method once, and check what it computes; all ranks alike leave it out, if one must."""
    method, entry = None, {"status": "measured", "sent": None, "rel_rms": None}
    try:
        call, context = prepare(own)
        method = Method(name, call, context)
        with context():
            results = call()
        rank.device.synchronize()
        if isinstance(comm, Counting):
            entry["sent"] = comm.sent
        if not isinstance(comm, Still):
            entry["rel_rms"] = max(_rel_rms(results[x], y) for x, y in expected.items())
            if not entry["rel_rms"] <= MAX_REL_RMS:
                entry["status"], reason = "wrong", f"differs by {entry['rel_rms']:.1e}"
                entry["reason"] = reason
    except Exception as error:
        absent = isinstance(error, ImportError | NotImplementedError)
        entry["status"] = "unavailable" if absent else "failed"
        entry["reason"] = in_one_line(error)
    said = rank.comm.agree(entry["status"])
    if said is None:
        return (method if entry["status"] == "measured" else None), entry
    if entry["status"] == "measured":
        entry |= {"status": "failed", "reason": f"ranks are {', '.join(said)}"}
    return None, entry


def _rel_rms(found, expected) -> float:
    """The error against one GPU's results, relative to them; of no tokens 0."""
    as_floats = Arrays.of(found, "found").astype
    x, y = (as_floats(each, "float32") for each in (found, expected))
    norm = float((y * y).sum())
    return (float(((x - y) ** 2).sum()) / norm) ** 0.5 if norm else 0.0


def _wholes(device, case: Case, direction: str) -> dict[str, Any]:
    """q, k, v, and for a backward dout, of all tokens: the same on all ranks."""
    heads = {"q": case.heads_q, "k": case.heads_kv, "v": case.heads_kv, "dout": case.heads_q}
    names = list(heads)[: 4 if direction == "backward" else 3]
    return {
        name: device.normal((1, case.seqlen, heads[name], case.head_dim), case.dtype, seed)
        for seed, name in enumerate(names)
    }


def _attend(case: Case, direction: str, arrays: dict[str, Any]) -> dict[str, Any]:
    """One GPU's results, by name."""
    q, k, v = (arrays[name] for name in "qkv")
    out, lse = numflash.attention(q, k, v, return_lse=True, **case.mask)
    if direction == "forward":
        return {"out": out}
    found = numflash.attention_backward(arrays["dout"], q, k, v, out, lse, **case.mask)
    return dict(zip(("dq", "dk", "dv"), found, strict=True))


def _forward(case: Case, layout, comm, method: str, own: dict[str, Any]) -> tuple:
    operands = (own[name] for name in "qkv")
    asked = {"layout": layout, "comm": comm, "method": method, **case.mask}
    return distributed.attention(*operands, return_lse=True, **asked)


def _methods(rank: Rank, case: Case, direction: str, layout) -> dict[str, tuple[Callable, Any]]:
    """By name (a function that makes a method ready: own arrays -> (call, context), its ranks)."""

    def ours(method: str, comm) -> Callable:
        def prepare(own):
            asked = {"layout": layout, "comm": comm, "method": method, **case.mask}
            if direction == "forward":
                operands = [own[name] for name in "qkv"]
                return (lambda: {"out": distributed.attention(*operands, **asked)}), nullcontext
            operands = [own[name] for name in ("dout", "q", "k", "v", "out", "lse")]

            def backward():
                found = distributed.attention_backward(*operands, **asked)
                return dict(zip(("dq", "dk", "dv"), found, strict=True))

            return backward, nullcontext

        return prepare

    def other(peer: Callable) -> Callable:
        def prepare(own):
            if rank.group is None:
                raise NotImplementedError("it needs processes: run under torchrun")
            if direction == "backward":
                raise NotImplementedError("only its forward is timed")
            call, context = peer(case, own, rank.group)
            return (lambda: {"out": call()}), context

        return prepare

    comms = {METHODS[0]: Counting(rank.comm)}
    if rank.comm.size > 1:
        for method in METHODS:
            comms[method], comms[method + STILL] = Counting(rank.comm), Still(rank.comm)
    found = {name: (ours(name.removesuffix(STILL), comm), comm) for name, comm in comms.items()}
    if rank.comm.size > 1:
        found |= {name: (other(peer), None) for name, peer in PEERS.items()}
    return found
