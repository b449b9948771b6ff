"""One PTX instruction as one Python function with two meanings.

    @instruction("ex2.approx.ftz.f32 <ret>, <x>;", sm=75)
    def ex2_approx_ftz_f32(x: f32) -> f32:
        \"\"\"2 ** x. PTX ISA 9.7.3.22.\"\"\"
        return np.exp2(x)

On the GPU a call emits the template as inline assembly; the body is never compiled. In the
simulator the body runs; the template is never read. A parameter's annotation gives its kind:

* a scalar type (`f32`, `i32`, `u32`, ...): a register;
* `Regs(type, n, mode)`: n elements of a local array, "r"ead, "w"ritten or both, which stay in
  registers;
* `Accumulator(type, n)` and `LaterRead(type, n)`: registers that are written, or read, after the
  instruction has been issued;
* `TensorMap`: a kernel parameter that describes a tensor;
* `Shared(type, index)` and `Global(type, index)`: an address: the element `index`, itself an
  integer parameter of the function, of a shared array or of a `Pointer`.

`collective="warp"` marks an instruction of all lanes of a warp together, "warpgroup" one that each
of the four warps must execute, each at its own time. The body runs once for the warp: scalars
arrive as arrays of shape (lanes,), `Regs` as (lanes, n), but `Accumulator` and `LaterRead`, like
`Shared` and `Global`, as a list of each lane's array; a scalar result goes back as (lanes,). Every
instruction is listed in `INSTRUCTIONS`, where tests find it.

The PTX ISA sections are those of "Parallel Thread Execution ISA", version 9.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from numflash.ptx.operands import Accumulator, Global, LaterRead, Regs, Shared
from numflash.runtime.mode import SIMULATED

INSTRUCTIONS: dict[str, "Instruction"] = {}

_WARP_SIZE = 32
_WORDS = "fI"


@dataclass(frozen=True)
class Instruction:
    """An instruction, as the decorator describes it; kernels call `call`."""

    name: str
    template: str
    sm: int
    collective: str | None
    operands: dict[str, object]
    result: type | None
    body: Callable
    call: Callable
    newest: int | None = None

    def runs_on(self, sm: int) -> bool:
        """Whether GPUs of this compute capability, 90 for 9.0, have it."""
        return self.sm <= sm <= (self.newest or sm)


def instruction(
    template: str,
    *,
    sm: int,
    newest: int | None = None,
    collective: str | None = None,
    volatile: bool = False,
    constant: bool = False,
):
    """Declare a PTX instruction; see the module's docstring.

    Args:
        template: PTX text; `<name>` stands for the parameter `name`, `<ret>` for the result.
        sm: the lowest compute capability that has it, as in sm_75.
        newest: the highest that has it; None where all later ones do.
        collective: None for one thread, "warp" for all lanes together, "warpgroup" where all four
            warps of one must execute it.
        volatile: keep the compiler from executing it once for several calls.
        constant: nothing writes the memory that it reads while a kernel runs, so that it may be
            moved, and executed once for several calls.
    """

    def declare(body: Callable) -> Callable:
        operands = {
            name: parameter.annotation
            for name, parameter in inspect.signature(body).parameters.items()
        }
        result = inspect.signature(body).return_annotation
        result = None if result in (inspect.Signature.empty, None) else result
        if SIMULATED:
            call = _simulated(body, operands, collective)
        else:
            from numflash.ptx.assembly import inline_assembly

            outputs = [o for o in operands.values() if isinstance(o, Regs) and "w" in o.mode]
            in_memory = any(isinstance(o, Shared | Global) for o in operands.values())
            # An instruction without results has its effect on memory: barriers, commits, waits.
            touches_memory = in_memory or (result is None and not outputs)
            touches_memory &= not constant
            call = inline_assembly(
                body,
                template,
                operands,
                result,
                touches_memory=touches_memory,
                volatile=volatile or touches_memory,
                convergent=collective is not None,
                constant=constant,
            )
        INSTRUCTIONS[body.__name__] = Instruction(
            body.__name__, template, sm, collective, operands, result, body, call, newest
        )
        return call

    return declare


def _simulated(body: Callable, operands: dict[str, object], collective: str | None) -> Callable:
    """The body itself, or for a collective: gather the lanes, run the body once, scatter."""
    if collective is None:
        return body
    from numflash.simulator import engine, warpgroup

    is_memory = [
        isinstance(o, Shared | Global | Accumulator | LaterRead) for o in operands.values()
    ]
    written = [
        i
        for i, o in enumerate(operands.values())
        if isinstance(o, Regs) and "w" in o.mode and not is_memory[i]
    ]

    of_warpgroups = collective == "warpgroup"

    def together(payloads: list[tuple]) -> list:
        if of_warpgroups:
            scalars = [x for x, memory in zip(payloads[0], is_memory, strict=True) if not memory]
            warpgroup.execute(body.__name__, *scalars)
        stacked = [
            list(lanes) if memory else _stacked(lanes)
            for memory, lanes in zip(is_memory, zip(*payloads, strict=True), strict=True)
        ]
        result = body(*stacked)
        for i in written:
            for payload, registers in zip(payloads, stacked[i], strict=True):
                payload[i][...] = registers
        return [None] * len(payloads) if result is None else list(result)

    def call(*args):
        thread = engine.current_thread()
        result = thread.collective(body.__name__, _WARP_SIZE, args, together)
        if of_warpgroups:
            warpgroup.go_on(body.__name__)
        return result

    call.__name__, call.__doc__ = body.__name__, body.__doc__
    return call


def _stacked(lanes: tuple) -> np.ndarray:
    """The scalars of all lanes as an array, or their registers as its rows."""
    first = lanes[0]
    if isinstance(first, np.ndarray) and first.dtype.char in _WORDS:
        # As np.stack, which takes five times as long.
        return np.frombuffer(bytearray().join(lanes), first.dtype).reshape(-1, *first.shape)
    return np.array(lanes)
