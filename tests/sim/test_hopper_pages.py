"""The Hopper forward on keys in pages of a cache: boxes of tensor maps, against float64.

As in test_pages.py all that is no key of a sequence is NaN, and the table is garbage behind a
sequence's last page.
"""

import numpy as np
import pytest

import numflash
from numflash import UnsupportedError, reference
from numflash.runtime import driver
from numflash.selection import choice as selection
from tests.support.covering import some
from tests.support.page_cases import CAUSAL, Paged, arrays_of, called, compare, expected_of
from tests.support.sequence_cases import ints

SMALL, TILES = "sm90-m64n32w4s2-persistent", "sm90-m64n64w4s2-overlap-persistent"
TURNS = "sm90-m128n64w8s2-overlap-pingpong-persistent"
KEYS = (5, 0, 70, 33)
SINKS = np.array([0.5, -1.0], np.float32)


def paged(config, page, keys=KEYS, *rest, **more) -> Paged:
    """A case on Hopper."""
    return Paged(config, page, keys, *rest, arch="sm_90a", **more)


CASES = {
    "eight keys, four pages a tile": paged(SMALL, 8),
    "eight keys, two pages a tile": paged("sm90-m64n16w4s3-overlap", 8, KEYS, 2),
    "sixteen keys, all keys": paged(TILES, 16, KEYS, 3, options={}),
    "a size that is no power of two": paged("sm90-m64n48w4s1-overlap-persistent", 24, KEYS, 5),
    "as a tile": paged(TILES, 64, (64, 130, 1)),
    "two tiles, turns": paged(TURNS, 128, (200, 0), 70, (1, 1)),
    "eight tiles": paged(SMALL, 256, (300, 256), 2),
    "tiles of a page no power of two": paged("sm90-m64n16w4s1", 48, (70, 97)),
    "one stage": paged("sm90-m64n32w4s1", 16, KEYS, 40, (1, 1)),
    "a window": paged(TILES, 16, (90, 20), 5, options={"window_size": (20, 0)}),
    "a window both ways": paged(SMALL, 8, (90, 20), 30, options={"window_size": (9, 7)}),
    "top left": paged(
        SMALL, 64, (90, 20), 40, options=CAUSAL | {"causal_align": "top_left"}, dtype="bfloat16"
    ),
    "packed queries": paged(TILES, 16, KEYS, (3, 2, 0, 20)),
    "packed queries, turns": paged(TURNS, 8, (70, 3, 0, 160), (70, 0, 5, 130), (1, 1)),
    "packed queries, a window": paged(
        SMALL, 128, (3, 150), (2, 33), options={"window_size": (40, 0)}
    ),
    "clusters": paged("sm90-m64n64w4s2-c2-overlap-persistent", 8, KEYS, (3, 70, 0, 160)),
    "clusters, half a tile a page": paged("sm90-m64n64w4s2-c2-overlap", 32, (70, 97), 40),
    "grouped heads": paged("sm90-m64n64w4s2-unpacked-persistent", 64, (20, 70), 2, (4, 2)),
    "grouped heads, packed rows": paged(
        "sm90-m64n64w4s2-packed-overlap-persistent", 8, (20, 91), 3, (8, 2), (64, 64)
    ),
    "grouped heads, two warpgroups": paged(
        "sm90-m128n32w8s2-packed-overlap-pingpong", 16, (20, 41), (7, 40), (4, 1)
    ),
    "head_dim 64": paged(TURNS, 32, (100, 3), 2, head_dims=(64, 64), dtype="bfloat16"),
    "slabs": paged(SMALL, 16, (5, 41), head_dims=(128, 72)),
    "head_dim 128": paged("sm90-m64n64w4s2-overlap", 8, (70,), 2, head_dims=(128, 128)),
    "head_dim 256, O in place of Q": paged(
        "sm90-m64n96w4s2-persistent", 16, (110, 5), head_dims=(256, 256)
    ),
    "appended": paged(TILES, 8, (3, 41), 3, appended=3),
    "a wide table": paged(SMALL, 16, KEYS, gap=5),
    "float32 results": paged(SMALL, 8, KEYS, 2, options=CAUSAL | {"out_dtype": "float32"}),
    "features": paged(
        TILES,
        16,
        (20, 71, 0),
        2,
        options=CAUSAL
        | {
            "softcap": 2.0,
            "sinks": SINKS,
            "alibi_slopes": np.array([[0.5, 0.1], [0.2, 0.3], [1, 1]], np.float32),
        },
    ),
    "a sink and a softcap": paged(SMALL, 64, (70, 0), options={"softcap": 3.0, "sinks": SINKS}),
}


@pytest.fixture(autouse=True)
def hopper(on, monkeypatch):
    """A simulated Hopper of three SMs, each with a block."""
    on("sm_90a")
    monkeypatch.setattr(driver, "multiprocessors", lambda device: (3, 2**20))
    monkeypatch.setattr(selection, "resident_blocks", lambda *about: 1)


KEPT = (
    "a size that is no power of two",
    "packed queries, a window",
    "grouped heads, packed rows",
    "appended",
    "features",
)


@pytest.mark.parametrize("name", some(CASES, *KEPT))
def test_each_sequence_is_right(name):
    case = CASES[name]
    arrays = arrays_of(case, len(name))
    out, lse, kernel = called(*arrays[:4])
    assert case.config in kernel and "-ragged-paged" in kernel
    compare(case, (out, lse), expected_of(case, arrays))


def test_padded_queries_of_lengths_of_their_own():
    """Rows of q behind a sequence's queries are NaN; those of the result stay as they are."""
    case, lengths = paged(SMALL, 16, KEYS, 20), ints(3, 2, 0, 20)
    arrays = arrays_of(case)
    for q, n in zip(arrays.q, lengths, strict=True):
        q[n:] = np.nan
    given = np.full(arrays.q.shape, np.nan, np.float16)
    out, lse, _ = called(*arrays[:3], arrays.options | {"seqlens_q": lengths}, given)
    assert out is given
    for entry, (q, k, v) in enumerate(arrays.alone):
        n = lengths[entry]
        assert np.isnan(out[entry, n:]).all() and np.isneginf(lse[entry, :, n:]).all()
        if n:
            expected = reference.attention(q[:n], k, v, **CAUSAL)
            compare(case, (out[entry, :n], lse[entry, :, :n]), expected)


def test_blocks_that_a_mask_leaves_out():
    """Blocks of 64 by 64, as many as the keys that a row of the table has room for."""
    case = paged("sm90-m64n64w4s2", 16, (100, 150), 70, (1, 1), options={})
    arrays = arrays_of(case)
    columns = -(-arrays.options["page_table"].shape[1] * case.page // 64)
    tiles = np.arange(2 * columns).reshape(2, columns) % 3 != 1
    mask = numflash.BlockMask.from_tiles(tiles, block_size=64)
    seen = np.repeat(np.repeat(tiles, 64, 0), 64, 1)[:70]
    out, lse, _ = called(*arrays[:3], arrays.options | {"block_mask": mask})
    for entry, (q, k, v) in enumerate(arrays.alone):
        expected = reference.attention(q, k, v, mask=seen[:, : len(k)])
        compare(case, (out[entry], lse[entry]), expected)
    fewer = numflash.BlockMask.from_tiles(tiles[:, :-1], block_size=64)
    with pytest.raises(ValueError, match=f"block_mask must have 2 x {columns} blocks of 64 x 64"):
        called(*arrays[:3], arrays.options | {"block_mask": fewer})


NONE = (8, -1), (8, 2**31 - 1), (64, 15), (64, -(2**31))


@pytest.mark.parametrize(("page", "what"), some(NONE, (8, 2**31 - 1)))
def test_rows_of_pages_that_are_none_are_zeros(page, what):
    """The first page of a sequence, one amid others, and the last. There are less than 15."""
    keys = (3 * page + 5, page + 3)
    case = paged(SMALL, page, keys, 2, (1, 1), lost=((0, 1, what), (0, 3, what), (1, 0, what)))
    arrays = arrays_of(case)
    assert len(arrays.k) <= 15
    compare(case, called(*arrays[:4]), expected_of(case, arrays))


def test_pages_may_have_their_heads_outside():
    """(pages, heads, page_size, head_dim) in memory, and pages that are views of larger ones."""
    case = paged(SMALL, 16, (70, 9), 2, (4, 2))
    arrays = arrays_of(case)
    k = np.ascontiguousarray(arrays.k.swapaxes(1, 2)).swapaxes(1, 2)
    v = np.full((2 * len(arrays.v), *arrays.v.shape[1:3], 48), np.nan, np.float16)[::2, :, :, 8:40]
    v[...] = arrays.v
    got = called(arrays.q, k, v, arrays.options)
    compare(case, got, expected_of(case, arrays))


@pytest.mark.parametrize("page", [1, 7, 12, 40, 96])
def test_pages_that_are_no_whole_boxes_are_for_kernels_that_gather(page):
    case = paged(None, page, (70, 9), 2, (1, 1), head_dims=(16, 16))
    arrays = arrays_of(case)
    forced = arrays.options | {"config": {"forward": TILES}}
    why = f"a tile of 64 keys and pages of {page} do not divide each other in boxes"
    with pytest.raises(UnsupportedError, match=f"cannot run this forward: {why}"):
        called(*arrays[:3], forced)
    told = str(numflash.explain_dispatch(*arrays[:3], **arrays.options))
    assert told.startswith("forward: sm80-") and f"keys and pages of {page} do not divide" in told
    out, lse, kernel = called(*arrays[:4])
    assert "sm80-" in kernel
    compare(case, (out, lse), expected_of(case, arrays))


def test_what_no_map_of_pages_describes_is_for_kernels_that_gather():
    """Sequences that begin within a page, and pages whose rows are not aligned."""
    for case, why in (
        (paged(None, 16, (70, 9), left_out=(3, 0)), "its sequences begin within a page"),
        (paged(None, 16, (70, 9), aligned=False), "is not a multiple of 16"),
    ):
        arrays = arrays_of(case)
        told = str(numflash.explain_dispatch(*arrays[:3], **arrays.options))
        assert told.startswith("forward: sm80-")
        assert "k cannot be described to bulk copies: " in told and why in told
        compare(case, called(*arrays[:4]), expected_of(case, arrays))


@pytest.mark.parametrize("page", [8, 16, 64, 128, 256])
def test_of_whole_boxes_the_shipped_kernel_is_hoppers(page, shipped_kernels):
    table, lengths = np.zeros((2, 4), np.int32), np.array([3, 7], np.int32)
    for head_dim in (64, 128, 256):
        q, k = (np.zeros((2, n, 1, head_dim), np.float16) for n in (300, page))
        options = {"page_table": table, "seqlens_k": lengths, "causal": True}
        told = numflash.explain_dispatch(q, k, k, **options)
        assert told.forward.implementation.needs_maps and told.forward.traits.paged


def test_a_page_that_two_sequences_share():
    case = paged(SMALL, 16, (30, 50), 2)
    arrays = arrays_of(case)
    table = arrays.options["page_table"]
    table[1, 0] = table[0, 0]
    for one, other in zip(arrays.alone[0][1:], arrays.alone[1][1:], strict=True):
        other[:16] = one[:16]
    compare(case, called(*arrays[:4]), expected_of(case, arrays))
