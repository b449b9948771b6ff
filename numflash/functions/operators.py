"""Python's operators as nodes: what they do with whole numbers, floats and truth values."""

from collections.abc import Callable

from numflash.functions.nodes import Node, apply, const
from numflash.functions.paths import TraceError

OPERATORS = {
    "add": "add",
    "sub": "sub",
    "mul": "mul",
    "truediv": "div",
    "floordiv": "floordiv",
    "mod": "mod",
    "pow": "pow",
    "and": "and",
    "or": "or",
    "xor": "xor",
    "lshift": "shl",
    "rshift": "shr",
}
"""Name of a method of Python, without underscores -> operation."""


def operation(op: str, *nodes: Node) -> Node:
    """An operation as Python means it, which may take several nodes."""
    return _MAKERS[op](*nodes) if op in _MAKERS else apply(op, *nodes)


def _floordiv(a: Node, b: Node) -> Node:
    if "f" in (a.type, b.type):
        return apply("floor", apply("div", a, b))
    return apply("floordiv", a, b)


def _mod(a: Node, b: Node) -> Node:
    if "f" in (a.type, b.type):
        return apply("sub", a, apply("mul", _floordiv(a, b), b))
    return apply("mod", a, b)


def _pow(a: Node, b: Node) -> Node:
    whole = b.op == "const" and b.type == "i" and 0 <= b.value <= 8
    if not (whole and a.type == "i"):
        return apply("pow", a, b)
    result = const(1)
    for _ in range(b.value):
        result = apply("mul", result, a)
    return result


def _bits(op: str) -> Callable:
    def make(a: Node, b: Node) -> Node:
        if "f" in (a.type, b.type):
            raise TraceError(f"`{op}` takes truth values or whole numbers, not floats")
        return apply(op, a, b)

    return make


def _not(a: Node) -> Node:
    if a.type == "f":
        raise TraceError("`~` takes a truth value or a whole number, not a float")
    return apply("not", a)


_MAKERS = {
    "floordiv": _floordiv,
    "mod": _mod,
    "pow": _pow,
    "not": _not,
    **{op: _bits(op) for op in ("and", "or", "xor", "shl", "shr")},
}
