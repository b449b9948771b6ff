"""Small problems for kernels of gradients that are broken on purpose."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

import numflash
from numflash import reference
from numflash.api.comparison import compare, gradients_by_name
from numflash.calls import ready
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

    def is_solved(self, seed: int, monkeypatch) -> bool:
        """Whether the kernel's results are right; no other kernel of gradients runs."""
        monkeypatch.setattr(SEED, "value", seed)
        if self.blocks is not None:
            monkeypatch.setenv("NUMFLASH_SIM_BLOCKS", str(self.blocks))
        dout, q, k, v, *_ = self.given
        (family,) = self.configs
        options = {**self.options, "wrt": GRADIENTS[family]}
        ready._ready.clear()
        found = numflash.attention_backward(*self.given, config=self.configs, **options)
        got = dict(zip(gradients_by_name(options), found, strict=True))
        return compare(got, q, k, v, precision="float16", dout=dout, **options).passed


def first_failure(problems: dict[str, GradientProblem], monkeypatch) -> str | None:
    """The failure of the kernel, for the first of `attempts`; None if it solves all."""
    for name, seed in attempts(problems, lambda name: problems[name].seeds):
        try:
            if not problems[name].is_solved(seed, monkeypatch):
                return f"{name}: wrong result with seed {seed}"
        except (SimulationError, DeadlockError) as error:
            return f"{name}: {type(error).__name__} with seed {seed}: {error}"
    return None
