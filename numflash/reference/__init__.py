"""Attention as defined, in NumPy: the specification that every kernel is tested against.

attention, attention_backward    in float64
naive, naive_backward            step by step in a lower precision: error budgets
magnitudes                       the sums behind results, without signs: budgets, too
dropout_mask                     which scores dropout keeps
quantize_fp8, attention_fp8      with 8-bit floats
apply_rotary                     rotary embeddings
attention_with_kvcache           over a cache
"""

from numflash.reference.attention import (
    attention,
    attention_backward,
    magnitudes,
    naive,
    naive_backward,
)
from numflash.reference.caches import attention_with_kvcache
from numflash.reference.fp8 import (
    attention_fp8,
    attention_of_codes,
    dequantize_fp8,
    hadamard_signs,
    quantize_fp8,
    rotate,
    tokens_innermost,
    tokens_outermost,
)
from numflash.reference.rotary import apply_rotary
from numflash.reference.scores import dropout_mask, visible

__all__ = [
    "apply_rotary",
    "attention",
    "attention_backward",
    "attention_fp8",
    "attention_of_codes",
    "attention_with_kvcache",
    "dequantize_fp8",
    "dropout_mask",
    "hadamard_signs",
    "magnitudes",
    "naive",
    "naive_backward",
    "quantize_fp8",
    "rotate",
    "tokens_innermost",
    "tokens_outermost",
    "visible",
]
