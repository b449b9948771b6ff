"""Attention problems with bias, masks and functions: what is asked for, on which kernel.

A program of a user is one of `PROGRAMS`: how it reads arrays and what it makes of scores. It meets
features, bands and kernels; `tests/sim/test_functions.py` takes a covering set of these.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, product
from typing import NamedTuple

import ml_dtypes
import numpy as np

from numflash import masks
from numflash.functions.math import exp, log, maximum, where
from numflash.runtime.views import numpy_dtype
from tests.support.attention_cases import SMALL_CONFIGS
from tests.support.covering import ALL, covering


class Sizes(NamedTuple):
    """Of a problem."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int

    @property
    def scores(self) -> tuple[int, int, int, int]:
        """The shape of its scores."""
        return self.batch, self.heads_q, self.seqlen_q, self.seqlen_k


def _normal(rng, shape, dtype):
    return rng.standard_normal(shape).astype(dtype)


def _amid_nan(x: np.ndarray) -> np.ndarray:
    """The same values with others, which are NaN, between and around them on every axis."""
    room = np.full([2 * n + 3 for n in x.shape], np.nan, x.dtype)
    view = room[tuple(slice(1, 2 * n + 1, 2) for n in x.shape)]
    view[...] = x
    return view


def _backwards(x: np.ndarray) -> np.ndarray:
    """The same values, each axis with a negative stride."""
    turn = (slice(None, None, -1),) * x.ndim
    return np.ascontiguousarray(x[turn])[turn]


def _kept(rng, shape, part=0.7):
    return rng.random(shape) < part


def _relative(score, b, h, i, j, table):
    return score + table[h, i - j + table.shape[1] // 2]


def _gated(score, b, h, i, j, gate, offset):
    return score * gate[b, h] + offset[0, j]


def _numbers(score, b, h, i, j, scale, first):
    return where(j < first, score * scale, score)


def _bent(score, b, h, i, j):
    return masks.soft_cap(2.0)(score, b, h, i, j) - 0.125 * exp(-abs(score))


def _logarithm(score, b, h, i, j):
    return log(maximum(score, 0.0))


def _holes(b, h, i, j):
    return (3 * i + j + h) % 5 != 0


def _by_batch_and_head(score, b, h, i, j):
    return score + 0.25 * h - 0.5 * b * ((i + j) % 2)


def _same(b, h, i, j, of_queries, of_keys):
    return of_queries[b, i] == of_keys[j]


def _flags(b, h, i, j, flags):
    return flags[j] & (i != j)


def _all_of_it(score, b, h, i, j, table, scale, documents):
    return _relative(score, b, h, i, j, table) * scale


def _in_its_document(b, h, i, j, table, scale, documents):
    return documents[j] != (i % 3)


def _table(rng, n: Sizes, dtype=np.float32):
    return _normal(rng, (n.heads_q, 2 * max(n.seqlen_q, n.seqlen_k)), dtype)


def _documents(rng, count, shape, dtype):
    return rng.integers(0, count, shape).astype(dtype)


# name -> (its kind, (rng, sizes) -> options)
PROGRAMS: dict[str, tuple[str, Callable]] = {
    "bias-float16": ("bias", lambda r, n: {"bias": _normal(r, n.scores, "f2")}),
    "bias-bfloat16-heads": (
        "bias",
        lambda r, n: {"bias": _amid_nan(_normal(r, (1, *n.scores[1:]), ml_dtypes.bfloat16))},
    ),
    "bias-float32-keys": (
        "bias",
        lambda r, n: {"bias": _normal(r, (n.batch, 1, 1, n.seqlen_k), "f4")},
    ),
    "bias-backwards": ("bias", lambda r, n: {"bias": _backwards(_normal(r, n.scores[2:], "f4"))}),
    "bias-stride-0": (
        "bias",
        lambda r, n: {"bias": np.broadcast_to(_normal(r, (n.seqlen_q, 1), "f2"), n.scores)},
    ),
    "bias-transposed": (
        "bias",
        lambda r, n: {"bias": _normal(r, n.scores[::-1], ml_dtypes.bfloat16).transpose()},
    ),
    "bias-infinite": (
        "bias",
        lambda r, n: {"bias": np.where(_kept(r, n.scores), 0.5, -np.inf).astype("f2")},
    ),
    "mask": ("mask", lambda r, n: {"mask": _kept(r, n.scores)}),
    "mask-2d": ("mask", lambda r, n: {"mask": _backwards(_kept(r, n.scores[2:]))}),
    "mask-keys": ("mask", lambda r, n: {"mask": _kept(r, (n.batch, 1, 1, n.seqlen_k))}),
    "mask-few": ("mask", lambda r, n: {"mask": _kept(r, n.scores[1:], 0.06)}),
    "table": ("score_mod", lambda r, n: {"score_mod": _relative, "aux": (_table(r, n),)}),
    "gate": (
        "score_mod",
        lambda r, n: {
            "score_mod": _gated,
            "aux": (
                _normal(r, (n.batch, n.heads_q), ml_dtypes.bfloat16),
                _amid_nan(_normal(r, (1, n.seqlen_k), "f2")),
            ),
        },
    ),
    "numbers": ("score_mod", lambda r, n: {"score_mod": _numbers, "aux": (0.5, np.int64(7))}),
    "bent": ("score_mod", lambda r, n: {"score_mod": _bent}),
    "logarithm": ("score_mod", lambda r, n: {"score_mod": _logarithm}),
    "places": ("score_mod", lambda r, n: {"score_mod": _by_batch_and_head}),
    "causal": ("mask_mod", lambda r, n: {"mask_mod": masks.causal}),
    "holes": ("mask_mod", lambda r, n: {"mask_mod": _holes}),
    "documents": (
        "mask_mod",
        lambda r, n: {
            "mask_mod": _same,
            "aux": (
                _documents(r, 3, (n.batch, n.seqlen_q), "i4"),
                _documents(r, 3, n.seqlen_k, "i8"),
            ),
        },
    ),
    "bytes": (
        "mask_mod",
        lambda r, n: {
            "mask_mod": _same,
            "aux": (
                _documents(r, 2, (n.batch, n.seqlen_q), "u1"),
                _backwards(_documents(r, 2, n.seqlen_k, "u1")),
            ),
        },
    ),
    "flags": ("mask_mod", lambda r, n: {"mask_mod": _flags, "aux": (_kept(r, n.seqlen_k),)}),
    "all": (
        "all",
        lambda r, n: {
            "bias": _normal(r, (n.heads_q, 1, n.seqlen_k), "f2"),
            "mask": _kept(r, n.scores, 0.8),
            "score_mod": _all_of_it,
            "mask_mod": _in_its_document,
            "aux": (_table(r, n, "f2"), 0.75, _documents(r, 3, n.seqlen_k, "u1")),
        },
    ),
}

OF_KEYS_ALONE = {"bias-float32-keys", "mask-keys", "numbers", "bent", "logarithm"}
"""Programs that do not look at heads and queries: only these allow packed heads."""

FEATURES = {
    "none": lambda n: {},
    "softcap": lambda n: {"softcap": 2.0},
    "alibi": lambda n: {"alibi_slopes": (2.0 ** -np.arange(1, n.heads_q + 1)).astype("f4")},
    "sinks": lambda n: {"sinks": np.linspace(-1, 2, n.heads_q).astype("f4")},
}
BANDS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (9, 4)},
    "shift": {"causal": True, "shift": -3},
}


class Place(NamedTuple):
    """Where a case runs.

    Attributes:
        arch: the simulated GPU.
        dtypes: of q, k and v.
        sizes: of problems, with several tiles both ways where that costs little.
        configs: which take turns.
        options: that lead there.
        cost: of a case, in seconds.
    """

    arch: str
    dtypes: tuple[str, ...]
    sizes: tuple[Sizes, ...]
    configs: tuple[dict, ...]
    options: dict
    cost: float


_SMALL = (Sizes(1, 17, 20, 2, 1, 16, 16), Sizes(2, 9, 17, 1, 1, 16, 24))
_WIDE = (Sizes(1, 17, 40, 2, 1, 32, 32), Sizes(2, 9, 70, 1, 1, 32, 48))
_PACKED = {
    "sm80": {"forward": "sm80-m16n16w1s1-packed", "backward": "sm80-m16n16w1s1"},
    "sm90": {"forward": "sm90-m64n32w4s1x2-packed-overlap"},
}
# Both of dQ and of dK, dV: one stage and several, one warpgroup and two.
_HOPPER_BACKWARD = (
    {
        "forward": "sm90-m64n32w4s1",
        "backward-dq": "sm90-m64n32w4s2",
        "backward-dkdv": "sm90-m32n64w4s2",
    },
    {
        "forward": "sm90-m64n32w4s1",
        "backward-dq": "sm90-m128n16w8s1",
        "backward-dkdv": "sm90-m64n64w4s1",
    },
    {
        "forward": "sm90-m64n32w4s1",
        "backward-dq": "sm90-m64n64w4s1",
        "backward-dkdv": "sm90-m32n128w8s3",
    },
    {"forward": "sm90-m64n32w4s1", "backward": "sm90-m64n64w4s1"},
    {
        "forward": "sm90-m64n32w4s1",
        "backward-dq": "sm90-m64n16w4s3",
        "backward-dkdv": "sm90-m32n64w8s2-roles",
    },
)
PLACES = {
    "portable": Place(
        "sm_80",
        ("float32", "float16"),
        (Sizes(1, 17, 18, 2, 1, 8, 8),),
        SMALL_CONFIGS["portable"][1:],
        {},
        1.7,
    ),
    "sm80": Place(
        "sm_80",
        ("float16", "bfloat16"),
        _SMALL,
        (*SMALL_CONFIGS["sm80"], _PACKED["sm80"]),
        {},
        1.0,
    ),
    "sm75": Place("sm_75", ("float16",), _SMALL, SMALL_CONFIGS["sm75"], {}, 1.2),
    "tf32": Place(
        "sm_80", ("float32",), _SMALL, SMALL_CONFIGS["tf32"], {"precision": "tf32"}, 1.2
    ),
    "sm90": Place(
        "sm_90a",
        ("float16", "bfloat16"),
        _WIDE,
        (*SMALL_CONFIGS["sm90"], _PACKED["sm90"]),
        {},
        0.6,
    ),
    "sm90-backward": Place(
        "sm_90a",
        ("float16", "bfloat16"),
        _WIDE,
        _HOPPER_BACKWARD,
        {},
        3.0,
    ),
    "fp8": Place(
        "sm_89",
        ("float16", "bfloat16"),
        _WIDE,
        ({"forward": "fp8-sm89-m16n64w1s1"}, {"forward": "fp8-sm89-m32n64w2s2"}),
        {"precision": "fp8"},
        0.6,
    ),
    "fp8-sm75": Place(
        "sm_75",
        ("float16",),
        _WIDE,
        ({"forward": "fp8-sm75-m32n32w2s1"},),
        {"precision": "fp8"},
        0.6,
    ),
    "fp8-sm90": Place(
        "sm_90a",
        ("float16", "bfloat16"),
        _WIDE,
        ({"forward": "fp8-sm90-m64n64w4s2x2-packed"}, {"forward": "fp8-sm90-m64n64w4s2"}),
        {"precision": "fp8"},
        0.6,
    ),
}


@dataclass(frozen=True)
class FunctionCase:
    """A program with a feature and a band on a kernel; `turn` chooses among what takes turns."""

    place: str
    program: str
    feature: str
    band: str
    turn: int

    def __str__(self) -> str:
        return "-".join((self.place, self.program, self.feature, self.band, str(self.turn)))

    @property
    def sizes(self) -> Sizes:
        """Of the problem."""
        sizes = PLACES[self.place].sizes
        return sizes[self.turn % len(sizes)]

    @property
    def config(self) -> dict:
        """Of the kernels, by family. Heads that a program tells apart are not packed."""
        configs = PLACES[self.place].configs
        if self.feature == "alibi" or self.program not in OF_KEYS_ALONE:
            configs = [each for each in configs if "-packed" not in each["forward"]]
        return configs[self.turn % len(configs)]

    def arrays(self, rng) -> dict[str, np.ndarray]:
        """q, k, v and dout; the latter only where there are gradients."""
        n, place = self.sizes, PLACES[self.place]
        dtype = numpy_dtype(place.dtypes[self.turn % len(place.dtypes)])
        shapes = {
            "q": (n.batch, n.seqlen_q, n.heads_q, n.head_dim),
            "k": (n.batch, n.seqlen_k, n.heads_kv, n.head_dim),
            "v": (n.batch, n.seqlen_k, n.heads_kv, n.head_dim_v),
            "dout": (n.batch, n.seqlen_q, n.heads_q, n.head_dim_v),
        }
        if "backward" not in "".join(self.config):
            del shapes["dout"]
        return {name: _normal(rng, shape, dtype) for name, shape in shapes.items()}

    def options(self, rng) -> dict:
        """Of `numflash.check`."""
        n = self.sizes
        return {
            "config": self.config,
            **PLACES[self.place].options,
            **BANDS[self.band],
            **FEATURES[self.feature](n),
            **PROGRAMS[self.program][1](rng, n),
        }


# Kernels that share all but instructions take turns.
_GROUPS = (
    ("portable",),
    ("sm80",),
    ("sm75", "tf32"),
    ("sm90",),
    ("sm90-backward",),
    ("fp8", "fp8-sm75"),
    ("fp8-sm90",),
)


def some_cases() -> list[FunctionCase]:
    """Of all programs with all features, bands and kernels some.

    Each kind of program meets each group of kernels, each feature and band, and these each other;
    and each program is there with gradients. Where not all tests run each kind, group, feature and
    band is there. What takes turns does so from case to case.
    """
    axes = product(_GROUPS, PROGRAMS, FEATURES, BANDS)
    table = list(axes)

    def labels(row):
        places, program, feature, band = row
        return places, PROGRAMS[program][0], feature, band

    chosen = covering(table, labels, 2 if ALL else 1, cost=lambda row: PLACES[row[0][0]].cost)
    there = {(places, program) for places, program, *_ in chosen}
    others = cycle(product(FEATURES, BANDS))
    for program in PROGRAMS if ALL else ():
        if (("sm80",), program) not in there:
            chosen.append((("sm80",), program, *next(others)))
    return [
        FunctionCase(places[turn % len(places)], *rest, turn)
        for turn, (places, *rest) in enumerate(chosen)
    ]
