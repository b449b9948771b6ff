"""Between the blocks of a cluster: the barrier of all their threads, and whose an address is.

An address in the cluster's shared memory names a block by its rank, also that of a block's own
variable (`memory.RANK_BYTES`).
"""

import numpy as np

from numflash.executor.memory import RANK_BYTES, SHARED_WINDOW
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
    """`barrier.cluster`: every thread of the cluster arrives, and waits for all of them later."""
    action = _BARRIERS.get(statement.opcode)
    if action is None:
        raise UnknownError(f"the executor does not know {statement.opcode}")

    def arrive(warp, mask):
        if not are_here(warp, mask):
            return WAITS
        cluster, arrivals = warp.block.cluster, warp.block.cluster.arrivals
        if warp in arrivals:
            raise SimulationError("barrier.cluster.arrive again without a wait between")
        arrivals[warp] = cluster.meetings
        cluster.something_happened()
        return None

    def wait(warp, mask):
        if not are_here(warp, mask):
            return WAITS
        cluster = warp.block.cluster
        number = cluster.arrivals.get(warp)
        if number is None:
            raise SimulationError("barrier.cluster.wait without an arrive before")
        if not cluster.has_met(number):
            missing = cluster.who_has_not_come()
            live = sum(block.live for block in cluster.blocks)
            came = f"{live - 32 * len(missing)} of {live} threads came"
            warp.group.waits_for = f"the cluster: {came}"
            return WAITS
        del cluster.arrivals[warp]
        return None

    return arrive if action == "arrive" else wait


def make_mapa(statement, program):
    """`mapa`: where a block of the cluster has what another has at an address."""
    size, window = _size(statement), _window(statement)
    target, address, rank = statement.operands
    address_of, rank_of = reader(program, address, f"b{size}"), reader(program, rank, "u32")

    def operation(warp, mask):
        ranks, count = rank_of(warp), len(warp.block.cluster.blocks)
        if (ranks[mask] >= count).any():
            wrong = int(ranks[mask & (ranks >= count)][0])
            raise SimulationError(
                f"mapa to the block of rank {wrong}: the ranks of the cluster are 0 to {count - 1}"
            )
        addresses = address_of(warp).astype(np.int64)
        others = ranks.astype(np.int64) - _ranks(warp, addresses - window, mask)
        write(warp, target, (addresses + others * RANK_BYTES).astype(f"u{size // 8}"), mask)

    return operation


def make_rank(statement, program):
    """`getctarank`: whose shared memory an address is in."""
    window, (target, address) = _window(statement), statement.operands
    address_of = reader(program, address, f"b{_size(statement)}")

    def operation(warp, mask):
        ranks = _ranks(warp, address_of(warp).astype(np.int64) - window, mask)
        write(warp, target, ranks.astype(np.uint32), mask)

    return operation


def _ranks(warp, addresses, mask):
    """Whose these addresses in the cluster's shared memory are. Raises IndexError."""
    ranks, count = addresses // RANK_BYTES, len(warp.block.cluster.blocks)
    nobodys = mask & ((ranks < 0) | (ranks >= count))
    if nobodys.any():
        raise IndexError(f"{int(addresses[nobodys][0]):#x} is no address in shared memory")
    return ranks


def _window(statement) -> int:
    """Where the cluster's shared memory begins among addresses of the statement's kind."""
    return 0 if _SPACES[1] in statement.opcode else SHARED_WINDOW


def _size(statement) -> int:
    """Bits of an address. Raises UnknownError."""
    name = statement.opcode.split(".")[0]
    for size in (32, 64):
        if statement.opcode in [f"{name}{space}.u{size}" for space in _SPACES]:
            return size
    raise UnknownError(f"the executor does not know {statement.opcode}")
