"""docs/evidence.md is drawn from its record, and names every instruction."""

import re

import pytest

from numflash.ptx import INSTRUCTIONS
from tests.executed import evidence

# Made when kernels ask for them, for each size; the page says which of them were executed.
_MADE = re.compile(r"wgmma_m64|wgmma_wait_group|setmaxnreg")
_OURS = [
    name
    for name, instruction in INSTRUCTIONS.items()
    if instruction.body.__module__.startswith("numflash.ptx") and not _MADE.match(name)
]


@pytest.mark.parametrize("name", _OURS)
def test_an_instruction_has_a_witness_or_a_reason_why_not(name):
    assert (name in evidence.witnesses_of(evidence.read())) != (name in evidence.WITHOUT)


def test_the_record_gives_the_reasons():
    assert evidence.read()["without"] == evidence.WITHOUT


def test_there_are_no_reasons_for_what_is_no_instruction():
    assert set(evidence.WITHOUT) <= set(_OURS)


def test_the_page_is_drawn_from_the_record():
    assert evidence.PAGE.read_text() == evidence.page(evidence.read())


def test_the_witnesses_exist():
    record = evidence.read()
    for name, entry in record["witnesses"].items():
        module = evidence.RECORD.parents[1] / "tests" / "executed" / f"{entry['module']}.py"
        assert f"def {name}(" in module.read_text(), name


def test_what_was_noticed_is_what_its_witness_executes():
    record = evidence.read()
    assert record["noticed"]
    for meaning, entry in record["noticed"].items():
        instructions = record["witnesses"][entry["witness"]]["instructions"]
        assert entry["instruction"] in instructions, meaning


def test_every_instruction_with_a_witness_has_been_wrong_on_purpose():
    record = evidence.read()
    tried = {entry["instruction"] for entry in record["noticed"].values()}
    assert set(evidence.witnesses_of(record)) <= tried
