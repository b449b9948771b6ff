"""Lesson 6: bytes and memory, the published table, and which block sizes are possible."""

from dataclasses import dataclass

from numflash.configs import Config, Traits, parse_config
from numflash.problem.classes import ProblemClass

from ...drawing.axes import BOTTOM, LEFT, RIGHT, TOP, Axis, chart, cross, frame
from ...drawing.figures import Figure, Table, key, swatch
from ...drawing.markup import Markup, joined, tag
from ...drawing.shapes import Bar, bars
from ...model.grid import io_bytes, lay
from . import block_sizes
from .lesson import Check, Lesson, Slip, Step

_BATCH, _SEQLEN, _HEADS, _D, _BYTES = 64, 1024, 16, 64, 2
_CONFIGS = {
    "forward": "sm80-m128n64w4s1",
    "backward-dkdv": "sm80-m32n128w4s2",
    "backward-dq": "sm80-m128n64w4s2",
}
# FlashAttention, arXiv 2205.14135 v2, Figure 2 (left): standard and FlashAttention.
_PAPER = {"GFLOP": (66.6, 75.2), "GB": (40.3, 4.4), "ms": (41.7, 7.3)}
# The memory of FlashAttention in common notes: seqlen and MB.
_NOTED = {512: 200, 2048: 1600, 16384: 25600}
_PRODUCTS = {"forward": 2, "backward-dq": 3, "backward-dkdv": 4}
_STANDARD_PRODUCTS = 6
# Standard attention writes S, reads S, writes P, reads P; and backward reads P, writes dP, reads
# P and dP, writes dS, reads dS twice. It reads and writes 14 arrays of the size of Q besides.
_STANDARD_PASSES, _STANDARD_ARRAYS = 11, 14


@dataclass(frozen=True)
class Work:
    """FLOP, and bytes that are asked of global memory, of a forward and a backward."""

    flop: int
    asked: int


def lesson() -> Lesson:
    """IO, the published table, block sizes."""
    configs = {family: parse_config(family, name) for family, name in _CONFIGS.items()}
    works = {family: _work(family, config) for family, config in configs.items()}
    ours = Work(
        sum(work.flop for work in works.values()),
        sum(work.asked for work in works.values()) + io_bytes(_problem("delta")),
    )
    standard, least = _standard(), io_bytes(_problem("forward")) + io_bytes(_problem("backward"))
    largest = block_sizes.sizes()[-1]
    return Lesson(
        6,
        "Bytes, not FLOP",
        "FlashAttention computes more than standard attention and is faster. What does it save, "
        "and which block sizes can do it?",
        (
            _work_step(configs, ours, standard, least),
            _memory_step(),
            block_sizes.step(),
        ),
        (
            Slip(
                f"The forward and backward of table 8.1 take {_PAPER['GFLOP'][0]} GFLOP.",
                f"For the shape that the paper names, {_SEQLEN} tokens, {_HEADS} heads of {_D} "
                f"and {_BATCH} sequences, six products take {standard.flop / 1e9:.0f} GFLOP, "
                f"{standard.flop / 1e9 / _PAPER['GFLOP'][0]:.1f} times as many. Quote its ratios.",
            ),
            Slip(
                "A block fits if the elements of its tiles are fewer than the bytes of shared "
                "memory.",
                "An element has 2 or 4 bytes, K and V have stages, and registers have a limit of "
                f"their own. `{largest.config}` shows all three.",
            ),
            Slip(
                "Memory is linear: 200 MB at 512 tokens, 1.6 GB at 2048, 25.6 GB at 16384.",
                "From 512 to 2048 that is 8 times for 4 times the tokens, to 16384 it is "
                f"{_NOTED[16384] // _NOTED[512]} times for 32: neither linear nor quadratic. "
                "Linear means 4 and 32.",
            ),
        ),
        (
            Check.close("Standard attention's GFLOP", standard.flop / 1e9, 825, 0.5),
            Check.close("Ours: nine products for six", ours.flop / standard.flop, 1.5, 0.01),
            Check.close("Standard attention's GB", standard.asked / 1e9, 25.5, 0.1),
            Check(
                "Ours ask for less than half of it",
                least < ours.asked < 0.5 * standard.asked,
                f"{ours.asked / 1e9:.1f} of {standard.asked / 1e9:.1f} GB",
            ),
            Check.equal("Our memory is linear", _ours(16384) / _ours(512), 32.0),
            Check.equal("Noted memory is not", _NOTED[16384] / _NOTED[512], 128.0),
            block_sizes.check(),
        ),
        (_work_figure(ours, standard, least), _memory_figure()),
    )


def _problem(family: str) -> ProblemClass:
    traits = Traits("float16", _D, _D, vectorized=True)
    return ProblemClass(family, traits, "full", _SEQLEN, _SEQLEN, _BATCH * _HEADS, 1)


def _work(family: str, config: Config) -> Work:
    """A kernel's FLOP and bytes: rows are read and written once, columns once for each tile."""
    grid = lay(_problem(family), config)
    tiles, row = grid.walks.total * grid.heads, _D * _BYTES
    rows = _BATCH * _HEADS * _SEQLEN
    # Q, O and lse; Q, dO, dQ, lse and delta; K, V, dK and dV.
    of_row = {"forward": 2 * row + 4, "backward-dq": 3 * row + 8, "backward-dkdv": 4 * row}
    # K and V; or Q, dO, lse and delta.
    of_column = 2 * row + (8 if family == "backward-dkdv" else 0)
    flop = _PRODUCTS[family] * 2 * tiles * config.row_tile * config.column_tile * _D
    return Work(flop, rows * of_row[family] + tiles * config.column_tile * of_column)


def _standard() -> Work:
    """Standard attention in its fewest steps, forward and backward."""
    scores = _BATCH * _HEADS * _SEQLEN**2
    array = _BATCH * _HEADS * _SEQLEN * _D * _BYTES
    return Work(
        _STANDARD_PRODUCTS * 2 * scores * _D,
        _STANDARD_PASSES * scores * _BYTES + _STANDARD_ARRAYS * array,
    )


def _work_step(configs: dict, ours: Work, standard: Work, least: int) -> Step:
    paper = {name: f"{a:g} → {b:g}" for name, (a, b) in _PAPER.items()}
    tile = configs["forward"].tile_m
    return Step(
        "Table 8.1, counted again",
        f"The score matrix of {_BATCH} x {_SEQLEN} x {_HEADS} x {_D} has "
        f"{_BATCH * _HEADS * _SEQLEN**2 * _BYTES / 1e9:.2f} GB, and standard attention passes "
        f"over it {_STANDARD_PASSES} times. Our kernels never pass over it: a block of {tile} "
        f"queries reads K and V once, so they are read {_SEQLEN // tile} times in all. More "
        "queries in a block, fewer bytes; that is the N² d² / M of the FlashAttention paper "
        "(arXiv 2205.14135), whose Figure 2 the table repeats. Blocks find most of these bytes "
        "in the L2 cache; device memory cannot see fewer than the least.",
        "counted",
        Table(
            ("", "standard", "numflash", "ratio", "the paper: standard → flash"),
            [
                (
                    "GFLOP",
                    f"{standard.flop / 1e9:.0f}",
                    f"{ours.flop / 1e9:.0f}",
                    f"{standard.flop / ours.flop:.2f}",
                    paper["GFLOP"],
                ),
                (
                    "GB asked of global memory",
                    f"{standard.asked / 1e9:.1f}",
                    f"{ours.asked / 1e9:.1f}",
                    f"{standard.asked / ours.asked:.2f}",
                    paper["GB"],
                ),
                (
                    "GB at least",
                    f"{standard.asked / 1e9:.1f}",
                    f"{least / 1e9:.1f}",
                    f"{standard.asked / least:.2f}",
                    paper["GB"],
                ),
                ("ms", "not measured", "not measured", "", f"{paper['ms']} (A100)"),
            ],
            (1, 2, 3, 4),
            "Forward and backward, by " + ", ".join(map(str, configs.values())),
        ),
    )


def _ours(seqlen: int) -> int:
    """Bytes that a forward allocates for a head: O and lse."""
    return seqlen * (_D * _BYTES + 4)


def _memory_step() -> Step:
    found = [
        (
            f"{seqlen:,}",
            f"{_ours(seqlen) / _ours(512):g}",
            f"{(seqlen / 512) ** 2:g}",
            f"{_NOTED[seqlen] / _NOTED[512]:g}",
        )
        for seqlen in _NOTED
    ]
    return Step(
        "Memory: what linear means",
        f"A head's forward allocates O and lse, {_D * _BYTES} + 4 bytes a token. Standard "
        f"attention allocates P, {_BYTES} bytes a score. Compare how both grow.",
        "counted",
        Table(
            ("tokens", "numflash", "P", "noted"),
            found,
            range(4),
            "Memory relative to 512 tokens",
        ),
    )


def _work_figure(ours: Work, standard: Work, least: int) -> Figure:
    scale = standard.asked / ours.flop  # the longest bar of either kind is as long
    found = [
        Bar("standard", standard.asked, f"{standard.asked / 1e9:.1f} GB", "exp"),
        Bar("numflash asks", ours.asked, f"{ours.asked / 1e9:.1f} GB", "s"),
        Bar("the least", least, f"{least / 1e9:.1f} GB", "copy"),
        Bar("standard", standard.flop * scale, f"{standard.flop / 1e9:.0f} GFLOP", "max"),
        Bar("numflash", ours.flop * scale, f"{ours.flop / 1e9:.0f} GFLOP", "max"),
    ]
    more, fewer = ours.flop / standard.flop, standard.asked / ours.asked
    return Figure(
        "More FLOP, fewer bytes",
        joined(
            [
                swatch("exp", "passes over the matrix"),
                swatch("s", "blocks"),
                swatch("copy", "inputs and results once"),
                swatch("max", "FLOP, on a scale of their own."),
            ]
        ),
        bars(f"{more:.1f} times the FLOP, {fewer:.1f} times fewer bytes.", found),
        Table(("", "value"), [(b.name, b.shown) for b in found], (1,)),
    )


def _memory_figure() -> Figure:
    seqlens = (512, 2048, 16384)
    p = {n: n * n * _BYTES / 2**20 for n in seqlens}
    ours = {n: _ours(n) / 2**20 for n in seqlens}
    x = Axis(400, 20000, LEFT, RIGHT, log=True)
    y = Axis(ours[512] / 2, p[16384] * 2, BOTTOM, TOP, log=True)
    noted = {n: ours[512] * mb / _NOTED[512] for n, mb in _NOTED.items()}
    return Figure(
        "Memory of one head over tokens",
        joined(
            [
                key("━", "k-accent", "numflash, slope 1"),
                key("┄", "k-second", "P, slope 2"),
                key("x", "failed", "as noted, from the same start."),
            ]
        ),
        chart(
            "Our memory grows in proportion to tokens, P with their square; the noted memory with "
            "neither.",
            frame(x, y, "tokens", "MiB", seqlens),
            _path([(x(n), y(value)) for n, value in ours.items()], "step", "numflash"),
            _path([(x(n), y(value)) for n, value in p.items()], "budget", "P"),
            *(
                cross(x(n), y(value), "cross", f"{n:,} tokens: noted as {_NOTED[n]:,} MB")
                for n, value in noted.items()
            ),
        ),
        Table(
            ("tokens", "numflash MiB", "P MiB", "noted, scaled MiB"),
            [(f"{n:,}", f"{ours[n]:.3f}", f"{p[n]:.1f}", f"{noted[n]:.2f}") for n in seqlens],
            range(4),
        ),
    )


def _path(points: list[tuple[float, float]], class_: str, title: str) -> Markup:
    d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return tag("path", tag("title", title), d=d, class_=class_)
