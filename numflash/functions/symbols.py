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

from numflash.functions.arrays import Array, Number
from numflash.functions.named import MEANINGS, clip, meaning_of
from numflash.functions.nodes import FUNCTIONS, MAX_NODES, Node, const, load, number, to
from numflash.functions.operators import OPERATORS, operation
from numflash.functions.paths import BranchError, Path, TraceError


class Trace:
    """One call of a function with symbols.

    Attributes:
        path: the way that it takes; None if no `if` may look at symbols.
        looked_at_shapes: whether the function used the size of an array as a number.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
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
        if self.path is None:
            raise BranchError(
                "a Python `if`, `and`, `or`, `not`, `min`, `max` or chained comparison asks for "
                "the truth of a number that is known on the device only; write where(), &, | and "
                "~ instead (numflash.math.where, minimum, maximum)"
            )
        return self.path.decide(condition)


def node_of(x) -> Node:
    """The node of a symbol, or of a number as a constant.

    Raises:
        TraceError: neither of both.
    """
    if isinstance(x, AuxArray):
        raise TraceError(f"{x.name} is an array; index it, as in {x.name}[head]")
    if not isinstance(x, Symbol) and getattr(x, "shape", None) == () and hasattr(x, "item"):
        # A number of NumPy, or an array or tensor without axes, for which a front end may give a
        # symbol: it is read on the device then.
        x = x.item()
    if isinstance(x, Symbol):
        return x.node
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
        if name.startswith("_") or name not in MEANINGS:
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


for _name, _op in OPERATORS.items():
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
    return trace.symbol(operation(op, *nodes))


def called(name: str, args: tuple, keywords: dict) -> Symbol:
    """A function of NumPy or PyTorch, or a method of a tensor, by its name."""
    meaning, args = meaning_of(name, args)
    if meaning is None:
        raise TraceError(
            f"{name} is not among the functions that can be traced: "
            f"{', '.join(sorted(FUNCTIONS))}, where, minimum, maximum, abs and arithmetic"
        )
    keywords = {
        k: v for k, v in keywords.items() if v is not None and k not in ("dtype", "device")
    }
    trace = next(a.trace for a in (*args, *keywords.values()) if isinstance(a, Symbol))
    nodes = [None if a is None and meaning is clip else node_of(a) for a in args]
    by_name = {k: node_of(v) for k, v in keywords.items()}
    try:
        if isinstance(meaning, str):
            return trace.symbol(operation(meaning, *nodes, **by_name))
        return trace.symbol(meaning(*nodes, **by_name))
    except TraceError:
        raise
    except TypeError:
        given = ", ".join([*("..." for _ in args), *(f"{k}=..." for k in keywords)])
        raise TraceError(f"{name}({given}) cannot be traced with these arguments") from None


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
