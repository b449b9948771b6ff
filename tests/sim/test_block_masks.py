"""Block masks on every implementation, forward and gradients, against float64."""

import numpy as np
import pytest

import numflash
from numflash.calls import ready
from numflash.runtime.driver import limits_of_device
from numflash.runtime.numpy_arrays import NumPy
from numflash.runtime.views import numpy_dtype
from tests.support.covering import FULL, some, thorough

PORTABLE = {"forward": "m8n8w2", "backward-dq": "m8n8w2", "backward-dkdv": "m8n8w2"}
# GPU, dtype, block size, configs: each with another depth of copies, and keys split or not. Most
# blocks are two tiles.
KERNELS = {
    "portable": ("sm_80", "float32", 16, PORTABLE),
    "sm80-one-stage": (
        "sm_80",
        "bfloat16",
        32,
        {
            "forward": "sm80-m16n16w1s1",
            "backward-dq": "sm80-m32n16w2s2",
            "backward-dkdv": "sm80-m16n16w1s1",
        },
    ),
    "sm80-two-stages": (
        "sm_80",
        "float16",
        32,
        {
            "forward": "sm80-m32n16w2s2",
            "backward-dq": "sm80-m16n16w1s1",
            "backward-dkdv": "sm80-m16n32w2s2",
        },
    ),
    "sm80-splits": (
        "sm_80",
        "float16",
        32,
        {
            "forward": "sm80-m16n16w1s3x3",
            "backward-dq": "sm80-m16n32w1s3",
            "backward-dkdv": "sm80-m16n32w1s3-apart",
        },
    ),
    "sm75": (
        "sm_75",
        "float16",
        32,
        {
            "forward": "sm75-m16n16w1s1x2",
            "backward-dq": "sm75-m32n16w1s1",
            "backward-dkdv": "sm75-m16n16w1s1-apart",
        },
    ),
    "tf32": (
        "sm_80",
        "float32",
        32,
        {
            "forward": "sm80-m16n16w1s2",
            "backward-dq": "sm80-m16n16w1s2",
            "backward-dkdv": "sm80-m16n16w1s2",
        },
    ),
    "sm90-overlap": ("sm_90a", "bfloat16", 64, {"forward": "sm90-m64n32w4s2-overlap-persistent"}),
    "sm90-one-stage": ("sm_90a", "float16", 64, {"forward": "sm90-m64n64w4s1"}),
    "sm90-pingpong": (
        "sm_90a",
        "float16",
        128,
        {"forward": "sm90-m128n32w8s2-overlap-pingpong-persistent"},
    ),
    "sm90-splits": ("sm_90a", "bfloat16", 64, {"forward": "sm90-m64n32w4s3x2-overlap"}),
    "sm90-clusters": ("sm_90a", "float16", 128, {"forward": "sm90-m64n64w4s2-c2-overlap"}),
    "sm90-backward": (
        "sm_90a",
        "bfloat16",
        64,
        {
            "forward": "sm90-m64n32w4s1",
            "backward-dq": "sm90-m64n32w4s2",
            "backward-dkdv": "sm90-m32n64w4s3",
        },
    ),
    "sm90-one-backward": (
        "sm_90a",
        "float16",
        128,
        {"forward": "sm90-m64n64w4s1", "backward": "sm90-m64n64w4s2"},
    ),
}
FP8 = {
    "fp8-sm89": ("sm_89", 64, "fp8-sm89-m32n64w2s2"),
    "fp8-sm80-splits": ("sm_80", 64, "fp8-sm80-m32n32w1s1x3"),
    "fp8-sm90": ("sm_90a", 128, "fp8-sm90-m64n128w4s2-overlap-persistent"),
    "fp8-sm90-two-tiles-a-stage": ("sm_90a", 128, "fp8-sm90-m128n64w8s2-pingpong-persistent"),
}


def kernels(*names, kept):
    """A test of some of the kernels; NUMFLASH_TEST_FULL=1 takes all whose keys are not split."""
    names = some(names, *kept)
    if FULL:
        whole = [name for name, (*_, texts) in KERNELS.items() if "x" not in texts["forward"]]
        names = dict.fromkeys([*names, *whole])
    return pytest.mark.parametrize("name", names)


@pytest.fixture(autouse=True)
def on(monkeypatch):
    """A function that chooses the simulated GPU. Results hold NaN before they are written."""
    empty = NumPy.empty

    def poisoned(self, shape, dtype, device):
        array = empty(self, shape, dtype, device)
        array.view(np.uint8)[...] = 0xFF
        return array

    def be(arch):
        monkeypatch.setenv("NUMFLASH_SIM_ARCH", arch)
        limits_of_device.cache_clear()

    monkeypatch.setattr(NumPy, "empty", poisoned)
    monkeypatch.setattr(ready, "_ready", {})
    yield be
    limits_of_device.cache_clear()


def inputs(dtype, seqlen_q, seqlen_k, batch=1, heads=2, heads_kv=1, head_dim=16):
    """q, k, v and dout."""
    rng = np.random.default_rng(11)
    shapes = [(seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv), (seqlen_q, heads)]
    arrays = [rng.standard_normal((batch, *shape, head_dim)) for shape in shapes]
    return [x.astype(numpy_dtype(dtype)) for x in arrays]


def pattern(batch, heads, rows, columns, density=0.5, seed=5):
    """Random tiles: a row and a column of each head are empty, the first row is not."""
    tiles = np.random.default_rng(seed).random((batch, heads, rows, columns)) < density
    for place in np.ndindex(batch, heads):
        tiles[place][rows - 1 - sum(place) % rows] = False
        tiles[place][:, sum(place) % columns] = False
        tiles[place][0, -1] = True
    return tiles


def run(name, arrays, **options):
    """out, lse and, where the kernels have a backward, the gradients."""
    *_, configs = KERNELS[name]
    q, k, v, dout = arrays
    if name == "tf32":
        options["precision"] = "tf32"
    out, lse = numflash.attention(q, k, v, config=configs["forward"], return_lse=True, **options)
    backward = {family: text for family, text in configs.items() if family != "forward"}
    if not backward:
        return out, lse
    gradients = numflash.attention_backward(dout, q, k, v, out, lse, config=backward, **options)
    return out, lse, *gradients


def check(name, arrays, **options):
    *_, configs = KERNELS[name]
    q, k, v, dout = arrays
    if name == "tf32":
        options["precision"] = "tf32"
    dout = dout if len(configs) > 1 else None
    report = numflash.check(q, k, v, dout=dout, config=configs, **options)
    assert report.passed, f"\n{report}"


KEPT = "portable", "sm80-two-stages", "sm90-pingpong", "sm90-backward"


@pytest.mark.parametrize("name", some(KERNELS, *KEPT))
def test_random_blocks_of_each_head_are_within_budget(on, name):
    """Grouped heads, each with its own list; ragged ends; rows and columns without a block."""
    arch, dtype, size, _ = KERNELS[name]
    on(arch)
    tiles = pattern(1, 2, 2, 3)
    mask = numflash.BlockMask.from_tiles(tiles, block_size=size)
    check(name, inputs(dtype, size + 9, 2 * size + 5), block_mask=mask)


@kernels(
    "portable",
    "sm80-one-stage",
    "sm80-splits",
    "sm90-pingpong",
    "sm90-splits",
    "sm90-backward",
    "sm90-one-backward",
    kept=["sm80-one-stage"],
)
def test_batches_share_lists_and_the_band_cuts_them(on, name):
    arch, dtype, size, _ = KERNELS[name]
    on(arch)
    tiles = pattern(1, 1, 2, 3, 0.7)[0, 0]
    mask = numflash.BlockMask.from_tiles(tiles, block_size=size)
    arrays = inputs(dtype, 2 * size - 7, 3 * size, batch=2, heads=1)
    check(name, arrays, block_mask=mask, window_size=(size + 3, 5), causal_align="top_left")


@kernels(
    "portable",
    "sm80-two-stages",
    "tf32",
    "sm90-overlap",
    "sm90-pingpong",
    "sm90-backward",
    "sm90-one-backward",
    kept=["sm90-overlap"],
)
def test_a_function_with_its_blocks_is_causal_bit_for_bit(on, name):
    arch, dtype, size, _ = KERNELS[name]
    on(arch)

    def causal(batch, head, q_idx, kv_idx):
        return q_idx >= kv_idx

    arrays = inputs(dtype, size + 9, 2 * size + 5, heads=1)
    mask = numflash.create_block_mask(causal, 1, 1, size + 9, 2 * size + 5, size)
    listed = run(name, arrays, block_mask=mask)
    banded = run(name, arrays, causal=True, causal_align="top_left")
    for got, wanted in zip(listed, banded, strict=True):
        assert got.tobytes() == wanted.tobytes()


@kernels(
    "portable",
    "sm80-two-stages",
    "sm80-splits",
    "sm75",
    "sm90-one-stage",
    "sm90-backward",
    kept=["sm80-two-stages"],
)
def test_what_is_in_no_block_is_never_read(on, name):
    """NaN in K and V of columns without a block, and in Q and dO of rows without one."""
    arch, dtype, size, _ = KERNELS[name]
    on(arch)
    tiles = pattern(1, 1, 2, 3, 0.6)[0, 0]
    mask = numflash.BlockMask.from_tiles(tiles, block_size=size)
    arrays = inputs(dtype, 2 * size - 9, 3 * size - 3, heads=1)
    clean = run(name, arrays, block_mask=mask)
    q, k, v, dout = (x.copy() for x in arrays)
    hidden = np.repeat(~tiles.any(0), size)[: k.shape[1]]
    unseen = np.repeat(~tiles.any(1), size)[: q.shape[1]]
    assert hidden.any() and unseen.any() and np.isfinite(clean[0].astype(np.float32)).all()
    # Queries that see nothing give 0 whatever they are; their dQ is 0.
    for x, place in ((k, hidden), (v, hidden), (q, unseen), (dout, unseen)):
        x[:, place] = np.nan
    poisoned = run(name, (q, k, v, dout), block_mask=mask)
    for got, wanted in zip(poisoned, clean, strict=True):
        assert got.tobytes() == wanted.tobytes()
    assert not clean[0][:, unseen].any() and np.isneginf(clean[1][:, :, unseen]).all()


@kernels(
    "portable",
    "sm80-two-stages",
    "sm80-splits",
    "sm90-overlap",
    "sm90-backward",
    kept=["sm90-overlap"],
)
def test_one_block_and_no_block(on, name):
    arch, dtype, size, _ = KERNELS[name]
    on(arch)
    arrays = inputs(dtype, size - 5, size - 2)
    one = numflash.BlockMask.from_tiles(np.ones((1, 1), bool), block_size=size)
    check(name, arrays, block_mask=one)
    nothing = numflash.BlockMask.from_tiles(np.zeros((1, 1), bool), block_size=size)
    out, lse, *gradients = run(name, arrays, block_mask=nothing)
    assert np.isneginf(lse).all() and not out.any() and not any(x.any() for x in gradients)


@thorough
@kernels("portable", "sm80-splits", "sm90-overlap", "sm90-backward", kept=["sm90-overlap"])
def test_documents_of_each_batch_entry_with_everything_else(on, name):
    """A function that reads aux, partial blocks, softcap, sinks and a window at once."""
    arch, dtype, size, _ = KERNELS[name]
    on(arch)
    seqlen = size + 9
    documents = np.sort(np.random.default_rng(2).integers(0, 3, (2, seqlen)), -1).astype(np.int32)

    def document(batch, head, q_idx, kv_idx, of_token):
        return of_token[batch, q_idx] == of_token[batch, kv_idx]

    mask = numflash.create_block_mask(document, 2, None, seqlen, seqlen, size, (documents,))
    wanted = documents[:, None, :, None] == documents[:, None, None, :]
    np.testing.assert_array_equal(mask.dense(), wanted)
    options = {"softcap": 3.0, "sinks": np.array([0.5, -1.0], np.float32)}
    arrays = inputs(dtype, seqlen, seqlen, batch=2)
    check(name, arrays, block_mask=mask, window_size=(size, None), **options)


@thorough
@pytest.mark.parametrize(
    ("config", "arch", "dtype"),
    [
        ("sm80-m16n16w1s2x3-packed", "sm_80", "float16"),
        pytest.param(
            *("sm90-m64n32w4s2x2-packed-overlap-persistent", "sm_90a", "bfloat16"), marks=thorough
        ),
    ],
)
def test_decoding_packs_heads_that_share_a_list_and_splits_its_steps(on, config, arch, dtype):
    on(arch)
    q, k, v, _ = inputs(dtype, 1, 300, batch=2, heads=4, heads_kv=2)
    tiles = pattern(2, 1, 1, 5)
    mask = numflash.BlockMask.from_tiles(tiles, block_size=64, seqlen_q=1, seqlen_k=300)
    report = numflash.check(q, k, v, block_mask=mask, config=config)
    assert report.passed, f"\n{report}"
    of_heads = numflash.BlockMask.from_tiles(np.repeat(tiles, 4, 1), block_size=64)
    with pytest.raises(numflash.UnsupportedError, match="block_mask has a list for each head"):
        numflash.attention(q, k, v, block_mask=of_heads, config=config)
    report = numflash.check(q, k, v, block_mask=of_heads, config=config.replace("-packed", ""))
    assert report.passed, f"\n{report}"


@thorough
@pytest.mark.parametrize("name", some(FP8, "fp8-sm89"))
def test_forwards_on_8_bit_floats_walk_over_lists(on, name):
    arch, size, config = FP8[name]
    on(arch)
    q, k, v, _ = inputs("float16", 2 * size - 9, 3 * size - 5, head_dim=64)
    mask = numflash.BlockMask.from_tiles(pattern(1, 2, 2, 3), block_size=size)
    report = numflash.check(q, k, v, precision="fp8", block_mask=mask, config=config)
    assert report.passed, f"\n{report}"


@thorough
@pytest.mark.usefixtures("shipped_kernels")
def test_a_config_that_does_not_divide_the_blocks_is_refused(on):
    on("sm_90a")
    q, k, v, dout = inputs("float16", 200, 200, head_dim=64)
    mask = numflash.BlockMask.from_tiles(np.ones((2, 2), bool), block_size=128)
    with pytest.raises(numflash.UnsupportedError, match="192 queries do not divide"):
        numflash.attention(
            q, k, v, block_mask=mask, config="sm90-m192n128w12s2-overlap-pingpong-persistent"
        )
    explained = numflash.explain_dispatch(q, k, v, block_mask=mask)
    assert str(explained.forward.config).startswith("sm90-m128n128")
    assert "192 queries do not divide block_mask's blocks of 128" in str(explained)
    out, lse = numflash.attention(q, k, v, block_mask=mask, return_lse=True)
    with pytest.raises(numflash.UnsupportedError, match="with block_mask dK, dV and dQ"):
        numflash.attention_backward(
            dout, q, k, v, out, lse, block_mask=mask, config={"backward": "sm80-m16n16w1s2"}
        )
