"""Small problems for kernels of gradients that are broken on purpose.

Gradients are left in float32, whose stores take no shuffles, and each row's delta is computed once
for a problem: neither is what is broken.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

import numflash
from numflash import reference
from numflash.api.comparison import compare, gradients_by_name
from numflash.calls import ready
from numflash.calls.launch import SimulatedLaunch
from numflash.simulator import SEED
from numflash.simulator.errors import DeadlockError, SimulationError
from tests.support.faults import attempts

GRADIENTS = {"backward-dq": ("q",), "backward-dkdv": ("k", "v"), "backward": ("q", "k", "v")}
"""What a family's kernel makes: other kernels need not run."""


@dataclass(frozen=True)
class GradientProblem:
    """A problem in float16 for one family of kernels.

    Attributes:
        configs: the family's config.
        shape: seqlen_q, seqlen_k, heads of queries, head_dim; keys have one head.
        options: of the call.
        seeds: those with which faults are looked for.
        blocks: that run together; by default as the simulator has it.
        far: whether all scores are some -360, so that P of keys past the end would be infinite.
    """

    configs: dict
    shape: tuple[int, int, int, int]
    options: dict = field(default_factory=dict)
    seeds: range = range(8)
    blocks: int | None = None
    far: bool = False

    @cached_property
    def given(self) -> tuple:
        """dout, q, k, v, and out and lse, which no kernel with a fault has made."""
        seqlen_q, seqlen_k, heads, head_dim = self.shape
        rng = np.random.default_rng(0)
        shapes = [(1, n, h, head_dim) for n, h in ((seqlen_q, heads), *[(seqlen_k, 1)] * 2)]
        q, k, v = (rng.standard_normal(shape).astype(np.float16) for shape in shapes)
        if self.far:
            q, k = np.full_like(q, 8), np.full_like(k, -8)
        dout = rng.standard_normal(q.shape).astype(np.float16)
        out, lse = reference.attention(q, k, v, **self.options)
        return dout, q, k, v, out.astype(np.float16), lse.astype(np.float32)

    @cached_property
    def statistics(self) -> list[np.ndarray]:
        """For `remember_statistics`."""
        return []

    def is_solved(self, seed: int, monkeypatch) -> bool:
        """Whether the kernel's results are right; no other kernel of gradients runs."""
        monkeypatch.setattr(SEED, "value", seed)
        if self.blocks is not None:
            monkeypatch.setenv("NUMFLASH_SIM_BLOCKS", str(self.blocks))
        remember_statistics(self.statistics, monkeypatch)
        dout, q, k, v, *_ = self.given
        (family,) = self.configs
        options = {**self.options, "wrt": GRADIENTS[family]}
        ready._ready.clear()
        found = numflash.attention_backward(
            *self.given, config=self.configs, grad_dtype="float32", **options
        )
        got = dict(zip(gradients_by_name(options), found, strict=True))
        dtypes = dict.fromkeys(got, "float32")
        return compare(
            got, q, k, v, precision="float16", dtypes=dtypes, dout=dout, **options
        ).passed


_bind = SimulatedLaunch.bind


def remember_statistics(known: list[np.ndarray], monkeypatch) -> None:
    """Let the kernel of delta run only where `known` is empty; it is filled with what that gives.

    Args:
        known: delta and lse in base 2 of a problem.
        monkeypatch: what ends it.
    """

    def bind(self, operands):
        run = _bind(self, operands)
        if self.kernel.family != "delta":
            return run
        arrays = [operands[name].array for name in ("delta", "lse_log2")]

        def launch(stream):
            if not known:
                run(stream)
                known.extend(array.copy() for array in arrays)
            for array, value in zip(arrays, known, strict=True):
                array[...] = value

        return launch

    monkeypatch.setattr(SimulatedLaunch, "bind", bind)


def first_failure(problems: dict[str, GradientProblem], monkeypatch) -> str | None:
    """The failure of the kernel, for the first of `attempts`; None if it solves all."""
    for name, seed in attempts(problems, lambda name: problems[name].seeds):
        try:
            if not problems[name].is_solved(seed, monkeypatch):
                return f"{name}: wrong result with seed {seed}"
        except (SimulationError, DeadlockError, IndexError) as error:
            return f"{name}: {type(error).__name__} with seed {seed}: {error}"
    return None
