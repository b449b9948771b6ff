"""numflash: FlashAttention as Numba CUDA kernels.

import numflash

out = numflash.attention(q, k, v, causal=True)
"""

import sys

from numflash import reference
from numflash.api.attention import attention, attention_backward
from numflash.api.block_masks import BlockMask, create_block_mask, show_mask
from numflash.api.check import check
from numflash.api.comparison import CheckReport
from numflash.api.explain import Explanation, explain, explain_dispatch
from numflash.api.kvcache import attention_with_kvcache
from numflash.api.merge import merge_onto, merge_partials
from numflash.api.plans import Plan, plan, warmup
from numflash.api.quantize import dequantize_fp8, quantize_fp8
from numflash.api.rotary import apply_rotary, rotary_tables
from numflash.api.schedules import Schedule, plan_varlen
from numflash.api.varlen import attention_varlen, attention_varlen_backward
from numflash.executor import run_ptx
from numflash.functions import masks, math
from numflash.problem.fp8 import Fp8Array, Fp8Recipe, PrecisionDecision
from numflash.problem.rotary import LinearScaling, Llama3Scaling, YarnScaling
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.mode import simulating
from numflash.runtime.version import __version__

# These two are for people, who also write `from numflash.math import where`.
sys.modules |= {f"{__name__}.masks": masks, f"{__name__}.math": math}

__all__ = [
    "BlockMask",
    "CheckReport",
    "Explanation",
    "Fp8Array",
    "Fp8Recipe",
    "LinearScaling",
    "Llama3Scaling",
    "Plan",
    "PrecisionDecision",
    "Schedule",
    "UnsupportedError",
    "YarnScaling",
    "__version__",
    "apply_rotary",
    "attention",
    "attention_backward",
    "attention_varlen",
    "attention_varlen_backward",
    "attention_with_kvcache",
    "check",
    "create_block_mask",
    "dequantize_fp8",
    "explain",
    "explain_dispatch",
    "masks",
    "math",
    "merge_onto",
    "merge_partials",
    "plan",
    "plan_varlen",
    "quantize_fp8",
    "reference",
    "rotary_tables",
    "run_ptx",
    "show_mask",
    "simulating",
    "warmup",
]
