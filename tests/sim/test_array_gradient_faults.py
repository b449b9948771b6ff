"""Faults of the kernels for gradients of arrays that scores read: each is found."""

import numpy as np
import pytest

import numflash
from numflash.calls import ready
from numflash.runtime.arrays import _NumPy
from numflash.simulator import SimulationError
from tests.sim.test_array_gradients import OF_SCORES, inputs, normal
from tests.support.faults import Dropped, Mutation, load


@pytest.fixture(autouse=True)
def poisoned_results(monkeypatch):
    """What is allocated holds 0xFF bytes, NaN, before it is written; no call is remembered."""
    empty = _NumPy.empty

    def poisoned(self, shape, dtype, device):
        array = empty(self, shape, dtype, device)
        array.view(np.uint8)[...] = 0xFF
        return array

    monkeypatch.setattr(_NumPy, "empty", poisoned)
    monkeypatch.setattr(ready, "_ready", {})


ROOM = "numflash.kernels"
PORTABLE = f"{ROOM}.portable.score_gradients", f"{ROOM}.portable.of_arrays"
MMA = f"{ROOM}.mma.score_gradients", f"{ROOM}.mma.of_arrays"
# Of each fault the module that has it, those that must see it, and the config that runs.
FAULTS = {
    "a tile leaves out a head": (
        f"{ROOM}.shared.backward_tiles",
        Mutation("heads", "first_head + reduced.summed.heads", "first_head + 1"),
        *("m8n8w2", PORTABLE),
    ),
    "a tile that nobody sees is not written": (
        f"{ROOM}.shared.backward_tiles",
        Mutation("unseen", "if r < sequence", "if seen.begin < seen.end and r < sequence"),
        *("m8n8w2", PORTABLE),
    ),
    "a tile is read before it is there": (
        f"{ROOM}.shared.backward_tiles",
        Dropped("make_tiles_kernel.backward_tiles", "cuda.syncthreads", 1),
        *("m8n8w2", PORTABLE),
    ),
    "a tile takes the place of the one before too early": (
        f"{ROOM}.shared.backward_tiles",
        Dropped("make_tiles_kernel.backward_tiles", "cuda.syncthreads", 0),
        *("m8n8w2", PORTABLE),
    ),
    "nobody waits for copies": (
        f"{ROOM}.shared.backward_tiles",
        Dropped("make_tiles_kernel.backward_tiles", "wait", 0),
        *("sm80-m16n16w1s1", MMA),
    ),
    "half of the lanes of a column": (
        f"{ROOM}.portable.score_gradients",
        Mutation("lanes", "for distance in (8, 16)", "for distance in (8,)"),
        *("m8n8w2", PORTABLE),
    ),
    "half of the lanes of a column on tensor cores": (
        f"{ROOM}.mma.score_gradients",
        Mutation("lanes", "for distance in (4, 8, 16)", "for distance in (8, 16)"),
        *("sm80-m16n16w1s1", MMA),
    ),
    "the second warp's sums of columns": (
        f"{ROOM}.shared.backward_columns",
        Mutation("warps", "for w in range(num_warps)", "for w in range(1)"),
        *("m8n8w2", PORTABLE),
    ),
    "the sums of columns are not yet there": (
        f"{ROOM}.shared.backward_columns",
        Dropped("make_columns_kernel.backward_columns", "cuda.syncthreads", 3),
        *("m8n8w2", PORTABLE),
    ),
    "a thread keeps its last sum": (
        f"{ROOM}.shared.backward_scatter",
        Mutation("last", "if sums[1] != 0:\n            red", "if 0:\n            red"),
        *("m8n8w2", PORTABLE),
    ),
    "a sum goes to the element after": (
        f"{ROOM}.shared.backward_scatter",
        Mutation("after", "sums[0], sums[1] = target, i64(0)", "sums[0] = target"),
        *("m8n8w2", PORTABLE),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name, monkeypatch):
    """A causal bias that heads share, one of keys, and a table."""
    faulty, fault, config, seen_by = FAULTS[name]
    load((faulty, *seen_by), faulty, fault, monkeypatch)
    step = 16 if config.startswith("sm80") else 8
    q, k, v, dout = inputs(
        "float16" if step == 16 else "float32", shape=(1, 2, step + 3, step + 3)
    )

    def function(score, batch, head, q_idx, kv_idx, keys, table):
        return score + keys[kv_idx] + table[head, kv_idx - q_idx + step + 2]

    aux = normal(step + 3), normal((2, 2 * step + 5))
    try:
        report = numflash.check(
            *(q, k, v),
            dout=dout,
            wrt=("bias", "aux0", "aux1"),
            bias=normal((step + 3, step + 3)),
            score_mod=function,
            aux=aux,
            causal=True,
            config=dict.fromkeys(("forward", *OF_SCORES), config),
        )
    except SimulationError:
        return
    assert not report.passed
