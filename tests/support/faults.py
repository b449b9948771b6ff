"""Faults put into kernels on purpose, and the one loader of modules that have one.

`Dropped` is a fault of an event: the n-th call of a function in another is left out, whatever its
arguments and its place in the file. `Mutation` replaces a piece of text, for ideas that are no
call. What has a fault must give a wrong result, or an error of the simulator.
"""

import ast
import importlib
import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from types import ModuleType


@dataclass(frozen=True)
class Mutation:
    """`old`, which the source holds exactly `times` times, becomes `new`."""

    name: str
    old: str
    new: str
    times: int = 1

    def apply(self, source: str) -> str:
        """The mutated source. Raises AssertionError if `old` is not what was expected."""
        found = source.count(self.old)
        assert found == self.times, f"{self.name}: {self.old!r} stands {found} times in the source"
        return source.replace(self.old, self.new)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Dropped:
    """The n-th statement, from 0, that only calls `called` in `function` is left out.

    Attributes:
        function: the innermost function that the call stands in, with the factory that it is in:
            "make_forward_kernel.forward".
        called: as it is written: "cuda.syncthreads", "mbarrier_arrive".
        n: which of them.
    """

    function: str
    called: str
    n: int = 0

    def apply(self, source: str) -> str:
        """The source without it, its other lines where they were. Raises AssertionError."""
        assert self in _statements(source), f"there is no {self} in the source"
        call = _statements(source)[self]
        lines = source.splitlines()
        first = lines[call.lineno - 1]
        indent = first[: len(first) - len(first.lstrip())]
        lines[call.lineno - 1 : call.end_lineno] = [
            f"{indent}pass",
            *[""] * (call.end_lineno - call.lineno),
        ]
        return "\n".join(lines)

    def before(self, source: str, count: int) -> str:
        """The `count` lines before the call."""
        number = _statements(source)[self].lineno - 1
        return "\n".join(source.splitlines()[max(0, number - count) : number])

    def __str__(self) -> str:
        return f"{self.called} {self.n} of {self.function}"


def events(source: str, called: str) -> list[Dropped]:
    """Every statement of a source whose only call matches `called`, in the order of the source."""
    return [fault for fault in _statements(source) if re.fullmatch(called, fault.called)]


@cache
def _statements(source: str) -> dict[Dropped, ast.Expr]:
    """Every statement that is a call, by where it stands."""
    found, counts = {}, Counter()

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef):
            function = f"{function}.{node.name}".lstrip(".")
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            where = function, ast.unparse(node.value.func)
            found[Dropped(*where, counts[where])] = node
            counts[where] += 1
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(source), "")
    return found


def source_of(module: str) -> str:
    """The source text of a module."""
    return inspect.getsource(importlib.import_module(module))


def load(modules: Iterable[str], faulty: str, fault, monkeypatch) -> ModuleType:
    """Modules executed again, one of them with a fault; the last of them.

    Args:
        modules: by name, in the order of imports: what has the fault, and all that must see it.
        faulty: which of them has it.
        fault: a `Dropped` or a `Mutation`.
        monkeypatch: what takes them out of `sys.modules` again.
    """
    for name in dict.fromkeys(modules):
        source = source_of(name)
        changed = ModuleType(name)
        changed.__package__ = name.rpartition(".")[0]
        text = fault.apply(source) if name == faulty else source
        monkeypatch.setitem(sys.modules, name, changed)
        exec(compile(text, f"{name} with a fault", "exec"), changed.__dict__)
    return changed
