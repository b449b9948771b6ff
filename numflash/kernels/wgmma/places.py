"""The places of a Hopper block that owns keys: that of its number, or those that it draws.

A place is a tile of keys of a key-value head. Each warp of a block walks over the block's places
by a loop of its own (`make_each`):

    make_own_places       a block has one place, by its number in the grid
    make_drawn_places     the thread that fetches draws numbers, until there are no places left

A drawn number goes to all warps of the block by a channel of one buffer, and with it its turn: how
many places the block has had before, modulo 2, which is the parity of the phase in which K and V
of the place come. Consumers give the number back when their products are over, and with it K and
V: while they store dK and dV, the next place begins.

Numbers come from a counter in global memory, by an atomic addition. So whoever has drawn a number
runs, and smaller ones were drawn before. Take the smallest place that is not finished. If a block
has drawn it, the block is at it: a block finishes its places in order. It waits for smaller places
only, which are finished, and so it ends. If nobody has drawn it, the next block does that has
none, or begins. So all places end, however few blocks run at once, and in whatever order they
start.

Each block draws once more than it has places. After the last of these draws the counter is 0
again, so that a launch may be repeated.
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

# Behind all places; as an int32 it is less than 0.
_NONE = 0xFFFFFFFF


class Places(NamedTuple):
    """The verbs of a block's places.

    is_idle(shape)                       whether a block has nothing to do from the first
    draw(smem, barriers, work, turn)     by the thread that fetches: the next number, or one < 0
    take(smem, barriers, work, turn)     by all others: that number, once it is drawn
    number_of(smem), turn_of(smem)       both again, until they are given back
    give_back(barriers)                  by all lanes of a warp, which want the place no more
    give_back_alone(barriers)            the same by a warp of which one thread works

    `channel` has no buffers where a block has its own place, and all but the first do nothing, or
    say what is so from the first.
    """

    channel: Channel
    is_idle: Callable
    draw: Callable
    take: Callable
    number_of: Callable
    turn_of: Callable
    give_back: Callable
    give_back_alone: Callable


def make_each(places: Places, of_place, draws: bool = False):
    """each(smem, barriers, work, state): call for one place of the block after the other

        of_place(smem, barriers, work, number, turn, state) -> the next one's state, and turn

    With `draws` it is for the thread that fetches, whose `work` is (maps, given).
    """
    following, is_drawn = places.draw if draws else places.take, places.channel.empty > 0

    @device_function
    def once(smem, barriers, work, state):
        of_place(smem, barriers, work, mov_ctaid_x(), u32(0), state)

    @device_function
    def each(smem, barriers, work, state):
        turn = u32(0)
        number = following(smem, barriers, work, turn)
        while number >= 0:
            state, turn = of_place(smem, barriers, work, number, turn, state)
            turn = u32(turn ^ u32(1))
            number = following(smem, barriers, work, turn)

    return each if is_drawn else once


@cache
def make_own_places(traits: Traits) -> Places:
    """A block has the place of its number in the grid."""
    is_beyond = blocks.make_is_idle(traits)

    @device_function
    def is_idle(shape):
        # The grid is as long as a list of tiles may be: this one may be shorter.
        return is_beyond(mov_ctaid_x(), quotient(shape.num_heads_q, shape.group_size), shape)

    @device_function
    def take(smem, barriers, work, turn):
        return mov_ctaid_x()

    @device_function
    def number_of(smem):
        return mov_ctaid_x()

    @device_function
    def turn_of(smem):
        return u32(0)

    @device_function
    def give_back(barriers):
        pass

    verbs = is_idle, take, take, number_of, turn_of, give_back, give_back
    return Places(make_no_channel(), *verbs)


def make_drawn_places(config: Sm90BackwardConfig, traits: Traits, first_barrier: int) -> Places:
    """A block takes one place after another, as it draws them; see the module's docstring.

    The counter is the first word of the turns. `first_barrier` is the channel's first mbarrier.
    """
    # Beside consumers the warps that assist give back, and the one that adds dQ.
    others, groups = config.assisting_threads // 32 + 1, config.num_warpgroups
    at = first_barrier, first_barrier + 1
    PLACES = make_channel(*at, stages=1, readers=groups, others=others)
    number_at = config.smem_offsets(traits)["places"]
    turn_at = number_at + 1
    num_places = blocks.make_num_places_of_keys(config.tile_n, traits)

    @device_function
    def is_idle(shape):
        return False

    @device_function
    def draw(smem, barriers, work, turn):
        _, (_, (_, _, _, turns), _, shape, _) = work
        places = u32(num_places(shape))
        # By the last of all draws the last block learns that there are no places left.
        number = atom_inc_gpu_u32(turns, i64(0), u32(places + u32(mov_nctaid_x()) - u32(1)))
        if number >= places:
            number = u32(_NONE)
        # Hazard: a warp that still wants the number before would get this one, and the next K and
        # V would overwrite those that it multiplies.
        PLACES.claim(barriers, 0, u32(turn ^ u32(1)))
        st_shared_u32(smem, number_at, number)
        st_shared_u32(smem, turn_at, turn)
        # Hazard: all other warps would wait for this number for ever.
        mbarrier_arrive(barriers, PLACES.full)
        return i32(number)

    @device_function
    def number_of(smem):
        return i32(ld_shared_u32(smem, number_at))

    @device_function
    def turn_of(smem):
        return ld_shared_u32(smem, turn_at)

    @device_function
    def take(smem, barriers, work, turn):
        # Hazard: the number may not have been drawn yet.
        PLACES.wait(barriers, 0, turn)
        return number_of(smem)

    @device_function
    def give_back(barriers):
        # Hazard: a lane may not have read the number yet.
        PLACES.gather(0)
        PLACES.release(barriers, 0)

    @device_function
    def give_back_alone(barriers):
        mbarrier_arrive(barriers, PLACES.empty)

    verbs = is_idle, draw, take, number_of, turn_of, give_back, give_back_alone
    return Places(PLACES, *verbs)
