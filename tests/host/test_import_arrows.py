"""Which module imports which: the folders are the architecture (docs/architecture.md)."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import numflash

ROOT = Path(numflash.__file__).parent
TUNER = ROOT.parent / "tuner"
BENCH = ROOT.parent / "bench"

# The rooms that each room of numflash may import. `__init__.py` stands above them all: it may
# import any, and none may import it.
ARROWS = {
    "runtime": "",
    "functions": "",
    "configs": "functions runtime",
    "problem": "configs functions runtime",
    "reference": "configs functions",
    "simulator": "problem runtime",
    "ptx": "configs runtime simulator",
    "tiles": "functions ptx",
    "kernels": "configs functions ptx runtime tiles",
    "machine_code": "configs kernels ptx runtime",
    "executor": "configs problem ptx runtime simulator",
    "selection": "configs machine_code problem reference runtime",
    "calls": "configs executor kernels machine_code problem ptx runtime selection simulator",
    "api": "calls configs functions machine_code problem reference runtime selection",
    "distributed": "api calls configs functions problem runtime selection",
    "frontends": "api calls configs distributed functions problem runtime selection",
}
# Public names of front ends, each a module that lies flat and only imports.
DOORS = ("flash_attn", "jax", "torch", "transformers")
ARROWS |= dict.fromkeys(DOORS, "frontends")
# The same of the other packages; what is not listed stands above all that is.
TUNER_ARROWS = {
    "records": "",
    "lengths": "",
    "recipes": "",
    "drawing": "",
    "space": "lengths recipes records",
    "model": "lengths records space",
    "pipeline": "model space",
    "measuring": "lengths recipes records",
    "search": "measuring model records space",
    "report": "drawing records search",
    "explain": "drawing lengths measuring model pipeline records space",
    "tables": "model",
}
BENCH_ARROWS = {
    "points": "",
    "records": "",
    "peers": "points",
    "measuring": "peers points records",
    "tables": "measuring peers points records",
    "machine_code": "tables",
    "fp8_accuracy": "records tables",
    "studies": "measuring peers points records tables",
    "distributed": "measuring points records tables",
    "first_light": "measuring peers points records studies tables",
    "timing": "measuring peers records tables",
    "speed": "measuring peers points records studies tables timing",
    "serving": "measuring peers points records tables timing",
    "report": "fp8_accuracy points records tables",
    "verify": "peers records speed",
}
# Within a layer: the files of a folder import none of these folders. The portable kernels stay
# readable by themselves, and each implementation can be taken out.
APART = {
    "configs/portable.py": "configs.mma configs.mma_rules",
    "configs/mma[_a-z]*.py": "configs.portable configs.wgmma",
    "kernels/portable": "kernels.mma tiles.mma",
    "kernels/mma": "kernels.portable kernels.wgmma",
    "tiles/[a-z]*.py": "tiles.mma tiles.wgmma",
}
# Other imports, and who may have them: "*" everywhere, "f" only inside a function.
OUTSIDE = {
    "numpy": "*",
    "ml_dtypes": "*",
    "greenlet": "simulator",
    "llvmlite": "ptx machine_code",
    "numba": "ptx machine_code simulator runtime(f)",
    "cuda": "machine_code(f) runtime(f) api(f)",
    "cupy": "runtime(f) distributed(f)",
    "torch": "frontends distributed(f)",
    "transformers": "frontends",
    "jax": "frontends",
}
NO_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}


def _modules():
    return sorted(ROOT.rglob("*.py"))


def _unit(path: Path) -> str:
    """The row of the table that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _imports(path: Path, root: Path | None = None) -> list[tuple[str, bool]]:
    """(dotted name, whether inside a function) of everything a file imports."""
    found = []

    def visit(node, inside):
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            beside = (root or ROOT).parent
            package = path.relative_to(beside).parts[: -node.level] if node.level else ()
            module = ".".join([*package, *filter(None, [node.module])])
            if module in ("numflash", "tuner", "bench"):
                # `from numflash import reference` imports a room.
                found.extend((f"{module}.{alias.name}", inside) for alias in node.names)
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


@pytest.mark.parametrize("unit", [*ARROWS, "__init__"])
def test_imports_go_down(unit):
    of_unit = [path for path in _modules() if _unit(path) == unit]
    assert {str(path): found for path in of_unit if (found := _violations(path))} == {}


@pytest.mark.parametrize("place", APART)
def test_implementations_stay_apart(place):
    found = sorted(ROOT.glob(place if place.endswith(".py") else f"{place}/*.py"))
    assert found
    refused = tuple(f"numflash.{other}." for other in APART[place].split())
    for path in found:
        assert [name for name, _ in _imports(path) if f"{name}.".startswith(refused)] == [], path


def test_every_room_is_in_the_table_and_nothing_lies_flat():
    assert {_unit(path) for path in _modules()} == {*ARROWS, "__init__"}
    assert {path.stem for path in ROOT.glob("*.py")} == {*DOORS, "__init__"}
    for allowed in ARROWS.values():
        assert set(allowed.split()) <= set(ARROWS)


def test_the_tuner_imports_itself_relatively_and_goes_down():
    for path in sorted(TUNER.rglob("*.py")):
        _expect_tuner_goes_down(path)


def _expect_tuner_goes_down(path):
    unit = path.relative_to(TUNER).parts[0].removesuffix(".py")
    names = [name.split(".") for name, _ in _imports(path, TUNER)]
    assert [".".join(name) for name in names if name[0] in ("bench", "numflash_tuner")] == [], path
    inside = {name[1] for name in names if name[0] == "tuner" and len(name) > 1} - {unit}
    # A name that is no room or module is a constant of the package.
    above = inside - set(TUNER_ARROWS.get(unit, "").split()) - {"SAMPLERS"}
    assert unit not in TUNER_ARROWS or above == set(), path
    assert "from tuner" not in path.read_text(), path


def _bench_violations(path: Path) -> list[str]:
    """Forbidden imports of a file of bench from bench, also inside functions."""
    unit = path.relative_to(BENCH).parts[0].removesuffix(".py")
    names = [name.split(".") for name, _ in _imports(path, BENCH)]
    rooms = {name[1] for name in names if name[0] == "bench" and len(name) > 1} - {unit}
    above = rooms - set(BENCH_ARROWS.get(unit, "").split())
    return [f"{unit} imports bench.{room}" for room in sorted(above) if unit in BENCH_ARROWS]


def test_bench_goes_down():
    assert [wrong for path in BENCH.rglob("*.py") for wrong in _bench_violations(path)] == []


def test_every_room_of_bench_is_in_the_table():
    rooms = {path.relative_to(BENCH).parts[0].removesuffix(".py") for path in BENCH.rglob("*.py")}
    assert rooms == {*BENCH_ARROWS, "__init__", "__main__"}


@pytest.mark.parametrize(
    "file, line, message",
    [
        ("measuring/worker.py", "from bench.tables import x", "measuring imports bench.tables"),
        ("tables/tables.py", "from bench.studies import static", "tables imports bench.studies"),
        ("verify.py", "def f():\n    from bench.report import x", "verify imports bench.report"),
        ("points/work.py", "from ..records import record", "points imports bench.records"),
    ],
)
def test_a_wrong_arrow_of_bench_is_seen(monkeypatch, tmp_path, file, line, message):
    monkeypatch.setattr(sys.modules[__name__], "BENCH", tmp_path / "bench")
    path = tmp_path / "bench" / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert _bench_violations(path) == [message]


@pytest.mark.parametrize(
    "table", [ARROWS, TUNER_ARROWS, BENCH_ARROWS], ids=["numflash", "tuner", "bench"]
)
def test_a_table_has_no_cycle(table):
    done = set()
    while len(done) < len(table):
        ready = {u for u, below in table.items() if u not in done and done >= set(below.split())}
        assert ready, f"a cycle among {sorted(set(table) - done)}"
        done |= ready


def test_no_module_is_named_after_nothing():
    assert [path for path in _modules() if path.stem in NO_NAMES] == []
    assert [path for path in ROOT.rglob("*") if path.is_dir() and path.name in NO_NAMES] == []


@pytest.mark.parametrize(
    "unit, line, message",
    [
        ("runtime", "from numflash.configs import Config", "runtime imports numflash.configs"),
        ("configs", "from numflash import api", "configs imports numflash.api"),
        ("selection", "from numflash.calls.launch import x", "selection imports numflash.calls"),
        ("kernels", "from numflash import selection", "kernels imports numflash.selection"),
        ("tiles", "import numba", "tiles imports numba"),
        ("kernels", "def f():\n    from numba import cuda", "kernels imports numba in a function"),
        ("kernels", "from ..calls.launch import Launcher", "kernels imports numflash.calls"),
        ("runtime", "import cupy", "runtime imports cupy"),
        ("api", "import torch", "api imports torch"),
        ("calls", "import optuna", "calls imports optuna"),
        ("calls", "import bench", "calls imports bench"),
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
    absent = ("numba", "llvmlite", "cuda", "cupy", "optuna", "tuner", "bench")
    absent += "torch", "jax", "transformers"
    program = f"import sys, numflash; print([m for m in {absent} if m in sys.modules])"
    environment = {n: v for n, v in os.environ.items() if n != "NUMBA_ENABLE_CUDASIM"}
    environment["PYTHONPATH"] = str(ROOT.parent)
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr
