"""Calls whose sequences have lengths of their own, on every kernel that takes them: a table.

A case is a kernel, the lengths, the form in which they are given, and an option. All that no
sequence has is NaN: padding, and what lies between sequences.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle, product

import ml_dtypes
import numpy as np

from numflash.functions.math import where
from tests.support.covering import covering
from tests.support.sequence_cases import cumulative, ints

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
PORTABLE = {"forward": "m16n16w2", "backward-dq": "m16n16w2", "backward-dkdv": "m16n16w2"}
KERNELS = {
    "portable": ("float32", "sm_80", PORTABLE),
    "portable-small": (
        "float16",
        "sm_75",
        {"forward": "m16n8w2", "backward-dq": "m8n8w1", "backward-dkdv": "m16n8w1"},
    ),
    "sm80": (
        "float16",
        "sm_80",
        {
            "forward": "sm80-m32n16w2s2",
            "backward-dq": "sm80-m16n16w1s1",
            "backward-dkdv": "sm80-m16n32w2s2",
        },
    ),
    "sm80-stages": (
        "bfloat16",
        "sm_80",
        {
            "forward": "sm80-m16n16w1s3x2",
            "combine": "w2",
            "backward-dq": "sm80-m16n32w1s3",
            "backward-dkdv": "sm80-m16n32w1s3-apart",
        },
    ),
    "sm75": (
        "float16",
        "sm_75",
        {
            "forward": "sm75-m32n16w2s1",
            "backward-dq": "sm75-m16n16w1s1",
            "backward-dkdv": "sm75-m16n16w1s1-apart",
        },
    ),
    "tf32": (
        "float32",
        "sm_80",
        {
            "forward": "sm80-m16n16w1s1",
            "backward-dq": "sm80-m16n16w1s2",
            "backward-dkdv": "sm80-m16n16w1s1",
        },
    ),
}
"""Name -> (dtype, GPU, configs)."""
HOPPER = (
    "bfloat16",
    "sm_90a",
    {
        "forward": "sm90-m64n32w4s2-overlap-persistent",
        "backward-dq": "sm90-m64n16w4s2",
        "backward-dkdv": "sm90-m32n64w4s2",
    },
)
"""As a row of `KERNELS`: `test_hopper_ragged`, `test_hopper_backward_ragged` have its masks."""

LENGTHS = {
    "uneven": ([3, 0, 19, 1], [9, 4, 34, 0]),
    "more queries than keys": ([18, 2, 3], [5, 20, 0]),
    "decoding": ([1, 1, 0, 1], [9, 0, 40, 17]),
    "all empty but one": ([0, 0, 19, 0], [0, 0, 23, 3]),
    "whole tiles": ([16, 16], [32, 16]),
}
"""Name -> (queries, keys) of each sequence."""

FORMS = (
    "packed",
    "packed, starts and lengths",
    "packed, parts",
    "padded",
    "padded, starts",
    "padded, keys only",
    "padded bhsd",
)


STRIDED = "packed, parts", "padded, starts"
"""Forms whose arrays are views of larger ones, with gaps along every axis."""


def _amid_nan(x: np.ndarray) -> np.ndarray:
    """The same values as a view into a larger array of NaN."""
    *batch, rows, heads, head_dim = x.shape
    whole = np.full((*batch, 2 * rows + 2, heads + 1, head_dim + 16), np.nan, x.dtype)
    view = whole[..., 1 : 2 * rows + 1 : 2, :heads, 8 : 8 + head_dim]
    view[...] = x
    return view


def _scaled(score, b, h, i, j, table):
    return score * (1 + 0.25 * b) + table[(i - j) % 5]


def _striped(b, h, i, j):
    return (i + j + b) % 3 != 0


def _after(b, h, i, j, first):
    return where(i < 3, j < first, True)


def _of_shape(values: Callable[[np.ndarray], np.ndarray], *axes: str):
    """An array of these axes: (sizes) -> array."""

    def make(sizes):
        shape = tuple(sizes[axis] if axis else 1 for axis in axes)
        return values(np.arange(np.prod(shape))).reshape(shape).astype(np.float32)

    return make


OPTIONS: dict[str, dict] = {
    "causal": {"causal": True},
    "full": {},
    "causal top left": {"causal": True, "causal_align": "top_left"},
    "window": {"window_size": (9, 4)},
    "window, shifted, top left": {
        "window_size": (3, 9),
        "shift": 7,
        "causal_align": "top_left",
    },
    "causal, shifted": {"causal": True, "shift": -4},
    "softcap": {"softcap": 1.5, "causal": True},
    "scale": {"softmax_scale": 0.3},
    "alibi": {"alibi_slopes": _of_shape(lambda i: 2.0 ** -(i + 1), "heads")},
    "alibi by sequence": {
        "alibi_slopes": _of_shape(lambda i: 2.0 ** -(i % 5 + 1), "entries", "heads"),
        "causal": True,
    },
    "sinks": {"sinks": _of_shape(lambda i: 3.0 * i - 2, "heads"), "causal": True},
    "dropout": {"dropout_p": 0.3, "seed": 7, "causal": True},
    "dropout, seed in an array": {"dropout_p": 0.5, "seed": np.array([2**40 + 1])},
    "score_mod": {"score_mod": _scaled, "aux": (np.linspace(-1, 1, 5, dtype=np.float32),)},
    "mask_mod": {"mask_mod": _striped, "causal": True},
    "score_mod and mask_mod": {
        "score_mod": lambda s, b, h, i, j, first: where(j > i, s * 0.5, s) + 0.1 * h,
        "mask_mod": _after,
        "aux": (4,),
    },
    "bias": {"bias": _of_shape(np.sin, "entries", "", "q", "k")},
    "bias of keys": {"bias": _of_shape(np.sin, "heads", "", "k"), "causal": True},
    "mask": {"mask": _of_shape(lambda i: i % 3, "entries", "heads", "q", "k")},
    # A sequence that is longer than the bias is cut to it.
    "bias of the longest": {"bias": _of_shape(np.sin, "entries", "heads", "longest q", "k")},
    "mask of few keys": {"mask": _of_shape(lambda i: i % 3, "few q", "few k")},
    "gradient of alibi": {
        "alibi_slopes": _of_shape(lambda i: 2.0 ** -(i + 1), "heads"),
        "wrt": ("alibi_slopes", "k"),
        "causal": True,
    },
    "gradients of what scores read": {
        "bias": _of_shape(np.sin, "entries", "", "longest q", "longest k"),
        "score_mod": _scaled,
        "aux": (np.linspace(-1, 1, 5, dtype=np.float32),),
        "wrt": ("bias", "aux0", "q"),
    },
    "lse and delta": {"dlse": True, "causal": True},
    "results in float32": {"grad_dtype": "float32", "out_dtype": "float32", "causal": True},
}
"""Name -> options; functions make arrays of the sizes of a call."""
OF_EACH_KIND = (
    "causal top left",
    "window, shifted, top left",
    "alibi by sequence",
    "sinks",
    "dropout",
    "score_mod and mask_mod",
    "bias",
    "lse and delta",
    "gradient of alibi",
    "gradients of what scores read",
)
"""Options whose code portable kernels and those of tensor cores do not share."""


@dataclass(frozen=True)
class VarlenCase:
    """A call.

    Attributes:
        kernel, lengths, form, option: keys of the tables; a kernel may also be "sm90".
        sizes: heads of q, heads of k and v, head_dim, head_dim_v.
    """

    kernel: str
    lengths: str
    form: str
    option: str
    sizes: tuple[int, int, int, int] = (2, 1, 16, 16)

    def __str__(self):
        return "-".join((self.kernel, self.lengths, self.form, self.option)).replace(", ", "-")

    @property
    def arch(self) -> str:
        return self._row[1]

    @property
    def _row(self) -> tuple[str, str, dict[str, str]]:
        return HOPPER if self.kernel == "sm90" else KERNELS[self.kernel]

    def arguments(self, rng) -> tuple[list[np.ndarray], dict]:
        """([q, k, v, dout], options of `numflash.check`)."""
        name, _, configs = self._row
        heads, heads_kv, d, dv = self.sizes
        lengths = [np.array(x, int) for x in LENGTHS[self.lengths]]
        starts, bounds, given = _placed(self.form, lengths)
        padded = self.form.startswith("padded")
        arrays = []
        for side, n, dim in ((0, heads, d), (1, heads_kv, d), (1, heads_kv, dv), (0, heads, dv)):
            batch = (len(lengths[0]),) if padded else ()
            x = np.full((*batch, bounds[side], n, dim), np.nan, DTYPES[name])
            for entry, (start, length) in enumerate(zip(starts[side], lengths[side], strict=True)):
                at = (entry,) * padded + (slice(start, start + length),)
                x[at] = rng.standard_normal(x[at].shape)
            if self.form in STRIDED:
                x = _amid_nan(x)
            arrays.append(np.swapaxes(x, 1, 2) if "bhsd" in self.form else x)
        sizes = {"heads": heads, "entries": len(lengths[0])}
        sizes |= {"q": bounds[0], "k": bounds[1], "longest q": bounds[0], "longest k": bounds[1]}
        sizes |= {"few q": bounds[0], "few k": bounds[1]}
        if not padded:
            longest = [int(max(of_side)) for of_side in lengths]
            sizes |= {"longest q": longest[0], "longest k": longest[1], "few q": 16, "few k": 16}
        options = {
            name: value(sizes) if callable(value) and not name.endswith("mod") else value
            for name, value in OPTIONS[self.option].items()
        }
        if "mask" in options:
            options["mask"] = options["mask"] != 0
        if "dlse" in options:
            batch = (len(lengths[0]),) if padded else ()
            dlse = rng.standard_normal((*batch, heads, bounds[0])).astype("f4")
            nobodys = np.isnan(arrays[0].astype("f4")).all(-1)
            is_heads_first = "bhsd" in self.form
            dlse[nobodys if is_heads_first else np.swapaxes(nobodys, -1, -2)] = np.nan
            options["dlse"] = dlse
        if self.kernel == "tf32":
            options["precision"] = "tf32"
        if name == "float32":
            options = {n: x for n, x in options.items() if "dtype" not in n}
        return arrays, {**given, **options, "config": configs}


def _placed(form: str, lengths) -> tuple[list[np.ndarray], list[int], dict]:
    """(starts of queries and of keys, rows of both, options) of sequences in a form."""
    given, starts, bounds = {}, [], []
    if form == "padded bhsd":
        given["layout"] = "bhsd"
    apart = form in ("packed, starts and lengths", "packed, parts", "padded, starts")
    for side, of_side in zip("qk", lengths, strict=True):
        gap = 3 * apart
        if form.startswith("padded"):
            starts.append(gap * (np.arange(len(of_side)) % 2))
            bounds.append(int(of_side.max()) + gap + 2)
            if side == "q" and form == "padded, keys only":
                # All queries are there.
                of_side[:] = bounds[-1] = int(of_side.max())
            else:
                given[f"seqlens_{side}"] = ints(*of_side)
            if apart:
                given[f"starts_{side}"] = ints(*starts[-1])
            continue
        ends = cumulative(of_side + 2 * gap)
        starts.append(ends[:-1] + gap)
        bounds.append(int(ends[-1]) + gap)
        if form == "packed, starts and lengths":
            given |= {f"starts_{side}": ints(*starts[-1]), "layout": "thd"}
        else:
            given[f"cu_seqlens_{side}"] = ends
        if apart:
            # Of parts the beginning of a sequence is left out, and its end.
            given |= {f"starts_{side}": ints(*starts[-1]), f"seqlens_{side}": ints(*of_side)}
    return starts, bounds, given


SIZES = ((2, 1, 16, 16), (1, 1, 20, 12), (2, 2, 16, 24), (1, 1, 33, 16), (4, 2, 16, 16))


def cases() -> list[VarlenCase]:
    """A covering set of the table: each option, `OF_EACH_KIND` on kernels of both kinds.

    And each kind with each form and each lengths, each kernel with several tiles and with one.
    """
    rows = [VarlenCase(*row) for row in product(KERNELS, LENGTHS, FORMS, OPTIONS)]
    # Of equals the first is taken: in any order, what is not asked for varies, too.
    random.Random(17).shuffle(rows)

    def labels(case):
        kind = "portable" if case.kernel.startswith("portable") else "tensor cores"
        return (
            (kind if case.option in OF_EACH_KIND else None, case.option),
            (kind, case.form),
            (kind, case.lengths),
            (case.kernel, case.lengths == "uneven"),
        )

    def cost(case):
        # Most options on several tiles, and fewer on the slow ones.
        of_kernel = 1.5 if case.kernel.startswith("portable") else 1.0
        return of_kernel * (0.7 if case.lengths == "uneven" else 1.0)

    sizes = cycle(SIZES)
    chosen = covering(rows, labels, together=1, cost=cost)
    return [replace(case, sizes=next(sizes)) for case in chosen]


def hopper_cases() -> list[VarlenCase]:
    """What programs, dropout and slopes of sequences need of Hopper's kernels."""
    rows = (
        ("uneven", "packed", "dropout"),
        ("uneven", "packed", "score_mod and mask_mod"),
        ("uneven", "padded, starts", "alibi by sequence"),
        ("more queries than keys", "packed", "bias of the longest"),
        ("decoding", "packed, parts", "gradients of what scores read"),
        ("all empty but one", "padded bhsd", "lse and delta"),
        ("uneven", "padded, keys only", "gradient of alibi"),
        ("whole tiles", "packed, starts and lengths", "results in float32"),
        ("uneven", "padded", "sinks"),
    )
    return [VarlenCase("sm90", *row, (2, 1, 16, 16)) for row in rows]
