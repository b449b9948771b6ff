"""Sums in fixed point, which `backward_scatter` makes, become floats; and arrays of zeros.

A thread has an element of the array.
"""

import math

from numflash.configs import ClearSumsConfig, RoundSumsConfig, Traits
from numflash.kernels.arguments import Pointer
from numflash.kernels.kernel import Kernel
from numflash.ptx import cuda, f32, i64, mov_ctaid_x
from numflash.tiles.fixed_point import is_finite_sum, scale_of_sum
from numflash.tiles.portable.elements import ELEMENTS


def make_clear_sums_kernel(config: ClearSumsConfig, traits: Traits) -> Kernel:
    """The kernel that writes zeros of dtype `traits.dtype`."""
    num_threads, storage = config.num_threads, ELEMENTS[traits.dtype].storage

    def clear_sums(
        array_gradient: Pointer(storage),  # (elements,)
        elements: i64,
    ):
        element = i64(mov_ctaid_x()) * num_threads + cuda.threadIdx.x
        if element < elements:
            array_gradient[element] = storage(0)

    return Kernel(config.family, clear_sums, num_threads, 0)


def make_round_sums_kernel(config: RoundSumsConfig, traits: Traits) -> Kernel:
    """The kernel that makes floats of dtype `traits.dtype`.

    Where something that was added up is infinite or no number, all sums become NaN: which of
    them it went into is not known.
    """
    num_threads, result = config.num_threads, ELEMENTS[traits.dtype]
    from_f32, nan = result.from_f32, f32(math.nan)

    def round_sums(
        fixed_sums: Pointer(i64),  # (elements,)
        absolute_sum: Pointer(f32),  # (1,)
        array_gradient: Pointer(result.storage),  # (elements,)
        elements: i64,
    ):
        element = i64(mov_ctaid_x()) * num_threads + cuda.threadIdx.x
        if element < elements:
            _, unit = scale_of_sum(absolute_sum[0])
            total = f32(fixed_sums[element]) * unit
            total = total if is_finite_sum(absolute_sum[0]) else nan
            array_gradient[element] = from_f32(total)

    return Kernel(config.family, round_sums, num_threads, 0)
