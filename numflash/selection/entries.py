"""Entries of the config cache, and tables of them as JSON text.

A table is JSON: a schema version and a list of devices, each with its list of entries. Text that
is no table raises ValueError as a whole. An entry that cannot be understood stays in its table
with the reason, and is written back, for the version of numflash that understands it.
"""

import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime, timedelta
from numbers import Real
from typing import Any

from numflash.configs import implementation_of, parse_config
from numflash.problem.classes import ProblemClass
from numflash.runtime.printable import printable

SCHEMA = 1
"""Version of the format."""
ORIGINS = ("predicted", "measured")
"""Origins of a time, the weaker first."""
CLOCK_ERROR = timedelta(hours=1)
"""Clocks of hosts may differ by so much: a date that is farther ahead is of the future."""
_MAX_INT = 2**31 - 1
_MAX_DIGITS = 400
_SIZES = ("seqlen_q", "seqlen_k", "batch_heads", "group_size")


@dataclass(frozen=True, order=True)
class DeviceKey:
    """A kind of GPU.

    Attributes:
        name: the driver's, as in "NVIDIA H200"; or an architecture's own, as in "sm_80".
        arch: the compiler's name of its architecture, as in "sm_90a".
        num_sms: how many SMs it has; 0 for an architecture by itself.

    Raises:
        ValueError: one of them cannot be that.
    """

    name: str
    arch: str
    num_sms: int

    def __post_init__(self):
        _require(isinstance(self.name, str) and self.name, "name", "a name", self.name)
        named = isinstance(self.arch, str) and re.fullmatch(r"sm_[0-9]{2,3}[af]?", self.arch)
        _require(named, "arch", "like sm_80 or sm_90a", self.arch)
        counted = type(self.num_sms) is int and 0 <= self.num_sms <= _MAX_INT
        _require(counted, "num_sms", "an integer from 0 on", self.num_sms)

    def __str__(self) -> str:
        name = printable(self.name)
        return f"{name} ({self.arch}, {self.num_sms} SMs)" if self.num_sms else name


@dataclass(frozen=True)
class Entry:
    """The best config found for a class of problems.

    Attributes:
        problem: the class.
        config, time_ms, spread: the config's string form, its time, and the interquartile range
            of its samples over their median, None if unknown.
        origin: one of ORIGINS.
        date: when it was found, ISO 8601 in UTC, as in "2026-11-21T09:14:04Z".
        kernels: hash of the sources of the family's kernels.
        compilers: version of each compiler, by name.
        default_config, default_ms: the config that runs untuned, and its time in the same run;
            None if it has none.

    Raises:
        ValueError: one of them cannot be that: sizes of a class are powers of two, and the configs
            are of its family, and on 8-bit floats where it is.
    """

    problem: ProblemClass
    config: str
    time_ms: float
    spread: float | None
    origin: str
    date: str
    kernels: str
    compilers: dict[str, str] = field(hash=False)
    default_config: str
    default_ms: float | None

    def __post_init__(self):
        known = isinstance(self.problem, ProblemClass)
        _require(known, "problem", "a ProblemClass", self.problem)
        sizes = [getattr(self.problem, name) for name in _SIZES]
        rounded = all(_is_power_of_two(n) for n in [*sizes, self.problem.window or 1])
        _require(rounded, "problem", "of sizes that are powers of two", str(self.problem))
        for name in ("config", "default_config"):
            text = getattr(self, name)
            _require(isinstance(text, str), name, "the string form of a config", text)
            is_fp8 = implementation_of(parse_config(self.problem.family, text)).fp8
            floats = f"a config {'' if self.problem.traits.fp8 else 'not '}on 8-bit floats"
            _require(is_fp8 == self.problem.traits.fp8, name, floats, text)
        for name in ("time_ms", "default_ms"):
            value = getattr(self, name)
            if name == "default_ms" and value is None:
                continue
            _require(_finite(value) and value > 0, name, "a positive number", value)
            object.__setattr__(self, name, float(value))
        if self.spread is not None:
            valid = _finite(self.spread) and self.spread >= 0
            _require(valid, "spread", "a number from 0 on, or None", self.spread)
            object.__setattr__(self, "spread", float(self.spread))
        _require(self.origin in ORIGINS, "origin", f"one of {', '.join(ORIGINS)}", self.origin)
        _require(_moment(self.date) is not None, "date", "ISO 8601 in UTC", self.date)
        _require(isinstance(self.kernels, str) and self.kernels, "kernels", "a hash", self.kernels)
        named = isinstance(self.compilers, dict) and all(
            isinstance(text, str) for pair in self.compilers.items() for text in pair
        )
        _require(named, "compilers", "versions by name", self.compilers)

    @property
    def key(self) -> tuple:
        """The key, of which a device has one entry."""
        return self.problem, self.kernels, tuple(sorted(self.compilers.items()))

    @property
    def moment(self) -> datetime:
        """The moment at which it was found."""
        return _moment(self.date)

    @property
    def is_of_the_future(self) -> bool:
        """Whether its date has not come yet, so that its clock or its author was wrong."""
        return self.moment > datetime.now(UTC) + CLOCK_ERROR

    @property
    def rank(self) -> tuple:
        """Of entries with the same key the one of the highest rank stays.

        A date that can be true comes first, then a measured time, then the shorter time, then the
        later date; the text settles the rest, so that the order of merging never matters.
        """
        text = json.dumps(self.to_dict(), sort_keys=True)
        is_measured = ORIGINS.index(self.origin)
        return not self.is_of_the_future, is_measured, -self.time_ms, self.moment, text

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "problem": str(self.problem), "compilers": dict(self.compilers)}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "Entry":
        """Read an entry of a table; unknown fields are ignored. Raises ValueError."""
        values = _fields_of(cls, found)
        problem = values["problem"]
        _require(isinstance(problem, str), "problem", "the string form of a class", problem)
        return cls(**{**values, "problem": ProblemClass.parse(problem)})


@dataclass(frozen=True)
class Row:
    """One entry of a table.

    Attributes:
        raw: as it is written.
        entry: its meaning; None if it cannot be understood.
        why: why it cannot.
    """

    raw: Any
    entry: Entry | None
    why: str = ""

    @classmethod
    def of(cls, entry: Entry) -> "Row":
        """The row of a new entry."""
        return cls(entry.to_dict(), entry)

    @classmethod
    def read(cls, raw: Any) -> "Row":
        """The row of a JSON value that was read."""
        try:
            return cls(raw, Entry.from_dict(raw))
        except ValueError as error:
            return cls(raw, None, str(error))


Table = dict[DeviceKey, list[Row]]


class ForeignSchemaError(ValueError):
    """A table of another version of the format."""

    def __init__(self, schema: int):
        super().__init__(f"it has schema {schema}, this version of numflash reads {SCHEMA}")
        self.schema = schema


def parse_table(data: bytes) -> Table:
    """The table in a file.

    Raises:
        ForeignSchemaError: it is of another schema.
        ValueError: it is no table.
    """
    try:
        content = json.loads(data, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if type(schema) is not int or not 0 <= schema <= _MAX_INT:
        raise ValueError("it is no table of configs: it has no schema")
    if schema != SCHEMA:
        raise ForeignSchemaError(schema)
    table: Table = {}
    for part in _list(content, "devices"):
        if not isinstance(part, dict):
            raise ValueError("it is no table of configs: each of its devices must be an object")
        try:
            device = DeviceKey(**_fields_of(DeviceKey, part.get("device")))
        except ValueError as error:
            raise ValueError(f"it is no table of configs: {error}") from error
        table.setdefault(device, []).extend(map(Row.read, _list(part, "entries")))
    return table


def format_table(table: Table) -> str:
    """The inverse of `parse_table`: the same text for the same rows, in whatever order.

    Fields and entries that only another version of numflash understands are kept, as far as
    they are plain JSON.
    """
    parts = [
        {"device": asdict(device), "entries": _sorted(table[device])} for device in sorted(table)
    ]
    content = {"schema": SCHEMA, "devices": parts}
    return json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"


def enter(rows: dict[tuple, Row], new: Row) -> str:
    """Put a row in its place by its entry's key, where the higher rank stays.

    Returns:
        "added"; "replaced" if another gave way to it; "unchanged" if it gave way, or equals it.
    """
    old = rows.get(new.entry.key)
    if old is not None and old.entry.rank >= new.entry.rank:
        return "unchanged"
    rows[new.entry.key] = new
    return "added" if old is None else "replaced"


def _sorted(rows: list[Row]) -> list[dict]:
    """Rows as they are written: entries by their problem, then those not understood."""
    written = []
    for row in rows:
        kept = row.raw if isinstance(row.raw, dict) and _plain(row.raw) else {}
        if content := kept if row.entry is None else kept | row.entry.to_dict():
            order = row.entry is None, str(content.get("problem"))
            written.append((order, json.dumps(content, sort_keys=True), content))
    return [content for *_, content in sorted(written, key=lambda each: each[:2])]


def _plain(value: Any, depth: int = 4) -> bool:
    """Whether this can be written as JSON: no NaN, no infinity, little nesting."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_plain(each, depth - 1) for each in inner)
    return not isinstance(value, float) or math.isfinite(value)


def _fields_of(cls: type, found: Any) -> dict[str, Any]:
    """A dataclass's fields in a JSON object. Raises ValueError if one is missing."""
    if not isinstance(found, dict):
        raise ValueError(f"{cls.__name__} must be an object with fields, got {_brief(found)}")
    names = [field.name for field in fields(cls)]
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{cls.__name__} must have {', '.join(missing)}")
    return {name: found[name] for name in names}


def _list(found: dict[str, Any], name: str) -> list:
    if not isinstance(found.get(name), list):
        raise ValueError(f"it is no table of configs: {name} must be a list")
    return found[name]


def _integer(text: str) -> int | float:
    """An integer; one with too many digits for Python to convert is infinite, and fails alone."""
    return int(text) if len(text) <= _MAX_DIGITS else math.inf


def _require(valid: Any, name: str, rule: str, value: Any) -> None:
    if not valid:
        raise ValueError(f"{name} must be {rule}, got {_brief(value)}")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_power_of_two(n: int) -> bool:
    return 0 < n <= _MAX_INT and n & (n - 1) == 0


def _finite(value: Any) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _moment(date: Any) -> datetime | None:
    """The moment of a date in UTC; None if it is no such thing."""
    try:
        moment = datetime.fromisoformat(date)
    except (TypeError, ValueError):
        return None
    return moment if moment.utcoffset() == timedelta(0) else None
