"""The config cache: the best configs found, in files that many processes share.

There is one file for each device in `config_dir()`; exported and shipped files have the same
format and may hold several devices. This module owns the files; `tuned` chooses among entries.

Readers take no lock, for a file only ever appears whole, by a rename. Writers read, modify and
write under one lock. A file that cannot be understood or trusted is renamed, with a warning; in a
folder that others may write, nothing is read or written.
"""

import json
import logging
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

from numflash.configs import parse_config
from numflash.runtime.cache_folder import cache_dir, folder_for, open_file
from numflash.runtime.devices import architecture
from numflash.runtime.files import locked, remove_leftovers, replace_file
from numflash.runtime.trust import UntrustedError
from numflash.selection.entries import (
    ORIGINS,
    SCHEMA,
    DeviceKey,
    Entry,
    ForeignSchemaError,
    Row,
    Table,
    enter,
    format_table,
    parse_table,
)

_log = logging.getLogger("numflash")


@dataclass
class MergeCounts:
    """Counts of merged entries, by result.

    Attributes:
        added: new in the cache.
        replaced: took the place of an entry of lower rank (`Entry.rank`).
        unchanged: gave way to the entry in the cache, or equal it.
        skipped: could not be understood.
    """

    added: int = 0
    replaced: int = 0
    unchanged: int = 0
    skipped: int = 0


_generation = 0


def generation() -> int:
    """A number that changes whenever this process has changed the cache."""
    return _generation


def config_dir() -> Path:
    """The folder of the files; it need not exist."""
    return cache_dir() / "configs"


def path_of(device: DeviceKey) -> Path:
    """The file of a device: a readable name, and a hash that tells similar ones apart."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", device.name)[:60].strip("-") or "device"
    digest = sha256(json.dumps(asdict(device), sort_keys=True).encode()).hexdigest()[:8]
    return config_dir() / f"{readable}-{device.arch}-{device.num_sms}sm-{digest}.json"


def read(device: DeviceKey) -> list[Entry]:
    """The entries of a device. Errors are logged, never raised."""
    path = path_of(device)
    return _entries(path, _load(path)).get(device, [])


def read_all() -> dict[DeviceKey, list[Entry]]:
    """The entries of every device that has some. Errors are logged, never raised."""
    paths = sorted(config_dir().glob("*.json"))
    return _together([_entries(path, _load(path)) for path in paths])


def read_file(path: str | os.PathLike) -> dict[DeviceKey, list[Entry]]:
    """The entries of a file that the user names; those not understood are logged.

    Raises:
        ValueError: it is no table of configs, or of another schema.
        OSError: it cannot be read.
    """
    return _entries(path, _parse_file(path))


@cache
def read_shipped() -> dict[DeviceKey, list[Entry]]:
    """The entries that come with the package."""
    from importlib.resources import files

    tables = []
    for file in sorted(files("numflash.selection.shipped").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".json"):
            try:
                tables.append(_entries(file, parse_table(file.read_bytes())))
            except (OSError, ValueError) as error:
                _log.warning("the shipped table %s is ignored: %s", file, error)
    return _together(tables)


def add(device: DeviceKey, entries: Iterable[Entry], instead_of: Collection[Entry] = ()) -> Path:
    """Add entries to a device's file; a file has one for each key, that of the highest rank.

    Args:
        device: whose entries.
        entries: the new ones.
        instead_of: entries that go whatever their rank, as their configs have been tried again.

    Raises:
        OSError: the file cannot be written, or its lock was held too long (TimeoutError).
    """
    path = path_of(device)
    _update(path, device, list(entries), MergeCounts(), instead_of)
    return path


def merge(paths: Iterable[str | os.PathLike]) -> MergeCounts:
    """Add the entries of files to the cache; nothing is written unless all of them can be read.

    Raises:
        ValueError: a file is no table of configs, or of another schema.
        OSError: a file cannot be read, or the cache not be written.
    """
    counts = MergeCounts()
    for path, table in [(path, _parse_file(path)) for path in paths]:
        counts.skipped += sum(row.entry is None for rows in table.values() for row in rows)
        for device, entries in _entries(path, table).items():
            _update(path_of(device), device, entries, counts)
    return counts


def export(path: str | os.PathLike, devices: Iterable[DeviceKey] | None = None) -> int:
    """Write entries of the cache to one file; returns how many.

    Args:
        path: the file, which is replaced.
        devices: whose entries; None for all.

    Raises:
        ValueError: the cache is empty, or has no entries of one of the devices.
        OSError: the file cannot be written.
    """
    cached = read_all()
    wanted = list(cached) if devices is None else list(devices)
    missing = [str(device) for device in wanted if device not in cached]
    if missing or not wanted:
        of_which = f" of {', '.join(missing)}" if missing else ""
        raise ValueError(f"the config cache {config_dir()} has no entries{of_which}")
    table = {device: [Row.of(entry) for entry in cached[device]] for device in wanted}
    replace_file(Path(path), format_table(table))
    return sum(map(len, table.values()))


def validate(path: str | os.PathLike) -> list[str]:
    """The faults of a file, in words; an empty list if it has none."""
    try:
        table = _parse_file(path)
    except (OSError, ValueError) as error:
        return [str(error)]
    wrong = []
    for device, rows in table.items():
        seen = {}
        for number, row in enumerate(rows, 1):
            why = row.why
            if row.entry is not None:
                first = seen.setdefault(row.entry.key, number)
                why = _misfit(row.entry, device)
                if row.entry.is_of_the_future:
                    why = f"date must not be in the future, got {row.entry.date!r}"
                if first < number:
                    why = f"entry {first} is of the same problem, kernels and compilers"
            if why:
                wrong.append(f"{path}: entry {number} of {device}: {why}")
    return wrong


def clear(device: DeviceKey | None = None) -> list[Path]:
    """Remove the files of a device, or of all, with those that were set aside.

    Returns:
        The files removed.

    Raises:
        OSError: one cannot be removed, or the lock was held too long (TimeoutError).
    """
    global _generation
    folder = config_dir()
    if not folder.is_dir():
        return []
    name = "*.json" if device is None else path_of(device).name
    with locked(folder):
        endings = ("", ".corrupt-*", ".schema-*", ".*.part")
        found = sorted({path for ending in endings for path in folder.glob(name + ending)})
        for path in found:
            path.unlink()
            _generation += 1
    return found


def _parse_file(path: str | os.PathLike) -> Table:
    """A file's table; a ValueError names the file."""
    try:
        return parse_table(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _entries(path: object, table: Table) -> dict[DeviceKey, list[Entry]]:
    """The entries of a table, one per key; a warning for each that is not understood."""
    found = {}
    for device, rows in table.items():
        for number, row in enumerate(rows, 1):
            if row.entry is None:
                _log.warning("%s: entry %d of %s is ignored: %s", path, number, device, row.why)
        if best := _best(rows):
            found[device] = [row.entry for row in best.values()]
    return found


def _together(tables: Iterable[dict[DeviceKey, list[Entry]]]) -> dict[DeviceKey, list[Entry]]:
    """The entries of several tables, one per device and key."""
    rows: Table = {}
    for table in tables:
        for device, entries in table.items():
            rows.setdefault(device, []).extend(map(Row.of, entries))
    return {device: [row.entry for row in _best(found).values()] for device, found in rows.items()}


def _best(rows: Iterable[Row]) -> dict[tuple, Row]:
    """The rows that are understood, one per key."""
    best: dict[tuple, Row] = {}
    for row in rows:
        if row.entry is not None:
            enter(best, row)
    return best


def _read_table(path: Path) -> Table:
    with open_file(path) as file:
        return parse_table(file.read())


def _load(path: Path) -> Table:
    """The table in a file of the cache; an empty one, with a warning, if it cannot be read."""
    try:
        return _read_table(path)
    except (FileNotFoundError, UntrustedError):
        return {}
    except OSError as error:
        _log.warning("the config cache %s cannot be read: %s", path, error)
        return {}
    except ValueError as error:
        reason = error
    try:
        with locked(path.parent):
            return _load_or_set_aside(path)
    except OSError as error:
        _log.warning("%s is ignored: %s; it cannot be set aside: %s", path, reason, error)
        return {}


def _load_or_set_aside(path: Path) -> Table:
    """The same under the lock, where a file that another process has repaired meanwhile is read.

    Raises:
        OSError: the file can be neither read nor set aside.
    """
    try:
        return _read_table(path)
    except FileNotFoundError:
        return {}
    except (ValueError, UntrustedError) as error:
        aside = _name_aside(path, error)
        path.rename(aside)
        _log.warning("%s is set aside as %s: %s", path, aside.name, error)
        return {}


def _name_aside(path: Path, error: Exception) -> Path:
    """A free name for a file that cannot be understood or trusted."""
    foreign = isinstance(error, ForeignSchemaError)
    ending, number = (f".schema-{error.schema}", 1) if foreign else (".corrupt-1", 1)
    while (aside := path.with_name(path.name + ending)).exists():
        number += 1
        ending = f".schema-{error.schema}-{number}" if foreign else f".corrupt-{number}"
    return aside


def _update(
    path: Path,
    device: DeviceKey,
    entries: list[Entry],
    counts: MergeCounts,
    instead_of: Collection[Entry] = (),
) -> None:
    """Read, modify and write a file of the cache under its lock, and count what changed."""
    global _generation
    if not entries:
        return
    with locked(folder_for("configs")):
        remove_leftovers(path.parent)
        table = _load_or_set_aside(path)
        rows = [row for row in table.get(device, []) if row.entry not in instead_of]
        best = _best(rows)
        outcomes = [enter(best, Row.of(entry)) for entry in entries]
        if set(outcomes) != {"unchanged"}:
            strange = [row for row in rows if row.entry is None]
            replace_file(path, format_table({**table, device: [*best.values(), *strange]}))
            _generation += 1
    for outcome in outcomes:
        setattr(counts, outcome, getattr(counts, outcome) + 1)


def _misfit(entry: Entry, device: DeviceKey) -> str:
    """Why a device cannot run an entry's configs, as far as shared memory goes; else empty."""
    try:
        most = architecture(device.arch).max_smem_per_block
    except ValueError as error:
        return str(error)
    for text in (entry.config, entry.default_config):
        needed = parse_config(entry.problem.family, text).smem_bytes(entry.problem.traits)
        if needed > most:
            return f"{text} needs {needed} bytes of shared memory, {device.arch} has {most}"
    return ""


__all__ = [
    "ORIGINS",
    "SCHEMA",
    "DeviceKey",
    "Entry",
    "MergeCounts",
    "add",
    "clear",
    "config_dir",
    "export",
    "generation",
    "merge",
    "path_of",
    "read",
    "read_all",
    "read_file",
    "read_shipped",
    "validate",
]
