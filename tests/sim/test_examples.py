"""Examples run: that of each public docstring, those of README.md and of pages in docs."""

import doctest
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import numflash
from numflash import distributed, masks, math, reference
from tests.support.covering import ALL, FULL, some, thorough
from tests.support.small_kernels import prefer_small_kernels

# What users see.
pytestmark = pytest.mark.usefixtures("shipped_kernels")

ROOT = Path(__file__).parents[2]

PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (numflash, reference, masks, math, distributed)
    for name in module.__all__
    if callable(getattr(module, name))
}


@pytest.mark.parametrize("name", some(PUBLIC, every=3))
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


@thorough
def test_the_code_of_the_page_on_fp8_runs():
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 16, 1, 64)).astype("float16")
    page = (ROOT / "docs" / "fp8.md").read_text()
    lines = [line.strip() for line in page.splitlines() if line.startswith("    ")]
    assert len(lines) == 5
    exec("\n".join(lines), {"numflash": numflash, "q": q, "k": k, "v": v})


@thorough
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


def test_the_code_on_rotary_embeddings_runs():
    seqlen, rotary_dim = 24, 16
    rng = np.random.default_rng(0)
    q, k, dq = rng.standard_normal((3, 2, seqlen, 2, 32)).astype("float16")
    given = {"numflash": numflash, "q": q, "k": k, "dq": dq, "q1": q[:, :3], "packed": q[0]}
    given |= {"seqlen": seqlen, "rotary_dim": rotary_dim, "lengths": np.array([9, 20], "int32")}
    given["cu_seqlens"] = np.array([0, 5, 24], "int32")
    page = (ROOT / "docs" / "sequences.md").read_text()
    code = page[page.index("## Rotary embeddings") :].split("\n## ")[0]
    lines = [line.strip() for line in code.splitlines() if line.startswith("    ")]
    assert len(lines) == 9
    exec("\n".join(lines), given)
    assert given["packed"].shape == q[0].shape and given["cos"].shape == (24, 8)


def _code_of(section: str) -> str:
    """The code of a section of the page on sequences."""
    page = (ROOT / "docs" / "sequences.md").read_text()
    text = page[page.index(f"## {section}\n") :].split("\n## ")[0]
    return textwrap.dedent("\n".join(x for x in text.splitlines() if x.startswith("    ")))


@thorough
def test_the_code_on_lengths_runs():
    q, k, v, dout = np.random.default_rng(0).standard_normal((4, 30, 2, 16)).astype("float16")
    ends = np.array([0, 12, 30], np.int32)
    given = {"numflash": numflash, "q": q, "k": k, "v": v, "dout": dout, "cu_seqlens": ends}
    code = _code_of("Variable lengths").split("out = numflash.attention(")
    assert len(code) == 2
    exec(code[0], given)
    assert given["dq"].shape == q.shape
    given |= {name: given[name].reshape(2, 15, 2, 16) for name in "qkv"}
    given["lengths"] = np.array([15, 4], np.int32)
    exec("out = numflash.attention(" + code[1], given)
    assert not given["out"][1, 4:].any() and given["out"][1, :4].any()
    given |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
    exec(_code_of("The schedule"), given)
    assert isinstance(given["schedule"], numflash.Schedule)


def test_the_code_on_caches_runs():
    rng, row = np.random.default_rng(0), (2, 3, 1, 16)
    q, k, v = rng.standard_normal((3, *row)).astype("float16")
    caches = np.zeros((2, 4, 8, 1, 16), "float16")
    cos, sin = numflash.rotary_tables(16, 16)
    given = {"numflash": numflash, "q": q, "k": k, "v": v, "cos": cos, "sin": sin}
    given |= {"k_cache": caches[0], "v_cache": caches[1], "lengths": np.array([6, 0], np.int32)}
    given["table"] = np.array([[2, 0], [3, 1]], np.int32)
    exec(_code_of("A cache of keys and values"), given)
    assert given["out"].shape == row
    np.testing.assert_array_equal(caches[1, 0, 0], v[0, 2])
    codes, ones = np.zeros((2, *caches[0].shape), np.uint8), np.ones((2, 1), "float32")
    given |= {"k_cache": codes[0], "v_cache": codes[1], "k_descale": ones, "v_descale": ones}
    exec(_code_of("Caches in 8 bits"), given)
    assert given["out"].shape == row and codes[1, 0, 0].any()


# One of each kind: a table of aux, places in images, everything; the whole takes a minute.
SOME = ["relative_position", "neighbourhood", "together"]


@thorough
def test_masks_and_scores():
    """The example, of which NUMFLASH_TEST_FULL=1 runs all."""
    names = [] if FULL else SOME
    path = ROOT / "examples" / "masks_and_scores.py"
    done = subprocess.run([sys.executable, path, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("  ok\n") == len(names) or FULL


@thorough
def test_generate():
    """Tokens from a paged cache are those of attention over the whole sequence."""
    path = ROOT / "examples" / "generate.py"
    done = subprocess.run([sys.executable, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("  ok\n") == 5


@thorough
def test_train_block(monkeypatch):
    """The loss falls, and gradients are those of the loss: here in float32, along themselves.

    By small kernels: this is about the example's own code, of which attention is a part.
    """
    prefer_small_kernels(monkeypatch)
    example = runpy.run_path(str(ROOT / "examples" / "train_block.py"))
    # Of the module that its functions see.
    scope = example["forward"].__globals__
    monkeypatch.setitem(scope, "STEPS", 10 if ALL else 4)
    assert example["main"]() == 0
    monkeypatch.setitem(scope, "DTYPE", "float32")
    monkeypatch.setitem(scope, "BATCH", 1)
    rng, far = np.random.default_rng(1), 1e-2
    p, (x, target) = scope["new_parameters"](rng), scope["new_batch"](rng)
    _, g = scope["loss_and_gradients"](p, x, target)
    for name, slope in g.items():
        steepness = np.linalg.norm(slope)
        way = slope / steepness
        ends = (scope["forward"](p | {name: p[name] + s * far * way}, x)[0] for s in (1, -1))
        ahead, behind = (float(((y - target) ** 2).mean(dtype="f8")) for y in ends)
        np.testing.assert_allclose(steepness, (ahead - behind) / (2 * far), 0.02)
