"""What people are shown of `numflash.jax` runs: the page, the example."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

jax = pytest.importorskip("jax", reason='needs JAX: pip install "numflash[jax]"')

from tests.support import jax_cases  # noqa: E402, F401  (JAX on the CPU)

ROOT = Path(__file__).parents[2]


def test_the_code_of_the_page_runs(launched):
    page = (ROOT / "docs" / "frontends.md").read_text()
    section = page[page.index("## JAX\n") :].split("\n## ")[0]
    lines = section[: section.index("`pip install")].splitlines()[1:]
    code = textwrap.dedent("\n".join(lines))
    for text, smaller in (("3, 2, 128, 8, 64", "3, 2, 16, 1, 8"), ("8, 128, 128", "1, 16, 16")):
        assert text in code
        code = code.replace(text, smaller)
    given = {}
    exec(code, given)
    jax.block_until_ready([given[name] for name in ("out", "lse", "dq", "dbias", "each")])
    assert given["dq"].shape == given["q"].shape and given["dbias"].shape == (1, 16, 16)
    assert launched.families.count("forward") == 4


def test_the_loss_of_the_example_falls():
    path = ROOT / "examples" / "train_jax.py"
    done = subprocess.run([sys.executable, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("  ok\n")
