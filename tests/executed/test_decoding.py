"""Decoding from pages: compiled kernels have the bits of the source, and what they read."""

import numpy as np
import pytest

from numflash.problem.sequences import ListShape
from numflash.reference.sequences import extents_of, lists_of
from numflash.selection import geometry
from numflash.simulator import async_copies
from tests.support.covering import thorough
from tests.support.page_cases import Paged, arrays_of, called, compare, expected_of

SMALL = "sm80-m16n16w1s1"
CASES = {
    "pages": Paged(SMALL, 7, (40, 5), 2, heads=(2, 1)),
    "pages, left out": Paged("sm75-m16n16w1s1", 9, (30,), left_out=(4,), arch="sm_75"),
    "float32": Paged("m16n16w2", 5, (20,), dtype="float32", heads=(1, 1)),
    "boxes of pages": Paged(
        "sm90-m64n32w4s2-overlap", 16, (41, 9), 2, heads=(1, 1), arch="sm_90a", lost=((0, 1, -1),)
    ),
    "parts": Paged(SMALL + "x2", 16, (70, 3), heads=(2, 1), options={"window_size": (50, 0)}),
}


@thorough
@pytest.mark.parametrize("name", CASES)
def test_compiled_code_has_the_bits_of_the_source(name, executed, monkeypatch):
    monkeypatch.setattr(geometry, "LEAST_STAGES", 1)
    case, found = CASES[name], []
    arrays = arrays_of(case)
    for code in ("python", "ptx"):
        executed(case.arch, code=code)
        found.append(called(*arrays[:4]))
    (source, *_), (compiled, lse, _) = found
    compare(case, (compiled, lse), expected_of(case, arrays))
    if case.dtype == "float16":
        np.testing.assert_array_equal(source.view(np.uint16), compiled.view(np.uint16))


@thorough
def test_keys_and_values_are_read_once(executed, monkeypatch):
    """4096 keys, four query heads that share them: bytes that compiled code copies."""
    copied, issue = [], async_copies.AsyncCopies.issue

    def counted(self, array, offset, n_bytes, origin):
        copied.append(origin.nbytes)
        return issue(self, array, offset, n_bytes, origin)

    monkeypatch.setattr(async_copies.AsyncCopies, "issue", counted)
    executed("sm_80")
    case = Paged("sm80-m16n64w1s2x2", 16, (4096 - 70,), heads=(4, 1))
    arrays = arrays_of(case)
    called(*arrays[:4])
    keys_and_values = sum(x.nbytes for x in arrays.alone[0][1:])
    assert keys_and_values <= sum(copied) <= 1.02 * keys_and_values


def test_the_schedule_gives_each_key_to_one_record():
    """64k keys and few: of a decoded query no part reads what another reads."""
    lengths = np.array([65536, 65536 - 37, 3000, 1])
    q, k = extents_of(1, 4, lengths=np.ones(4, int)), extents_of(65536, 4, lengths=lengths)
    shape = ListShape(16, 64, pack=8, hi=0, aligned=1, least=4, shares=500)
    records = lists_of(q, k, shape).tiles[8:].reshape(-1, 8)
    begin, end = 64 * records[:, 5], np.minimum(64 * records[:, 6], records[:, 3])
    assert (end - begin).sum() == lengths.sum() and len(records) > 400
