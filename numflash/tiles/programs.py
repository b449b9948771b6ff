"""Programs as device functions: the source that `functions.emission` makes of their text.

The functions that it calls are instructions, and what is made of them here: as exact as a short
sequence of instructions is, without subroutines, which would keep loops over scores from being
unrolled. The simulator runs the same source.
"""

import math
from functools import cache
from typing import NamedTuple

from numflash.functions.emission import source_of
from numflash.functions.program import Program
from numflash.ptx import (
    bits_as_float,
    cos_approx_ftz_f32,
    cvt_f32_f16,
    cvt_rmi_f32_f32,
    cvt_rzi_s32_f32,
    device_function,
    div_full_ftz_f32,
    div_u32,
    ex2_approx_ftz_f32,
    f32,
    fma_rn_f32,
    i32,
    i64,
    ld_global_pair_b16,
    ld_global_pair_b32,
    ld_global_pair_b64,
    lg2_approx_ftz_f32,
    max_f32,
    min_f32,
    rsqrt_approx_ftz_f32,
    sin_approx_ftz_f32,
    sqrt_approx_ftz_f32,
    u16,
    u32,
    u64,
)

_LOG2_E, _LN_2 = f32(math.log2(math.e)), f32(math.log(2))


@device_function
def _from_bf16(bits):
    return bits_as_float(u32(bits) << 16)


@device_function
def _first_float16(pair):
    return cvt_f32_f16(u16(pair & u32(0xFFFF)))


@device_function
def _second_float16(pair):
    return cvt_f32_f16(u16(pair >> u32(16)))


@device_function
def _first_bfloat16(pair):
    return bits_as_float(u32(pair << u32(16)))


@device_function
def _second_bfloat16(pair):
    return bits_as_float(u32(pair & u32(0xFFFF0000)))


@device_function
def _first_bits(pair):
    return u32(pair & u64(0xFFFFFFFF))


@device_function
def _second_bits(pair):
    return u32(pair >> u64(32))


@device_function
def _first_float32(pair):
    return bits_as_float(_first_bits(pair))


@device_function
def _second_float32(pair):
    return bits_as_float(_second_bits(pair))


@device_function
def _first_int32(pair):
    return i32(_first_bits(pair))


@device_function
def _second_int32(pair):
    return i32(_second_bits(pair))


@device_function
def _first_uint8(pair):
    return i32(pair & u16(0xFF))


@device_function
def _second_uint8(pair):
    return i32(pair >> u16(8))


@device_function
def _first_bool(pair):
    return _first_uint8(pair) != 0


@device_function
def _second_bool(pair):
    return _second_uint8(pair) != 0


@device_function
def _exp(x):
    return ex2_approx_ftz_f32(x * _LOG2_E)


@device_function
def _log(x):
    return lg2_approx_ftz_f32(x) * _LN_2


@device_function
def _tanh(x):
    return f32(math.tanh(x))


@device_function
def _sigmoid(x):
    return div_full_ftz_f32(f32(1), f32(1) + ex2_approx_ftz_f32(x * -_LOG2_E))


@device_function
def _power(x, y):
    """X to the y, as NumPy has it: of a negative x only whole y have a result."""
    size = ex2_approx_ftz_f32(y * lg2_approx_ftz_f32(abs(x)))
    half = y * f32(0.5)
    odd = cvt_rmi_f32_f32(half) != half
    signed = -size if odd else size
    whole = cvt_rmi_f32_f32(y) == y
    negative = signed if whole else f32(math.nan)
    result = negative if x < f32(0) else size
    return f32(1) if y == f32(0) else result


@device_function
def _floordiv_counts(x, y):
    """X // y of an x from 0 on and a constant y above 0."""
    return i32(u32(x) // u32(y))


@device_function
def _mod_counts(x, y):
    return i32(u32(x) % u32(y))


@device_function
def _floordiv_by_count(x, y):
    """X // y for a constant y above 0: of -1 - x, which is at least 0, where x is negative."""
    sign = i32(x >> 31)
    return i32(i32(u32(i32(x ^ sign)) // u32(y)) ^ sign)


@device_function
def _mod_by_count(x, y):
    return i32(x - _floordiv_by_count(x, y) * y)


@device_function
def _floordiv_i32(x, y):
    """X // y; 0 where y is 0."""
    divisor = u32(i32(abs(y))) if y != 0 else u32(1)
    dividend = i32(-x) if y < 0 else x
    sign = i32(dividend >> 31)
    quotient = i32(i32(div_u32(u32(i32(dividend ^ sign)), divisor)) ^ sign)
    return quotient if y != 0 else i32(0)


@device_function
def _mod_i32(x, y):
    """X % y, of y's sign; 0 where y is 0."""
    rest = i32(x - _floordiv_i32(x, y) * y)
    return rest if y != 0 else i32(0)


_NAMES = {
    "INF": f32(math.inf),
    "NEG_INF": f32(-math.inf),
    "NAN": f32(math.nan),
    "cvt_f32_f16": cvt_f32_f16,
    "div": div_full_ftz_f32,
    "exp": _exp,
    "exp2": ex2_approx_ftz_f32,
    "f32": f32,
    "first_bfloat16": _first_bfloat16,
    "first_bool": _first_bool,
    "first_float16": _first_float16,
    "first_float32": _first_float32,
    "first_int32": _first_int32,
    "first_uint8": _first_uint8,
    "floor": cvt_rmi_f32_f32,
    "floordiv_by_count": _floordiv_by_count,
    "floordiv_counts": _floordiv_counts,
    "floordiv_i32": _floordiv_i32,
    "fma_rn_f32": fma_rn_f32,
    "from_bf16": _from_bf16,
    "i32": i32,
    "i64": i64,
    "ld_global_pair_b16": ld_global_pair_b16,
    "ld_global_pair_b32": ld_global_pair_b32,
    "ld_global_pair_b64": ld_global_pair_b64,
    "log": _log,
    "log2": lg2_approx_ftz_f32,
    "max_f32": max_f32,
    "min_f32": min_f32,
    "mod_by_count": _mod_by_count,
    "mod_counts": _mod_counts,
    "mod_i32": _mod_i32,
    "power": _power,
    "rsqrt": rsqrt_approx_ftz_f32,
    "second_bfloat16": _second_bfloat16,
    "second_bool": _second_bool,
    "second_float16": _second_float16,
    "second_float32": _second_float32,
    "second_int32": _second_int32,
    "second_uint8": _second_uint8,
    "sigmoid": _sigmoid,
    "sin": sin_approx_ftz_f32,
    "cos": cos_approx_ftz_f32,
    "sqrt": sqrt_approx_ftz_f32,
    "tanh": _tanh,
    "to_i32": cvt_rzi_s32_f32,
}
"""All that the source of a program may name, besides Python's abs, min and max."""


class Functions(NamedTuple):
    """The device functions of a program; `given` is a record of `Program.fields`.

    Numbers of batch entries, heads, queries and keys are the caller's, int32 from 0 on, and inside
    the arrays that they index.

    Attributes:
        known_of_head: (given, b, h) -> known, what is the same for all scores of a head.
        score: (s, i, j, known) -> (the new score, its derivative by s).
        keep: (i, j, known) -> whether the key takes part.
        partials: for each of `Program.partials` (partial, offset): partial(s, i, j, known) is the
            derivative of the new score by the element that is read, and offset(s, i, j, known)
            where that lies in its array, in elements. Empty if they were not asked for.
        score_of_pair: (s, right, scale, i, key, step, j, j_right, left, known) -> (the new score
            and its derivative for one key, both for the next), of the scores s scale and
            right scale; None where the score reads nothing by pairs. j and j_right are these keys,
            inside of the arrays; pairs are read from key + step on, an even number, as far as
            `left` keys are left there.
        keep_of_pair: (i, key, step, j, j_right, left, known) -> (whether one key, whether the
            next takes part); or None.
        score_by_distance, keep_by_distance: as `score` and `keep`, with float32 places i and j of
            which only i - j counts, as for the features of `tiles.features`; None for a program
            that looks at a place itself, or reads by it.
    """

    known_of_head: object
    score: object
    keep: object
    partials: tuple = ()
    score_of_pair: object = None
    keep_of_pair: object = None
    score_by_distance: object = None
    keep_by_distance: object = None


@cache
def make_program(text: str, with_partials: bool = False) -> Functions:
    """The device functions of the program with this text; of "" those that change nothing."""
    program = Program.parse(text)
    source = source_of(program, with_partials)
    scope = dict(_NAMES)
    exec(compile(source, f"<program {text[:80]}>", "exec"), scope)
    found = {
        name: device_function(function)
        for name, function in scope.items()
        if name not in _NAMES and name != "__builtins__"
    }
    count = len(program.partials) if with_partials else 0
    partials = tuple((found[f"partial_{n}"], found[f"offset_{n}"]) for n in range(count))
    own = {name: found[name] for name in Functions._fields if name in found}
    return Functions(**own, partials=partials)
