"""Block masks as people make them: of functions, of tiles, of FlexAttention's fields."""

from types import SimpleNamespace

import numpy as np
import pytest

import numflash
from numflash import masks
from numflash.calls import block_masks as making
from numflash.problem.block_masks import ListedBlocks
from tests.support.covering import thorough

SIZES = (1, 1, 70, 90)


def brute(kept, block_m, block_n):
    """(rows, columns): 0, 1 or 2 for each block of a boolean (queries, keys)."""
    rows, columns = -(-kept.shape[0] // block_m), -(-kept.shape[1] // block_n)
    found = np.zeros((rows, columns), int)
    for m, n in np.ndindex(rows, columns):
        block = kept[m * block_m : (m + 1) * block_m, n * block_n : (n + 1) * block_n]
        found[m, n] = 2 if block.all() else int(block.any())
    return found


def causal(batch, head, q_idx, kv_idx):
    return q_idx >= kv_idx


def lists_of(mask):
    """Of each row, and of each column: [(block, is_full), ...]."""
    found = []
    for entries, counts in (
        (mask.entries, mask.counts),
        (mask.entries_of_keys, mask.counts_of_keys),
    ):
        rows = entries.reshape(-1, entries.shape[-1])
        found.append(
            [
                [(int(e) >> 1, bool(e & 1)) for e in row[:count]]
                for row, count in zip(rows, counts.ravel(), strict=True)
            ]
        )
    return found


def lists_of_kinds(kinds):
    of_rows = [[(n, bool(k == 2)) for n, k in enumerate(row) if k] for row in kinds]
    return of_rows, [[(m, bool(k == 2)) for m, k in enumerate(row) if k] for row in kinds.T]


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (32, 16), (16, 48), (128, 128)])
def test_blocks_of_a_function_are_those_of_each_query_and_key(block_m, block_n):
    window = masks.sliding_window(20) if hasattr(masks, "sliding_window") else None
    for function in filter(None, (causal, window)):
        i, j = np.ogrid[:70, :90]
        kept = np.broadcast_to(np.asarray(function(0, 0, i, j)), (70, 90))
        kinds = brute(kept, block_m, block_n)
        mask = numflash.create_block_mask(function, *SIZES, (block_m, block_n))
        np.testing.assert_array_equal(mask.tiles()[0, 0], kinds)
        assert lists_of(mask) == list(lists_of_kinds(kinds))
        np.testing.assert_array_equal(mask.dense()[0, 0], kept)
        assert mask.shape == SIZES and mask.block_size == (block_m, block_n)


def test_batch_entries_and_heads_have_masks_of_their_own():
    offsets = np.array([3, 40], np.int32)

    def shifted(batch, head, q_idx, kv_idx, offset, far):
        return (q_idx + offset[batch] >= kv_idx) & (kv_idx % (head + 2) == 0) & (kv_idx < far)

    aux = offsets, 77
    mask = numflash.create_block_mask(shifted, 2, 3, 40, 90, 16, aux)
    b, h, i, j = np.ix_(*map(np.arange, (2, 3, 40, 90)))
    kept = (i + offsets[b] >= j) & (j % (h + 2) == 0) & (j < 77)
    for place in np.ndindex(2, 3):
        np.testing.assert_array_equal(mask.tiles()[place], brute(kept[place], 16, 16))
    np.testing.assert_array_equal(mask.dense(), kept)


def test_tiles_may_have_any_strides_and_a_function_for_those_that_are_not_full():
    rng = np.random.default_rng(4)
    room = rng.random((2, 7, 8, 3)) < 0.5
    tiles = room.transpose(0, 3, 1, 2)[:, ::-1, :5]
    full = tiles & (rng.random(tiles.shape) < 0.5)
    mask = numflash.BlockMask.from_tiles(tiles, full, block_size=16, mask_mod=causal)
    np.testing.assert_array_equal(mask.tiles(), tiles.astype(int) + full)
    plain = numflash.BlockMask.from_tiles(tiles, block_size=16)
    np.testing.assert_array_equal(plain.tiles(), 2 * tiles)
    asked = numflash.BlockMask.from_tiles(tiles, block_size=16, mask_mod=causal)
    np.testing.assert_array_equal(asked.tiles(), tiles)
    # More than a warp has lanes.
    wide = rng.random((3, 100)) < 0.3
    mask = numflash.BlockMask.from_tiles(wide, block_size=16)
    np.testing.assert_array_equal(mask.tiles()[0, 0], 2 * wide)


def flex(kinds, mask_mod=causal, **changed):
    """FlexAttention's fields, as its BlockMask has them, of (batch, heads, rows, columns)."""
    fields = {"BLOCK_SIZE": (16, 16), "mask_mod": mask_mod, "q_indices": None}
    for prefix, kind in (("", 1), ("full_", 2)):
        order = np.argsort(kinds != kind, axis=-1, kind="stable").astype(np.int32)
        fields[f"{prefix}kv_num_blocks"] = (kinds == kind).sum(-1).astype(np.int32)
        fields[f"{prefix}kv_indices"] = order

    class Theirs(SimpleNamespace):
        __hash__ = object.__hash__

    return Theirs(**fields | changed)


def test_flex_attention_s_fields_are_accepted():
    kinds = np.random.default_rng(8).integers(0, 3, (2, 3, 4, 5))
    mask = numflash.BlockMask.from_flex_attention(flex(kinds, seq_lengths=(60, 75)))
    np.testing.assert_array_equal(mask.tiles(), kinds)
    assert mask.mask_mod is causal and mask.shape == (2, 3, 60, 75)
    without = flex(kinds, full_kv_num_blocks=None, full_kv_indices=None)
    np.testing.assert_array_equal(
        numflash.BlockMask.from_flex_attention(without).tiles(), kinds == 1
    )


@thorough
def test_attention_takes_flex_attention_s_mask_itself():
    i, j = np.ogrid[:32, :48]
    kinds = brute(np.broadcast_to(i >= j, (32, 48)), 16, 16)[None, None]
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, n, 2, 16)).astype(np.float32) for n in (32, 48, 48))
    theirs = flex(kinds)
    out, lse = numflash.attention(q, k, v, block_mask=theirs, return_lse=True)
    wanted = numflash.attention(q, k, v, causal=True, causal_align="top_left")
    np.testing.assert_allclose(out, wanted, atol=1e-6)
    report = numflash.check(q, k, v, dout=q, block_mask=theirs)
    assert report.passed, f"\n{report}"
    plan = numflash.plan(q, k, v, block_mask=theirs)
    np.testing.assert_array_equal(plan.launch(), out)
    gradients = numflash.attention_backward(q, q, k, v, out, lse, block_mask=theirs)
    assert all(np.isfinite(x).all() for x in gradients)


def test_lists_out_of_range_touch_nothing_else():
    """Counts above a list's length and indices that are no column, below and above."""
    kinds = np.ones((1, 1, 2, 3), int)
    theirs = flex(kinds)
    theirs.kv_num_blocks[...] = [[[99, -5]]]
    theirs.kv_indices[0, 0, 0] = [-1, 3, 2]
    mask = numflash.BlockMask.from_flex_attention(theirs)
    np.testing.assert_array_equal(mask.tiles()[0, 0], [[0, 0, 1], [0, 0, 0]])


def test_a_long_mask_allocates_lists_and_nothing_else(monkeypatch):
    """65,536 x 65,536: no array of queries by keys."""
    sizes = []

    class NeverLaunched:
        def __init__(self, config, traits, device, num_blocks, arguments):
            assert num_blocks == 512 * 512 // 4 or num_blocks == 512 // 4

        def build(self):
            pass

        def bind(self, operands):
            return lambda stream: None

    empty = making.Room.empty

    def counted(self, shape, dtype):
        operand = empty(self, shape, dtype)
        sizes.append(operand.array.nbytes)
        return operand

    monkeypatch.setattr(making, "Launcher", NeverLaunched)
    monkeypatch.setattr(making.Room, "empty", counted)
    mask = numflash.create_block_mask(causal, None, None, 2**16, 2**16)
    assert sum(sizes) == 512 * 512 * (1 + 1 + 4 + 4) + 2 * 4 * 512
    assert isinstance(mask, ListedBlocks) and mask.blocks.count == 2**18


def test_the_same_function_made_again_compiles_nothing(monkeypatch):
    q = np.zeros((1, 32, 1, 16), np.float32)

    def mask(width):
        return numflash.create_block_mask(lambda b, h, i, j: i < width, 1, 1, 32, 32, 16)

    from numflash.calls import ready

    monkeypatch.setattr(ready, "_ready", {})
    numflash.attention(q, q, q, block_mask=mask(16))
    numflash.attention(q, q, q, block_mask=mask(16))
    assert len(ready._ready) == 1
    numflash.attention(q, q, q, block_mask=mask(17))
    assert len(ready._ready) == 2


def test_a_mask_is_shown_block_by_block(capsys):
    numflash.show_mask(causal, seqlen_q=40, seqlen_k=64, block_size=16)
    shown = capsys.readouterr().out
    numflash.show_mask(numflash.create_block_mask(causal, 1, 1, 40, 64, 16))
    assert capsys.readouterr().out == shown
    title, *lines = shown.splitlines()
    assert title == (
        "batch 0, head 0: 3 x 4 blocks of 16 x 16, 3 full, 3 partly kept, 6 empty (50 %)"
    )
    assert lines == ["░···", "█░··", "██░·"]
    numflash.show_mask(causal, seqlen_q=40, seqlen_k=64, block_size=16, limit=2)
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.endswith("; a sign stands for 2 x 2") and lines == ["░·", "█░"]
    heads = numflash.BlockMask.from_tiles(np.eye(2, dtype=bool)[:, None, None], block_size=16)
    numflash.show_mask(heads, batch=1)
    assert capsys.readouterr().out.splitlines()[1] == "·█"
    with pytest.raises(ValueError, match="the mask has 2 batch entries and 1 heads"):
        numflash.show_mask(heads, batch=2)
    with pytest.raises(TypeError, match="show_mask needs seqlen_q and seqlen_k"):
        numflash.show_mask(causal)
    with pytest.raises(TypeError, match="mask must be a BlockMask or a mask_mod, got 3"):
        numflash.show_mask(3)


X = np.zeros((1, 40, 2, 16), np.float32)
TILES = np.ones((3, 3), bool)
BAD = {
    "block size of 24": (lambda: numflash.create_block_mask(causal, *SIZES, 24), ValueError, "16"),
    "block size of 0": (lambda: numflash.create_block_mask(causal, *SIZES, 0), ValueError, "16"),
    "a block size that is no number": (
        lambda: numflash.create_block_mask(causal, *SIZES, "128"),
        TypeError,
        "block_size must be an integer",
    ),
    "three block sizes": (
        lambda: numflash.create_block_mask(causal, *SIZES, (16, 16, 16)),
        TypeError,
        "a pair",
    ),
    "no function": (
        lambda: numflash.create_block_mask("causal", *SIZES),
        TypeError,
        "mask_mod must be a function, got 'causal'",
    ),
    "a function of too few arguments": (
        lambda: numflash.create_block_mask(lambda i, j: i >= j, *SIZES),
        TypeError,
        "is called with",
    ),
    "a function that gives a number": (
        lambda: numflash.create_block_mask(lambda b, h, i, j: i - j, *SIZES),
        TypeError,
        "mask_mod",
    ),
    "no batch": (
        lambda: numflash.create_block_mask(causal, 0, 1, 70, 90),
        ValueError,
        "batch must be at least 1, got 0",
    ),
    "seqlens below 0": (
        lambda: numflash.create_block_mask(causal, 1, 1, -1, 90),
        ValueError,
        "seqlen_q must be at least 0",
    ),
    "too many blocks": (
        lambda: numflash.create_block_mask(causal, 64, 64, 2**17, 2**17),
        numflash.UnsupportedError,
        "lists of blocks of 128 have at most",
    ),
    "tiles of numbers": (
        lambda: numflash.BlockMask.from_tiles(TILES.astype(np.int32)),
        TypeError,
        "tiles must be boolean, got int32",
    ),
    "tiles of three axes": (
        lambda: numflash.BlockMask.from_tiles(TILES[None]),
        ValueError,
        r"or \(rows, columns\)",
    ),
    "full of another shape": (
        lambda: numflash.BlockMask.from_tiles(TILES, TILES[:2]),
        ValueError,
        "full must have the shape",
    ),
    "tiles that do not cover": (
        lambda: numflash.BlockMask.from_tiles(TILES, seqlen_q=500, seqlen_k=300),
        ValueError,
        "seqlens 500 and 300 have 4 x 3 blocks",
    ),
    "one seqlen": (
        lambda: numflash.BlockMask.from_tiles(TILES, seqlen_q=300),
        ValueError,
        "go together",
    ),
    "FlexAttention's counts of another dtype": (
        lambda: numflash.BlockMask.from_flex_attention(
            flex(np.ones((1, 1, 2, 2)), kv_num_blocks=np.ones((1, 1, 2), np.int64))
        ),
        TypeError,
        "kv_num_blocks must be int32, got int64",
    ),
    "FlexAttention's lists of another shape": (
        lambda: numflash.BlockMask.from_flex_attention(
            flex(np.ones((1, 1, 2, 2)), full_kv_indices=np.ones((1, 1, 3, 2), np.int32))
        ),
        ValueError,
        "full_kv_indices must have 4 dimensions that begin with",
    ),
    "no block mask": (
        lambda: numflash.attention(X, X, X, block_mask=TILES),
        TypeError,
        "block_mask must be a BlockMask",
    ),
    "of other sequences": (
        lambda: numflash.attention(
            X, X, X, block_mask=numflash.create_block_mask(causal, 1, 1, 41, 40, 16)
        ),
        ValueError,
        "must be made for seqlen_q and seqlen_k of q and k, 40 and 40, got 41 and 40",
    ),
    "of other blocks": (
        lambda: numflash.attention(
            X, X, X, block_mask=numflash.BlockMask.from_tiles(TILES[:2], block_size=16)
        ),
        ValueError,
        "must have 3 x 3 blocks of 16 x 16",
    ),
    "of other heads": (
        lambda: numflash.attention(
            X, X, X, block_mask=numflash.create_block_mask(causal, 1, 3, 40, 40, 16)
        ),
        ValueError,
        "block_mask must have heads 1 or 2",
    ),
    "of another batch": (
        lambda: numflash.attention(
            X, X, X, block_mask=numflash.create_block_mask(causal, 2, 1, 40, 40, 16)
        ),
        ValueError,
        "block_mask must have batch 1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, error, text = BAD[name]
    with pytest.raises(error, match=text):
        call()


def test_dispatch_is_explained_for_a_gpu_that_is_not_here():
    q = np.zeros((1, 256, 2, 128), np.float16)
    mask = numflash.create_block_mask(causal, 1, 1, 256, 256)
    found = numflash.explain_dispatch(q, q, q, block_mask=mask, arch="NVIDIA H200")
    assert found.forward.traits.blocks == (128, 128) and found.forward.traits.keeps_scores
    assert set(found.backward) == {"backward-dq", "backward-dkdv"}


@thorough
def test_pytorch_s_own_block_masks_are_taken():
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("torch.nn.attention.flex_attention")
    made = theirs.create_block_mask(causal, 1, 2, 100, 90, device="cpu", BLOCK_SIZE=32)
    mask = numflash.BlockMask.from_flex_attention(made)
    i, j = np.ogrid[:100, :90]
    np.testing.assert_array_equal(mask.dense(), np.broadcast_to(i >= j, (1, 2, 100, 90)))
    counts = torch.tensor([[[1, 2]]], dtype=torch.int32)
    indices = torch.tensor([[[[0, 1], [0, 1]]]], dtype=torch.int32)
    whole = theirs.BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=16)
    assert numflash.BlockMask.from_flex_attention(whole).dense().mean() == 0.75
