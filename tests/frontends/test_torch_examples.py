"""What people are shown of torch's attention by numflash runs: the example and the page."""

import doctest
import os
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install "numflash[torch]"')

import numflash  # noqa: E402
import numflash.torch as nt  # noqa: E402
from numflash.frontends.torch.explaining import SdpaExplanation  # noqa: E402
from tests.support.covering import thorough  # noqa: E402

ROOT = Path(__file__).parents[2]


def test_the_example_of_an_explanation_runs():
    test = doctest.DocTestParser().get_doctest(SdpaExplanation.__doc__, {}, "explain", None, None)
    assert test.examples and not doctest.DocTestRunner().run(test).failed


def test_a_model_like_gpt2_learns(launched, capsys):
    """Every attention of its training is numflash's, forward and backward."""
    example = runpy.run_path(str(ROOT / "examples" / "train_gpt2.py"))
    torch.manual_seed(0)
    assert example["main"]() == 0
    calls = example["STEPS"] * example["LAYERS"]
    families = launched.take()
    assert families.count("forward") == families.count("backward-dq") == calls
    assert "forward: sm80-" in capsys.readouterr().out and not nt.is_enabled()


@thorough
def test_two_processes_train_as_one_does():
    done = subprocess.run(
        [sys.executable, "examples/train_distributed.py"],
        cwd=ROOT,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes, step 3: loss" in done.stdout and "losses differ by" in done.stdout


def test_the_code_of_the_page_runs(launched, capsys):
    page = (ROOT / "docs" / "frontends.md").read_text(encoding="utf-8")
    section = page[page.index("### In the place of torch's attention\n") :].split("\n## ")[0]
    code = [line for line in section.splitlines() if line.startswith("    ")]
    q, k, v = torch.randn(3, 1, 2, 5, 8).unbind()
    given = {"numflash": numflash, "q": q, "k": k, "v": v}
    given |= {"mask": torch.ones(5, 5) > 0, "bias": torch.randn(5, 5)}
    try:
        exec(textwrap.dedent("\n".join(code)), given)
    finally:
        nt.disable()
    assert launched.take() == ["forward"] * 3
    assert capsys.readouterr().out.startswith("forward: ")
