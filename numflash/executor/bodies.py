"""Operations whose meaning is an instruction's body in `numflash.ptx`.

The templates tell which body belongs to which opcode: a template is a statement like any
other, with `<name>` where a parameter of the body goes, and an instruction of the text has that
body where the two match. Products of warpgroups have a body for each size, which is made when it
is asked for.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np

from numflash.executor.addresses import GlobalAddress, SharedAddresses, TensorMaps
from numflash.executor.operands import (
    WAITS,
    address_reader,
    are_here,
    items,
    reader,
    shared_address_reader,
    write,
)
from numflash.executor.products import (
    begin_product,
    deliver_products,
    hold_while_read,
)
from numflash.executor.text import (
    Immediate,
    Memory,
    Nothing,
    Placeholder,
    Register,
    Statement,
    UnknownError,
    Vector,
    check_operands,
    operand_of,
    split,
)
from numflash.ptx import INSTRUCTIONS, TensorMap
from numflash.ptx.instruction import Instruction
from numflash.ptx.operands import Accumulator, Global, LaterRead, Regs, Shared
from numflash.ptx.scalars import f32, u32
from numflash.ptx.wgmma import make_wgmma, make_wgmma_wait_group
from numflash.simulator import warpgroup
from numflash.simulator.bulk_copies import BulkCopies
from numflash.simulator.engine import become
from numflash.simulator.errors import SimulationError

_PTX_TYPES = {
    **{np.float32: "f32", np.int32: "s32", np.uint32: "u32", np.uint16: "b16"},
    **{np.int64: "s64", np.uint64: "u64"},
}
_WGMMA = re.compile(
    r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k\d+\.(f32|f16)\.(f16|bf16|e4m3|tf32)\.\3"
)
_WGMMA_DTYPES = {"f16": "float16", "bf16": "bfloat16", "e4m3": "e4m3", "tf32": "tf32"}


@dataclass(frozen=True)
class Template:
    """An instruction's template, read.

    Attributes:
        opcode: as `plain` gives it.
        operands: as those of a statement, with `Placeholder` for parameters.
    """

    instruction: Instruction
    opcode: str
    operands: tuple

    def bindings(self, statement: Statement) -> dict[str, list] | None:
        """The operands of a statement by parameter, in order; None where it does not match."""
        opcode, operands = plain(statement.opcode, statement.operands)
        if opcode != self.opcode or len(operands) != len(self.operands):
            return None
        found: dict[str, list] = {}
        pairs = zip(self.operands, operands, strict=True)
        return found if all(_matches(x, y, found) for x, y in pairs) else None


def read_template(instruction: Instruction) -> Template | None:
    """The template of an instruction; None where it is more than one statement."""
    text = instruction.template.strip()
    if text.count(";") != 1 or text.startswith("{"):
        return None
    opcode, _, rest = text.rstrip("; ").partition(" ")
    return Template(instruction, *plain(opcode, tuple(operand_of(x) for x in split(rest))))


def plain(opcode: str, operands: tuple) -> tuple[str, tuple]:
    """An opcode and its operands without hints and defaults, and with one name for shared memory.

    Caches change no result, a bulk copy is one of tiles unless it says otherwise, and of the
    cluster's shared memory bodies reach the block's own.
    """
    parts = opcode.split(".")
    if "L2::cache_hint" in parts:
        operands = operands[:-1]
    shared = ("shared::cta", "shared::cluster")
    parts = ["shared" if part in shared else part for part in parts if part != "tile"]
    return ".".join(part for part in parts if not part.startswith("L2::")), operands


def body_operation(statement: Statement, program) -> Callable | None:
    """The operation of a statement by its body; None where no template matches it."""
    if _WGMMA.fullmatch(statement.opcode):
        for scale_d in statement.operands[3:4]:
            if isinstance(scale_d, Register):
                return _added_where(scale_d, statement, program)
    opcode, _ = plain(statement.opcode, statement.operands)
    for template in _made_for(statement) or _table().get(opcode, []):
        bindings = template.bindings(statement)
        if bindings is not None and not _has_predicate(bindings, program):
            return _operation(template.instruction, bindings, program)
    return None


def _has_predicate(bindings: dict[str, list], program) -> bool:
    """Whether a parameter is bound to a predicate, which bodies have none of."""
    return any(
        isinstance(operand, Register) and program.entry.register_types[operand.number] == "pred"
        for bound in bindings.values()
        for operand in bound
    )


def refuse(statement: Statement) -> None:
    """Raise what is wrong with a statement that is nowhere known.

    PtxError where only the number of its operands is, else UnknownError.
    """
    opcode, operands = plain(statement.opcode, statement.operands)
    templates = _made_for(statement) or _table().get(opcode)
    if not templates:
        raise UnknownError(f"the executor does not know {statement.opcode}")
    hints = len(statement.operands) - len(operands)
    check_operands(statement, *sorted({len(t.operands) + hints for t in templates}))
    raise UnknownError(f"the executor does not know {statement.opcode} with these operands")


@cache
def _table() -> dict[str, list[Template]]:
    table: dict[str, list[Template]] = {}
    for instruction in list(INSTRUCTIONS.values()):
        template = read_template(instruction)
        if template is not None:
            table.setdefault(template.opcode, []).append(template)
    return table


def _made_for(statement: Statement) -> list[Template]:
    """The template of a warpgroup's product or wait, made for this statement."""
    operands = statement.operands
    if statement.opcode == "wgmma.wait_group.sync.aligned":
        check_operands(statement, 1)
        # The accumulator of the body is not an operand: 1 stands for its number of registers.
        call = make_wgmma_wait_group(operands[0].integer(), 1)
    elif matched := _WGMMA.fullmatch(statement.opcode):
        n, sums, type_ = matched.groups()
        a_in_registers = isinstance(operands[1], Vector) if len(operands) > 1 else False
        transposes = 0 if type_ in ("e4m3", "tf32") else 1 if a_in_registers else 2
        check_operands(statement, 6 + transposes)
        numbers = [*operands[3:4], *operands[6:]]
        if (sums == "f16" and type_ != "f16") or not all(
            isinstance(number, Immediate) for number in numbers
        ):
            raise UnknownError(
                f"the executor does not know {statement.opcode} with these operands"
            )
        # Behind the signs: a of shared memory, then b, where they may be MN-major.
        majors = ["mn" if operand.integer() else "k" for operand in operands[6:]]
        make = partial(
            make_wgmma,
            int(n),
            _WGMMA_DTYPES[type_],
            "registers" if a_in_registers else "shared",
            majors[-1] if majors else "k",
            bool(operands[3].integer()),
            a_major=majors[0] if len(majors) > 1 else "k",
            sums=u32 if sums == "f16" else f32,
        )
        try:
            call = make()
        except ValueError as error:
            raise UnknownError(str(error)) from None
    else:
        return []
    return [read_template(INSTRUCTIONS[call.__name__])]


def _added_where(predicate: Register, statement: Statement, program) -> Callable:
    """A product that adds to its accumulator where a predicate holds, in all lanes alike."""
    holds = reader(program, predicate, "pred")
    before, after = statement.operands[:3], statement.operands[4:]
    overwrites, adds = (
        body_operation(replace(statement, operands=(*before, Immediate(scale), *after)), program)
        for scale in ("0", "1")
    )

    def operation(warp, mask):
        if not are_here(warp, mask):
            return WAITS
        found = holds(warp)[mask]
        if found.any() != found.all():
            raise SimulationError("the predicate of scale-d differs from lane to lane")
        return (adds if found.all() else overwrites)(warp, mask)

    return operation


def _matches(pattern, operand, found: dict[str, list]) -> bool:
    if isinstance(pattern, Placeholder):
        found.setdefault(pattern.name, []).append(operand)
        return True
    if type(pattern) is not type(operand):
        return False
    if isinstance(pattern, Immediate):
        return pattern.integer() == operand.integer()
    if isinstance(pattern, Vector):
        return _all_match(pattern.items, operand.items, found)
    if isinstance(pattern, Memory):
        found.setdefault(pattern.base.name, []).append(operand)
        return _all_match(pattern.coordinates, operand.coordinates, found)
    return isinstance(pattern, Nothing)


def _all_match(patterns, operands, found) -> bool:
    return len(patterns) == len(operands) and all(
        _matches(x, y, found) for x, y in zip(patterns, operands, strict=True)
    )


class _Argument:
    """One parameter of a body, as it is read from a warp, and written back.

    Attributes:
        read: gives the argument for all lanes: an array of shape (32,) or (32, n), or for what
            lies in memory an object for each lane.
    """

    def __init__(self, program, annotation, bound: list):
        self.written = ()
        if isinstance(annotation, Regs):
            # A register that is read and written may differ before and after: d and c.
            self._registers(program, annotation, bound)
        elif isinstance(annotation, Shared):
            self._shared(program, annotation, bound[0])
        elif isinstance(annotation, Global):
            addresses = address_reader(program, bound[0])
            self.read = lambda warp: [GlobalAddress(warp.memory, a) for a in addresses(warp)]
        elif annotation is TensorMap:
            addresses = address_reader(program, bound[0])
            self.read = lambda warp: TensorMaps(warp.block.tensor_maps, addresses(warp))
        else:
            self.read = reader(program, bound[0], _PTX_TYPES[annotation])

    def _registers(self, program, annotation, bound) -> None:
        registers = items(bound[-1])
        if len(registers) != annotation.n:
            raise UnknownError(
                f"{annotation.n} registers are expected, there are {len(registers)}"
            )
        if "w" in annotation.mode:
            self.written = items(bound[0])
        type_ = _PTX_TYPES[annotation.type]
        if isinstance(annotation, Accumulator):
            self.read = begin_product(program, registers, annotation.type)
        elif isinstance(annotation, LaterRead):
            self.read = hold_while_read(program, registers)
        elif "r" in annotation.mode:
            readers = [reader(program, register, type_) for register in registers]
            self.read = lambda warp: np.stack([read(warp) for read in readers], 1)
        else:
            shape = (32, annotation.n)
            self.read = lambda warp: np.empty(shape, annotation.type)

    def _shared(self, program, annotation, memory) -> None:
        addresses = shared_address_reader(program, memory)
        size = np.dtype(annotation.type).itemsize

        def read(warp):
            found = addresses(warp)
            return SharedAddresses(warp, found, annotation.type, size)

        self.read = read


def _operation(instruction: Instruction, bindings: dict, program) -> Callable:
    operands, arguments, indices = instruction.operands, {}, {}
    for name, annotation in operands.items():
        if name in bindings:
            arguments[name] = _Argument(program, annotation, bindings[name])
            if isinstance(annotation, Shared | Global):
                indices[annotation.index] = name
    if instruction.result is not None:
        raise UnknownError(f"{instruction.name} has a result")
    order = [(name, arguments.get(name), indices.get(name)) for name in operands]
    if instruction.name.startswith("wgmma_wait_group"):
        return _waiting_for_products(instruction)
    if instruction.collective is None:
        return _lane_by_lane(instruction, order)
    return _by_warps(instruction, order)


def _lane_by_lane(instruction: Instruction, order) -> Callable:
    """The body for one lane after the other."""
    if any(argument is not None and argument.written for _, argument, _ in order):
        raise UnknownError(f"{instruction.name} writes registers")
    body = instruction.body
    touches_others = instruction.name.startswith(
        ("mbarrier", "cp_async_bulk", "cp_reduce_async_bulk", "fence")
    )

    def operation(warp, mask):
        read = {name: argument.read(warp) for name, argument, _ in order if argument}
        for lane in np.flatnonzero(mask):
            become(warp.threads[lane])
            values = []
            for name, argument, memory in order:
                if argument is not None:
                    value = read[name][lane]
                    values.append(value.item() if isinstance(value, np.generic) else value)
                elif isinstance(read.get(memory), SharedAddresses):
                    values.append(int(read[memory].index([lane])[0]))
                else:
                    # Global addresses are those of element 0, and hints say nothing.
                    values.append(0)
            body(*values)
        if touches_others:
            warp.block.something_happened()

    if instruction.name.startswith("cp_async_bulk_wait_group"):
        return lingering(operation)
    return operation


def lingering(operation: Callable) -> Callable:
    """A wait for bulk stores, which may be over late: others run before."""

    def late(warp, mask):
        group, block = warp.group, warp.block
        if group.state is None:
            group.state = block.part(BulkCopies).rounds()
        if group.state:
            group.state -= 1
            block.something_happened()
            return WAITS
        return operation(warp, mask)

    return late


def _by_warps(instruction: Instruction, order) -> Callable:
    """The body for all lanes of a warp at once."""
    body, of_warpgroups = instruction.body, instruction.collective == "warpgroup"

    def operation(warp, mask):
        if not are_here(warp, mask):
            return WAITS
        if not mask.all():
            raise SimulationError(f"all lanes of the warp must execute it, not {int(mask.sum())}")
        become(warp.threads[0])
        read = {name: argument.read(warp) for name, argument, _ in order if argument}
        values = []
        for name, argument, memory in order:
            if argument is None:
                values.append(read[memory].index(slice(None)))
            elif isinstance(read[name], SharedAddresses):
                values.append([read[name].array] * 32)
            else:
                values.append(read[name])
        if of_warpgroups:
            scalars = [v[0] for v in values if isinstance(v, np.ndarray)]
            warpgroup.execute(instruction.name, *scalars)
        body(*values)
        for (_, argument, _), value in zip(order, values, strict=True):
            if argument is None or not argument.written:
                continue
            if isinstance(value, np.ndarray):
                for i, register in enumerate(argument.written):
                    write(warp, register, value[:, i], mask)
        return None

    return operation


def _waiting_for_products(instruction: Instruction) -> Callable:
    def operation(warp, mask):
        if not are_here(warp, mask):
            return WAITS
        become(warp.threads[0])
        warpgroup.execute(instruction.name)
        instruction.body([])
        deliver_products(warp)
        return None

    return operation
