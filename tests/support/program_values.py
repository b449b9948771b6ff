"""Programs as NumPy computes them in float64, node by node; and what traces take of arrays."""

from types import SimpleNamespace

import numpy as np

from numflash.functions.arrays import Number
from numflash.functions.nodes import Node, order

_BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "pow": np.power,
    "min": np.minimum,
    "max": np.maximum,
    "floordiv": np.floor_divide,
    "mod": np.mod,
    "shl": np.left_shift,
    "shr": np.right_shift,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "lt": np.less,
    "le": np.less_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "where": np.where,
    "neg": np.negative,
    "abs": np.abs,
    "not": np.invert,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "float": lambda x: x.astype(np.float64),
    "int": lambda x: np.clip(np.nan_to_num(np.trunc(x)), -(2**31), 2**31 - 1).astype(np.int64),
}


def value(root: Node, leaves: dict, aux: tuple):
    """The value of a node; `leaves` has arrays for s, b, h, i and j."""
    found: dict[Node, np.ndarray] = {}
    with np.errstate(all="ignore"):
        for node in order([root]):
            args = [found[a] for a in node.args]
            if node.op in leaves:
                result = leaves[node.op]
            elif node.op == "const":
                result = node.value
            elif node.op == "number":
                result = aux[node.value]
            elif node.op == "load":
                result = element(aux[node.value], args)
            else:
                result = _BINARY.get(node.op, getattr(np, node.op, None))(*args)
            wide = {"f": np.float64, "i": np.int64, "b": np.bool_}[node.type]
            found[node] = np.asarray(result).astype(wide)
    return found[root]


def element(array: np.ndarray, indices: list):
    """Elements at indices, which are brought inside the array."""
    inside = (np.clip(i, 0, n - 1) for i, n in zip(indices, array.shape, strict=True))
    return array[tuple(inside)]


def metadata(x):
    """What a trace takes of an array; a number as it is."""
    if not isinstance(x, np.ndarray):
        return x
    strides = tuple(step // x.itemsize for step in x.strides)
    return SimpleNamespace(dtype=x.dtype.name, shape=x.shape, strides=strides)


def in_float64(aux: tuple) -> tuple:
    """Arrays and numbers for a user's function in float64."""
    floats = ("float16", "bfloat16", "float32")
    return tuple(
        x.astype(np.float64)
        if isinstance(x, np.ndarray) and x.dtype.name in floats
        else x.astype(np.int64)
        if isinstance(x, np.ndarray) and x.dtype != np.bool_
        else x
        for x in aux
    )


def is_number(description) -> bool:
    """Whether a description of aux is that of a number."""
    return isinstance(description, Number)
