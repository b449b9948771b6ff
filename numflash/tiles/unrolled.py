"""Loops over registers, written out whatever their length.

The compiler may leave a loop with a long body, or one within another, as it is; and an array that
a loop's variable indexes lies in local memory.
"""

from collections.abc import Callable
from functools import cache

from numflash.ptx import device_function


@cache
def make_unrolled(body: Callable, count: int, *steps: int) -> Callable:
    """loop(first, *rest), loop(first, v, *rest) or loop(first, v, w, *rest), by number of steps.

    It calls body(first + i, *rest) `count` times, in this order; with one step
    body(first + i, v[step * i : step * (i + 1)], *rest), with two also with a part of w. Halves of
    a loop are the same function: it takes few to compile.
    """
    if count == 1:
        return body
    half = count // 2
    begin, end = make_unrolled(body, half, *steps), make_unrolled(body, count - half, *steps)
    if not steps:

        @device_function
        def loop_over_none(first, *rest):
            begin(first, *rest)
            end(first + half, *rest)

        return loop_over_none
    middle = half * steps[0]
    if len(steps) == 1:

        @device_function
        def loop(first, v, *rest):
            begin(first, v[:middle], *rest)
            end(first + half, v[middle:], *rest)

        return loop
    other_middle = half * steps[1]

    @device_function
    def loop_over_both(first, v, w, *rest):
        begin(first, v[:middle], w[:other_middle], *rest)
        end(first + half, v[middle:], w[other_middle:], *rest)

    return loop_over_both
