"""What ranks send is what `explain` says, to the byte."""

import numpy as np
import pytest

from bench.distributed.wires import Counting
from numflash.distributed import Layout, attention, attention_backward, explain, local
from numflash.distributed.communicators.grid import grid
from tests.support.ranks import on_ranks

HEADS_Q, HEADS_KV, DIM, DIM_V = 4, 2, 16, 8
HEADS = {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": 16, "head_dim_v": 8}
LAYOUTS = {
    "zigzag": (Layout.zigzag(24, 2), {"causal": True}),
    "window": (Layout.contiguous(24, 2), {"window_size": (3, 0)}),
    "documents": (Layout.zigzag_documents([9, 0, 5], 2), {"causal": True}),
}
