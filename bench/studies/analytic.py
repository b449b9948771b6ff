"""Tables that are counted, not measured: FLOPs, global-memory bytes and memory, with no GPU.

Next to each count stands the same of standard attention. The tiles are those of the configs that
numflash chooses for an architecture; `bench.studies.schedule` says what exactly is counted.
"""

from bench.points import points, work
from bench.points.points import Point
from bench.studies import schedule, static
from bench.tables import tables
from numflash.runtime.devices import Architecture

_GB = 1e9
# Fig. 2 (left) of the first FlashAttention paper: standard over FlashAttention.
_PAPER = {"GFLOPs": (66.6, 75.2), "HBM GB": (40.3, 4.4), "ms": (41.7, 7.3)}


def configs_of(point: Point, limits: Architecture) -> dict:
    """The configs that numflash would run, by family."""
    traits = static.traits_of(point.dtype, point.head_dim)
    families = static.FAMILIES[point.direction]
    return {family: static.choose_config(family, traits, limits) for family in families}


def traffic_table(chosen: list[Point], limits: Architecture) -> str:
    """FLOPs and bytes of each point against standard attention."""
    rows = []
    for point in chosen:
        configs = configs_of(point, limits)
        ours, standard = schedule.of_configs(point, configs), schedule.standard(point)
        rows.append(
            [
                point,
                ", ".join(map(str, configs.values())),
                f"{work.flops(point) / _GB:.1f}",
                f"{ours.flops / _GB:.1f}",
                f"{standard.flops / _GB:.1f}",
                f"{work.min_bytes(point) / _GB:.3f}",
                f"{ours.total_bytes / _GB:.3f}",
                f"{standard.total_bytes / _GB:.3f}",
                f"{standard.total_bytes / work.min_bytes(point):.1f}",
            ]
        )
    header = [
        "point",
        "config",
        "GFLOP asked",
        "executed",
        "standard",
        "GB at least",
        "asked by blocks",
        "standard",
        "standard / least",
    ]
    return tables.markdown(header, rows)


def gpt2_table(limits: Architecture) -> str:
    """The first paper's table, forward and backward together, as ratios."""
    ours, standard, least = schedule.Traffic(), schedule.Traffic(), 0
    for direction in points.DIRECTIONS:
        point = points.gpt2_medium(direction)
        ours += schedule.of_configs(point, configs_of(point, limits))
        standard += schedule.standard(point)
        least += work.min_bytes(point)
    paper = {name: f"{s} / {f} = {s / f:.2f}" for name, (s, f) in _PAPER.items()}
    rows = [
        _ratio("GFLOP", standard.flops, ours.flops, paper["GFLOPs"]),
        _ratio("GB, asked by blocks", standard.total_bytes, ours.total_bytes, paper["HBM GB"]),
        _ratio("GB, at least", standard.total_bytes, least, paper["HBM GB"]),
        ["ms", "measured only", "measured only", "measured only", f"{paper['ms']} (A100)"],
    ]
    header = ["GPT-2 medium", "standard", "numflash", "ratio", "the paper: standard / flash"]
    return tables.markdown(header, rows)


def _ratio(name: str, standard: float, ours: float, paper: str) -> list[str]:
    ratio = f"{standard / ours:.2f}"
    return [name, f"{standard / _GB:.1f}", f"{ours / _GB:.1f}", ratio, paper]


def memory_table(chosen: list[Point], measured: dict[Point, dict] | None = None) -> str:
    """Device memory of a call over seqlen, results included; with what was measured.

    Args:
        chosen: points.
        measured: point -> method name -> peak bytes.
    """
    measured = measured or {}
    names = list(dict.fromkeys(name for peaks in measured.values() for name in peaks))
    rows = []
    for point in chosen:
        ours, standard = schedule.memory_bytes(point), schedule.standard_memory_bytes(point)
        peaks = [measured.get(point, {}).get(name) for name in names]
        rows.append(
            [
                point,
                f"{ours / 2**20:.1f}",
                f"{standard / 2**20:.1f}",
                f"{standard / ours:.1f}",
                *("-" if peak is None else f"{peak / 2**20:.1f}" for peak in peaks),
            ]
        )
    header = ["point", "numflash MiB", "standard MiB", "ratio"]
    return tables.markdown([*header, *(f"{name} measured MiB" for name in names)], rows)
