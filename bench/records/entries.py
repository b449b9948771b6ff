"""Entries of records: what was measured, and whether it counts.

An entry of a method has a `status`, and where a time was measured also `median_ms` and a `check`
(`bench.measuring.measure`).
"""


def is_measured(entry: dict | None) -> bool:
    """Whether a point was measured at all."""
    return bool(entry) and "methods" in entry


def is_right(entry: dict) -> bool:
    """Whether an entry of a method holds a time, of results that were right."""
    return "median_ms" in entry and entry.get("check", {}).get("outcome") == "checked"
