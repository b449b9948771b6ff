"""Keys in pages of a cache, gathered by kernels on tensor cores and by portable ones."""

import numpy as np
import pytest

from numflash.problem.pages import PageTable
from tests.support.covering import some
from tests.support.page_cases import CAUSAL, Paged, arrays_of, called, compare, expected_of

SMALL, WIDE, PORTABLE = "sm80-m16n16w1s1", "sm80-m32n16w2s2", "m16n16w2"
KEYS = (5, 0, 70, 33)
SINKS = np.array([0.5, -1.0], np.float32)

CASES = {
    "a page of one key": Paged(SMALL, 1, (5, 40)),
    "two keys": Paged(WIDE, 2, (0, 37)),
    "a prime": Paged(SMALL, 7, KEYS),
    "a larger prime": Paged(WIDE, 31, KEYS, 3),
    "as a tile": Paged(SMALL, 16, KEYS, 2),
    "more than a sequence": Paged(WIDE, 257, KEYS),
    "many": Paged(SMALL, 256, (300, 256)),
    "one sequence": Paged(SMALL, 3, (25,), 4),
    "more queries than keys": Paged(SMALL, 5, (3, 30), 12),
    "all keys": Paged(SMALL, 11, KEYS, 3, options={}),
    "a window": Paged(WIDE, 7, (90, 20), 5, options={"window_size": (20, 0)}),
    "packed queries": Paged(WIDE, 9, KEYS, (3, 2, 0, 20)),
    "packed queries, one head": Paged(SMALL, 4, KEYS, (1, 17, 4, 0), (1, 1), left_out=(0,) * 4),
    "grouped heads": Paged(SMALL, 6, (20, 41), 2, (8, 2)),
    "grouped heads, packed rows": Paged("sm80-m16n16w1s1-packed", 6, (20, 41), 3, (8, 2)),
    "grouped heads, apart": Paged("sm80-m16n16w1s1-unpacked", 6, (20, 41), 3, (4, 2)),
    "stages": Paged("sm80-m16n16w1s3", 5, (60, 17)),
    "a wide table": Paged(SMALL, 8, KEYS, gap=5),
    "left out": Paged(SMALL, 7, KEYS, 2, left_out=(3, 0, 9, 70)),
    "left out, a window": Paged(
        SMALL, 5, (60, 8), 2, left_out=(31, 2), options={"window_size": (9, 0)}
    ),
    "appended": Paged(WIDE, 7, (3, 41), 3, appended=3),
    "appended, left out": Paged(SMALL, 6, (3, 41), 3, appended=2, left_out=(4, 13)),
    "bfloat16": Paged(WIDE, 13, KEYS, 2, dtype="bfloat16"),
    "tf32": Paged(SMALL, 13, (40, 3), 2, dtype="float32", options={"precision": "tf32"}),
    "Turing": Paged("sm75-m16n16w1s1", 9, KEYS, 2, arch="sm_75"),
    "Turing, not aligned": Paged("sm75-m16n16w1s1", 9, (20, 4), 2, aligned=False, arch="sm_75"),
    "float32": Paged(PORTABLE, 7, KEYS, 2, dtype="float32"),
    "float32, not aligned": Paged(PORTABLE, 7, (20, 3), dtype="float32", aligned=False),
    "float32, left out": Paged("m8n8w1", 5, KEYS, 2, dtype="float32", left_out=(1, 6, 0, 9)),
    "portable, packed queries": Paged(PORTABLE, 3, (20, 9), (2, 5), (2, 2)),
    "not aligned": Paged(SMALL, 9, (20, 41), 2, aligned=False),
    "odd head_dims": Paged(SMALL, 9, (20, 41), 2, head_dims=(33, 17)),
    "head_dims that are not one": Paged(SMALL, 9, (20, 41), head_dims=(64, 24)),
    "head_dim 128": Paged(SMALL, 9, (5, 20), head_dims=(128, 128)),
    "head_dim 256": Paged(SMALL, 9, (20,), head_dims=(256, 256)),
    "float32 results": Paged(SMALL, 7, KEYS, 2, options=CAUSAL | {"out_dtype": "float32"}),
    "features": Paged(
        WIDE,
        7,
        (20, 41, 0),
        2,
        options=CAUSAL
        | {
            "softcap": 2.0,
            "sinks": SINKS,
            "alibi_slopes": np.array([[0.5, 0.1], [0.2, 0.3], [1, 1]], np.float32),
        },
    ),
    "dropout": Paged(SMALL, 7, (20, 41), 2, options={"dropout_p": 0.3, "seed": 5}),
    "by rule": Paged(None, 10, KEYS, 2),
}


KEPT = (
    "a page of one key",
    "more than a sequence",
    "packed queries, one head",
    "grouped heads, packed rows",
    "stages",
    "left out, a window",
    "appended, left out",
    "tf32",
    "Turing, not aligned",
    "float32, left out",
    "portable, packed queries",
    "odd head_dims",
    "features",
    "by rule",
)


@pytest.mark.parametrize("name", some(CASES, *KEPT))
def test_each_sequence_is_right(name, on):
    case = CASES[name]
    on(case.arch)
    arrays = arrays_of(case, len(name))
    compare(case, called(*arrays[:4]), expected_of(case, arrays))


CONFIGS = SMALL, WIDE, PORTABLE, "sm75-m16n16w1s1"
NONE = (True, -1), (True, 2**31 - 1), (False, 15), (False, -(2**31))


@pytest.mark.parametrize("config", some(CONFIGS, WIDE, PORTABLE))
@pytest.mark.parametrize(("aligned", "what"), some(NONE, NONE[1], NONE[2]))
def test_rows_of_pages_that_are_none_are_zeros(config, aligned, what, on):
    on("sm_75" if config.startswith("sm75") else "sm_80")
    lost = (0, 1, what), (0, 4, what), (1, 0, what)
    case = Paged(config, 6, (25, 9), 2, (1, 1), aligned=aligned, lost=lost)
    arrays = arrays_of(case)
    compare(case, called(*arrays[:4]), expected_of(case, arrays))


def test_a_page_that_two_sequences_share(on):
    """As a prefix that both have; both are as if each had its own."""
    on("sm_80")
    case = Paged(SMALL, 8, (30, 30), 2)
    arrays = arrays_of(case)
    table = arrays.options["page_table"]
    table[1, :2] = table[0, :2]
    for one, other in zip(arrays.alone[0][1:], arrays.alone[1][1:], strict=True):
        other[:16] = one[:16]
    compare(case, called(*arrays[:4]), expected_of(case, arrays))


def test_the_division_by_the_size_of_a_page_is_exact():
    """At every size up to 300, and large ones, next to multiples of it up to the most keys."""
    for size in (*range(1, 301), 2**20 + 1, 2**27 - 1, 2**28 - 1):
        pages = PageTable(1, 1, 1, 1, size)
        last = (2**28 - 1) // size
        whole = np.array([0, 1, 2, 3, last - 1, last], np.int64).clip(0)
        key = (whole[:, None] * size + np.array([-1, 0, 1, size - 1])).clip(0, 2**28 - 1)
        assert pages.factor < 2**32, size
        found = (2 * key * pages.factor >> 32) >> pages.shift
        np.testing.assert_array_equal(found, key // size)
