"""Hardware records: one JSON file for each device and date in `bench/results/`.

A record says which commit and kernel sources ran on which device with which software, which checks
passed there, and what was timed. A check counts as verified on a device while a record of it has
passed with the kernel sources of today.
"""

import json
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from numflash import compiler

SCHEMA_VERSION = 1
RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    "numpy",
    "numba",
    "numba-cuda",
    "cuda-bindings",
    "cupy-cuda13x",
    "cupy-cuda12x",
    "torch",
)


def describe_machine() -> dict:
    """Commit, device, driver and versions of this machine."""
    versions = {"python": platform.python_version(), **compiler.versions()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _output("git", "rev-parse", "HEAD"),
        "source_hash": compiler.source_hash(),
        "device": _gpu("name"),
        "compute_capability": _gpu("compute_cap"),
        "driver": _gpu("driver_version"),
        "versions": versions,
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
    }


def clocks() -> dict[str, str | None]:
    """Clocks, power and temperature of the first GPU, as nvidia-smi prints them."""
    names = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    return {name: _gpu(name) for name in names}


def verified_checks(device: str | None, source_hash: str, folder: Path = RESULTS) -> set[str]:
    """Ids of the checks that have passed on this device with these kernel sources."""
    verified = set()
    for path in folder.glob("*.json"):
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if record.get("device") == device and record.get("source_hash") == source_hash:
            checks = record.get("checks", {})
            verified |= {name for name, check in checks.items() if check["outcome"] == "passed"}
    return verified


def write(record: dict, folder: Path) -> Path:
    """Write a record; its path: device and date, numbered if there is one already."""
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", (record["device"] or "no-gpu").lower()).strip("-")
    stem = f"{device}-{record['date']}"
    names = [f"{stem}.json", *(f"{stem}-{n}.json" for n in range(2, 100))]
    path = next(folder / name for name in names if not (folder / name).exists())
    path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    return path


def _gpu(field: str) -> str | None:
    query = _output("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "--id=0")
    return query.splitlines()[0].strip() if query else None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
