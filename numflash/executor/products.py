"""Registers that products of a warpgroup write or read after they were issued.

An accumulator under way is a `UnderWay` in each of its registers: a move passes it on, and
computing with it or storing it raises that the wait is missing. The values come with the wait.
"""

import numpy as np

from numflash.simulator.errors import SimulationError
from numflash.simulator.local_arrays import InFlight, Local


class UnderWay:
    """Register `index` of an accumulator that products still write."""

    __slots__ = ("sum", "index")
    __array_ufunc__ = None

    def __init__(self, total: "Sum", index: int):
        self.sum, self.index = total, index

    def _refuse(self, *args, **options):
        raise SimulationError(
            "an accumulator is used while wgmma writes it: wgmma.wait_group is missing before"
        )

    view = astype = __array__ = __getitem__ = __len__ = __invert__ = __neg__ = _refuse
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = _refuse


class Sum:
    """The accumulator of a warp: a local array for each lane, as the bodies want it."""

    def __init__(self, arrays: list[Local]):
        self.arrays = arrays


def begin_product(program, registers, dtype):
    """A function of a warp that gives its lanes' accumulators, and leaves them under way."""
    numbers = [register.number for register in registers]

    def begin(warp):
        held = [warp.registers[number] for number in numbers]
        if isinstance(held[0], UnderWay):
            total = held[0].sum
            for index, x in enumerate(held):
                if not isinstance(x, UnderWay) or x.sum is not total or x.index != index:
                    raise SimulationError(
                        f"wgmma: register {index} of the accumulator is not that of the product "
                        "under way"
                    )
            return total.arrays
        if any(isinstance(x, UnderWay) for x in held):
            raise SimulationError("wgmma: the accumulator is in part that of another product")
        values = np.stack(held, 1).view(dtype)
        total = Sum([_local(row) for row in values])
        warp.sums.append(total)
        for index, number in enumerate(numbers):
            warp.registers[number] = UnderWay(total, index)
        return total.arrays

    return begin


def hold_while_read(program, registers):
    """A function of a warp that gives its lanes' operand a, which must stay as it is."""
    numbers = [register.number for register in registers]

    def begin(warp):
        held = [warp.registers[number] for number in numbers]
        if any(isinstance(x, UnderWay) for x in held):
            UnderWay._refuse(held[0])
        arrays = [_local(row) for row in np.stack(held, 1)]
        warp.being_read.append((arrays, list(zip(numbers, held, strict=True))))
        return arrays

    return begin


def deliver_products(warp) -> None:
    """After a wait: put the arrived values into the registers that stand for them."""
    for arrays, held in warp.being_read:
        if any(warp.registers[number] is not x for number, x in held):
            raise SimulationError(
                "registers are written while wgmma reads them as operand a: wgmma.wait_group is "
                "missing before"
            )
        del arrays
    warp.being_read = [entry for entry in warp.being_read if type(entry[0][0]) is not Local]
    arrived = [total for total in warp.sums if type(total.arrays[0]) is not InFlight]
    if not arrived:
        return
    warp.sums = [total for total in warp.sums if type(total.arrays[0]) is InFlight]
    values = {id(total): np.array(total.arrays).T.copy().view(np.uint32) for total in arrived}
    registers = warp.registers
    for number, x in enumerate(registers):
        if type(x) is UnderWay and id(x.sum) in values:
            registers[number] = values[id(x.sum)][x.index]


def _local(row: np.ndarray) -> Local:
    return Local(row.shape, row.dtype, bytearray(np.ascontiguousarray(row).tobytes()))
