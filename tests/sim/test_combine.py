"""The kernel that puts the parts of split keys together, by itself."""

import ml_dtypes
import numpy as np
import pytest

from numflash.configs import CombineConfig, Traits, padded_head_dim
from numflash.configs.features import ABSENT
from numflash.kernels.arguments import Shape, SplitTiles, Tensor
from numflash.kernels.shared.combine import make_combine_kernel
from numflash.simulator import GlobalPointer, launch
from tests.support.covering import some, thorough

pytestmark = pytest.mark.usefixtures("shipped_kernels")

WARPS = 2, 4, 8, 16
ELEMENTS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def parts_of(rng, num_splits, batch=1, seqlen=2, heads=2, head_dim_v=32):
    """Parts (split, batch, seqlen, head, padded head_dim_v) and lse (split, batch, head, seqlen).

    Columns of padding are NaN, as nobody writes them.
    """
    pitch = padded_head_dim(head_dim_v)
    parts = rng.standard_normal((num_splits, batch, seqlen, heads, pitch)).astype(np.float32)
    parts[..., head_dim_v:] = np.nan
    lse = 3 * rng.standard_normal((num_splits, batch, heads, seqlen)).astype(np.float32)
    return parts, lse


def combine(parts, part_lse, num_warps=4, head_dim_v=None, dtype="float32", aligned=True):
    """out (batch, seqlen, head, head_dim_v) and lse (batch, head, seqlen)."""
    num_splits, batch, seqlen, heads, pitch = parts.shape
    head_dim_v = head_dim_v or pitch
    traits = Traits(dtype, 32, pitch, vectorized=aligned)
    kernel = make_combine_kernel(CombineConfig(num_warps), traits)
    # Rows that are not aligned follow each other without a gap.
    row = head_dim_v + 8 if aligned else head_dim_v
    storage = np.dtype(ELEMENTS[dtype])
    out = np.full(batch * seqlen * heads * row + 1, 7, storage)
    lse = np.full((batch, heads, seqlen), np.nan, np.float32)
    bits = out.view(np.uint16) if storage.itemsize == 2 else out
    arrays = [GlobalPointer(x, x.dtype) for x in (parts.ravel(), part_lse.ravel(), bits, lse)]
    strides = seqlen * heads * row, heads * row, row
    shape = Shape(seqlen, 0, heads, 1, 0, head_dim_v, batch)
    parts, part_lse, bits, lse_pointer = arrays
    out_record = Tensor(bits, *strides)
    tiles = SplitTiles(1, 1)
    arguments = [parts, part_lse, out_record, lse_pointer, shape, num_splits, tiles, ABSENT]
    launch(
        kernel.function, batch * seqlen * heads, kernel.num_threads, arguments, kernel.smem_bytes
    )
    rows = out[:-1].reshape(batch, seqlen, heads, row)
    assert (rows[..., head_dim_v:] == 7).all() and out[-1] == 7, "nothing beside the rows"
    return rows[..., :head_dim_v], lse


def exact(parts, part_lse, head_dim_v=None):
    parts, part_lse = parts[..., :head_dim_v].astype(np.float64), part_lse.astype(np.float64)
    largest = part_lse.max(0)
    lse = np.log(np.exp(part_lse - largest).sum(0)) + largest
    weights = np.exp(part_lse - lse)
    return (weights.swapaxes(2, 3)[..., None] * parts).sum(0), lse


def bits_of(*arrays):
    return b"".join(np.ascontiguousarray(x).tobytes() for x in arrays)


@pytest.mark.parametrize("head_dim_v", [20, 32, 96, 256])
@pytest.mark.parametrize("num_splits", some([1, 3, 16, 37], 3, 37))
def test_parts_are_put_together(num_splits, head_dim_v):
    rng = np.random.default_rng(num_splits)
    parts, part_lse = parts_of(rng, num_splits, head_dim_v=head_dim_v)
    out, lse = combine(parts, part_lse, head_dim_v=head_dim_v)
    expected, expected_lse = exact(parts, part_lse, head_dim_v)
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(lse, expected_lse, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize(("head_dim_v", "aligned"), [(64, True), (33, False), (5, False)])
def test_results_are_rounded_and_stored_wherever_rows_lie(dtype, head_dim_v, aligned):
    parts, part_lse = parts_of(np.random.default_rng(1), 5, head_dim_v=head_dim_v)
    out, _ = combine(parts, part_lse, 4, head_dim_v, dtype, aligned)
    wide, _ = combine(parts, part_lse, 4, head_dim_v, "float32", aligned)
    assert bits_of(out) == bits_of(wide.astype(ELEMENTS[dtype]))


SPLITS = (2, 160), (9, 64), (21, 160)


@pytest.mark.parametrize(("num_splits", "head_dim_v"), some(SPLITS, (9, 64)))
def test_the_bits_do_not_depend_on_the_number_of_warps(num_splits, head_dim_v, each_seed):
    parts, part_lse = parts_of(np.random.default_rng(2), num_splits, head_dim_v=head_dim_v)
    parts *= np.float32(1.1) ** np.arange(num_splits)[:, None, None, None, None]
    warps = WARPS if each_seed == 0 else (4,)
    assert len({bits_of(*combine(parts, part_lse, each, head_dim_v)) for each in warps}) == 1
    first = combine(parts, part_lse, 2, head_dim_v)
    assert bits_of(*first) == bits_of(*combine(parts, part_lse, warps[-1], head_dim_v))


@thorough
def test_the_bits_of_a_row_are_those_of_its_own_splits():
    """Not of other rows or batch entries, nor of splits that have no keys."""
    parts, part_lse = parts_of(np.random.default_rng(3), 21, batch=3)
    together = combine(parts, part_lse)
    for b in range(3):
        alone = combine(parts[:, b : b + 1].copy(), part_lse[:, b : b + 1].copy())
        assert bits_of(*alone) == bits_of(*(x[b : b + 1] for x in together))
    empty, no_keys = np.zeros_like(parts[:16]), np.full_like(part_lse[:16], -np.inf)
    longer = combine(np.concatenate([parts, empty]), np.concatenate([part_lse, no_keys]))
    assert bits_of(*longer) == bits_of(*together)


@pytest.mark.parametrize("num_warps", WARPS)
def test_a_row_without_keys_is_zero_and_its_lse_minus_infinite(num_warps):
    parts, part_lse = parts_of(np.random.default_rng(4), 18)
    part_lse[:, 0, 0, 1], parts[:, 0, 1, 0] = -np.inf, 0
    part_lse[3:, 0, 1, 0], parts[3:, 0, 0, 1] = -np.inf, 0
    out, lse = combine(parts, part_lse, num_warps)
    assert (out[0, 1, 0] == 0).all() and lse[0, 0, 1] == -np.inf
    with np.errstate(invalid="ignore"):
        some, some_lse = exact(parts[:3], part_lse[:3])
    np.testing.assert_allclose(out[0, 0, 1], some[0, 0, 1], rtol=2e-6, atol=2e-6)
    assert np.isfinite(np.delete(lse.ravel(), 1)).all()
    np.testing.assert_allclose(lse[0, 1, 0], some_lse[0, 1, 0], rtol=2e-6)


@pytest.mark.parametrize("split", [0, 1, 15, 16, 19])
def test_a_nan_in_a_part_reaches_its_row_and_no_other(split):
    parts, part_lse = parts_of(np.random.default_rng(5), 20)
    part_lse[split, 0, 1, 0], parts[split, 0, 0, 1] = np.nan, np.nan
    parts[split, 0, 1, 1, 7], parts[split, 0, 1, 1, 8] = np.inf, np.nan
    out, lse = combine(parts, part_lse)
    assert np.isnan(out[0, 0, 1]).all() and np.isnan(lse[0, 1, 0])
    assert out[0, 1, 1, 7] == np.inf and np.isnan(out[0, 1, 1, 8])
    others = out.copy()
    others[0, 0, 1], others[0, 1, 1, 7:9] = 0, 0
    assert np.isfinite(others).all() and np.isnan(lse).sum() == 1
