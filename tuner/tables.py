"""The tables that numflash ships: one file for each GPU, of configs that differ from the default.

A file has the format of the config cache. Beside its devices it names the versions that it was
made with (`made`: kernels, compilers, model), so that one without entries can be out of date, too,
and the classes in which the default stays.
"""

import json
import re
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numflash.selection.shipped
from numflash.machine_code.compiler import versions
from numflash.machine_code.sources import family_hash
from numflash.runtime.files import replace_file
from numflash.selection.entries import DeviceKey, Entry, Row, format_table, parse_table

from . import model

GPUS = (
    "Tesla T4",
    "NVIDIA A100-SXM4-80GB",
    "NVIDIA A10",
    "NVIDIA GeForce RTX 3090",
    "NVIDIA L4",
    "NVIDIA L40S",
    "NVIDIA GeForce RTX 4090",
    "NVIDIA H100 80GB HBM3",
    "NVIDIA H200",
    "NVIDIA B200",
    "NVIDIA GeForce RTX 5090",
)
FAMILIES = ("forward", "combine", "backward-dkdv", "backward-dq")
"""Families of kernels that a table has configs of."""
_BRIEF = 12


def folder() -> Path:
    """The folder of the tables."""
    return Path(numflash.selection.shipped.__file__).parent


def path_of(name: str) -> Path:
    """The file of a GPU."""
    return folder() / (re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") + ".json")


def paths() -> list[Path]:
    """The files there are."""
    return sorted(folder().glob("*.json"))


def made_now() -> dict[str, Any]:
    """The versions that a table made now is made with."""
    kernels = sha256("".join(map(family_hash, FAMILIES)).encode()).hexdigest()
    return {"kernels": kernels, "compilers": versions(), "model": model.source_hash()}


def write(
    path: Path,
    entries: dict[DeviceKey, list[Entry]],
    made: dict[str, Any],
    default_stays: Iterable[str] = (),
) -> None:
    """Write a table; a device may have no entries.

    Args:
        path: of the file.
        entries: by device.
        made: the versions that it is made with.
        default_stays: the classes that were tried too, and in which nothing displaced the default.

    Raises:
        OSError: it cannot be written.
    """
    text = format_table({device: list(map(Row.of, each)) for device, each in entries.items()})
    content = {**json.loads(text), "made": made, "default_stays": sorted(default_stays)}
    replace_file(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def made(path: Path) -> dict[str, Any]:
    """The versions that a table was made with; a table without them is as old as its first entry.

    Raises:
        ValueError: it is no table.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    rows = [row for each in parse_table(data).values() for row in each if row.entry is not None]
    if found := json.loads(data).get("made"):
        return dict(found)
    if not rows:
        return {}
    first = rows[0].entry
    # A measured entry needed no model.
    known = {"model": model.source_hash()} if first.origin == "measured" else {}
    return {"kernels": first.kernels, "compilers": first.compilers, **known}


def default_stays(path: Path) -> list[str]:
    """The classes of a table in which nothing displaced the default. Raises as `made`."""
    parse_table(data := path.read_bytes())
    return list(json.loads(data).get("default_stays", []))


def staleness(path: Path) -> list[str]:
    """Reasons why a table does not hold for the installed kernels; empty if it is fresh.

    Raises:
        ValueError, OSError: as `made`.
    """
    then, now = made(path), made_now()
    found = [
        f"{what} {(then.get(what) or 'unknown')[:_BRIEF]}, now {now[what][:_BRIEF]}"
        for what in ("kernels", "model")
        if then.get(what) != now[what]
    ]
    old, new = then.get("compilers", {}), now["compilers"]
    found += [
        f"{name} {old.get(name)}, now {new.get(name)}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    return found


def warning(path: Path) -> str | None:
    """One line on a table that is stale; None if it is fresh. Raises as `made`."""
    reasons = staleness(path)
    return f"{path.name} is stale, made with {'; '.join(reasons)}" if reasons else None
