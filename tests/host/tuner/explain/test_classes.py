"""Pages of tuned classes: the call that stands for a class, with the config that won."""

import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from numflash.problem.classes import ProblemClass
from tuner.explain.classes import write_page_of_class

CASES = (
    ("forward float16-d64-dv64-vec causal q4096 k4096 bh64 g4", "sm90-m128n128w8s2-persistent"),
    ("backward-dq float16-d64-dv64-vec window256 q4096 k4096 bh64 g1", "sm80-m64n64w4s1"),
    ("forward bfloat16-d64-dv64-alibi-vec causal q512 k512 bh8 g1", "sm80-m64n64w4s1"),
    ("forward float16-d64-dv64-vec-ragged causal q1024 k1024 bh64 g1", "sm80-m64n64w4s1"),
    (
        "forward float16-d64-dv64-vec-fp8 causal q512 k512 bh8 g1",
        "fp8-sm90-m128n128w8s2-overlap-persistent",
    ),
    (
        "forward float16-d64-dv64-vec-fp8-keyscales full q512 k512 bh8 g2",
        "fp8-sm89-m64n64w4s1-half",
    ),
    ("forward float32-d64-dv64-vec full q1 k65536 bh8 g8", "m64n32w4"),
)


@pytest.mark.parametrize("problem, config", CASES, ids=lambda text: str(text).split()[0])
def test_page_of_a_class(problem, config, tmp_path):
    path = tmp_path / "page.html"
    write_page_of_class(path, ProblemClass.parse(problem), "H200", config)
    root = ET.fromstring(path.read_text().removeprefix("<!DOCTYPE html>\n"))
    assert root.find(".//h1").text == problem
    assert config in [code.text for code in root.iter("code")]


def test_the_functions_of_a_class_are_not_known(tmp_path):
    problem = ProblemClass.parse(CASES[0][0])
    traits = replace(problem.traits, program="1;float32[1];score=mul(aux0[h],s)")
    with pytest.raises(ValueError, match="are not known"):
        write_page_of_class(
            tmp_path / "page.html", replace(problem, traits=traits), "H200", CASES[0][1]
        )
