"""The speed of quantisation, next to a copy that moves as many bytes.

Part of `python -m bench forward`, and all of `python -m bench forward --quantize`. What counts are
bytes read and written once: the array, its codes and its scales. Each case runs in turn with its
copy, which moves the same bytes, half of them read and half written.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.measuring.device import Device
from bench.points import interleave
from bench.points.interleave import Method
from numflash.runtime.errors import in_one_line

TARGET = 0.8
MAX_REL_RMS = 0.05
"""The allowed difference of codes' numbers from the array; e4m3 rounds by 0.026."""
_BATCH, SEQLEN, HIDDEN = 1, 16384, 8192
DTYPE, _DTYPE_BYTES = "bfloat16", 2
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
            found[name] = {"reason": in_one_line(error)}
            device.synchronize()
        device.release()
    return found


def _measure(device: Device, case: Case, budget_ms: float) -> dict:
    import numflash

    heads = HIDDEN // case.head_dim
    x = device.normal((_BATCH, SEQLEN, heads, case.head_dim), DTYPE, 0)
    quantized = numflash.quantize_fp8(x, **case.options)
    error = _relative_rms(numflash.dequantize_fp8(quantized, "float32"), x)
    device.synchronize()
    elements = _BATCH * SEQLEN * heads * case.head_dim
    scales = quantized.descale.shape[0] * quantized.descale.shape[1] * quantized.descale.shape[2]
    moved = elements * (_DTYPE_BYTES + 1) + 4 * scales
    del quantized
    methods = [
        Method("quantize", lambda: numflash.quantize_fp8(x, **case.options)),
        Method(_COPY, device.copy(moved // 2)),
    ]
    failures: dict[str, Exception] = {}
    samples = interleave.time_interleaved(
        methods, device.time_method, budget_ms=budget_ms, on_failure=failures.setdefault
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
