"""Rotary embeddings on a GPU: at full size, against float64 and the tables' own exactness."""

import numpy as np
import pytest

import numflash
from numflash.runtime.arrays import to_numpy
from numflash.runtime.views import numpy_dtype

ROUNDING = {"float32": 1e-6, "float16": 3e-3, "bfloat16": 2.5e-2}


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy")


def _normal(cupy, shape, dtype):
    x = cupy.random.default_rng(0).standard_normal(shape, dtype="float32")
    return x.astype(numpy_dtype(dtype))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(128, 128), (64, 32), (40, 10)])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_rows_are_rotated_as_in_float64(
    cupy, poisoned_pool, dtype, head_dim, rotary_dim, interleaved
):
    x = _normal(cupy, (2, 1027, 9, head_dim), dtype)
    cos, sin = numflash.rotary_tables(2**17 + 1100, rotary_dim, like=x)
    offsets = cupy.array([3, 2**17], "int32")
    options = {"interleaved": interleaved, "conjugate": interleaved}
    got = numflash.apply_rotary(x, cos, sin, offsets=offsets, **options)
    given = [to_numpy(each).astype(np.float64) for each in (x, cos, sin)]
    wanted = numflash.reference.apply_rotary(*given, offsets=to_numpy(offsets), **options)
    np.testing.assert_allclose(to_numpy(got).astype(np.float64), wanted, atol=ROUNDING[dtype])
    inside = x.copy()
    numflash.apply_rotary(inside, cos, sin, offsets=offsets, out=inside, **options)
    assert bool((inside.view("u1") == got.view("u1")).all())


def test_a_graph_is_replayed_with_other_lengths(cupy):
    x = _normal(cupy, (700, 4, 64), "float16")
    cos, sin = numflash.rotary_tables(1024, 64, like=x)
    bounds, offsets = cupy.array([0, 300, 700], "int32"), cupy.array([5, 0], "int32")
    out = cupy.empty_like(x)
    call = {"cu_seqlens": bounds, "offsets": offsets, "out": out}
    numflash.apply_rotary(x, cos, sin, **call)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        numflash.apply_rotary(x, cos, sin, **call)
        graph = stream.end_capture()
        bounds[...], offsets[...] = cupy.array([0, 1, 650], "int32"), cupy.array([9, 70], "int32")
        graph.launch()
    stream.synchronize()
    call = {name: to_numpy(array) for name, array in call.items() if name != "out"}
    given = [to_numpy(each) for each in (x, cos, sin)]
    wanted = numflash.reference.apply_rotary(*given, **call)
    np.testing.assert_allclose(to_numpy(out), wanted, atol=ROUNDING["float16"])
