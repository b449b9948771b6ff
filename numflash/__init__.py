"""numflash: FlashAttention as Numba CUDA kernels.

import numflash

out = numflash.attention(q, k, v, causal=True)
"""

import sys

from numflash import reference
from numflash.api.attention import attention, attention_backward
from numflash.api.block_masks import BlockMask, create_block_mask, show_mask
from numflash.api.check import CheckReport, check
from numflash.api.explain import Explanation, explain_dispatch
from numflash.api.merge import merge_partials
from numflash.api.plans import Plan, plan, warmup
from numflash.api.quantize import dequantize_fp8, quantize_fp8
from numflash.executor import run_ptx
from numflash.functions import masks, math
from numflash.problem.fp8 import Fp8Array, Fp8Recipe, PrecisionDecision
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
    "Plan",
    "PrecisionDecision",
    "UnsupportedError",
    "__version__",
    "attention",
    "attention_backward",
    "check",
    "create_block_mask",
    "dequantize_fp8",
    "explain_dispatch",
    "masks",
    "math",
    "merge_partials",
    "plan",
    "quantize_fp8",
    "reference",
    "run_ptx",
    "show_mask",
    "simulating",
    "warmup",
]
