"""The source files that decide a kernel's machine code.

They are the module that makes the kernel, its imports, and the compiler's own.
Imports are read from the text, so that nothing is imported to find a cubin. A name that a package
only passes on, as in `from numflash.ptx import f32`, leads to the module that defines it: a change
to one kernel, or to an instruction, makes the machine code of others no older.
"""

import hashlib
import re
from functools import cache
from pathlib import Path

from numflash.configs import Config
from numflash.kernels.factories import module_of, modules_of

_PACKAGE = Path(__file__).parents[1]
# The rooms whose code becomes machine code; rooms below only describe or simulate.
_ROOMS = ("configs", "functions", "kernels", "ptx", "tiles")
# Text, because a parser takes a tenth of a second for all of them.
_IMPORT = re.compile(r"^ *from (numflash[.\w]*) import (\([^)]*\)|.*)$", re.MULTILINE)
_COMPILER = (
    "annotations.py",
    "clusters.py",
    "compiler.py",
    "grid_constants.py",
    "linker.py",
    "repeated_work.py",
)


def kernel_hash(config: Config) -> str:
    """Hash of everything in numflash that decides the machine code of a config's kernel."""
    return _hash_of((module_of(config),))


def family_hash(family: str) -> str:
    """Hash of everything in numflash that decides the machine code of a family's kernels.

    A config that was found to be the fastest of its family is so among these.
    """
    return _hash_of(tuple(modules_of(family)))


@cache
def _hash_of(modules: tuple[str, ...]) -> str:
    return _digest(set().union(*map(sources_of, modules)))


@cache
def source_hash() -> str:
    """Hash of everything in numflash that decides the machine code of any kernel."""
    return _digest({path for room in _ROOMS for path in (_PACKAGE / room).rglob("*.py")})


def sources_of(module: str) -> set[Path]:
    """The files of a module, and of all that it imports from the rooms of kernels."""
    found, left = set(), [_path(module)]
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            left += _imported(path)
    return found


def _digest(paths: set[Path]) -> str:
    digest = hashlib.sha256()
    compiler = {_PACKAGE / "machine_code" / name for name in _COMPILER}
    for path in sorted(paths | compiler):
        digest.update(str(path.relative_to(_PACKAGE)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _imported(path: Path) -> list[Path]:
    """The files where the names that a file imports from the rooms of kernels are defined."""
    if path.name == "__init__.py":
        return []  # a package passes names on; who takes one is led to its module
    return [_definition(module, name) for module, name in _imports(path).values()]


@cache
def _imports(path: Path) -> dict[str, tuple[str, str]]:
    """Name in a file -> (module, name there) of what it imports from the rooms of kernels."""
    found = {}
    for module, names in _IMPORT.findall(path.read_text()):
        for words in filter(None, map(str.split, names.strip("()").split(","))):
            found[words[-1]] = module, words[0]
    return {name: source for name, source in found.items() if _is_of_kernels(*source)}


def _is_of_kernels(module: str, name: str) -> bool:
    package, *rooms = f"{module}.{name}".split(".")
    return package == "numflash" and bool(rooms) and rooms[0] in _ROOMS


def _definition(module: str, name: str) -> Path:
    """The file that defines a name of a module: a package may only pass it on."""
    path = _path(module)
    if path.name == "__init__.py":
        if name in (passed_on := _imports(path)):
            return _definition(*passed_on[name])
        submodule = path.parent / f"{name}.py"
        return submodule if submodule.exists() else path
    return path


def _path(module: str) -> Path:
    """The file of a module or of a package."""
    path = _PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
