"""Products of a warpgroup (`wgmma`): their operands, and when their results arrive.

The functions here run once for a warp, on behalf of its 32 threads: each of the four warps
computes its 16 rows of a product, when it issues it. Until the warp has waited for it its
accumulators hold 0xFF bytes and refuse to be touched, operand a in registers refuses to be
written, and operands in shared memory are compared with their old content: the hardware may have
read them at any time.

All warps of a warpgroup must execute the same instructions (`.aligned`), but those hold the
threads of a warp together (`.sync`), not the warps. One may have waited for its products, and
given their operands back, before another has issued them; the order of threads decides.

Layouts are those of `numflash.ptx.wgmma`.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache

import ml_dtypes
import numpy as np

from numflash.runtime.sums import add_products
from numflash.simulator.engine import current_thread
from numflash.simulator.errors import SimulationError
from numflash.simulator.local_arrays import BeingRead, InFlight, Local, whole
from numflash.simulator.memory import POISON
from numflash.simulator.parts import Part
from numflash.simulator.proxies import AsyncProxy
from numflash.simulator.tensor_maps import swizzled

WARPS_APART = True
"""Whether the warps of a warpgroup go on by themselves. False holds them together at each
instruction, as if a product were over for all of them at once: what one arrival for a warpgroup
counts on (`kernels.wgmma.channels.make_channel`), and the PTX ISA does not say."""
_SIZE = 128
_WARPS = 4
_LANES = 32
_ROWS = 64
_WARP_ROWS = 16
_K_CHUNKS = 2
_SWIZZLE_BYTES = (0, 128, 64, 32)
"""By what a descriptor says of the swizzle."""
_ELEMENTS = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "tf32": np.dtype(np.float32),
}
# Of float32, products of tf32 ignore the low 13 bits.
_TF32 = np.uint32(0xFFFFE000)


@dataclass(eq=False, slots=True)
class _Sum:
    """The accumulator of products under way: the threads' arrays, and its coming value.

    The arrays are of float32, or of words that hold two float16 each; `value` is of float32.
    """

    arrays: list[np.ndarray]
    value: np.ndarray
    of_halves: bool


@dataclass(eq=False, slots=True)
class Operand:
    """One operand: its matrix, and where it still lies.

    `chunks` are those of shared memory, with their `content`; `arrays` the local arrays.
    """

    matrix: np.ndarray
    chunks: np.ndarray | None = None
    content: np.ndarray | None = None
    arrays: list[np.ndarray] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Product:
    sum: _Sum
    operands: tuple[Operand, ...]


class _Warp:
    """Products that a warp has issued and not waited for."""

    def __init__(self):
        self.fenced = False
        self.issued: list[_Product] = []
        self.groups: list[list[_Product]] = []
        self.sums: dict[int, _Sum] = {}

    def under_way(self) -> list[_Product]:
        return [product for group in [*self.groups, self.issued] for product in group]


class Warpgroups(Part):
    """The warpgroups of a block, and their warps."""

    def __init__(self, block):
        super().__init__(block)
        self.warps: dict[int, _Warp] = defaultdict(_Warp)
        self.chunks = block.shared.bytes.reshape(-1, 16)
        # The instructions of each warpgroup, and the number that each warp has executed.
        self._executed: dict[int, list[tuple]] = defaultdict(list)
        self._counts: dict[int, int] = defaultdict(int)

    def running(self) -> _Warp:
        """The warp of the running thread."""
        return self.warps[current_thread().warp]

    def execute(self, instruction: tuple) -> None:
        """The running thread's warp executes what all warps of its warpgroup must.

        `instruction` is its name and the other parts that must be the same.
        """
        warp = current_thread().warp
        number, count = warp // _WARPS, self._counts[warp]
        if (number + 1) * _SIZE > self.block.size:
            raise SimulationError(
                f"{instruction[0]}: warpgroup {number} has fewer than four warps"
            )
        executed = self._executed[number]
        if count == len(executed):
            executed.append(instruction)
        elif executed[count] != instruction:
            raise SimulationError(
                f"warp {warp} executes {_text(instruction)} where another warp of warpgroup "
                f"{number} executed {_text(executed[count])}: all four must execute the same"
            )
        self._counts[warp] += 1

    def finish(self) -> None:
        """Refuse products not waited for, and instructions that not all warps have executed."""
        ended = f"block {tuple(self.block.blockIdx)} ended and"
        for number, warp in self.warps.items():
            if warp.under_way():
                raise SimulationError(
                    f"{ended} warp {number} of warpgroup {number // _WARPS} has not waited for "
                    "its products"
                )
        for number, executed in self._executed.items():
            for warp in range(number * _WARPS, (number + 1) * _WARPS):
                if self._counts[warp] < len(executed):
                    raise SimulationError(
                        f"{ended} warp {warp} has not executed "
                        f"{_text(executed[self._counts[warp]])}, as another warp of warpgroup "
                        f"{number} did"
                    )


def execute(name: str, *operands) -> None:
    """The running thread's warp executes an instruction of warpgroups, with these operands."""
    _warpgroups().execute((name, *operands))


def go_on(name: str) -> None:
    """The running thread has executed it; where warps are not apart it waits for the others."""
    if not WARPS_APART:
        current_thread().collective(f"{name} of a warpgroup", _SIZE, None, list)


def fence() -> None:
    """Let the products that follow see the registers as they are now."""
    _warpgroups().running().fenced = True


def commit() -> None:
    """Make a group of the products issued since the last one."""
    warp = _warpgroups().running()
    warp.groups.append(warp.issued)
    warp.issued = []


def wait(accumulators: list[np.ndarray], pending: int) -> None:
    """Deliver all groups but the newest `pending`, which must be all that `accumulators` await."""
    warpgroups = _warpgroups()
    warp = warpgroups.running()
    arriving = max(0, len(warp.groups) - pending)
    arrived = [product for group in warp.groups[:arriving] for product in group]
    del warp.groups[:arriving]
    warp.fenced = False
    for product in arrived:
        for operand in product.operands:
            _check_unchanged(warpgroups, operand)
    left = warp.under_way()
    reading = {id(array) for p in left for operand in p.operands for array in operand.arrays[:1]}
    for product in arrived:
        for operand in product.operands:
            if operand.arrays and id(operand.arrays[0]) not in reading:
                for array in operand.arrays:
                    array.__class__ = Local
    writing = {id(product.sum) for product in left}
    for key, total in list(warp.sums.items()):
        if id(total) not in writing:
            del warp.sums[key]
            _deliver(total)
    if any(type(array) is InFlight for array in accumulators):
        raise SimulationError(
            f"wgmma_wait_group with {pending} groups left names an accumulator that one of them "
            "writes"
        )


def shared_a(descriptors: np.ndarray, major: str, dtype: str) -> Operand:
    """Operand a in shared memory: of its 64 rows those of this warp."""
    first = current_thread().warp % _WARPS * _WARP_ROWS
    return _shared("a", descriptors, _ROWS, major, dtype, slice(first, first + _WARP_ROWS))


def register_a(fragments: list[np.ndarray], dtype: str) -> Operand:
    """Operand a in four registers of each thread."""
    words = np.array(fragments)
    element = _ELEMENTS[dtype]
    if dtype == "tf32":
        words &= _TF32
    rows, columns = _a_index(4 // element.itemsize)
    matrix = np.empty((_WARP_ROWS, 32 // element.itemsize))
    matrix[rows, columns] = words.view(element).reshape(_LANES, 4, -1).astype(np.float64)
    return Operand(matrix, arrays=[whole(fragment) for fragment in fragments])


def multiply(
    accumulators: list[np.ndarray],
    a: Operand,
    b_descriptors: np.ndarray,
    b_major: str,
    n: int,
    dtype: str,
    accumulate: bool,
    of_halves: bool = False,
) -> None:
    """Issue accumulators (+)= a b, with b of n columns in shared memory.

    `of_halves` says that accumulators hold float16, two in a word: sums are rounded to them.
    """
    warp = _warpgroups().running()
    if not warp.fenced:
        raise SimulationError(
            "wgmma is issued and no wgmma_fence has come since the last wait, after which "
            "registers may have been touched"
        )
    b = _shared("b", b_descriptors, n, b_major, dtype)
    total = _sum(warp, accumulators, n, accumulate, of_halves)
    c = total.value if accumulate else np.zeros(total.value.shape, np.float32)
    total.value = add_products("wgmma", dtype, a.matrix, b.matrix.T, c, of_halves)
    for array in a.arrays:
        array.__class__ = BeingRead
    warp.issued.append(_Product(total, (a, b)))


def _warpgroups() -> Warpgroups:
    return current_thread().block.part(Warpgroups)


def _sum(warp: _Warp, accumulators, n: int, accumulate: bool, of_halves: bool) -> _Sum:
    """The sum that these arrays are under way to hold, begun where they are not."""
    total = warp.sums.get(id(accumulators[0]))
    if total is not None:
        if any(x is not y for x, y in zip(total.arrays, accumulators, strict=True)):
            raise SimulationError("wgmma: threads of a warp name different accumulators")
        if total.value.shape[1] != n:
            raise SimulationError(
                f"wgmma: n = {n} with an accumulator that a product with n = "
                f"{total.value.shape[1]} still writes"
            )
        return total
    rows, columns = _d_index(n)
    value = np.empty((_WARP_ROWS, n), np.float32)
    dtype, count = (np.uint32, n // 4) if of_halves else (np.float32, n // 2)
    if accumulate:
        held = np.array(accumulators)
        value[rows, columns] = held.view(np.float16) if of_halves else held
    for array in accumulators:
        own = type(array) is Local and whole(array) is array
        if not own or array.shape != (count,) or array.dtype != dtype:
            raise SimulationError(
                f"wgmma with n = {n}: the accumulator must be a local array of {count} "
                f"{np.dtype(dtype)}, whole, that no other product writes or reads"
            )
        array.view(np.uint8).fill(POISON)
        array.__class__ = InFlight
    total = warp.sums[id(accumulators[0])] = _Sum(accumulators, value, of_halves)
    return total


def _deliver(total: _Sum) -> None:
    registers = total.value[_d_index(total.value.shape[1])]
    if total.of_halves:
        registers = registers.astype(np.float16).view(np.uint32)
    for array, values in zip(total.arrays, registers, strict=True):
        array.__class__ = Local
        array[...] = values


def _check_unchanged(warpgroups: Warpgroups, operand: Operand) -> None:
    chunks = operand.chunks
    if chunks is not None and (warpgroups.chunks[chunks] != operand.content).any():
        raise SimulationError(
            "an operand in shared memory changed between the issue of a wgmma and the wait for "
            "it: whoever wrote it did not wait for all warps of this warpgroup"
        )


def _shared(
    name: str, descriptors, n_rows: int, major: str, dtype: str, own: slice = slice(None)
) -> Operand:
    """An operand in shared memory, (n_rows, k): a, or b transposed; of its chunks those `own`."""
    block = current_thread().block
    descriptor = int(descriptors[0])
    if (descriptors != descriptors[0]).any():
        raise SimulationError(f"wgmma: threads give different descriptors of operand {name}")
    chunks = _chunks(name, descriptor, n_rows, major)
    low, high = 16 * int(chunks.min()), 16 * int(chunks.max()) + 16
    what = f"operand {name} of wgmma"
    block.shared.check_range(what, low, high - low, 16)
    if major == "k":
        chunks = chunks[own]
    else:
        # Eight rows a chunk.
        eighths = slice(own.start and own.start // 8, own.stop and own.stop // 8)
        chunks, n_rows = chunks[:, eighths], len(range(n_rows)[own])
    # The warp executes it together: each of its threads must see what was stored.
    first = current_thread().index // _LANES * _LANES
    block.part(AsyncProxy).check(what, chunks, range(first, first + _LANES))
    content = block.part(Warpgroups).chunks[chunks]
    elements = content.view(_ELEMENTS[dtype])
    if dtype == "tf32":
        elements = (elements.view(np.uint32) & _TF32).view(np.float32)
    if major == "k":
        matrix = elements.reshape(len(content), -1)
    else:
        # (k, chunk, 8 rows)
        matrix = elements.reshape(len(content), -1)[:, :n_rows].T
    return Operand(matrix.astype(np.float64), chunks, content)


def _chunks(name: str, descriptor: int, n_rows: int, major: str) -> np.ndarray:
    """The numbers of an operand's 16-byte chunks, (rows, 2) if K-major, else (k, rows / 8)."""
    if base_offset := descriptor >> 49 & 7:
        raise SimulationError(
            f"wgmma: the descriptor of operand {name} has base offset {base_offset}; the "
            "simulator knows 0"
        )
    swizzle_bytes = _SWIZZLE_BYTES[descriptor >> 62]
    start, leading, stride = (descriptor >> shift & 0x3FFF for shift in (0, 16, 32))
    if major == "k":
        row_chunks = swizzle_bytes // 16
        if row_chunks and start % row_chunks + _K_CHUNKS > row_chunks:
            raise SimulationError(f"wgmma: operand {name} begins in the last chunk of a row")
        chunks = _k_major(n_rows, swizzle_bytes, leading, stride)
    else:
        chunks = _mn_major(n_rows, swizzle_bytes, leading, stride)
    return swizzled(start + chunks, swizzle_bytes)


@cache
def _k_major(n_rows: int, swizzle_bytes: int, leading: int, stride: int) -> np.ndarray:
    row, chunk = np.arange(n_rows)[:, None], np.arange(_K_CHUNKS)
    if not swizzle_bytes:
        return row // 8 * stride + row % 8 + chunk * leading
    return row // 8 * stride + row % 8 * (swizzle_bytes // 16) + chunk


@cache
def _mn_major(n_rows: int, swizzle_bytes: int, leading: int, stride: int) -> np.ndarray:
    k, chunk = np.arange(16)[:, None], np.arange(n_rows // 8)
    if not swizzle_bytes:
        return k // 8 * leading + k % 8 + chunk * stride
    row_chunks = swizzle_bytes // 16
    in_slab = k // 8 * stride + k % 8 * row_chunks + chunk % row_chunks
    return chunk // row_chunks * leading + in_slab


@cache
def _d_index(n: int):
    """Row, of the warp's, and column of every accumulator register, (32, n / 2)."""
    t, i = np.arange(_LANES)[:, None], np.arange(n // 2)
    rows = t // 4 + 8 * (i // 2 % 2)
    return rows, 8 * (i // 4) + 2 * (t % 4) + i % 2


@cache
def _a_index(per_register: int):
    """Row, of the warp's, and column of every element of a in registers, (32, 4, per_register)."""
    t, i = np.arange(_LANES)[:, None, None], np.arange(4)[:, None]
    h = np.arange(per_register)
    rows = t // 4 + 8 * (i % 2) + 0 * h
    return rows, per_register * (t % 4) + h + 4 * per_register * (i // 2)


def _text(instruction: tuple) -> str:
    name, *operands = instruction
    return f"{name}({', '.join(f'{int(x):#x}' for x in operands)})"
