"""The places of a Hopper block that owns keys: that of its number, or those that it draws.

A place is a tile of keys of a key-value head. The warps of a block walk over its places by a loop
each, and count them from 0:

    make_own_places       a block has one place, by its number in the grid
    make_drawn_places     the thread that fetches draws numbers, until there are no places left

A drawn number goes to all warps of the block through a channel of two buffers: while consumers
store dK and dV of one place, and need its number for that, the next place is there already.

Numbers come from a counter in global memory, by an atomic addition. So a place has a smaller number
than another if it was drawn before, and who drew it runs. Of the places that are not finished the
smallest was drawn first of them. Its block works on it, because it finishes its places in order; it
waits for blocks with smaller places only, and there are none. So it ends, and then the next
smallest, however few blocks run at once, and in whatever order the hardware starts them.

Each block draws once more than it has places. The counter is 0 again after the last of these draws.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from numflash.configs import Traits
from numflash.configs.wgmma_backward import Sm90BackwardConfig
from numflash.kernels.wgmma.channels import Channel, make_channel, make_no_channel
from numflash.ptx import device_function, i32, i64, mov_ctaid_x, mov_nctaid_x, u32
from numflash.ptx.between_blocks import atom_inc_gpu_u32
from numflash.ptx.mbarriers import mbarrier_arrive
from numflash.ptx.memory import ld_shared_u32, st_shared_u32
from numflash.tiles import blocks
from numflash.tiles.division import quotient

_NONE = -1


class Places(NamedTuple):
    """The verbs of a block's places; `count` is how many it has had before.

    is_idle(shape)                        whether a block has nothing to do from the first
    draw(smem, barriers, given, count)    by the thread that fetches: the number of the next place
    take(smem, barriers, count)           by all others: that number, once it is drawn
    goes_on(number, count)                whether that is a place, or the end
    number_of(smem, count)                the number again, before it is given back
    give_back(barriers, count)            by all lanes of a warp: they want the number no more
    give_back_alone(barriers, count)      the same by a warp of which one thread works
    """

    channel: Channel
    is_idle: Callable
    draw: Callable
    take: Callable
    goes_on: Callable
    number_of: Callable
    give_back: Callable
    give_back_alone: Callable


@cache
def make_own_places(traits: Traits) -> Places:
    """A block has the place of its number in the grid."""
    is_beyond = blocks.make_is_idle(traits)

    @device_function
    def is_idle(shape):
        # The grid is as long as a list of tiles may be: this one may be shorter.
        return is_beyond(mov_ctaid_x(), quotient(shape.num_heads_q, shape.group_size), shape)

    @device_function
    def draw(smem, barriers, given, count):
        return mov_ctaid_x()

    @device_function
    def take(smem, barriers, count):
        return mov_ctaid_x()

    @device_function
    def goes_on(number, count):
        return count == 0

    @device_function
    def number_of(smem, count):
        return mov_ctaid_x()

    @device_function
    def give_back(barriers, count):
        pass

    verbs = is_idle, draw, take, goes_on, number_of, give_back, give_back
    return Places(make_no_channel(), *verbs)


def make_drawn_places(config: Sm90BackwardConfig, traits: Traits, first_barrier: int) -> Places:
    """A block takes one place after another, as it draws them; see the module's docstring.

    The counter is the first word of the turns. `first_barrier` is the channel's first mbarrier.
    """
    # Consumers give back warp by warp, and so do the warps that assist and the one that adds dQ.
    others = config.assisting_threads // 32 + 1
    groups, buffers = config.num_warpgroups, 2
    at = first_barrier, first_barrier + buffers, buffers
    PLACES = make_channel(*at, readers=groups, others=others)
    first_word = config.smem_offsets(traits)["places"]
    num_places = blocks.make_num_places_of_keys(config.tile_n, traits)

    @device_function
    def is_idle(shape):
        return False

    @device_function
    def draw(smem, barriers, given, count):
        _, (_, _, _, turns), _, shape, _ = given
        places = num_places(shape)
        # The last of all draws, with which blocks learn that there are no places left.
        last = u32(u32(places + mov_nctaid_x()) - u32(1))
        drawn = atom_inc_gpu_u32(turns, i64(0), last)
        number = i32(drawn) if drawn < u32(places) else i32(_NONE)
        buffer, parity = i32(count & 1), u32(count >> 1 & 1)
        # Hazard: a warp that still wants the number of the place before the last would get this.
        PLACES.claim(barriers, buffer, u32(parity ^ u32(1)))
        st_shared_u32(smem, first_word + buffer, u32(number))
        # Hazard: all other warps would wait for this number for ever.
        mbarrier_arrive(barriers, PLACES.full + buffer)
        return number

    @device_function
    def take(smem, barriers, count):
        # Hazard: the number may not have been drawn yet.
        PLACES.wait(barriers, i32(count & 1), u32(count >> 1 & 1))
        return number_of(smem, count)

    @device_function
    def goes_on(number, count):
        return number >= 0

    @device_function
    def number_of(smem, count):
        return i32(ld_shared_u32(smem, first_word + (count & 1)))

    @device_function
    def give_back(barriers, count):
        # Hazard: a lane may not have read the number yet.
        PLACES.gather(0)
        PLACES.release(barriers, i32(count & 1))

    @device_function
    def give_back_alone(barriers, count):
        mbarrier_arrive(barriers, PLACES.empty + i32(count & 1))

    verbs = is_idle, draw, take, goes_on, number_of, give_back, give_back_alone
    return Places(PLACES, *verbs)
