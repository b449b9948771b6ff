"""A program: what a user's functions make of scores, and which keys they keep; and its text.

The text is canonical: programs that compute the same in another order, with other names or with
operands exchanged, have the same one. It goes wherever a kernel's key goes, and back:

    1;float32[1];score=add(mul(aux0[h],float(sub(j,i))),s);keep=le(j,i)

A version, the kinds of `aux`, then parts: `t0=`, `t1=`, ... for what is used more than once, and
the results. `parse` checks it as if it came from a stranger, and evaluates none of it.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from numflash.functions.derivative import derivative
from numflash.functions.nodes import (
    LEAF,
    LEAVES,
    PLACES,
    SIGNATURES,
    Node,
    apply,
    const,
    is_const,
    load,
    make,
    number,
    order,
)

VERSION = "1"
"""Of the text."""
MAX_NODES = 2000
"""Operations of a program; loops of a traced function are written out."""
MAX_RANK = 8
_MAX_LENGTH = 200_000
# Deeper expressions are written in parts.
_DEPTH = 12

DTYPES = {
    "float16": "f",
    "bfloat16": "f",
    "float32": "f",
    "int32": "i",
    "int64": "i",
    "uint8": "i",
    "bool": "b",
}
"""dtype of an array of `aux` -> type of its elements in a kernel; int64 is cut to 32 bits."""
NUMBERS = {"f32": "f", "i32": "i"}
"""Kind of a number of `aux` -> type."""


@dataclass(frozen=True)
class Array:
    """An array of `aux`.

    Attributes:
        dtype: a name in `DTYPES`.
        rank: its number of axes.
        unit: elements of the last axis are neighbours; else its stride is an argument.
    """

    dtype: str
    rank: int
    unit: bool = False

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise TypeError(f"arrays of aux must be of {', '.join(DTYPES)}, got {self.dtype}")
        if not 0 <= self.rank <= MAX_RANK:
            raise ValueError(f"arrays of aux have up to {MAX_RANK} axes, got {self.rank}")
        if self.unit and not self.rank:
            raise ValueError("an array without axes has no neighbours")

    @property
    def type(self) -> str:
        """Type of its elements in a kernel."""
        return DTYPES[self.dtype]

    def __str__(self):
        return f"{self.dtype}[{self.rank}{'u' if self.unit else ''}]"


@dataclass(frozen=True)
class Number:
    """A number of `aux` that may change from call to call; `kind` is "f32" or "i32"."""

    kind: str

    def __post_init__(self):
        if self.kind not in NUMBERS:
            raise TypeError(f"numbers of aux are f32 or i32, got {self.kind!r}")

    @property
    def type(self) -> str:
        """Type in a kernel."""
        return NUMBERS[self.kind]

    def __str__(self):
        return self.kind


class Partial(NamedTuple):
    """How the score changes with an element of an array that it reads.

    Attributes:
        aux: the array's place in `aux`.
        axes: for each axis what it is indexed by: "b", "h", "i" or "j", "0" for its only or first
            element, "" for what is computed.
        load: the read, a node.
        slope: derivative of the score by the element, a node.
    """

    aux: int
    axes: tuple[str, ...]
    load: Node
    slope: Node


@dataclass(frozen=True)
class Program:
    """What becomes of a score, and whether it is kept; see the module's docstring.

    Attributes:
        aux: descriptions of the arrays and numbers that it reads.
        score: the score that comes of score s; None if that is s.
        keep: whether the key takes part; None if each does.
        given_slope: the derivative of the score by s, where that is not the one found.

    Raises:
        TypeError, ValueError: `score` is no float, `keep` no truth value, or a node reads `aux`
            otherwise than it is.
    """

    aux: tuple[Array | Number, ...] = ()
    score: Node | None = None
    keep: Node | None = None
    given_slope: Node | None = None

    def __post_init__(self):
        if self.score == LEAF["s"]:
            object.__setattr__(self, "score", None)
        if self.keep is not None and is_const(self.keep, True):
            object.__setattr__(self, "keep", None)
        for (name, node), type in zip(self.results.items(), "fbf", strict=True):
            if node is not None and node.type != type:
                raise TypeError(f"{name} must be of type {type!r}, got {node.type!r}")
        if self.keep is not None and "s" in self.keep.uses:
            raise ValueError("keep must not depend on the score")
        count = 0
        for node in self.nodes:
            count += 1
            if node.op in ("load", "number"):
                _check_read(node, self.aux)
        if count > MAX_NODES:
            raise ValueError(f"a program has at most {MAX_NODES} operations, got {count}")

    @property
    def results(self) -> dict[str, Node | None]:
        """Its results by their names in the text."""
        return {"score": self.score, "keep": self.keep, "slope": self.given_slope}

    @property
    def roots(self) -> tuple[Node, ...]:
        """The results that there are."""
        return tuple(node for node in self.results.values() if node is not None)

    @property
    def nodes(self) -> Iterable[Node]:
        """All of its nodes, operands first."""
        return order(self.roots)

    @cached_property
    def uses(self) -> frozenset[str]:
        """Which of "b", "h", "i" and "j" the results depend on."""
        return frozenset().union(*(root.uses for root in self.roots)) & frozenset(PLACES)

    @cached_property
    def indexes(self) -> frozenset[str]:
        """Which of "i" and "j" arrays are indexed by as they are, so that they must exist."""
        reads = (axes_of(node) for node in self.nodes if node.op == "load")
        return frozenset(by for axes in reads for by in axes) & {"i", "j"}

    @cached_property
    def slope(self) -> Node:
        """The derivative of the score by s."""
        if self.given_slope is not None:
            return self.given_slope
        if self.score is None:
            return const(1.0)
        return derivative(self.score, LEAF["s"]) or const(0.0)

    @cached_property
    def bends(self) -> bool:
        """Whether the derivative of the score by s is not 1 everywhere."""
        return not is_const(self.slope, 1)

    @cached_property
    def partials(self) -> tuple[Partial, ...]:
        """For each read of an array that the score changes with, how it does."""
        found = []
        for node in order(() if self.score is None else (self.score,)):
            if node.op == "load" and node.type == "f":
                slope = derivative(self.score, node)
                if slope is not None:
                    found.append(Partial(node.value, axes_of(node), node, slope))
        return tuple(sorted(found, key=lambda partial: partial.aux))

    @cached_property
    def fields(self) -> tuple[tuple[str, str], ...]:
        """The leaves of a kernel's record `given`, (name, kind), in order.

        Of array k: `a{k}`, kind "pointer:DTYPE"; `a{k}_s{axis}`, "i64", its stride in elements, of
        axes that are indexed; `a{k}_n{axis}`, "i32", its size, of axes indexed by what is
        computed. Of number k: `a{k}`, "f32" or "i32". Then `row`, `column` and `first_head`,
        "i32": where the caller's numbers of queries, keys and heads begin.
        """
        strides, sizes, read = set(), set(), set()
        for node in self.nodes:
            if node.op in ("load", "number"):
                read.add(node.value)
            if node.op == "load":
                axes = axes_of(node)
                strides |= {(node.value, axis) for axis, by in enumerate(axes) if by != "0"}
                sizes |= {(node.value, axis) for axis, by in enumerate(axes) if by == ""}
        fields = []
        for k in sorted(read):
            if isinstance(self.aux[k], Number):
                fields.append((f"a{k}", self.aux[k].kind))
                continue
            fields.append((f"a{k}", f"pointer:{self.aux[k].dtype}"))
            unit = self.aux[k].rank - 1 if self.aux[k].unit else None
            fields += [(f"a{k}_s{a}", "i64") for _, a in sorted(strides) if _ == k and a != unit]
            fields += [(f"a{k}_n{a}", "i32") for _, a in sorted(sizes) if _ == k]
        if not self.roots:
            return ()
        return *fields, ("row", "i32"), ("column", "i32"), ("first_head", "i32")

    def check_shapes(
        self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], counts: dict[str, int]
    ) -> None:
        """Check that arrays have an element for each place that they are indexed by.

        Args:
            names: of `aux`, for the message.
            shapes: of the arrays, in elements; what stands for a number does not matter.
            counts: how many batch entries "b", query heads "h", queries "i" and keys "j" there
                are, and those before the caller's origin.

        Raises:
            ValueError: an array is too small, or is indexed by a computed number and has no
                element.
        """
        for node in self.nodes:
            if node.op != "load":
                continue
            name, shape = names[node.value], shapes[node.value]
            for axis, by in enumerate(axes_of(node)):
                needed = counts.get(by, 1)
                if shape[axis] < needed and 0 not in counts.values():
                    what = _AXES.get(by, "a computed number")
                    raise ValueError(
                        f"axis {axis} of {name} is indexed by {what} and must have at least "
                        f"{needed} elements, got shape {shape}"
                    )

    def with_hidden_scores(self) -> "Program":
        """The program whose scores are -inf where this one keeps no key, and which keeps all."""
        score = LEAF["s"] if self.score is None else self.score
        hidden = apply("where", self.keep, score, const(-math.inf))
        slope = self.given_slope
        if slope is not None:
            slope = apply("where", self.keep, slope, const(0.0))
        return replace(self, score=hidden, keep=None, given_slope=slope)

    @cached_property
    def text(self) -> str:
        """The canonical text; "" if the program does nothing."""
        if not self.roots:
            return ""
        return _written(self)

    def also(self, other: "Program") -> "Program":
        """The program that keeps a key where both do; of the other only `keep` is taken.

        The other's arrays and numbers come behind those of this one.
        """
        if other.keep is None:
            return self
        moved: dict[Node, Node] = {}
        for node in order((other.keep,)):
            operands = [moved[each] for each in node.args]
            if node.op == "load":
                moved[node] = load(node.value + len(self.aux), node.type, operands)
            elif node.op == "number":
                moved[node] = number(node.value + len(self.aux), node.type)
            else:
                moved[node] = apply(node.op, *operands) if operands else node
        keep = moved[other.keep]
        if self.keep is not None:
            keep = apply("and", self.keep, keep)
        return Program(self.aux + other.aux, self.score, keep, self.given_slope)

    @classmethod
    def parse(cls, text: str) -> "Program":
        """The program with this text.

        Raises:
            ValueError: no program has this text.
        """
        return _parsed(text)


_AXES = {
    "b": "the batch entry",
    "h": "the query head",
    "i": "the query's number",
    "j": "the key's number",
    "0": "0",
}


def axes_of(node: Node) -> tuple[str, ...]:
    """What each axis of a read is indexed by, as in `Partial`."""
    return tuple(
        index.op if index.op in PLACES else "0" if is_const(index, 0) else ""
        for index in node.args
    )


def _check_read(node: Node, aux: tuple) -> None:
    k = node.value
    if not 0 <= k < len(aux):
        raise ValueError(f"the program reads aux{k} of {len(aux)}")
    given = aux[k]
    wanted = Number if node.op == "number" else Array
    if not isinstance(given, wanted) or given.type != node.type:
        raise ValueError(f"the program reads aux{k}, {given}, as a {wanted.__name__.lower()}")
    if node.op == "load" and len(node.args) != given.rank:
        raise ValueError(f"aux{k}, {given}, is read with {len(node.args)} indices")
    for index in node.args:
        if index.op == "const" and index.value < 0:
            raise ValueError(f"an index of aux{k} must not be negative, got {index.value}")


def _written(program: Program) -> str:
    nodes, used = list(program.nodes), Counter(program.roots)
    for node in nodes:
        used.update(node.args)
    texts: dict[Node, str] = {}
    depths: dict[Node, int] = {}
    parts = []
    for node in nodes:
        depth = 1 + max((depths[a] for a in node.args), default=-1)
        operands = ",".join(texts[a] for a in node.args)
        if node.op == "load":
            text = f"aux{node.value}[{operands}]"
        elif node.op in SIGNATURES:
            text = f"{node.op}({operands})"
        else:
            text, depth = _leaf_text(node), 0
        is_atom = node.op not in SIGNATURES and node.op != "load"
        if not is_atom and (used[node] > 1 or depth >= _DEPTH):
            parts.append(f"t{len(parts)}={text}")
            text, depth = f"t{len(parts) - 1}", 0
        texts[node], depths[node] = text, depth
    for name, root in program.results.items():
        if root is not None:
            parts.append(f"{name}={texts[root]}")
    return ";".join([VERSION, ",".join(map(str, program.aux)), *parts])


def _leaf_text(node: Node) -> str:
    if node.op == "number":
        return f"aux{node.value}"
    if node.op != "const":
        return node.op
    if node.type == "b":
        return "true" if node.value else "false"
    if node.type == "i":
        return str(node.value)
    return str(np.float32(node.value))  # inf, -inf or nan, if it is not finite


_KIND = re.compile(r"(?:(f32|i32)|([a-z0-9]{1,10})\[(\d)(u?)\])", re.ASCII)
_TOKEN = re.compile(
    r"(-?\d+\.\d+(?:e[+-]?\d+)?|-?\d+e[+-]?\d+|-?inf|nan)|(-?\d+)|aux(\d+)|([a-z]\w*)|([(),\[\]])",
    re.ASCII,
)


@lru_cache(256)
def _parsed(text: str) -> Program:
    if text == "":
        return Program()
    if len(text) > _MAX_LENGTH:
        raise ValueError(f"the text of a program has up to {_MAX_LENGTH} characters")
    version, *rest = text.split(";")
    if version != VERSION or len(rest) < 2:
        raise ValueError(f"a program must begin like {VERSION};float32[1];..., got {text[:40]!r}")
    kinds = [_kind(kind) for kind in rest[0].split(",")] if rest[0] else []
    reader, results = _Reader(tuple(kinds)), {}
    for part in rest[1:]:
        name, equals, expression = part.partition("=")
        if not equals or name in results or (name == "slope" and "given_slope" in results):
            raise ValueError(f"a part of a program must be a name and an expression, got {part!r}")
        node = reader.read(expression)
        if name in ("score", "keep"):
            results[name] = node
        elif name == "slope":
            results["given_slope"] = node
        elif name == f"t{len(reader.parts)}":
            reader.parts[name] = node
        else:
            raise ValueError(f"{name!r} is no name of a part of a program")
    try:
        program = Program(reader.aux, **results)
    except TypeError as error:
        raise ValueError(str(error)) from None
    if program.text != text:
        raise ValueError(f"the text of a program must be canonical: {program.text[:200]!r}")
    return program


def _kind(text: str) -> Array | Number:
    match = _KIND.fullmatch(text)
    try:
        if match is None:
            raise TypeError("no such kind")
        return Number(match[1]) if match[1] else Array(match[2], int(match[3]), bool(match[4]))
    except TypeError:
        raise ValueError(f"{text[:40]!r} is no kind of an array or number of aux") from None


class _Reader:
    """Reads expressions: node by node, of known operations on operands of the right types."""

    def __init__(self, aux: tuple):
        self.aux, self.parts, self.count = aux, {}, 0

    def read(self, text: str) -> Node:
        """The node of a whole expression."""
        self.tokens, self.text, at = [], text, 0
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                raise self._wrong()
            self.tokens.append(match)
            at = match.end()
        self.tokens.reverse()
        node = self._expression(0)
        if self.tokens:
            raise self._wrong()
        return node

    def _wrong(self) -> ValueError:
        return ValueError(f"{self.text[:80]!r} is no expression of a program")

    def _expression(self, depth: int) -> Node:
        self.count += 1
        if not self.tokens or depth > _DEPTH or self.count > 4 * MAX_NODES:
            raise self._wrong()
        real, whole, k, name, _ = (token := self.tokens.pop()).groups()
        if real is not None:
            return const(float(real), "f")
        if whole is not None:
            return const(int(whole), "i")
        if k is not None:
            return self._of_aux(int(k), depth)
        if name in ("true", "false"):
            return const(name == "true")
        if name in LEAVES:
            return LEAF[name]
        if name in self.parts:
            return self.parts[name]
        if name in SIGNATURES and self._next("("):
            return make(name, *self._operands(")", depth))
        raise ValueError(f"{token[0]!r} is no operation or operand of a program")

    def _of_aux(self, k: int, depth: int) -> Node:
        if k >= len(self.aux):
            raise ValueError(f"the program reads aux{k} of {len(self.aux)}")
        type = self.aux[k].type
        return load(k, type, self._operands("]", depth)) if self._next("[") else number(k, type)

    def _next(self, text: str) -> bool:
        if self.tokens and self.tokens[-1][0] == text:
            self.tokens.pop()
            return True
        return False

    def _operands(self, end: str, depth: int) -> list[Node]:
        operands = []
        if self._next(end):
            return operands
        while True:
            operands.append(self._expression(depth + 1))
            if self._next(end):
                return operands
            if not self._next(","):
                raise self._wrong()
