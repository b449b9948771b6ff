"""Atomic operations: `atom` and `red`. Lanes that meet come one after the other, in any order."""

import numpy as np

from numflash.executor.arithmetic import flushed
from numflash.executor.memory import space_of
from numflash.executor.operands import address_reader, items, reader, write
from numflash.executor.reductions import NAMES, reduction
from numflash.executor.text import TYPE_BYTES, Memory, UnknownError, check_operands

_LANES = np.arange(32)
_SPACES = ("global", "shared", "shared::cta", "shared::cluster")
_SCOPES = ("cta", "cluster", "gpu", "sys")
_ORDERS = {
    "atom": ("relaxed", "acquire", "release", "acq_rel"),
    "red": ("relaxed", "release"),
}
_MEANING = {
    "acquire": ("acquire",),
    "release": ("release",),
    "acq_rel": ("acquire", "release"),
}
_VECTORS = ("v2", "v4", "v8")


def make_atomic(statement, program):
    """The operation of an `atom` or `red`."""
    head, *parts = statement.opcode.split(".")
    name = next((part for part in parts if part in NAMES), None)
    type_ = parts[-1]
    known = (name, type_, "noftz", "L2::cache_hint", *_ORDERS[head], *_SPACES, *_SCOPES, *_VECTORS)
    wrong = [part for part in parts if part not in known]
    if name is None or type_ not in TYPE_BYTES or wrong:
        because = f": .{wrong[0]}" if wrong else ""
        raise UnknownError(f"the executor does not know {statement.opcode}{because}")
    dtype, function = reduction(name, type_, "noftz" in parts)
    space = next((p.removesuffix("::cta") for p in parts if p in _SPACES), "generic")
    vector = next((int(part[1]) for part in parts if part in _VECTORS), 1)
    in_shared, too_many = space.startswith("shared"), TYPE_BYTES[type_] * vector > 16
    if vector > 1 and (in_shared or too_many or dtype.kind in "iu"):
        raise UnknownError(f"there is no {statement.opcode}: vectors are floats in global memory")
    has_result, has_policy = head == "atom", "L2::cache_hint" in parts
    check_operands(statement, has_result + 2 + (name == "cas") + has_policy)
    memory, *values = statement.operands[has_result : -1 if has_policy else None]
    if not isinstance(memory, Memory):
        raise UnknownError(f"{statement.opcode} wants [an address] before its values")
    for operand in (*values, *statement.operands[:has_result]):
        if len(items(operand)) != vector:
            raise UnknownError(
                f"{statement.opcode} wants {vector} registers, there are {len(items(operand))}"
            )
    size = TYPE_BYTES[type_]
    bits = f"b{8 * size}"
    address_of = address_reader(program, memory)
    readers = [[reader(program, item, bits) for item in items(value)] for value in values]
    flushes = (name, type_) == ("add", "f32")
    orders = [] if "cta" in parts else [o for p in parts for o in _MEANING.get(p, ())]

    def update(warp, addresses, given, mask):
        """Operate in lanes none of which meets another; what was held there."""
        at = int(addresses[mask][0])
        is_global = (space if space != "generic" else space_of(at)[0]) == "global"
        follows = is_global and orders and warp.block.writes
        if follows and "acquire" in orders:
            warp.tell("acquire", addresses, size * vector, mask)
        held = warp.load(space, addresses, size, vector, mask, "none")
        # PTX ISA 9.7.13.5: sums of float32 in global memory flush subnormal numbers.
        flush = flushes and is_global
        after = []
        for number, old in enumerate(held):
            # Lanes that take no part have any numbers.
            terms = [old.view(dtype), *(value[number].view(dtype) for value in given)]
            terms = [flushed(term) for term in terms] if flush else terms
            with np.errstate(all="ignore"):
                new = function(*terms)
            after.append((flushed(new) if flush else new).view(old.dtype))
        warp.store(space, addresses, size, after, mask, "none")
        if follows and "release" in orders:
            warp.tell("release", addresses, size * vector, mask)
        changed = any((x != y)[mask].any() for x, y in zip(held, after, strict=True))
        if changed:
            warp.block.something_happened()
        return held

    def operation(warp, mask):
        addresses = address_of(warp)
        given = [[read(warp) for read in of_value] for of_value in readers]
        lanes = np.flatnonzero(mask)
        if np.unique(addresses[lanes]).size == lanes.size:
            before = update(warp, addresses, given, mask)
        else:
            before = [np.zeros(32, f"u{size}") for _ in range(vector)]
            for lane in sorted(lanes, key=lambda lane: warp.block.random()):
                only = lane == _LANES
                for own, held in zip(before, update(warp, addresses, given, only), strict=True):
                    own[lane] = held[lane]
        if has_result:
            for register, held in zip(items(statement.operands[0]), before, strict=True):
                write(warp, register, held, mask)

    return operation
