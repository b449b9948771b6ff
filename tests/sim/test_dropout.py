"""Dropout in kernels: the same mask in all of them, bit for bit, and the reference's.

Inputs are chosen so that results show P and dS themselves. With Q = 0 all scores are 0, and of an
identity for V the output is P, which is 0 exactly where a score is dropped. Likewise dV is P of an
identity for dO. With dO and V such that all dP are 1, dS is above 0 where a score is kept and
below elsewhere: dQ is dS of an identity for K, dK of one for Q.
"""

import numpy as np
import pytest

import numflash
from numflash import reference
from numflash.calls import ready
from numflash.configs import Traits
from numflash.ptx import cuda, mov_tid_x, u32
from numflash.runtime.driver import limits_of_device
from numflash.runtime.numpy_arrays import NumPy
from numflash.runtime.philox import key_of, philox, random_bits
from numflash.simulator import launch
from numflash.tiles.features import Drawn
from numflash.tiles.mma.dropout import make_draw, make_is_kept
from numflash.tiles.mma.fragments import accumulator_column, accumulator_row
from numflash.tiles.philox import philox as philox_on_device
from numflash.tiles.portable.dropout import make_draw_kept, words_of_bits
from numflash.tiles.portable.lanes import COLUMN_LANES, ROW_LANES
from tests.support.covering import some, thorough
from tests.support.faults import Mutation, load

FEATURES = ("dropout",)
SEED, P = 2**40 + 9, 0.3
SIZES = 2, 2, 24, 40  # batch, heads, seqlen_q, seqlen_k


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


# Device functions


def test_philox_on_the_device_is_that_of_the_reference():
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 2**32, (32, 4), np.uint32)
    counters[0], counters[1] = 0, 0xFFFFFFFF
    found = np.zeros((32, 4), np.uint32)
    k0, k1 = (u32(word) for word in key_of(SEED))

    def kernel():
        lane = cuda.threadIdx.x
        found[lane] = philox_on_device(*counters[lane], k0, k1)

    launch(kernel, 1, 32, ())
    np.testing.assert_array_equal(found, np.stack(philox(*counters.T, key=key_of(SEED)), -1))


def drawn(limit, row=0, column=0, head=1, batch=1):
    """The arguments of a head, for a seed."""
    words = (u32(word) for word in (*key_of(SEED), head, batch, limit << 16))
    return Drawn(*words, row, column)


def kept_of_head(limit, rows, columns):
    return random_bits((2, 2, rows, columns), SEED)[1, 1] >= limit


@pytest.mark.parametrize("by_row", [True, False], ids=["by_row", "by_column"])
@pytest.mark.parametrize(("m_tiles", "n_tiles"), [(1, 2), (2, 4)])
def test_accumulators_have_the_bits_of_their_scores(m_tiles, n_tiles, by_row):
    rows, columns = 2 * 16 * m_tiles, 8 * n_tiles
    found = np.zeros((rows, columns), bool)
    draw, is_kept = make_draw(n_tiles, FEATURES, by_row), make_is_kept(by_row)
    limit, first = 30000, 32
    args = drawn(limit, first if by_row else 0, 0 if by_row else first)

    def kernel():
        row, column = accumulator_row(16 * m_tiles), accumulator_column()
        row, column = int(row), int(column)
        words = cuda.local.array(4, u32)
        for pair in range(m_tiles * n_tiles // 2):
            draw(words, pair, row, column, args)
            y, x = row + 16 * (pair // (n_tiles // 2)), column + 16 * (pair % (n_tiles // 2))
            for n in range(8):
                place = y + 8 * (n // 2 % 2), x + 8 * (n // 4) + n % 2
                found[place] = is_kept(words, n, args.limit)

    launch(kernel, 1, 64, ())
    # Rows of the tile begin at row 32 of the caller's: queries, or keys.
    if by_row:
        expected = kept_of_head(limit, first + rows, columns)[first:]
    else:
        expected = kept_of_head(limit, columns, first + rows)[:, first:].T
    np.testing.assert_array_equal(found, expected)


@thorough
@pytest.mark.parametrize("by_row", [True, False], ids=["by_row", "by_column"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 2), (2, 3), (4, 2), (4, 3), (8, 4)])
def test_portable_tiles_have_the_bits_of_their_scores(rows, columns, by_row):
    tile = 2 * ROW_LANES * rows, COLUMN_LANES * columns
    found = np.zeros(tile, bool)
    draw_kept, limit = make_draw_kept(rows, columns, FEATURES, by_row), 20000
    args = drawn(limit)

    def kernel():
        thread = int(mov_tid_x())
        row = thread // 32 * ROW_LANES * rows + thread % 32 // COLUMN_LANES
        column = thread % COLUMN_LANES
        kept = cuda.local.array(words_of_bits(rows * columns), u32)
        draw_kept(kept, row, column, args)
        for i in range(rows * columns):
            place = row + ROW_LANES * (i // columns), column + COLUMN_LANES * (i % columns)
            found[place] = int(kept[i // 32]) >> i % 32 & 1

    launch(kernel, 1, 64, ())
    expected = kept_of_head(limit, *(tile if by_row else tile[::-1]))
    np.testing.assert_array_equal(found, expected if by_row else expected.T)


# Whole kernels

FORWARDS = {
    "portable": ("sm_80", np.float32, "m16n16w2"),
    "portable-wide": ("sm_80", np.float32, "m32n24w1"),
    "sm80": ("sm_80", np.float16, "sm80-m32n16w1s2"),
    "sm80-splits": ("sm_80", np.float16, "sm80-m16n32w1s1x3"),
    "sm75": ("sm_75", np.float16, "sm75-m32n32w2s1"),
    "sm90": ("sm_90a", np.float16, "sm90-m64n32w4s2-overlap-persistent"),
    "sm90-splits": ("sm_90a", np.float16, "sm90-m128n16w8s2x2-pingpong"),
}
BACKWARDS = {
    "portable": (np.float32, {"backward-dq": "m16n16w1", "backward-dkdv": "m32n16w1"}),
    "sm80": (np.float16, {"backward-dq": "sm80-m32n16w1s1", "backward-dkdv": "sm80-m16n32w1s1"}),
    "sm75": (np.float16, {"backward-dq": "sm75-m16n32w1s1", "backward-dkdv": "sm75-m32n32w2s1"}),
    "apart": (
        np.float16,
        {"backward-dq": "sm80-m16n32w1s3", "backward-dkdv": "sm80-m16n32w1s3-apart"},
    ),
    "together": (np.float16, {"backward": "sm80-m32n32w2s1x2"}),
    "sm90": (np.float16, {"backward-dq": "sm90-m64n64w4s1", "backward-dkdv": "sm90-m64n64w4s1"}),
}


def eye(n, batch, heads, dtype):
    return np.broadcast_to(np.eye(n, dtype=dtype)[None, :, None], (batch, n, heads, n)).copy()


def mask_of_forward(dtype, config, **options):
    """The scores that a forward keeps, (batch, heads, seqlen_q, seqlen_k)."""
    batch, heads, seqlen_q, seqlen_k = SIZES
    q, k = (np.zeros((batch, n, heads, 32), dtype) for n in (seqlen_q, seqlen_k))
    out = numflash.attention(q, k, eye(seqlen_k, batch, heads, dtype), config=config, **options)
    return out.swapaxes(1, 2) != 0


def mask_of_gradient(name, dtype, configs, **options):
    """The scores that dQ, dK or dV keeps, (batch, heads, seqlen_q, seqlen_k)."""
    batch, heads, seqlen_q, seqlen_k = SIZES
    # Bulk copies want rows of 16 bytes.
    columns = {"q": seqlen_k, "k": seqlen_q, "v": 8}[name]
    q, k = (np.zeros((batch, n, heads, columns), dtype) for n in (seqlen_q, seqlen_k))
    v, dout = (np.ones((batch, n, heads, 8), dtype) for n in (seqlen_k, seqlen_q))
    if name == "q":
        k = eye(seqlen_k, batch, heads, dtype)
    elif name == "k":
        q = eye(seqlen_q, batch, heads, dtype)
    else:
        dout, v = eye(seqlen_q, batch, heads, dtype), np.ones((*v.shape[:3], seqlen_q), dtype)
    # The forward's results, of scores that are all 0.
    lse = np.full((batch, heads, seqlen_q), np.log(seqlen_k), np.float32)
    weights = EXPECTED / (1 - round(65536 * P) / 65536) / seqlen_k
    out = np.broadcast_to(weights.sum(-1).swapaxes(1, 2)[..., None], dout.shape).astype(dtype)
    gradient, *_ = numflash.attention_backward(
        dout, q, k, v, out, lse, wrt=(name,), config=configs, **options
    )
    found = gradient.swapaxes(1, 2) > 0
    return found if name == "q" else found.swapaxes(2, 3)


EXPECTED = reference.dropout_mask(*SIZES, dropout_p=P, seed=SEED)


@pytest.mark.parametrize("name", some(FORWARDS, "portable", "sm90"))
def test_every_forward_keeps_what_the_reference_does(on, name):
    arch, dtype, config = FORWARDS[name]
    on(arch)
    got = mask_of_forward(dtype, config, dropout_p=P, seed=SEED)
    np.testing.assert_array_equal(got, EXPECTED)


@pytest.mark.parametrize("name", some(BACKWARDS, "apart"))
def test_every_backward_keeps_what_the_reference_does(on, name):
    dtype, configs = BACKWARDS[name]
    on({"sm75": "sm_75", "sm90": "sm_90a"}.get(name, "sm_80"))
    for gradient in "qkv":
        got = mask_of_gradient(gradient, dtype, configs, dropout_p=P, seed=SEED)
        np.testing.assert_array_equal(got, EXPECTED, err_msg=f"d{gradient}")


def inputs(dtype=np.float16, seqlen_q=20, seqlen_k=50, heads=2, heads_kv=1, head_dim=32):
    """q, k, v and dout."""
    rng = np.random.default_rng(3)
    sizes = (seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv), (seqlen_q, heads)
    return [rng.standard_normal((1, *size, head_dim)).astype(dtype) for size in sizes]


SMALL = {
    np.float16: (
        "sm80-m16n16w1s1",
        {"backward-dq": "sm80-m16n16w1s1", "backward-dkdv": "sm80-m16n16w1s1"},
    ),
    np.float32: ("m16n16w2", {"backward-dq": "m16n16w2", "backward-dkdv": "m16n16w2"}),
}


def results(q, k, v, dout, **options):
    """The bits of out, lse and the gradients."""
    forward, backward = SMALL[q.dtype.type]
    out, lse = numflash.attention(q, k, v, return_lse=True, config=forward, **options)
    gradients = numflash.attention_backward(dout, q, k, v, out, lse, config=backward, **options)
    return [x.tobytes() for x in (out, lse, *gradients)]


@thorough
@pytest.mark.parametrize("dtype", some(SMALL, np.float16))
def test_without_a_share_nothing_changes(dtype):
    arrays = inputs(dtype, seqlen_k=20)
    plain = results(*arrays)
    assert results(*arrays, dropout_p=0, seed=5) == plain
    # So small a share that it is rounded to none runs the kernels that drop, and they drop none.
    assert results(*arrays, dropout_p=2.0**-18, seed=5) == plain


@thorough
def test_seeds_of_all_kinds_mean_the_same():
    arrays = inputs(seqlen_q=9, seqlen_k=20, heads=1)
    for seed, others in (
        (-3, (np.array([-3]), np.array(-3, np.int32), np.array([2**64 - 3], np.uint64))),
        (5, (np.int64(5), np.array([5], np.int32), np.array([5], np.uint64))),
    ):
        expected = results(*arrays, dropout_p=P, seed=seed)
        for other in others:
            assert results(*arrays, dropout_p=P, seed=other) == expected, other.dtype
    assert results(*arrays, dropout_p=P, seed=6) != expected
    assert results(*arrays, dropout_p=P, seed=5 + 2**32) != expected


@thorough
def test_other_seeds_and_shares_make_nothing_ready_again():
    q, k, v, _ = inputs()
    outs, counts = [], []
    for dropout_p, seed in ((0.1, 1), (0.5, 1), (0.5, 2), (0.9, -(2**63))):
        outs.append(numflash.attention(q, k, v, dropout_p=dropout_p, seed=seed))
        counts.append(len(ready._ready))
        exact, _ = reference.attention(q, k, v, dropout_p=dropout_p, seed=seed)
        assert np.abs(outs[-1] - exact).max() < 0.02
    assert counts == [1] * 4


@thorough
def test_a_plan_reads_its_seed_again():
    q, k, v, _ = inputs()
    seed = np.array([1])
    plan = numflash.plan(q, k, v, dropout_p=P, seed=seed)
    first = plan.launch().copy()
    seed += 1
    np.testing.assert_array_equal(plan.launch(), numflash.attention(q, k, v, dropout_p=P, seed=2))
    assert (plan.out != first).any()


def test_a_wrong_share_is_refused_though_a_right_call_is_ready():
    q, k, v, _ = inputs()
    numflash.attention(q, k, v, dropout_p=P, seed=1)
    for options, error in (
        ({"dropout_p": 1.0, "seed": 1}, ValueError),
        ({"dropout_p": P, "seed": True}, TypeError),
        ({"dropout_p": P, "seed": 2**64}, ValueError),
    ):
        with pytest.raises(error):
            numflash.attention(q, k, v, **options)


@pytest.mark.parametrize("dtype", some(SMALL, np.float16))
def test_a_part_of_a_larger_problem_drops_its_share(dtype):
    q, k, v, dout = inputs(dtype, seqlen_q=40, seqlen_k=50, heads=4, heads_kv=4, head_dim=16)
    forward, backward = SMALL[dtype]
    rows, columns, heads = slice(16, 40), slice(32, 50), slice(1, 3)
    q, dout = q[:, rows, heads], dout[:, rows, heads]
    k, v = k[:, columns, heads], v[:, columns, heads]
    origin, options = (16, 32, 1), {"dropout_p": P, "seed": SEED}
    whole = reference.dropout_mask(1, 4, 40, 50, **options)
    part = reference.dropout_mask(1, 2, 24, 18, origin=origin, **options)
    np.testing.assert_array_equal(part, whole[:, heads, rows, columns])
    configs = {"forward": forward, **backward}
    options |= {"origin": origin, "shift": -16, "config": configs}
    report = numflash.check(q, k, v, dout=dout, causal=True, causal_align="top_left", **options)
    assert report.passed, f"\n{report}"
    with pytest.raises(ValueError, match="origin must have a row that is a multiple of 16"):
        numflash.attention(q, k, v, **options | {"origin": (8, 32, 1), "config": forward})


WALKS = {
    "portable": ("sm_80", np.float32, *SMALL[np.float32]),
    "sm80": ("sm_80", np.float16, *SMALL[np.float16]),
    "sm90": (
        "sm_90a",
        np.float16,
        "sm90-m64n32w4s2-overlap-persistent",
        {"backward-dq": "sm90-m64n32w4s1", "backward-dkdv": "sm90-m32n64w4s2"},
    ),
}


@pytest.mark.parametrize("name", some(WALKS, "sm80"))
def test_tiles_that_a_list_names_have_their_own_bits(on, name):
    """Every second block is empty: the n-th tile of a walk is not the n-th of the keys."""
    arch, dtype, forward, backward = WALKS[name]
    on(arch)
    blocks = 64 if name == "sm90" else 16
    rows, columns = 2 * blocks, 4 * blocks
    q, k, v, dout = inputs(dtype, rows, columns, heads=1, head_dim=16)

    def odd_blocks(b, h, i, j):
        return (j // blocks) % 2 == 1

    mask = numflash.create_block_mask(odd_blocks, 1, 1, rows, columns, blocks)
    report = numflash.check(
        q,
        k,
        v,
        dout=dout,
        block_mask=mask,
        config={"forward": forward, **backward},
        dropout_p=P,
        seed=SEED,
    )
    assert report.passed, f"\n{report}"


@thorough
@pytest.mark.parametrize("dtype", SMALL)
def test_gradients_of_arrays_that_scores_read_know_of_dropout(dtype):
    q, k, v, dout = inputs(dtype, seqlen_k=30, head_dim=16)
    rng, options = np.random.default_rng(5), {"dropout_p": P, "seed": SEED, "causal": True}
    arrays = {
        "bias": rng.standard_normal((1, 2, 20, 30)).astype(np.float32),
        "alibi_slopes": np.array([0.1, 0.5], np.float32),
        "sinks": np.array([0.0, 1.0], np.float32),
    }
    report = numflash.check(
        q, k, v, dout=dout, wrt=("q", "bias", "alibi_slopes", "sinks"), **arrays, **options
    )
    assert report.passed, f"\n{report}"


@pytest.mark.usefixtures("shipped_kernels")
def test_heads_with_random_bits_share_no_tile(on):
    on("sm_80")
    q, k, v, _ = inputs(seqlen_q=1, heads=8)
    explained = numflash.explain_dispatch(q, k, v, dropout_p=P, seed=1)
    assert explained.geometry.pack == 1
    assert numflash.explain_dispatch(q, k, v).geometry.pack == 8
    assert numflash.check(q, k, v, dropout_p=P, seed=1).passed


def test_traits_without_dropout_draw_nothing():
    assert Traits("float16", 64, 64, FEATURES).drops_weights
    assert not Traits("float16", 64, 64, ("softcap", "alibi", "sinks")).drops_weights


TILES = "numflash.tiles"
FAULTS = {
    "a column's counter without the columns before": (
        f"{TILES}.philox",
        Mutation("column", "(j >> 4 << 2) + ((j & 7) >> 1)", "(j & 7) >> 1"),
    ),
    "neighbouring rows of a tile by columns exchange nothing": (
        f"{TILES}.mma.dropout",
        Mutation("exchange", "i32(given), _NEXT_ROW", "i32(given), 0"),
    ),
    "the seed of another head": (
        f"{TILES}.features",
        Mutation("head", "u32(head + record.head), u32(batch)", "u32(record.head), u32(batch)"),
    ),
    "row sums of what is kept": (
        "numflash.tiles.rows",
        Mutation("factor", "factor *= records.dropout.scale", "factor *= f32(1)"),
    ),
    "delta not over the factor": (
        "numflash.kernels.shared.delta",
        Mutation("delta", "per_weight /= features.dropout.scale", "per_weight /= f32(1)"),
    ),
    "dP not weighed": (
        f"{TILES}.mma.softmax",
        Mutation("dP", "gradient = dp_acc[i] if kept else f32(0)", "gradient = dp_acc[i]"),
    ),
}
FAULTY = (
    f"{TILES}.philox",
    f"{TILES}.features",
    f"{TILES}.rows",
    f"{TILES}.mma.dropout",
    f"{TILES}.mma.softmax",
    "numflash.kernels.mma.forward",
    "numflash.kernels.mma.backward_dq",
    "numflash.kernels.mma.backward_dkdv",
    "numflash.kernels.shared.delta",
)


@thorough
@pytest.mark.parametrize("name", some([None, *FAULTS], every=2))
def test_a_kernel_that_drops_wrongly_is_found(on, monkeypatch, name):
    on("sm_80")
    if name is not None:
        module, fault = FAULTS[name]
        load(FAULTY, module, fault, monkeypatch)
    q, k, v, dout = inputs()
    config = {
        "forward": "sm80-m32n16w2s1",
        "backward-dq": "sm80-m16n16w1s1",
        "backward-dkdv": "sm80-m16n16w1s1",
    }
    report = numflash.check(q, k, v, dout=dout, dropout_p=P, seed=SEED, config=config)
    assert report.passed == (name is None), f"\n{report}"
