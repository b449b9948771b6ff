"""Dropout and lengths of sequences in Hopper's backward, broken on purpose.

Of dropout bits of other scores, and scores that are dropped here but not there; of lengths the
rows of the array instead of the sequence's. `test_broken_hopper_backward` breaks waits.
"""

from contextlib import suppress
from typing import NamedTuple

import numpy as np
import pytest

import numflash
from numflash.calls import ready
from numflash.simulator import SimulationError
from numflash.simulator.errors import DeadlockError
from tests.support.covering import some, thorough
from tests.support.faults import load, mutations
from tests.support.varlen_cases import VarlenCase

CHAIN = (
    "tiles/wgmma/gradients",
    "tiles/wgmma/handover",
    "tiles/wgmma/scores",
    "kernels/wgmma/origins",
    "kernels/wgmma/queries",
    "kernels/wgmma/roles",
    "kernels/wgmma/backward_dq",
    "kernels/wgmma/backward_dkdv",
)
MODULES = {part.rpartition("/")[2]: "numflash." + part.replace("/", ".") for part in CHAIN}


class Dropping(NamedTuple):
    """A kernel with dropout: its config, seqlen_q and seqlen_k."""

    config: str
    shape: tuple[int, int]
    options: dict = {}

    def is_solved(self) -> bool:
        rng, (seqlen_q, seqlen_k) = np.random.default_rng(0), self.shape
        shapes = [(1, n, 1, 16) for n in (seqlen_q, seqlen_k, seqlen_k, seqlen_q)]
        q, k, v, dout = (rng.standard_normal(shape).astype(np.float16) for shape in shapes)
        family, wrt = ("backward-dq", ("q",)) if "n80" in self.config else ("backward-dkdv", None)
        config = {"forward": "sm80-m32n32w2s1", family: f"sm90-{self.config}"}
        options = {"dropout_p": 0.4, "seed": 3, "wrt": wrt or ("k", "v"), **self.options}
        return numflash.check(q, k, v, dout=dout, config=config, **options).passed


class Ragged(NamedTuple):
    """Gradients of sequences with lengths of their own, a form and an option of `varlen_cases`."""

    form: str
    option: str
    wrt: tuple[str, ...]

    def is_solved(self) -> bool:
        case = VarlenCase("sm90", "uneven", self.form, self.option)
        (q, k, v, dout), options = case.arguments(np.random.default_rng(2))
        options["config"] = options["config"] | {"forward": "sm80-m32n16w2s1"}
        return numflash.check(q, k, v, dout=dout, wrt=self.wrt, **options).passed


# Bits of a thread's scores are more than a word.
PROBLEMS = {
    "dq": Dropping("m64n80w4s1", (40, 100)),
    "dkdv": Dropping("m96n64w4s1", (110, 40)),
    "roles": Dropping("m32n64w8s1-roles", (50, 40)),
    "roles-bent": Dropping("m32n64w8s1-roles", (50, 40), {"softcap": 2.0}),
    "packed-dq": Ragged("packed, parts", "full", ("q",)),
    "packed-dkdv": Ragged("packed, parts", "full", ("k", "v")),
    "padded-dq": Ragged("padded, starts", "causal", ("q",)),
}

FAULTS = """
gradients  dq  dP that is dropped counts
    acc[i] = acc[i] if _is_kept(kept, i) else f32(0) -> acc[i] = acc[i]
gradients  dkdv  P that is dropped counts
    left = p_acc[i] if _is_kept(kept, i) else f32(0) -> left = p_acc[i]
gradients  dq  bits of one word
    u32(kept[i // 32] & -> u32(kept[0] &
gradients  dkdv  bits of pairs on top of each other
    u32(pair % 4 * 8) -> u32(pair % 2 * 8)
backward_dq  dq  bits of the first tile of keys
    i32(n_start + accumulator_column()), args.drawn -> i32(accumulator_column()), args.drawn
scores  dkdv  bits of the first tile of queries
    draw_kept(kept, j, i32(m_start + -> draw_kept(kept, j, i32(
handover  roles  bits on top of P
    behind_p = n_tiles * WARPGROUP -> behind_p = 0 * WARPGROUP
handover  roles-bent  bits on top of P in 32 bits
    (4 if traits.bends_scores else 2) -> 2
roles  roles  P that is dropped is left as 0
    leave(s_acc, packed_all, -> leave(s_acc, packed,
roles  roles  the second warpgroup drops nothing
    drop(dp_acc, kept) -> drop(p_acc[:0], kept)
origins  packed-dq  a sequence ends with the array
    Origin(i32(bound - seqlen), i32(first + seqlen -> Origin(i32(0), i32(first + bound
origins  packed-dkdv  keys begin with the queries  x2
    keys = shape.seqlen_k, sequence.first_k, -> keys = shape.seqlen_k, sequence.first_q,
origins  padded-dq  entries lie without gaps
    first + seqlen + batch * between -> first + seqlen + batch * bound
queries  packed-dkdv  statistics of the first sequence
    (batch, head, shape) + sequence.first_q -> (batch, head, shape)
backward_dq  packed-dq  statistics of the first sequence
    (batch, head, shape) + sequence.first_q -> (batch, head, shape)
queries  packed-dkdv  rows behind a sequence are written
    i32(n_start + row), sequence.seqlen_k, num -> i32(n_start + row), shape.seqlen_k, num
"""


def faults() -> list:
    """(module, mutation, problem) of FAULTS."""
    return [
        pytest.param(MODULES[part], mutation, problem, id=f"{part}: {mutation}")
        for part, problem, mutation in mutations(FAULTS)
    ]


@pytest.fixture(autouse=True)
def hopper(on):
    """A simulated Hopper."""
    on("sm_90a")


@thorough
@pytest.mark.parametrize("name", some(PROBLEMS, "dq"))
def test_the_kernels_are_right(name):
    assert PROBLEMS[name].is_solved()


@pytest.mark.parametrize(("module", "mutation", "problem"), faults())
def test_a_broken_kernel_is_caught(module, mutation, problem, monkeypatch):
    modules = list(MODULES.values())
    load(modules[modules.index(module) :], module, mutation, monkeypatch)
    ready._ready.clear()
    with suppress(SimulationError, DeadlockError, IndexError):
        assert not PROBLEMS[problem].is_solved()
