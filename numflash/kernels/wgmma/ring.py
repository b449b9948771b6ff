"""The shared memory of a block: the buffers of Q, K, V and O, and the channels of the first three.

K and V have buffers of `stage_n` keys, which all warpgroups read: `num_stages` each, or V others
(`stages_of_v`). Q and O have one for each warpgroup. Where keys have scales of their own these
have buffers, too (`key_scales`), as many as K. The blocks of a cluster have the same keys in their
buffers.

A walk through the buffers of K and V keeps `stages`: (stage, parity) of both where they have
equally many, otherwise (stage of K, its parity, stage of V, its parity). The first two are always
K's, the last two V's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from numflash.configs import WARPGROUP_ROWS, Sm90ForwardConfig, Traits
from numflash.kernels.wgmma.channels import Channel, make_channel, make_no_channel
from numflash.ptx import device_function, i32, u32
from numflash.tiles.wgmma.products import SLAB_BYTES

SLAB_WORDS = SLAB_BYTES // 4


class Buffers(NamedTuple):
    """The first word of the first buffer, and the words from one to the next."""

    first: int
    words: int


@dataclass(frozen=True)
class Ring:
    """The places of buffers and channels in shared memory.

    Attributes:
        q, k, v, o, scales: the buffers; those of O may be those of Q, and of scales none.
        q_bytes, k_bytes, v_bytes: that arrive in one buffer.
        Q, K, V, SCALES: the channels; the stages of Q are warpgroups.
        begin: begin(parity) -> the first `stages`.
        following: following(stages) -> the next.
        o_replaces_q: whether O goes through the buffer of Q; otherwise it has its own, or none.
    """

    q: Buffers
    k: Buffers
    v: Buffers
    o: Buffers
    scales: Buffers
    q_bytes: int
    k_bytes: int
    v_bytes: int
    Q: Channel
    K: Channel
    V: Channel
    SCALES: Channel
    begin: Callable
    following: Callable
    o_replaces_q: bool


@cache
def make_ring(config: Sm90ForwardConfig, traits: Traits) -> Ring:
    """The ring of a config."""
    offsets, tiles = config.smem_offsets(traits), config.tiles(traits)
    groups, stages, apart = config.num_warpgroups, config.num_stages, "o" in tiles
    v_stages = config.stages_of_v
    k_words, v_words = tiles["k"] // stages, tiles["v"] // v_stages
    o = "o" if apart else "q"
    o_replaces_q = config.num_splits == 1 and not apart
    # Of every channel the mbarriers for full come first, then those for empty.
    q_full = offsets["barriers"] // 2
    k_full = q_full + 2 * groups
    v_full = k_full + 2 * stages
    # Where O takes Q's place, one thread gives Q back: the one that has stored O.
    q_arrivals = 1 if o_replaces_q else config.arrivals
    of_keys = {"arrivals": config.arrivals, "readers": groups, "cluster": config.cluster}
    K = make_channel(k_full, k_full + stages, stages, **of_keys)
    V = make_channel(v_full, v_full + v_stages, v_stages, **of_keys)
    SCALES = make_no_channel()
    if traits.key_scales:
        full, writers = v_full + 2 * v_stages, config.assisting_threads // 32
        SCALES = make_channel(full, full + stages, stages, config.arrivals, groups, writers)
    begin, following = _make_steps(K, V, stages != v_stages)
    return Ring(
        q=Buffers(offsets["q"], tiles["q"] // groups),
        k=Buffers(offsets["k"], k_words),
        v=Buffers(offsets["v"], v_words),
        o=Buffers(offsets[o], tiles[o] // groups),
        scales=Buffers(offsets["key_scales"], tiles["key_scales"] // stages),
        q_bytes=WARPGROUP_ROWS * config.slabs(traits.head_dim) * SLAB_BYTES,
        k_bytes=4 * k_words,
        v_bytes=4 * v_words,
        Q=make_channel(q_full, q_full + groups, groups, q_arrivals),
        K=K,
        V=V,
        SCALES=SCALES,
        begin=begin,
        following=following,
        o_replaces_q=o_replaces_q,
    )


def _make_steps(K: Channel, V: Channel, apart: bool) -> tuple[Callable, Callable]:
    """(begin, following) of a `Ring`; `apart` says that V has other stages than K."""
    if apart:

        @device_function
        def begin(parity):
            return i32(0), u32(parity), i32(0), u32(parity)

        @device_function
        def following(stages):
            stage, parity = K.following(stages[0], stages[1])
            v_stage, v_parity = V.following(stages[2], stages[3])
            return stage, parity, v_stage, v_parity

        return begin, following

    @device_function
    def begin_both(parity):
        return i32(0), u32(parity)

    @device_function
    def following_both(stages):
        return K.following(stages[0], stages[1])

    return begin_both, following_both
