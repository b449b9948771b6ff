"""P of one warpgroup for another, through shared memory, by its registers: [step][thread][4].

A thread takes what the thread of the same number in the other warpgroup has left, so that nothing
is rearranged. P goes in the 16 bits in which it is multiplied by dO; P times the slope of its
score, where scores have slopes, is rounded nowhere else and goes in 32. With dropout it is P of
all scores, and behind it come the bits that say which are kept (`tiles.wgmma.gradients`).
"""

from functools import cache

from numflash.ptx import (
    cuda,
    device_function,
    i32,
    ld_shared_u32,
    ld_shared_v4_f32,
    ld_shared_v4_u32,
    mov_tid_x,
    st_shared_u32,
    st_shared_v4_f32,
    st_shared_v4_u32,
    u16,
    u32,
)
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.unrolled import make_unrolled
from numflash.tiles.wgmma.gradients import words_of_kept
from numflash.tiles.wgmma.turns import WARPGROUP

_STEP_WORDS = 4 * WARPGROUP


@device_function
def handover_place():
    """The word of this thread in a step."""
    return i32(mov_tid_x() % WARPGROUP * 4)


@cache
def make_leave(n_tiles, traits):
    """leave(p_acc, p_packed, smem, first): write P of 64 x 8 n_tiles scores.

    `p_acc` is P times its slope, `p_packed` P as `make_pack` leaves it. The first is read where
    traits bend scores, the second otherwise.
    `first` is the word of the buffer plus `handover_place()`.
    """
    bends = traits.bends_scores

    @device_function
    def write_float(step, p_acc, smem, first):
        st_shared_v4_f32(smem, first + _STEP_WORDS * step, p_acc)

    @device_function
    def write_packed(step, p_packed, smem, first):
        st_shared_v4_u32(smem, first + _STEP_WORDS * step, p_packed)

    write_floats = make_unrolled(write_float, n_tiles, 4)
    write_all_packed = make_unrolled(write_packed, n_tiles // 2, 4)

    @device_function
    def leave(p_acc, p_packed, smem, first):
        if bends:
            write_floats(0, p_acc, smem, first)
        else:
            write_all_packed(0, p_packed, smem, first)

    return leave


@cache
def make_take(n_tiles, traits):
    """take(p_acc, smem, first): read what the other warpgroup has left, as float32."""
    bends, to_f32 = traits.bends_scores, ELEMENTS[traits.dtype].to_f32

    @device_function
    def read_float(step, p_acc, smem, first):
        ld_shared_v4_f32(p_acc, smem, first + _STEP_WORDS * step)

    @device_function
    def read_packed(step, p_acc, smem, first):
        words = cuda.local.array(4, u32)
        ld_shared_v4_u32(words, smem, first + _STEP_WORDS * step)
        for i in range(4):
            p_acc[2 * i] = to_f32(u16(words[i] & u32(0xFFFF)))
            p_acc[2 * i + 1] = to_f32(u16(words[i] >> u32(16)))

    read_floats = make_unrolled(read_float, n_tiles, 4)
    read_all_packed = make_unrolled(read_packed, n_tiles // 2, 8)

    @device_function
    def take(p_acc, smem, first):
        if bends:
            read_floats(0, p_acc, smem, first)
        else:
            read_all_packed(0, p_acc, smem, first)

    return take


@cache
def make_hand_over_kept(n_tiles, traits):
    """(leave_kept, take_kept), functions of (kept, smem, buffer)

    Write and read the bits of a thread's scores, behind P in the buffer that begins at the word
    `buffer`. Neither does anything where no feature drops scores.
    """
    drops, n_words = traits.drops_weights, words_of_kept(n_tiles, traits)
    behind_p = n_tiles * WARPGROUP * (4 if traits.bends_scores else 2)

    @device_function
    def leave_kept(kept, smem, buffer):
        if drops:
            first = i32(buffer + behind_p + mov_tid_x() % WARPGROUP)
            for word in range(n_words):
                st_shared_u32(smem, first + WARPGROUP * word, kept[word])

    @device_function
    def take_kept(kept, smem, buffer):
        if drops:
            first = i32(buffer + behind_p + mov_tid_x() % WARPGROUP)
            for word in range(n_words):
                kept[word] = ld_shared_u32(smem, first + WARPGROUP * word)

    return leave_kept, take_kept
