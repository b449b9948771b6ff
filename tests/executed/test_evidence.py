"""docs/evidence.md: every instruction has a witness or has none, and the tests it names exist."""

import re
from pathlib import Path

import pytest

from numflash.ptx import INSTRUCTIONS

_ROOT = Path(__file__).parents[2]
_TEXT = (_ROOT / "docs" / "evidence.md").read_text()
# Made when kernels ask for them, for each size; the page speaks of them together.
_MADE = re.compile(r"wgmma_m64|wgmma_wait_group|setmaxnreg")


_OURS = [
    name
    for name, instruction in INSTRUCTIONS.items()
    if instruction.body.__module__.startswith("numflash.ptx") and not _MADE.match(name)
]


@pytest.mark.parametrize("name", _OURS)
def test_an_instruction_has_a_witness_or_has_none(name):
    with_one, without = _TEXT.split("## What has no witness yet")
    without = without.split("## What is not here")[0]
    with_one = with_one.split("## Instructions with a witness")[1].split("\nTiles of")[0]
    assert (f"`{name}`" in with_one) != (f"`{name}`" in without)


def test_the_tests_that_it_names_exist():
    tests = (_ROOT / "tests" / "executed" / "test_witnesses.py").read_text()
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", _TEXT))
    assert named and all(f"def {name}(" in tests for name in named)
