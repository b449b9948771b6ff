"""Entries of a config cache for one class."""

from dataclasses import replace

import numpy as np
import pytest

from numflash.calls import ready
from numflash.machine_code.compiler import versions
from numflash.machine_code.sources import family_hash
from numflash.problem.classes import ProblemClass
from numflash.runtime.devices import architecture
from numflash.runtime.mode import SIMULATED
from numflash.selection import store, tuned
from numflash.selection.entries import DeviceKey, Entry

WANTED = ProblemClass.parse("forward float16-d64-dv64-vec full q512 k512 bh8 g1")
LIMITS = architecture("sm_80")
HERE = DeviceKey("NVIDIA A100-SXM4-80GB", "sm_80", 108)
needs_simulator = pytest.mark.skipif(not SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM=1")


def entry(problem=WANTED, config="sm80-m64n32w4s2", **changes):
    """An entry that is exact for WANTED unless told otherwise."""
    if isinstance(problem, str):
        problem = ProblemClass.parse(problem)
    found = Entry(
        problem=problem,
        config=config,
        time_ms=1.0,
        spread=None,
        origin="predicted",
        date="2026-11-21T00:00:00Z",
        kernels=family_hash(problem.family),
        compilers=versions(),
        default_config=config,
        default_ms=2.0,
    )
    return replace(found, **changes)


def use_empty_cache(folder, monkeypatch) -> None:
    """A config cache in this folder, no shipped tables, and tuned configs turned on."""
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(folder))
    monkeypatch.setenv("NUMFLASH_TUNED", "1")
    monkeypatch.setattr(store, "read_shipped", dict)
    for name, empty in (("_found", {}), ("_advice", {}), ("_tables", []), ("_state", [])):
        monkeypatch.setattr(tuned, name, empty)
    monkeypatch.setattr(tuned, "_warned", set())
    monkeypatch.setattr(ready, "_ready", {})


def find(wanted=WANTED, device=HERE, rows=512):
    """The tuned choice for a class."""
    return tuned.find(wanted, device, LIMITS, rows)


def arrays(batch=1, seqlen=512, heads=8, head_dim=64):
    """q, k and v of the class WANTED."""
    return (np.zeros((batch, seqlen, heads, head_dim), np.float16),) * 3


SIMULATED_DEVICE = DeviceKey("sm_80", "sm_80", 0)
