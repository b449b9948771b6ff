"""The warpgroup of a thread, and the waits of warps and warpgroups for each other."""

from functools import cache

from numflash.ptx import (
    bar_arrive,
    bar_sync,
    bra_over_barrier,
    cuda,
    device_function,
    i32,
    mov_tid_x,
)
from numflash.tiles.portable.lanes import FULL_WARP

WARPGROUP = 128
"""Threads."""
_FIRST_TURN, _FIRST_MEETING = 1, 4
_TWO_WARPGROUPS = 256


@device_function
def leads():
    """Whether this thread speaks for its warpgroup."""
    return mov_tid_x() % WARPGROUP == 0


@device_function
def group_of_thread():
    """This thread's warpgroup, computed again at each call.

    The shuffle tells the assembler that all lanes have the same number; without it, branches on
    the number count as divergent, and products there may be serialised.
    """
    return cuda.shfl_sync(FULL_WARP, i32(mov_tid_x() // WARPGROUP), 0)


@device_function
def meet(group):
    """The warps of a warpgroup wait for each other. Named barriers 4 and up are for this.

    One of them then stores the tile that all have written, or writes for all.
    """
    # Hazard: one warp would go on before the others have written, or have read.
    bar_sync(_FIRST_MEETING + group, WARPGROUP)


@cache
def make_turns(num_groups):
    """(take_turn(group), pass_turn(group), give_first_turn(group)) of warpgroups that alternate.

    Between the first two a warpgroup issues its products, while another computes its softmax;
    `give_first_turn` stands before all. With one warpgroup they do nothing. Named barriers 1 and
    up, one a warpgroup, are theirs.
    """
    alternate, last = num_groups > 1, num_groups - 1

    @device_function
    def take_turn(group):
        if alternate:
            # No hazard, but slow: warpgroups would issue products at once, and softmaxes at once.
            bar_sync(_FIRST_TURN + group, _TWO_WARPGROUPS)

    @device_function
    def pass_turn(group):
        if alternate:
            # Hazard: the next warpgroup would wait for its turn for ever.
            following = 0 if group == last else group + 1
            bar_arrive(_FIRST_TURN + following, _TWO_WARPGROUPS)

    @device_function
    def give_first_turn(group):
        if alternate and group == last:
            # Hazard: no warpgroup would begin, each would wait for another's turn to end.
            bar_arrive(_FIRST_TURN, _TWO_WARPGROUPS)

    return take_turn, pass_turn, give_first_turn


@device_function
def softmax_before_wait(x, y):
    """Keep the softmax whose sums x and y are above a wait for the tensor cores that follows.

    Without this the assembler moves the wait up, and nothing runs beside the products.
    """
    bra_over_barrier(x, y)
