"""Faults put into kernels on purpose, and the one loader of modules that have one.

`Dropped`, `Early` and `Twice` are faults of an event: the n-th call of a function in another is
left out, comes too early, or comes twice, whatever its arguments and its place in the file.
`Mutation` replaces a piece of text, for ideas that are no call; `mutations` reads a table of them.
What has a fault must give a wrong result, or an error of the simulator.
"""

import ast
import importlib
import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TypeVar

Row = TypeVar("Row")


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
class Event:
    """The n-th statement, from 0, that only calls `called` in `function`.

    Attributes:
        function: the innermost function that the call stands in, with the factory that it is in:
            "make_attend.attend".
        called: as it is written: "cuda.syncthreads", "K.release".
        n: which of them.
    """

    function: str
    called: str
    n: int = 0

    def apply(self, source: str) -> str:
        """The source with the fault. Raises AssertionError if the event is not there."""
        where = self.function, self.called, self.n
        found = _statements(source)
        assert where in found, f"there is no {self} in the source"
        return "\n".join(self._changed(source.splitlines(), *found[where]))

    def before(self, source: str, count: int) -> str:
        """The `count` lines before the call."""
        number = _statements(source)[self.function, self.called, self.n][0].lineno - 1
        return "\n".join(source.splitlines()[max(0, number - count) : number])

    def __str__(self) -> str:
        return f"{self.called} {self.n} of {self.function}"

    def _changed(self, lines, call, earlier) -> list[str]:
        raise NotImplementedError


class Dropped(Event):
    """The event is left out; other lines stay where they were."""

    def _changed(self, lines, call, earlier):
        kept = [f"{' ' * call.col_offset}pass", *[""] * (call.end_lineno - call.lineno)]
        return [*lines[: call.lineno - 1], *kept, *lines[call.end_lineno :]]


class Early(Event):
    """The event comes before the statement that it stands behind."""

    def _changed(self, lines, call, earlier):
        assert earlier is not None, f"{self} stands behind nothing"
        first, last = earlier.lineno - 1, call.lineno - 1
        moved = lines[last : call.end_lineno]
        return [*lines[:first], *moved, *lines[first:last], *lines[call.end_lineno :]]


class Twice(Event):
    """The event comes twice."""

    def _changed(self, lines, call, earlier):
        again = lines[call.lineno - 1 : call.end_lineno]
        return [*lines[: call.end_lineno], *again, *lines[call.end_lineno :]]


def attempts(problems: Iterable, seeds: Callable[[object], Iterable[int]]) -> list[tuple]:
    """(problem, seed): each problem with its first seed, then each with its other ones.

    Most faults show with any seed but not in any problem, some in one problem with few seeds.
    """
    every = [(problem, list(seeds(problem))) for problem in problems]
    first = [(problem, seed) for problem, of_it in every for seed in of_it[:1]]
    return first + [(problem, seed) for problem, of_it in every for seed in of_it[1:]]


def events(source: str, called: str, kind: type[Event] = Dropped) -> list[Event]:
    """Every statement of a source whose only call matches `called`, in the order of the source.

    Of `Early` those that stand behind another statement.
    """
    return [
        kind(*where)
        for where, (_, earlier) in _statements(source).items()
        if re.fullmatch(called, where[1]) and not (kind is Early and earlier is None)
    ]


@cache
def _statements(source: str) -> dict[tuple, tuple[ast.Expr, ast.stmt | None]]:
    """Every statement that is a call, by where it stands, with the one before it in its block."""
    found, counts = {}, Counter()

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef):
            function = f"{function}.{node.name}".lstrip(".")
        for block in (getattr(node, name, ()) for name in ("body", "orelse", "finalbody")):
            earlier = None
            for child in block if isinstance(block, list) else ():
                if isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
                    where = function, ast.unparse(child.value.func)
                    found[*where, counts[where]] = child, earlier
                    counts[where] += 1
                visit(child, function)
                earlier = child

    visit(ast.parse(source), "")
    return found


def mutations(table: str) -> list[tuple[str, str, Mutation]]:
    """(part, problem, mutation) of each row of a table; a row has two lines:

    part  problem  the idea, in words[  x2, if it stands in two places]
        old text -> new text
    """
    lines = [line.strip() for line in table.splitlines() if line.strip()]
    found = []
    for head, change in zip(lines[::2], lines[1::2], strict=True):
        part, problem, name, *times = re.split(" {2,}", head)
        old, new = f"{change} ".split(" -> ")
        times = int(times[0].removeprefix("x")) if times else 1
        found.append((part, problem, Mutation(name, old, new.rstrip(), times)))
    return found


def source_of(module: str) -> str:
    """The source text of a module."""
    return inspect.getsource(importlib.import_module(module))


def load(modules: Iterable[str], faulty: str, fault, monkeypatch) -> ModuleType:
    """Modules executed again, one of them with a fault; the last of them.

    Args:
        modules: by name, in the order of imports: what has the fault, and all that must see it.
        faulty: which of them has it.
        fault: an `Event` or a `Mutation`.
        monkeypatch: what takes them out of `sys.modules` again.
    """
    # All are imported as they are first: one that is imported later would keep what has the fault.
    sources = {name: source_of(name) for name in dict.fromkeys(modules)}
    for name, source in sources.items():
        changed = ModuleType(name)
        changed.__package__, _, last = name.rpartition(".")
        text = fault.apply(source) if name == faulty else source
        # `from package import module` reads the package's attribute, not `sys.modules`.
        monkeypatch.setitem(sys.modules, name, changed)
        monkeypatch.setattr(sys.modules[changed.__package__], last, changed)
        exec(compile(text, f"{name} with a fault", "exec"), changed.__dict__)
    return changed
