"""The shared memory of a block: the buffers of Q, K, V and O, and the channels of the first three.

K and V have `num_stages` buffers each, of `stage_n` keys, which all warpgroups read. Q and O have
one for each warpgroup.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from numflash.configs.traits import Traits
from numflash.configs.wgmma import WARPGROUP_ROWS, Sm90ForwardConfig
from numflash.kernels.wgmma.channels import Channel, make_channel
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
        q, k, v, o: the buffers; those of O may be those of Q.
        q_bytes, k_bytes, v_bytes: that arrive in one buffer.
        Q, K, V: the channels; the stages of Q are warpgroups.
        o_replaces_q: whether O goes through the buffer of Q; otherwise it has its own, or none.
    """

    q: Buffers
    k: Buffers
    v: Buffers
    o: Buffers
    q_bytes: int
    k_bytes: int
    v_bytes: int
    Q: Channel
    K: Channel
    V: Channel
    o_replaces_q: bool


@cache
def make_ring(config: Sm90ForwardConfig, traits: Traits) -> Ring:
    """The ring of a config."""
    offsets, tiles = config.smem_offsets(traits), config.tiles(traits)
    groups, stages, apart = config.num_warpgroups, config.num_stages, "o" in tiles
    k_words, v_words = tiles["k"] // stages, tiles["v"] // stages
    o = "o" if apart else "q"
    o_replaces_q = config.num_splits == 1 and not apart
    # Of every channel the mbarriers for full come first, then those for empty.
    q_full = offsets["barriers"] // 2
    k_full = q_full + 2 * groups
    v_full = k_full + 2 * stages
    # Where O takes Q's place, one thread gives Q back: the one that has stored O.
    q_arrivals = 1 if o_replaces_q else config.arrivals
    return Ring(
        q=Buffers(offsets["q"], tiles["q"] // groups),
        k=Buffers(offsets["k"], k_words),
        v=Buffers(offsets["v"], v_words),
        o=Buffers(offsets[o], tiles[o] // groups),
        q_bytes=WARPGROUP_ROWS * config.slabs(traits.head_dim) * SLAB_BYTES,
        k_bytes=4 * k_words,
        v_bytes=4 * v_words,
        Q=make_channel(q_full, q_full + groups, groups, q_arrivals),
        K=make_channel(k_full, k_full + stages, stages, config.arrivals, groups),
        V=make_channel(v_full, v_full + stages, stages, config.arrivals, groups),
        o_replaces_q=o_replaces_q,
    )
