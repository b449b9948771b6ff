"""Branches that the assembler must keep. PTX ISA 9.7.12."""

from numflash.ptx.instruction import instruction
from numflash.ptx.scalars import f32
from numflash.runtime.mode import SIMULATED

if SIMULATED:
    from numflash.simulator.errors import SimulationError


@instruction(
    "{ .reg .pred ordered; .reg .f32 sum; add.f32 sum, <x>, <y>; "
    "setp.geu.f32 ordered, sum, 0f00000000; @ordered bra on<uid>; bar.sync 15, 128; on<uid>: }",
    sm=75,
)
def bra_over_barrier(x: f32, y: f32):
    """Branch over a barrier, because x + y is not negative; it may be NaN.

    It does nothing, but the assembler cannot move instructions after it above those that make x
    and y. PTX ISA 9.7.12.2.
    """
    if x + y < 0:
        raise SimulationError(f"bra_over_barrier: {x} + {y} is negative")
