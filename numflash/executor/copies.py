"""Asynchronous copies in forms that numflash has no instruction for, and other compilers use.

The parts of the simulator say what they mean. Each maker gets a statement and its opcode without
hints, as `bodies.plain` gives it.
"""

import re
from collections.abc import Callable

import numpy as np

from numflash.executor.addresses import GlobalAddress, SharedAddresses, TensorMaps
from numflash.executor.bodies import lingering, plain
from numflash.executor.operands import address_reader, reader, shared_address_reader
from numflash.executor.reductions import reduction
from numflash.executor.text import (
    TYPE_BYTES,
    Immediate,
    PtxError,
    Register,
    Statement,
    UnknownError,
    check_operands,
)
from numflash.ptx.async_copies import copy
from numflash.simulator.async_copies import AsyncCopies
from numflash.simulator.bulk_copies import BulkCopies, Span
from numflash.simulator.clusters import Member
from numflash.simulator.engine import become

_SIZES = {"ca": (4, 8, 16), "cg": (16,)}


def copy_operation(statement: Statement, program) -> Callable | None:
    """The operation of a statement; None where it is no copy that the executor knows."""
    opcode, operands = plain(statement.opcode, statement.operands)
    for pattern, make in _MAKERS.items():
        if matched := re.fullmatch(pattern, opcode):
            hints = len(statement.operands) - len(operands)
            return make(statement, operands, matched, program, hints)
    return None


def _lane_by_lane(lanes_do: Callable) -> Callable:
    """An operation of `lanes_do(warp)`, which gives a function that a lane executes."""

    def operation(warp, mask):
        lane_does = lanes_do(warp)
        for lane in np.flatnonzero(mask):
            become(warp.threads[lane])
            lane_does(lane)
        warp.block.something_happened()

    return operation


def _count(statement: Statement, operand) -> int:
    """An operand that must be a number, not a register."""
    if not isinstance(operand, Immediate) or operand.integer() < 0:
        raise PtxError(f"{statement.opcode} wants a number, not {operand}")
    return operand.integer()


# Copies of threads


def _make_copy(statement, operands, matched, program, hints):
    """`cp.async` of 4, 8 or 16 bytes, of which fewer may be read: the rest is zeros."""
    check_operands(statement, 3 + hints, 4 + hints)
    target, source, size, *of_source = operands
    size = _count(statement, size)
    if size not in _SIZES[matched[1]]:
        allowed = ", ".join(str(n) for n in _SIZES[matched[1]])
        raise PtxError(f"{statement.opcode} copies {allowed} bytes, not {size}")
    targets_of, sources_of = (
        shared_address_reader(program, target),
        address_reader(program, source),
    )
    is_ignored = _is_predicate(program, of_source)
    count_of = (
        reader(program, of_source[0], "pred" if is_ignored else "u32") if of_source else None
    )

    def lanes_do(warp):
        targets = SharedAddresses(warp, targets_of(warp), np.uint32, size)
        sources = sources_of(warp)
        counts = np.full(32, size) if count_of is None else count_of(warp)
        counts = np.where(counts, 0, size) if is_ignored else counts

        def lane_does(lane):
            word = int(targets.index([lane])[0]) * size // 4
            source = GlobalAddress(warp.memory, sources[lane])
            copy(targets[lane], word, source, 0, int(counts[lane]), size)

        return lane_does

    return _lane_by_lane(lanes_do)


def _is_predicate(program, operands) -> bool:
    """Whether the first operand is a predicate register."""
    if not operands or not isinstance(operands[0], Register):
        return False
    return program.entry.register_types[operands[0].number] == "pred"


def _make_wait(statement, operands, matched, program, hints):
    """`cp.async.wait_group` of any number, and `wait_all`."""
    of_all = matched[1] == "all"
    check_operands(statement, 0 if of_all else 1)
    pending = 0 if of_all else _count(statement, operands[0])

    def lanes_do(warp):
        copies = warp.block.part(AsyncCopies)

        def lane_does(lane):
            if of_all:
                copies.commit()
            copies.wait(pending)

        return lane_does

    return _lane_by_lane(lanes_do)


# Bulk copies


def _make_bulk_reduction(statement, operands, matched, program, hints):
    """A reduction other than `cp_reduce_async_bulk_add_f32`."""
    check_operands(statement, 3 + hints)
    target, source, size = operands
    targets_of, sources_of = (
        address_reader(program, target),
        shared_address_reader(program, source),
    )
    size_of = reader(program, size, "u32")
    dtype, combine = _reduction(statement, matched[1], matched[3], bool(matched[2]))

    def lanes_do(warp):
        copies, targets, sources = warp.block.part(BulkCopies), targets_of(warp), sources_of(warp)
        sizes = size_of(warp)

        def lane_does(lane):
            address = GlobalAddress(warp.memory, targets[lane])
            span = Span(address.block(0, int(sizes[lane]), 16, "none"), dtype)
            source = warp.block.offset(sources[lane])
            copies.store(span, (), warp.block.shared.bytes, source, combine)

        return lane_does

    return _lane_by_lane(lanes_do)


def _reduction(statement: Statement, name: str, type_: str, noftz: bool):
    """(type of an element, function of what is held and what is given)."""
    if type_ not in TYPE_BYTES:
        raise UnknownError(f"the executor does not know {statement.opcode}: .{type_}")
    if type_ in ("f16", "bf16") and name in ("min", "max"):
        noftz = True  # only additions say it (PTX ISA 9.7.9.25.4.2)
    return reduction(name, type_, noftz)


_OF_TENSORS = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}


def _make_tensor_store(statement, operands, matched, program, hints):
    """A reduction, or a store of one dimension, which numflash has no instruction for."""
    check_operands(statement, 2 + hints)
    tensor_map, source = operands
    _check_coordinates(statement, tensor_map, int(matched[1]))
    maps_of, sources_of = (
        address_reader(program, tensor_map),
        shared_address_reader(program, source),
    )
    coordinates_of = [reader(program, c, "s32") for c in tensor_map.coordinates]

    def lanes_do(warp):
        copies, sources = warp.block.part(BulkCopies), sources_of(warp)
        maps = TensorMaps(warp.block.tensor_maps, maps_of(warp))
        coordinates = np.stack([read(warp) for read in coordinates_of], 1)

        def lane_does(lane):
            combine = None
            if matched[2]:
                type_ = _OF_TENSORS.get(maps[lane].layout.dtype)
                if type_ is None:
                    raise UnknownError(f"a reduction of {maps[lane].layout.dtype}")
                _, combine = reduction(matched[2], type_, type_ != "f32")
            source = warp.block.offset(sources[lane])
            copies.store(maps[lane], coordinates[lane], warp.block.shared.bytes, source, combine)

        return lane_does

    return _lane_by_lane(lanes_do)


def _make_load(statement, operands, matched, program, hints):
    """A load to several blocks of the cluster, or of one dimension.

    Operands: where to, a tensor map with coordinates or an address and a size, the mbarrier, and
    the mask of the blocks.
    """
    rank, multicasts = int(matched[1] or 0), bool(matched[2])
    check_operands(statement, 3 + (not rank) + multicasts + hints)
    target, source, *size, barrier = operands[:-1] if multicasts else operands
    if rank:
        _check_coordinates(statement, source, rank)
    targets_of, barriers_of = (shared_address_reader(program, each) for each in (target, barrier))
    sources_of = address_reader(program, source)
    coordinates_of = [reader(program, c, "s32") for c in source.coordinates]
    size_of = None if rank else reader(program, *size, "u32")
    mask_of = reader(program, operands[-1], "u16") if multicasts else None

    def lanes_do(warp):
        block, copies = warp.block, warp.block.part(BulkCopies)
        targets, sources, barriers = targets_of(warp), sources_of(warp), barriers_of(warp)
        maps = TensorMaps(block.tensor_maps, sources)
        coordinates = [read(warp) for read in coordinates_of]
        sizes, masks = (read(warp) if read else None for read in (size_of, mask_of))

        def lane_does(lane):
            if rank:
                tile = maps[lane]
            else:
                address = GlobalAddress(warp.memory, sources[lane])
                tile = Span(address.block(0, int(sizes[lane]), 16))
            blocks = None
            if multicasts:
                blocks = block.part(Member).of_mask("a multicast bulk load", int(masks[lane]))
            copies.load(
                *(block.shared.bytes, block.offset(int(targets[lane])), tile),
                *(block.mbarriers, block.mbarrier_index(int(barriers[lane]))),
                *(tuple(x[lane] for x in coordinates), blocks),
            )

        return lane_does

    return _lane_by_lane(lanes_do)


def _check_coordinates(statement: Statement, memory, rank: int) -> None:
    found = len(getattr(memory, "coordinates", ()))
    if found != rank:
        raise PtxError(f"{statement.opcode} wants {rank} coordinates, there are {found}")


def _make_bulk_wait(statement, operands, matched, program, hints):
    check_operands(statement, 1)
    pending, reads = _count(statement, operands[0]), bool(matched[1])

    def lanes_do(warp):
        copies = warp.block.part(BulkCopies)
        wait = copies.wait_for_reads if reads else copies.wait_for_writes
        return lambda lane: wait(pending)

    return lingering(_lane_by_lane(lanes_do))


def _make_nothing(statement, operands, matched, program, hints):
    """An instruction that only fills caches."""
    return lambda warp, mask: None


_TO_SHARED = r"shared\.global\.mbarrier::complete_tx::bytes"
_MAKERS = {
    r"cp\.async\.(ca|cg)\.shared\.global": _make_copy,
    r"cp\.async\.wait_(group|all)": _make_wait,
    rf"cp\.async\.bulk\.tensor\.(1)d\.{_TO_SHARED}()": _make_load,
    rf"cp\.async\.bulk(?:\.tensor\.([1-5])d)?\.{_TO_SHARED}(\.multicast::cluster)": _make_load,
    r"cp\.reduce\.async\.bulk\.global\.shared\.bulk_group\.(\w+)(\.noftz)?\.(\w+)": (
        _make_bulk_reduction
    ),
    r"cp\.reduce\.async\.bulk\.tensor\.([1-5])d\.global\.shared\.(\w+)\.bulk_group": (
        _make_tensor_store
    ),
    r"cp\.async\.bulk\.tensor\.(1)d\.global\.shared()?\.bulk_group": _make_tensor_store,
    r"cp\.async\.bulk\.wait_group(\.read)?": _make_bulk_wait,
    r"cp\.async\.bulk\.prefetch\.(tensor\.[1-5]d\.)?L2\.global": _make_nothing,
}
