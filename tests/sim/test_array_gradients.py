"""Gradients of a bias, and of arrays that a function of scores reads."""

import itertools

import ml_dtypes
import numpy as np
import pytest

import numflash
from numflash import reference
from numflash.calls import ready
from numflash.calls.launch import Launcher
from numflash.runtime.driver import limits_of_device
from numflash.runtime.numpy_arrays import NumPy
from tests.support.covering import covering, some, thorough

OF_SCORES = ("backward-rows", "backward-columns", "backward-tiles", "backward-scatter")
CONFIG = {"forward": "m8n8w1", **dict.fromkeys(OF_SCORES, "m8n8w2")}
BACKWARD = dict.fromkeys(OF_SCORES, "m8n8w2")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# Two tiles in each direction, and heads that share keys.
BATCH, HEADS, QUERIES, KEYS = SHAPE = 2, 2, 13, 11


@pytest.fixture(autouse=True)
def poisoned_results(monkeypatch):
    """What is allocated holds 0xFF bytes, NaN, before it is written; no call is remembered."""
    empty = NumPy.empty

    def poisoned(self, shape, dtype, device):
        array = empty(self, shape, dtype, device)
        array.view(np.uint8)[...] = 0xFF
        return array

    monkeypatch.setattr(NumPy, "empty", poisoned)
    monkeypatch.setattr(ready, "_ready", {})


@pytest.fixture
def launched(monkeypatch):
    """The families of the kernels launched, in order."""
    found, bind = [], Launcher.bind

    def counted(self, operands):
        launch = bind(self, operands)

        def run(stream):
            found.append(self._config.family)
            launch(stream)

        return run

    monkeypatch.setattr(Launcher, "bind", counted)
    return found


def inputs(dtype="float32", heads_kv=1, head_dim=8, shape=SHAPE, seed=0):
    """q, k, v and dout."""
    batch, heads, queries, keys = shape
    rng = np.random.default_rng(seed)
    shapes = [(queries, heads), (keys, heads_kv), (keys, heads_kv), (queries, heads)]
    return [rng.standard_normal((batch, *each, head_dim)).astype(DTYPES[dtype]) for each in shapes]


def normal(shape, dtype="float32", seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPES[dtype])


def check(dtype="float32", wrt=("bias",), shape=SHAPE, heads_kv=1, **options):
    """The report of a call, which must be within budget; and no worse than a naive sum."""
    q, k, v, dout = inputs(dtype, heads_kv, shape=shape)
    report = numflash.check(q, k, v, dout=dout, wrt=wrt, config=CONFIG, **options)
    assert [error.name for error in report.errors] == ["out", "lse", *(f"d{x}" for x in wrt)]
    assert report.passed, f"\n{report}"
    return report


# Broadcasting of a bias

BROADCASTS = list(itertools.product((True, False), repeat=4))


def bias_cases():
    """Each set of axes; each way of summing with a band, a dtype of q and one of the bias."""
    rows = itertools.product(BROADCASTS, (False, True), DTYPES, DTYPES)

    def labels(row):
        kept, *others = row
        return kept, *((kept[2:], other) for other in others), tuple(others[1:])

    return covering(rows, labels, together=1)


@thorough
@pytest.mark.parametrize(("kept", "causal", "dtype", "dtype_of_bias"), some(bias_cases(), every=6))
def test_a_bias_has_a_gradient_of_its_own_shape(kept, causal, dtype, dtype_of_bias):
    shape = [n if is_kept else 1 for n, is_kept in zip(SHAPE, kept, strict=True)]
    bias = normal(shape, dtype_of_bias)
    check(dtype, bias=bias, causal=causal, heads_kv=1 if causal else 2)


@thorough
@pytest.mark.parametrize("kept", BROADCASTS[::3])
def test_an_expanded_bias_has_a_gradient_for_each_element_as_in_torch(kept):
    """Axes of stride 0 are not reduced: only those of one element are."""
    small = normal([n if is_kept else 1 for n, is_kept in zip(SHAPE, kept, strict=True)])
    bias = np.broadcast_to(small, SHAPE)
    (found,) = gradients(("bias",), bias=bias)
    (copied,) = gradients(("bias",), bias=bias.copy())
    assert found.shape == SHAPE
    np.testing.assert_allclose(found, copied, atol=1e-6)


def gradients(wrt, q=None, config=BACKWARD, seed=None, **options):
    """Of a call on the usual inputs."""
    q, k, v, dout = inputs() if q is None else q
    out, lse = numflash.attention(q, k, v, return_lse=True, config=CONFIG["forward"], **options)
    return numflash.attention_backward(dout, q, k, v, out, lse, wrt=wrt, config=config, **options)


STRIDED = ["fewer axes", "transposed", "from the end", "part of rows"]


@thorough
@pytest.mark.parametrize("name", some(STRIDED, "transposed"))
def test_a_bias_may_have_any_strides_and_its_gradient_is_contiguous(name):
    exact = normal(SHAPE)
    bias = {
        "fewer axes": exact[0, 0],
        "transposed": np.ascontiguousarray(exact.transpose(3, 1, 0, 2)).transpose(2, 1, 3, 0),
        "from the end": exact[..., ::-1].copy()[..., ::-1],
        "part of rows": np.concatenate([exact, exact], -1)[..., :KEYS],
    }[name]
    (found,) = gradients(("bias",), bias=bias)
    (copied,) = gradients(("bias",), bias=bias.copy())
    assert found.shape == bias.shape and found.flags.c_contiguous
    np.testing.assert_array_equal(found, copied)


# Arrays that a function reads


def gate(score, batch, head, q_idx, kv_idx, gates):
    return score * gates[head]


def row_and_key(score, batch, head, q_idx, kv_idx, rows, keys):
    return score + rows[head, q_idx] * keys[batch, kv_idx]


def t5(score, batch, head, q_idx, kv_idx, table):
    distance = np.abs(kv_idx - q_idx)
    far = 4 + np.floor(np.log2((distance + 1).astype(np.float32) / 4) * 1.5).astype(np.int32)
    bucket = np.where(distance < 4, distance, np.minimum(far, 7))
    return score + table[head, np.where(kv_idx > q_idx, bucket + 8, bucket)]


def swin(score, batch, head, q_idx, kv_idx, table):
    """Windows of 5 x 5 places, with a table of relative rows and columns."""
    rows, columns = q_idx // 5 - kv_idx // 5 + 4, q_idx % 5 - kv_idx % 5 + 4
    return score + table[rows, columns, head]


def gathered(score, batch, head, q_idx, kv_idx, table, documents):
    return score + table[documents[q_idx], documents[kv_idx]]


def several_reads(score, batch, head, q_idx, kv_idx, a, b):
    """Of one array at three places, and of another that bends with them."""
    return np.tanh(score * b[head] + a[q_idx]) * a[kv_idx] + a[3]


def guarded(score, batch, head, q_idx, kv_idx, a):
    """A derivative that is infinite where P is 0: of what mask_mod hides."""
    return score + np.log(np.maximum(a[kv_idx] - 1, 0) + (q_idx >= kv_idx))


def see_the_past(batch, head, q_idx, kv_idx):
    return q_idx >= kv_idx


FUNCTIONS = {
    "a gate of each head": (gate, [(HEADS,)], "rows"),
    "gates of one head": (lambda s, b, h, i, j, a: s * a[b, 0], [(BATCH, 1)], "rows"),
    "rows and keys": (row_and_key, [(HEADS, QUERIES), (BATCH, KEYS)], "rows columns"),
    "axes in another order": (
        lambda s, b, h, i, j, a: s + a[j, h, i],
        [(KEYS, HEADS, QUERIES)],
        "tiles",
    ),
    "more rows than queries": (
        lambda s, b, h, i, j, a: s + a[i, h],
        [(QUERIES + 5, HEADS)],
        "rows",
    ),
    "one of several elements": (lambda s, b, h, i, j, a: s + a[h, 0], [(HEADS, 3)], "scatter"),
    "a diagonal": (lambda s, b, h, i, j, a: s + a[i, i], [(QUERIES, QUERIES)], "scatter"),
    "a table of T5": (t5, [(HEADS, 16)], "scatter"),
    "a table of Swin": (swin, [(9, 9, HEADS)], "scatter"),
    "several reads": (several_reads, [(max(QUERIES, KEYS),), (HEADS,)], "scatter rows"),
}
WAYS = {"rows": "backward-rows", "columns": "backward-columns", "tiles": "backward-tiles"}


SOME_FUNCTIONS = "rows and keys", "axes in another order", "a table of T5"


@pytest.mark.parametrize("name", some(FUNCTIONS, *SOME_FUNCTIONS))
def test_an_array_that_a_function_reads_has_a_gradient(name, launched):
    function, shapes, ways = FUNCTIONS[name]
    aux = tuple(normal(shape, seed=3 + n) for n, shape in enumerate(shapes))
    wrt = tuple(f"aux{n}" for n in range(len(aux)))
    report = check(wrt=wrt, score_mod=function, aux=aux, causal="rows" in name)
    wanted = {WAYS.get(way, "backward-scatter") for way in ways.split()}
    bounds = {"backward-rows"} if "scatter" in ways else set()
    assert {*launched} & {*OF_SCORES} == wanted | bounds
    # Budgets are wide where much cancels: the error is no more than that of a naive sum.
    for error in report.errors[2:]:
        assert error.error <= 8 * max(error.naive_error, 2.0**-24)


@thorough
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_gradient_has_the_dtype_of_its_array(dtype):
    table, rows = normal((HEADS, 16), dtype), normal((HEADS, QUERIES), dtype)

    def both(score, batch, head, q_idx, kv_idx, table, rows):
        return t5(score, batch, head, q_idx, kv_idx, table) + rows[head, q_idx]

    check(dtype, ("aux1", "q", "aux0"), score_mod=both, aux=(table, rows))
    found = gradients(("aux0", "aux1"), score_mod=both, aux=(table, rows))
    assert [x.dtype for x in found] == [table.dtype, rows.dtype]


def test_an_array_of_integers_says_which_element_is_read():
    documents = np.random.default_rng(5).integers(0, 4, max(QUERIES, KEYS)).astype(np.int32)
    aux = normal((4, 4)), documents
    check(wrt=("aux0",), score_mod=gathered, aux=aux, window_size=(4, 2))


def test_where_p_is_0_an_infinite_derivative_does_not_count():
    aux = (np.full(KEYS, 0.5, np.float32),)
    options = {"score_mod": guarded, "mask_mod": see_the_past, "aux": aux}
    (found,) = gradients(("aux0",), **options)
    assert np.isfinite(found).all()


COMBINED = {
    "softcap, ALiBi and sinks": {
        "softcap": 2.0,
        "alibi_slopes": np.array([0.5, 0.25], np.float32),
        "sinks": np.array([-1.0, 0.5], np.float32),
    },
    "dropout": {"dropout_p": 0.3, "seed": 5},
    "a mask and a window": {
        "mask": np.random.default_rng(9).random((BATCH, 1, QUERIES, KEYS)) < 0.6,
        "window_size": (4, 2),
    },
    "a gradient of lse": {
        "dlse": np.random.default_rng(8).standard_normal((BATCH, HEADS, QUERIES)).astype("f4")
    },
}


@thorough
@pytest.mark.parametrize("name", some(COMBINED, "softcap, ALiBi and sinks"))
def test_all_ways_go_with_other_features(name):
    """A bias, a row, a key and a table at once, of one function after all features."""
    bias, aux = (
        normal((1, HEADS, QUERIES, KEYS)),
        (
            normal((HEADS, QUERIES), seed=2),
            normal((BATCH, KEYS), seed=3),
            normal((HEADS, 7), seed=4),
        ),
    )

    def function(score, batch, head, q_idx, kv_idx, rows, keys, table):
        near = np.minimum(np.maximum(kv_idx - q_idx, -3), 3) + 3
        return np.tanh(score) * rows[head, q_idx] + keys[batch, kv_idx] + table[head, near]

    wrt = "bias", "aux0", "aux1", "aux2"
    check(wrt=wrt, bias=bias, score_mod=function, aux=aux, **COMBINED[name])


@thorough
@pytest.mark.parametrize("config", ["m16n16w2", "sm80-m16n16w1s1"])
def test_all_ways_go_with_a_block_mask(config):
    """Blocks that are empty, full and partial, of a mask that differs from head to head."""
    block, dtype = 16, "float32" if config == "m16n16w2" else "float16"
    queries, keys = 2 * block + 5, 2 * block + 3

    def mask(batch, head, q_idx, kv_idx):
        return (q_idx + 3 >= kv_idx) & ((head == 0) | (kv_idx >= block))

    def function(score, batch, head, q_idx, kv_idx, rows, keys, table):
        return score * rows[head, q_idx] + keys[kv_idx] + table[head, kv_idx - q_idx + 64]

    q, k, v, dout = inputs(dtype, shape=(1, 2, queries, keys))
    report = numflash.check(
        *(q, k, v),
        dout=dout,
        wrt=("bias", "aux0", "aux1", "aux2"),
        bias=normal((queries, keys), dtype),
        score_mod=function,
        aux=(normal((2, queries)), normal(keys), normal((2, 128))),
        block_mask=numflash.create_block_mask(mask, 1, 2, queries, keys, block_size=block),
        config=dict.fromkeys(("forward", *OF_SCORES), config),
    )
    assert report.passed, f"\n{report}"


IMPLEMENTATIONS = {
    "sm80": ("sm_80", "bfloat16", "sm80-m16n16w1s1", {}),
    "sm80, two warps": ("sm_80", "float16", "sm80-m32n32w2s1", {"dropout_p": 0.3, "seed": 7}),
    "sm75": ("sm_75", "float16", "sm75-m16n16w1s1", {"softcap": 3.0, "window_size": (9, 3)}),
    "tf32": ("sm_80", "float32", "sm80-m16n16w1s1", {"precision": "tf32", "causal": True}),
}


@thorough
@pytest.mark.parametrize("name", some(IMPLEMENTATIONS, "sm80"))
def test_each_implementation_has_all_ways(name, monkeypatch):
    """With an array of each dtype; of the second function one that nothing bends."""
    arch, dtype, config, options = IMPLEMENTATIONS[name]
    monkeypatch.setenv("NUMFLASH_SIM_ARCH", arch)
    limits_of_device.cache_clear()
    queries, keys = (37, 35) if "two" in name else (21, 19)
    q, k, v, dout = inputs(dtype, shape=(1, 2, queries, keys))
    aux = normal((2, queries), dtype), normal(keys), normal((2, 7), "float16")

    def function(score, batch, head, q_idx, kv_idx, rows, keys, table):
        near = np.minimum(np.maximum(kv_idx - q_idx, -3), 3) + 3
        return np.tanh(score) * rows[head, q_idx] + keys[kv_idx] + table[head, near]

    report = numflash.check(
        *(q, k, v),
        dout=dout,
        wrt=("bias", "aux0", "aux1", "aux2"),
        bias=normal((1, 2, queries, keys), dtype),
        score_mod=function,
        aux=aux,
        config=dict.fromkeys(("forward", *OF_SCORES), config),
        **options,
    )
    limits_of_device.cache_clear()
    assert report.passed, f"\n{report}"
    assert all(error.error <= 2 * error.naive_error for error in report.errors[2:])


@thorough
def test_a_part_of_a_larger_problem_writes_its_share():
    """The gradients of three parts add up to that of the whole; the rest of each is 0."""
    q, k, v, dout = inputs(heads_kv=HEADS)
    bias, table = normal((1, HEADS, QUERIES, KEYS)), normal((HEADS, 9))

    def function(score, batch, head, q_idx, kv_idx, table):
        return score + table[head, np.minimum(np.maximum(kv_idx - q_idx, -4), 4) + 4]

    options = {"bias": bias, "score_mod": function, "aux": (table,)}
    out, lse = numflash.attention(q, k, v, return_lse=True, **options)
    whole = numflash.attention_backward(
        dout, q, k, v, out, lse, wrt=("bias", "aux0"), config=BACKWARD, **options
    )
    sums = [np.zeros(x.shape) for x in whole]
    both, first, second = slice(0, QUERIES), slice(0, 1), slice(1, 2)
    for rows, heads in ((slice(0, 5), first), (slice(5, 13), first), (both, second)):
        part = numflash.attention_backward(
            *(dout[:, rows, heads], q[:, rows, heads], k[:, :, heads], v[:, :, heads]),
            *(out[:, rows, heads], np.ascontiguousarray(lse[:, heads, rows])),
            wrt=("bias", "aux0"),
            config=BACKWARD,
            origin=(rows.start, 0, heads.start),
            **options,
        )
        assert not part[0][:, :, : rows.start].any() and not part[0][:, : heads.start].any()
        sums = [a + b for a, b in zip(sums, part, strict=True)]
    for a, b in zip(sums, whole, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


# The same bits, nothing, and what is infinite


@thorough
def test_the_bits_are_the_same_in_every_run(monkeypatch):
    from numflash.simulator import SEED

    bias, table, keys = normal((1, 1, QUERIES, KEYS)), normal((HEADS, 16)), normal(KEYS)

    def function(score, batch, head, q_idx, kv_idx, table, keys):
        return t5(score, batch, head, q_idx, kv_idx, table) * keys[kv_idx]

    options = {"bias": bias, "score_mod": function, "aux": (table, keys)}
    found = set()
    for seed in (1, 2):
        monkeypatch.setattr(SEED, "value", seed)
        of_all = gradients(("bias", "aux0", "aux1"), **options)
        found.add(b"".join(x.tobytes() for x in of_all))
    assert len(found) == 1


@thorough
def test_sums_in_fixed_point_do_not_depend_on_the_tiles():
    """The order of the summands does not count, and little of them is lost."""
    table = normal((HEADS, 16))
    exact = reference.attention_backward(
        *(x.astype(np.float64) for x in (inputs()[3], *inputs()[:3])),
        wrt=("aux0",),
        score_mod=t5,
        aux=(table,),
    )[0]
    for config in ("m8n8w2", "m16n8w1", "m16n16w4"):
        (found,) = gradients(
            ("aux0",), config={"backward-scatter": config}, score_mod=t5, aux=(table,)
        )
        np.testing.assert_allclose(found, exact, atol=1e-6 * abs(exact).max())


@thorough
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_sums_in_fixed_point_have_any_size(factor):
    q, k, v, dout = inputs()
    options = {"score_mod": t5, "aux": (normal((HEADS, 16)),)}
    (plain,) = gradients(("aux0",), **options)
    given = q, k, v, (dout * np.float32(factor)).astype(np.float32)
    (found,) = gradients(("aux0",), q=given, **options)
    np.testing.assert_allclose(found / np.float32(factor), plain, rtol=1e-4, atol=1e-6)


def test_an_infinity_shows_in_sums_in_fixed_point():
    q, k, v, dout = inputs()
    dout[0, 3, 1, 2] = np.inf
    (found,) = gradients(("aux0",), q=(q, k, v, dout), score_mod=t5, aux=(normal((HEADS, 16)),))
    assert np.isnan(found).all()


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)])
def test_gradients_of_nothing(shape):
    _, heads, queries, keys = shape
    q, k, v, dout = inputs(shape=shape)
    biases = np.ones((1, heads, queries, keys), "f4"), np.ones((1, heads, 1, 1), "f4")
    for bias in biases:
        (found,) = gradients(("bias",), q=(q, k, v, dout), bias=bias)
        assert found.shape == bias.shape and not found.any()
    (found,) = gradients(("aux0",), q=(q, k, v, dout), score_mod=t5, aux=(normal((heads, 16)),))
    assert found.shape == (heads, 16) and not found.any()


@thorough
def test_only_kernels_of_wanted_gradients_run(launched):
    bias = normal((1, HEADS, 1, KEYS))
    q, k, v, dout = inputs()
    out, lse = numflash.attention(q, k, v, bias=bias, return_lse=True)
    launched.clear()
    call = dout, q, k, v, out, lse
    (found,) = numflash.attention_backward(*call, bias=bias, wrt=["bias"])
    assert launched == ["delta", "backward-columns", "array-sums"]
    launched.clear()
    both = numflash.attention_backward(*call, bias=bias, wrt=("q", "bias"))
    assert launched == ["delta", "backward-dq", "backward-columns", "array-sums"]
    np.testing.assert_array_equal(both[1], found)
    launched.clear()
    assert len(numflash.attention_backward(*call, bias=bias)) == 3
    assert launched == ["delta", "backward-dkdv", "backward-dq"]


# What has no gradient


def test_what_has_no_gradient_is_an_error():
    def function(score, batch, head, q_idx, kv_idx, table, which, number, unused, floored):
        return score * number + table[which[kv_idx]] + np.floor(floored[head])

    aux = (normal(3), np.zeros(KEYS, np.int32), 2.0, normal(3), normal(HEADS))
    options = {"score_mod": function, "aux": aux}
    q, k, v, dout = inputs()
    call = (dout, q, k, v, q, np.zeros((BATCH, HEADS, QUERIES), np.float32))
    for wrt, error, message in (
        ("aux1", TypeError, "wrt names 'aux1', an array of int32; gradients are of arrays of f"),
        ("aux2", TypeError, "wrt names 'aux2', which is a number; gradients are of arrays"),
        ("aux3", ValueError, "wrt names 'aux3', and no score changes with it"),
        ("aux4", ValueError, "wrt names 'aux4', and no score changes with it"),
        ("aux5", ValueError, "'aux5', which this call does not have; it has gradients of q, k, v"),
        ("bias", ValueError, "wrt names 'bias', which this call does not have"),
        ("aux", ValueError, "wrt must name gradients of q, k, v, "),
    ):
        with pytest.raises(error) as caught:
            numflash.attention_backward(*call, wrt=(wrt,), **options)
        assert message in str(caught.value)
    with pytest.raises(ValueError, match="wrt must name each gradient once, got 'aux0' twice"):
        numflash.attention_backward(*call, wrt=("aux0", "aux0"), **options)

    def by_score(score, batch, head, q_idx, kv_idx, table):
        return score + table[score.astype(np.int32)]

    with pytest.raises(numflash.UnsupportedError, match="at a place that depends on the score"):
        numflash.attention_backward(*call, wrt=("aux0",), score_mod=by_score, aux=(normal(3),))
