"""Operands of instructions that lanes execute together, read from and written to a warp."""

from collections.abc import Callable

import numpy as np

from numflash.executor.memory import SHARED_WINDOW
from numflash.executor.special_registers import NAMES
from numflash.executor.text import (
    TYPE_BYTES,
    Immediate,
    Memory,
    Nothing,
    Register,
    Special,
    Symbol,
    UnknownError,
    Vector,
)
from numflash.executor.types import BITS, DTYPES, bits_of, filled

WAITS = object()
"""The result of an operation that cannot go on now."""


def reader(program, operand, type_: str) -> Callable:
    """A function of a warp that gives an operand as an array of a type, shape (32,)."""
    if type_ == "pred":
        return _predicate_reader(program, operand)
    dtype = DTYPES[type_]
    if isinstance(operand, Register) and not operand.negated:
        number = operand.number
        size = TYPE_BYTES[program.entry.register_types[number]]
        if size == dtype.itemsize:
            return lambda warp: warp.registers[number].view(dtype)
        if size > dtype.itemsize:
            return lambda warp: warp.registers[number].astype(BITS[dtype.itemsize]).view(dtype)
        if size and dtype.kind == "u":
            return lambda warp: warp.registers[number].astype(dtype)
    elif isinstance(operand, Immediate):
        constant = filled(bits_of(operand, type_) & 256**dtype.itemsize - 1, dtype)
        return lambda warp: constant
    elif isinstance(operand, Symbol):
        constant = filled(program.address_of(operand.name) + operand.offset, dtype)
        if operand.name in program.in_window:
            return lambda warp: constant + dtype.type(warp.block.window)
        return lambda warp: constant
    elif isinstance(operand, Special) and operand.name in NAMES:
        return lambda warp: warp.special(operand.name).astype(BITS[dtype.itemsize]).view(dtype)
    raise UnknownError(f"{operand} as a .{type_}")


def _predicate_reader(program, operand) -> Callable:
    if isinstance(operand, Immediate):
        constant = np.full(32, bool(operand.integer()))
        return lambda warp: constant
    is_register = isinstance(operand, Register)
    if not is_register or program.entry.register_types[operand.number] != "pred":
        raise UnknownError(f"{operand} as a predicate")
    number = operand.number
    if operand.negated:
        return lambda warp: ~warp.registers[number]
    return lambda warp: warp.registers[number]


def address_reader(program, memory: Memory) -> Callable:
    """A function of a warp that gives the addresses, int64, of a memory operand."""
    if not isinstance(memory, Memory):
        raise UnknownError(f"{memory} as an address")
    base, offset = reader(program, memory.base, "u64"), memory.offset
    return lambda warp: base(warp).astype(np.int64) + offset


def shared_address_reader(program, memory: Memory) -> Callable:
    """As `address_reader`, of shared memory, also where the address is a generic one."""
    addresses = address_reader(program, memory)

    def read(warp):
        found = addresses(warp)
        return np.where(found >= SHARED_WINDOW, found - SHARED_WINDOW, found)

    return read


def items(operand) -> tuple:
    """The registers of a vector, or of a single one."""
    return operand.items if isinstance(operand, Vector) else (operand,)


def write(warp, operand, values: np.ndarray, mask: np.ndarray) -> None:
    """Write (32,) values to a register in the lanes of a mask."""
    if isinstance(operand, Nothing):
        return
    number = operand.number
    size = TYPE_BYTES[warp.program.entry.register_types[number]]
    if size:
        values = np.ascontiguousarray(values)
        values = values.view(BITS[values.dtype.itemsize]).astype(BITS[size])
    registers = warp.registers
    registers[number] = values if mask.all() else np.where(mask, values, registers[number])


def are_here(warp, mask: np.ndarray, lanes: np.ndarray | None = None) -> bool:
    """Whether all lanes of `lanes`, all by default, that have not returned are in the mask."""
    needed = warp.alive if lanes is None else warp.alive & lanes
    if (needed & ~mask).any():
        warp.group.waits_for = "the other lanes of its warp"
        return False
    return True


def lanes_of(member_mask) -> np.ndarray:
    """(32,) the lanes that the bits of a member mask name."""
    return (int(member_mask) >> np.arange(32) & 1).astype(bool)


def bits_of_lanes(lanes: np.ndarray) -> int:
    """The member mask of lanes."""
    return int(lanes.astype(np.uint64) @ (np.uint64(1) << np.arange(32, dtype=np.uint64)))
