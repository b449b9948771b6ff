"""Instructions that lanes or warps execute together, and those that wait.

An operation is a function of the warp and the mask of lanes that execute it. It returns WAITS
where it cannot go on, having changed nothing but its group's `state`, and is then called again.
What is not here comes from the bodies of `numflash.ptx`, `bodies`, or from `copies`.
"""

from collections.abc import Callable

import numpy as np

from numflash.executor import bodies
from numflash.executor.atomics import make_atomic
from numflash.executor.cluster_operations import make_cluster_barrier, make_mapa, make_rank
from numflash.executor.copies import copy_operation
from numflash.executor.operands import (
    WAITS,
    are_here,
    bits_of_lanes,
    lanes_of,
    reader,
    shared_address_reader,
    write,
)
from numflash.executor.text import (
    Immediate,
    Nothing,
    Pair,
    Statement,
    UnknownError,
    check_operands,
)
from numflash.executor.types import DTYPES
from numflash.ptx import INSTRUCTIONS
from numflash.simulator.bulk_copies import BulkCopies
from numflash.simulator.engine import become
from numflash.simulator.errors import SimulationError
from numflash.simulator.mbarriers import Mbarriers
from numflash.simulator.register_pool import RegisterPool

_LANES = np.arange(32)


def make_operation(statement: Statement, program) -> Callable:
    """The operation of a statement. Raises UnknownError, PtxError."""
    opcode = statement.opcode
    for name, (make, counts) in _OPERATIONS.items():
        if opcode == name or opcode.startswith(name + "."):
            if counts:
                check_operands(statement, *counts)
            return make(statement, program)
    operation = bodies.body_operation(statement, program) or copy_operation(statement, program)
    if operation is None:
        bodies.refuse(statement)
    return operation


def _refuse_other(statement: Statement, *known: str) -> None:
    """Refuse an opcode that is none of `known`."""
    if statement.opcode not in known:
        raise UnknownError(f"the executor does not know {statement.opcode}")


# Barriers


class NamedBarrier:
    """One of a block's 16 barriers.

    `expected` is None where it is for all threads of the block.
    """

    def __init__(self):
        self.arrived, self.expected, self.generation = 0, None, 0

    def arrive(self, number: int, expected: int | None) -> int:
        """One warp comes; the generation that it waits for the end of."""
        if not self.arrived:
            self.expected = expected
        elif self.expected != expected:
            raise SimulationError(
                f"named barrier {number}: one warp counts {self.expected or 'all'} threads, "
                f"another {expected or 'all'}"
            )
        self.arrived += 32
        return self.generation

    def has_ended(self, generation: int, block) -> bool:
        """Whether this generation is over; ends it where all have come."""
        if self.generation == generation and self.arrived >= (self.expected or block.live):
            self.arrived = 0
            self.generation += 1
            block.something_happened()
        return self.generation != generation


def _barrier(statement, program):
    opcode, operands = statement.opcode, statement.operands
    _refuse_other(
        statement,
        *("bar.sync", "bar.arrive", "bar.cta.sync", "bar.cta.arrive"),
        *("barrier.sync", "barrier.arrive", "barrier.cta.sync", "barrier.cta.arrive"),
        *("barrier.sync.aligned", "barrier.arrive.aligned"),
        *("barrier.cta.sync.aligned", "barrier.cta.arrive.aligned"),
    )
    waits = "arrive" not in opcode
    number_of = reader(program, operands[0], "u32")
    count_of = reader(program, operands[1], "u32") if len(operands) > 1 else None
    if not waits and count_of is None:
        raise UnknownError(f"{opcode} without a count")

    def operation(warp, mask):
        block, group = warp.block, warp.group
        if group.state is None:
            if not are_here(warp, mask):
                return WAITS
            number = int(number_of(warp)[mask][0])
            count = None if count_of is None else int(count_of(warp)[mask][0])
            if number > 15 or (count is not None and (count % 32 or not 0 < count <= 1024)):
                raise SimulationError(
                    f"named barrier {number} with {count} threads: the number must be 0 to 15, "
                    "the count a multiple of 32"
                )
            barrier = block.barriers.setdefault(number, NamedBarrier())
            group.state = barrier, barrier.arrive(number, count)
            block.something_happened()
        barrier, generation = group.state
        if barrier.has_ended(generation, block) or not waits:
            return None
        expected = barrier.expected or block.live
        group.waits_for = f"a named barrier: {barrier.arrived} of {expected} threads came"
        return WAITS

    return operation


def _warp_barrier(statement, program):
    _refuse_other(statement, "bar.warp.sync")
    members_of = reader(program, statement.operands[0], "u32")

    def operation(warp, mask):
        return None if are_here(warp, mask, lanes_of(members_of(warp)[mask][0])) else WAITS

    return operation


# Lanes of a warp


def _shuffle(statement, program):
    _, _, mode, type_ = statement.opcode.split(".")
    if mode not in ("up", "down", "bfly", "idx") or type_ != "b32":
        raise UnknownError(statement.opcode)
    target, *sources = statement.operands
    value_of, offset_of, clamp_of, members_of = (reader(program, s, "u32") for s in sources)

    def operation(warp, mask):
        members = lanes_of(members_of(warp)[mask][0])
        if not are_here(warp, mask, members):
            return WAITS
        offset = offset_of(warp).astype(np.int64) & 31
        clamp = clamp_of(warp).astype(np.int64)
        segment, clamp = clamp >> 8 & 31, clamp & 31
        last, first = _LANES & segment | clamp & ~segment, _LANES & segment
        origin, inside = {
            "up": lambda: (_LANES - offset, _LANES - offset >= last),
            "down": lambda: (_LANES + offset, _LANES + offset <= last),
            "bfly": lambda: (_LANES ^ offset, _LANES ^ offset <= last),
            "idx": lambda: (first | offset & ~segment, (first | offset & ~segment) <= last),
        }[mode]()
        origin = np.where(inside, origin, _LANES)
        # The value of a lane that takes no part is not defined: all ones here.
        given = (members & mask)[origin]
        values = np.where(given, value_of(warp)[origin], np.uint32(0xFFFFFFFF))
        if isinstance(target, Pair):
            write(warp, target.first, values, mask)
            write(warp, target.second, inside, mask)
        else:
            write(warp, target, values, mask)
        return None

    return operation


def _vote(statement, program):
    _, _, mode, _ = statement.opcode.split(".")
    if mode not in ("all", "any", "uni", "ballot"):
        raise UnknownError(statement.opcode)
    target, source, members = statement.operands
    value_of, members_of = reader(program, source, "pred"), reader(program, members, "u32")

    def operation(warp, mask):
        members = lanes_of(members_of(warp)[mask][0])
        if not are_here(warp, mask, members):
            return WAITS
        votes = value_of(warp)[members & mask]
        if mode == "ballot":
            result = np.uint32(bits_of_lanes(value_of(warp) & members & mask))
        else:
            same = votes.all() or not votes.any()
            result = {"all": votes.all(), "any": votes.any(), "uni": same}[mode]
        write(warp, target, np.full(32, result), mask)
        return None

    return operation


_REDUCTIONS = {
    **{"add": np.add, "min": np.minimum, "max": np.maximum},
    **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor},
}


def _reduce(statement, program):
    _, _, name, type_ = statement.opcode.split(".")
    if name not in _REDUCTIONS or type_ not in ("u32", "s32", "b32"):
        raise UnknownError(statement.opcode)
    target, source, members = statement.operands
    value_of, members_of = reader(program, source, type_), reader(program, members, "u32")

    def operation(warp, mask):
        members = lanes_of(members_of(warp)[mask][0])
        if not are_here(warp, mask, members):
            return WAITS
        result = _REDUCTIONS[name].reduce(value_of(warp)[members & mask])
        write(warp, target, np.full(32, result, DTYPES[type_]), mask)
        return None

    return operation


def _elect(statement, program):
    _refuse_other(statement, "elect.sync")
    target, members = statement.operands
    members_of = reader(program, members, "u32")

    def operation(warp, mask):
        members = lanes_of(members_of(warp)[mask][0])
        if not are_here(warp, mask, members):
            return WAITS
        become(warp.threads[0])
        elected = INSTRUCTIONS["elect_sync"].body().astype(bool)
        if not (elected & members & mask).any():
            elected = np.flatnonzero(members & mask)[0] == _LANES
        write(warp, target.first, np.full(32, np.flatnonzero(elected)[0], np.uint32), mask)
        write(warp, target.second, elected, mask)
        return None

    return operation


def _active_mask(statement, program):
    _refuse_other(statement, "activemask.b32")

    def operation(warp, mask):
        write(warp, statement.operands[0], np.full(32, bits_of_lanes(mask), np.uint32), mask)

    return operation


# Waiting for copies and registers


def _try_wait(statement, program):
    _refuse_other(
        statement,
        *(
            f"mbarrier.{name}.parity.{order}{space}b64"
            for name in ("try_wait", "test_wait")
            for order in ("", "acquire.cta.", "acquire.cluster.")
            for space in ("shared::cta.", "shared.", "")
        ),
    )
    target, memory, parity = statement.operands[:3]
    address_of, parity_of = (
        shared_address_reader(program, memory),
        reader(program, parity, "u32"),
    )
    suspends = "try_wait" in statement.opcode

    def operation(warp, mask):
        block = warp.block
        addresses, parities = address_of(warp), parity_of(warp)
        ended = np.zeros(32, bool)
        copies = block.part(BulkCopies)
        for lane in np.flatnonzero(mask):
            become(warp.threads[lane])
            index = block.mbarrier_index(int(addresses[lane]))
            ended[lane] = copies.test(block.mbarriers, index, int(parities[lane]))
        if suspends and not ended[mask].all() and not block.may_fail():
            lane = np.flatnonzero(mask & ~ended)[0]
            index = block.mbarrier_index(int(addresses[lane]))
            barrier = block.part(Mbarriers).find(block.mbarriers, index)
            warp.group.waits_for = f"parity {parities[lane]} of {barrier.what_it_lacks()}"
            return WAITS
        write(warp, target, ended, mask)
        return None

    return operation


def _arrive(statement, program):
    """Its result, a phase, is for waits that the executor does not know: it is not written."""
    _refuse_other(
        statement,
        *(
            f"mbarrier.arrive.{expects}{order}{space}b64"
            for expects in ("", "expect_tx.")
            for order in ("", "release.cta.", "release.cluster.")
            for space in ("shared::cta.", "shared::cluster.", "shared.", "")
        ),
    )
    _, memory, *counts = statement.operands
    address_of = shared_address_reader(program, memory)
    count_of = reader(program, counts[0], "u32") if counts else None
    expects, anywhere = ("expect_tx" in statement.opcode, "shared::cluster" in statement.opcode)
    if expects:
        check_operands(statement, 3)
    if anywhere and not isinstance(statement.operands[0], Nothing):
        raise UnknownError(f"{statement.opcode} tells nothing of the phase: it wants _ before")

    def operation(warp, mask):
        addresses = address_of(warp)
        counts = np.ones(32, np.uint32) if count_of is None else count_of(warp)
        for lane in np.flatnonzero(mask):
            become(warp.threads[lane])
            address, count = int(addresses[lane]), int(counts[lane])
            block = warp.block.whose(address, statement.opcode) if anywhere else warp.block
            mbarriers = block.part(Mbarriers)
            barrier = mbarriers.find(block.mbarriers, block.mbarrier_index(address))
            if expects:
                mbarriers.arrive_at(barrier, count)
                continue
            if count > max(barrier.pending, 1):
                raise SimulationError(
                    f"{barrier}: {count} arrivals at once, the phase lacks {barrier.pending}"
                )
            for _ in range(count):
                mbarriers.arrive_at(barrier)
        warp.block.something_happened()

    return operation


def _setmaxnreg(statement, program):
    actions = [f"setmaxnreg.{action}.sync.aligned.u32" for action in ("inc", "dec")]
    _refuse_other(statement, *actions)
    action, registers = statement.opcode.split(".")[1], statement.operands[0]
    if not isinstance(registers, Immediate):
        raise UnknownError(statement.opcode)

    def operation(warp, mask):
        pool = warp.block.part(RegisterPool)
        if warp.group.state is None:
            if not are_here(warp, mask):
                return WAITS
            become(warp.threads[0])
            pool.ask(action, registers.integer())
            warp.group.state = "asked"
            warp.block.something_happened()
        if pool.has_what_it_asked_for(warp.number):
            return None
        warp.group.waits_for = f"{registers.text} registers a thread"
        return WAITS

    return operation


def _invalidate(statement, program):
    _refuse_other(statement, "mbarrier.inval.shared::cta.b64", "mbarrier.inval.shared.b64")
    address_of = shared_address_reader(program, statement.operands[0])

    def operation(warp, mask):
        block, addresses = warp.block, address_of(warp)
        for lane in np.flatnonzero(mask):
            index = block.mbarrier_index(int(addresses[lane]))
            block.part(Mbarriers).invalidate(block.mbarriers, index)

    return operation


def _fence_proxy(statement, program):
    """Of stores to shared memory, of what was acquired from global memory, or of both."""
    spaces = ("", ".global", ".shared::cta", ".shared::cluster")
    _refuse_other(statement, *(f"fence.proxy.async{space}" for space in spaces))
    space = statement.opcode.removeprefix("fence.proxy.async")
    shared, of_global = (
        INSTRUCTIONS[f"fence_proxy_async{suffix}"].body for suffix in ("", "_global")
    )
    fences = [shared] if space != ".global" else []
    fences += [of_global] if space in ("", ".global") else []

    def operation(warp, mask):
        for lane in np.flatnonzero(mask):
            become(warp.threads[lane])
            for fence in fences:
                fence()
        warp.block.something_happened()

    return operation


# The rest


def _trap(statement, program):
    def operation(warp, mask):
        raise SimulationError("the kernel has trapped")

    return operation


def _nothing(*opcodes: str):
    """Orders memory, or is a hint: memory is always in order here."""

    def make(statement, program):
        _refuse_other(statement, *opcodes)
        return lambda warp, mask: None

    return make


_FENCES = [
    *(f"membar.{scope}" for scope in ("cta", "gl", "sys")),
    *(
        f"fence.{order}.{scope}"
        for order in ("acq_rel", "sc", "acquire", "release")
        for scope in ("cta", "cluster", "gpu", "sys")
    ),
]
_OPERATIONS = {
    "bar.warp": (_warp_barrier, (1,)),
    "bar": (_barrier, (1, 2)),
    "barrier.cluster": (make_cluster_barrier, (0,)),
    "barrier": (_barrier, (1, 2)),
    "mapa": (make_mapa, (3,)),
    "getctarank": (make_rank, (2,)),
    "shfl.sync": (_shuffle, (5,)),
    "vote.sync": (_vote, (3,)),
    "redux.sync": (_reduce, (3,)),
    "elect": (_elect, (2,)),
    "activemask": (_active_mask, (1,)),
    "mbarrier.try_wait": (_try_wait, (3, 4)),
    "mbarrier.test_wait": (_try_wait, (3,)),
    "mbarrier.arrive": (_arrive, (2, 3)),
    "mbarrier.inval": (_invalidate, (1,)),
    "setmaxnreg": (_setmaxnreg, (1,)),
    "atom": (make_atomic, None),
    "red": (make_atomic, None),
    "trap": (_trap, (0,)),
    "membar": (_nothing(*_FENCES), (0,)),
    "fence.proxy.async": (_fence_proxy, (0,)),
    **{name.rpartition(".")[0]: (_nothing(*_FENCES), (0,)) for name in _FENCES if "fence" in name},
    "nanosleep": (_nothing("nanosleep.u32"), (1,)),
    "griddepcontrol": (
        _nothing("griddepcontrol.wait", "griddepcontrol.launch_dependents"),
        (0,),
    ),
}
"""By the beginning of an opcode: what makes its operation, and how many operands it may have.

None where that depends on the rest of the opcode.
"""
