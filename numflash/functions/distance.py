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

_MOST = 2.0**23
"""Whole numbers below it can be added to a distance."""
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
            # Products may leave the whole numbers that floats hold.
            if node.op in ("abs", "min", "max"):
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
            return self._compared(node.op, *(self._of(x) for x in node.args))
        if any(a.type == "i" for a in node.args):
            raise _PlaceError  # a read at a place
        args = tuple(self.new[a] for a in node.args)
        return make(node.op, *args)

    def _compared(self, op: str, a: _Linear, b: _Linear) -> Node:
        """Whole numbers compared: a distance with a number, whose rounding changes nothing."""
        i, j = a.i - b.i, a.j - b.j
        if i and is_const(a.rest, 0):
            return apply(op, _sum(i, j, const(0.0)), b.rest)
        if i and is_const(b.rest, 0):
            return apply(op, _sum(i, j, const(0.0)), apply("neg", a.rest))
        if not (is_const(a.rest) and is_const(b.rest)):
            raise _PlaceError  # numbers that are known later may be too large for a float
        return apply(op, _sum(i, j, a.rest), b.rest)


def _combined(op: str, *x):
    """The operation on numbers, or on nodes."""
    return apply(op, *x) if isinstance(x[0], Node) else _OF_NUMBERS[op](*x)


_OF_NUMBERS = {"add": operator.add, "sub": operator.sub, "neg": operator.neg}


def _sum(i: int, j: int, rest: Node) -> Node:
    if i != -j or abs(i) > 1:
        raise _PlaceError
    if i and not (is_const(rest) and abs(rest.value) < _MOST):
        raise _PlaceError  # the sum may be too large for a float to hold
    return apply("add", apply("mul", DISTANCE, const(float(i))), rest) if i else rest
