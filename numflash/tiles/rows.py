"""The end of a row: from the sum of its exponentials to its weight and its log-sum-exp.

The only place where rows end in a way of their own:

    a row that sees no key      has output 0 and lse -inf
    features that end rows      join something to the sum (`tiles.features`): sinks
    features that weigh P       have a factor of all weights that are kept: dropout
    a part of split keys        is a row by itself; `shared.combine` ends the whole row, and
                                features join it there, once
    the only part of a row      ends as if `shared.combine` ended it, where sequences have lengths
                                of their own: its bits do not depend on whether keys are split
"""

import math
from functools import cache

from numflash.ptx import device_function, f32, fma_rn_f32, max_f32
from numflash.tiles.features import make_finish, make_weigh
from numflash.tiles.portable.softmax import exp_f32
from numflash.tiles.scores import NEG_INF

NATURAL = f32(1)
# The lowest float32 that is a number.
LOWEST = f32(-(2 - 2**-23) * 2.0**127)


@cache
def make_end_of_row(features, unit, is_part=False):
    """(end_of_row, lse_of_row): two functions, as the second is one lane's work.

        end_of_row(row_max, row_sum, records, batch, head) -> (factor, row_max, row_sum)
        lse_of_row(row_max, row_sum) -> the natural log-sum-exp

    `row_sum` is the sum of exponentials relative to row_max, which counts in units of `unit`:
    `NATURAL`, or the natural logarithm of 2 where exponentials are powers of two. O must be
    multiplied by the factor. `records` is the record `Features` of the kernel's arguments.
    """
    features = () if is_part else features
    (finish, ends), (_, _, weighs) = make_finish(features), make_weigh(features)
    unit_before, unit_after = (unit, NATURAL) if ends else (NATURAL, unit)

    @device_function
    def end_of_row(row_max, row_sum, records, batch, head):
        top, total, kept = finish(row_max * unit_before, row_sum, records, batch, head)
        factor = kept / total if total != f32(0) else f32(0)
        if weighs:
            factor *= records.dropout.scale
        return factor, top, total

    @device_function
    def lse_of_row(row_max, row_sum):
        if row_sum == f32(0):
            return NEG_INF
        return fma_rn_f32(row_max, unit_after, f32(math.log(row_sum)))

    return end_of_row, lse_of_row


def ends_in_two_steps(traits) -> bool:
    """Whether features would give a row other bits if it ended in one step, without parts."""
    features = traits.features
    return traits.ragged and (make_finish(features)[1] or make_weigh(features)[2])


@cache
def make_end_of_only_part(features, unit):
    """(end_of_only_part, lse_of_row), as `make_end_of_row`, of a row that is not split.

        end_of_only_part(row_max, row_sum, records, batch, head)
            -> (first factor, second factor, row_max, row_sum)

    It does what `shared.combine` does to a single part. O must be multiplied by the first factor,
    and then by the second.
    """
    end_of_part, lse_of_part = make_end_of_row(features, unit, is_part=True)
    end_of_row, lse_of_row = make_end_of_row(features, NATURAL)

    @device_function
    def end_of_only_part(row_max, row_sum, records, batch, head):
        first, top, total = end_of_part(row_max, row_sum, records, batch, head)
        lse = lse_of_part(top, total)
        largest = max_f32(LOWEST, lse)
        whole = exp_f32(lse - largest)
        second, top, total = end_of_row(largest, whole, records, batch, head)
        return first, second, top, total

    return end_of_only_part, lse_of_row
