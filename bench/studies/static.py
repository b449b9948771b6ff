"""Facts on the kernels without a GPU: their machine code for each architecture.

Registers, spills, shared memory, blocks per SM and tensor-core instructions, from
`numflash.machine_code.report`. None of it is a speed.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from bench.measuring.quantize import CASES, DTYPE
from numflash.configs import FP8_STEP, Traits, fp8, padded_head_dim, quantize_config
from numflash.runtime.devices import ARCHITECTURES, Architecture
from numflash.runtime.errors import UnsupportedError, in_one_line
from numflash.selection.rules import choose

ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_120")
FAMILIES = {"forward": ("forward",), "backward": ("backward-dkdv", "backward-dq")}
COLUMNS = (
    "kernel",
    "dtype",
    "head_dim",
    "arch",
    "config",
    "registers",
    "spill bytes",
    "smem bytes",
    "blocks/SM",
    "HMMA",
    "QMMA",
    "EX2",
    "instructions counted",
)
_WIDTHS = {"kernel": 13, "config": 27, "variant": 36, "idea": 9}


def traits_of(dtype: str, head_dim: int, fp8: bool = False) -> Traits:
    """The traits of a kernel at a point of the grid; `dtype` is that of the result."""
    padded = -(-head_dim // FP8_STEP) * FP8_STEP if fp8 else padded_head_dim(head_dim)
    return Traits(dtype, padded, padded, fp8=fp8)


def choose_config(family: str, traits: Traits, limits: Architecture, **options) -> Any:
    """The config that numflash uses on an architecture, without asking a GPU."""
    return choose(family, traits, limits, **options).config


def row(family: str, traits: Traits, limits: Architecture, config: Any) -> dict:
    """One kernel's figures, or the reason why there are none."""
    from numflash.machine_code.report import inspect_kernel

    found: dict = {
        "kernel": family,
        "dtype": _operands(traits),
        "head_dim": traits.head_dim,
        "arch": limits.arch,
        "config": str(config),
    }
    try:
        report = inspect_kernel(config, traits, limits)
    except Exception as error:
        return {**found, "reason": in_one_line(error)}
    counts = report.instructions
    return {
        **found,
        "registers": report.registers,
        "spill bytes": report.spill_store_bytes + report.spill_load_bytes,
        "smem bytes": report.smem_bytes,
        "blocks/SM": report.blocks_per_sm,
        "HMMA": counts.get("HMMA"),
        "QMMA": counts.get("QMMA"),
        "EX2": counts.get("MUFU.EX2"),
        "instructions counted": sum(counts.values()) if counts else None,
    }


def _operands(traits: Traits) -> str:
    return "fp8" if traits.fp8 else traits.dtype


def chosen_row(family: str, traits: Traits, limits: Architecture) -> dict:
    """The figures of the kernel that an architecture would run, or why it runs none."""
    try:
        config = choose_config(family, traits, limits)
    except UnsupportedError as error:
        names = {"kernel": family, "head_dim": traits.head_dim, "arch": limits.arch}
        return {**names, "dtype": _operands(traits), "config": "-", "reason": str(error)}
    return row(family, traits, limits, config)


def rows(
    direction: str,
    head_dims: Sequence[int],
    dtypes: Sequence[str],
    archs: Iterable[str] = ARCHS,
) -> Iterator[dict]:
    """The figures of the kernels that each architecture would run, on 8-bit floats last."""
    for family in FAMILIES[direction]:
        for dtype in dtypes:
            for head_dim in head_dims:
                for arch in archs:
                    yield chosen_row(family, traits_of(dtype, head_dim), ARCHITECTURES[arch])
    for head_dim in head_dims if direction == "forward" else ():
        for arch in archs:
            # Turing has no bfloat16.
            traits = traits_of("float16" if arch == "sm_75" else dtypes[0], head_dim, fp8=True)
            yield chosen_row("forward", traits, ARCHITECTURES[arch])


def quantize_rows() -> Iterator[dict]:
    """The machine code of what quantises on each architecture, without a GPU."""
    for case in CASES:
        for arch in ARCHS:
            limits = ARCHITECTURES[arch]
            find = {"hadamard": case.hadamard, "transposed": case.transposed}
            if case.granularity == "block":
                find["block"] = 128
            else:
                find["scale"] = {"token": "token"}.get(case.granularity, "given")
            config = quantize_config(fp8.generation(limits), case.head_dim, **find)
            if config is None:
                continue
            traits = Traits(DTYPE, case.head_dim, case.head_dim)
            yield row("quantize", traits, limits, config)


def print_rows(
    rows: Iterator[dict], columns: tuple[str, ...], deadline: float, show: Callable = print
) -> int:
    """Print rows as they come, until `deadline`; how many."""
    widths = [max(len(column), _WIDTHS.get(column, 9)) for column in columns]
    show("  ".join(column.ljust(width) for column, width in zip(columns, widths, strict=True)))
    printed = 0
    for found in rows:
        cells = [_cell(found.get(column)) for column in columns]
        if "reason" in found:
            cells = [*cells[: columns.index("config") + 1], found["reason"]]
            widths_here = widths[: len(cells)]
        else:
            widths_here = widths
        line = "  ".join(c.ljust(w) for c, w in zip(cells, widths_here, strict=True))
        show(line.rstrip(), flush=True)
        printed += 1
        if time.monotonic() > deadline:
            show("out of time (--time-limit); what has been compiled is cached for the next run")
            break
    return printed


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)
