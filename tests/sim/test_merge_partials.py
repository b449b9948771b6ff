"""`merge_partials`: attention over parts of the keys, joined to attention over all of them."""

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest

import numflash
from numflash.calls import merging

ELEMENTS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def arrays(dtype="float32", shape=(2, 3, 2, 20), seqlen_k=40, head_dim_v=20, seed=0):
    rng = np.random.default_rng(seed)
    batch, _, heads, head_dim = shape
    shapes = shape, (batch, seqlen_k, heads, head_dim), (batch, seqlen_k, heads, head_dim_v)
    return [rng.standard_normal(each).astype(ELEMENTS[dtype]) for each in shapes]


def reference(q, k, v, **options):
    """(out in the dtype of q, lse in float32) of the specification."""
    out, lse = numflash.reference.attention(q, k, v, **options)
    return out.astype(q.dtype), lse.astype(np.float32)


def parts_of(q, k, v, bounds, axis=1, **options):
    """(outs, lses) of attention over the keys between neighbouring bounds."""
    found = []
    for begin, end in pairwise(bounds):
        at = (slice(None),) * axis + (slice(begin, end),)
        found.append(reference(q, k[at], v[at], **options))
    return [list(each) for each in zip(*found, strict=True)]


@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize("head_dim_v", [20, 32])
@pytest.mark.parametrize("bounds", [(0, 40), (0, 7, 40), (0, 1, 9, 10, 40)])
def test_parts_give_what_one_call_gives(bounds, head_dim_v, dtype):
    q, k, v = arrays(dtype, head_dim_v=head_dim_v)
    outs, lses = parts_of(q, k, v, bounds)
    out, lse = numflash.merge_partials(outs, lses)
    exact, exact_lse = numflash.reference.attention(q, k, v)
    assert out.dtype == q.dtype and lse.dtype == np.float32
    error = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 2e-6}[dtype]
    np.testing.assert_allclose(out.astype(np.float32), exact, atol=error)
    np.testing.assert_allclose(lse, exact_lse, atol=5e-6)


@pytest.mark.parametrize("axes", [2, 3, 4])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_layouts_and_dimensions_and_strides(layout, axes):
    q, k, v = arrays(shape=(2, 4, 3, 16), seqlen_k=12, head_dim_v=16)
    if layout == "bhsd":
        q, k, v = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v))
    if axes < 4:
        q, k, v = (x[0] for x in (q, k, v))
    if axes == 2:
        q, k, v = (x[0] if layout == "bhsd" else x[:, 0] for x in (q, k, v))
    axis = axes - 3 if layout == "bshd" and axes > 2 else axes - 2
    outs, lses = parts_of(q, k, v, (0, 5, 12), axis, layout=layout)
    # Every second element of a row, and rows from the last to the first.
    wide = [np.repeat(each, 2, axis=-1)[..., ::2] for each in outs]
    backwards = [each[::-1].copy()[::-1] for each in lses]
    out, lse = numflash.merge_partials(wide, backwards, layout=layout)
    exact, exact_lse = reference(q, k, v, layout=layout)
    assert out.shape == exact.shape and lse.shape == exact_lse.shape
    np.testing.assert_allclose(out, exact, atol=2e-6)
    np.testing.assert_allclose(lse, exact_lse, atol=2e-6)


def test_shifted_parts_of_a_causal_call_are_that_call():
    """As a ring computes them: each step knows a part of the queries and a part of the keys."""
    q, k, v = arrays(shape=(1, 12, 2, 16), seqlen_k=12, head_dim_v=16)
    slopes = np.array([0.5, 0.25], np.float32)
    options = {"causal": True, "causal_align": "top_left", "alibi_slopes": slopes}
    exact, exact_lse = numflash.reference.attention(q, k, v, **options)
    for queries in (slice(0, 5), slice(5, 12)):
        found = [
            numflash.attention(
                q[:, queries],
                k[:, keys],
                v[:, keys],
                shift=queries.start - keys.start,
                return_lse=True,
                **options,
            )
            for keys in (slice(0, 7), slice(7, 12))
        ]
        out, lse = numflash.merge_partials(*zip(*found, strict=True))
        np.testing.assert_allclose(out, exact[:, queries], atol=2e-6)
        np.testing.assert_allclose(lse, exact_lse[..., queries], atol=2e-6)


def test_parts_that_a_query_does_not_see():
    q, k, v = arrays(shape=(1, 8, 2, 16), seqlen_k=8, head_dim_v=16)
    outs, lses = parts_of(q, k, v, (0, 8))
    blind, none = np.zeros_like(outs[0]), np.full_like(lses[0], -np.inf)
    out, lse = numflash.merge_partials([blind, outs[0], blind], [none, lses[0], none])
    np.testing.assert_array_equal(out, outs[0])
    np.testing.assert_array_equal(lse, lses[0])
    out, lse = numflash.merge_partials([blind, blind], [none, none])
    assert (out == 0).all() and (lse == -np.inf).all()


def test_logarithms_far_apart():
    """Where exp(lse - lse') overflows, and where a part is all but nothing."""
    out = np.ones((1, 1, 1, 16), np.float32)
    lse = np.zeros((1, 1, 1), np.float32)
    for apart in (80, 200, 1e30):
        merged, together = numflash.merge_partials(
            [out, -out], [lse + np.float32(apart), lse - np.float32(apart)]
        )
        assert (merged == 1).all() and (together == np.float32(apart)).all()


def test_an_array_of_parts_a_dtype_and_the_same_bits_again():
    q, k, v = arrays("bfloat16")
    outs, lses = parts_of(q, k, v, (0, 11, 40))
    out, _ = numflash.merge_partials(np.stack(outs), np.stack(lses), dtype="float32")
    again, _ = numflash.merge_partials(outs, lses, dtype="float32")
    assert out.dtype == np.float32 and (out == again).all()
    narrow, _ = numflash.merge_partials(outs, lses)
    assert (out.astype(ml_dtypes.bfloat16) == narrow).all()


def test_nothing_to_merge_but_shapes():
    out, lse = np.zeros((2, 0, 3, 16), np.float32), np.zeros((2, 3, 0), np.float32)
    merged, together = numflash.merge_partials([out], [lse])
    assert merged.shape == out.shape and together.shape == lse.shape


OUT, LSE = np.zeros((1, 4, 2, 16), np.float32), np.zeros((1, 2, 4), np.float32)


@pytest.mark.parametrize(
    ("outs", "lses", "options", "error", "words"),
    [
        ([], [], {}, ValueError, "one or more, got 0 and 0"),
        ([OUT, OUT], [LSE], {}, ValueError, "got 2 and 1"),
        (OUT[0, 0, 0, 0], [LSE], {}, TypeError, "must be lists or arrays of parts"),
        ([OUT, OUT[:, :3]], [LSE, LSE], {}, ValueError, r"outs\[1\] must have shape \(1, 4, 2"),
        ([OUT, OUT.astype("float16")], [LSE, LSE], {}, TypeError, r"outs\[1\] must be float32"),
        ([OUT], [LSE.swapaxes(1, 2)], {}, ValueError, r"lses\[0\] must have shape \(1, 2, 4\)"),
        ([OUT], [LSE.astype("float64")], {}, TypeError, r"lses\[0\] must be float32"),
        ([OUT.astype("float64")], [LSE], {}, TypeError, "outs must have one of the dtypes"),
        ([OUT], [LSE], {"layout": "bsd"}, ValueError, "layout must be one of bshd, bhsd"),
        ([OUT], [LSE], {"layout": ["bshd"]}, TypeError, "layout must be a string"),
        ([OUT], [LSE], {"dtype": "int8"}, ValueError, "dtype must be one of"),
        ([OUT], [LSE], {"dtype": np.float32}, TypeError, "dtype must be a string"),
        ([np.zeros((1, 4, 2, 257), "float32")], [LSE], {}, numflash.UnsupportedError, "257"),
        ([3.5], [LSE], {}, TypeError, r"outs\[0\] must be a NumPy array"),
    ],
)
def test_wrong_input_is_told(outs, lses, options, error, words):
    with pytest.raises(error, match=words):
        numflash.merge_partials(outs, lses, **options)


@pytest.mark.parametrize("axes", [3, 4])
@pytest.mark.parametrize(
    "way", ["as they are", "another dtype", "strides", "odd", "layout", "row"]
)
def test_stacked_parts_are_read_where_they_are_if_they_lie_so(monkeypatch, way, axes):
    copied = []
    real = merging.Merge._copied
    monkeypatch.setattr(merging.Merge, "_copied", lambda *args: copied.append(True) or real(*args))
    q, k, v = arrays(head_dim_v=20 if way == "row" else 32)
    if axes == 3:
        q, k, v = q[0], k[0], v[0]
    outs, lses = parts_of(q, k, v, (0, 7, 40), axes - 3)
    exact, exact_lse = numflash.merge_partials(outs, lses)
    assert copied == [True]
    outs, lses = (np.ascontiguousarray(np.stack(each)) for each in (outs, lses))
    options = {}
    if way == "another dtype":
        outs = outs.astype("float16")
    elif way == "strides":
        outs = np.repeat(outs, 2, axis=0)[::2]
    elif way == "odd":
        outs = np.concatenate([np.zeros(1, "float32"), outs.ravel()])[1:].reshape(outs.shape)
        assert outs.ctypes.data % 16
    elif way == "layout":
        outs, options = np.ascontiguousarray(outs.swapaxes(-2, -3)), {"layout": "bhsd"}
    before = outs.copy()
    out, lse = numflash.merge_partials(outs, lses, **options)
    assert len(copied) == (1 if way == "as they are" else 2)
    out = out.swapaxes(-2, -3) if way == "layout" else out
    if way == "another dtype":
        np.testing.assert_allclose(out.astype("float32"), exact, atol=2e-3)
    else:
        np.testing.assert_array_equal(out, exact)
    np.testing.assert_array_equal(lse, exact_lse)
    np.testing.assert_array_equal(outs, before)


def test_what_is_wrong_with_a_stacked_part_is_said_of_it():
    outs, lses = np.zeros((2, 1, 4, 1, 32), "float32"), np.zeros((2, 1, 1, 5), "float32")
    with pytest.raises(ValueError, match=r"lses\[0\] must"):
        numflash.merge_partials(outs, lses)
