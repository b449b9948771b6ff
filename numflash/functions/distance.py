"""Expressions that look at places only through their distance, in float32.

Kernels know the distance i - j of a score as one float and a constant; from i and j themselves it
would be converted for each score. Whole numbers below 2 ** 24 are exact as floats.
"""

import operator
from typing import NamedTuple

from numflash.functions.nodes import Node, apply, const, is_const, make, order

DISTANCE = Node("d", "f")
"""The leaf i - j, float32."""
DISTANCE.uses = frozenset("ij")

_COMPARISONS = frozenset({"lt", "le", "eq", "ne"})


class _Linear(NamedTuple):
    """The whole number i * `i` + j * `j` + `rest`, where `rest` is a float node."""

    i: int
    j: int
    rest: Node


def by_distance(root: Node) -> Node | None:
    """The node with `DISTANCE` for i and j, which it otherwise does not use; None if it cannot."""
    if not root.uses & frozenset("ij"):
        return root
    try:
        return _Rewriting(root).new[root]
    except _PlaceError:
        return None


class _PlaceError(Exception):
    """Something depends on a place itself."""


class _Rewriting:
    """Nodes in the distance, operands first.

    Attributes:
        new: float node or truth value -> the same in the distance.
        linear: whole number -> it, as a `_Linear`.
    """

    def __init__(self, root: Node):
        self.new: dict[Node, Node] = {}
        self.linear: dict[Node, _Linear] = {}
        for node in order([root]):
            if node.type == "i":
                found = self._whole(node)
                if found is not None:
                    self.linear[node] = found
            else:
                self.new[node] = self._other(node)

    def _whole(self, node: Node) -> _Linear | None:
        """None if it cannot be told; that matters only where it is used."""
        if not node.uses & frozenset("ij"):
            return _Linear(0, 0, apply("float", node))
        if node.op in ("i", "j"):
            return _Linear(int(node.op == "i"), int(node.op == "j"), const(0.0))
        try:
            if node.op in ("add", "sub", "neg"):
                parts = [self._of(a) for a in node.args]
                return _Linear(*(_combined(node.op, *x) for x in zip(*parts, strict=True)))
            if node.op == "mul" and any(is_const(a) for a in node.args):
                factor, x = sorted(node.args, key=lambda a: not is_const(a))
                i, j, rest = self._of(x)
                scaled = apply("mul", rest, const(float(factor.value)))
                return _Linear(i * factor.value, j * factor.value, scaled)
            if node.op in ("mul", "abs", "min", "max"):
                args = [self._float(a) for a in node.args]
                return _Linear(0, 0, apply(node.op, *args))
            if node.op == "where":
                condition, *sides = node.args
                args = [self._float(a) for a in sides]
                return _Linear(0, 0, apply("where", self.new[condition], *args))
        except _PlaceError:
            pass
        return None

    def _of(self, node: Node) -> _Linear:
        if node not in self.linear:
            raise _PlaceError
        return self.linear[node]

    def _float(self, node: Node) -> Node:
        """A whole number as a float of the distance."""
        return _sum(*self._of(node))

    def _other(self, node: Node) -> Node:
        if not node.uses & frozenset("ij"):
            return node
        if node.op == "float":
            return self._float(node.args[0])
        if node.op in _COMPARISONS and node.args[0].type == "i":
            a, b = (self._of(x) for x in node.args)
            return apply(node.op, _sum(a.i - b.i, a.j - b.j, a.rest), b.rest)
        if any(a.type == "i" for a in node.args):
            raise _PlaceError  # a read at a place
        args = tuple(self.new[a] for a in node.args)
        return make(node.op, *args)


def _combined(op: str, *x):
    """The operation on numbers, or on nodes."""
    return apply(op, *x) if isinstance(x[0], Node) else _OF_NUMBERS[op](*x)


_OF_NUMBERS = {"add": operator.add, "sub": operator.sub, "neg": operator.neg}


def _sum(i: int, j: int, rest: Node) -> Node:
    if i != -j:
        raise _PlaceError
    return apply("add", apply("mul", DISTANCE, const(float(i))), rest) if i else rest
