"""How fast numflash quantises, next to a copy that moves as many bytes.

Part of `python -m bench forward`, and all of `python -m bench forward --quantize`. What counts are
bytes read and written once: the array, its codes and its scales. Each case runs in turn with its
copy, which moves the same bytes, half of them read and half written.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.measuring.device import Device
from bench.points import interleave
from bench.points.interleave import Method
from bench.studies import static
from bench.tables import tables
from numflash.configs import Traits, fp8, quantize_config
from numflash.runtime.devices import ARCHITECTURES

TARGET = 0.8
MAX_REL_RMS = 0.05
"""What the numbers that codes stand for may differ from the array; e4m3 rounds by 0.026."""
_BATCH, _SEQLEN, _HIDDEN = 1, 16384, 8192
_DTYPE, _DTYPE_BYTES = "bfloat16", 2
_COPY = "copy"


@dataclass(frozen=True)
class Case:
    """One way to quantise: of which head_dim, and options of `numflash.quantize_fp8`."""

    head_dim: int
    granularity: str = "block"
    hadamard: bool = False
    transposed: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Of `numflash.quantize_fp8`."""
        names = "granularity", "hadamard", "transposed"
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        flags = [name for name in ("hadamard", "transposed") if getattr(self, name)]
        return " ".join([f"d{self.head_dim}", self.granularity, *flags])


CASES = tuple(
    Case(head_dim, **options)
    for head_dim in (64, 128, 256)
    for options in (
        {},
        {"hadamard": True},
        {"transposed": True},
        {"granularity": "token", "hadamard": True},
        {"granularity": "tensor"},
    )
)


def measure(
    device: Device, begin: Callable[[str], None], exclude: dict[str, str], budget_ms: float
) -> dict[str, dict]:
    """Measure every case; by its name its figures, or the reason why there are none.

    Args:
        device: what to measure on.
        begin: told a case's name before it runs.
        exclude: name -> reason of cases that have ended a process.
        budget_ms: time for the rounds of a case.
    """
    found: dict[str, dict] = {}
    for case in CASES:
        name = str(case)
        if name in exclude:
            found[name] = {"reason": exclude[name]}
            continue
        begin(name)
        try:
            found[name] = _measure(device, case, budget_ms)
        except Exception as error:
            found[name] = {"reason": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
            device.synchronize()
        device.free()
    return found


def _measure(device: Device, case: Case, budget_ms: float) -> dict:
    import numflash

    heads = _HIDDEN // case.head_dim
    x = device.normal((_BATCH, _SEQLEN, heads, case.head_dim), _DTYPE, 0)
    quantized = numflash.quantize_fp8(x, **case.options)
    error = _relative_rms(numflash.dequantize_fp8(quantized, "float32"), x)
    device.synchronize()
    elements = _BATCH * _SEQLEN * heads * case.head_dim
    scales = quantized.descale.shape[0] * quantized.descale.shape[1] * quantized.descale.shape[2]
    moved = elements * (_DTYPE_BYTES + 1) + 4 * scales
    del quantized
    methods = [
        Method("quantize", lambda: numflash.quantize_fp8(x, **case.options)),
        Method(_COPY, device.copy(moved // 2)),
    ]
    failures: dict[str, Exception] = {}
    samples = interleave.time_interleaved(
        methods, device.time, budget_ms=budget_ms, on_failure=failures.setdefault
    )
    for failure in failures.values():
        raise failure
    medians = {name: statistics.median(times) for name, times in samples.items()}
    return {
        "bytes": moved,
        "median_ms": medians["quantize"],
        "copy_ms": medians[_COPY],
        "gbps": moved / medians["quantize"] / 1e6,
        "of_copy": interleave.paired_ratio(samples["quantize"], samples[_COPY]),
        "relative_rms": error,
        "is_right": error <= MAX_REL_RMS,
    }


def _relative_rms(got, x) -> float:
    """Root mean square of got - x over that of x."""
    x = x.float() if hasattr(x, "float") else x.astype("float32")
    return float(((got - x) ** 2).mean() / (x**2).mean()) ** 0.5


def is_measured(found: dict | None) -> bool:
    """Whether what a record holds is what `measure` returned."""
    return bool(found) and "failed" not in found


def table(found: dict[str, dict]) -> str:
    """What was measured, in Markdown."""
    rows = []
    for name, entry in found.items():
        if "reason" in entry:
            rows.append([name, entry["reason"], "", "", ""])
        elif not entry["is_right"]:
            rows.append([name, f"wrong: relative RMS {entry['relative_rms']:.2g}", "", "", ""])
        else:
            verdict = "yes" if entry["of_copy"] >= TARGET else "no"
            numbers = f"{1e3 * entry['median_ms']:.1f}", f"{entry['gbps']:.0f}"
            rows.append([name, *numbers, f"{entry['of_copy']:.0%}", verdict])
    header = ["quantisation", "us", "GB/s", "of a copy", f"at least {TARGET:.0%}"]
    return (
        f"{tables.markdown(header, rows)}\n\n{_DTYPE}, {_SEQLEN} tokens of {_HIDDEN} numbers; "
        "bytes are read and written once. A scale of a whole tensor takes a second pass over it."
    )


def static_rows() -> Iterator[dict]:
    """The kernels' machine code on each architecture, without a GPU."""
    for case in CASES:
        for arch in static.ARCHS:
            limits = ARCHITECTURES[arch]
            find = {"hadamard": case.hadamard, "transposed": case.transposed}
            if case.granularity == "block":
                find["block"] = 128
            else:
                find["scale"] = {"token": "token"}.get(case.granularity, "given")
            config = quantize_config(fp8.generation(limits), case.head_dim, **find)
            if config is None:
                continue
            traits = Traits(_DTYPE, case.head_dim, case.head_dim)
            yield static.row("quantize", traits, limits, config)
