"""Functions for `score_mod` and `mask_mod`: `numflash.math`.

Of arrays and numbers they are NumPy's, without its warnings; of the numbers that a function gets
when it is traced they become a kernel's instructions.
"""

import numpy as np

from numflash.functions.nodes import FUNCTIONS
from numflash.functions.symbols import Symbol, call

__all__ = [
    "abs",
    "cos",
    "exp",
    "exp2",
    "floor",
    "log",
    "log2",
    "maximum",
    "minimum",
    "rsqrt",
    "sigmoid",
    "sin",
    "sqrt",
    "tanh",
    "where",
]


def _called(op: str, numpy_function, *args):
    if any(isinstance(x, Symbol) for x in args):
        return call(op, *args)
    with np.errstate(all="ignore"):
        return numpy_function(*args)


def where(condition, x, y):
    """`x` where the condition is true, else `y`.

    Example:
        >>> import numpy as np, numflash
        >>> numflash.math.where(np.array([True, False]), 1.0, 2.0).tolist()
        [1.0, 2.0]
    """
    return _called("where", np.where, condition, x, y)


def minimum(x, y):
    """The smaller of two numbers; its derivative is that of `x` where both are equal.

    Example:
        >>> import numflash
        >>> float(numflash.math.minimum(2.0, 3.0))
        2.0
    """
    return _called("min", np.minimum, x, y)


def maximum(x, y):
    """The larger of two numbers; its derivative is that of `x` where both are equal.

    Example:
        >>> import numflash
        >>> float(numflash.math.maximum(2.0, 3.0))
        3.0
    """
    return _called("max", np.maximum, x, y)


def exp(x):
    """E to the power of x.

    Example:
        >>> import numflash
        >>> float(numflash.math.exp(0.0))
        1.0
    """
    return _called("exp", np.exp, x)


def exp2(x):
    """2 to the power of x: one instruction.

    Example:
        >>> import numflash
        >>> float(numflash.math.exp2(-1.0))
        0.5
    """
    return _called("exp2", np.exp2, x)


def log(x):
    """The natural logarithm: -inf of 0, NaN of what is less.

    Example:
        >>> import numflash
        >>> float(numflash.math.log(0.0))
        -inf
    """
    return _called("log", np.log, x)


def log2(x):
    """The logarithm to base 2: one instruction.

    Example:
        >>> import numflash
        >>> float(numflash.math.log2(8.0))
        3.0
    """
    return _called("log2", np.log2, x)


def sqrt(x):
    """The square root.

    Example:
        >>> import numflash
        >>> float(numflash.math.sqrt(9.0))
        3.0
    """
    return _called("sqrt", np.sqrt, x)


def rsqrt(x):
    """1 / the square root: one instruction.

    Example:
        >>> import numflash
        >>> float(numflash.math.rsqrt(4.0))
        0.5
    """
    return _called("rsqrt", FUNCTIONS["rsqrt"], x)


def tanh(x):
    """The hyperbolic tangent.

    Example:
        >>> import numflash
        >>> float(numflash.math.tanh(0.0))
        0.0
    """
    return _called("tanh", np.tanh, x)


def sigmoid(x):
    """1 / (1 + exp(-x)).

    Example:
        >>> import numflash
        >>> float(numflash.math.sigmoid(0.0))
        0.5
    """
    return _called("sigmoid", FUNCTIONS["sigmoid"], x)


def sin(x):
    """The sine of an angle in radians; angles far from 0 lose digits in a kernel.

    Example:
        >>> import numflash
        >>> float(numflash.math.sin(0.0))
        0.0
    """
    return _called("sin", np.sin, x)


def cos(x):
    """The cosine of an angle in radians; angles far from 0 lose digits in a kernel.

    Example:
        >>> import numflash
        >>> float(numflash.math.cos(0.0))
        1.0
    """
    return _called("cos", np.cos, x)


def floor(x):
    """The largest whole number that is at most x; its derivative is 0.

    Example:
        >>> import numflash
        >>> float(numflash.math.floor(-1.5))
        -2.0
    """
    return _called("floor", np.floor, x)


def abs(x):
    """The absolute value, as Python's `abs`.

    Example:
        >>> import numflash
        >>> float(numflash.math.abs(-2.0))
        2.0
    """
    return _called("abs", np.abs, x)
