"""A key of what a Python function does, so that a function seen before is not traced again.

Functions with equal keys do the same: their code is equal, and so are the numbers that they see in
closures, defaults and globals, and the functions that they call. Names do not matter, nor do
addresses: the same closure made again has the same key, one over another number has another key.
What may change without a trace, as an array or an object, has none.
"""

import builtins
import dis
import types
from collections.abc import Hashable
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np

from numflash.functions.written import WrittenFunction

# Modules whose functions stay what they are.
_STABLE = frozenset({"_operator", "builtins", "math", "numpy", "operator", "torch"})
_OWN = frozenset({"numflash", "numflash.functions.math", "numflash.functions.masks"})
_ATOMS = frozenset({bool, int, str, bytes, type(None), type(...)})
_FUNCTION, _MISSING = types.FunctionType, object()
# Longer tuples, lists and dicts have no key.
_MOST = 64


def key_of(function: Any) -> Hashable | None:
    """A key of a function's meaning; None if nobody can be sure of that. None itself has a key.

    Functions, `functools.partial` of them, built-in functions and NumPy's have one. It changes
    with every number that the function sees outside of itself.
    """
    if function is None:
        return _OF_NONE
    if type(function) is _FUNCTION:
        seen = _seen.get(function)
        if seen is not None and seen[1].is_unchanged():
            return seen[0]
    sight = _Sight()
    try:
        key = sight.key(function)
    except _UnsureError:
        return None
    if type(function) is _FUNCTION and not sight.is_mutable:
        _seen[function] = key, sight
    return key


_OF_NONE = (type(None), None)
_seen: WeakKeyDictionary = WeakKeyDictionary()


class _UnsureError(Exception):
    """A value of which nobody can be sure."""


class _Sight:
    """What a function sees outside of itself, and the functions that it calls, with theirs.

    Attributes:
        is_mutable: whether some of it may change and still be the same object.
    """

    def __init__(self):
        self.is_mutable = False
        self._cells, self._globals, self._functions = [], [], []
        self._above: list[types.FunctionType] = []

    def is_unchanged(self) -> bool:
        """Whether all of it is still the same objects."""
        try:
            for cell, x in self._cells:
                if cell.cell_contents is not x:
                    return False
        except ValueError:  # emptied
            return False
        for scope, name, x in self._globals:
            if scope.get(name, _MISSING) is not x:
                return False
        for reference, code, defaults in self._functions:
            found = reference()  # weak, as the function is a key of `_seen`
            if found is None or found.__code__ is not code or found.__defaults__ is not defaults:
                return False
        return True

    def key(self, x: Any) -> Hashable:
        """The key of a value. Raises _UnsureError if it has none."""
        kind = type(x)
        if kind in _ATOMS:
            return kind, x
        if kind is float or kind is complex:
            return kind, repr(x)  # 0.0 and -0.0 are equal
        if kind is _FUNCTION:
            return self._key_of_function(x)
        if kind is tuple:
            return kind, self._keys(x)
        if kind is list or kind is dict:
            self.is_mutable = True
            return kind, self._keys(x if kind is list else tuple(x.items()))
        if kind is partial:
            self.is_mutable = True
            return kind, self.key(x.func), self.key(x.args), self.key(x.keywords)
        if isinstance(x, np.generic):
            return kind, x.dtype.str, x.tobytes()
        if kind is WrittenFunction:
            return kind, x
        return _key_of_stable(x, kind)

    def _keys(self, values) -> tuple:
        if len(values) > _MOST:
            raise _UnsureError
        return tuple([self.key(each) for each in values])

    def _key_of_function(self, function: types.FunctionType) -> Hashable:
        code, closure = function.__code__, function.__closure__
        if closure is None and _is_stable(function.__module__ or ""):
            return _FUNCTION, function.__module__, function.__qualname__
        for depth, other in enumerate(self._above):
            if other is function:
                return "itself", depth
        if function.__dict__.keys() - {"__wrapped__", "__signature__"}:
            raise _UnsureError
        self._above.append(function)
        self._functions.append((ref(function), code, function.__defaults__))
        inner = []
        for cell in closure or ():
            try:
                x = cell.cell_contents
            except ValueError:  # still empty
                raise _UnsureError from None
            self._cells.append((cell, x))
            inner.append(self.key(x))
        scope = function.__globals__
        for name in _globals_of(code):
            x = scope.get(name, _MISSING)
            self._globals.append((scope, name, x))
            if x is not _MISSING:
                inner += name, self.key(x)
            elif not hasattr(builtins, name):
                raise _UnsureError
        inner.append(self.key(function.__defaults__))
        if function.__kwdefaults__:
            inner.append(self.key(function.__kwdefaults__))
        self._above.pop()
        return code, tuple(inner)


def _key_of_stable(x: Any, kind: type) -> Hashable:
    """The key of what belongs to a library that does not change."""
    if kind is types.ModuleType:
        module, name = x.__name__, ""
    elif kind is types.BuiltinFunctionType:
        owner = x.__self__
        if not isinstance(owner, types.ModuleType | type):
            raise _UnsureError  # a method of an object
        module = owner.__name__ if isinstance(owner, types.ModuleType) else owner.__module__
        name = x.__name__
    elif kind is type:
        module, name = x.__module__, x.__qualname__
    elif kind in (np.ufunc, type(np.where)):
        module, name = "numpy", x.__name__
    elif isinstance(x, np.dtype) or (kind.__module__, kind.__name__) == ("torch", "dtype"):
        module, name = "numpy", str(x)
    else:
        raise _UnsureError
    if not _is_stable(module):
        raise _UnsureError
    return kind, module, name


def _is_stable(module: str) -> bool:
    return module in _OWN or module.partition(".")[0] in _STABLE


@cache
def _globals_of(code: types.CodeType) -> tuple[str, ...]:
    """Names of globals that a function or one within it reads.

    Among them "", which is none, if it changes any or imports something.
    """
    found = {}
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            found[instruction.argval] = None
        elif instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL", "IMPORT_NAME"):
            found[""] = None
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            found |= dict.fromkeys(_globals_of(const))
    return tuple(found)
