"""Functions of scores as users write them, for tests of the derivative and of emitted code."""

import math

import numpy as np

from numflash import masks
from numflash import math as nm

RNG = np.random.default_rng(7)
HEADS, LENGTH = 3, 13
SLOPES = np.array([0.5, 0.25, 0.125], np.float32)
DOCUMENTS = np.repeat(np.arange(4), 4)[:LENGTH].astype(np.int32)
TABLE = RNG.standard_normal((32, HEADS)).astype(np.float32)
BIAS = RNG.standard_normal((2, 1, LENGTH, LENGTH)).astype(np.float16)
FLAGS = RNG.integers(0, 2, (HEADS, LENGTH)).astype(np.bool_)
BYTES = RNG.integers(0, 255, LENGTH).astype(np.uint8)
LONG = RNG.integers(-5, 5, LENGTH).astype(np.int64)


def leaky(s, b, h, q, k):
    return nm.maximum(s, 0.1 * s) + nm.minimum(s, 1.5)


def polynomial(s, b, h, q, k):
    return sum(0.1 * n * s**n for n in range(1, 5))


def normal(s, b, h, q, k):
    return s * s / 2 + nm.log(2 * math.pi) / 2


def gaussian_window(s, b, h, q, k, width):
    distance = (q - k) / width
    return s - distance * distance


def mish(s, b, h, q, k):
    return s * nm.tanh(nm.log(1 + nm.exp(s)))


def wave(s, b, h, q, k):
    angle = 0.1 * (q - k)
    return s * nm.cos(angle) + nm.sin(angle) * nm.sin(s)


SCORES = {
    "softcap": (masks.soft_cap(20.0), ()),
    "softcap of a number": (lambda s, b, h, q, k, c: c * nm.tanh(s / c), (5.0,)),
    "alibi": (masks.alibi, (SLOPES,)),
    "T5": (masks.relative_position(), (TABLE,)),
    "squared": (lambda s, b, h, q, k: s * s, ()),
    "checkerboard": (lambda s, b, h, q, k: nm.where((q + k) % 2 == 0, s, s * 0.5), ()),
    "documents": (lambda s, b, h, q, k, d: nm.where(d[q] == d[k], s, -math.inf), (DOCUMENTS,)),
    "leaky": (leaky, ()),
    "log over sqrt": (lambda s, b, h, q, k: nm.log(1 + abs(s)) / nm.sqrt(1 + s**2), ()),
    "gate": (lambda s, b, h, q, k: s * nm.sigmoid(2 * s) - nm.exp(-s * s) + 1 / (1 + s**4), ()),
    "trigonometry": (lambda s, b, h, q, k: nm.sin(s) * nm.cos(0.5 * s), ()),
    "powers": (lambda s, b, h, q, k: (s * s + 1) ** 0.37 + 2.0**s + (s * s + 1) ** -1.5, ()),
    "guarded log": (lambda s, b, h, q, k: nm.where(s > 0, nm.log(s), s - 1), ()),
    "causal window": (
        lambda s, b, h, q, k: nm.where((k <= q) & (q - k < 9), s * (1 + h) / 2, -1e30),
        (),
    ),
    "polynomial": (polynomial, ()),
    "normal": (normal, ()),
    "width by number": (gaussian_window, (3.5,)),
    "mish": (mish, ()),
    "wave": (wave, ()),
    "bias": (lambda s, b, h, q, k, x: s + x[b, 0, q, k], (BIAS,)),
    "flags": (lambda s, b, h, q, k, x: nm.where(x[h, k], 2 * s, s), (FLAGS,)),
    "bytes": (lambda s, b, h, q, k, x, y: s * (x[q] % 7) + y[k], (BYTES, LONG)),
    "rsqrt": (lambda s, b, h, q, k: s * nm.rsqrt(1 + s * s), ()),
    "log2, exp2": (lambda s, b, h, q, k: nm.log2(1 + nm.exp2(s)), ()),
    "floor": (lambda s, b, h, q, k: s - 0.25 * nm.floor(s), ()),
    "division": (lambda s, b, h, q, k: (s + q) / (2 + nm.exp(-s) + k), ()),
    "of a float index": (lambda s, b, h, q, k, t: s * t[(k - q) % 5, h], (TABLE,)),
    "whole arithmetic": (
        lambda s, b, h, q, k: (
            s * ((k - q) // 3) + ((q * 5 - k) % 7) - (q ^ k) + (q << 1) - (k >> 1)
        ),
        (),
    ),
    "number of keys a group": (lambda s, b, h, q, k, n: s + k // n - (q - k) % n, (np.int32(4),)),
    "clipped": (lambda s, b, h, q, k: np.clip(s, -1.25, 1.75) + nm.abs(s - 0.3), ()),
    "numpy's": (lambda s, b, h, q, k: np.where(q >= k, np.tanh(s) * np.exp(-s), np.square(s)), ()),
    "power by index": (lambda s, b, h, q, k: (s * s + 0.5) ** (h + 1) / 4.0, ()),
}
"""Name -> (function, its arrays and numbers)."""
