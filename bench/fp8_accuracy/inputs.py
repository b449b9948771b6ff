"""Inputs of the FP8 accuracy study: what q, k and v are, before they are rounded to float16.

outliers      FlashAttention-3's distribution, N(0, 1) + N(0, 100) Bernoulli(0.001) (arXiv
              2407.08608, section 4.3)
activations   one layer of a trained sentence encoder (`examples/data/README.md`)
sinks         N(0, 1), but the scores of the first 4 keys lie 8 to 12 above all others' mean, for
              every query, and their values are close to zero: attention sinks (arXiv 2309.17453)
"""

from dataclasses import dataclass

import numpy as np

from bench.records.checks import ROOT

ACTIVATIONS = ROOT / "examples" / "data" / "minilm_layer.npz"
PAPER_HEAD_DIM, PAPER_SEQLEN = 128, 8192
"""The paper names neither; at these, our errors are those of its table."""
OUTLIER_PROBABILITY, OUTLIER_DEVIATION = 1e-3, 10.0
SINK_GAPS = np.linspace(8.0, 12.0, 4)
"""The distance of each sink's score above the mean of the other keys' scores."""
_SINK_DEVIATION = 1e-4
# Of each query along its head's sinks, whose entries then deviate by 1 to 1.5 at head_dim 128.
_SINK_COMPONENT = 8.0


@dataclass(frozen=True)
class Input:
    """One input: which it is (see the module's docstring), and how much of it is measured.

    Attributes:
        name: "outliers", "activations" or "sinks".
        head_dim, seqlen: sizes of q, k and v.
        draws: how often it is drawn, independently; what shares a tensor is drawn together.
        batch, heads: of each draw.
        queries: the first ones of each head, which are measured; None for all.
    """

    name: str
    head_dim: int
    seqlen: int
    draws: int = 1
    batch: int = 1
    heads: int = 1
    queries: int | None = None

    def __str__(self) -> str:
        heads = self.draws * self.batch * self.heads
        return (
            f"{self.name}, head_dim {self.head_dim}: {heads} heads of {self.seqlen} keys, "
            f"{self.seqlen_q} queries of each"
        )

    @property
    def seqlen_q(self) -> int:
        """Queries of each head that are measured."""
        return self.seqlen if self.queries is None else min(self.queries, self.seqlen)

    def arrays(self, draw: int) -> list[np.ndarray]:
        """q, k, v: (batch, seqlen, heads, head_dim) float64; activations are float16 numbers."""
        if self.name == "activations":
            with np.load(ACTIVATIONS) as data:
                return [data[name].astype(np.float64) for name in "qkv"]
        generator = np.random.default_rng(draw)
        shape = self.batch, self.seqlen, self.heads, self.head_dim
        return {"outliers": _with_outliers, "sinks": _with_sinks}[self.name](generator, shape)


def activations() -> Input:
    """The trained encoder's layer."""
    with np.load(ACTIVATIONS) as data:
        batch, seqlen, heads, head_dim = data["q"].shape
    return Input("activations", head_dim, seqlen, batch=batch, heads=heads)


def _with_outliers(generator, shape):
    arrays = []
    for _ in range(3):
        x = generator.standard_normal(shape)
        outliers = generator.random(shape) < OUTLIER_PROBABILITY
        x[outliers] += OUTLIER_DEVIATION * generator.standard_normal(np.count_nonzero(outliers))
        arrays.append(x)
    return arrays


def _with_sinks(generator, shape):
    q, k, v = (generator.standard_normal(shape) for _ in range(3))
    _, _, heads, head_dim = shape
    direction = generator.standard_normal((heads, head_dim))
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    component = (q * direction).sum(-1, keepdims=True)
    q += (_SINK_COMPONENT - component) * direction
    lengths = SINK_GAPS * head_dim**0.5 / _SINK_COMPONENT
    k[:, : len(lengths)] = lengths[:, None, None] * direction
    v[:, : len(lengths)] *= _SINK_DEVIATION
    return [q, k, v]
