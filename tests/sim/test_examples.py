"""Examples run: that of each public docstring, those of README.md and docs/fp8.md."""

import doctest
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import numflash
from numflash import masks, math, reference
from tests.support.covering import FULL

ROOT = Path(__file__).parents[2]

PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (numflash, reference, masks, math)
    for name in module.__all__
    if callable(getattr(module, name))
}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_example_that_runs(name):
    docstring = PUBLIC[name].__doc__
    test = doctest.DocTestParser().get_doctest(docstring, {}, name, None, None)
    assert "\n    Example:\n" in docstring and test.examples
    report: list[str] = []
    results = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert not results.failed, "".join(report)


def test_the_code_of_the_readme_runs(monkeypatch, capsys):
    """On NumPy arrays, and with a smaller shape."""
    monkeypatch.setitem(sys.modules, "cupy", np)
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert "shape = 2, 4096, 16, 64" in code
    exec(code.replace("shape = 2, 4096, 16, 64", "shape = 1, 48, 2, 32"), {})
    assert capsys.readouterr().out.count("ok") == 2


def test_the_code_of_the_page_on_fp8_runs():
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 16, 1, 64)).astype("float16")
    page = (ROOT / "docs" / "fp8.md").read_text()
    lines = [line.strip() for line in page.splitlines() if line.startswith("    ")]
    assert len(lines) == 5
    exec("\n".join(lines), {"numflash": numflash, "q": q, "k": k, "v": v})


def test_the_code_of_the_page_on_masks_runs(capsys):
    heads, seqlen = 2, 32
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, seqlen, heads, 16)).astype("float16")
    given = {"heads": heads, "seqlen": seqlen, "q": q, "k": k, "v": v, "np": np}
    given |= {"lengths": np.array([32, 9]), "document": np.repeat(np.arange(4), 8)}
    given |= {"numflash": numflash, "table": np.zeros((heads, seqlen), "float32")}
    page = (ROOT / "docs" / "masks_and_scores.md").read_text()
    code = page[page.index("    bias") : page.index("`examples/")]
    exec(textwrap.dedent(code), given)
    assert given["out"].shape == q.shape and capsys.readouterr().out


# One of each kind: a table of aux, places in images, everything; the whole takes a minute.
SOME = ["relative_position", "neighbourhood", "together"]


def test_masks_and_scores():
    """The example, of which NUMFLASH_TEST_FULL=1 runs all."""
    names = [] if FULL else SOME
    path = ROOT / "examples" / "masks_and_scores.py"
    done = subprocess.run([sys.executable, path, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("  ok\n") == len(names) or FULL
