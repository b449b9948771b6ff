"""The rows of implementations: complete, the only place that tells them apart, and enough."""

import ast
import itertools
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

import bench
import numflash
import tuner
from numflash import configs
from numflash.configs import (
    BLOCK_MASK_CONFIGS,
    FAMILIES,
    IMPLEMENTATIONS,
    MERGING_CONFIGS,
    QUANTIZE_CONFIGS,
    SEQUENCE_CONFIGS,
    Asked,
    Traits,
    implementation_of,
    mma,
    parse_config,
)
from numflash.kernels.factories import FACTORIES
from numflash.runtime.devices import ARCHITECTURES
from numflash.runtime.errors import UnsupportedError
from numflash.selection import rules
from numflash.selection.rules import choose, force

TRAITS = Traits("float16", 64, 64)
HOPPER, BLACKWELL = ARCHITECTURES["sm_90a"], ARCHITECTURES["sm_100"]


def test_every_row_has_a_factory_for_each_of_its_families():
    assert set(FACTORIES) == {(row.name, f) for row in IMPLEMENTATIONS for f in row.configs}
    for place in FACTORIES.values():
        module, _, factory = place.rpartition(".")
        assert callable(getattr(import_module(f"numflash.kernels.{module}"), factory)), place


def test_every_config_is_of_one_row():
    kinds = [kind for row in IMPLEMENTATIONS for kind in row.configs.values()]
    assert len(set(kinds)) == len(kinds)
    of_attention = {*FAMILIES, *QUANTIZE_CONFIGS}
    around = {*BLOCK_MASK_CONFIGS, *SEQUENCE_CONFIGS, *MERGING_CONFIGS}
    assert {kind.family for kind in kinds} == of_attention | around
    for row in IMPLEMENTATIONS:
        for family, kind in row.configs.items():
            assert kind.family == family and implementation_of(kind) is row


def test_a_string_form_leads_to_the_row_whose_it_is():
    traits = [TRAITS, replace(TRAITS, fp8=True)]
    seen = set()
    for row, limits, of in itertools.product(IMPLEMENTATIONS, ARCHITECTURES.values(), traits):
        for family in row.configs:
            if row.serves(family, of, limits):
                for config in row.candidates(family, of, limits):
                    assert implementation_of(parse_config(family, str(config))) is row
                    seen.add(row.name)
    # Those that quantise follow from what they are to do, and have no candidates.
    assert seen == {row.name for row in IMPLEMENTATIONS} - {"quantize"}


def _asks_for_a_type(node: ast.AST) -> bool:
    """Whether it is isinstance(x, SomeConfig), alone or in a tuple, or type(x) is SomeConfig."""
    names = []
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
        names = ast.walk(node.args[1])
    elif isinstance(node, ast.Compare):
        names = node.comparators
    kinds = {getattr(name, "id", getattr(name, "attr", "")) for name in names}
    return any(kind in vars(configs) and kind.endswith("Config") for kind in kinds)


@pytest.mark.parametrize(
    ("line", "asks"),
    [
        ("isinstance(config, MmaConfig)", True),
        ("isinstance(x, (int, wgmma.Sm90ForwardConfig))", True),
        ("type(x) is Fp8ForwardConfig", True),
        ("isinstance(config, dict)", False),
        ("isinstance(node, ast.Name)", False),
        ("family == QuantizeConfig.family", False),
    ],
)
def test_a_question_for_the_type_of_a_config_is_seen(line, asks):
    assert any(map(_asks_for_a_type, ast.walk(ast.parse(line)))) is asks


def test_nobody_asks_for_the_type_of_a_config():
    """Differences of implementations stand in their rows."""
    found = []
    for package in (numflash, tuner, bench):
        for path in Path(package.__file__).parent.rglob("*.py"):
            text = path.read_text()
            if re.search(r"\b(isinstance|type)\(.*?Config\b", text, re.S):
                tree = ast.parse(text)
                found += [f"{path}:{x.lineno}" for x in ast.walk(tree) if _asks_for_a_type(x)]
    assert found == []


# A new generation of GPUs


class NewConfig(mma.MmaForwardConfig):
    """A config for instructions that only sm_100 has."""

    implementation = "sm100"
    generations = ("sm100",)


NEW = NewConfig("sm100", 128, 64, 4, 1)


@pytest.fixture
def new_row(monkeypatch):
    """A row for sm_100, before all others."""
    row = configs.Implementation(
        name="tcgen05",
        configs={"forward": NewConfig},
        generation=lambda limits: "sm100" if limits is BLACKWELL else None,
        candidates=lambda family, traits, limits: (NEW,),
        misfit=lambda config, traits, limits, rows, warps: "rows" if rows < 64 else None,
        refuses=lambda traits, limits, asked: "float32" if traits.dtype == "float32" else None,
        rule="the only one",
        begins="sm100",
        needs_maps=True,
    )
    monkeypatch.setattr(rules, "IMPLEMENTATIONS", (row, *IMPLEMENTATIONS))
    return row


def test_a_new_generation_is_a_new_row(new_row):
    choice = choose("forward", TRAITS, BLACKWELL)
    assert (choice.config, choice.rule) == (NEW, "the only one")
    assert choice.passed_over == (
        ("sm80", "wgmma is faster"),
        ("portable", "tensor cores are faster"),
    )
    # Elsewhere nobody hears of it, and what it cannot do others do.
    for family, limits in (("forward", HOPPER), ("backward-dq", BLACKWELL)):
        assert "sm100" not in str(choose(family, TRAITS, limits))
    few = choose("forward", TRAITS, BLACKWELL, rows=32)
    assert few.passed_over[0] == (str(NEW), "rows") and few.config.implementation == "sm80"
    exact = choose("forward", Traits("float32", 64, 64), BLACKWELL)
    assert exact.passed_over[0] == ("sm100", "float32")
    assert exact.config.implementation == "portable"
    codes = choose("forward", replace(TRAITS, fp8=True), BLACKWELL)
    assert "sm100" not in str(codes)


# What a caller forces around attention


@pytest.mark.parametrize(
    ("family", "config", "why"),
    [
        ("quantize", "sm89-t128w8", "its instructions begin with sm_89, this GPU is sm_80"),
        ("dequantize", "sm89-w4", "its instructions begin with sm_89, this GPU is sm_80"),
        ("quantize", "sm80-t128w32-transposed", "its threads do not have multiples of 4 rows"),
    ],
)
def test_a_kernel_around_attention_is_held_to_rules_too(family, config, why):
    with pytest.raises(UnsupportedError, match=f"{config} cannot run this {family}: {why}"):
        force(family, config, Traits("float16", 64, 64), ARCHITECTURES["sm_80"])
    assert force("amax", "w8", TRAITS, ARCHITECTURES["sm_75"]).config.num_warps == 8


def test_what_is_asked_decides_which_rows_refuse():
    row = implementation_of(parse_config("forward", "sm90-m64n64w4s1"))
    assert row.refuses(TRAITS, HOPPER, Asked()) is None
    assert row.refuses(TRAITS, HOPPER, Asked(no_bulk_copies="k is odd")) == "k is odd"
    assert "softmax_scale" in row.refuses(TRAITS, HOPPER, Asked(positive_scale=False))
    assert not row.packs(5) and row.packs(4)
