"""Numerics: the caller's elements, slices, and one row against float64 at once."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

from numflash import reference
from tuner.drawing.document import document
from tuner.drawing.figures import arranged
from tuner.explain import simulated as simulator
from tuner.explain.asked import NotShownError
from tuner.explain.elements import Part, elements_of
from tuner.explain.facts import numerics
from tuner.explain.sections import numerics as section

from ....support.pages import page_faults


def arrays(rng, *shapes, dtype=np.float16):
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


CALLS = {
    "causal": ("A100", (1, 300, 2, 64), {"causal": True}),
    "hopper": ("H200", (1, 700, 4, 128), {"causal": True}),
    "window": ("H200", (1, 700, 2, 64), {"window_size": (60, 0)}),
    "decode": ("A100", (1, 1, 8, 128), {"k": (1, 9000, 2, 128)}),
    "float32": ("T4", (1, 90, 2, 64), {"dtype": "float32", "softcap": 20.0}),
    "codes": ("H200", (1, 300, 2, 128), {"precision": "fp8"}),
    "long": ("H200", (1, 1, 1, 64), {"k": (1, 200_000, 1, 64)}),
    "short": ("A100", (1, 100, 1, 64), {"k": (1, 7, 1, 64), "causal": True}),
}


@pytest.mark.parametrize("name", CALLS)
def test_sections_are_whole(name, asked):
    gpu, q, options = CALLS[name]
    facts = numerics.find(asked(gpu, q, **options))
    assert "tests start no process" in facts.not_checked and facts.checked is None
    page = document("numerics", arranged(section.figures(facts)))
    assert page_faults(page, 200_000) == []
    assert "only metadata of the arrays was read" in facts.elements


@pytest.mark.parametrize(
    "gpu, config",
    [
        ("H200", "sm90-m128n128w8s2-overlap-pingpong"),
        ("A100", "sm80-m64n32w4s1"),
        ("A100", "sm80-m64n32w4s1x3"),
        ("T4", "m32n32w4"),
    ],
)
def test_the_row_is_that_of_the_caller(gpu, config, asked, rng):
    q, k, v = (3 * x for x in arrays(rng, (2, 200, 4, 64), (2, 333, 2, 64), (2, 333, 2, 64)))
    found = asked(gpu, q, k, v, data=True, causal=True, config=config)
    row = numerics.find(found).row
    _, lse = reference.attention(q, k, v, causal=True)
    exact = lse[0, row.head.value, row.query.value]
    assert row.lse_at_once.value == pytest.approx(exact, abs=1e-4)
    assert row.lse.value == pytest.approx(exact, abs=1e-4)
    assert np.isfinite(row.scores).sum() == row.query.value + 333 - 200 + 1
    assert row.parts.value == (3 if "x3" in config else 1)
    # What is subtracted lags behind by no more than LAG, and never leads.
    behind = (row.largest - row.subtracted) * np.log2(np.e)
    assert (behind >= 0).all() and (behind <= (row.lag.value if row.lag else 0) + 1e-4).all()


def test_a_lag_saves_rescaling(asked, rng):
    """The same scores, where maxima creep up: only kernels without a lag rescale."""
    k = np.zeros((1, 256, 1, 64), np.float16)
    k[0, :, 0, 0] = np.arange(256) / 64
    q = np.zeros_like(k)
    q[..., 0] = 1
    found = {}
    for config in ("sm80-m64n32w4s1", "m64n32w4"):
        facts = numerics.find(asked("A100", q, k, k, data=True, softmax_scale=1.0, config=config))
        found[config] = int(facts.row.own.sum())
    assert found == {"sm80-m64n32w4s1": 0, "m64n32w4": 7}


def test_a_neighbour_makes_a_row_rescale(asked):
    """Of the rows of a warp only the first grows: the others multiply by 1."""
    k = np.zeros((1, 64, 1, 64), np.float16)
    k[0, 32:, 0, 0] = 20
    q = np.zeros((1, 16, 1, 64), np.float16)
    q[0, 0, 0, 0] = 1
    found = asked("A100", q, k, k, data=True, softmax_scale=1.0, config="sm80-m16n32w1s1")
    row = numerics.find(found).row
    assert row.neighbours.value == 16 and row.query.value != 0
    assert row.others.tolist() == [False, True] and not row.own.any()
    assert (row.factors[1:] == 1).all()


def test_a_warp_has_as_many_rows_as_it_votes_for(asked):
    rows = {"sm80-m128n64w4s1": 32, "sm80-m64n64w4s1": 16, "m64n32w4": 1}
    for config, expected in rows.items():
        row = numerics.find(asked("A100", (1, 256, 1, 64), config=config)).row
        assert row.neighbours.value == expected


# The slice


@pytest.mark.parametrize("name", CALLS)
def test_a_slice_is_small_and_sees_keys(name, asked):
    gpu, q, options = CALLS[name]
    found = asked(gpu, q, **options)
    part, _ = numerics.slice_of(found.forward, found.problem)
    assert 0 < part.queries <= 256 and 0 < part.keys <= 512 and 0 < part.heads <= 2
    problem = found.problem
    assert part.first_query >= 0 and part.first_query + part.queries <= problem.seqlen_q
    assert part.first_key >= 0 and part.first_key + part.keys <= problem.seqlen_k
    last = part.first_query + part.queries - 1
    low, high = last + problem.band_lo, last + problem.band_hi
    assert high >= part.first_key and low < part.first_key + part.keys


def test_what_is_asked_of_the_kernel(asked, rng, monkeypatch):
    """The slice has the call's elements, mask, and numbers for each head."""
    given = []

    def simulate(work, arrays, options, *, arch):
        given.append((work, arrays, options, arch))
        return (SimpleNamespace(name="out", error=1e-3, naive_error=2e-3, budget=4e-3),)

    monkeypatch.setattr(numerics, "simulate", simulate)
    q, k, v = arrays(rng, (1, 300, 4, 64), (1, 500, 2, 64), (1, 500, 2, 64))
    slopes = np.arange(4, dtype=np.float32)
    bias = np.zeros((1, 1, 300, 500), np.float16)
    found = asked("A100", q, k, v, data=True, causal=True, alibi_slopes=slopes, bias=bias)
    checked = numerics.find(found).checked
    [(work, parts, options, arch)] = given
    part = checked.part
    assert work is numerics.run_check and arch == "sm_80"
    rows = slice(part.first_query, part.first_query + part.queries)
    keys = slice(part.first_key, part.first_key + part.keys)
    assert (parts[0] == q[:1, rows, : part.heads]).all()
    assert (parts[1] == k[:1, keys, :1]).all() and (parts[2] == v[:1, keys, :1]).all()
    assert options["alibi_slopes"].tolist() == slopes[: part.heads].tolist()
    assert list(checked.left_out) == ["bias"]
    # Query i of the slice sees as many keys as in the call.
    seen = np.arange(part.keys) <= np.arange(part.queries)[:, None] + options["shift"]
    whole = np.arange(500) <= np.arange(300)[:, None] + 200
    assert (seen == whole[rows, keys]).all()
    assert checked.errors["out"]["share"].value == 0.25


def test_scores_that_overflow_have_no_budget(asked, monkeypatch):
    found = (SimpleNamespace(name="out", error=1e-3, naive_error=np.inf, budget=np.inf),)
    monkeypatch.setattr(numerics, "simulate", lambda *_, **__: found)
    facts = numerics.find(asked("A100", (1, 30, 1, 64)))
    assert facts.checked is None and "overflow in float16" in facts.not_checked


# Elements


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_elements_of_layouts(layout, asked, rng):
    (x,) = arrays(rng, (2, 50, 3, 64))
    given = x if layout == "bshd" else np.ascontiguousarray(x.swapaxes(1, 2))
    elements = elements_of(asked("A100", given, data=True, layout=layout))
    assert elements.samples == "" and elements.origin == "the caller's arrays"
    found = elements.read("k", Part(1, 10, 20, 1, 3))
    assert (found == x[1, 10:20, 1:3]).all()


@pytest.mark.parametrize("axes", [2, 3])
def test_elements_of_fewer_axes(axes, asked, rng):
    (x,) = arrays(rng, (50, 64) if axes == 2 else (50, 3, 64))
    found = elements_of(asked("A100", x, data=True)).read("v", Part(0, 5, 9, 0, 1))
    assert (found[:, 0] == (x[5:9] if axes == 2 else x[5:9, 0])).all()


class Unreadable(np.ndarray):
    """An array of which there is metadata only."""

    def __getitem__(self, key):
        raise NotImplementedError("no elements")


def test_elements_that_cannot_be_read_become_samples(asked):
    x = np.zeros((1, 50, 2, 64), np.float16).view(Unreadable)
    facts = numerics.find(asked("A100", x, data=True))
    assert "because elements of q cannot be read" in facts.elements and facts.row is not None


@pytest.mark.parametrize("seqlen, shown", [(2**18, True), (2**20, False)])
def test_arrays_of_any_size_are_read_in_parts(seqlen, shown, asked):
    one, strides = np.ones(64, np.float16), (0, 0, 0, 2)
    x = np.lib.stride_tricks.as_strided(one, (1, seqlen, 1, 64), strides, writeable=False)
    facts = numerics.find(asked("A100", x, data=True))
    if shown:
        assert len(facts.row.scores) == numerics.MOST_ROW_KEYS and "were read" in facts.row.note
    else:
        assert facts.row is None and "too many tiles" in facts.no_row


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_elements_that_are_not_finite(bad, asked, rng):
    q, k, v = arrays(rng, (1, 64, 1, 64), (1, 64, 1, 64), (1, 64, 1, 64))
    q[0, 60, 0, 7] = bad
    with pytest.raises(NotShownError, match=r"q has 1 elements that are NaN or .* token 60,"):
        numerics.find(asked("A100", q, k, v, data=True))


def test_no_scores(asked):
    with pytest.raises(NotShownError, match="no scores"):
        numerics.find(asked("A100", (1, 8, 4, 64), k=(1, 0, 4, 64)))


# The process that simulates


def test_work_runs_in_a_process_that_simulates():
    found = simulator.simulate(os.getenv, "NUMFLASH_SIM_ARCH", arch="sm_75")
    assert found == "sm_75"


def test_failures_of_that_process_are_errors(monkeypatch):
    with pytest.raises(simulator.NotSimulatedError, match="ZeroDivisionError"):
        simulator.simulate(divmod, 1, 0, arch="sm_75")
    with pytest.raises(simulator.NotSimulatedError, match=r"took more than 0\.001 s"):
        simulator.simulate(os.getpid, arch="sm_75", seconds=0.001)
    monkeypatch.setattr(simulator.sys, "executable", "/nowhere/python")
    with pytest.raises(simulator.NotSimulatedError, match="no process can be started"):
        simulator.simulate(os.getpid, arch="sm_75")
