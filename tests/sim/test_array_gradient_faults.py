"""Faults of the kernels for gradients of arrays that scores read: each is found."""

import numpy as np
import pytest

import numflash
from numflash import reference
from numflash.api.comparison import OF_ARRAYS, compare, gradients_by_name
from numflash.calls import ready
from numflash.runtime.numpy_arrays import NumPy
from numflash.simulator import SEED, SimulationError
from tests.sim.test_array_gradients import OF_SCORES, inputs, normal
from tests.support.covering import some
from tests.support.faults import Dropped, Mutation, load


@pytest.fixture(autouse=True)
def poisoned_results(monkeypatch):
    """What is allocated holds 0xFF bytes, NaN, before it is written; no call is remembered."""
    empty = NumPy.empty

    def poisoned(self, shape, dtype, device):
        array = empty(self, shape, dtype, device)
        array.view(np.uint8)[...] = 0xFF
        return array

    monkeypatch.setattr(NumPy, "empty", poisoned)
    monkeypatch.setattr(ready, "_ready", {})


ROOM = "numflash.kernels"
PORTABLE = f"{ROOM}.portable.score_gradients", f"{ROOM}.portable.of_arrays"
MMA = f"{ROOM}.mma.score_gradients", f"{ROOM}.mma.of_arrays"
# What walks over keys.
KEYS = f"{ROOM}.shared.keys"
WALKERS = f"{ROOM}.shared.backward_rows", f"{ROOM}.shared.backward_scatter"
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
    "keys are read before they are there": (
        KEYS,
        Dropped("make_walk_over_keys.walk", "cuda.syncthreads", 1),
        *("m8n8w2", (*WALKERS, *PORTABLE)),
    ),
    "keys take the place of those before too early": (
        KEYS,
        Dropped("make_walk_over_keys.walk", "cuda.syncthreads", 0),
        *("m8n8w2", (*WALKERS, *PORTABLE)),
    ),
    "nobody waits for copies of keys": (
        KEYS,
        Dropped("make_walk_over_keys.walk", "wait", 1),
        *("sm80-m16n16w1s1", (*WALKERS, *MMA)),
    ),
    "nobody waits for keys ahead": (
        KEYS,
        Dropped("make_walk_over_keys.walk", "wait", 0),
        *("sm80-m16n16w1s2", (*WALKERS, *MMA)),
    ),
    "keys ahead take the place of those in use": (
        KEYS,
        Mutation("stage", "load_keys(smem, last_stage,", "load_keys(smem, i32(0),"),
        *("sm80-m16n16w1s2", (*WALKERS, *MMA)),
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


# What kernels of other families make is not looked at.
MADE_BY = {
    "backward_tiles": ("bias",),
    "backward_columns": ("aux0",),
    "backward_scatter": ("aux1",),
}


def is_right(config, monkeypatch, seeds, wrt=("bias", "aux0", "aux1")):
    """Whether gradients of a causal bias that heads share, of keys, and of a table are right."""
    step = 16 if config.startswith("sm80") else 8
    q, k, v, dout = inputs(
        "float16" if step == 16 else "float32", shape=(1, 2, step + 3, step + 3)
    )

    def function(score, batch, head, q_idx, kv_idx, keys, table):
        return score + keys[kv_idx] + table[head, kv_idx - q_idx + step + 2]

    options = {
        "bias": normal((step + 3, step + 3)),
        "score_mod": function,
        "aux": (normal(step + 3), normal((2, 2 * step + 5))),
        "causal": True,
    }
    out, lse = reference.attention(q, k, v, **options)
    given = dout, q, k, v, out.astype(q.dtype), lse.astype(np.float32)
    # Only rows have tiles ahead.
    configs = dict.fromkeys(OF_SCORES, config.replace("s2", "s1")) | {"backward-rows": config}
    options["wrt"] = wrt
    # What comes too early is not wrong in every order of threads.
    for seed in range(seeds):
        monkeypatch.setattr(SEED, "value", seed)
        try:
            found = numflash.attention_backward(*given, config=configs, **options)
        except SimulationError:
            return False
        got = dict(zip(gradients_by_name(options), found, strict=True))
        dtypes = dict.fromkeys((name for name in got if OF_ARRAYS.fullmatch(name)), "float32")
        report = compare(got, q, k, v, precision=q.dtype.name, dtypes=dtypes, dout=dout, **options)
        if not report.passed:
            return False
    return True


KEPT = (
    "keys are read before they are there",
    "nobody waits for keys ahead",
    "half of the lanes of a column on tensor cores",
    "the sums of columns are not yet there",
    "a sum goes to the element after",
)


@pytest.mark.parametrize("name", some(FAULTS, *KEPT))
def test_a_fault_is_found(name, monkeypatch):
    faulty, fault, config, seen_by = FAULTS[name]
    load((faulty, *seen_by), faulty, fault, monkeypatch)
    wrt = MADE_BY.get(faulty.rpartition(".")[2])
    assert not is_right(config, monkeypatch, 6, *([wrt] if wrt else []))


@pytest.mark.parametrize(
    "config", some(sorted({config for _, _, config, _ in FAULTS.values()}), every=2)
)
def test_without_a_fault_nothing_is_found(config, monkeypatch):
    assert is_right(config, monkeypatch, seeds=1)
