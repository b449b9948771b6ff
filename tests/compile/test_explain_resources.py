"""Pages of machine code: `numflash-inspect --html`, and what a kernel takes of an SM."""

import numpy as np
import pytest

import numflash
from numflash.api.explain import Question
from numflash.api.inspect import main
from tests.support.covering import some
from tests.support.pages import page_faults
from tuner.explain.asked import ask
from tuner.explain.facts import resources

HOPPER = ("forward", "--arch", "sm_90a", "--dtype", "bfloat16", "--head-dim", "128")
AMPERE = ("forward", "--arch", "sm_80", "--head-dim", "32", "--config", "sm80-m16n16w1s1")


@pytest.mark.parametrize("argv", some([HOPPER, AMPERE, ("delta", "--arch", "sm_80")], AMPERE))
def test_a_kernels_page(argv, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main([*argv, "--html", str(page)]) == 0
    text = page.read_text()
    assert capsys.readouterr() == (f"{page}\n", "") and page_faults(text, 100_000) == []
    assert ("A turn of the main loop, from machine code" in text) == (argv[0] == "forward")
    assert "What a block takes of an SM" in text


def test_a_page_that_cannot_be_written(capsys):
    with pytest.raises(SystemExit) as refusal:
        main([*AMPERE, "--html", "/nowhere/page.html"])
    assert refusal.value.code == 1
    assert "numflash-inspect: error: /nowhere/page.html: " in capsys.readouterr().err


def test_registers_and_turns_are_those_of_the_code():
    x = np.zeros((1, 512, 2, 128), np.float16)
    config = "sm90-m128n128w8s2-overlap-pingpong-persistent"
    answer = numflash.explain(x, x, x, gpu="H200", config=config)
    question = Question({"q": x, "k": x, "v": x}, {}, "H200", False, None, answer)
    asked = ask(question, "forward")
    facts = resources.find(asked, asked.forward)
    multiply, copies = facts.share.holders[:-1], facts.share.holders[-1]
    assert [holder.name for holder in multiply] == ["warpgroup 0", "warpgroup 1"]
    assert {holder.available.value for holder in multiply} == {240}
    assert sum(h.registers.value for h in facts.share.holders) <= facts.share.sm_registers.value
    assert copies.registers.value == 128 * copies.available.value
    assert all(h.named.value <= h.available.value for h in facts.share.holders)
    # 64 x 128 scores, two products of depth 128: 4096 FLOP a clock; 16 exponentials a clock.
    assert facts.turn.of == "a warpgroup" and facts.no_code == ""
    assert facts.turn.clocks["products"].value == 4 * 64 * 128 * 128 / 4096
    assert facts.turn.clocks["exponentials"].value >= 64 * 128 / 16
    assert facts.turn.exponentials.value >= 64
    assert {number.origin for number in facts.turn.clocks.values()} == {"machine code"}
