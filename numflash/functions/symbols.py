"""Symbols: what a user's function is called with to be traced.

A symbol stands for a number and records what is done with it. The operators of Python, the methods
that functions call on tensors, and the functions of `numflash.math`, NumPy and PyTorch all lead to
`call`, so that a function gives the same nodes however it is written. Neither library is imported
for it: they ask a symbol by `__array_ufunc__`, `__array_function__` and `__torch_function__`.
"""

import operator
from collections.abc import Callable
from numbers import Integral, Real
from typing import NoReturn

from numflash.functions.nodes import FUNCTIONS, Node, apply, const, load, number, to
from numflash.functions.program import MAX_NODES, Array, Number

MAX_PATHS = 64
"""Ways through a function whose Python `if` looks at symbols."""


class TraceError(TypeError):
    """A function does what symbols cannot record; the message says what, and what to write."""


class BranchError(TraceError):
    """A Python `if` asks for the truth of a symbol."""


class Trace:
    """One call of a function with symbols.

    Attributes:
        decisions: truth values for `if`, in the order in which they are asked for; None if no
            `if` may ask. What is asked for beyond them is true, and appended.
        asked: the conditions of the decisions.
        looked_at_shapes: whether the function used the size of an array as a number.
    """

    def __init__(self, decisions: list[bool] | None = None):
        self.decisions, self.asked = decisions, []
        self.looked_at_shapes = False
        self._count = 0

    def symbol(self, node: Node) -> "Symbol":
        """A symbol with this value."""
        self._count += 1
        if self._count > MAX_NODES:
            raise TraceError(
                f"it does more than {MAX_NODES} operations; loops are written out when a function "
                "is traced"
            )
        return Symbol(self, node)

    def decide(self, condition: Node) -> bool:
        """The truth value for a Python `if`."""
        if condition.op == "const":
            return bool(condition.value)
        if self.decisions is None:
            raise BranchError(
                "a Python `if`, `and`, `or`, `not`, `min`, `max` or chained comparison asks for "
                "the truth of a number that is known on the device only; write where(), &, | and "
                "~ instead (numflash.math.where, minimum, maximum)"
            )
        if condition in self.asked:
            return self.decisions[self.asked.index(condition)]
        if len(self.asked) == MAX_PATHS:
            raise TraceError(
                f"a loop or an `if` asks more than {MAX_PATHS} times for what is known on the "
                "device only; write where(), or a loop over a constant number of steps"
            )
        self.asked.append(condition)
        if len(self.asked) > len(self.decisions):
            self.decisions.append(True)
        return self.decisions[len(self.asked) - 1]


def node_of(x) -> Node:
    """The node of a symbol, or of a number as a constant.

    Raises:
        TraceError: neither of both.
    """
    if isinstance(x, Symbol):
        return x.node
    if isinstance(x, AuxArray):
        raise TraceError(f"{x.name} is an array; index it, as in {x.name}[head]")
    if getattr(x, "shape", None) == () and hasattr(x, "item"):
        x = x.item()  # a number of NumPy, or an array or tensor without axes
    if isinstance(x, bool | int | float):
        return _constant(x)
    if isinstance(x, Integral):
        return _constant(int(x))
    if isinstance(x, Real):
        return _constant(float(x))
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        raise TraceError(_NO_ARRAYS.format(_described(x)))
    raise TraceError(f"a {type(x).__name__} is no number: {x!r:.60}")


_NO_ARRAYS = "{} comes from outside of the function; give it in aux, and take it as an argument"


def _described(array) -> str:
    return f"an array of shape {tuple(array.shape)}"


def _constant(value) -> Node:
    try:
        return const(value)
    except ValueError as error:
        raise TraceError(str(error)) from None


class Symbol:
    """A number that is known on the device only; it records what is done with it."""

    __array_priority__ = 1000
    __hash__ = None
    # What functions ask of tensors.
    ndim, shape, device = 0, (), "cuda"

    def __init__(self, trace: Trace, node: Node):
        self.trace, self.node = trace, node

    @property
    def dtype(self) -> str:
        """Its type, as a name that `to` takes."""
        return {"f": "float32", "i": "int32", "b": "bool"}[self.node.type]

    def __repr__(self):
        return f"<symbol of {self.dtype}>"

    def __bool__(self):
        return self.trace.decide(to(self.node, "b"))

    def _no_value(self, *_) -> NoReturn:
        raise TraceError(
            "Python's own functions need a number, which is known on the device only; use those "
            "of numflash.math, and to make it whole .int()"
        )

    __int__ = __float__ = __complex__ = __round__ = item = tolist = _no_value

    def __index__(self) -> NoReturn:
        raise TraceError(
            "a list or an array from outside of the function is indexed by a number that is known "
            "on the device only; give it in aux as an array, and take it as an argument"
        )

    def __iter__(self) -> NoReturn:
        raise TraceError("a number has no elements")

    __len__ = __iter__

    def __getitem__(self, index) -> NoReturn:
        raise TraceError(f"a number has no elements, so that [{index!r:.60}] finds none")

    def __neg__(self):
        return call("neg", self)

    def __pos__(self):
        return self

    def __abs__(self):
        return call("abs", self)

    def __invert__(self):
        return call("not", self)

    def __divmod__(self, other):
        return self // other, self % other

    def __floor__(self):
        return call("floor", self).int()

    def __ceil__(self):
        return -(-self).__floor__()

    def __trunc__(self):
        return self.int()

    def to(self, *args, dtype=None, **_):
        """The value as another type; devices and copies mean nothing here."""
        for wanted in (dtype, *args):
            type = _type_named(wanted)
            if type is not None:
                return self._as(type)
        return self

    def _as(self, type: str) -> "Symbol":
        return self.trace.symbol(to(self.node, type))

    type = astype = type_as = to

    def float(self):
        """The value as float32; so do `half`, `bfloat16` and `double`."""
        return self._as("f")

    half = bfloat16 = double = float

    def int(self):
        """The value as int32, cut off towards 0; so does `long`."""
        return self._as("i")

    long = int

    def bool(self):
        """Whether the value is not 0."""
        return self._as("b")

    def clone(self, **_):
        """The value."""
        return self

    detach = contiguous = cuda = clone

    def new_ones(self, *_, **__):
        """A true constant, as functions for masks make them."""
        return self.trace.symbol(const(True))

    def new_zeros(self, *_, **__):
        """A false constant, as functions for masks make them."""
        return self.trace.symbol(const(False))

    def masked_fill(self, mask, value):
        """`value` where the mask is true."""
        return call("where", mask, value, self)

    def where(self, condition, other):
        """`other` where the condition is false."""
        return call("where", condition, self, other)

    def __getattr__(self, name: str):
        # The other methods of tensors are the functions of the same names.
        if name.startswith("_") or not knows(name):
            raise AttributeError(
                f"a number that is known on the device only has no attribute {name!r}"
            )
        return lambda *args, **keywords: called(name, (self, *args), keywords)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return called(function.__name__, args, kwargs or {})

    def __array_ufunc__(self, ufunc, method, *args, **kwargs):
        if method != "__call__":
            raise TraceError(f"numpy.{ufunc.__name__}.{method} needs arrays")
        return called(ufunc.__name__, args, kwargs)

    def __array_function__(self, function, types, args, kwargs):
        return called(function.__name__, args, kwargs)


def _operator(op: str, swapped: bool) -> Callable:
    def method(self, other):
        return call(op, other, self) if swapped else call(op, self, other)

    return method


_OPERATORS = {
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
for _name, _op in _OPERATORS.items():
    setattr(Symbol, f"__{_name}__", _operator(_op, False))
    setattr(Symbol, f"__r{_name}__", _operator(_op, True))
for _name, _op, _swapped in (
    ("lt", "lt", False),
    ("le", "le", False),
    ("gt", "lt", True),
    ("ge", "le", True),
    ("eq", "eq", False),
    ("ne", "ne", False),
):
    setattr(Symbol, f"__{_name}__", _operator(_op, _swapped))


def call(op: str, *args):
    """An operation of `nodes` on symbols and numbers, of which at least one is a symbol."""
    trace = next(a.trace for a in args if isinstance(a, Symbol))
    nodes = [node_of(a) for a in args]
    return trace.symbol(_MAKERS[op](*nodes) if op in _MAKERS else apply(op, *nodes))


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


def _clip(x, low=None, high=None, *, min=None, max=None):
    low, high = (min if low is None else low), (max if high is None else high)
    x = x if low is None else call("max", x, low)
    return x if high is None else call("min", x, high)


def _where(condition, a, b):
    return call("where", condition, a, b)


def _sign(x):
    sign = call("where", x > 0, 1, call("where", x < 0, -1, 0))
    return sign.float() if x.node.type == "f" else sign


def _like(value):
    def make(x, *_, **__):
        return x.trace.symbol(const(value, x.node.type))

    return make


def _full_like(x, value, **_):
    return x.trace.symbol(to(node_of(value), x.node.type))


# Functions of NumPy and PyTorch by their names: an operation, or what it is made of.
_NAMED: dict[str, str | Callable] = {
    **{name: name for name in FUNCTIONS},
    **{name: op for name, op in _OPERATORS.items() if name != "pow"},
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
    "logical_and": lambda a, b: call("and", _truth(a), _truth(b)),
    "logical_or": lambda a, b: call("or", _truth(a), _truth(b)),
    "logical_xor": lambda a, b: call("xor", _truth(a), _truth(b)),
    "logical_not": lambda a: call("not", _truth(a)),
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
    "greater": lambda a, b: call("lt", b, a),
    "gt": lambda a, b: call("lt", b, a),
    "greater_equal": lambda a, b: call("le", b, a),
    "ge": lambda a, b: call("le", b, a),
    "where": _where,
    "clip": _clip,
    "clamp": _clip,
    "square": lambda x: x * x,
    "reciprocal": lambda x: 1.0 / x,
    "positive": lambda x: x,
    "sign": _sign,
    "sgn": _sign,
    "ceil": lambda x: -call("floor", -x),
    "log1p": lambda x: call("log", 1.0 + x),
    "expm1": lambda x: call("exp", x) - 1.0,
    "log10": lambda x: call("log2", x) * 0.30102999566398120,
    "relu": lambda x: call("max", x, 0.0),
    "silu": lambda x: x * call("sigmoid", x),
    "isnan": lambda x: call("ne", x, x),
    "zeros_like": _like(0),
    "ones_like": _like(1),
    "full_like": _full_like,
}


def _truth(x):
    return x.bool() if isinstance(x, Symbol) else bool(x)


def knows(name: str) -> bool:
    """Whether a function of this name can be traced."""
    return name in _NAMED


def called(name: str, args: tuple, keywords: dict) -> Symbol:
    """A function of NumPy or PyTorch, or a method of a tensor, by its name."""
    bare = name.strip("_")
    if bare not in _NAMED and bare.startswith("r") and bare[1:] in _OPERATORS:
        bare, args = bare[1:], args[::-1]  # __rsub__ of an array of another library
    if bare not in _NAMED:
        raise TraceError(
            f"{name} is not among the functions that can be traced: "
            f"{', '.join(sorted(FUNCTIONS))}, where, minimum, maximum, abs and arithmetic"
        )
    meaning = _NAMED[bare]
    keywords = {
        k: v for k, v in keywords.items() if v is not None and k not in ("dtype", "device")
    }
    args = tuple(_operand(a) for a in args)
    try:
        if isinstance(meaning, str):
            return call(meaning, *args, **keywords)
        return meaning(*args, **{k: _operand(v) for k, v in keywords.items()})
    except TraceError:
        raise
    except TypeError:
        given = ", ".join([*("..." for _ in args), *(f"{k}=..." for k in keywords)])
        raise TraceError(f"{name}({given}) cannot be traced with these arguments") from None


def _operand(x):
    """An argument as it can be computed with: a symbol or a number."""
    if isinstance(x, Symbol) or x is None:
        return x
    return node_of(x).value


class AuxArray:
    """An array of `aux`, of which reads are recorded; its last axes may be left out.

    Attributes:
        name: "aux0", ..., for messages.
        k: its place in the program's `aux`.
    """

    __hash__ = None

    def __init__(self, trace: Trace, name: str, k: int, array: Array, shape, fixed=()):
        self.trace, self.name, self.k, self.array = trace, name, k, array
        self._shape, self._fixed = tuple(shape), fixed

    @property
    def ndim(self) -> int:
        """Axes that are not indexed yet."""
        return len(self._shape)

    def dim(self) -> int:
        """As `ndim`."""
        return self.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of these; the program is another one for other sizes."""
        self.trace.looked_at_shapes = True
        return self._shape

    def size(self, axis=None):
        """The shape, or the size of an axis."""
        return self.shape if axis is None else self.shape[operator.index(axis)]

    @property
    def dtype(self) -> str:
        """The type of the elements when they were read, as a name."""
        return {"f": "float32", "i": "int32", "b": "bool"}[self.array.type]

    device = "cuda"

    def __len__(self):
        return self.shape[0]

    def __iter__(self) -> NoReturn:
        raise TraceError(f"{self.name} is an array, whose elements are read by their indices")

    def __bool__(self) -> NoReturn:
        raise TraceError(f"{self.name} is an array, which is neither true nor false")

    def __getitem__(self, indices):
        indices = indices if isinstance(indices, tuple) else (indices,)
        if len(indices) > self.ndim:
            raise TraceError(f"{self.name}, of shape {self._shape}, got {len(indices)} indices")
        nodes = [self._index(axis, index) for axis, index in enumerate(indices)]
        rest, fixed = self._shape[len(nodes) :], (*self._fixed, *nodes)
        if rest:
            return AuxArray(self.trace, self.name, self.k, self.array, rest, fixed)
        return self.trace.symbol(load(self.k, self.array.type, fixed))

    def _index(self, axis: int, index) -> Node:
        if index is None or index is ... or isinstance(index, slice | list):
            raise TraceError(f"{self.name}[{index}]: an index must be a whole number")
        node = node_of(index)
        if node.type == "f":
            raise TraceError(
                f"index {axis} of {self.name} is a float; .int() and floor division make it whole"
            )
        if node.op == "const" and node.value < 0:
            raise TraceError(f"index {axis} of {self.name} must be at least 0, got {node.value}")
        return to(node, "i")

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise TraceError(f"{self.name} is an array, of which only elements can be read")


def argument(trace: Trace, name: str, k: int, described: Array | Number, shape):
    """What a function gets for aux[k] of a program."""
    if isinstance(described, Number):
        return trace.symbol(number(k, described.type))
    if described.rank == 0:
        return trace.symbol(load(k, described.type, ()))
    return AuxArray(trace, name, k, described, shape)


def _type_named(wanted) -> str | None:
    """The type that a dtype means, of any library; None if it is none, as a device is."""
    if isinstance(wanted, Symbol | AuxArray):
        return wanted.node.type if isinstance(wanted, Symbol) else wanted.array.type
    text = getattr(wanted, "__name__", None) or str(wanted)
    for word, type in (("bool", "b"), ("int", "i"), ("long", "i"), ("float", "f"), ("half", "f")):
        if word in text.lower():
            return type
    return None
