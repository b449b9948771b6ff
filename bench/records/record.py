"""Hardware records: JSON files in `bench/results/`, named after device and date.

A record says which commit and kernel sources ran on which device with which software. Its `kind`
is "verify" (which checks passed; a check counts as verified on a device while a record of it has
passed with the kernel sources of today) or "forward", "backward" and their variants, "decode",
"varlen" (what was measured; see `bench.measuring.measure`), "distributed" (the same over ranks;
`bench.distributed.measuring`), or "first-light", which has both.
Records without a kind, of schema 1, are of `verify`. One that says "rehearsal" is of no hardware:
it is never read, and never written to where records are.
"""

import json
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from numflash.machine_code import compiler, sources
from numflash.runtime.files import replace_file

SCHEMA_VERSION = 2
RESULTS = Path(__file__).parents[1] / "results"
_PACKAGES = (
    "numpy",
    "numba",
    "numba-cuda",
    "cuda-bindings",
    "cupy-cuda13x",
    "cupy-cuda12x",
    "torch",
    "triton",
    "nvidia-cudnn-cu13",
    "nvidia-cudnn-cu12",
    "flash-attn",
    "flash-attn-3",
    "fa3-fwd",
    "flashinfer-python",
)


def describe_machine(device: int = 0) -> dict:
    """Commit, device, driver and versions of this machine."""
    versions = {"python": platform.python_version(), **compiler.versions()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "verify",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _output("git", "rev-parse", "HEAD"),
        "has_uncommitted_changes": None if changes is None else bool(changes),
        "source_hash": sources.source_hash(),
        "device": _gpu("name", device),
        "compute_capability": _gpu("compute_cap", device),
        "max_sm_clock_mhz": _number(_gpu("clocks.max.sm", device)),
        "power_limit": _gpu("power.limit", device),
        "driver": _gpu("driver_version", device),
        "versions": versions,
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
    }


def clocks(device: int = 0) -> dict[str, str | None]:
    """Clocks, power and temperature of a GPU, as nvidia-smi prints them."""
    names = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    return {name: _gpu(name, device) for name in names}


def read_all(folder: Path = RESULTS) -> list[dict]:
    """The records of a folder that can be read, oldest first, each with its file's "name"."""
    records = []
    for path in folder.glob("*.json"):
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and not record.get("rehearsal"):
            records.append({"kind": "verify", **record, "name": path.name})
    return sorted(records, key=lambda record: (record.get("date", ""), _order(record["name"])))


def verified_checks(device: str | None, source_hash: str, folder: Path = RESULTS) -> set[str]:
    """Ids of the checks that have passed on this device with these kernel sources."""
    verified = set()
    for record in read_all(folder):
        if record.get("device") == device and record.get("source_hash") == source_hash:
            checks = record.get("checks", {})
            verified |= {name for name, check in checks.items() if check["outcome"] == "passed"}
    return verified


def reserve(record: dict, folder: Path) -> Path:
    """A path for a record: device and date, and a number if there is one already.

    Raises:
        ValueError: it is of a rehearsal, and this is the folder of records, or within it.
    """
    if record.get("rehearsal") and folder.resolve().is_relative_to(RESULTS.resolve()):
        raise ValueError(f"a rehearsal measures nothing, and is not written to {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", (record["device"] or "no-gpu").lower()).strip("-")
    kind = "" if record.get("kind", "verify") == "verify" else f"-{record['kind']}"
    stem = f"{device}-{record['date']}{kind}"
    names = [f"{stem}.json", *(f"{stem}-{n}.json" for n in range(2, 1000))]
    return next(folder / name for name in names if not (folder / name).exists())


def save(record: dict, path: Path) -> None:
    """Write a record, at once or not at all."""
    replace_file(path, json.dumps(record, indent=1, sort_keys=True) + "\n")


def write(record: dict, folder: Path) -> Path:
    """Write a record under a new name; its path."""
    path = reserve(record, folder)
    save(record, path)
    return path


def _order(name: str) -> tuple[int, str]:
    """Records of one day and kind in the order of their numbers."""
    number = re.search(r"\d{4}-\d\d-\d\d(?:-[a-z-]*?)?(?:-(\d+))?\.json$", name)
    return int(number[1] or 1) if number else 1, name


def _gpu(field: str, device: int = 0) -> str | None:
    query = _output(
        "nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", f"--id={device}"
    )
    return query.splitlines()[0].strip() if query else None


def _number(text: str | None) -> float | None:
    """The number that "1980 MHz" begins with."""
    match = re.match(r"[\d.]+", text or "")
    return float(match[0]) if match else None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=False, cwd=RESULTS.parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
