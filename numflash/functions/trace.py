"""Tracing: a user's functions called once with symbols, and what comes back as a `Program`.

    score_mod(score, batch, head, q_idx, kv_idx, *aux) -> the new score
    mask_mod(batch, head, q_idx, kv_idx, *aux) -> whether the key takes part

A function is called with numbers only, so it may be written with Python's arithmetic, with
`numflash.math`, with NumPy or with PyTorch. Python's `if` wants to know what is known on the
device only. In a `mask_mod`, and in a `score_mod` whose derivative is given, the function is
called once for each way through it, and the ways are put together again by selections.
"""

import builtins
import inspect
import linecache
import math
import os
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from numbers import Complex, Integral, Real
from typing import Any, NamedTuple

import numpy as np

from numflash.functions.arrays import Array, Number
from numflash.functions.identity import key_of
from numflash.functions.nodes import LEAF, Node, apply, const, load, to
from numflash.functions.paths import BranchError, Path, TraceError, along_all_paths
from numflash.functions.plain import aux_taken, takes
from numflash.functions.program import Program
from numflash.functions.symbols import Symbol, Trace, argument, node_of

_OWN = os.path.dirname(os.path.abspath(__file__))
_PLACE_NAMES = ("batch", "head", "q_idx", "kv_idx")
_PLACES = tuple(LEAF[name] for name in "bhij")


class Traced(NamedTuple):
    """A program, and what its `aux` are.

    Attributes:
        program: the program.
        names: of `program.aux`: "bias" and "mask" where they are given, then "aux0", "aux1", ...
    """

    program: Program
    names: tuple[str, ...]


def trace(
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    aux: Sequence[Any] = (),
    *,
    bias: Any = None,
    mask: Any = None,
    score_mod_grad: Callable | None = None,
) -> Traced:
    """The program of a bias, a mask and two functions; see the module's docstring.

    A score becomes `score_mod(score + bias)`. A key takes part where the mask is true and
    `mask_mod` says so. Each function gets all of aux; where there are two of them, one may take
    nothing of it. Functions that `identity.key_of` tells from others are traced once for all
    arrays and numbers of the same kinds.

    Args:
        score_mod, mask_mod: functions.
        aux: what they get: Python's and NumPy's numbers, and arrays' metadata, `ArrayView` or
            alike: `dtype` (a name), `shape`, `strides` (in elements).
        bias, mask: metadata of arrays that broadcast to (batch, heads, queries, keys).
        score_mod_grad: (score, batch, head, q_idx, kv_idx, *aux) -> derivative of `score_mod` by
            the score, for one with a Python `if`.

    Raises:
        TypeError: a function takes other arguments, does what cannot be traced, or returns what is
            no score or no truth value; an array has a dtype that kernels do not read. Messages
            name the function's line.
        ValueError: an array has too many axes, or a function is too long.
    """
    first = [("bias", bias), ("mask", mask)]
    first = [(name, array) for name, array in first if array is not None]
    names = (*(name for name, _ in first), *(f"aux{k}" for k in range(len(aux))))
    given = [array for _, array in first] + list(aux)
    described = tuple(map(describe, given, names))
    axes = tuple(_broadcast_axes(array, name) for name, array in first)
    shapes = tuple(tuple(getattr(x, "shape", ())) for x in given)
    keys = tuple(map(key_of, (score_mod, mask_mod, score_mod_grad)))
    asked = _Asked(described, names, axes, keys)
    functions = (score_mod, mask_mod, score_mod_grad)
    if None in keys:
        return Traced(_trace(asked, functions, shapes)[0], names)
    with _tracing:
        for key in (asked, (asked, shapes)):
            if (program := _known.pop(key, None)) is not None:
                _known[key] = program  # the last to be forgotten
                return Traced(program, names)
    program, looked_at_shapes = _trace(asked, functions, shapes)
    with _tracing:
        _known[(asked, shapes) if looked_at_shapes else asked] = program
        while len(_known) > _MOST_KNOWN:
            del _known[next(iter(_known))]
    return Traced(program, names)


_known: dict = {}
_tracing = threading.Lock()
_MOST_KNOWN = 1024


class _Asked(NamedTuple):
    """What a program depends on, the sizes of arrays aside."""

    described: tuple[Array | Number, ...]
    names: tuple[str, ...]
    axes: tuple[tuple[str, ...], ...]
    keys: tuple


def describe(x: Any, name: str) -> Array | Number:
    """The kind of a number or an array of `aux`.

    Raises:
        TypeError: neither of both, or of a dtype that kernels do not read.
        ValueError: an array with too many axes.
    """
    if isinstance(x, np.complexfloating) or (isinstance(x, Complex) and not isinstance(x, Real)):
        raise TypeError(f"{name} must be an array or a real number, got {x!r}, a complex one")
    if isinstance(x, np.generic | Real):
        if math.isfinite(x) and abs(x) > _MAX_FLOAT32:
            raise ValueError(f"{name} must fit into float32, got {x}")
        if not isinstance(x, Integral | np.bool_):
            return _F32
        if not -(2**31) <= int(x) < 2**31:
            raise ValueError(f"{name} must fit into 32 bits, got {x}")
        return _I32
    if hasattr(x, "shape") and hasattr(x, "strides") and hasattr(x, "dtype"):
        return _array(str(x.dtype), tuple(x.shape), tuple(x.strides), name)
    raise TypeError(f"{name} must be an array or a number, got {type(x).__name__}")


_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_I32, _F32 = Number("i32"), Number("f32")


@lru_cache(1024)
def _array(dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], name: str) -> Array:
    try:
        unit = bool(shape) and (shape[-1] == 1 or strides[-1] == 1)
        return Array(dtype, len(shape), unit)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def _broadcast_axes(array: Any, name: str) -> tuple[str, ...]:
    """What the axes of a bias or a mask are indexed by: "0" where all places share an element."""
    rank = len(array.shape)
    if rank > len(_PLACES):
        raise ValueError(
            f"{name} must broadcast to (batch, heads, seqlen_q, seqlen_k), got {rank} axes"
        )
    letters = "bhij"[len(_PLACES) - rank :]
    sizes = zip(letters, array.shape, array.strides, strict=True)
    # An empty axis has no element that all places could share.
    return tuple("0" if n == 1 or (n and step == 0) else letter for letter, n, step in sizes)


def _trace(asked: _Asked, functions: tuple, shapes: tuple) -> tuple[Program, bool]:
    """The program, and whether it depends on the sizes of arrays."""
    score_mod, mask_mod, score_mod_grad = functions
    score, keep = LEAF["s"], const(True)
    for k, (name, axes) in enumerate(zip(asked.names, asked.axes, strict=False)):
        indices = [const(0) if by == "0" else LEAF[by] for by in axes]
        element = load(k, asked.described[k].type, indices)
        if name == "bias":
            if element.type != "f":
                raise TypeError(f"bias must be of a float type, got {asked.described[k].dtype}")
            score = apply("add", score, element)
        else:
            if element.type != "b":
                raise TypeError(f"mask must be of bool, got {asked.described[k].dtype}")
            keep = element
    runs = _Runs(asked, shapes, score_mod is not None and mask_mod is not None)
    slope = None
    if score_mod is not None:
        before = score
        branching = score_mod_grad is not None
        score = runs.call("score_mod", score_mod, (before, *_PLACES), "f", branching)
        if branching:
            slope = runs.call("score_mod_grad", score_mod_grad, (before, *_PLACES), "f", True)
    elif score_mod_grad is not None:
        raise TypeError("score_mod_grad is the derivative of score_mod, which is not given")
    if mask_mod is not None:
        keep = apply("and", keep, runs.call("mask_mod", mask_mod, _PLACES, "b", True))
    if runs.are_two and not runs.took_aux and len(asked.described) > len(asked.axes):
        raise TypeError("aux is given, and neither score_mod nor mask_mod takes any of it")
    return Program(asked.described, score, keep, slope), runs.looked_at_shapes


class _Runs:
    """Calls of functions with symbols."""

    def __init__(self, asked: _Asked, shapes: tuple, are_two: bool):
        self.asked, self.shapes, self.are_two = asked, shapes, are_two
        self.looked_at_shapes = self.took_aux = False

    def _takes(self, role: str, function: Callable, places: int) -> tuple:
        """What a function gets of `described` beside its names and shapes: (k, name, ...)."""
        own = len(self.asked.axes)
        of_all = zip(self.asked.names, self.asked.described, self.shapes, strict=True)
        aux = list(enumerate(of_all))[own:]
        aux = aux[: aux_taken(function, places, len(aux), self.are_two)]
        _check_parameters(role, function, places, len(aux))
        self.took_aux |= bool(aux)
        return tuple((k, *rest) for k, rest in aux)

    def call(
        self, role: str, function: Callable, nodes: tuple[Node, ...], type: str, branching: bool
    ) -> Node:
        """What a function returns, as a node of a type."""
        if not callable(function):
            raise TypeError(f"{role} must be a function, got {builtins.type(function).__name__}")
        aux = self._takes(role, function, len(nodes))
        if not branching:
            return self._once(role, function, nodes, aux, type, Trace())

        def once(path: Path) -> Node:
            return self._once(role, function, nodes, aux, type, Trace(path))

        return along_all_paths(once, _named(role, function))

    def _once(self, role, function, nodes, aux, type: str, trace: Trace) -> Node:
        given = [argument(trace, name, k, kind, shape) for k, name, kind, shape in aux]
        try:
            result = function(*(trace.symbol(node) for node in nodes), *given)
            node = _result(result, type)
        except TraceError as error:
            raise TypeError(_message(role, function, error, str(error))) from None
        except IndexError as error:
            # NumPy's own words for an array that a symbol indexes.
            if "indices" not in str(error):
                raise
            why = (
                "an array from outside of the function is indexed by a number that is known on "
                "the device only; give it in aux, and take it as an argument"
            )
            raise TypeError(_message(role, function, error, why)) from None
        self.looked_at_shapes |= trace.looked_at_shapes
        return node


def _result(result: Any, type: str) -> Node:
    if result is None:
        raise TraceError("it returns nothing; a function ends with `return`")
    node = node_of(result)
    if type == "f" and node.type == "b":
        raise TraceError(
            "it returns a truth value, where a number is wanted: which keys take part is what "
            "mask_mod says"
        )
    if type == "b" and node.type != "b":
        raise TraceError(
            "it returns a number, where a truth value is wanted, as of q_idx >= kv_idx: what "
            "changes scores is score_mod"
        )
    return to(node, type)


def _check_parameters(role: str, function: Callable, places: int, count: int) -> None:
    if not takes(function, places + count):
        first = ("score",) if places > len(_PLACE_NAMES) else ()
        wanted = ", ".join([*first, *_PLACE_NAMES, *(f"aux{k}" for k in range(count))])
        raise TypeError(
            f"{_named(role, function)} is called with ({wanted}), and takes "
            f"{inspect.signature(function)}"
        )


def _named(role: str, function: Callable) -> str:
    """The role of a function, its name, and where it is."""
    name = getattr(function, "__qualname__", None) or repr(function)
    code = getattr(function, "__code__", None)
    return f"{role} {name}" + (f" ({code.co_filename}:{code.co_firstlineno})" if code else "")


def _message(role: str, function: Callable, error: Exception, why: str) -> str:
    """What went wrong at which line of the user's: the last one that is none of numflash's."""
    place, found = error.__traceback__, None
    while place is not None:
        code = place.tb_frame.f_code
        if os.path.dirname(os.path.abspath(code.co_filename)) != _OWN:
            found = code.co_filename, place.tb_lineno
        place = place.tb_next
    name = getattr(function, "__qualname__", None) or repr(function)
    if found is None:
        code = getattr(function, "__code__", None)
        found = (code.co_filename, code.co_firstlineno) if code else None
    where, line = "", ""
    if found is not None:
        where = f" ({found[0]}:{found[1]})"
        line = linecache.getline(*found).strip()
    hint = ""
    if isinstance(error, BranchError) and role == "score_mod":
        hint = "; or give its derivative by the score, score_mod_grad=, and the `if` may stay"
    quoted = f", in `{line}`" if line else ""
    return f"{role} {name}{where}{quoted}: {why}{hint}"


__all__ = ["Symbol", "Traced", "describe", "trace"]
