"""Calls on caches of keys and values: a table.

A case is a kernel, how the cache lies in memory, what is appended, how it is rotated, and an
option of attention. Whatever no sequence has is NaN: slots, pages, and entries of the cache.
"""

import random
from dataclasses import dataclass, replace
from itertools import cycle, product

import numpy as np

import numflash
from numflash.api.comparison import Error, measure
from numflash.reference import attention_with_kvcache
from numflash.runtime.views import numpy_dtype
from tests.support.covering import covering
from tests.support.sequence_cases import ints

KERNELS = {
    "portable": ("float32", "sm_80", None),
    "portable-small": ("float16", "sm_75", "m16n8w2"),
    "sm80": ("float16", "sm_80", None),
    "sm80-stages": ("bfloat16", "sm_80", "sm80-m16n16w1s3"),
    "sm80-splits": ("float16", "sm_80", "sm80-m16n16w1s2x2"),
    "sm75": ("float16", "sm_75", "sm75-m16n16w1s1"),
    "sm90": ("float16", "sm_90a", None),
}
"""Name -> (dtype, GPU, config of the forward)."""
PLACES = ("entries", "spare entries", "batch_idx", 1, 3, 5, 8, 16, 64, 256)
"""Where rows of a sequence lie: in entries of a batch, or in pages of so many rows."""
TOKENS = {"one": (1, 1), "several": (4, 4), "fewer new": (5, 2), "none new": (3, 0)}
"""Name -> (queries, new keys)."""
TURNS = ("none", "halves", "pairs", "part, narrow")
LENGTHS = (0, 37, 9, 60)
ROWS = 66
EPSILON = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}


def _scaled(score, b, h, i, j):
    return score * (1 + 0.25 * b) + 0.1 * h - 0.01 * (i - j)


OPTIONS = {
    "causal": {"causal": True},
    "full": {},
    "window": {"window_size": (9, 1)},
    "causal window": {"causal": True, "window_size": (20, 0)},
    "sinks": {"causal": True, "sinks": np.array([1, -2, 0, 3], np.float32)},
    "alibi": {"causal": True, "alibi_slopes": 2.0 ** -np.arange(1, 5, dtype=np.float32)},
    "alibi by sequence": {
        "alibi_slopes": 2.0 ** -np.arange(16, dtype=np.float32).reshape(4, 4),
    },
    "softcap": {"softcap": 1.5, "causal": True},
    "scale": {"softmax_scale": 0.3},
    "score_mod": {"score_mod": _scaled},
}


@dataclass(frozen=True)
class CacheCase:
    """A call; all but `leftpad` and `sizes` are keys of the tables."""

    kernel: str
    place: str | int
    tokens: str
    turn: str
    option: str
    leftpad: bool
    sizes: tuple[int, int, int, int] = (4, 2, 32, 32)

    def __str__(self):
        place = f"pages of {self.place}" if isinstance(self.place, int) else self.place
        names = self.kernel, place, self.tokens, self.turn, self.option
        return "-".join((*names, *["leftpad"] * self.leftpad)).replace(", ", "-").replace(" ", "-")

    @property
    def arch(self) -> str:
        return KERNELS[self.kernel][1]

    def arguments(self, rng) -> tuple[list, dict]:
        """([q, k_cache, v_cache, k, v], options), the caches with NaN where nothing is."""
        heads, heads_kv, d, dv = self.sizes
        dtype = numpy_dtype(KERNELS[self.kernel][0])
        seqlen_q, new = TOKENS[self.tokens]
        lengths, entries = ints(*LENGTHS), len(LENGTHS)

        def normal(*shape):
            return rng.standard_normal(shape).astype(dtype)

        arrays = [normal(entries, seqlen_q, heads, d)]
        options = dict(OPTIONS[self.option])
        where, options_of_place, shape = self._places(rng)
        options |= options_of_place
        first = np.zeros(entries, int)
        if self.leftpad:
            first = np.array([0, 30, 9, 1])
            options["cache_leftpad"] = first.astype(np.int32)
        for dim in (d, dv):
            cache = np.full((*shape, heads_kv, dim), np.nan, dtype)
            for entry, length in enumerate(lengths):
                for row in range(first[entry], length):
                    cache[where(entry, row)] = rng.standard_normal((heads_kv, dim))
            arrays.append(cache)
        arrays += [normal(entries, new, heads_kv, n) if new else None for n in (d, dv)]
        if self.turn != "none" and new:
            narrow = "narrow" in self.turn and dtype != np.float32
            dim = d // 2 if "part" in self.turn else d
            tables = numflash.rotary_tables(ROWS + 8, dim // 2 * 2)
            tables = [table.astype(dtype) for table in tables] if narrow else tables
            options |= {"rotary_cos": tables[0], "rotary_sin": tables[1]}
            options["rotary_interleaved"] = self.turn == "pairs"
        return arrays, options | {"cache_seqlens": lengths, "config": KERNELS[self.kernel][2]}

    def _places(self, rng):
        """(function of entry and row to an index, options, shape of the cache before heads)."""
        entries = len(LENGTHS)
        if not isinstance(self.place, int):
            numbers = np.arange(entries)
            if self.place == "batch_idx":
                numbers = rng.permutation(entries + 2)[:entries]
            given = {"cache_batch_idx": numbers.astype(np.int32)}
            shape = entries + 2 * (self.place != "entries"), ROWS
            return (
                lambda entry, row: (numbers[entry], row),
                given if self.place == "batch_idx" else {},
                shape,
            )
        size, new = self.place, TOKENS[self.tokens][1]
        width = -(-ROWS // size)
        pages = entries * width + 3
        table = rng.permutation(pages)[: entries * width].reshape(entries, width).astype(np.int32)
        for entry, length in enumerate(LENGTHS):
            # Pages that no row is in yet may be anything.
            table[entry, -(-(length + new) // size) :] = (-1, 10**6)[entry % 2]
        return (
            lambda entry, row: (table[entry, row // size], row % size),
            {"page_table": table},
            (pages, size),
        )


def errors_of(case: CacheCase, rng) -> list[Error]:
    """Run a case, check its caches bit by bit but for rotated rows; the errors of out and lse."""
    (q, *caches, k, v), options = case.arguments(rng)
    config = options.pop("config")
    wanted = attention_with_kvcache(q, *caches, k, v, **options)
    naive = attention_with_kvcache(q, *caches, k, v, precision=q.dtype.name, **options)
    given = [cache.copy() for cache in caches]
    got = numflash.attention_with_kvcache(
        q, *caches, k, v, return_lse=True, check_lengths=True, config=config, **options
    )
    expect_same_rows(caches, given, wanted[2:], "rotary_cos" in options)
    epsilon = EPSILON[q.dtype.name]
    pairs = zip(("out", "lse"), got, wanted, naive, strict=False)
    return [
        measure(name, each, exact, rounded, epsilon, 2.0**-22 * (name == "lse") + 1e-6)
        for name, each, exact, rounded in pairs
    ]


def expect_same_rows(got, before, wanted, is_rotated: bool) -> None:
    """Caches after a call: what was there, bit by bit, and the new rows."""
    for i, (cache, old, new) in enumerate(zip(got, before, wanted, strict=True)):
        bits = f"u{cache.itemsize}"
        changed = (old.view(bits) != new.view(bits)).any((-1, -2))
        np.testing.assert_array_equal(cache[~changed].view(bits), old[~changed].view(bits))
        if i == 1 or not is_rotated:
            np.testing.assert_array_equal(cache[changed], new[changed])
        else:
            one, other = (x[changed].astype(np.float64) for x in (cache, new))
            tolerance = 2 * EPSILON[cache.dtype.name]
            np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


SIZES = ((4, 2, 32, 32), (4, 4, 16, 24), (4, 1, 64, 32), (4, 2, 20, 12))


def cases() -> list[CacheCase]:
    """A covering set: each kernel with each place, each place with each tokens and turn."""
    rows = [
        CacheCase(*row)
        for row in product(KERNELS, PLACES, TOKENS, TURNS, OPTIONS, (False, True))
        if not (row[0] == "sm90" and isinstance(row[1], int))
    ]
    random.Random(17).shuffle(rows)

    def labels(case):
        is_portable, is_paged = case.kernel.startswith("portable"), isinstance(case.place, int)
        return (
            (is_portable, case.place),
            (case.kernel, is_paged),
            (case.tokens, case.turn),
            (is_portable, case.option),
            (is_paged, case.leftpad),
            (case.kernel, case.leftpad),
        )

    sizes = cycle(SIZES)
    return [replace(case, sizes=next(sizes)) for case in covering(rows, labels, together=1)]
