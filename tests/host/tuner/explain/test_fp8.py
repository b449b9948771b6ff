"""FP8: sizes, scales, flushed elements and errors against the reference."""

import numpy as np
import pytest

import numflash
from numflash import reference
from tuner.drawing.document import document
from tuner.drawing.figures import arranged
from tuner.explain.asked import NotShownError
from tuner.explain.facts import fp8
from tuner.explain.sections import fp8 as section

from ....support.pages import page_faults


@pytest.fixture
def loud():
    """q, k and v (1, 256, 2, 64) of which the second head of q and k has a loud column."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 256, 2, 64))
    q[..., 0, 5] *= 200
    k[..., 0, 5] *= 200
    return [x.astype(np.float16) for x in (q, k, v)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "fp8"},
        {"precision": "auto", "causal": True},
        {"precision": "fp8", "fp8": numflash.Fp8Recipe("token")},
        {"precision": "fp8", "fp8": numflash.Fp8Recipe("tensor", hadamard=False)},
        {"precision": "fp8", "fp8": numflash.Fp8Recipe("head")},
    ],
    ids=["what if", "fp8", "auto", "token", "tensor", "head"],
)
def test_sections_are_whole(options, asked, loud):
    facts = fp8.find(asked("H200", *loud, data=True, **options))
    assert facts.what_if == (not options) and (facts.heads is None) == ("auto" not in str(options))
    page = document("fp8", arranged(section.figures(facts)))
    assert page_faults(page, 100_000) == []


def test_constant_arrays(asked):
    x = np.zeros((1, 3, 1, 64), np.float16)
    facts = fp8.find(asked("A100", x, data=True))
    assert facts.flushed_v.value == 0 and set(facts.scales) == {"q", "k", "v"}
    assert page_faults(document("fp8", arranged(section.figures(facts))), 100_000) == []


def test_sizes(asked, loud):
    facts = fp8.find(asked("A100", *loud, data=True))
    q = loud[0][:, :, :1].astype(np.float32)
    sizes = facts.sizes["q"]
    assert sizes.largest[0].value == np.abs(q).max()
    # The rotation keeps lengths, and spreads one loud number over 64.
    assert sizes.largest[1].value < sizes.largest[0].value / 4
    assert sizes.before.sum() == pytest.approx(1) and sizes.after.sum() == pytest.approx(1)
    for turned in (False, True):
        codes, scales = reference.quantize_fp8(q, hadamard=turned)
        numbers = reference.rotate(q, 0) if turned else q
        lost = ((numbers != 0) & (codes & 0x7F == 0)).mean()
        assert sizes.flushed[turned].value == pytest.approx(lost)
        assert sizes.reach[turned].value == pytest.approx(448 * float(np.median(scales)))
    # The loud column lets the others of its tokens go, and the rotation saves most of them.
    assert sizes.flushed[0].value > 4 * sizes.flushed[1].value


def test_errors_are_those_of_the_specification(asked, loud):
    q, k, v = loud
    facts = fp8.find(asked("A100", q, k, v, data=True, causal=True))
    queries, keys = (n.value for n in facts.part)
    assert (queries, keys) == (128, 256)
    q, k, v = (x[:, :, :1].astype(np.float32) for x in (q[:, 128:], k, v))
    exact, _ = reference.attention(q, k, v, causal=True)
    out, _ = reference.attention_fp8(q, k, v, causal=True)
    error = np.sqrt(np.square(out - exact).mean() / np.square(exact).mean())
    assert facts.errors["8 bits"].value == pytest.approx(error)
    # Scores of the loud column overflow in float16.
    assert "16 bits" not in facts.errors


def test_16_bits_beside_8(asked):
    q = np.random.default_rng(0).standard_normal((1, 64, 1, 64)).astype(np.float16)
    errors = fp8.find(asked("A100", q, data=True)).errors
    assert errors["16 bits"].value < errors["8 bits"].value / 10


def test_heads_beyond_the_budget_stay_in_16_bits(asked, loud):
    options = {"precision": "auto", "max_rel_error": 0.1, "data": True}
    heads = fp8.find(asked("H200", *loud, **options)).heads
    assert heads.in_16_bits == [0] and heads.estimated.value[1] < 0.1


def test_elements_that_are_not_finite(asked, loud):
    loud[2][0, 3, 0, 0] = np.nan
    with pytest.raises(NotShownError, match="v has 1 elements that are NaN or infinite"):
        fp8.find(asked("A100", *loud, data=True))
