"""The offline model against published speeds: no kind of kernel is farther off than is stated.

What is compared with what is said in `tests/support/published_speeds.py`.
"""

import re
import statistics
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("optuna")

import numpy as np

from tests.support.covering import some, thorough
from tests.support.published_gradients import PUBLISHED, predicted_ms, published_ms
from tests.support.published_speeds import points, problem_class
from tuner import model
from tuner.model import errors
from tuner.search.candidates import Candidates
from tuner.space import machines
from tuner.space.configs import Space

H100 = machines.find("H100")


@pytest.mark.parametrize("kind", errors.ERRORS)
def test_no_error_is_larger_than_stated_and_none_is_stated_without_need(kind):
    found = [point for point in points() if point.kind == kind]
    worst = max(found, key=lambda point: point.error)
    assert worst.error <= errors.ERRORS[kind], worst
    assert worst.error > errors.ERRORS[kind] - 0.02, worst


def test_the_kinds_and_numbers_of_points_are_those_that_are_stated():
    fitted, others = defaultdict(list), defaultdict(list)
    for point in points():
        (fitted if point.fitted else others)[point.kind].append(point.error)
    assert set(others) == set(errors.ERRORS)
    for kind, found in others.items():
        worst, median = max(found), statistics.median(found)
        row = f"| {len(fitted[kind])} | {len(found)}: {worst * 100:.0f} %, {median * 100:.0f} % |"
        assert any(
            line.startswith(f"| {kind} |") and line.endswith(row)
            for line in errors.__doc__.splitlines()
        ), (kind, row)
    assert f"holds the model against {len(points())} of them" in errors.__doc__


def test_the_table_of_gradients_in_the_documentation_is_the_models():
    text = (Path(__file__).parents[3] / "docs" / "tuning.md").read_text()
    stated = {tuple(map(int, each)) for each in re.findall(r"(\d+) \((\d+)\)", text)}
    found = {
        (round(each.tflops), round(each.tflops * published_ms(each) / predicted_ms(each)))
        for each in PUBLISHED
    }
    assert len(stated) > 40 and stated - found == set()


@pytest.mark.parametrize("kind", ["sm80 forward", "sm90 forward", "sm90 backward"])
def test_kinds_are_neither_flattered_nor_wronged(kind):
    ratios = [p.published / p.predicted for p in points() if p.kind == kind and not p.fitted]
    assert np.mean(np.log(ratios)) == pytest.approx(0, abs=0.03)


@thorough
@pytest.mark.parametrize("seqlen", some([512, 1024], 512))
@pytest.mark.parametrize("batch", some([16, 32], 16))
def test_short_causal_sequences_on_an_h100_stay_with_wgmma(seqlen, batch):
    # Published are 197 and 265 TFLOP/s of FlashAttention-3, 180 and 229 of FlashAttention-2.
    text = f"forward float16-d64-dv64-vec causal q{seqlen} k{seqlen} bh{batch * 32} g1"
    problem = type(problem_class(64, "causal", seqlen)).parse(text)
    space = Space(problem, H100)
    candidates = Candidates(space)
    default = candidates.estimates[candidates.numbers[str(space.default)]]
    for config, estimate in zip(candidates.configs, candidates.estimates, strict=True):
        if config.generation == "sm80":
            needed = model.gain_needed(H100, problem, config, space.default)
            assert default <= (1 + needed) * estimate, str(config)
    assert candidates.texts[int(np.argmin(candidates.estimates))].startswith("sm90-")


def test_what_was_not_compared_is_as_wrong_as_the_worst():
    problem = problem_class(64, "full", 1024)
    for name in ("T4", "RTX 4090", "B200"):
        machine = machines.find(name)
        default = Space(problem, machine).default
        assert errors.error(machine, problem, default) == errors.UNKNOWN
        assert model.gain_needed(machine, problem, default, default) == errors.UNKNOWN
    a100 = machines.find("A100")
    assert errors.error(a100, problem, Space(problem, a100).default) < errors.UNKNOWN
    delta = problem_class(64, "full", 1024, "delta")
    assert errors.error(a100, delta, Space(delta, a100).default) == errors.UNKNOWN
