"""attention_varlen and seqlens as people call them: wrong numbers, replays, plans, refusals."""

import numpy as np
import pytest

import numflash
from numflash.calls import forward, launch
from numflash.runtime.errors import UnsupportedError
from tests.support.covering import some, thorough
from tests.support.sequence_cases import cumulative, ints
from tests.support.varlen_cases import KERNELS

_, ARCH, CONFIGS = KERNELS["sm80"]
FORWARD = CONFIGS["forward"]
BACKWARD = {family: config for family, config in CONFIGS.items() if family != "forward"}
TOKENS_Q, TOKENS_K = 30, 40


@pytest.fixture(autouse=True)
def poisoned(on):
    on(ARCH)


def arrays(rng, tokens_q=TOKENS_Q, tokens_k=TOKENS_K, batch=(), heads=2):
    shapes = ((tokens_q, heads, 16), (tokens_k, 1, 16), (tokens_k, 1, 16), (tokens_q, heads, 16))
    return [rng.standard_normal((*batch, *shape)).astype("f2") for shape in shapes]


@pytest.fixture
def rng():
    return np.random.default_rng(5)


BAD = {
    "falling": ints(0, 25, 10, 30),
    "beyond the end": ints(0, 10, 10, 2**31 - 1),
    "before the beginning": ints(-9, 10, 25, 30),
    "from end to end of int32": ints(-(2**31), 2**31 - 1, -(2**31), 5),
}


@pytest.mark.parametrize("name", some(BAD, every=4))
def test_numbers_that_lead_out_of_arrays_are_cut(name, rng):
    """The simulator refuses every address outside; results are those of what is left.

    dk and dv are not, where two sequences have a row of k in common.
    """
    q, k, v, dout = arrays(rng)
    given = {"cu_seqlens_q": cumulative([10, 9, 11]), "cu_seqlens_k": BAD[name]}
    report = numflash.check(q, k, v, dout=dout, causal=True, config=CONFIGS, **given)
    errors = {error.name: error for error in report.errors}
    assert all(errors[name].passed for name in ("out", "lse", "dq")), f"\n{report}"
    with pytest.raises(ValueError, match="cu_seqlens_k must lie within the 40 rows of k, got"):
        numflash.attention_varlen(q, k, v, **given, check_lengths=True)


def test_queries_that_lead_out_of_arrays_are_cut(rng):
    q, k, v, _ = arrays(rng)
    out, lse = np.full_like(q, 7), None
    given = ints(-3, 12, 2**30), ints(0, 20, 40)
    out, lse = numflash.attention_varlen(q, k, v, *given, out=out, return_lse=True)
    assert np.isfinite(lse).all()
    assert (out != 7).any(-1).all()


@thorough
def test_padded_numbers_that_lead_out_of_arrays_are_cut(rng):
    q, k, v, dout = arrays(rng, 20, 24, (3,))
    given = {"seqlens_q": ints(25, -4, 9), "seqlens_k": ints(24, 9, 2**31 - 1)}
    given["starts_k"] = ints(-1, 30, 4)
    report = numflash.check(q, k, v, dout=dout, config=CONFIGS, **given)
    assert report.passed, f"\n{report}"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"cu_seqlens_q": ints(0, 10, 45), "cu_seqlens_k": ints(0, 9, 40)},
            "cu_seqlens_q must lie within the 30 rows of q, got 35 rows from row 10 on for "
            "sequence 1",
        ),
        (
            {"cu_seqlens_q": ints(0, 10, 30), "cu_seqlens_k": ints(0, 15, 9)},
            "cu_seqlens_k must lie within the 40 rows of k, got -6 rows from row 15",
        ),
        (
            {
                "starts_q": ints(0, 5),
                "seqlens_q": ints(6, 3),
                "cu_seqlens_k": ints(0, 9, 40),
                "layout": "thd",
            },
            "must give each row of q to one sequence, got sequences 0 and 1 both with row 5",
        ),
        (
            {
                "cu_seqlens_q": ints(0, 10, 30),
                "cu_seqlens_k": ints(0, 9, 40),
                "bias": np.zeros((30, 20), np.float32),
            },
            "must give a sequence at most the 20 rows of k that bias or mask has, got 31",
        ),
    ],
)
def test_check_lengths_says_what_is_wrong(given, message, rng):
    q, k, v, _ = arrays(rng)
    given = {name: value for name, value in given.items() if name != "layout"}
    with pytest.raises(ValueError, match=message):
        numflash.attention_varlen(q, k, v, **given, check_lengths=True)


@thorough
def test_a_block_mask_goes_with_lengths(rng):
    q, k, v, dout = arrays(rng, 40, 48, (2,))
    blocks = numflash.create_block_mask(
        lambda b, h, i, j: (i + j) % 37 < 20, 1, 1, 40, 48, block_size=(16, 16)
    )
    given = {"seqlens_q": ints(33, 10), "seqlens_k": ints(40, 48), "starts_k": ints(3, 0)}
    config = {"forward": "sm80-m16n16w1s2", **dict.fromkeys(BACKWARD, "sm80-m16n16w1s1")}
    report = numflash.check(q, k, v, dout=dout, block_mask=blocks, config=config, **given)
    assert report.passed, f"\n{report}"


def test_check_lengths_of_a_backward_and_of_padded_batches(rng):
    q, k, v, dout = arrays(rng)
    shared = {"cu_seqlens_q": ints(0, 10, 30), "starts_k": ints(0, 5), "seqlens_k": ints(20, 20)}
    asked = shared | {"check_lengths": True}
    out, lse = numflash.attention_varlen(q, k, v, return_lse=True, config=FORWARD, **asked)
    with pytest.raises(ValueError, match="must give each row of k to one sequence"):
        numflash.attention_varlen_backward(dout, q, k, v, out, lse, **asked)
    x = q[None]
    numflash.attention(x, x, x, seqlens_k=ints(30), check_lengths=True, config=FORWARD)
    with pytest.raises(ValueError, match="seqlens_k must lie within the 30 rows of k, got 31"):
        numflash.attention(x, x, x, seqlens_k=ints(31), check_lengths=True)
    with pytest.raises(TypeError, match="check_lengths must be True or False, got 1"):
        numflash.attention(x, x, x, seqlens_k=ints(30), check_lengths=1)
    numflash.attention(x, x, x, check_lengths=True, config=FORWARD)


@thorough
def test_nothing_of_a_neighbour_is_seen(rng):
    q, k, v, dout = arrays(rng)
    ends = cumulative([9, 12, 9]), cumulative([10, 20, 10])

    def call(*inputs):
        *qkv, dout = inputs
        out, lse = numflash.attention_varlen(
            *qkv, *ends, causal=True, return_lse=True, config=FORWARD
        )
        gradients = numflash.attention_varlen_backward(
            dout, *qkv, out, lse, *ends, causal=True, config=BACKWARD
        )
        return out, *gradients

    before = call(q, k, v, dout)
    for x, (one, end) in ((q, (9, 21)), (k, (10, 30)), (v, (10, 30)), (dout, (9, 21))):
        x[one:end] = np.nan
    after = call(q, k, v, dout)
    rows = (9, 21), (9, 21), (10, 30), (10, 30)
    for x, y, (one, end) in zip(before, after, rows, strict=True):
        assert np.isnan(y[one:end].astype("f4")).all()
        for part in (slice(one), slice(end, None)):
            np.testing.assert_array_equal(x[part], y[part])


@thorough
def test_delta_and_results_of_the_caller(rng):
    q, k, v, dout = arrays(rng)
    ends, dlse = (cumulative([13, 0, 17]), cumulative([20, 3, 17])), None
    dlse = rng.standard_normal((2, TOKENS_Q)).astype("f4")
    out, lse = numflash.attention_varlen(
        q, k, v, *ends, return_lse=True, config=FORWARD, out_dtype="float32"
    )
    assert out.dtype == np.float32
    given = dout, q, k, v
    more = {"config": BACKWARD, "dlse": dlse}
    wanted = numflash.attention_varlen_backward(*given, out, lse, *ends, **more)
    delta = (dout.astype("f4") * out).sum(-1).T
    got = numflash.attention_varlen_backward(*given, None, lse, *ends, delta=delta, **more)
    for one, other in zip(wanted, got, strict=True):
        np.testing.assert_allclose(one.astype("f4"), other.astype("f4"), atol=2e-3)
    (dv,) = numflash.attention_varlen_backward(
        *given, out, lse, *ends, wrt=("v",), grad_dtype="float32", **more
    )
    assert dv.dtype == np.float32
    np.testing.assert_allclose(dv, wanted[2].astype("f4"), atol=2e-3)


@pytest.mark.parametrize(
    ("ends_q", "ends_k"),
    [([0], [0]), ([0, 30], [0, 0]), ([0, 0], [0, 40]), ([0, 0, 0], [0, 0, 0])],
)
def test_no_sequences_and_empty_ones_give_zeros(ends_q, ends_k, rng):
    q, k, v, dout = arrays(rng)
    if ends_q[-1] == 0 and len(ends_q) == 2:
        q, dout = q[:0], dout[:0]
    if ends_q[-1] and ends_k[-1] == 0:
        k, v = k[:0], v[:0]
    ends = ints(*ends_q), ints(*ends_k)
    out, lse = numflash.attention_varlen(q, k, v, *ends, return_lse=True)
    gradients = numflash.attention_varlen_backward(dout, q, k, v, out, lse, *ends)
    assert not any(x.any() for x in (out, *gradients))
    assert np.isneginf(lse).all()


REPLAYS = {
    "other lengths": ([4, 20, 6], [20, 11, 9]),
    "empty sequences": ([0, 17, 0], [5, 0, 12]),
    "all tokens in one": ([0, TOKENS_Q, 0], [0, TOKENS_K, 0]),
    "nothing": ([0, 0, 0], [0, 0, 0]),
}


@thorough
@pytest.mark.parametrize("name", some(REPLAYS, "other lengths"))
def test_what_was_captured_is_replayed_with_other_lengths(name, rng, monkeypatch):
    """A graph has launches with their arguments: all that is launched, again, in order."""
    captured = []

    def recorded(launch_of):
        def record(stream):
            captured.append(launch_of)
            launch_of(stream)

        return record

    bind = launch.Launcher.bind
    monkeypatch.setattr(launch.Launcher, "bind", lambda self, x: recorded(bind(self, x)))
    fill = launch.Fill.__call__

    def recorded_fill(self, stream):
        captured.append(lambda stream: fill(self, stream))
        fill(self, stream)

    monkeypatch.setattr(forward.Fill, "__call__", recorded_fill)
    q, k, v, dout = arrays(rng)
    lengths = [10, 12, 8], [8, 25, 7]
    ends = [cumulative(x) for x in lengths]
    options = {"causal": True}
    out, lse = numflash.attention_varlen(
        q, k, v, *ends, return_lse=True, config=FORWARD, **options
    )
    gradients = numflash.attention_varlen_backward(
        dout, q, k, v, out, lse, *ends, config=BACKWARD, **options
    )
    assert len(captured) == 2 + 2 + 3 + 4
    for end, of_side in zip(ends, REPLAYS[name], strict=True):
        end[:] = cumulative(of_side)
    for again in captured:
        again(0)
    results = [x.copy() for x in (out, lse, *gradients)]
    out, lse = numflash.attention_varlen(
        q, k, v, *ends, return_lse=True, config=FORWARD, **options
    )
    wanted = numflash.attention_varlen_backward(
        dout, q, k, v, out, lse, *ends, config=BACKWARD, **options
    )
    for got, x in zip(results, (out, lse, *wanted), strict=True):
        np.testing.assert_array_equal(got, x)


def test_a_plan_reads_lengths_at_each_launch(rng):
    q, k, v, _ = arrays(rng)
    ends = {"cu_seqlens_q": cumulative([10, 20]), "cu_seqlens_k": cumulative([30, 10])}
    plan = numflash.plan(q, k, v, config=FORWARD, **ends)
    first = plan.launch().copy()
    np.testing.assert_array_equal(
        first, numflash.attention_varlen(q, k, v, **ends, config=FORWARD)
    )
    ends["cu_seqlens_q"][:] = cumulative([0, 25])
    second = plan.launch()
    np.testing.assert_array_equal(
        second, numflash.attention_varlen(q, k, v, **ends, config=FORWARD)
    )
    assert not second[25:].any()


@thorough
def test_a_plan_of_gradients_reads_lengths_at_each_launch(rng):
    q, k, v, dout = arrays(rng)
    ends = {"cu_seqlens_q": cumulative([10, 20]), "cu_seqlens_k": cumulative([30, 10])}
    plan = numflash.plan(q, k, v, dout=dout, causal=True, config=CONFIGS, **ends)
    plan.launch(), plan.launch_backward()
    ends["cu_seqlens_q"][:] = cumulative([25, 0])
    out, got = plan.launch(), plan.launch_backward()
    wanted = numflash.attention_varlen_backward(
        dout, q, k, v, out, plan.lse, causal=True, config=BACKWARD, **ends
    )
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not got[0][25:].any()


def test_explain_dispatch_knows_sequences(rng):
    q, k, v, _ = arrays(rng)
    ends = {"cu_seqlens_q": cumulative([10, 20]), "cu_seqlens_k": cumulative([30, 10])}
    found = numflash.explain_dispatch(q, k, v, arch="sm_80", **ends)
    assert found.forward.traits.ragged
    assert all(choice.traits.ragged for choice in found.backward.values())
    assert "lists the tiles that the sequences have" in str(found)
    assert "lists" not in str(numflash.explain_dispatch(q, k, v, arch="sm_80"))
    text = str(numflash.explain_dispatch(q[None], k[None], v[None], seqlens_k=ints(9)))
    assert "lists the tiles that the sequences have" in text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layout": "bshd"}, TypeError, "attention_varlen has no layout"),
        ({"block_mask": None}, TypeError, "attention_varlen has no block_mask"),
        ({"appended": 2, "seqlens_k": ints(5, 5)}, TypeError, "attention_varlen has no appended"),
        ({"cached": True}, TypeError, "attention_varlen has no cached"),
        ({"heads": 2}, TypeError, "attention_varlen got unknown options: heads"),
        ({"precision": "fp8"}, UnsupportedError, "fp8"),
        ({"bias": np.zeros((3, 1, 5, 5), "f4")}, ValueError, "bias must broadcast to"),
        ({"cu_seqlens_q": None}, ValueError, "packed sequences need cu_seqlens_q"),
        ({"seqlens_q": ints(1, 2, 3)}, ValueError, "seqlens_q must have 2 elements"),
        ({"cu_seqlens_k": np.array([0, 9, 40])}, TypeError, "cu_seqlens_k must be int32"),
    ],
)
def test_wrong_calls_are_refused(options, error, message, rng):
    q, k, v, _ = arrays(rng)
    given = {"cu_seqlens_q": cumulative([10, 20]), "cu_seqlens_k": cumulative([30, 10])}
    with pytest.raises(error, match=message):
        numflash.attention_varlen(q, k, v, **given | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"wrt": ("alibi_slopes",), "alibi_slopes": np.ones((2, 2), "f4")},
            r"wrt names 'alibi_slopes' of shape \(2, 2\), and sequences are packed",
        ),
        (
            {"wrt": ("bias",), "bias": np.broadcast_to(np.float32(1), (2, 2, 20, 30))},
            "wrt names 'bias', a broadcast view, and cu_seqlens_q says that",
        ),
        (
            {"config": {"backward": "sm80-m16n16w1s2x2"}},
            "of sequences with lengths of their own dK, dV and dQ come from two kernels",
        ),
    ],
)
def test_gradients_that_there_are_none_of(options, message, rng):
    q, k, v, dout = arrays(rng)
    ends = {"cu_seqlens_q": cumulative([10, 20]), "cu_seqlens_k": cumulative([30, 10])}
    lse = np.zeros((2, TOKENS_Q), np.float32)
    with pytest.raises(UnsupportedError, match=message):
        numflash.attention_varlen_backward(dout, q, k, v, q, lse, **ends, **options)


def test_a_wrong_result_of_one_sequence_is_found(rng):
    """`check` has the sequence that is worst, and rows that nobody has."""
    from numflash.api.comparison import compare_each

    q, k, v, _ = arrays(rng)
    ends = {"cu_seqlens_q": cumulative([10, 18]), "cu_seqlens_k": cumulative([30, 10])}
    options = {**ends, "layout": "thd"}
    out, lse = numflash.attention_varlen(q, k, v, **ends, return_lse=True, config=FORWARD)
    operands = q, k, v

    def passed(**got):
        report = compare_each(got, *operands, precision="float16", **options)
        return {error.name: error.passed for error in report.errors}

    assert passed(out=out, lse=lse) == {"out": True, "lse": True}
    for row in (0, 27, 29):
        wrong = out.copy()
        wrong[row, 1, 3] += 0.05
        assert passed(out=wrong, lse=lse) == {"out": False, "lse": True}
    wrong = lse.copy()
    wrong[0, 29] = 0
    assert passed(out=out, lse=wrong) == {"out": True, "lse": False}
