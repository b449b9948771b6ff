"""A program: what a user's functions make of scores, and which keys they keep.

Its text (`functions.text`) stands for it in a kernel's key, in caches and between processes.
"""

import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from numflash.functions.arrays import PAIR_BYTES, Array, Number
from numflash.functions.derivative import derivative
from numflash.functions.nodes import (
    LEAF,
    MAX_NODES,
    PLACES,
    Node,
    apply,
    const,
    is_const,
    load,
    number,
    order,
)
from numflash.functions.text import RESULTS, read, written


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
    def neighbours(self) -> frozenset[Node]:
        """The reads that give, for neighbouring keys, neighbouring elements of a row."""
        return frozenset(
            node
            for node in self.nodes
            if node.op == "load"
            and (array := self.aux[node.value]).unit
            and array.dtype in PAIR_BYTES
            and node.args[-1].op == "j"
            and not any(index.uses & {"s", "j"} for index in node.args[:-1])
        )

    @cached_property
    def pairs(self) -> frozenset[Node]:
        """The `neighbours` that can be read at once, from an even key on."""
        return frozenset(node for node in self.neighbours if self.aux[node.value].paired)

    def with_pairs(self, arrays: Container[int]) -> "Program":
        """The program that reads neighbours of these arrays of `aux` at once, where it can."""
        paired = {node.value for node in self.neighbours if node.value in arrays}
        aux = tuple(
            replace(each, paired=k in paired) if isinstance(each, Array) else each
            for k, each in enumerate(self.aux)
        )
        return self if aux == self.aux else replace(self, aux=aux)

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

    def indexed_axes(self, k: int) -> tuple[int, ...]:
        """The axes of array k along which more than the first element may be read, in order."""
        reads = (axes_of(node) for node in self.nodes if node.op == "load" and node.value == k)
        return tuple(sorted({a for axes in reads for a, by in enumerate(axes) if by != "0"}))

    @cached_property
    def fields(self) -> tuple[tuple[str, str], ...]:
        """The leaves of a kernel's record `given`, (name, kind), in order.

        Of array k: `a{k}`, kind "pointer:DTYPE"; `a{k}_s{axis}`, "i64", its stride in elements, of
        axes that are indexed; `a{k}_n{axis}`, "i32", its size, of axes indexed by what is
        computed. Of number k: `a{k}`, "f32" or "i32". Then `row`, `column` and `first_head`,
        "i32": where the caller's numbers of queries, keys and heads begin.
        """
        sizes, read = set(), set()
        for node in self.nodes:
            if node.op in ("load", "number"):
                read.add(node.value)
            if node.op == "load":
                axes = axes_of(node)
                sizes |= {(node.value, axis) for axis, by in enumerate(axes) if by == ""}
        fields = []
        for k in sorted(read):
            if isinstance(self.aux[k], Number):
                fields.append((f"a{k}", self.aux[k].kind))
                continue
            fields.append((f"a{k}", f"pointer:{self.aux[k].dtype}"))
            unit = self.aux[k].rank - 1 if self.aux[k].unit else None
            fields += [(f"a{k}_s{a}", "i64") for a in self.indexed_axes(k) if a != unit]
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
        return written(self.aux, self.results)

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


@lru_cache(256)
def _parsed(text: str) -> Program:
    if text == "":
        return Program()
    aux, results = read(text)
    try:
        program = Program(aux, *map(results.get, RESULTS))
    except TypeError as error:
        raise ValueError(str(error)) from None
    if program.text != text:
        raise ValueError(f"the text of a program must be canonical: {program.text[:200]!r}")
    return program
