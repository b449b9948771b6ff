"""Which module imports which: the folders are the architecture (docs/architecture.md)."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import numflash

ROOT = Path(numflash.__file__).parent

# What each module or folder of numflash may import of numflash. One that is not listed stands
# above all of them: it may import any, and none of them may import it.
ARROWS = {
    "errors": "",
    "mode": "",
    "switches": "",
    "commands": "",
    "sass": "errors",
    "devices": "",
    "trust": "",
    "gpus": "devices",
    "cache": "trust",
    "configs": "devices formats",
    "formats": "",
    "reference": "formats",
    "fp8": "configs errors formats views",
    "views": "",
    "arrays": "errors mode views",
    "problem": "configs errors views",
    "problem_class": "configs problem",
    "files": "trust",
    "printable": "",
    "entries": "configs devices printable problem_class",
    "store": "cache configs devices entries files trust",
    "tensor_maps": "configs problem",
    "capture": "files problem_class",
    "autotune": "mode problem_class switches",
    "dispatch": "configs devices errors problem",
    "tuned": "compiler configs devices dispatch entries errors problem_class store switches",
    "sums": "errors switches",
    "simulator": "mode sums tensor_maps",
    "ptx": "formats mode simulator sums",
    "executor": "devices errors formats mode ptx simulator tensor_maps",
    "ptx_worker": "cache compiler configs devices errors",
    "tiles": "ptx",
    "kernels": "configs formats ptx tiles",
    "compiler": "cache configs devices errors kernels ptx",
    "launch": "compiler configs devices errors executor gpus kernels mode ptx ptx_worker "
    "simulator switches tensor_maps views",
    "selection": "autotune capture configs dispatch entries gpus launch mode problem "
    "problem_class tuned",
    "quantization": "arrays configs errors formats fp8 kernels launch problem views",
    "calls": "arrays configs dispatch kernels launch problem selection tensor_maps views",
    "fp8_arrays": "arrays fp8 quantization views",
    "fp8_sources": "arrays configs errors fp8 kernels launch problem quantization views",
    "fp8_options": "errors fp8 fp8_sources",
    "fp8_calls": "arrays calls configs dispatch errors fp8_sources kernels launch problem "
    "selection tensor_maps views",
    "api": "arrays calls compiler configs dispatch errors fp8 fp8_calls fp8_options launch mode "
    "problem selection store tuned views",
    "explain": "arrays calls dispatch fp8_calls fp8_options gpus problem selection views",
    "check": "api arrays explain fp8 fp8_options reference selection",
}
# Within a layer: the files of a folder import none of these folders. The portable kernels stay
# readable by themselves, and each implementation can be taken out.
APART = {
    "configs/portable.py": "configs.sm80",
    "configs/sm80.py": "configs.portable configs.sm90",
    "kernels/portable": "kernels.sm80 tiles.mma",
    "kernels/sm80": "kernels.portable",
    "tiles/[a-z]*.py": "tiles.mma",
}
# What else may be imported, and by whom: "*" everywhere, "f" only inside a function.
OUTSIDE = {
    "numpy": "*",
    "ml_dtypes": "*",
    "greenlet": "simulator",
    "llvmlite": "ptx compiler",
    "numba": "ptx compiler launch simulator arrays(f) mode(f)",
    "cuda": "compiler(f) launch(f) info(f)",
    "cupy": "arrays(f)",
}
NO_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}


def _modules():
    return sorted(ROOT.rglob("*.py"))


def _unit(path: Path) -> str:
    """The row of the table that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _imports(path: Path) -> list[tuple[str, bool]]:
    """(dotted name, whether inside a function) of everything a file imports."""
    found = []

    def visit(node, inside):
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT.parent).parts[: -node.level] if node.level else ()
            module = ".".join([*package, *filter(None, [node.module])])
            if module == "numflash":
                # `from numflash import arrays` imports a module.
                found.extend((f"numflash.{alias.name}", inside) for alias in node.names)
            else:
                found.append((module, inside))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(path.read_text()), False)
    return found


def _violations(path: Path) -> list[str]:
    unit, wrong = _unit(path), []
    for name, inside in _imports(path):
        top, _, rest = name.partition(".")
        if top == "numflash":
            target = rest.partition(".")[0]
            allowed = ARROWS.get(unit)
            if allowed is not None and target != unit and target not in allowed.split():
                wrong.append(f"{unit} imports numflash.{target}")
        elif top not in sys.stdlib_module_names:
            allowed = OUTSIDE.get(top, "").split()
            if not {"*", unit} & set(allowed) and not (inside and f"{unit}(f)" in allowed):
                wrong.append(f"{unit} imports {name}{' in a function' if inside else ''}")
    return wrong


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    assert _violations(path) == []


@pytest.mark.parametrize("place", APART)
def test_implementations_stay_apart(place):
    found = sorted(ROOT.glob(place if place.endswith(".py") else f"{place}/*.py"))
    assert found
    refused = tuple(f"numflash.{other}." for other in APART[place].split())
    for path in found:
        assert [name for name, _ in _imports(path) if f"{name}.".startswith(refused)] == [], path


def test_the_table_names_only_what_exists():
    units = {_unit(path) for path in _modules()}
    assert set(ARROWS) <= units
    for allowed in ARROWS.values():
        assert set(allowed.split()) <= set(ARROWS)


def test_the_table_has_no_cycle():
    done = set()
    while len(done) < len(ARROWS):
        ready = {u for u, below in ARROWS.items() if u not in done and done >= set(below.split())}
        assert ready, f"a cycle among {sorted(set(ARROWS) - done)}"
        done |= ready


def test_no_module_is_named_after_nothing():
    assert [path for path in _modules() if path.stem in NO_NAMES] == []
    assert [path for path in ROOT.rglob("*") if path.is_dir() and path.name in NO_NAMES] == []


@pytest.mark.parametrize(
    "unit, line, message",
    [
        ("configs", "from numflash.arrays import ArrayView", "configs imports numflash.arrays"),
        ("configs", "from numflash import api", "configs imports numflash.api"),
        ("dispatch", "from numflash.launch import x", "dispatch imports numflash.launch"),
        ("kernels", "from numflash import dispatch", "kernels imports numflash.dispatch"),
        ("tiles", "import numba", "tiles imports numba"),
        ("kernels", "def f():\n    from numba import cuda", "kernels imports numba in a function"),
        ("kernels", "from ..launch import Launcher", "kernels imports numflash.launch"),
        ("arrays", "import cupy", "arrays imports cupy"),
        ("api", "import torch", "api imports torch"),
        ("above", "import optuna", "above imports optuna"),
        ("launch", "import bench", "launch imports bench"),
        ("ptx", "from numflash.tiles import lanes", "ptx imports numflash.tiles"),
    ],
)
def test_a_wrong_arrow_is_seen(monkeypatch, tmp_path, unit, line, message):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path / "numflash")
    path = tmp_path / "numflash" / unit / "module.py"
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert [wrong.partition(".module")[0] for wrong in _violations(path)] == [message]


def test_importing_numflash_imports_no_compiler_and_no_array_library():
    absent = ("numba", "llvmlite", "cuda", "torch", "cupy", "optuna", "tuner", "bench")
    program = f"import sys, numflash; print([m for m in {absent} if m in sys.modules])"
    environment = {n: v for n, v in os.environ.items() if n != "NUMBA_ENABLE_CUDASIM"}
    environment["PYTHONPATH"] = str(ROOT.parent)
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr
