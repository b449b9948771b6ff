"""Blocks of a cluster: who they are, how they meet, and what they give each other.

A cluster is a few blocks with neighbouring blockIdx.x that are resident together; a block's rank
is its place in it. Blocks reach each other's shared memory: an mbarrier that is at some address of
one block is at the same one of every other, and so is the target of a copy that goes to several.
It must be there: a cluster barrier after the mbarriers are initialised, and one before a block
ends, are what says so. Without a cluster a block is one of its own, of rank 0.
"""

from numflash.ptx.bulk_copies import tensor_template
from numflash.ptx.instruction import instruction
from numflash.ptx.operands import Shared
from numflash.ptx.scalars import TensorMap, i32, u16, u32, u64
from numflash.runtime.mode import SIMULATED

if SIMULATED:
    from numflash.simulator.bulk_copies import BulkCopies
    from numflash.simulator.clusters import Member
    from numflash.simulator.engine import current_thread

_MULTICAST = (
    "cp.async.bulk.tensor.{n}d.shared::cluster.global.mbarrier::complete_tx::bytes"
    ".multicast::cluster.L2::cache_hint "
    "[<target>], [<tensor_map>, {{{coordinates}}}], [<barriers>], <blocks>, <policy>;"
)


@instruction("mov.u32 <ret>, %cluster_ctarank;", sm=90, volatile=True)
def mov_cluster_ctarank() -> u32:
    """The block's rank in its cluster, read again at each call, as `mov_tid_x`. PTX ISA 10.16."""
    return u32(current_thread().block.part(Member).rank)


@instruction("mov.u32 <ret>, %clusterid.x;", sm=90, volatile=True)
def mov_clusterid_x() -> u32:
    """The number of the cluster, read again at each call, as `mov_tid_x`. PTX ISA 10.12."""
    block = current_thread().block
    return u32(block.blockIdx.x // block.part(Member).cluster.size)


@instruction("mov.u32 <ret>, %nclusterid.x;", sm=90, volatile=True)
def mov_nclusterid_x() -> u32:
    """The grid's clusters, counted; read again at each call, as `mov_tid_x`. PTX ISA 10.13."""
    block = current_thread().block
    return u32(block.gridDim.x // block.part(Member).cluster.size)


@instruction("barrier.cluster.arrive.release.aligned;", sm=90)
def barrier_cluster_arrive():
    """Arrive at the barrier of all threads of the cluster, and go on. PTX ISA 9.7.13.3.

    All lanes of a warp together. Before it arrives again a thread must wait.
    """
    current_thread().block.part(Member).arrive()


@instruction("barrier.cluster.wait.acquire.aligned;", sm=90)
def barrier_cluster_wait():
    """Wait until all threads of the cluster have arrived. PTX ISA 9.7.13.3.

    After it, what they had done before they arrived is visible. All lanes of a warp together.
    """
    current_thread().block.part(Member).wait()


@instruction(
    "{ .reg .b32 there; mapa.shared::cluster.u32 there, <barriers>, <rank>; "
    "mbarrier.arrive.shared::cluster.b64 _, [there]; }",
    sm=90,
)
def mbarrier_arrive_remote(barriers: Shared(u64, "index"), index: i32, rank: u32):
    """Arrive once at the mbarrier that the block of this rank has at the same address.

    The own rank is one of them. Says that a buffer has been read, and no more: its scope is the
    block, as in CUTLASS (ClusterBarrier::arrive). With `.release.cluster` the assembler puts a
    fence of the whole GPU before each arrival. PTX ISA 9.7.9 (mapa), 9.7.13.15.13.
    """
    current_thread().block.part(Member).arrive_remote(barriers, index, int(rank))


@instruction(tensor_template(_MULTICAST, 4), sm=90)
def cp_async_bulk_tensor_4d_multicast(
    target: Shared(u32, "target_offset"),
    target_offset: i32,
    tensor_map: TensorMap,
    barriers: Shared(u64, "index"),
    index: i32,
    policy: u64,
    blocks: u16,
    c0: i32,
    c1: i32,
    c2: i32,
    c3: i32,
):
    """The tile at (c0, ...) to `target` in several blocks of the cluster.

    Bit r of `blocks` says whether the block of rank r gets it. There it goes to the same address,
    and its bytes are counted by the mbarrier that is at the same address as the given one.
    PTX ISA 9.7.9.27.1.2.
    """
    _load(target, target_offset, tensor_map, barriers, index, (c0, c1, c2, c3), blocks)


@instruction(tensor_template(_MULTICAST, 5), sm=90)
def cp_async_bulk_tensor_5d_multicast(
    target: Shared(u32, "target_offset"),
    target_offset: i32,
    tensor_map: TensorMap,
    barriers: Shared(u64, "index"),
    index: i32,
    policy: u64,
    blocks: u16,
    c0: i32,
    c1: i32,
    c2: i32,
    c3: i32,
    c4: i32,
):
    """As `cp_async_bulk_tensor_4d_multicast` in five dimensions. PTX ISA 9.7.9.27.1.2."""
    _load(target, target_offset, tensor_map, barriers, index, (c0, c1, c2, c3, c4), blocks)


def _load(target, target_offset, tensor_map, barriers, index, coordinates, blocks):
    block = current_thread().block
    of_blocks = block.part(Member).of_mask("a multicast bulk load", int(blocks))
    copies = block.part(BulkCopies)
    copies.load(target, target_offset, tensor_map, barriers, index, coordinates, of_blocks)
