"""numflash: FlashAttention as Numba CUDA kernels.

import numflash

out = numflash.attention(q, k, v, causal=True)
"""

from numflash import reference
from numflash.api import Plan, attention, attention_backward, plan, warmup
from numflash.check import CheckReport, check
from numflash.errors import UnsupportedError
from numflash.explain import Explanation, explain_dispatch
from numflash.mode import simulating

__all__ = [
    "CheckReport",
    "Explanation",
    "Plan",
    "UnsupportedError",
    "attention",
    "attention_backward",
    "check",
    "explain_dispatch",
    "plan",
    "reference",
    "simulating",
    "warmup",
]
__version__ = "0.1.0"
