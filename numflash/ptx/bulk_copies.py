"""Copies of whole tiles by the tensor memory accelerator (TMA). PTX ISA 9.7.9.27.

One thread names a tile of up to five dimensions by the coordinates of its first element, the
fastest dimension first; the tensor map says where the tensor lies, how big the tile is, and how
its 16-byte chunks are swizzled in shared memory. Elements outside the tensor are read as zero and
never written, and count as delivered. A tile arrives when the mbarrier has counted its bytes.

Bulk copies go through another proxy than loads and stores: they see a thread's stores to shared
memory after its `fence_proxy_async`.
"""

from numflash.ptx.instruction import instruction
from numflash.ptx.operands import Shared
from numflash.ptx.scalars import TensorMap, i32, u32, u64
from numflash.runtime.mode import SIMULATED

if SIMULATED:
    from numflash.simulator.bulk_copies import BulkCopies
    from numflash.simulator.engine import current_thread

EVICT_NORMAL = u64(0x1000000000000000)
EVICT_FIRST = u64(0x12F0000000000000)
EVICT_LAST = u64(0x14F0000000000000)
"""Policies for the L2 cache: keep the bytes that a copy reads for a short, or for a long time."""

_LOAD = (
    "cp.async.bulk.tensor.{n}d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
    "[<target>], [<tensor_map>, {{{coordinates}}}], [<barriers>], <policy>;"
)
_STORE = (
    "cp.async.bulk.tensor.{n}d.global.shared::cta.bulk_group "
    "[<tensor_map>, {{{coordinates}}}], [<source>];"
)


def tensor_template(text: str, n: int) -> str:
    """An instruction of `n` dimensions, of the text for any: its number and its coordinates."""
    return text.format(n=n, coordinates=", ".join(f"<c{i}>" for i in range(n)))


@instruction(tensor_template(_LOAD, 2), sm=90)
def cp_async_bulk_tensor_2d(
    target: Shared(u32, "target_offset"),
    target_offset: i32,
    tensor_map: TensorMap,
    barriers: Shared(u64, "index"),
    index: i32,
    policy: u64,
    c0: i32,
    c1: i32,
):
    """The tile at (c0, c1) to `target`, its bytes counted by the mbarrier `index`.

    PTX ISA 9.7.9.27.1.2.
    """
    _load(target, target_offset, tensor_map, barriers, index, (c0, c1))


@instruction(tensor_template(_LOAD, 3), sm=90)
def cp_async_bulk_tensor_3d(
    target: Shared(u32, "target_offset"),
    target_offset: i32,
    tensor_map: TensorMap,
    barriers: Shared(u64, "index"),
    index: i32,
    policy: u64,
    c0: i32,
    c1: i32,
    c2: i32,
):
    """As `cp_async_bulk_tensor_2d` in three dimensions."""
    _load(target, target_offset, tensor_map, barriers, index, (c0, c1, c2))


@instruction(tensor_template(_LOAD, 4), sm=90)
def cp_async_bulk_tensor_4d(
    target: Shared(u32, "target_offset"),
    target_offset: i32,
    tensor_map: TensorMap,
    barriers: Shared(u64, "index"),
    index: i32,
    policy: u64,
    c0: i32,
    c1: i32,
    c2: i32,
    c3: i32,
):
    """As `cp_async_bulk_tensor_2d` in four dimensions."""
    _load(target, target_offset, tensor_map, barriers, index, (c0, c1, c2, c3))


@instruction(tensor_template(_LOAD, 5), sm=90)
def cp_async_bulk_tensor_5d(
    target: Shared(u32, "target_offset"),
    target_offset: i32,
    tensor_map: TensorMap,
    barriers: Shared(u64, "index"),
    index: i32,
    policy: u64,
    c0: i32,
    c1: i32,
    c2: i32,
    c3: i32,
    c4: i32,
):
    """As `cp_async_bulk_tensor_2d` in five dimensions."""
    _load(target, target_offset, tensor_map, barriers, index, (c0, c1, c2, c3, c4))


@instruction(tensor_template(_STORE, 2), sm=90)
def cp_async_bulk_tensor_2d_store(
    tensor_map: TensorMap,
    c0: i32,
    c1: i32,
    source: Shared(u32, "source_offset"),
    source_offset: i32,
):
    """The tile in shared memory to (c0, c1), as part of the next bulk group.

    PTX ISA 9.7.9.27.1.2.
    """
    _store(tensor_map, (c0, c1), source, source_offset)


@instruction(tensor_template(_STORE, 3), sm=90)
def cp_async_bulk_tensor_3d_store(
    tensor_map: TensorMap,
    c0: i32,
    c1: i32,
    c2: i32,
    source: Shared(u32, "source_offset"),
    source_offset: i32,
):
    """As `cp_async_bulk_tensor_2d_store` in three dimensions."""
    _store(tensor_map, (c0, c1, c2), source, source_offset)


@instruction(tensor_template(_STORE, 4), sm=90)
def cp_async_bulk_tensor_4d_store(
    tensor_map: TensorMap,
    c0: i32,
    c1: i32,
    c2: i32,
    c3: i32,
    source: Shared(u32, "source_offset"),
    source_offset: i32,
):
    """As `cp_async_bulk_tensor_2d_store` in four dimensions."""
    _store(tensor_map, (c0, c1, c2, c3), source, source_offset)


@instruction(tensor_template(_STORE, 5), sm=90)
def cp_async_bulk_tensor_5d_store(
    tensor_map: TensorMap,
    c0: i32,
    c1: i32,
    c2: i32,
    c3: i32,
    c4: i32,
    source: Shared(u32, "source_offset"),
    source_offset: i32,
):
    """As `cp_async_bulk_tensor_2d_store` in five dimensions."""
    _store(tensor_map, (c0, c1, c2, c3, c4), source, source_offset)


@instruction("cp.async.bulk.commit_group;", sm=90)
def cp_async_bulk_commit_group():
    """Make a group of the bulk stores that this thread issued since the last one.

    PTX ISA 9.7.9.27.2.1.
    """
    current_thread().block.part(BulkCopies).commit()


@instruction("cp.async.bulk.wait_group.read 0;", sm=90)
def cp_async_bulk_wait_group_read():
    """Wait until this thread's bulk stores have read shared memory. PTX ISA 9.7.9.27.2.2."""
    copies = current_thread().block.part(BulkCopies)
    copies.linger()
    copies.wait_for_reads()


@instruction("prefetch.tensormap [<tensor_map>];", sm=90)
def prefetch_tensormap(tensor_map: TensorMap):
    """Bring a tensor map into the cache before copies use it. PTX ISA 9.7.9.16."""


def _load(target, target_offset, tensor_map, barriers, index, coordinates):
    copies = current_thread().block.part(BulkCopies)
    copies.load(target, target_offset, tensor_map, barriers, index, coordinates)


def _store(tensor_map, coordinates, source, source_offset):
    copies = current_thread().block.part(BulkCopies)
    copies.store(tensor_map, coordinates, source, source_offset)
