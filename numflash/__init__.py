"""numflash: FlashAttention as Numba CUDA kernels.

import numflash

out = numflash.attention(q, k, v, causal=True)
"""

from numflash import reference
from numflash.api import Plan, attention, attention_backward, plan, warmup
from numflash.check import CheckReport, check
from numflash.errors import UnsupportedError
from numflash.executor import run_ptx
from numflash.explain import Explanation, explain_dispatch
from numflash.fp8 import Fp8Array, Fp8Recipe, PrecisionDecision
from numflash.fp8_arrays import dequantize_fp8, quantize_fp8
from numflash.mode import simulating

__all__ = [
    "CheckReport",
    "Explanation",
    "Fp8Array",
    "Fp8Recipe",
    "Plan",
    "PrecisionDecision",
    "UnsupportedError",
    "attention",
    "attention_backward",
    "check",
    "dequantize_fp8",
    "explain_dispatch",
    "plan",
    "quantize_fp8",
    "reference",
    "run_ptx",
    "simulating",
    "warmup",
]
__version__ = "0.1.0"
