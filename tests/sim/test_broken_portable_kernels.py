"""The portable attention kernels as they are, and broken on purpose.

As `test_broken_kernels`: a kernel with a fault must give a wrong result, or an error of the
simulator, for one of a few seeds.
"""

import importlib

import numpy as np
import pytest

from numflash import reference
from numflash.calls.arguments import arguments_of
from numflash.calls.launch import SimulatedLaunch
from numflash.configs import BackwardDkDvConfig, BackwardDqConfig, ForwardConfig, Traits
from numflash.problem.problem import AttentionProblem, Tensor
from numflash.runtime.views import Operand
from tests.sim.test_broken_kernels import SEEDS, first_failure
from tests.support.faults import Dropped, Mutation, events, load, source_of

PORTABLE = "numflash.kernels.portable"
TRAITS = Traits("float32", 32, 32)
CONFIGS = {
    "forward": ForwardConfig(16, 8, 2),
    "backward_dkdv": BackwardDkDvConfig(8, 16, 2),
    "backward_dq": BackwardDqConfig(16, 8, 2),
}
BARRIERS = r"cuda\.sync(threads|warp)"


class Problem:
    """Few queries and keys, yet several tiles of both, a band, and rows that see no key."""

    seqlen_q, seqlen_k, window = 29, 20, (9, 3)

    def __init__(self):
        rng = np.random.default_rng(0)

        def tokens(seqlen):
            return rng.standard_normal((1, seqlen, 1, 32)).astype(np.float32)

        q, do, k, v = (tokens(n) for n in (self.seqlen_q,) * 2 + (self.seqlen_k,) * 2)
        options = {"window_size": self.window}
        shift = self.seqlen_k - self.seqlen_q
        self.problem = AttentionProblem(
            batch=1,
            seqlen_q=self.seqlen_q,
            seqlen_k=self.seqlen_k,
            num_heads_q=1,
            num_heads_kv=1,
            head_dim=32,
            head_dim_v=32,
            dtype="float32",
            softmax_scale=32**-0.5,
            band_lo=shift - self.window[0],
            band_hi=shift + self.window[1],
            shift=shift,
        )
        out, lse = reference.attention(q, k, v, **options)
        dq, dk, dv = reference.attention_backward(do, q, k, v, **options)
        self.expected = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
        delta = self.problem.softmax_scale * (out * do).sum(-1).swapaxes(1, 2)
        self.inputs = {"q": q, "k": k, "v": v, "do": do, "lse": lse, "delta": delta}

    def is_solved_by(self, kernel, outputs: tuple[str, ...], block_rows: int) -> bool:
        """Whether the outputs of `kernel` are right."""
        inputs = {n: a for n, a in self.inputs.items() if n not in outputs}
        inputs = {n: np.ascontiguousarray(a, np.float32) for n, a in inputs.items()}
        results = {n: np.full(self.expected[n].shape, np.nan, np.float32) for n in outputs}
        arrays = {**inputs, **results}
        tensors = {
            name: Tensor(name, None, array.shape, tuple(n // 4 for n in array.strides))
            for name, array in arrays.items()
            if array.ndim == 4
        }
        operands = {name: Operand(0, array) for name, array in arrays.items()}
        num_blocks = -(-results[outputs[0]].shape[1] // block_rows)
        SimulatedLaunch(kernel, num_blocks, arguments_of(self.problem, tensors)).bind(operands)(0)
        # Far above rounding, far below what any bug does.
        return all(np.allclose(results[n], self.expected[n], 1e-3, 1e-4) for n in outputs)


OUTPUTS = {"forward": ("out", "lse"), "backward_dkdv": ("dk", "dv"), "backward_dq": ("dq",)}
PROBLEM = Problem()


def mutated_factory(family: str, module: str, fault, monkeypatch):
    """The factory of a portable kernel with a fault in `module`, its own or one it imports."""
    kernel_module = f"{PORTABLE}.{family}"
    changed = load((module, kernel_module), module, fault, monkeypatch)
    return getattr(changed, f"make_{family}_kernel")


def first_failure_of_kernel(family: str, factory, monkeypatch) -> str | None:
    """The failure of the kernel from `factory` for the first seed."""
    config = CONFIGS[family]
    kernel = factory(config, TRAITS)
    return first_failure(
        lambda: PROBLEM.is_solved_by(kernel, OUTPUTS[family], config.block_rows),
        monkeypatch,
        SEEDS[:3],
    )


def barriers() -> list:
    """(family, fault) that leaves out one barrier of a portable kernel, for each of them."""
    return [
        pytest.param(family, fault, id=f"{family} without {fault}")
        for family in CONFIGS
        for fault in events(source_of(f"{PORTABLE}.{family}"), BARRIERS)
    ]


# (module, mutation): one for each idea that the forward kernel could get wrong.
FORWARD_MUTATIONS = [
    (
        "numflash.tiles.portable.scores",
        Mutation("the upper edge of the band", "distance > mask.hi", "distance >= mask.hi"),
    ),
    (
        "numflash.tiles.portable.scores",
        Mutation("the lower edge of the band", "distance < mask.lo", "distance <= mask.lo"),
    ),
    ("numflash.tiles.portable.scores", Mutation("the end of the keys", "j >= end", "j > end")),
    (
        "numflash.tiles.sequences",
        Mutation("one tile of keys too few", "tiles_of(end, stage_n)", "quotient(end, stage_n)"),
    ),
    (
        f"{PORTABLE}.forward",
        Mutation("columns of the lanes", "% COLUMN_LANES", "% ROW_LANES"),
    ),
    (
        f"{PORTABLE}.forward",
        Mutation("rows of the lanes", "+ ROW_LANES * r", "+ COLUMN_LANES * r"),
    ),
    (
        "numflash.tiles.portable.softmax",
        Mutation("a step of the shuffles", "range(3)", "range(2)", times=2),
    ),
    (
        "numflash.tiles.portable.softmax",
        Mutation(
            "a row of another lane", "FULL_WARP, x, distance", "FULL_WARP, x, distance ^ 8", 2
        ),
    ),
    ("numflash.tiles.portable.softmax", Mutation("the scale", "row_sum[r] *= row_scale", "pass")),
    (
        "numflash.tiles.portable.softmax",
        Mutation(
            "the guard of rows without keys", "new_max if new_max > NEG_INF else f32(0)", "new_max"
        ),
    ),
    (
        f"{PORTABLE}.forward",
        Mutation(
            "a barrier that one warp leaves out",
            "must have arrived.\n            cuda.syncthreads()",
            "\n            cuda.threadIdx.x >= 32 or cuda.syncthreads()",
        ),
    ),
    (
        "numflash.tiles.portable.copies",
        Mutation("rows past the end are loaded", "< valid_rows and", "< rows and"),
    ),
]


@pytest.mark.parametrize("family", CONFIGS)
def test_a_portable_kernel_is_right_for_every_seed(family, monkeypatch):
    factory = getattr(importlib.import_module(f"{PORTABLE}.{family}"), f"make_{family}_kernel")
    assert first_failure_of_kernel(family, factory, monkeypatch) is None


@pytest.mark.parametrize(("family", "fault"), barriers())
def test_no_barrier_can_be_left_out(family, fault, monkeypatch, record_property):
    factory = mutated_factory(family, f"{PORTABLE}.{family}", fault, monkeypatch)
    caught = first_failure_of_kernel(family, factory, monkeypatch)
    record_property("caught", caught)
    assert caught


@pytest.mark.parametrize(("module", "mutation"), FORWARD_MUTATIONS, ids=str)
def test_a_broken_forward_kernel_is_caught(module, mutation, monkeypatch, record_property):
    factory = mutated_factory("forward", module, mutation, monkeypatch)
    caught = first_failure_of_kernel("forward", factory, monkeypatch)
    record_property("caught", caught)
    assert caught


def test_a_mutation_whose_text_is_gone_fails():
    mutation = Mutation("renamed", "cuda.barrier_of_old()", "pass")
    with pytest.raises(AssertionError, match="stands 0 times"):
        mutation.apply(source_of(f"{PORTABLE}.forward"))
    with pytest.raises(AssertionError, match=r"there is no cuda\.syncthreads 99 of forward"):
        Dropped("forward", "cuda.syncthreads", 99).apply(source_of(f"{PORTABLE}.forward"))
