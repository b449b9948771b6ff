"""Which sources decide a kernel's machine code."""

import ast
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from numflash.configs import Traits, parse_config
from numflash.kernels.factories import FACTORIES
from numflash.machine_code import compiler, sources
from numflash.runtime.devices import architecture
from tests.support.covering import some

MODULES = sorted({f"numflash.kernels.{each.rpartition('.')[0]}" for each in FACTORIES.values()})
ROOMS = "configs", "functions", "kernels", "ptx", "tiles"
FORWARD = parse_config("forward", "sm80-m64n64w4s1")


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the sources, which are read from it."""
    package = tmp_path / "numflash"
    for room in (*ROOMS, "machine_code"):
        shutil.copytree(sources._PACKAGE / room, package / room)
    monkeypatch.setattr(sources, "_PACKAGE", package)
    forget()
    yield package
    forget()


def forget():
    """Empty the caches."""
    for known in (sources._hash_of, sources.source_hash, sources._imports):
        known.cache_clear()


def change(path: Path):
    """Change a source a little."""
    path.write_text(path.read_text() + "\n")
    forget()


def parsed(module: str) -> set[str]:
    """As `sources_of`, by Python's own parser: files of the names that are imported."""
    found, left = set(), [module]
    while left:
        module = left.pop()
        if module in found:
            continue
        found.add(module)
        for node in ast.walk(ast.parse(Path(find_spec(module).origin).read_text())):
            assert not isinstance(node, ast.Import) or "numflash" not in ast.unparse(node)
            if isinstance(node, ast.ImportFrom) and node.module.startswith("numflash."):
                left += [defining(node.module, alias.name) for alias in node.names]
                # A whole package would be no file, and what it holds would not be followed.
                packages = [each for each in left if find_spec(each).submodule_search_locations]
                assert packages == [], f"{module} imports a package"
        left = [each for each in left if each.split(".")[1] in ROOMS]
    return found


def defining(module: str, name: str) -> str:
    """The module that defines a name of a module, by asking the tree of a package."""
    path = Path(find_spec(module).origin)
    if path.name != "__init__.py":
        return module
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and name in [each.name for each in node.names]:
            return defining(node.module, name)
    return f"{module}.{name}" if (path.parent / f"{name}.py").exists() else module


@pytest.mark.parametrize("module", some(MODULES, every=4))
def test_the_text_is_read_as_python_reads_it(module):
    found = {str(path) for path in sources.sources_of(module)}
    assert found == {find_spec(each).origin for each in parsed(module)}


def test_every_kernel_and_tile_belongs_to_a_kernel():
    known = set().union(*map(sources.sources_of, MODULES))
    rooms = [sources._PACKAGE / room for room in ("kernels", "tiles")]
    files = {path for room in rooms for path in room.rglob("*.py") if path.name != "__init__.py"}
    of_none = {"factories.py", "programs.py"}
    assert {path for path in files - known if not str(path).endswith(tuple(of_none))} == set()


@pytest.mark.parametrize(
    "name",
    some(
        [
            "ptx/memory.py",
            "ptx/device.py",
            "tiles/blocks.py",
            "tiles/scores.py",
            # The kernel imports these as modules.
            "tiles/steps.py",
            "tiles/mma/copies.py",
            "tiles/mma/products.py",
            "kernels/mma/forward.py",
            "kernels/arguments.py",
            "configs/mma.py",
            "configs/traits.py",
            "machine_code/compiler.py",
            "machine_code/linker.py",
        ],
        every=4,
    ),
)
def test_a_change_to_what_a_kernel_is_made_of_makes_another_key(name, copy):
    limits = architecture("sm_80")
    traits = Traits("float16", 64, 64)
    before = sources.kernel_hash(FORWARD)
    family, everything = sources.family_hash("forward"), sources.source_hash()
    assert before in compiler.content_key("", FORWARD, traits, limits)
    change(copy / name)
    assert sources.kernel_hash(FORWARD) != before
    assert sources.family_hash("forward") != family
    assert sources.source_hash() != everything


@pytest.mark.parametrize(
    "name", ["ptx/wgmma.py", "ptx/__init__.py", "kernels/quantize/amax.py", "configs/portable.py"]
)
def test_a_change_elsewhere_makes_none(name, copy):
    before = sources.kernel_hash(FORWARD)
    change(copy / name)
    assert sources.kernel_hash(FORWARD) == before


def test_what_is_tuned_depends_on_all_kernels_of_its_family(copy):
    before = sources.family_hash("forward"), sources.family_hash("backward-dq")
    change(copy / "kernels/wgmma/forward.py")
    assert sources.family_hash("forward") != before[0]
    assert sources.family_hash("backward-dq") == before[1]
