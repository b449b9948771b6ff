"""Lesson 9: the backward has no P, and makes it again."""

from dataclasses import dataclass

import numpy as np

import numflash

from ...drawing.axes import chart
from ...drawing.figures import Figure, Table, swatch
from ...drawing.markup import joined
from ...drawing.shapes import Bar, bars, boxes
from .lesson import Check, Lesson, Slip, Step
from .looking import PORTABLE, TENSOR_CORES, matrix, rows
from .matrices import named

_N, _D = 16, 8
_BATCH, _SEQLEN, _HEADS, _HEAD_DIM = 4, 4096, 16, 128
_MIB = 2**20
_CODE = """\
import numpy as np
import numflash

random = np.random.default_rng(1)
q, k = random.standard_normal((2, 1, 16, 1, 8)).astype("float32")
identity = np.eye(16, dtype="float32").reshape(1, 16, 1, 16)
p, lse = numflash.attention(q, k, identity, return_lse=True)
dq, dk, dv = numflash.attention_backward(identity, q, k, identity, p, lse)
print(abs(dv[0, :, 0].T - p[0, :, 0]).max())
"""


@dataclass(frozen=True)
class Rebuilt:
    """P by the forward and by the backward, and the largest difference."""

    forward: np.ndarray
    backward: np.ndarray

    @property
    def difference(self) -> float:
        """Of any two weights."""
        return float(np.abs(self.forward - self.backward).max())

    @property
    def same_bits(self) -> float:
        """The share of weights that are equal to the bit."""
        return float((self.forward == self.backward).mean())


def lesson() -> Lesson:
    """The backward from lse alone."""
    single = _rebuild(np.float32, PORTABLE)
    half = _rebuild(np.float16, TENSOR_CORES)
    stored = _BATCH * _HEADS * _SEQLEN**2 * 2
    kept = _BATCH * _HEADS * _SEQLEN * 4
    gradients = _difference_to_reference()
    shape = f"{_BATCH} x {_SEQLEN} x {_HEADS} x {_HEAD_DIM}"
    return Lesson(
        9,
        "Recomputation: the backward makes P again",
        "The gradient dV = Pᵀ dO needs P, and the forward threw it away. Where does the backward "
        "get it from?",
        (
            Step(
                "From one number a row",
                "The forward keeps lse, the logarithm of each row's sum. So the backward needs no "
                "maximum and no sum: it multiplies Q Kᵀ again and takes P = exp(S - lse), tile by "
                "tile.",
                "exact",
            ),
            Step(
                "See it happen",
                "With dO the identity, dV = Pᵀ dO is Pᵀ: the backward kernel hands out the P that "
                f"it made. Of {_N} queries and keys in float32 the largest difference to the "
                f"forward's P is {single.difference:.1e}, and {single.same_bits:.0%} of the "
                "weights are equal to the bit. In float16 on tensor cores it is "
                f"{half.difference:.1e}, and {half.same_bits:.0%} are equal. They "
                "need not be equal: exp(s - max) / sum and exp(s - lse) round differently.",
                "kernel",
                code=_CODE,
            ),
            Step(
                "What that saves",
                f"For a call of {shape} in 16 bits P has {stored // _MIB:,} MiB. lse has "
                f"{kept // _MIB} MiB, {stored // kept:,} times less. The price is one product in "
                "five: S once more, beside dV, dP, dQ and dK. Our backward of two kernels makes S "
                "and dP in both: seven products instead of five, and no atomic additions.",
                "counted",
            ),
        ),
        (
            Slip(
                "The backward stores P, or the mask of dropout.",
                "It stores neither. P is made from lse; the mask of dropout is drawn again, from "
                "the seed and the place of the score.",
            ),
            Slip(
                "The rebuilt P is bit for bit the forward's.",
                f"Only partly, {single.same_bits:.0%} here: it is the same number by another "
                "formula, and agrees to rounding.",
            ),
        ),
        (
            Check.close("P rebuilt in float32", single.backward, single.forward, 5e-7),
            Check.close("P rebuilt in float16", half.backward, half.forward, 1e-3),
            Check.close("Gradients against float64", gradients, 0.0, 1e-5),
            Check.equal("lse is smaller than P by seqlen / 2", stored // kept, _SEQLEN // 2),
        ),
        (_rebuilt_figure(single), _kept_figure(shape, stored, kept)),
    )


def _inputs(dtype) -> tuple[np.ndarray, ...]:
    q, k = np.random.default_rng(1).standard_normal((2, _N, _D))
    return rows(q, dtype), rows(k, dtype), rows(np.eye(_N), dtype)


def _rebuild(dtype, config: str) -> Rebuilt:
    q, k, v = _inputs(dtype)
    out, lse = numflash.attention(q, k, v, return_lse=True, config=config)
    _, _, dv = numflash.attention_backward(rows(np.eye(_N), dtype), q, k, v, out, lse)
    return Rebuilt(matrix(out), matrix(dv).T)


def _difference_to_reference() -> float:
    """The largest error of dQ, dK and dV against float64, dO random."""
    q, k, v = _inputs(np.float32)
    dout = rows(np.random.default_rng(2).standard_normal((_N, _N)))
    out, lse = numflash.attention(q, k, v, return_lse=True, config=PORTABLE)
    found = numflash.attention_backward(dout, q, k, v, out, lse)
    exact = _exact_gradients(*(matrix(x) for x in (q, k, v, dout)))
    return max(float(np.abs(matrix(f) - e).max()) for f, e in zip(found, exact, strict=True))


def _exact_gradients(q, k, v, dout) -> tuple[np.ndarray, ...]:
    """dQ, dK and dV by the textbook, from a stored P, in float64."""
    scale = q.shape[1] ** -0.5
    p = np.exp(scale * q @ k.T)
    p /= p.sum(1, keepdims=True)
    dp = dout @ v.T
    ds = p * (dp - (p * dp).sum(1, keepdims=True)) * scale
    return ds @ k, ds.T @ q, p.T @ dout


_STEP, _ROLES = 9.0, ("none", "held", "copy", "walk0")
_QUARTERS = ("below 1 / 64", "to 1 / 16", "to 1 / 4", "above")


def _rebuilt_figure(rebuilt: Rebuilt) -> Figure:
    parts, y = [], 24.0
    for x, name, p in ((8.0, "forward", rebuilt.forward), (186.0, "backward", rebuilt.backward)):
        parts.append(named(f"P of the {name}", x, y, _N, _STEP))
        kind = np.digitize(p, [1 / 64, 1 / 16, 1 / 4])
        for n, role in enumerate(_ROLES):
            found = [
                (x + _STEP * j, y + _STEP * i, _STEP - 1.5, _STEP - 1.5)
                for i, j in np.argwhere(kind == n)
            ]
            parts.append(boxes(found, role, f"weights {_QUARTERS[n]}"))
    swatches = map(swatch, _ROLES, _QUARTERS)
    return Figure(
        "The same P, made twice",
        joined([*swatches, "Rows are queries, columns keys."]),
        chart(
            "P of the forward and P that the backward made look the same; the largest difference "
            f"is {rebuilt.difference:.1e}.",
            *parts,
            height=y + _STEP * _N + 6,
        ),
        Table(
            ("query", "largest weight", "by the backward", "difference"),
            [
                (i, f"{f.max():.7f}", f"{b[f.argmax()]:.7f}", f"{np.abs(f - b).max():.1e}")
                for i, (f, b) in enumerate(zip(rebuilt.forward, rebuilt.backward, strict=True))
            ],
            range(4),
        ),
    )


def _kept_figure(shape: str, stored: int, kept: int) -> Figure:
    columns = 3 * _BATCH * _HEADS * _SEQLEN * _HEAD_DIM * 2
    found = [
        Bar("P, if it were kept", stored, f"{stored // _MIB:,} MiB", "exp"),
        Bar("Q, K and V", columns, f"{columns // _MIB:,} MiB", "s"),
        Bar("lse, which is kept", kept, f"{kept / _MIB:g} MiB", "pv"),
    ]
    return Figure(
        f"What a forward of {shape} would have to keep",
        joined(
            [
                swatch("exp", "not stored"),
                swatch("s", "inputs"),
                swatch("pv", "statistics."),
                "Logarithmic.",
            ]
        ),
        bars(
            f"P would take {stored // kept:,} times the memory of lse; the axis is logarithmic.",
            found,
            low=kept / 2,
        ),
        Table(("array", "MiB"), [(b.name, f"{b.value / _MIB:,.0f}") for b in found], (1,)),
    )
