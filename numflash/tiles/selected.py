"""Which heads a kernel computes where two kernels share a call: some in 8 bits, others in 16."""

from numflash.ptx import device_function
from numflash.tiles.blocks import number_of_head_kv


@device_function
def _all_heads(in_fp8, place, shape):
    return True


@device_function
def _heads_in_8_bits(in_fp8, place, shape):
    return in_fp8[number_of_head_kv(place.batch, place.head_kv, shape)] != 0


@device_function
def _heads_in_16_bits(in_fp8, place, shape):
    return in_fp8[number_of_head_kv(place.batch, place.head_kv, shape)] == 0


def make_is_computed(traits):
    """is_computed(in_fp8, place, shape): whether the head of a `Place` is this kernel's.

    Where traits are `selected`, `in_fp8` says which of two kernels a key-value head is for.
    """
    if not traits.selected:
        return _all_heads
    return _heads_in_8_bits if traits.fp8 else _heads_in_16_bits
