"""`numflash.run_ptx`: anybody's PTX on NumPy arrays."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from numflash.runtime.devices import architecture
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.mode import SIMULATED

_MAX_THREADS = 1024


@dataclass(frozen=True)
class Profile:
    """Counts of a launch. A warp counts once, however many of its lanes took part.

    Attributes:
        by_opcode, by_line: instructions that warps executed, by opcode and by line of the PTX.
        bytes: moved by lanes, by ("load" or "store", memory space); not those of copies.
    """

    by_opcode: Counter[str]
    by_line: Counter[int]
    bytes: Counter[tuple[str, str]]


def run_ptx(
    ptx: str,
    entry: str | None,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    arguments: Sequence,
    *,
    shared_bytes: int = 0,
    blocks_per_sm: int = 1,
    seed: int | None = None,
    profile: bool = False,
    max_steps: int | None = None,
) -> Profile | None:
    """Run a kernel of a PTX module on the CPU, lane by lane; arrays are changed in place.

    Args:
        ptx: the text, of any compiler.
        entry: the kernel's name; None where the module has only one.
        grid, block: how many blocks, and threads of a block: one to three integers. Where the
            entry has clusters (`.reqnctapercluster`) the grid consists of whole ones.
        arguments: one for each parameter: a NumPy array for a pointer to its element 0 (only
            memory between the first and the last element of such arrays can be reached), None for
            a null pointer, a number, a tensor map (`numflash.simulator.SimulatedTensorMap`), or
            a structure: its bytes, or a tuple of its members without gaps (arrays for pointers,
            NumPy's numbers, bytes).
        shared_bytes: of dynamic shared memory.
        blocks_per_sm: blocks that share the registers of an SM, which `setmaxnreg` distributes.
        seed: of the order in which warps run; NUMFLASH_SIM_SEED, or 0, by default.
        profile: whether to count what is executed.
        max_steps: straight pieces of code, from branch to branch, that a warp may execute while
            nothing happens in its block (no barrier, no copy, no atomic operation that changes
            memory): a loop that spins longer is a DeadlockError. 300,000 by default.

    Returns:
        The profile, if asked for.

    Raises:
        TypeError, ValueError: the text is no PTX, the entry is missing, or an argument is wrong.
        UnsupportedError: an instruction that the executor does not know, by its name and line; or
            NUMBA_ENABLE_CUDASIM is not set.
        IndexError, ValueError: an address outside every array, or a misaligned one.
        SimulationError, DeadlockError: what the hardware leaves undefined, or waits for forever.

    An error while it runs names the line of the PTX, and the seed that repeats it.

    Example:
        >>> import numpy as np, numflash
        >>> ptx = '''
        ... .version 8.0
        ... .target sm_80
        ... .address_size 64
        ... .visible .entry twice(.param .u64 x)
        ... {
        ...     .reg .u32 %lane;
        ...     .reg .u64 %address, %offset;
        ...     .reg .f32 %value;
        ...     ld.param.u64 %address, [x];
        ...     mov.u32 %lane, %tid.x;
        ...     mul.wide.u32 %offset, %lane, 4;
        ...     add.u64 %address, %address, %offset;
        ...     ld.global.f32 %value, [%address];
        ...     add.f32 %value, %value, %value;
        ...     st.global.f32 [%address], %value;
        ...     ret;
        ... }'''
        >>> x = np.arange(4, dtype="float32")
        >>> numflash.run_ptx(ptx, "twice", grid=1, block=4, arguments=[x])
        >>> x.tolist()
        [0.0, 2.0, 4.0, 6.0]
    """
    if not SIMULATED:
        raise UnsupportedError(
            "run_ptx needs NUMBA_ENABLE_CUDASIM=1, set before Python starts: what instructions "
            "mean is the simulator's"
        )
    from numflash.executor.launch import MAX_STEPS, Launch
    from numflash.executor.program import program_of
    from numflash.simulator.seed import SEED

    if not isinstance(ptx, str):
        raise TypeError(f"ptx must be text, got {type(ptx).__name__}")
    if entry is not None and not isinstance(entry, str):
        raise TypeError(f"entry must be a name or None, got {type(entry).__name__}")
    grid, block = _extents("grid", grid), _extents("block", block)
    shared_bytes = _integer("shared_bytes", shared_bytes, 0)
    blocks_per_sm = _integer("blocks_per_sm", blocks_per_sm, 1)
    seed = SEED.value if seed is None else _integer("seed", seed)
    max_steps = MAX_STEPS if max_steps is None else _integer("max_steps", max_steps, 1)
    program = program_of(ptx, entry, shared_bytes)
    _check_limits(program, block, shared_bytes)
    launch = Launch(
        *(program, grid, block, list(arguments), seed, blocks_per_sm, profile),
        max_steps=max_steps,
    )
    launch.run()
    return _profile(launch) if profile else None


def _extents(name: str, given) -> tuple[int, int, int]:
    numbers = list(given) if isinstance(given, Sequence) else [given]
    if not 1 <= len(numbers) <= 3:
        raise ValueError(f"{name} must be one to three integers, got {given!r}")
    numbers = [_integer(name, number, 1) for number in numbers]
    return (*numbers, *(1,) * (3 - len(numbers)))


def _integer(name: str, value, at_least: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    return int(value)


def _check_limits(program, block, shared_bytes: int) -> None:
    num_threads, allowed = block[0] * block[1] * block[2], program.entry.max_threads
    if num_threads > _MAX_THREADS:
        raise ValueError(f"block must have at most {_MAX_THREADS} threads, got {num_threads}")
    if allowed and num_threads > allowed[0] * allowed[1] * allowed[2]:
        raise ValueError(
            f"block has {num_threads} threads, the entry (line {program.entry.line}) allows "
            f"{allowed} (.maxntid, .reqntid)"
        )
    try:
        limit = architecture(program.entry.target).max_smem_per_block
    except ValueError as error:
        raise UnsupportedError(f"the PTX is for {program.entry.target}: {error}") from error
    used = shared_bytes + program.static_bytes
    if used > limit:
        raise ValueError(
            f"a block of the entry (line {program.entry.line}) has {used} bytes of shared memory "
            f"({shared_bytes} of them shared_bytes); {program.entry.target} allows {limit}"
        )


def _profile(launch) -> Profile:
    by_opcode, by_line = Counter(), Counter()
    for piece, count in zip(launch.program.pieces, launch.counts, strict=True):
        for statement in piece:
            by_opcode[statement.opcode] += count
            by_line[statement.line] += count
    return Profile(+by_opcode, +by_line, launch.traffic.bytes)
