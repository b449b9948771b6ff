"""Lesson 10: eight bits and an outlier."""

import ml_dtypes
import numpy as np

import numflash
from numflash.configs.formats import FORMATS

from ...drawing.axes import chart
from ...drawing.figures import Figure, Table, swatch
from ...drawing.markup import joined
from ...drawing.shapes import Bar, bars, boxes
from .lesson import Check, Lesson, Slip, Step
from .looking import matrix, rows
from .matrices import named

_NUMBERS = np.array([0.0001, -0.0003, 0.001, 0.004, -0.02, 0.1, -0.6, 100.0], np.float32)
_PLAIN_END = 1.5
"""Takes the place of 100 in the tokens without an outlier."""
_TOKENS, _BLOCK = 32, 16
_ROWS, _CHANNEL, _FACTOR = 8, 5, 30.0
_CASES = {"in Q and K": "loud q", "in K alone": "q"}
"""Where a channel is loud -> the matrix that Q is; K is loud in both."""
_E4M3 = FORMATS["e4m3"]
_GRANULARITIES = ("tensor", "block", "token")


def lesson() -> Lesson:
    """FP8: one scale, who shares it, and rotation."""
    codes, descale = _quantized(_NUMBERS[None], "token")
    values = (_E4M3.decode(codes) * descale)[0, : len(_NUMBERS)]
    integers = _as_integers(_NUMBERS)
    zero = {g: _flushed(g) for g in _GRANULARITIES}
    matrices = _matrices()
    errors, scores = _errors(matrices), _scores(matrices, "loud q")
    q, k = (numflash.reference.rotate(matrices[name], 0) for name in ("loud q", "loud k"))
    turned = q @ k.T
    changed = float(np.abs(turned - scores).max() / np.abs(scores).max())
    gain = errors["in Q and K"]["tensor", False] / errors["in Q and K"]["tensor", True]
    alone = errors["in K alone"]["tensor", False] / errors["in K alone"]["tensor", True]
    lost, lost_integers = int((values == 0).sum()), int((integers == 0).sum())
    return Lesson(
        10,
        "Eight bits and one outlier",
        "One number of 100 among small ones: what happens to the others in eight bits?",
        (
            _numbers_step(
                codes, values, integers, float(descale.reshape(-1)[0]), lost, lost_integers
            ),
            Step(
                "Who shares the scale",
                f"{_TOKENS} tokens of 8 numbers; only the first token has the outlier. One scale "
                f"for the tensor turns {int(zero['tensor'].sum())} of {zero['tensor'].size} "
                f"numbers to 0. A scale for each block of {_BLOCK} tokens confines that to the "
                f"outlier's block, {int(zero['block'].sum())}. A scale for each token leaves "
                f"{int(zero['token'].sum())}: those beside the outlier.",
                "kernel",
            ),
            _rotation_step(errors, changed, gain, alone),
        ),
        (
            Slip(
                "The scale comes from (min, max), with a zero point.",
                "That is for integers. Floats are symmetric and have a 0: one number, "
                f"max |x| / {_E4M3.largest:g}, is enough. Ours is max |x| / {_E4M3.peak:g}: "
                "numbers just below the largest then lie where steps are half as wide.",
            ),
            Slip(
                "With an outlier all small numbers become 0.",
                f"In INT8 {lost_integers} of these 8 numbers do, in e4m3 only {lost}. A float "
                f"keeps its four binary digits down to {_normal()} of the largest number, and "
                f"something down to {_least()}.",
            ),
            Slip(
                "Rotation changes attention, or always helps.",
                "It changes no score, because (Q R)(K R)ᵀ = Q R Rᵀ Kᵀ. And it helps where Q and K "
                f"have their outliers in the same channel, {gain:.1f} times here; with an outlier "
                f"in K alone it makes {'little' if 0.7 < alone < 1.4 else 'some'} difference, a "
                f"factor of {alone:.2f}.",
            ),
        ),
        (
            Check.close("The scale", descale.reshape(-1)[0] * _E4M3.peak, 100.0, 1e-4),
            Check.equal("The outlier is exact", float(values[-1]), 100.0),
            Check(
                "Small floats survive where integers do not",
                lost < lost_integers,
                f"{lost} and {lost_integers} of 8 are 0",
            ),
            Check.equal(
                "Fewer zeros with smaller neighbourhoods",
                [int(zero[g].sum()) for g in _GRANULARITIES],
                [2 * _TOKENS, 2 * _BLOCK, 2],
            ),
            Check.close("Rotated scores are the scores", changed, 0.0, 1e-6),
            Check("Rotation helps where outliers meet", gain > 4, f"{gain:.1f} times"),
            Check("and does little where they do not", 0.7 < alone < 1.4, f"{alone:.2f} times"),
        ),
        (_zeros_figure(zero), _errors_figure(errors["in Q and K"])),
    )


def _quantized(x, granularity: str, hadamard: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, padded head_dim) codes by the kernel, and (tokens or fewer, 1) scales."""
    found = numflash.quantize_fp8(rows(x), granularity, _BLOCK, hadamard)
    return np.asarray(found.data).view(np.uint8)[0, :, 0], np.asarray(found.descale)[0, 0, :, None]


def _normal() -> str:
    """The smallest number with all digits, relative to the largest."""
    return f"2^{int(np.log2(float(ml_dtypes.finfo(_E4M3.dtype).smallest_normal) / _E4M3.peak))}"


def _least() -> str:
    """Half of the smallest number, which rounds to 0, relative to the largest."""
    smallest = float(ml_dtypes.finfo(_E4M3.dtype).smallest_subnormal)
    return f"2^{int(np.log2(smallest / 2 / _E4M3.peak))}"


def _as_integers(x: np.ndarray) -> np.ndarray:
    """In INT8, with one scale."""
    scale = np.abs(x).max() / 127
    return np.round(x / scale) * scale


def _numbers_step(codes, values, integers, descale, lost: int, lost_integers: int) -> Step:
    found = [
        (
            f"{x:g}",
            f"0x{code:02x}",
            f"{value + 0.0:.6g}",
            f"{abs(value / x - 1):.1%}",
            f"{integer + 0.0:.4g}",
        )
        for x, code, value, integer in zip(
            _NUMBERS, codes[0, : len(_NUMBERS)], values, integers, strict=True
        )
    ]
    return Step(
        "Eight numbers",
        f"The quantising kernel takes the largest, 100, and divides it by {_E4M3.peak:g}: the "
        f"scale is {descale:g}. Every number is divided by it and rounded to e4m3, which has "
        f"3 bits after the point. {lost} of 8 become 0; as 8-bit integers {lost_integers} "
        "would.",
        "kernel",
        Table(
            ("number", "code", "stands for", "error", "as INT8"),
            found,
            range(5),
            "Codes of the kernel",
        ),
    )


def _flushed(granularity: str) -> np.ndarray:
    """(tokens, 8): which numbers become 0."""
    x = np.tile(_NUMBERS, (_TOKENS, 1))
    x[1:, -1] = _PLAIN_END
    codes, _ = _quantized(x, granularity)
    return _E4M3.decode(codes)[:, : len(_NUMBERS)] == 0


def _matrices() -> dict[str, np.ndarray]:
    """Q as it is, and Q and K with a loud channel."""
    q, k = np.random.default_rng(3).standard_normal((2, _ROWS, 64)).astype(np.float32)
    loud = np.where(np.arange(64) == _CHANNEL, np.float32(_FACTOR), np.float32(1))
    return {"q": q, "loud q": q * loud, "loud k": k * loud}


def _errors(matrices: dict[str, np.ndarray]) -> dict[str, dict[tuple[str, bool], float]]:
    """Root of the mean square error of Q Kᵀ from codes, by (granularity, rotated)."""
    found = {name: {} for name in _CASES}
    for granularity in ("tensor", "token"):
        for hadamard in (False, True):
            coded = {n: _dequantized(x, granularity, hadamard) for n, x in matrices.items()}
            for name, q in _CASES.items():
                wrong = coded[q] @ coded["loud k"].T - _scores(matrices, q)
                found[name][granularity, hadamard] = float(np.sqrt((wrong**2).mean()))
    return found


def _scores(matrices: dict[str, np.ndarray], q: str) -> np.ndarray:
    return matrices[q].astype(float) @ matrices["loud k"].T.astype(float)


def _dequantized(x, granularity: str, hadamard: bool) -> np.ndarray:
    found = numflash.quantize_fp8(rows(x), granularity, _BLOCK, hadamard)
    return matrix(
        numflash.reference.dequantize_fp8(
            np.asarray(found.data).view(np.uint8), found.descale, x.shape[1], 1, hadamard
        )
    )


def _rotation_step(errors: dict, changed: float, gain: float, alone: float) -> Step:
    return Step(
        "Rotation",
        "Multiply the rows of Q and K by one random orthogonal matrix R, and no score changes "
        f"({changed:.0e} of the largest, by rounding), but a loud channel is spread over all 64. "
        f"Take a channel that is {_FACTOR:g} times as loud. Where it is loud in Q and K, their "
        "product is huge and so is its rounding error; spread out it is "
        f"{gain:.1f} times smaller. Where it is loud in K alone, rotation gains nothing "
        f"(a factor of {alone:.2f}). And look at the scales per token: there the loud number is "
        "the largest of its row, gets the code of 256 and has no error at all, so rotation makes "
        "it worse.",
        "kernel",
        Table(
            ("loud channel", "scale per", "plain", "rotated"),
            [
                (case, g, f"{found[g, False]:.3g}", f"{found[g, True]:.3g}")
                for case, found in errors.items()
                for g in ("tensor", "token")
            ],
            (2, 3),
            "Root of the mean square error of a score",
        ),
    )


_SIDE, _PITCH = 8.0, 5.4


def _zeros_figure(zero: dict[str, np.ndarray]) -> Figure:
    x, y, kept, lost, names = 14.0, 24.0, [], [], []
    for granularity, found in zero.items():
        names.append(named(f"per {granularity}", x, y, 8, _SIDE + 2))
        for (i, j), is_zero in np.ndenumerate(found):
            box = (x + (_SIDE + 2) * j, y + _PITCH * i, _SIDE, _PITCH - 1.4)
            (lost if is_zero else kept).append(box)
        x += 8 * (_SIDE + 2) + 36
    counts = {g: int(found.sum()) for g, found in zero.items()}
    said = ", ".join(f"{n} with a scale per {g}" for g, n in counts.items())
    return Figure(
        "Numbers that become 0",
        joined(
            [
                swatch("exp", "0"),
                swatch("held", "kept."),
                f"A row is one of {_TOKENS} tokens; the first holds the outlier.",
            ]
        ),
        chart(
            f"Numbers that become 0: {said}.",
            *names,
            boxes(kept, "held", "kept"),
            boxes(lost, "exp", "becomes 0"),
            height=y + _PITCH * _TOKENS + 8,
        ),
        Table(("scale per", "numbers that become 0"), list(counts.items()), (1,)),
    )


def _errors_figure(errors: dict[tuple[str, bool], float]) -> Figure:
    found = [
        Bar(
            f"per {g}{', rotated' if turned else ''}",
            error,
            f"{error:.3g}",
            "pv" if turned else "s",
        )
        for (g, turned), error in errors.items()
    ]
    best = min(errors, key=errors.get)
    return Figure(
        "Error of a score, loud channel in Q and K",
        joined([swatch("s", "as it is"), swatch("pv", "rotated."), "Logarithmic."]),
        bars(
            f"The smallest error is that of a scale per {best[0]}"
            f"{', rotated' if best[1] else ', not rotated'}.",
            found,
            low=min(errors.values()) / 2,
        ),
        Table(("scale per", "error"), [(b.name, b.shown) for b in found], (1,)),
    )
