"""The tuned config that serves a problem: the rules, from the nearest to the farthest.

1. An entry of this device for this very class, made with these kernels and compilers.
2. The nearest class that was tuned on this device.
3. The nearest that was tuned on another device of this architecture.
4. The nearest of the tables that numflash ships.

Only kernels for dtypes of the same size and for the same head dims are near, and of 8-bit floats
those that look up as many scales; sequences with
lengths of their own, and pages, are a way off from those without. Beyond the first rule the
splits, packing and order of blocks follow from the problem, as they do for default configs.
On Hopper only the first rule lets configs of `mma` and `wgmma` take each other's place.
NUMFLASH_TUNED=0 turns all of it off.
"""

import logging
import math
import os
from dataclasses import dataclass, replace

from numflash.configs import Config, Traits, implementation_of, parse_config
from numflash.machine_code.compiler import versions
from numflash.machine_code.sources import family_hash
from numflash.problem.classes import ProblemClass
from numflash.problem.tensor_maps import torn_pages
from numflash.runtime import switches
from numflash.runtime.devices import Architecture
from numflash.runtime.errors import UnsupportedError
from numflash.selection import store
from numflash.selection.entries import DeviceKey, Entry
from numflash.selection.rules import Choice, force, unfit

_log = logging.getLogger("numflash")
# Farther classes are no advice: sizes that differ by a factor of 2 are 1 apart.
_MAX_DISTANCE = 8
_OTHER_MASK = 2
_OTHER_WALK = 2
_MAX_FOUND = 4096


@dataclass(frozen=True)
class _Advice:
    """The config cache's advice on one class on one device.

    Attributes:
        exact: the choice of the class itself; None if there is none.
        near: (choice, whether it is proven for these traits) of other entries, nearest first.
    """

    exact: Choice | None
    near: tuple[tuple[Choice, bool], ...]


_found: dict[tuple, Choice | None] = {}
_advice: dict[tuple, _Advice] = {}
_tables: list[dict[DeviceKey, list[Entry]]] = []
_state: list = []
_warned: set[tuple] = set()


def enabled() -> bool:
    """Whether tuned configs are used. Raises ValueError if NUMFLASH_TUNED is no switch."""
    return switches.is_on("NUMFLASH_TUNED", default=True)


def find(
    wanted: ProblemClass,
    device: DeviceKey,
    limits: Architecture,
    rows: int,
    default: Config | None = None,
    bulk_copies: bool = True,
    tokens_per_scale: int | None = None,
) -> Choice | None:
    """The tuned config for a problem; None if none is near.

    Args:
        wanted: the problem's class.
        device: that it runs on.
        limits: the device's.
        rows: rows of the output per head; tiles of twice as many and more would mostly idle.
        default: the config by rule. Where it is for Hopper only such a config may take its place
            unless the class itself was tuned, and where it is not none may; None allows any.
        bulk_copies: whether configs for Hopper can run the problem.
        tokens_per_scale: keys that share a scale, which a config's tiles must divide; None where
            tiles may hold keys of several scales, or there are none.

    The config cache is read once, and again when this process has added to it.
    """
    _refresh()
    kind = None if default is None else implementation_of(default).needs_maps
    key = wanted, device, rows, kind, bulk_copies, tokens_per_scale
    try:
        return _found[key]
    except KeyError:
        if len(_found) >= _MAX_FOUND:
            _found.clear()
        return _found.setdefault(key, _find(*key, limits))


def measured(
    wanted: ProblemClass, device: DeviceKey, limits: Architecture, bulk_copies: bool = True
) -> Choice | None:
    """The choice measured on this device for this very class; None if there is none.

    Without `bulk_copies` configs for Hopper cannot run the problem, and do not count.
    """
    _refresh()
    exact = _advise(wanted, device, limits).exact
    if exact is None or exact.measured_ms is None:
        return None
    return exact if bulk_copies or not exact.implementation.needs_maps else None


def choices(family: str, traits: Traits, device: DeviceKey, limits: Architecture) -> list[Choice]:
    """Choices tuned on a device for a kernel with these traits, these kernels and compilers."""
    _refresh()
    found = {}
    for entry in _read()[0].get(device, []):
        problem = entry.problem
        if (problem.family, problem.traits) == (family, traits) and _is_current(entry):
            found[entry.config] = _usable(entry, problem, limits)
    return [choice for choice in found.values() if choice is not None]


def distance(a: ProblemClass, b: ProblemClass) -> float:
    """The distance of two classes; infinite if the one's config is no advice for the other."""
    kinds = "dtype_bytes", "tf32", "fp8", "key_scales", "head_dim", "head_dim_v"
    if a.family != b.family or any(
        getattr(a.traits, name) != getattr(b.traits, name) for name in kinds
    ):
        return math.inf
    # float16 and bfloat16 differ in one letter of the instructions.
    sizes = "seqlen_q", "seqlen_k", "batch_heads", "group_size"
    apart = sum(abs(math.log2(getattr(a, name) / getattr(b, name))) for name in sizes)
    kinds = "dtype", "vectorized"
    apart += sum(getattr(a.traits, name) != getattr(b.traits, name) for name in kinds)
    apart += len(set(a.traits.features) ^ set(b.traits.features))
    # Kernels that walk over a list of tiles, or look pages up, have other registers.
    kinds = "ragged", "paged"
    apart += _OTHER_WALK * sum(
        getattr(a.traits, name) != getattr(b.traits, name) for name in kinds
    )
    if a.page_size and b.page_size:
        apart += abs(math.log2(a.page_size / b.page_size)) / 2
    if (a.window is None) != (b.window is None) or (a.window is None and a.mask != b.mask):
        apart += _OTHER_MASK
    elif a.window is not None:
        apart += abs(math.log2(a.window / b.window)) / 2
    return apart if apart <= _MAX_DISTANCE else math.inf


def _refresh() -> None:
    """Forget earlier findings where the cache has changed since."""
    # Not config_dir(): making a path takes as long as the whole lookup may.
    state = [os.environ.get("NUMFLASH_CACHE_DIR"), store.generation()]
    if state != _state:
        for known in (_found, _advice, _tables):
            known.clear()
        _state[:] = state


def _read() -> list[dict[DeviceKey, list[Entry]]]:
    """The user's tables and the shipped ones, read once."""
    if not _tables:
        _tables[:] = store.read_all(), store.read_shipped()
    return _tables


def _find(
    wanted,
    device: DeviceKey,
    rows: int,
    kind: bool | None,
    bulk_copies: bool,
    tokens_per_scale: int | None,
    limits,
) -> Choice | None:
    """As `find`; `kind` is whether the default is for Hopper, None where that does not matter."""

    def can_run(choice: Choice) -> bool:
        is_torn = tokens_per_scale is not None and tokens_per_scale % choice.config.tile_n
        return not is_torn and (bulk_copies or not choice.implementation.needs_maps)

    advice = _advise(wanted, device, limits)
    if advice.exact is not None and can_run(advice.exact):
        return advice.exact
    for choice, proven in advice.near:
        is_hopper = choice.implementation.needs_maps
        if (kind is not None and is_hopper != kind) or not can_run(choice):
            continue
        if is_hopper and wanted.page_size and torn_pages(wanted.page_size, choice.config.box_n):
            continue
        if unfit(choice.config, choice.traits, limits, rows, proven) is None:
            return choice
    return None


def _advise(wanted: ProblemClass, device: DeviceKey, limits: Architecture) -> _Advice:
    key = wanted, device
    if key not in _advice:
        if len(_advice) >= _MAX_FOUND:
            _advice.clear()
        _advice[key] = _look_up(wanted, device, limits)
    return _advice[key]


def _look_up(wanted: ProblemClass, device: DeviceKey, limits: Architecture) -> _Advice:
    """Go through the tables, from the nearest to the farthest."""
    users, shipped = _read()
    own = users.get(device, [])
    for entry in own:
        if entry.problem == wanted and _is_current(entry):
            choice = _usable(entry, wanted, limits)
            if choice is not None:
                rule = f"tuned on this device for this class ({_facts(entry)})"
                time = entry.time_ms if entry.origin == "measured" else None
                return _Advice(replace(choice, rule=rule, is_final=True, measured_ms=time), ())
    tiers = (
        ("on this device", own),
        (f"on another {limits.arch}", _same_architecture(users, device)),
        ("in the table that numflash ships for this device", shipped.get(device, [])),
        (
            f"in the table that numflash ships for {limits.arch}",
            _same_architecture(shipped, device),
        ),
    )
    near = []
    for where, entries in tiers:
        for entry in _nearest(entries, wanted):
            choice = _usable(entry, wanted, limits, with_geometry=False)
            if choice is not None:
                rule = f"tuned {where} for {_relation(entry, wanted)} ({_facts(entry)})"
                proven = entry.problem.traits == wanted.traits and _is_current(entry)
                near.append((replace(choice, rule=rule, is_final=False), proven))
    return _Advice(None, tuple(near))


def _same_architecture(tables: dict[DeviceKey, list[Entry]], device: DeviceKey) -> list[Entry]:
    return [
        entry
        for other, entries in tables.items()
        if other.arch == device.arch and other != device
        for entry in entries
    ]


def _nearest(entries: list[Entry], wanted: ProblemClass) -> list[Entry]:
    """The entries near enough, nearest first.

    Of equally near ones current entries come before old ones, then those whose date can be true,
    then measured ones, then newer ones.
    """
    ranked = [(distance(entry.problem, wanted), entry) for entry in entries]
    near = [(apart, entry) for apart, entry in ranked if apart < math.inf]
    near.sort(key=lambda pair: pair[1].moment, reverse=True)
    near.sort(key=lambda pair: (pair[0], *_doubts(pair[1])))
    return [entry for _, entry in near]


def _doubts(entry: Entry) -> tuple[bool, bool, bool]:
    """Doubts about an entry that is as near as others, the gravest first."""
    return not _is_current(entry), entry.is_of_the_future, entry.origin == "predicted"


def _usable(
    entry: Entry, wanted: ProblemClass, limits: Architecture, with_geometry: bool = True
) -> Choice | None:
    """The choice that an entry stands for; None, and a warning, if it is not possible here."""
    try:
        config = parse_config(wanted.family, entry.config)
        config = config if with_geometry else without_geometry(config)
        return force(wanted.family, config, wanted.traits, limits)
    except (UnsupportedError, ValueError) as error:
        # Another class may need more shared memory; for its own class the entry is wrong.
        known = entry.problem, entry.config
        if entry.problem == wanted and known not in _warned:
            _warned.add(known)
            _log.warning("ignoring the tuned config for %s: %s", entry.problem, error)
        return None


def without_geometry(config: Config) -> Config:
    """The config without what belongs to one class only."""
    return config.without_geometry if implementation_of(config).has_tensor_cores else config


def _is_current(entry: Entry) -> bool:
    return entry.kernels == family_hash(entry.problem.family) and entry.compilers == versions()


def _relation(entry: Entry, wanted: ProblemClass) -> str:
    if entry.problem != wanted:
        return f"the nearest class, {entry.problem}"
    return "this class" if _is_current(entry) else "this class with other kernels or compilers"


def _facts(entry: Entry) -> str:
    return f"{entry.origin} {entry.time_ms:.4g} ms, {entry.moment.date()}"
