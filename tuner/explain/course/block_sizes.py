"""Which block sizes are possible: a part of lesson 6."""

from typing import NamedTuple

from numflash.configs import Traits, parse_config
from numflash.runtime.devices import Architecture, architecture

from ...drawing.figures import Table
from .lesson import Check, Step

_CONFIGS = "sm80-m64n64w4s1", "sm80-m128n64w4s1", "sm80-m128n64w4s2", "sm80-m128n128w4s2"
_GPUS = {"RTX 4090": "sm_89", "A100": "sm_80", "H200": "sm_90a"}
_MOST_REGISTERS = 255
_TRAITS = Traits("float16", 128, 128, vectorized=True)


class Size(NamedTuple):
    """A config, the elements and bytes of its tiles, and the accumulators of a thread."""

    config: str
    elements: int
    n_bytes: int
    accumulators: int


def sizes() -> list[Size]:
    """Forwards on tensor cores, from the smallest on."""
    found = []
    for name in _CONFIGS:
        config = parse_config("forward", name)
        n_bytes = config.smem_bytes(_TRAITS)
        elements = n_bytes // _TRAITS.dtype_bytes
        found.append(Size(name, elements, n_bytes, config.accumulators_per_thread(_TRAITS)))
    return found


def step() -> Step:
    """The check of a block size, done rightly."""
    found = [
        (
            size.config,
            f"{size.elements:,}",
            f"{size.n_bytes:,}",
            *(_fits(size.n_bytes, architecture(arch)) for arch in _GPUS.values()),
            f"{size.accumulators}"
            + (f" > {_MOST_REGISTERS}" if size.accumulators > _MOST_REGISTERS else ""),
        )
        for size in sizes()
    ]
    last = sizes()[-1]
    return Step(
        "Which block sizes are possible",
        "Three questions, in this order. Do the tiles fit: bytes of Q, and of K and V times their "
        "stages, against what a block may ask for? Do the accumulators of S and O fit in a "
        f"thread's {_MOST_REGISTERS} registers? Are there enough blocks for all SMs? "
        f"`{last.config}` fits on an H200 by bytes, but its {last.accumulators} accumulators are "
        "more than a thread has.",
        "counted",
        Table(
            ("config", "elements", "bytes", *_GPUS, "accumulators"),
            found,
            (1, 2, 6),
            "Blocks that fit on an SM by shared memory, float16, head_dim 128",
        ),
    )


def check() -> Check:
    """Why elements must not be compared with bytes."""
    last, limit = sizes()[-1], architecture(_GPUS["RTX 4090"]).max_smem_per_block
    return Check(
        "Counting elements passes a tile that does not fit",
        last.elements <= limit < last.n_bytes,
        f"{last.elements:,} elements, {last.n_bytes:,} bytes, {limit:,} on an RTX 4090",
    )


def _fits(n_bytes: int, limits: Architecture) -> str:
    """How many blocks of so many bytes fit on an SM."""
    if n_bytes > limits.max_smem_per_block:
        return "no"
    unit, taken = limits.smem_unit, n_bytes + limits.reserved_smem_per_block
    blocks = limits.smem_per_sm // (-(-taken // unit) * unit)
    return f"{blocks} block" + ("s" if blocks > 1 else "")
