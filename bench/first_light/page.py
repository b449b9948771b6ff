"""The page that a person reads in a minute: what is right, how fast, which question is answered.

Everything on it is from the record. A rehearsal's says so in its first line and has no times.
"""

import statistics
from typing import Any

from bench.first_light import plan
from bench.peers import methods as peers
from bench.points.points import Point
from bench.records.entries import is_right
from bench.tables import tables

REHEARSAL = "REHEARSAL: no GPU ran this, and no time on this page is one."
_PEERS = {
    "torch-cudnn": "cuDNN",
    "torch-flash": "FA2 of PyTorch",
    "flash-attention-2": "FA2",
    "flash-attention-3": "FA3",
    "fa3-fwd": "FA3 (fa3-fwd)",
}
_SUBJECTS = {
    plan.INSTRUCTIONS: "instructions",
    plan.SPEED: "results that were timed beside peers",
    plan.QUESTIONS: "results of forced configs",
    plan.TUNER: "results of the model's configs",
}
_ONE_CHECK = ("check", "tests")
"""Kinds of steps that are one check each."""
_SAME = 0.01
"""Times that differ by less are called equal."""
_PRECISE_US = 10
"""Microseconds below which two decimals are shown."""
_REASON, _FEW = 240, 6
"""Characters of a reason, and names that share one, that are shown."""
_OUTCOMES = ("passed", "failed", "crashed", "skipped", "not run")


def render(record: dict) -> str:
    """The page of a record, also of one that is not complete."""
    parts = [
        *([REHEARSAL] if record["rehearsal"] else []),
        f"# First light on {record['device']}",
        _about(record),
        "## What is right",
        _rightness(record),
        "## How fast",
        _speeds(record),
        "## Questions",
        _answers(record),
        "## The model's best configs",
        _predictions(record),
    ]
    if missing := _missing(record):
        parts += ["## Not run, or wrong", missing]
    return "\n\n".join(filter(None, parts)) + "\n"


def _about(record: dict) -> str:
    done = sum(step["outcome"] == "done" for step in record["steps"])
    changes = " with uncommitted changes" if record.get("has_uncommitted_changes") else ""
    commit, driver = (record["commit"] or "unknown")[:10], record["driver"] or "none"
    return (
        f"{record['date']}, driver {driver}, commit {commit}{changes}: {done} of "
        f"{len(record['steps'])} steps in {record['seconds']:.0f} s of {record['minutes']:g} "
        f"minutes."
    )


# What is right


def outcomes(step: dict) -> dict[str, str]:
    """Check of a step -> "passed", "failed", "crashed", "skipped" or "not run"."""
    if step["kind"] == "instructions":
        found = step.get("cases", {})
        if step["outcome"] == "crashed":
            return dict.fromkeys(step["names"], "crashed")
        return {name: found.get(name, {"outcome": "not run"})["outcome"] for name in step["names"]}
    if step["kind"] in _ONE_CHECK:
        if step["outcome"] == "done":
            return {step["title"]: step["check"]}
        is_lost = step["outcome"] in ("crashed", "failed")
        return {step["title"]: step["outcome"] if is_lost else "not run"}
    return {
        f"{name} at {step['title']}": _outcome(entry)
        for name, entry in step.get("methods", {}).items()
        if name.partition(":")[0] == peers.OURS
    }


def _outcome(entry: dict) -> str:
    """The outcome of numflash's result at a point that was timed."""
    if "check" in entry:
        return "passed" if entry["check"]["outcome"] == "checked" else "failed"
    return {"crashed": "crashed", "left out": "not run"}.get(entry["status"], "failed")


def _rightness(record: dict) -> str:
    tallies: dict[str, dict[str, int]] = {}
    for step in record["steps"]:
        for name, outcome in outcomes(step).items():
            subject = name if step["kind"] in _ONE_CHECK else _SUBJECTS[step["section"]]
            if step["title"] in plan.NO_WITNESS:
                subject = "instructions without a witness"
            tally = tallies.setdefault(subject, dict.fromkeys(_OUTCOMES, 0))
            tally[outcome] += 1
    rows = [[name, *(n or "" for n in tally.values())] for name, tally in tallies.items()]
    return tables.markdown(["", *_OUTCOMES], rows)


# How fast


def _speeds(record: dict) -> str:
    ceilings = tables.ceilings_of(record)
    header = ["point", "ms", "TFLOP/s", "of matmul", *(f"/ {name}" for name in _PEERS.values())]
    rows, decoding = [], []
    for step in _steps(record, plan.SPEED, "point"):
        point, methods = Point.from_dict(step["point"]), step["methods"]
        ours = methods.get(peers.OURS, {})
        ratios = [_ratio(step, name) for name in _PEERS]
        if point.seqlen_q == 1:
            cells = [_time(ours, "median_ms", ".4f"), _time(ours, "gbps", ".0f")]
            cells.append(_of(ours.get("gbps"), ceilings and ceilings.copy_gbps))
            decoding.append([step["title"], *cells, *ratios])
            continue
        cells = [_time(ours, "median_ms", ".3f"), _time(ours, "tflops", ".0f")]
        cells.append(_of(ours.get("tflops"), ceilings and ceilings.matmul_tflops))
        rows.append([step["title"], *cells, *ratios])
    if record["rehearsal"]:
        header[2] = "speed"
    parts = [tables.markdown(header, rows)] if rows else ["Nothing was measured."]
    if decoding:
        header = ["point", "ms", "GB/s", "of copy", *header[4:]]
        parts.append(tables.markdown(header, decoding))
    if ceilings is not None:
        parts.append(
            f"In this run a matrix product reached {ceilings.matmul_tflops:.0f} TFLOP/s, a copy "
            f"{ceilings.copy_gbps:.0f} GB/s. Under a peer stands numflash's speed over its, the "
            "median of rounds in which both ran in turn."
        )
    return "\n\n".join(parts)


def _steps(record: dict, section: str, kind: str) -> list[dict]:
    """The steps of a kind that gave a result."""
    return [
        step
        for step in record["steps"]
        if (step["section"], step["kind"], step["outcome"]) == (section, kind, "done")
    ]


def _ratio(step: dict, name: str) -> str:
    if name in step.get("ratios", {}):
        return f"{step['ratios'][name]:.2f}"
    entry = step["methods"].get(name, {})
    if entry.get("rehearsed"):
        return "rehearsed"
    if "median_ms" in entry:
        return "wrong" if not is_right(entry) else "-"
    return {"unavailable": "-"}.get(entry.get("status"), entry.get("status", "-"))


def _time(entry: dict, name: str, how: str) -> str:
    """A number of an entry, or the word for there being none."""
    if name in entry:
        return format(entry[name], how) if is_right(entry) else "wrong"
    return "rehearsed" if entry.get("rehearsed") else entry.get("status", "-")


def _of(value: float | None, ceiling: float | None) -> str:
    return "-" if value is None or ceiling is None else f"{value / ceiling:.0%}"


# Questions


def _answers(record: dict) -> str:
    rows = [
        [step["title"], answer(step["labels"], step["methods"])]
        for step in _steps(record, plan.QUESTIONS, "point")
    ]
    for kind in ("parts", "turns"):
        rows += [[step["title"], _apart(step)] for step in _steps(record, plan.QUESTIONS, kind)]
    return tables.markdown(["question", "answer"], rows) if rows else "None was answered."


def answer(labels: dict[str, str], methods: dict[str, dict]) -> str:
    """The fastest variant, and the times of all.

    Args:
        labels: of the methods, today's choice first.
        methods: name -> entry.
    """
    times, texts = {}, []
    for name, label in labels.items():
        entry = methods.get(name, {})
        if is_right(entry):
            times[label] = entry["median_ms"]
        texts.append(f"{label} {_time(entry, 'median_ms', '.3f')}" + " ms" * is_right(entry))
    listed = ", ".join(texts)
    if len(times) < 2:
        return f"not answered: {listed}"
    best = min(times, key=times.get)
    today = next(iter(labels.values()))
    others = {label: t for label, t in times.items() if label != best}
    margin = min(others.values()) / times[best] - 1
    if margin < _SAME:
        return f"no difference (under {_SAME:.0%}): {listed}"
    verdict = "as today" if best == today else "not as today"
    return f"**{best}**, by {margin:.1%}, {verdict}: {listed}"


def _apart(step: dict) -> str:
    """The time of each kernel of a call, or of each part of a turn."""
    texts = []
    for name, entry in step["parts"].items():
        text = "rehearsed"
        if "median_ms" in entry:
            microseconds = 1e3 * entry["median_ms"]
            text = f"{microseconds:.{1 if microseconds >= _PRECISE_US else 2}f} us"
        texts.append(f"{name} {text}")
    return ", ".join(texts)


# The tuner


def _predictions(record: dict) -> str:
    rows, reasons = [], []
    for step in _steps(record, plan.TUNER, "predicted"):
        if "unavailable" in step:
            reasons.append(step["unavailable"])
            continue
        ours = step["methods"].get(peers.OURS, {})
        timed = {
            name: entry["median_ms"]
            for name, entry in step["methods"].items()
            if name != peers.OURS and is_right(entry)
        }
        best = min(timed, key=timed.get, default=None)
        rows.append([step["title"], _time(ours, "median_ms", ".3f"), *_best(step, best, ours)])
    parts = []
    if rows:
        header = ["", "default ms", "best of them", "ms", "default / best", "measured / predicted"]
        parts.append(tables.markdown(header, rows))
    parts += [f"None was measured: {reason}." for reason in dict.fromkeys(reasons)]
    return "\n\n".join(parts) or "None was measured."


def _best(step: dict, best: str | None, ours: dict) -> list[str]:
    if best is None:
        names = [name for name in step["methods"] if name != peers.OURS]
        is_rehearsed = any(step["methods"][name].get("rehearsed") for name in names)
        return [f"{len(names)} configs", "rehearsed" if is_rehearsed else "none ran", "-", "-"]
    time_ms = step["methods"][best]["median_ms"]
    ratio = f"{ours['median_ms'] / time_ms:.2f}" if is_right(ours) else "-"
    errors = [
        step["methods"][name]["median_ms"] / predicted
        for name, predicted in step["predicted_ms"].items()
        if is_right(step["methods"].get(name, {}))
    ]
    factor = f"{statistics.median(errors):.2f}"
    return [best.partition(":")[2], f"{time_ms:.3f}", ratio, factor]


# What is missing


def _missing(record: dict) -> str:
    lines: dict[str, list[str]] = {}
    if "no_device" in record:
        lines[record["no_device"]] = ["no device could be opened"]
    for step in record["steps"]:
        for what, reason in _reasons(step):
            lines.setdefault(reason.strip()[-_REASON:], []).append(what)
    return "\n".join(f"- {'; '.join(_few(what))}: {reason}" for reason, what in lines.items())


def _few(names: list[str]) -> list[str]:
    names = list(dict.fromkeys(names))
    more = [f"{len(names) - _FEW} more"] if len(names) > _FEW else []
    return [*names[:_FEW], *more]


def _reasons(step: dict) -> list[tuple[str, str]]:
    """(what, why) of everything in a step that gave no result, or a wrong one."""
    if step["outcome"] != "done":
        return [(step["title"], ": ".join(filter(None, [step["outcome"], step.get("reason")])))]
    found: list[tuple[str, str]] = []
    for name, case in step.get("cases", {}).items():
        if case["outcome"] != "passed":
            found.append((name, f"{case['outcome']}: {case['reason']}"))
    if step.get("check", "passed") != "passed":
        found.append((step["title"], f"{step['check']}: {step['reason']}"))
    for name, entry in step.get("methods", {}).items():
        reason: Any = entry.get("reason")
        if reason is None and entry.get("check", {}).get("outcome") == "failed":
            reason = f"wrong result: errors {entry['check']['errors']}"
        if reason is not None:
            found.append((name, f"{entry.get('status', 'failed')}: {reason}"))
    return found
