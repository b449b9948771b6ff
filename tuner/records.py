"""The record that a trial of one config leaves behind.

A record is data, also where something failed. It travels through Optuna's storages, the journals
of exhaustive runs and the report as JSON.
"""

import json
import math
import statistics
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from numflash.runtime.devices import Architecture, blocks_per_sm

FAILURES = (
    "invalid",
    "over_budget",
    "compile_failed",
    "spilled",
    "wrong_result",
    "launch_failed",
    "timeout",
)
"""Why a config was given up: against a rule of the kernel; beyond a budget of the user or the
device; the compiler refused it; it spilled registers or drew compiler warnings; its results were
beyond the error budget; the launch or the kernel failed; it took too long."""
OUTCOMES = ("measured", "predicted", "estimated", "slow", *FAILURES)
"""A `slow` config was given up after a few measurements, far behind the best. An `estimated` one
was not compiled: offline it could not win, whatever the compiler made of it."""


@dataclass(frozen=True)
class ResourceUsage:
    """Resources of the device that a config's machine code takes.

    Attributes:
        registers: per thread.
        spill_bytes: stored and loaded, per thread.
        smem_bytes, num_threads: per block.
        blocks_per_sm: that fit at once.
        limited_by: the resource that allows no more: "threads", "blocks", "registers" or "shared
            memory".
        warnings: of the compiler.
        compile_ms: from Python source to machine code; 0 if it was in the cache.
    """

    registers: int
    spill_bytes: int
    smem_bytes: int
    num_threads: int
    blocks_per_sm: int
    limited_by: str
    warnings: tuple[str, ...] = ()
    compile_ms: float = 0.0

    @classmethod
    def of(cls, cubin, limits: Architecture) -> "ResourceUsage":
        """Those of a `machine_code.compiler.Cubin` on an architecture."""
        blocks, limited_by = blocks_per_sm(
            limits, cubin.num_threads, cubin.registers, cubin.smem_bytes
        )
        return cls(
            registers=cubin.registers,
            spill_bytes=cubin.spill_store_bytes + cubin.spill_load_bytes,
            smem_bytes=cubin.smem_bytes,
            num_threads=cubin.num_threads,
            blocks_per_sm=blocks,
            limited_by=limited_by,
            warnings=cubin.warnings,
            compile_ms=round(cubin.compile_ms, 1),
        )


@dataclass(frozen=True)
class Record:
    """One config, tried.

    Attributes:
        config: its string form.
        outcome: one of OUTCOMES.
        reason: why, if it failed; of a winner, why another that is faster did not win.
        resources: of the compiled kernel; None if it never was compiled.
        predicted_ms: by the offline model; None if it was not asked.
        parts: milliseconds that each resource alone would take by the model, by name.
        samples_ms: times measured.
        batch_heads: batch x heads of what was timed, which may be fewer than the class's; None is
            those of the class.
        clock_mhz: median SM clock while it was timed; None if unknown.
        seconds: that the trial took.
        finished: seconds since the epoch.
    """

    config: str
    outcome: str
    reason: str = ""
    resources: ResourceUsage | None = None
    predicted_ms: float | None = None
    parts: dict[str, float] | None = None
    samples_ms: tuple[float, ...] = ()
    batch_heads: int | None = None
    clock_mhz: float | None = None
    seconds: float = 0.0
    finished: float = 0.0

    def __post_init__(self):
        if self.outcome not in OUTCOMES:
            raise ValueError(f"outcome must be one of {', '.join(OUTCOMES)}, got {self.outcome!r}")

    @property
    def median_ms(self) -> float | None:
        """Median of the samples; None without any."""
        return statistics.median(self.samples_ms) if self.samples_ms else None

    @property
    def spread(self) -> float | None:
        """Interquartile range of the samples over their median; None with fewer than two."""
        if len(self.samples_ms) < 2:
            return None
        low, median, high = statistics.quantiles(self.samples_ms, n=4, method="inclusive")
        return (high - low) / median

    @property
    def time_ms(self) -> float:
        """The time that the search minimises: measured, else predicted; infinite if it failed."""
        if self.outcome in FAILURES:
            return math.inf
        time = self.predicted_ms if self.median_ms is None else self.median_ms
        return math.inf if time is None else time

    def failed(self, outcome: str, reason: str) -> "Record":
        """This record with the reason why the config was given up."""
        return replace(self, outcome=outcome, reason=reason)

    def to_json(self) -> str:
        """The inverse of `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """Read a record. Raises ValueError if it is none."""
        try:
            found: dict[str, Any] = json.loads(text)
            known = {field.name for field in fields(cls)}
            found = {name: value for name, value in found.items() if name in known}
            found["samples_ms"] = tuple(found.get("samples_ms") or ())
            if found.get("resources") is not None:
                resources = dict(found["resources"])
                resources["warnings"] = tuple(resources.get("warnings", ()))
                found["resources"] = ResourceUsage(**resources)
            return cls(**found)
        except (TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a record of a trial: {error}") from error
