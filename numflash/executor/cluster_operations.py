"""Clusters of one block: its shared memory is the cluster's, and its rank is 0."""

import numpy as np

from numflash.executor.operands import WAITS, are_here, reader, write
from numflash.executor.text import UnknownError
from numflash.simulator.errors import SimulationError

_SPACES = ("", ".shared::cluster")
_BARRIERS = {
    f"barrier.cluster.{name}{order}{aligned}": name
    for name, orders in (("arrive", ("", ".release", ".relaxed")), ("wait", ("", ".acquire")))
    for order in orders
    for aligned in ("", ".aligned")
}


def make_cluster_barrier(statement, program):
    """`barrier.cluster`: every thread of the block arrives, and waits for all of them later."""
    action = _BARRIERS.get(statement.opcode)
    if action is None:
        raise UnknownError(f"the executor does not know {statement.opcode}")

    def arrive(warp, mask):
        if not are_here(warp, mask):
            return WAITS
        block = warp.block
        if warp.number in block.cluster_arrivals:
            raise SimulationError("barrier.cluster.arrive again without a wait between")
        barrier = block.cluster_barrier
        block.cluster_arrivals[warp.number] = barrier.arrive("of the cluster", None)
        block.something_happened()
        return None

    def wait(warp, mask):
        if not are_here(warp, mask):
            return WAITS
        block = warp.block
        generation = block.cluster_arrivals.get(warp.number)
        if generation is None:
            raise SimulationError("barrier.cluster.wait without an arrive before")
        if not block.cluster_barrier.has_ended(generation, block):
            came = f"{block.cluster_barrier.arrived} of {block.live_threads} threads came"
            warp.group.waits_for = f"the cluster: {came}"
            return WAITS
        del block.cluster_arrivals[warp.number]
        return None

    return arrive if action == "arrive" else wait


def make_mapa(statement, program):
    """`mapa`: where a block of the cluster has what is at an address of the running one."""
    size = _size(statement)
    target, address, rank = statement.operands
    address_of, rank_of = reader(program, address, f"b{size}"), reader(program, rank, "u32")

    def operation(warp, mask):
        ranks = rank_of(warp)[mask]
        if ranks.any():
            raise SimulationError(
                f"mapa to the block of rank {int(ranks[ranks != 0][0])}: the cluster has one, of "
                "rank 0"
            )
        write(warp, target, address_of(warp), mask)

    return operation


def make_rank(statement, program):
    """`getctarank`: whose shared memory an address is in."""
    _size(statement)

    def operation(warp, mask):
        write(warp, statement.operands[0], np.zeros(32, np.uint32), mask)

    return operation


def _size(statement) -> int:
    """Bits of an address. Raises UnknownError."""
    name = statement.opcode.split(".")[0]
    for size in (32, 64):
        if statement.opcode in [f"{name}{space}.u{size}" for space in _SPACES]:
            return size
    raise UnknownError(f"the executor does not know {statement.opcode}")
