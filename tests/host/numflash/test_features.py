"""Every row of the table of features has all that a feature needs, and nobody names one."""

import inspect
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import numflash
from numflash.configs import Traits
from numflash.configs.features import BY_NAME, FEATURES, Asked
from numflash.problem.classes import ProblemClass
from numflash.problem.options import OPTIONS
from numflash.runtime.views import ArrayView
from numflash.tiles import features as functions
from tests.support.attention_cases import SIM_CASES

ROOT = Path(numflash.__file__).parent
each_row = pytest.mark.parametrize("row", FEATURES, ids=lambda row: row.name)
# The functions of a hook, by the names of features.
HOOKS = {"score": functions.SCORES, "finish": functions.FINISHES, "weigh": functions.WEIGHS}


@each_row
def test_every_row_has_its_function_its_case_its_letter_and_its_docstring_line(row):
    of_hook = HOOKS[row.hook][row.name]
    assert of_hook.function is getattr(functions, row.name)
    assert not any(row.name in rest for hook, rest in HOOKS.items() if hook != row.hook)
    cases = [case for case in SIM_CASES if row.is_asked(case.options.get(row.option))]
    assert cases and any(case.options.get("causal") for case in cases)
    traits = Traits("float16", 64, 64, (row.name,))
    assert str(traits) == f"float16-d64-dv64-{row.name}-vec"
    assert Traits.parse(str(traits)) == traits
    for function in (numflash.attention, numflash.attention_backward):
        assert row.option in inspect.signature(function).parameters
        assert re.search(rf"^ +[\w, ]*\b{row.option}\b[^\n]*", function.__doc__, re.M)
    assert re.search(rf"^ +{row.option}: ", numflash.attention.__doc__, re.M)
    for each in row.beside:
        assert each.name in inspect.signature(numflash.attention).parameters
        assert re.search(rf"^ +{each.name}: ", numflash.attention.__doc__, re.M)
    assert re.search(rf"\b{row.name}\b", numflash.warmup.__doc__)
    (option,) = (option for option in OPTIONS if option.name == row.option)
    assert (option.default, option.check, option.is_array) == (
        row.default,
        row.check,
        row.is_array,
    )
    assert not row.is_asked(row.default)


def test_every_function_has_its_row():
    assert {name for of_hook in HOOKS.values() for name in of_hook} == set(BY_NAME)


@pytest.mark.parametrize("room", ["selection", "problem"])
def test_no_rule_names_a_feature(room):
    """So that a new row needs no line there."""
    words = {word for row in FEATURES for word in (row.name, row.option)}
    for path in (ROOT / room).rglob("*.py"):
        named = {word for word in words if re.search(rf"\b{word}\b", path.read_text())}
        # The form of a class is said by an example.
        assert (named <= {"softcap"} and path.name == "classes.py") or not named, (path, named)


@each_row
def test_the_example_is_read(row):
    value = row.example(4)
    assert row.is_asked(value)
    if row.is_array:
        assert value.dtype == np.float32
        strides = tuple(step // 4 for step in value.strides)
        value = ArrayView(0, value.shape, strides, "float32", 0)
    else:
        row.check(row.option, value)
    record = row.read(value, Asked(2, 4, 0.125, 0))
    assert type(record) is row.record and type(row.absent) is row.record
    assert row.unit(record) > 0
    # Only the first feature is given scores in its own unit.
    assert row is FEATURES[0] or row.unit(record) == 1


@pytest.mark.parametrize(
    "row", [row for row in FEATURES if row.hook == "score"], ids=lambda row: row.name
)
def test_the_derivative_of_a_score_is_that_of_its_value(row):
    rng = np.random.default_rng(0)
    s, value = 20 * rng.standard_normal((2, 4, 5, 6)), row.example(4)
    i, j, step = np.arange(5)[:, None] + 1, np.arange(6), 1e-6
    _, slope = row.reference(s, value, i, j)
    up, down = (row.reference(s + h, value, i, j)[0] for h in (step, -step))
    np.testing.assert_allclose((up - down) / (2 * step), slope * np.ones(s.shape), atol=1e-8)
    assert row.bends == (not np.all(slope == 1))
    low = s.astype(np.float16)
    assert row.reference(low, value, i, j)[0].dtype == np.float16


def test_features_come_in_the_order_of_the_table_and_unknown_ones_are_refused():
    names = tuple(BY_NAME)
    assert Traits("float16", 64, 64, names[::-1]) == Traits("float16", 64, 64, names)
    with pytest.raises(ValueError, match="features must be of softcap, alibi"):
        Traits("float16", 64, 64, ("colour",))
    with pytest.raises(ValueError, match="traits must look like"):
        Traits.parse("float16-d64-dv64-colour-vec")


def test_what_earlier_versions_wrote_is_still_read():
    text = "forward float16-d32-dv64-softcap-alibi-vec window32 q128 k64 bh4 g4"
    traits = ProblemClass.parse(text).traits
    assert str(ProblemClass.parse(text)) == text
    assert traits == replace(Traits("float16", 32, 64), features=("softcap", "alibi"))
