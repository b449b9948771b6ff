"""Kernels with what callers ask for besides attention: a fixed list for the machine-code net.

Each row is a family and what its traits have beyond those of plain attention: a caller's program
of bias, masks and functions, a block mask, features, sequences with lengths of their own, pages of
a cache, results in float32, and what the kernel of delta is given. There are as many rows as show
a change of each, not each with each.

Programs are literal texts, so that a kernel keeps its name when tracing changes; a test holds them
to the functions that they stand for.
"""

from collections.abc import Iterator

from numflash.configs import (
    ArraySumsConfig,
    Config,
    MaskListsConfig,
    MaskScatterConfig,
    MaskTilesConfig,
    ScheduleConfig,
)

PROGRAMS = {
    "bias": "1;float16[4u];score=add(s,aux0[b,h,i,j])",
    "bias of keys": "1;float16[4u];score=add(aux0[b,h,0,j],s)",
    "table": "1;float32[2u];score=add(s,aux0[h,add(sub(i,j),511)])",
    "gate": "1;float32[1u];score=mul(aux0[h],s)",
    "soft cap": "1;;score=mul(tanh(mul(s,0.033333335)),30.0)",
    "document": "1;int32[1u];keep=eq(aux0[j],aux0[i])",
    "causal": "1;;keep=le(j,i)",
}
"""The caller's functions by name: bias[b, h, i, j] and bias[b, h, 0, j] of float16, a table of
distances and a gate of heads in float32, and the masks and the score of `numflash.masks`."""
BLOCKS = (128, 128)
_GRADIENTS = ("backward-dq", "backward-dkdv", "backward")

ROWS: tuple[tuple[tuple[str, ...], dict], ...] = (
    (("forward", *_GRADIENTS), {"program": PROGRAMS["bias"]}),
    (("forward",), {"program": PROGRAMS["table"]}),
    (("forward",), {"program": PROGRAMS["document"]}),
    (("backward-dkdv",), {"program": PROGRAMS["soft cap"]}),
    (("forward", *_GRADIENTS), {"program": PROGRAMS["causal"], "blocks": BLOCKS}),
    (("forward", *_GRADIENTS), {"features": ("dropout",)}),
    (("forward", *_GRADIENTS), {"ragged": True}),
    (("forward",), {"ragged": True, "paged": True}),
    (("forward",), {"ragged": True, "paged": True, "codes": True}),
    (("forward",), {"features": ("sinks",), "float32_out": True}),
    (("backward-dq",), {"float32_out": True}),
    (("delta",), {"features": ("sinks",), "dlse": True, "plain_delta": True}),
    (("delta",), {"features": ("dropout",), "given_delta": True}),
    (("delta",), {"float32_out": True}),
    (("backward-rows",), {"features": ("alibi",)}),
    (("backward-rows",), {"program": PROGRAMS["gate"], "read": "0"}),
    (("backward-rows",), {"program": PROGRAMS["table"], "read": "0", "absolute": True}),
    (("backward-columns",), {"program": PROGRAMS["bias of keys"], "read": "0"}),
    (("backward-tiles",), {"program": PROGRAMS["bias"], "read": "0"}),
    (("backward-scatter",), {"program": PROGRAMS["table"], "read": "0"}),
)
"""(families, what their traits have): the config is the one by rule."""


def around_attention() -> Iterator[tuple[Config, dict]]:
    """Kernels that make block masks and lists of tiles, and add up gradients; and their traits."""
    yield MaskTilesConfig(), {"program": PROGRAMS["document"], "blocks": BLOCKS}
    yield MaskScatterConfig(), {}
    yield MaskListsConfig(), {}
    yield ScheduleConfig(), {}
    yield ScheduleConfig(splits=True), {}
    yield ArraySumsConfig(1), {}
