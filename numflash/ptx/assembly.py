"""The GPU meaning of an instruction: a Numba intrinsic that emits LLVM inline assembly.

Registers that are both read and written become tied operands of a struct result, so a local array
that is only touched through constant indices never leaves the registers.
"""

import inspect
from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import types
from numba.cuda.extending import intrinsic

from numflash.ptx.operands import Global, Regs, Shared
from numflash.ptx.scalars import TensorMap

# scalar type -> (LLVM type, letter of the inline-assembly constraint, Numba type)
_SCALARS = {
    np.float32: (ir.FloatType(), "f", types.float32),
    np.float64: (ir.DoubleType(), "d", types.float64),
    np.uint16: (ir.IntType(16), "h", types.uint16),
    np.int32: (ir.IntType(32), "r", types.int32),
    np.uint32: (ir.IntType(32), "r", types.uint32),
    np.int64: (ir.IntType(64), "l", types.int64),
    np.uint64: (ir.IntType(64), "l", types.uint64),
}
_SHARED_SPACE = 3


def inline_assembly(
    body: Callable,
    template: str,
    operands: dict[str, object],
    result: type | None,
    *,
    touches_memory: bool,
    volatile: bool,
    convergent: bool,
    constant: bool,
) -> Callable:
    """A Numba intrinsic named like `body` that emits `template`.

    `volatile` keeps the compiler from merging or dropping it, `touches_memory` from moving loads
    and stores across it, `convergent` from moving it to a place that only some lanes reach. One
    that is `constant` depends on its operands alone, addresses among them.
    """

    def codegen(context, builder, signature, args):
        asm = _Operands(builder)
        values = dict(zip(operands, args, strict=True))
        array_types = dict(zip(operands, signature.args, strict=True))
        if result is not None:
            asm.output("ret", [result])
        for name, operand in operands.items():
            if isinstance(operand, Regs):
                array = context.make_array(array_types[name])(context, builder, values[name])
                asm.registers(name, operand, array.data)
        for name, operand in operands.items():
            if f"<{name}>" not in template or isinstance(operand, Regs):
                continue
            if isinstance(operand, Shared):
                array = context.make_array(array_types[name])(context, builder, values[name])
                element = builder.gep(array.data, [values[operand.index]])
                asm.input(name, np.uint32, [_shared_address(builder, element)])
            elif isinstance(operand, Global):
                element = builder.gep(values[name], [values[operand.index]])
                # Of a pointer the compiler shares what several addresses have in common.
                address = element if constant else builder.ptrtoint(element, ir.IntType(64))
                asm.input(name, np.uint64, [address])
            elif operand is TensorMap:
                asm.input(name, np.uint64, [builder.ptrtoint(values[name], ir.IntType(64))])
            else:
                asm.input(name, operand, [values[name]])
        attributes = ("convergent",) if convergent else ("readnone",) if constant else ()
        returned = asm.emit(template, touches_memory, volatile, attributes)
        return returned if result is not None else context.get_dummy_value()

    def typer(*argument_types):
        declared = [
            given if _is_memory(operand) else _SCALARS[operand][2]
            for operand, given in zip(operands.values(), argument_types, strict=True)
        ]
        returns = types.void if result is None else _SCALARS[result][2]
        return returns(*declared), codegen

    return intrinsic(_with_parameters(body, typer))


def _is_memory(operand) -> bool:
    """Whether an operand's Numba type is that of its array or pointer."""
    return isinstance(operand, Regs | Shared | Global) or operand is TensorMap


def _with_parameters(body: Callable, typer: Callable) -> Callable:
    """A typing function with the parameter names of `body`: Numba reads its signature."""
    names = ", ".join(inspect.signature(body).parameters)
    scope = {"typer": typer}
    exec(f"def {body.__name__}(typingctx, {names}):\n    return typer({names})\n", scope)
    function = scope[body.__name__]
    function.__doc__ = body.__doc__
    return function


def _shared_address(builder, pointer):
    space = ir.PointerType(pointer.type.pointee, addrspace=_SHARED_SPACE)
    return builder.ptrtoint(builder.addrspacecast(pointer, space), ir.IntType(32))


class _Operands:
    """Collects operands, numbers them as LLVM does (outputs first), and emits the call."""

    def __init__(self, builder):
        self.builder = builder
        self.output_types, self.output_letters, self.output_fields = [], [], []
        self.input_values, self.input_constraints, self.input_fields = [], [], []
        self.stores, self.tied = [], []

    def output(self, name, scalar_types) -> range:
        first = len(self.output_types)
        for scalar in scalar_types:
            llvm_type, letter, _ = _SCALARS[scalar]
            self.output_types.append(llvm_type)
            self.output_letters.append("=" + letter)
        numbers = range(first, len(self.output_types))
        self.output_fields.append((name, numbers))
        return numbers

    def input(self, name, scalar, values):
        first = len(self.input_values)
        self.input_values += values
        self.input_constraints += [_SCALARS[scalar][1]] * len(values)
        self.input_fields.append((name, range(first, first + len(values))))

    def registers(self, name, operand: Regs, data):
        index = ir.IntType(32)
        pointers = [
            self.builder.gep(data, [ir.Constant(index, i)], inbounds=True)
            for i in range(operand.n)
        ]
        if "w" in operand.mode:
            numbers = self.output(name, [operand.type] * operand.n)
            self.stores += zip(numbers, pointers, strict=True)
            if "r" in operand.mode:
                self.tied += zip(numbers, pointers, strict=True)
        else:
            self.input(name, operand.type, [self.builder.load(p) for p in pointers])

    def emit(self, template: str, touches_memory: bool, volatile: bool, attributes: tuple):
        builder = self.builder
        tied_values = [builder.load(pointer) for _, pointer in self.tied]
        first_input = len(self.output_types) + len(tied_values)
        # <uid> makes labels unique when an instruction is inlined more than once.
        text = template.replace("$", "$$").replace("<uid>", "${:uid}")
        for name, numbers in self.output_fields:
            text = text.replace(f"<{name}>", _field(numbers, name == "ret"))
        for name, numbers in self.input_fields:
            shifted = range(first_input + numbers.start, first_input + numbers.stop)
            text = text.replace(f"<{name}>", _field(shifted, len(numbers) == 1))
        constraints = (
            self.output_letters + [str(number) for number, _ in self.tied] + self.input_constraints
        )
        if touches_memory:
            constraints.append("~{memory}")
        values = tied_values + self.input_values
        if not self.output_types:
            returned_type = ir.VoidType()
        elif len(self.output_types) == 1:
            returned_type = self.output_types[0]
        else:
            returned_type = ir.LiteralStructType(self.output_types)
        assembly = ir.InlineAsm(
            ir.FunctionType(returned_type, [value.type for value in values]),
            text,
            ",".join(constraints),
            side_effect=volatile,
        )
        returned = builder.call(assembly, values, attrs=attributes)
        single = len(self.output_types) == 1
        for number, pointer in self.stores:
            builder.store(returned if single else builder.extract_value(returned, number), pointer)
        if single or not self.output_types:
            return returned
        return builder.extract_value(returned, 0)


def _field(numbers: range, bare: bool) -> str:
    text = ", ".join(f"${number}" for number in numbers)
    return text if bare else "{" + text + "}"
