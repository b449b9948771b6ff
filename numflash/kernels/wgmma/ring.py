"""What passes between the producer and the consumers of a block: registers, and buffers.

K and V have `num_stages` buffers each, which are filled and emptied in turn; Q has one for each
warpgroup of consumers. Mbarriers say how they are: a buffer is full when its bytes have arrived,
and empty when every warp that reads it has arrived, or with `arrivals` = 1 one warp for each
warpgroup.
"""

from dataclasses import dataclass
from functools import cache

from numflash.configs.traits import Traits
from numflash.configs.wgmma import WARPGROUP_ROWS, Sm90ForwardConfig
from numflash.ptx import (
    device_function,
    fence_mbarrier_init,
    i32,
    make_setmaxnreg,
    mbarrier_arrive,
    mbarrier_init,
    mbarrier_wait_parity,
    mov_tid_x,
    u32,
)
from numflash.tiles.wgmma.products import SLAB_BYTES
from numflash.tiles.wgmma.turns import make_giving_back

SLAB_WORDS = SLAB_BYTES // 4


@dataclass(frozen=True)
class Ring:
    """Where buffers and mbarriers lie in shared memory, and how big buffers are.

    Attributes:
        q, k, v, o: the first word of the first buffer; that of O may be that of Q.
        q_words, k_words, v_words, o_words: from one buffer to the next.
        q_bytes, k_bytes, v_bytes: what arrives in one.
        q_full, q_empty: the mbarrier of the first warpgroup; the others follow.
        k_full, k_empty, v_full, v_empty: that of the first stage; the others follow.
        o_replaces_q: whether O goes through the buffer of Q; else it has its own, or none.
        arrivals: of each warpgroup that reads a buffer, to give it back.
    """

    q: int
    k: int
    v: int
    o: int
    q_words: int
    k_words: int
    v_words: int
    o_words: int
    q_bytes: int
    k_bytes: int
    v_bytes: int
    q_full: int
    q_empty: int
    k_full: int
    k_empty: int
    v_full: int
    v_empty: int
    o_replaces_q: bool
    arrivals: int

    @classmethod
    def of(cls, config: Sm90ForwardConfig, traits: Traits) -> "Ring":
        """The ring of a config."""
        offsets, tiles = config.smem_offsets(traits), config.tiles(traits)
        groups, stages, apart = config.num_warpgroups, config.num_stages, "o" in tiles
        k_words, v_words = tiles["k"] // stages, tiles["v"] // stages
        q_full = offsets["barriers"] // 2
        k_full = q_full + 2 * groups
        return cls(
            q=offsets["q"],
            k=offsets["k"],
            v=offsets["v"],
            o=offsets["o" if apart else "q"],
            q_words=tiles["q"] // groups,
            k_words=k_words,
            v_words=v_words,
            o_words=tiles["o" if apart else "q"] // groups,
            q_bytes=WARPGROUP_ROWS * config.slabs(traits.head_dim) * SLAB_BYTES,
            k_bytes=4 * k_words,
            v_bytes=4 * v_words,
            q_full=q_full,
            q_empty=q_full + groups,
            k_full=k_full,
            k_empty=k_full + stages,
            v_full=k_full + 2 * stages,
            v_empty=k_full + 3 * stages,
            o_replaces_q=config.num_splits == 1 and not apart,
            arrivals=config.arrivals,
        )


@cache
def make_register_exchange(config: Sm90ForwardConfig):
    """(give_registers(), take_registers()): by all warps that copy, and by all that multiply.

    With fixed registers both do nothing.
    """
    few, many = config.registers
    if not config.fixed:
        return make_setmaxnreg("dec", few), make_setmaxnreg("inc", many)

    @device_function
    def keep_registers():
        pass

    return keep_registers, keep_registers


@cache
def make_init_barriers(ring: Ring, num_groups, num_stages):
    """init_barriers(barriers): by one thread, before all others use them."""
    q_full, q_empty = ring.q_full, ring.q_empty
    k_full, k_empty, v_full, v_empty = ring.k_full, ring.k_empty, ring.v_full, ring.v_empty
    arrivals = ring.arrivals * num_groups
    # Where O has taken its place Q is given back by the thread that stored it.
    q_arrivals = 1 if ring.o_replaces_q else ring.arrivals

    @device_function
    def init_barriers(barriers):
        if mov_tid_x() == 0:
            for group in range(num_groups):
                mbarrier_init(barriers, q_full + group, 1)
                mbarrier_init(barriers, q_empty + group, q_arrivals)
            for stage in range(num_stages):
                mbarrier_init(barriers, k_full + stage, 1)
                mbarrier_init(barriers, v_full + stage, 1)
                mbarrier_init(barriers, k_empty + stage, arrivals)
                mbarrier_init(barriers, v_empty + stage, arrivals)
            fence_mbarrier_init()

    return init_barriers


@cache
def make_next_stage(num_stages):
    """next_stage(stage, parity): the buffer after this one, and the parity of its phase."""

    @device_function
    def next_stage(stage, parity):
        last = stage == num_stages - 1
        return i32(0) if last else i32(stage + 1), u32(parity ^ u32(last))

    return next_stage


@cache
def make_pass_by(ring: Ring, num_stages, take_turn, pass_turn, turns=1):
    """pass_by(barriers, group, first, end, stage, parity): leave stages of keys to the others.

    A warpgroup whose rows do not see these empties their buffers like the rest, when they are
    full, and lets its turns pass, so many a stage. Returns the buffer after them and the parity of
    its phase.
    """
    k_full, k_empty, v_full, v_empty = ring.k_full, ring.k_empty, ring.v_full, ring.v_empty
    next_stage = make_next_stage(num_stages)
    gives_back, gather = make_giving_back(ring.arrivals)

    @device_function
    def pass_by(barriers, group, first, end, stage, parity):
        for _ in range(first, end):
            for _ in range(turns):
                take_turn(group)
                pass_turn(group)
            # The producer may want K's buffer for the next before it fetches this V.
            mbarrier_wait_parity(barriers, k_full + stage, parity)
            gather(group)
            if gives_back():
                mbarrier_arrive(barriers, k_empty + stage)
            mbarrier_wait_parity(barriers, v_full + stage, parity)
            gather(group)
            if gives_back():
                mbarrier_arrive(barriers, v_empty + stage)
            stage, parity = next_stage(stage, parity)
        return stage, parity

    return pass_by
