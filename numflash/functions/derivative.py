"""Derivatives of expressions, found by following them from the operands to the result.

A selection selects between derivatives: where a side is not taken its derivative, which may be
infinite, does not count. Of two equal numbers minimum and maximum take the first. Floors,
integers and truth values do not change with what they depend on.
"""

import math

from numflash.functions.nodes import Node, apply, const, order

_ZERO, _ONE = const(0.0), const(1.0)


def derivative(root: Node, by: Node) -> Node | None:
    """d root / d by, where `by` is a leaf or a load; None if it is 0 everywhere."""
    if root.type != "f":
        return None
    found: dict[Node, Node | None] = {}
    for node in order([root]):
        if node == by:
            found[node] = _ONE
        elif node.type != "f" or node.op not in _RULES:
            found[node] = None
        else:
            slopes = [found[a] for a in node.args]
            touched = any(slope is not None for slope in slopes)
            found[node] = _RULES[node.op](node, *slopes) if touched else None
    return found[root]


def _times(slope, factor):
    return None if slope is None else apply("mul", slope, factor)


def _plus(x, y):
    if x is None or y is None:
        return x if y is None else y
    return apply("add", x, y)


def _minus(x):
    return None if x is None else apply("neg", x)


def _selected(condition, x, y):
    return apply("where", condition, _ZERO if x is None else x, _ZERO if y is None else y)


def _add(node, x, y):
    return _plus(x, y)


def _sub(node, x, y):
    return _plus(x, _minus(y))


def _mul(node, x, y):
    a, b = node.args
    if a == b:
        return _times(x, apply("mul", a, const(2.0)))
    return _plus(_times(x, b), _times(y, a))


def _div(node, x, y):
    _, b = node.args
    upper = None if x is None else apply("div", x, b)
    lower = None if y is None else apply("div", apply("mul", y, node), b)
    return _plus(upper, _minus(lower))


def _pow(node, x, y):
    a, b = node.args
    base = _times(x, apply("mul", b, apply("pow", a, apply("sub", b, _ONE))))
    return _plus(base, _times(y, apply("mul", node, apply("log", a))))


def _where(node, condition, x, y):
    return _selected(node.args[0], x, y)


def _min(node, x, y):
    a, b = node.args
    return _selected(apply("le", a, b), x, y)


def _max(node, x, y):
    a, b = node.args
    return _selected(apply("le", b, a), x, y)


def _abs(node, x):
    return _selected(apply("lt", node.args[0], _ZERO), _minus(x), x)


def _rsqrt(node, x):
    cube = apply("mul", node, apply("mul", node, node))
    return _times(x, apply("mul", cube, const(-0.5)))


_RULES = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "pow": _pow,
    "where": _where,
    "min": _min,
    "max": _max,
    "abs": _abs,
    "neg": lambda node, x: _minus(x),
    "exp": lambda node, x: _times(x, node),
    "exp2": lambda node, x: _times(x, apply("mul", node, const(math.log(2)))),
    "log": lambda node, x: apply("div", x, node.args[0]),
    "log2": lambda node, x: apply("div", _times(x, const(1 / math.log(2))), node.args[0]),
    "sqrt": lambda node, x: apply("div", _times(x, const(0.5)), node),
    "rsqrt": _rsqrt,
    "tanh": lambda node, x: _times(x, apply("sub", _ONE, apply("mul", node, node))),
    "sigmoid": lambda node, x: _times(x, apply("mul", node, apply("sub", _ONE, node))),
    "sin": lambda node, x: _times(x, apply("cos", node.args[0])),
    "cos": lambda node, x: _minus(_times(x, apply("sin", node.args[0]))),
}
