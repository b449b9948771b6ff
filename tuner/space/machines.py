"""GPUs by name, as the offline model needs them: multiprocessors, clocks, rates, with sources.

The table is `machines.toml`. All rates are per clock and multiprocessor, so that a machine's are
its architecture's.
"""

import difflib
import re
import tomllib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from numflash.runtime.devices import Architecture, architecture

_TABLE = Path(__file__).with_name("machines.toml")
_MB, _GIB = 2**20, 2**30
# "sm_89", "sm89", "89", "sm_90a"
_ARCHITECTURE = re.compile(r"(?:sm_?)?(\d{2,3}[af]?)", re.IGNORECASE)
# Words that people leave out of a GPU's name.
_BRANDS = re.compile(r"nvidia|geforce|tesla|rtx|[^a-z0-9]")


@dataclass(frozen=True)
class Machine:
    """A GPU.

    Attributes:
        name: as the driver gives it, "NVIDIA A100-SXM4-80GB"; or that of an architecture, "sm_80".
        arch: as in `numflash.runtime.devices.ARCHITECTURES`.
        num_sms: multiprocessors.
        clock_mhz: boost clock of the SMs.
        memory_gbps: bandwidth of the device memory, 1e9 bytes per second.
        l2_bytes: L2 cache.
        l2_bytes_per_clock: read bandwidth of the L2 for the whole GPU, bytes per SM clock.
        mma_f16: multiply-adds per clock and SM that `mma.sync` reaches, float16 or bfloat16
            operands, float32 accumulators.
        mma_tf32: likewise for tf32; 0 where there is none.
        wgmma_f16: likewise for `wgmma`, float16 or bfloat16 operands; 0 where there is none.
        mma_efficiency: share of `mma_f16`, `mma_tf32` and `mma_e4m3` that attention reaches while
            it multiplies; FlashAttention-2 comes near its published speed on an A100 with 0.95.
        fp32_lanes: float32 multiply-adds per clock and SM.
        source: where these figures are from.
        alu_lanes: minima, comparisons, selections and logic per clock and SM.
        sfu_lanes: special functions, such as exponentials, per clock and SM.
        smem_bytes_per_clock: bandwidth of an SM's shared memory.
        memory_bytes: size of the device memory; 0 where nobody said.
        mma_e4m3: likewise multiply-adds of `mma.sync` with operands of e4m3; 0 where it is no
            instruction, but made of conversions and of products of float16.
        wgmma_e4m3: likewise of `wgmma`; 0 where there is none.
    """

    name: str
    arch: str
    num_sms: int
    clock_mhz: float
    memory_gbps: float
    l2_bytes: int
    l2_bytes_per_clock: float
    mma_f16: float
    mma_tf32: float
    fp32_lanes: int
    source: str
    alu_lanes: int = 64
    sfu_lanes: int = 16
    smem_bytes_per_clock: int = 128
    wgmma_f16: float = 0.0
    mma_efficiency: float = 0.95
    memory_bytes: int = 0
    mma_e4m3: float = 0.0
    wgmma_e4m3: float = 0.0

    @property
    def limits(self) -> Architecture:
        """Registers, shared memory and threads of an SM."""
        return architecture(self.arch)


def find(name: str) -> Machine:
    """The machine with this name, in any case and with or without its brand: "rtx 4090".

    "sm_89" or "89" give the figures of the GPU that stands for the architecture in
    `machines.toml`, under the architecture's name.

    Raises:
        ValueError: there is none; the message names those that are spelled alike.
    """
    text = name.strip()
    if match := _ARCHITECTURE.fullmatch(text):
        return _of_architecture(match[1].lower(), name)
    by_key = _by_key()
    key = _key(text)
    if key in by_key:
        return by_key[key]
    near = difflib.get_close_matches(key, by_key, n=8, cutoff=0.5)
    near_names = list(dict.fromkeys(by_key[k].name for k in near))[:4]
    hint = f"; did you mean {' or '.join(near_names)}?" if near_names else ";"
    raise ValueError(
        f"device must be a GPU of the table or an architecture such as sm_80, got {name!r}{hint} "
        "numflash-tune --list-devices lists all"
    )


def names() -> list[str]:
    """The names of all GPUs in the table, oldest architecture first."""
    return [machine.name for machine in _machines()]


def of_device(
    name: str, arch: str, num_sms: int, clock_mhz: float, memory_gbps: float, l2_bytes: int
) -> Machine:
    """A GPU found at run time, with its own sizes and its architecture's rates per SM.

    Args:
        name: as the driver gives it; "GeForce" in it decides the matrix rate.
        arch: as in `numflash.runtime.devices.ARCHITECTURES`.
        num_sms, clock_mhz, memory_gbps, l2_bytes: as in `Machine`.

    Raises:
        ValueError: the architecture is unknown.
    """
    arch = architecture(arch).arch
    rates = _table()["rates"]
    geforce = f"{arch}-geforce"
    kind = geforce if "geforce" in name.lower() and geforce in rates else arch
    return _machine(
        name, kind, num_sms, clock_mhz, memory_gbps, l2_bytes, "sizes as the driver reports them"
    )


@cache
def _table() -> dict:
    return tomllib.loads(_TABLE.read_text(encoding="utf-8"))


@cache
def _machines() -> tuple[Machine, ...]:
    return tuple(
        _machine(
            row["name"],
            row["rates"],
            row["num_sms"],
            row["clock_mhz"],
            row["memory_gbps"],
            int(row["l2_mb"] * _MB),
            row["source"],
            row["memory_gb"] * _GIB,
        )
        for row in _table()["machines"]
    )


@cache
def _by_key() -> dict[str, Machine]:
    """Every spelling that is understood -> its machine."""
    found = {}
    for row, machine in zip(_table()["machines"], _machines(), strict=True):
        for name in (row["name"], *row.get("aliases", ())):
            found[_key(name)] = machine
    return found


def _key(name: str) -> str:
    """A name without case, brand, blanks and punctuation."""
    return _BRANDS.sub("", name.lower())


def _machine(
    name: str,
    kind: str,
    num_sms: int,
    clock_mhz: float,
    memory_gbps: float,
    l2_bytes: int,
    source: str,
    memory_bytes: int = 0,
) -> Machine:
    """A machine with the rates of a kind, "sm_89" or "sm_89-geforce"."""
    rates = dict(_table()["rates"][kind])
    l2_per_sm, rates_source = rates.pop("l2_bytes_per_clock_per_sm"), rates.pop("source")
    return Machine(
        name=name,
        arch=kind.removesuffix("-geforce"),
        num_sms=num_sms,
        clock_mhz=float(clock_mhz),
        memory_gbps=float(memory_gbps),
        l2_bytes=l2_bytes,
        l2_bytes_per_clock=float(l2_per_sm * num_sms),
        memory_bytes=memory_bytes,
        source=f"{source}. Rates: {rates_source}",
        **rates,
    )


def _of_architecture(digits: str, asked: str) -> Machine:
    """The GPU that stands for an architecture, under the name "sm_89"."""
    representatives = _table()["representatives"]
    known = ", ".join(representatives)
    try:
        arch = architecture(digits).arch
    except ValueError as error:
        raise ValueError(
            f"device must be a GPU or one of the architectures {known}, got {asked!r}"
        ) from error
    if arch not in representatives:
        raise ValueError(
            f"the table has no GPU of {arch}, only of {known}; numflash_tuner.machines.names() "
            "lists all"
        )
    machine = _by_key()[_key(representatives[arch])]
    return replace(
        machine,
        name=arch.rstrip("af"),
        source=f"those of {machine.name}: {machine.source}",
    )
