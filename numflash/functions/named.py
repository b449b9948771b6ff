"""Functions of NumPy and PyTorch, and methods of tensors, by name: what they make of nodes."""

from collections.abc import Callable

from numflash.functions.nodes import FUNCTIONS, Node, const, to
from numflash.functions.operators import OPERATORS, operation


def clip(x: Node, low=None, high=None, *, min=None, max=None) -> Node:
    """A number within bounds, of which either may be None."""
    low, high = (min if low is None else low), (max if high is None else high)
    x = x if low is None else operation("max", x, low)
    return x if high is None else operation("min", x, high)


def _sign(x: Node) -> Node:
    is_negative, is_positive = operation("lt", x, const(0)), operation("lt", const(0), x)
    below = operation("where", is_negative, const(-1), const(0))
    sign = operation("where", is_positive, const(1), below)
    return to(sign, "f") if x.type == "f" else sign


def _like(value) -> Callable[..., Node]:
    return lambda x, *_, **__: const(value, x.type)


MEANINGS: dict[str, str | Callable[..., Node]] = {
    **{name: name for name in FUNCTIONS},
    **{name: op for name, op in OPERATORS.items() if name != "pow"},
    "pow": "pow",
    "power": "pow",
    "float_power": "pow",
    "subtract": "sub",
    "multiply": "mul",
    "div": "div",
    "divide": "div",
    "true_divide": "div",
    "floor_divide": "floordiv",
    "remainder": "mod",
    "minimum": "min",
    "maximum": "max",
    "fmin": "min",
    "fmax": "max",
    "negative": "neg",
    "neg": "neg",
    "abs": "abs",
    "absolute": "abs",
    "fabs": "abs",
    "logical_and": lambda a, b: operation("and", to(a, "b"), to(b, "b")),
    "logical_or": lambda a, b: operation("or", to(a, "b"), to(b, "b")),
    "logical_xor": lambda a, b: operation("xor", to(a, "b"), to(b, "b")),
    "logical_not": lambda a: operation("not", to(a, "b")),
    "bitwise_and": "and",
    "bitwise_or": "or",
    "bitwise_xor": "xor",
    "bitwise_not": "not",
    "invert": "not",
    "bitwise_left_shift": "shl",
    "bitwise_right_shift": "shr",
    "left_shift": "shl",
    "right_shift": "shr",
    "less": "lt",
    "lt": "lt",
    "less_equal": "le",
    "le": "le",
    "equal": "eq",
    "eq": "eq",
    "not_equal": "ne",
    "ne": "ne",
    "greater": lambda a, b: operation("lt", b, a),
    "gt": lambda a, b: operation("lt", b, a),
    "greater_equal": lambda a, b: operation("le", b, a),
    "ge": lambda a, b: operation("le", b, a),
    "where": lambda condition, a, b: operation("where", condition, a, b),
    "clip": clip,
    "clamp": clip,
    "square": lambda x: operation("mul", x, x),
    "reciprocal": lambda x: operation("div", const(1.0), x),
    "positive": lambda x: x,
    "sign": _sign,
    "sgn": _sign,
    "ceil": lambda x: operation("neg", operation("floor", operation("neg", x))),
    "log1p": lambda x: operation("log", operation("add", const(1.0), x)),
    "expm1": lambda x: operation("sub", operation("exp", x), const(1.0)),
    "log10": lambda x: operation("mul", operation("log2", x), const(0.30102999566398120)),
    "relu": lambda x: operation("max", x, const(0.0)),
    "silu": lambda x: operation("mul", x, operation("sigmoid", x)),
    "isnan": lambda x: operation("ne", x, x),
    "zeros_like": _like(0),
    "ones_like": _like(1),
    "full_like": lambda x, value, **_: to(value, x.type),
}
"""Name -> an operation, or what makes a node of nodes."""


def meaning_of(name: str, arguments: tuple) -> tuple[str | Callable[..., Node] | None, tuple]:
    """What a function of this name means, and its arguments in order; None if it is unknown."""
    bare = name.strip("_")
    if bare not in MEANINGS and bare.startswith("r") and bare[1:] in OPERATORS:
        # __rsub__ of an array of another library.
        return MEANINGS[bare[1:]], arguments[::-1]
    return MEANINGS.get(bare), arguments
