"""One-lane instructions on their way to Python: what they read, and what they write."""

from collections.abc import Callable

import numpy as np

from numflash.executor.arithmetic import i8
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
    check_operands,
)
from numflash.executor.types import BITS, DTYPES, bits_of, filled, name_of


class Sources:
    """Operands that instructions read, as Python.

    Args:
        register_types: of an entry.
        address_of: gives the address of a variable or parameter by its name.
        in_window: variables whose addresses are those in the window of a block: see `memory`.
    """

    def __init__(
        self,
        register_types: list[str],
        address_of: Callable[[str], int],
        in_window: frozenset[str],
    ):
        self.register_types, self.address_of = register_types, address_of
        self.in_window = in_window
        self.constants: list[np.ndarray] = []
        self._numbers: dict[tuple, int] = {}

    def constant(self, bits: int, dtype) -> str:
        """An array of 32 times the same value, given by its bits."""
        bits &= 256**dtype.itemsize - 1
        key = bits, dtype
        if key not in self._numbers:
            self._numbers[key] = len(self.constants)
            self.constants.append(filled(bits, dtype))
        return f"K[{self._numbers[key]}]"

    def value(self, operand, type_: str) -> str:
        """An operand as an array of a type."""
        if type_ == "pred":
            return self.predicate(operand)
        dtype = DTYPES[type_]
        bits = BITS[dtype.itemsize]
        if isinstance(operand, Immediate):
            return self.constant(bits_of(operand, type_), dtype)
        if isinstance(operand, Symbol):
            return self._address(operand, 0, dtype)
        if isinstance(operand, Special):
            if operand.name not in NAMES:
                raise UnknownError(
                    f"{operand.name} is not declared, nor a special register that the executor "
                    "knows"
                )
            text, size = f"w.special({operand.name!r})", 4
        elif isinstance(operand, Register) and not operand.negated:
            text = f"R[{operand.number}]"
            size = TYPE_BYTES[self.register_types[operand.number]]
        else:
            raise UnknownError(f"{operand} as a .{type_}")
        if size != dtype.itemsize:
            # Wider types go into narrower registers nowhere; a narrower value is the low part.
            if size < dtype.itemsize and not isinstance(operand, Special):
                raise UnknownError(f"a register of {8 * size} bits as a .{type_}")
            text += f".astype(a.{name_of(bits)})"
        return text if bits == dtype else f"{text}.view(a.{name_of(dtype)})"

    def predicate(self, operand) -> str:
        """An operand as an array of booleans."""
        if isinstance(operand, Immediate):
            return "TRUE" if operand.integer() else "FALSE"
        if not isinstance(operand, Register) or self.register_types[operand.number] != "pred":
            raise UnknownError(f"{operand} as a predicate")
        return f"(~R[{operand.number}])" if operand.negated else f"R[{operand.number}]"

    def addresses(self, memory: Memory) -> str:
        """The addresses of a memory operand, int64."""
        base = memory.base
        if isinstance(base, Symbol):
            return self._address(base, memory.offset, i8)
        if isinstance(base, Immediate):
            return self.constant(base.integer() + memory.offset, i8)
        bits = 8 * TYPE_BYTES[self.register_types[base.number]]
        text = f"{self.value(base, f'b{bits}')}.astype(a.i8)"
        return f"({text}+{memory.offset})" if memory.offset else text

    def _address(self, symbol: Symbol, offset: int, dtype) -> str:
        """The address of a variable or parameter, and bytes behind it."""
        address = self.constant(self.address_of(symbol.name) + symbol.offset + offset, dtype)
        return f"({address}+w.block.window)" if symbol.name in self.in_window else address


class Making:
    """One statement on its way to Python.

    Attributes:
        modifiers, types: the parts of its opcode after the name.
        mask: Python for the lanes that execute it; None for all.
    """

    def __init__(self, sources: Sources, statement, modifiers, types, mask):
        self.sources, self.statement, self.mask = sources, statement, mask
        self.opcode, self.operands = statement.opcode, statement.operands
        self.modifiers, self.types = modifiers, types

    def check_operands(self, count: int) -> None:
        """Raise PtxError unless the statement has so many operands."""
        check_operands(self.statement, count)

    def has(self, modifier: str) -> bool:
        """Whether the opcode has a modifier."""
        return modifier in self.modifiers

    def first_of(self, choices):
        """The first modifier among `choices`, or None."""
        return next((m for m in self.modifiers if m in choices), None)

    def source(self, index: int, type_: str | None = None) -> str:
        """An operand as an array of a type, of the last that the opcode names by default."""
        return self.sources.value(self.operands[index], type_ or self.types[-1])

    def put(self, value: str, type_: str, target=None) -> list[str]:
        """Write an array of a type to the first operand, or another."""
        target = self.operands[0] if target is None else target
        if isinstance(target, Nothing):
            return []
        if not isinstance(target, Register):
            raise UnknownError(f"{getattr(target, 'name', target)} is no declared register")
        given = self.sources.register_types[target.number]
        if type_ != "pred":
            value = self._as_bits(value, type_, TYPE_BYTES[given])
        elif given != "pred":
            raise UnknownError(f"a predicate into a register of .{given}")
        register = f"R[{target.number}]"
        if self.mask is None:
            return [f"{register}={value}"]
        return [f"{register}=where({self.mask},{value},{register})"]

    def _as_bits(self, value: str, type_: str, size: int) -> str:
        dtype = DTYPES[type_]
        if not size or dtype.itemsize > size:
            raise UnknownError(f"a .{type_} into a register of {8 * size} bits")
        if dtype.itemsize == size:
            return value if dtype == BITS[size] else f"{value}.view(a.{name_of(BITS[size])})"
        if dtype.kind == "i":
            return f"{value}.astype(a.i{size}).view(a.u{size})"
        if dtype.kind != "u":
            value = f"{value}.view(a.{name_of(BITS[dtype.itemsize])})"
        return f"{value}.astype(a.u{size})"


class Makers(dict[str, tuple[Callable, tuple[int, ...], frozenset]]):
    """By the name of an instruction: what makes its lines, and what it knows.

    That is how many operands it may have, and its modifiers.
    """

    def of(self, names: str, operands: int | tuple[int, ...], modifiers: str = ""):
        """Enter a function of a `Making` for these instructions."""
        counts = (operands,) if isinstance(operands, int) else operands

        def enter(make):
            for name in names.split():
                self[name] = make, counts, frozenset(modifiers.split())
            return make

        return enter
