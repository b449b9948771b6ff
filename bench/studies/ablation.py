"""One idea turned off at a time: what each idea of FlashAttention is worth.

Each row compares a baseline with the same thing less one idea. What is part of the kernels' code
(staging, swizzle, split; on Hopper overlap, ping-pong, persistent blocks and an arrival of each
warp) is turned off in their config, Hopper's instructions by running FlashAttention-2's kernel.
What makes up the algorithm (fusion, tiling, the one pass, recomputation) is compared among CuPy
implementations (`bench.peers.standard`) that differ in that idea alone, or with numflash itself
where that is the whole difference.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from bench.peers import methods as peers
from bench.points.points import Point, decode
from bench.records.entries import is_right
from bench.studies import schedule, static
from bench.tables import tables
from numflash.configs import implementation_of, wgmma
from numflash.runtime.devices import ARCHITECTURES, Architecture

STATIC_COLUMNS = ("idea", "variant", *static.COLUMNS[1:])
# float16, because CuPy's bfloat16 is minimal.
_DTYPE = "float16"
# A tile for one query has as few rows as tensor cores multiply.
_DECODE_ROWS = 16
_STATIC_ARCHS = ("sm_80", "sm_90a")
_TILES_M, _TILES_N, _WARPS = (32, 64, 128, 192), (16, 32, 64, 96, 128), (4, 8)
_SM90_WARPS = (4, 8, 12)
_SWITCHES = {
    "overlap": "softmax after products, not beside them",
    "pingpong": "warpgroups take no turns",
    "persistent": "a block for each tile of rows",
    "arrivals": "one thread gives a buffer back for its warpgroup",
}
# The value of a switch that is a number.
_OTHERS = {"arrivals": 1, "l2_bytes": 128}


@dataclass(frozen=True)
class Idea:
    """An idea, and what is compared to see what it is worth.

    Attributes:
        name: of the idea.
        point: what is timed.
        with_it, without: names of peers; None where the config has nothing to turn off.
        how: what is done instead, in words.
    """

    name: str
    point: Point
    with_it: str
    without: str | None
    how: str


def ideas(direction: str, limits: Architecture) -> list[Idea]:
    """The rows of the table for a direction on an architecture."""
    found = []
    for head_dim in (64, 128):
        point = Point(
            direction, "ablation", _DTYPE, 4, 4096, 4096, *[2048 // head_dim] * 2, head_dim,
            False,
        )  # fmt: skip
        found += _algorithm(point) + _machine(point, limits)
    if direction == "forward":
        found += [_split(point, limits) for point in decode()]
    return found


def _algorithm(point: Point) -> list[Idea]:
    if point.direction == "backward":
        again, stored = "cupy:whole_matrix_recomputed", "cupy:whole_matrix"
        gigabytes = schedule.standard_memory_bytes(replace(point, direction="forward")) / 1e9
        kept = f"P stored by the forward: about {gigabytes:.1f} GB kept until the backward"
        return [
            Idea("fusion", point, peers.OURS, again, "a kernel for each step, P and dP in memory"),
            Idea("recomputation", point, again, stored, kept),
        ]
    return [
        Idea("fusion", point, peers.OURS, "cupy:whole_matrix", "the score matrix in memory"),
        Idea("tiling", point, "cupy:one_pass", "cupy:whole_rows", "whole rows of scores"),
        Idea(
            "online softmax in one pass",
            point,
            "cupy:one_pass",
            "cupy:two_passes",
            "maximum and sum first, the output in a second pass",
        ),
    ]


def _machine(point: Point, limits: Architecture) -> list[Idea]:
    traits = static.traits_of(point.dtype, point.head_dim)
    configs = {
        family: static.choose_config(family, traits, limits)
        for family in static.FAMILIES[point.direction]
    }
    found = [_hopper(point, configs["forward"], limits)] if has_switches(configs) else []
    changes = {
        "staging": other_stages,
        "swizzle": without_swizzle,
        **{name: _switched(name) for name in _SWITCHES if has_switches(configs)},
    }
    for name, change in changes.items():
        variants = {family: change(config) for family, config in configs.items()}
        texts = ", ".join(f"{f}: {c}" for f, c in configs.items())
        if None in variants.values():
            found.append(Idea(name, point, peers.OURS, None, f"nothing to turn off in {texts}"))
            continue
        baseline, variant = variants_named(configs), variants_named(variants)
        how = f"{variant.partition(':')[2]} instead of {texts}"
        if name in _SWITCHES:
            how = f"{_SWITCHES[name]}: {how}"
        if _is_off(name, configs, variants):
            # The idea is off already, and is turned on to compare.
            baseline, variant = variant, baseline
            how = f"off by default ({texts}); compared with {baseline.partition(':')[2]}"
        found.append(Idea(name, point, baseline, variant, how))
    return found


def _hopper(point: Point, config: wgmma.Sm90ForwardConfig, limits: Architecture) -> Idea:
    other = static.choose_config(
        "forward",
        static.traits_of(point.dtype, point.head_dim),
        limits,
        no_bulk_copies="turned off",
    )
    how = f"FlashAttention-2's kernel, mma.sync and cp.async: {other} instead of {config}"
    without = variants_named({"forward": other})
    return Idea("wgmma and bulk copies", point, peers.OURS, without, how)


def has_switches(configs: dict) -> bool:
    """Whether these configs, by family, are of the Hopper forward."""
    return "forward" in configs and implementation_of(configs["forward"]).needs_maps


def switched(config: wgmma.Sm90ForwardConfig, name: str) -> wgmma.Sm90ForwardConfig | None:
    """The config with one of its switches the other way; None if it cannot."""
    other = _OTHERS.get(name, not getattr(config, name))
    try:
        return replace(config, **{name: other})
    except ValueError:
        return None


def _switched(name: str):
    return lambda config: switched(config, name)


def _is_off(name: str, configs: dict, variants: dict) -> bool:
    if name in _SWITCHES:
        return not getattr(configs["forward"], name)
    return name == "staging" and _stages(configs) < _stages(variants)


def _split(point: Point, limits: Architecture) -> Idea:
    traits = static.traits_of(point.dtype, point.head_dim)
    config = static.choose_config("forward", traits, limits, rows=_DECODE_ROWS)
    if not hasattr(config, "num_splits"):
        return Idea("split", point, peers.OURS, None, f"{config} cannot be split")
    name = f"{peers.OURS}:{replace(config, num_splits=1)}"
    return Idea("split", point, peers.OURS, name, f"one block for each head: {config}")


def _stages(configs: dict) -> int:
    return max(config.num_stages for config in configs.values())


def variants_named(configs: dict) -> str:
    """The peer that runs numflash with these configs, by family."""
    if list(configs) == ["forward"]:
        return f"{peers.OURS}:{configs['forward']}"
    return f"{peers.OURS}:" + ",".join(f"{family}={config}" for family, config in configs.items())


def other_stages(config: Any) -> Any:
    """The config with one stage if it has more, else with two; None without stages."""
    if not hasattr(config, "num_stages"):
        return None
    return replace(config, num_stages=1 if config.num_stages > 1 else 2)


def without_swizzle(config: Any) -> Any:
    """The config with tiles that are not swizzled; None if it has none."""
    if not getattr(config, "swizzled", False):
        return None
    try:
        return replace(config, swizzled=False)
    except ValueError:
        return None  # tiles of this class of configs always are


def table(ideas: list[Idea], found: dict[Point, dict]) -> str:
    """The gain of each idea.

    Args:
        ideas: the rows.
        found: point -> method name -> entry, as `bench.measuring.measure` gives it.
    """
    rows = []
    for idea in ideas:
        entries = found.get(idea.point, {})
        times = [_time(entries, name) for name in (idea.with_it, idea.without)]
        ratio = "-"
        if all(isinstance(t, float) for t in times):
            ratio = f"{times[1] / times[0]:.2f}"
        peaks = [_peak(entries, name) for name in (idea.with_it, idea.without)]
        texts = [f"{t:.3f}" if isinstance(t, float) else t for t in times]
        rows.append([idea.name, idea.point, idea.with_it, *texts, ratio, *peaks, idea.how])
    header = [
        "idea",
        "point",
        "with it: method",
        "with it ms",
        "without ms",
        "times as long",
        "with it MiB",
        "without MiB",
        "how it is turned off",
    ]
    return tables.markdown(header, rows)


def _time(entries: dict, name: str | None) -> float | str:
    """Milliseconds, or the word for there being none."""
    if name is None:
        return "not applicable"
    entry = entries.get(name)
    if entry is None:
        return "not measured"
    if is_right(entry):
        return entry["median_ms"]
    return "wrong" if "median_ms" in entry else entry["status"]


def _peak(entries: dict, name: str | None) -> str:
    peak = entries.get(name, {}).get("peak_bytes")
    return "-" if peak is None else f"{peak / 2**20:.1f}"


def block_size_peers(point: Point, limits: Architecture) -> list[str]:
    """The peers that run numflash with other tile sizes, one family at a time."""
    traits = static.traits_of(point.dtype, point.head_dim)
    families = static.FAMILIES[point.direction]
    defaults = {family: static.choose_config(family, traits, limits) for family in families}
    names = [
        variants_named({**defaults, family: config})
        for family in families
        for config in block_sizes(family, point.head_dim, point.dtype, limits)
    ]
    return list(dict.fromkeys(names))


def block_sizes(family: str, head_dim: int, dtype: str, limits: Architecture) -> list[Any]:
    """Configs of a family that differ in tile sizes and warps, and fit the architecture."""
    traits = static.traits_of(dtype, head_dim)
    default = static.choose_config(family, traits, limits)
    found, on_hopper = [default], implementation_of(default).needs_maps
    for tile_m in _TILES_M:
        for tile_n in _TILES_N:
            for num_warps in _SM90_WARPS if on_hopper else _WARPS:
                try:
                    config = replace(default, tile_m=tile_m, tile_n=tile_n, num_warps=num_warps)
                except ValueError:
                    continue  # this class of configs has no such tile
                is_forward = on_hopper and family == "forward"
                if is_forward and wgmma.misfit(config, traits, limits, config.block_rows):
                    continue
                if (
                    config.smem_bytes(traits) <= limits.max_smem_per_block
                    and config.accumulators_per_thread(traits) <= 224
                    and config not in found
                ):
                    found.append(config)
    return found


def static_rows(direction: str) -> Iterator[dict]:
    """Machine code of the variants that differ in their config."""
    for arch in _STATIC_ARCHS:
        limits = ARCHITECTURES[arch]
        for head_dim in (64, 128):
            traits = static.traits_of(_DTYPE, head_dim)
            for family in static.FAMILIES[direction]:
                config = static.choose_config(family, traits, limits)
                variants = {
                    ("all ideas", ""): config,
                    ("staging", "other number of stages"): other_stages(config),
                    ("swizzle", "off"): without_swizzle(config),
                }
                if has_switches({family: config}):
                    for name in _SWITCHES:
                        way = "off" if getattr(config, name) else "on"
                        variants[name, way] = switched(config, name)
                for (idea, variant), changed in variants.items():
                    found = {"idea": idea, "variant": f"{family} {variant}".strip()}
                    if changed is None:
                        text = f"{config} has nothing to turn off"
                        yield {**found, "arch": arch, "config": "-", "reason": text}
                    else:
                        yield {**found, **static.row(family, traits, limits, changed)}


def bank_conflicts(head_dim: int, swizzled: bool) -> int | None:
    """The most rows that `ldmatrix` reads at once from one bank; 1 is free of conflicts.

    From the kernels' own layout function; None if this version has none.
    """
    try:
        from numflash.tiles.mma.layouts import TileLayout, make_word
    except ImportError:
        return None
    word = make_word(TileLayout(head_dim * 2 // 16, swizzled))
    word = getattr(word, "py_func", word)
    degrees = []
    for first in range(0, 64, 8):
        for chunk in range(head_dim * 2 // 16):
            # A row of 8 elements is four banks of 32.
            lines = [word(row, chunk) // 4 % 8 for row in range(first, first + 8)]
            degrees.append(max(map(lines.count, lines)))
    return max(degrees)
