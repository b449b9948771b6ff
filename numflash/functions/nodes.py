"""Expressions of scores, numbers and places: what a traced function is made of.

A node is an operation on other nodes, and immutable. Equal nodes have equal keys: hashes of what
they compute, in which operands that commute are sorted. Types are "f" (float32), "i" (int32) and
"b" (a truth value).

    s                  the score, float32
    b, h, i, j         batch entry, query head, query and key, int32, at least 0
    const              a number
    number             a number of `aux`, known when a kernel runs: `value` is its place there
    load               an element of an array of `aux`, at the indices that are its operands

`make` makes a node as it is. `apply` is for whoever computes: it brings operands to one type,
folds constants, and drops what changes nothing.
"""

import math
from collections.abc import Iterable, Iterator
from hashlib import blake2b

import numpy as np

MAX_NODES = 2000
"""Operations of a program; loops of a traced function are written out."""

PLACES = ("b", "h", "i", "j")
LEAVES = {"s": "f", "b": "i", "h": "i", "i": "i", "j": "i"}
"""Name of an argument of a program's functions -> type."""

FUNCTIONS = {
    "exp": np.exp,
    "exp2": np.exp2,
    "log": np.log,
    "log2": np.log2,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "sin": np.sin,
    "cos": np.cos,
    "floor": np.floor,
}
"""Functions of one float -> their meaning in NumPy."""

_SAME = {"ff": "f", "ii": "i"}
_TRUTH = {"ff": "b", "ii": "b"}
_BITS = {"bb": "b", "ii": "i"}
SIGNATURES = {
    "add": _SAME,
    "sub": _SAME,
    "mul": _SAME,
    "min": _SAME,
    "max": _SAME,
    "neg": {"f": "f", "i": "i"},
    "abs": {"f": "f", "i": "i"},
    "div": {"ff": "f"},
    "pow": {"ff": "f"},
    "floordiv": {"ii": "i"},
    "mod": {"ii": "i"},
    "shl": {"ii": "i"},
    "shr": {"ii": "i"},
    "and": _BITS,
    "or": _BITS,
    "xor": _BITS,
    "not": {"b": "b", "i": "i"},
    "lt": _TRUTH,
    "le": _TRUTH,
    "eq": _TRUTH,
    "ne": _TRUTH,
    "where": {"bff": "f", "bii": "i", "bbb": "b"},
    "float": {"i": "f"},
    "int": {"f": "i"},
    **{name: {"f": "f"} for name in FUNCTIONS},
}
"""Operation -> types of the operands -> type of the result."""

# Not min and max, whose derivative is that of the first where both are equal.
COMMUTE = frozenset({"add", "mul", "and", "or", "xor", "eq", "ne"})

_MEANING = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "abs": np.abs,
    "div": np.divide,
    "pow": np.power,
    "floordiv": np.floor_divide,
    "mod": np.mod,
    "shl": np.left_shift,
    "shr": np.right_shift,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "lt": np.less,
    "le": np.less_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "float": np.float64,
    "int": np.int64,
    **FUNCTIONS,
}
_WIDE = {"f": np.float64, "i": np.int64, "b": np.bool_}
_INT_MIN, _INT_MAX = -(2**31), 2**31 - 1
# A power with a constant exponent up to this is a product.
_LARGEST_PRODUCT = 8


class Node:
    """An expression; see the module's docstring.

    Attributes:
        op, type: operation or leaf, and the type of its value.
        args: operands, nodes.
        value: of a constant the number; of a number or a load the place in `aux`.
        key: hash of its meaning.
        uses: names of the leaves in `LEAVES` that it depends on.
    """

    __slots__ = ("args", "key", "op", "type", "uses", "value")

    def __init__(self, op: str, type: str, args: tuple["Node", ...] = (), value=None):
        self.op, self.type, self.args, self.value = op, type, args, value
        content = f"{op}:{type}:{value!r}".encode()
        self.key = blake2b(b"".join([content, *(a.key for a in args)]), digest_size=16).digest()
        self.uses = frozenset({op}) if op in LEAVES else frozenset().union(*(a.uses for a in args))

    def __eq__(self, other):
        return isinstance(other, Node) and self.key == other.key

    def __hash__(self):
        return hash(self.key)

    def __repr__(self):
        inner = ", ".join(map(repr, self.args))
        value = "" if self.value is None else f" {self.value}"
        return f"{self.op}{value}({inner})" if self.args else f"{self.op}{value}"


LEAF = {name: Node(name, type) for name, type in LEAVES.items()}
"""Name -> leaf."""


def make(op: str, *args: Node) -> Node:
    """The operation on these operands as it is. Raises ValueError for types that do not fit."""
    types = "".join(a.type for a in args)
    result = SIGNATURES.get(op, {}).get(types)
    if result is None:
        raise ValueError(f"{op!r} is no operation on operands of types {types!r}")
    if op in COMMUTE:
        args = tuple(sorted(args, key=_rank))
    return Node(op, result, tuple(args))


def _rank(node: Node):
    return node.op == "const", node.key


def const(value, type: str | None = None) -> Node:
    """A constant: of a bool, an int or a float the type that belongs to it, unless it is given.

    Raises:
        ValueError: an integer that is no int32.
    """
    if type is None:
        type = "b" if isinstance(value, bool) else "i" if isinstance(value, int) else "f"
    if type == "f":
        with np.errstate(over="ignore"):
            return Node("const", "f", (), float(np.float32(value)))
    if type == "b":
        return Node("const", "b", (), bool(value))
    if not _INT_MIN <= value <= _INT_MAX:
        raise ValueError(f"integers of kernels have 32 bits, got {value}")
    return Node("const", "i", (), int(value))


def number(k: int, type: str) -> Node:
    """The number aux[k], of type "f" or "i"."""
    return Node("number", type, (), k)


def load(k: int, type: str, indices: Iterable[Node]) -> Node:
    """The element of aux[k] at these indices, of type "i"; one for each axis."""
    indices = tuple(indices)
    if any(index.type != "i" for index in indices):
        raise ValueError("an index of an array must be an integer")
    return Node("load", type, indices, k)


def order(roots: Iterable[Node]) -> Iterator[Node]:
    """The nodes that these depend on, and themselves, operands first, each once."""
    seen, stack = set(), [(root, False) for root in reversed(list(roots))]
    while stack:
        node, done = stack.pop()
        if done:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(a, False) for a in reversed(node.args) if a not in seen]


def is_const(node: Node, value=None) -> bool:
    """Whether a node is a constant, and has this value if one is given."""
    return node.op == "const" and (value is None or node.value == value)


def to(node: Node, type: str) -> Node:
    """The value as another type: floats are cut off, numbers are true unless 0."""
    if node.type == type:
        return node
    if type == "b":
        return apply("ne", node, const(0, node.type))
    if node.type == "b":
        return apply("where", node, const(1, type), const(0, type))
    if type == "i" and node.op == "float":
        return node.args[0]
    if node.op == "where" and all(a.op in ("const", "where") for a in node.args[1:]):
        return apply("where", node.args[0], *(to(a, type) for a in node.args[1:]))
    return apply("float" if type == "f" else "int", node)


def apply(op: str, *args: Node) -> Node:
    """The operation, its operands brought to the types that it takes, and simplified."""
    args = _unified(op, args)
    if (folded := _folded(op, args)) is not None:
        return folded
    if (simpler := _SIMPLER[op](*args) if op in _SIMPLER else None) is not None:
        return simpler
    return make(op, *args)


def _unified(op: str, args: tuple[Node, ...]) -> tuple[Node, ...]:
    types = {a.type for a in args}
    if op == "where":
        first, *rest = args
        joined = next(t for t in "fib" if t in {a.type for a in rest})
        return to(first, "b"), *(to(a, joined) for a in rest)
    if op == "int" or "ff" in SIGNATURES[op] or op in FUNCTIONS or op in ("neg", "abs"):
        takes_i = "ii" in SIGNATURES[op] or "i" in SIGNATURES[op]
        joined = "i" if takes_i and "f" not in types else "f"
    elif op == "float":
        joined = "i"
    else:
        joined = "b" if types == {"b"} and SIGNATURES[op].get("bb", op == "not") else "i"
    return tuple(to(a, joined) for a in args)


def _folded(op: str, args: tuple[Node, ...]) -> Node | None:
    """The result of an operation on constants; None if an operand is none, or it has no result."""
    if op not in _MEANING or not all(map(is_const, args)):
        return None
    result = SIGNATURES[op]["".join(a.type for a in args)]
    values = [_WIDE[a.type](a.value) for a in args]
    if op == "int" and not math.isfinite(args[0].value):
        return None
    if op in ("floordiv", "mod") and not args[1].value:
        return None
    if op in ("shl", "shr") and not 0 <= args[1].value < 32:
        return None
    with np.errstate(all="ignore"):
        value = _MEANING[op](*values).item()
    if result == "i" and not _INT_MIN <= value <= _INT_MAX:
        return None
    return const(value, result)


def _add(a, b):
    if is_const(a, 0):
        return b
    if is_const(b, 0):
        return a
    if b.op == "neg":
        return apply("sub", a, b.args[0])
    return apply("sub", b, a.args[0]) if a.op == "neg" else None


def _sub(a, b):
    if is_const(b, 0):
        return a
    if is_const(a, 0):
        return apply("neg", b)
    if b.op == "neg":
        return apply("add", a, b.args[0])
    return const(0, "i") if a == b and a.type == "i" else None


def _mul(a, b):
    for x, y in ((a, b), (b, a)):
        if is_const(y, 1):
            return x
        if is_const(y, -1):
            return apply("neg", x)
        if is_const(y, 0) and x.type == "i":
            return y
    return None


def _neg(a):
    return a.args[0] if a.op == "neg" else None


def _abs(a):
    return a if a.op == "abs" else apply("abs", a.args[0]) if a.op == "neg" else None


def _div(a, b):
    if is_const(b) and has_reciprocal(b.value):
        return apply("mul", a, const(1 / b.value, "f"))
    return None


def _floor(a):
    """Of a whole number over a whole number the whole division: a product might round across."""
    return None if (parts := _quotient(a)) is None else to(apply("floordiv", *parts), "f")


def _int(a):
    parts = _quotient(a)
    if parts is None:
        return None
    x, y = parts
    below = apply("neg", apply("floordiv", apply("neg", x), y))
    return apply("where", apply("lt", x, const(0, "i")), below, apply("floordiv", x, y))


def _quotient(a):
    """The whole numbers (x, y) of a float that is x / y, or x times 1 / y; None of another."""
    if a.op == "mul":
        for x, y in (a.args, a.args[::-1]):
            if x.op == "float" and is_const(y) and y.value and math.isfinite(y.value):
                whole = round(1 / y.value)
                if 0 < whole < 2**24 and float(np.float32(1 / whole)) == y.value:
                    return x.args[0], const(whole, "i")
    return None


def has_reciprocal(value: float) -> bool:
    """Whether 1 / value is a normal float32, so that a product is as good as a division."""
    return 2.0**-126 <= abs(value) <= 2.0**126


def _pow(a, b):
    if not is_const(b):
        if is_const(a) and 0 < a.value < math.inf:
            return apply("exp2", apply("mul", b, const(math.log2(a.value), "f")))
        return None
    whole, exponent = math.floor(abs(b.value)) if math.isfinite(b.value) else -1, abs(b.value)
    # Of a root the derivative at 0 is infinite; that of a power above 1 is not.
    if not 0 <= whole <= _LARGEST_PRODUCT or (exponent != whole and exponent != 0.5):
        return None
    if b.value == -0.5:
        return apply("rsqrt", a)
    result = const(1, "f") if exponent == whole else apply("sqrt", a)
    square, left = a, whole
    while left:
        if left & 1:
            result = apply("mul", result, square)
        left >>= 1
        square = apply("mul", square, square) if left else square
    return result if b.value >= 0 else apply("div", const(1, "f"), result)


def _same_or_none(a, b):
    return a if a == b else None


def _and(a, b):
    if a.type == "b":
        for x, y in ((a, b), (b, a)):
            if is_const(y):
                return x if y.value else y
    return _same_or_none(a, b)


def _or(a, b):
    if a.type == "b":
        for x, y in ((a, b), (b, a)):
            if is_const(y):
                return y if y.value else x
    return _same_or_none(a, b)


def _xor(a, b):
    if a.type == "b":
        for x, y in ((a, b), (b, a)):
            if is_const(y):
                return apply("not", x) if y.value else x
    return None


def _not(a):
    if a.op == "not":
        return a.args[0]
    if a.op in ("eq", "ne"):
        return make("ne" if a.op == "eq" else "eq", *a.args)
    if a.op in ("lt", "le") and a.args[0].type == "i":  # a NaN is not below, nor above
        return make("le" if a.op == "lt" else "lt", *reversed(a.args))
    return None


def _where(c, a, b):
    if a == b:
        return a
    if is_const(c):
        return a if c.value else b
    if c.op == "not":
        return apply("where", c.args[0], b, a)
    if c.op == "lt" and c.args[0].type == "i":  # one way to write both
        return apply("where", make("le", *reversed(c.args)), b, a)
    if a.type == "b" and is_const(b):
        return apply("or", apply("not", c), a) if b.value else apply("and", c, a)
    if a.type == "b" and is_const(a):
        return apply("or", c, b) if a.value else apply("and", apply("not", c), b)
    return None


def _compared(equal: bool):
    def simpler(a, b):
        return const(equal) if a == b and a.type == "i" else None

    return simpler


_SIMPLER = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "neg": _neg,
    "abs": _abs,
    "div": _div,
    "pow": _pow,
    "floor": _floor,
    "int": _int,
    "min": _same_or_none,
    "max": _same_or_none,
    "and": _and,
    "or": _or,
    "xor": _xor,
    "not": _not,
    "where": _where,
    "lt": _compared(False),
    "le": _compared(True),
    "eq": _compared(True),
    "ne": _compared(False),
}
