"""Instructions of one lane as lines of Python over the 32 lanes of a warp.

A register holds bits: an unsigned array of its size, shape (32,), or of booleans for a predicate;
instructions view them as the type that they name. Arrays are never changed in place, so that a
move is a reference. Generated code knows

    R     the warp's registers, by number
    M     the mask of lanes that execute it, where not all do
    K     constants
    w     the warp: its memory and its special registers
    a     the module `arithmetic`

and what is not in the tables below is refused by its name: `UnknownError`.
"""

import struct
from collections.abc import Callable

import numpy as np

from numflash.executor.arithmetic import bf2, f2, f4, f8, i1, i2, i4, i8, u1, u2, u4, u8
from numflash.executor.special_registers import NAMES
from numflash.executor.text import (
    TYPE_BYTES,
    Immediate,
    Memory,
    Nothing,
    Pair,
    Register,
    Special,
    Statement,
    Symbol,
    Vector,
)
from numflash.runtime.errors import UnsupportedError

LANES = 32
DTYPES = {
    **{"b8": u1, "u8": u1, "s8": i1, "b16": u2, "u16": u2, "s16": i2},
    **{"b32": u4, "u32": u4, "s32": i4, "b64": u8, "u64": u8, "s64": i8},
    **{"f16": f2, "bf16": bf2, "f32": f4, "f64": f8},
    **{"f16x2": u4, "bf16x2": u4, "tf32": u4, "e4m3x2": u2, "e5m2x2": u2},
}
BITS = {1: u1, 2: u2, 4: u4, 8: u8}
_PAIRS = {"f16x2": f2, "bf16x2": bf2}
_HALVES = ("f16", "bf16")
_WIDE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


class UnknownError(UnsupportedError):
    """An instruction that the executor does not know."""


class OneLane:
    """Makes lines of one-lane instructions.

    Args:
        register_types: of an entry.
        address_of: gives the address of a variable or parameter by its name.
    """

    def __init__(self, register_types: list[str], address_of: Callable[[str], int]):
        self.register_types, self.address_of = register_types, address_of
        self.constants: list[np.ndarray] = []
        self._numbers: dict[tuple, int] = {}

    def lines(self, statement: Statement, mask: str | None) -> list[str]:
        """Python for a statement, executed by the lanes of `mask`, by all where it is None.

        Raises:
            UnknownError: there is no such instruction, or not in this form.
        """
        head, *parts = statement.opcode.split(".")
        known = _INSTRUCTIONS.get(head)
        if known is None:
            raise UnknownError(f"the executor does not know {statement.opcode}")
        make, allowed = known
        types = [part for part in parts if part in TYPE_BYTES]
        modifiers = [part for part in parts if part not in TYPE_BYTES]
        if refused := [part for part in modifiers if part not in allowed]:
            raise UnknownError(f"the executor does not know {statement.opcode}: .{refused[0]}")
        try:
            return make(_Making(self, statement, modifiers, types, mask))
        except (IndexError, KeyError, ValueError, AttributeError) as error:
            # A table above has no such type, or the operands are of another kind.
            raise UnknownError(
                f"the executor does not know {statement.opcode} with these operands ({error!r})"
            ) from error

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
            return self.constant(self.address_of(operand.name) + operand.offset, dtype)
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
            text += f".astype(a.{_name(bits)})"
        return text if bits == dtype else f"{text}.view(a.{_name(dtype)})"

    def predicate(self, operand) -> str:
        """An operand as an array of booleans."""
        if isinstance(operand, Immediate):
            return "TRUE" if operand.integer() else "FALSE"
        if not isinstance(operand, Register) or self.register_types[operand.number] != "pred":
            raise UnknownError(f"{operand} as a predicate")
        return f"(~R[{operand.number}])" if operand.negated else f"R[{operand.number}]"


class _Making:
    """One statement on its way to Python."""

    def __init__(self, maker: OneLane, statement, modifiers, types, mask):
        self.maker, self.operands, self.mask = maker, statement.operands, mask
        self.opcode, self.modifiers, self.types = statement.opcode, modifiers, types

    def has(self, modifier: str) -> bool:
        return modifier in self.modifiers

    def first_of(self, choices):
        """The first modifier among `choices`, or None."""
        return next((m for m in self.modifiers if m in choices), None)

    def source(self, index: int, type_: str | None = None) -> str:
        return self.maker.value(self.operands[index], type_ or self.types[-1])

    def put(self, value: str, type_: str, target=None) -> list[str]:
        """Write an array of a type to the first operand, or another."""
        target = self.operands[0] if target is None else target
        if isinstance(target, Nothing):
            return []
        if not isinstance(target, Register):
            raise UnknownError(f"{getattr(target, 'name', target)} is no declared register")
        given = self.maker.register_types[target.number]
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
            return value if dtype == BITS[size] else f"{value}.view(a.{_name(BITS[size])})"
        if dtype.kind == "i":
            return f"{value}.astype(a.i{size}).view(a.u{size})"
        if dtype.kind != "u":
            value = f"{value}.view(a.{_name(BITS[dtype.itemsize])})"
        return f"{value}.astype(a.u{size})"


_INSTRUCTIONS: dict[str, tuple[Callable, frozenset]] = {}


def _is(heads: str, modifiers: str = ""):
    """Register the maker of these instructions, and the modifiers that it knows."""

    def register(make):
        for head in heads.split():
            _INSTRUCTIONS[head] = make, frozenset(modifiers.split())
        return make

    return register


def is_one_lane(opcode: str) -> bool:
    """Whether instructions of this name act in one lane, and wait for nothing."""
    return opcode.split(".")[0] in _INSTRUCTIONS


def filled(bits: int, dtype) -> np.ndarray:
    """32 lanes of a value that is given by its bits."""
    array = np.full(LANES, bits, BITS[dtype.itemsize]).view(dtype)
    array.flags.writeable = False
    return array


def bits_of(operand: Immediate, type_: str) -> int:
    """The bits of a number in a type."""
    dtype, text = DTYPES[type_], operand.text
    negative, digits = text.startswith("-"), text.lstrip("-")
    if digits[:2] in ("0f", "0F"):
        bits = int(digits[2:], 16) ^ (negative << 31)
        return (
            bits
            if dtype.itemsize == 4
            else _float_bits(struct.unpack("<f", bits.to_bytes(4, "little"))[0], type_)
        )
    if digits[:2] in ("0d", "0D"):
        bits = int(digits[2:], 16) ^ (negative << 63)
        return (
            bits
            if dtype.itemsize == 8
            else _float_bits(struct.unpack("<d", bits.to_bytes(8, "little"))[0], type_)
        )
    if dtype.kind in "fV" or "." in digits:
        return _float_bits(float(text), type_)
    return operand.integer()


def _float_bits(value: float, type_: str) -> int:
    dtype = DTYPES[type_]
    return int(np.array(value, dtype).view(BITS[dtype.itemsize]))


def _name(dtype) -> str:
    return "bf2" if dtype == bf2 else f"{dtype.kind}{dtype.itemsize}"


# Arithmetic


def _elementwise(making: _Making, formula: str, n: int, float_formula: str | None = None):
    """{0}, {1}, ... are the sources; floats may have a formula of their own."""
    type_ = making.types[-1]
    formula = (float_formula or formula) if type_ in ("f32", "f64", *_HALVES, *_PAIRS) else formula
    if type_ in _PAIRS:
        dtype = f"a.{_name(_PAIRS[type_])}"
        sources = [f"a.halves({making.source(i + 1, 'b32')},{dtype})" for i in range(n)]
        return making.put(f"a.paired({formula.format(*sources)},{dtype})", "b32")
    sources = [making.source(i + 1) for i in range(n)]
    if type_ in _HALVES:
        sources = [f"{source}.astype(a.f4)" for source in sources]
        return making.put(f"a.half({formula.format(*sources)},a.{_name(DTYPES[type_])})", type_)
    value = formula.format(*sources)
    if type_ == "f32":
        if not value.startswith(("a.maximum", "a.minimum", "a.fused", "a.exp2")):
            value = f"a.number({value})"
        if making.has("ftz"):
            value = f"a.flushed({value})"
        if making.has("sat"):
            value = f"a.saturated({value})"
    elif making.has("ftz") or making.has("sat"):
        raise UnknownError(making.opcode)
    return making.put(value, type_)


@_is("add", "rn ftz sat")
def _add(making):
    return _elementwise(making, "({}+{})", 2)


@_is("sub", "rn ftz sat")
def _sub(making):
    return _elementwise(making, "({}-{})", 2)


@_is("min", "ftz")
def _min(making):
    return _elementwise(making, "np.minimum({},{})", 2, "a.minimum({},{})")


@_is("max", "ftz")
def _max(making):
    if len(making.operands) == 4:
        return _elementwise(making, "", 3, "a.maximum(a.maximum({},{}),{})")
    return _elementwise(making, "np.maximum({},{})", 2, "a.maximum({},{})")


@_is("mul", "rn ftz sat lo hi wide")
def _mul(making):
    if making.has("wide"):
        wide = _WIDE[making.types[-1]]
        cast = f".astype(a.{_name(DTYPES[wide])})"
        return making.put(f"({making.source(1)}{cast}*{making.source(2)}{cast})", wide)
    return _elementwise(making, "a.high_product({},{})" if making.has("hi") else "({}*{})", 2)


@_is("mad", "rn ftz sat lo hi wide")
def _mad(making):
    type_ = making.types[-1]
    if type_ in ("f32", "f64"):
        return _fma(making)
    if making.has("wide"):
        wide = _WIDE[type_]
        cast = f".astype(a.{_name(DTYPES[wide])})"
        product = f"{making.source(1)}{cast}*{making.source(2)}{cast}"
        return making.put(f"({product}+{making.source(3, wide)})", wide)
    product = "a.high_product({},{})" if making.has("hi") else "{}*{}"
    return _elementwise(making, f"({product}+{{}})", 3)


@_is("fma", "rn ftz sat")
def _fma(making):
    if making.types[-1] != "f32":
        raise UnknownError(f"{making.opcode}: the executor fuses float32 only")
    return _elementwise(making, "a.fused({},{},{})", 3)


@_is("div", "rn full approx ftz")
def _div(making):
    return _elementwise(making, "a.quotient({},{})", 2, "({}/{})")


@_is("rem")
def _rem(making):
    return _elementwise(making, "a.remainder({},{})", 2)


@_is("neg", "ftz")
def _neg(making):
    return _elementwise(making, "(-{})", 1)


@_is("abs", "ftz")
def _abs(making):
    return _elementwise(making, "np.abs({})", 1)


_FUNCTIONS = {
    "ex2": "a.exp2({})",
    "lg2": "np.log2({})",
    "rcp": "(1/{})",
    "sqrt": "np.sqrt({})",
    "rsqrt": "(1/np.sqrt({}))",
    "sin": "np.sin({})",
    "cos": "np.cos({})",
    "tanh": "np.tanh({})",
}


@_is(" ".join(_FUNCTIONS), "rn approx ftz")
def _function(making):
    if making.types[-1] != "f32":
        raise UnknownError(f"{making.opcode}: the executor knows it of float32 only")
    return _elementwise(making, _FUNCTIONS[making.opcode.split(".")[0]], 1)


@_is("copysign")
def _copysign(making):
    return making.put(f"np.copysign({making.source(2)},{making.source(1)})", making.types[-1])


# Bits


@_is("and or xor")
def _logic(making):
    symbol = {"and": "&", "or": "|", "xor": "^"}[making.opcode.split(".")[0]]
    return making.put(f"({making.source(1)}{symbol}{making.source(2)})", making.types[-1])


@_is("not")
def _not(making):
    return making.put(f"(~{making.source(1)})", making.types[-1])


@_is("shl")
def _shl(making):
    return making.put(
        f"a.shifted_left({making.source(1)},{making.source(2, 'u32')})", making.types[-1]
    )


@_is("shr")
def _shr(making):
    value = f"a.shifted_right({making.source(1)},{making.source(2, 'u32')})"
    return making.put(value, making.types[-1])


@_is("shf", "l r wrap clamp")
def _shf(making):
    sources = ",".join(making.source(i) for i in (1, 2, 3))
    return making.put(f"a.funnel({sources},{making.has('l')},{making.has('wrap')})", "b32")


@_is("lop3")
def _lop3(making):
    sources = ",".join(making.source(i, "b32") for i in (1, 2, 3))
    return making.put(f"a.looked_up({sources},{making.operands[4].integer()})", "b32")


@_is("prmt")
def _prmt(making):
    sources = ",".join(making.source(i, "b32") for i in (1, 2, 3))
    return making.put(f"a.permuted({sources})", "b32")


@_is("bfe")
def _bfe(making):
    counts = ",".join(making.source(i, "u32") for i in (2, 3))
    return making.put(f"a.extracted({making.source(1)},{counts})", making.types[-1])


@_is("bfi")
def _bfi(making):
    counts = ",".join(making.source(i, "u32") for i in (3, 4))
    value = f"a.inserted({making.source(1)},{making.source(2)},{counts})"
    return making.put(value, making.types[-1])


@_is("popc")
def _popc(making):
    return making.put(f"np.bitwise_count({making.source(1)}).astype(a.u4)", "u32")


@_is("clz")
def _clz(making):
    return making.put(f"a.leading_zeros({making.source(1)})", "u32")


@_is("brev")
def _brev(making):
    return making.put(f"a.reversed_bits({making.source(1)})", making.types[-1])


# Predicates and choices

_COMPARISONS = {
    **{"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="},
    **{"lo": "<", "ls": "<=", "hi": ">", "hs": ">="},
}
_UNORDERED = {name + "u": symbol for name, symbol in list(_COMPARISONS.items())[:6]}
_BOOLEAN = {"and": "&", "or": "|", "xor": "^"}


@_is("setp", " ".join([*_COMPARISONS, *_UNORDERED, *_BOOLEAN, "num", "nan", "ftz"]))
def _setp(making):
    type_ = making.types[-1]
    x, y = making.source(1), making.source(2)
    if type_ in _HALVES:
        x, y = f"{x}.astype(a.f4)", f"{y}.astype(a.f4)"
    if making.has("ftz"):
        x, y = f"a.flushed({x})", f"a.flushed({y})"
    comparison = making.modifiers[0]
    nan = f"(np.isnan({x})|np.isnan({y}))"
    if comparison in _UNORDERED:
        value = f"(({x}{_UNORDERED[comparison]}{y})|{nan})"
    elif comparison in ("num", "nan"):
        value = nan if comparison == "nan" else f"(~{nan})"
    else:
        value = f"({x}{_COMPARISONS[comparison]}{y})"
        if comparison == "ne" and DTYPES[type_].kind not in "iu":
            value = f"({value}&~{nan})"
    combined = making.first_of(_BOOLEAN)
    target = making.operands[0]
    if isinstance(target, Pair):
        if combined:
            raise UnknownError(f"{making.opcode} with two results")
        puts = making.put("t", "pred", target.first) + making.put("(~t)", "pred", target.second)
        return [f"t={value}", *puts]
    if combined:
        value = f"({value}{_BOOLEAN[combined]}{making.source(3, 'pred')})"
    return making.put(value, "pred")


@_is("selp")
def _selp(making):
    bits = f"b{8 * TYPE_BYTES[making.types[-1]]}"
    x, y = making.source(1, bits), making.source(2, bits)
    return making.put(f"where({making.source(3, 'pred')},{x},{y})", bits)


# Moves and conversions


@_is("mov")
def _mov(making):
    type_, (target, source) = making.types[-1], making.operands
    if type_ == "pred":
        return making.put(making.source(1), "pred")
    size = TYPE_BYTES[type_]
    bits = f"b{8 * size}"
    if isinstance(target, Vector):
        count = len(target.items)
        part = f"b{8 * size // count}"
        parts = f"view(a.{_name(DTYPES[part])}).reshape(32,{count})"
        lines = [f"t=ascontiguous({making.source(1, bits)}).{parts}"]
        for i, item in enumerate(target.items):
            lines += making.put(f"t[:,{i}].copy()", part, item)
        return lines
    if isinstance(source, Vector):
        part = f"b{8 * size // len(source.items)}"
        parts = ",".join(making.maker.value(item, part) for item in source.items)
        return making.put(f"np.stack(({parts}),1).view(a.{_name(DTYPES[bits])}).reshape(32)", bits)
    return making.put(making.source(1, bits), bits)


@_is("cvt", "rn rna rzi rni rmi rpi ftz sat satfinite")
def _cvt(making):
    to, of = making.types
    ways = set(making.modifiers)
    if of == "f32" and to in _PAIRS and ways == {"rn"}:
        high, low = making.source(1, of), making.source(2, of)
        dtype = f"a.{_name(_PAIRS[to])}"
        return making.put(f"a.paired(np.stack(({low},{high}),1).reshape(64),{dtype})", "b32")
    if of == "f32" and to in ("e4m3x2", "e5m2x2") and ways == {"rn", "satfinite"}:
        high, low = making.source(1, of), making.source(2, of)
        return making.put(f"a.encoded({to[:4]!r},{high},{low})", "b16")
    if of in ("e4m3x2", "e5m2x2") and to == "f16x2" and ways == {"rn"}:
        return making.put(f"a.decoded({of[:4]!r},{making.source(1, of)})", "b32")
    if to == "tf32":
        if of != "f32" or ways != {"rna"}:
            raise UnknownError(making.opcode)
        return making.put(f"a.tf32_away({making.source(1, of)})", "b32")
    if {to, of} & {"f16x2", "bf16x2", "e4m3x2", "e5m2x2"} or "satfinite" in ways or "rna" in ways:
        raise UnknownError(f"the executor does not know {making.opcode}")
    return making.put(_converted(making, to, of), to)


def _converted(making, to: str, of: str) -> str:
    """A conversion between scalars."""
    x, dtype = making.source(1, of), DTYPES[to]
    name = f"a.{_name(dtype)}"
    floats = ("f16", "bf16", "f32", "f64")
    rounding = making.first_of(("rzi", "rni", "rmi", "rpi"))
    if of in floats and to not in floats:
        if rounding is None or making.has("sat"):
            raise UnknownError(making.opcode)
        return f"a.to_integer({x},{name},{rounding!r})"
    if of not in floats:
        if making.has("sat") and to not in floats:
            return f"a.clamped({x},{name})"
        if to in _HALVES:
            raise UnknownError(making.opcode)
        return f"{x}.astype({name})"
    if rounding:
        x = f"a.ROUNDINGS[{rounding!r}]({x})"
    value = f"a.half({x},{name})" if to in _HALVES else f"{x}.astype({name})"
    if to == "f32":
        value = f"a.number({value})"
        if making.has("ftz"):
            value = f"a.flushed({value})"
    elif making.has("ftz"):
        raise UnknownError(making.opcode)
    return f"a.saturated({value})" if making.has("sat") else value


@_is("cvta", "to global shared shared::cta const param local")
def _cvta(making):
    space = making.modifiers[-1].split("::")[0]
    to_space = making.has("to")
    value = making.source(1)
    sign = "-" if to_space else "+"
    return making.put(f"({value}{sign}w.WINDOWS[{space!r}])", making.types[-1])


# Memory

_SPACES = "global shared shared::cta param local const generic"
_HINTS = (
    "relaxed weak volatile acquire release cta gpu sys cluster nc ca cg cs lu cv wb wt "
    "L1::evict_first L1::evict_last L1::no_allocate L1::evict_normal L1::evict_unchanged "
    "L2::64B L2::128B L2::256B"
)


def address_text(maker: OneLane, memory: Memory) -> str:
    """The addresses of a memory operand, int64."""
    base = memory.base
    if isinstance(base, Symbol):
        return maker.constant(maker.address_of(base.name) + base.offset + memory.offset, i8)
    if isinstance(base, Immediate):
        return maker.constant(base.integer() + memory.offset, i8)
    bits = 8 * TYPE_BYTES[maker.register_types[base.number]]
    text = f"{maker.value(base, f'b{bits}')}.astype(a.i8)"
    return f"({text}+{memory.offset})" if memory.offset else text


def _access(making) -> tuple[str, str, int]:
    """(memory space, type, elements) of a load or store."""
    space = (making.first_of(_SPACES.split()) or "generic").split("::")[0]
    count = making.first_of(("v2", "v4", "v8"))
    return space, making.types[-1], int(count[1]) if count else 1


@_is("ld ldu", f"{_SPACES} {_HINTS} v2 v4 v8")
def _ld(making):
    space, type_, count = _access(making)
    dtype = DTYPES[type_]
    target, memory = making.operands[:2]
    address = address_text(making.maker, memory)
    call = f"w.load({space!r},{address},{dtype.itemsize},{count},{making.mask})"
    lines = [f"t={call}"]
    targets = target.items if isinstance(target, Vector) else (target,)
    if len(targets) != count:
        raise UnknownError(f"{making.opcode} of {len(targets)} registers")
    for i, item in enumerate(targets):
        value = f"t[{i}]" if dtype == BITS[dtype.itemsize] else f"t[{i}].view(a.{_name(dtype)})"
        lines += making.put(value, type_, item)
    return lines


@_is("st", f"{_SPACES} {_HINTS} v2 v4 v8")
def _st(making):
    space, type_, count = _access(making)
    size = TYPE_BYTES[type_]
    memory, source = making.operands[:2]
    sources = source.items if isinstance(source, Vector) else (source,)
    if len(sources) != count:
        raise UnknownError(f"{making.opcode} of {len(sources)} registers")
    values = ",".join(making.maker.value(item, f"b{8 * size}") for item in sources)
    address = address_text(making.maker, memory)
    return [f"w.store({space!r},{address},{size},({values},),{making.mask})"]
