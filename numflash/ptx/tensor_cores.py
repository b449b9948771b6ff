"""Matrix products of one warp, and the loads that bring their operands. PTX ISA 9.7.14 and 9.7.15.

Every product is d += a b with a of 16 x k, b of k x 8 and d of 16 x 8. Lane l stands at
(g, t) = (l // 4, l % 4), and a register holds, as the ISA's figures have it,

    d[i]     (g + 8 (i // 2), 2 t + i % 2)                             float32
    a[i]     (g + 8 (i % 2), 2 t + h + 8 (i // 2))     h = 0, 1        two 16-bit elements
    b[i]     (2 t + h + 8 i, g)
    a[i]     (g + 8 (i % 2), t + 4 (i // 2))                           one tf32 element
    b[i]     (t + 4 i, g)
    a[i]     (g + 8 (i % 2), 4 t + h + 16 (i // 2))    h = 0, 1, 2, 3  four e4m3 elements
    b[i]     (4 t + h + 16 i, g)

Sums are exact here and rounded once; the hardware aligns the terms of a sum to the largest and
cuts off the bits below, so its last bits may differ. `numflash.runtime.sums` has models of that.
"""

from functools import cache

import ml_dtypes
import numpy as np

from numflash.configs.formats import FORMATS
from numflash.ptx.instruction import instruction
from numflash.ptx.operands import Regs, Shared
from numflash.ptx.scalars import f32, i64, u8, u16, u32
from numflash.runtime.mode import SIMULATED
from numflash.runtime.sums import add_products

if SIMULATED:
    from numflash.simulator.engine import current_thread

_LANES = np.arange(32)
_G, _T = _LANES // 4, _LANES % 4
_WORDS_OF_A_ROW = np.arange(4)
_ELEMENTS = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

_D_REGISTER = np.arange(4)
# Of each register of d its place in the matrix, (32, 4), and the other way round, (16, 8).
_D_PLACES = 8 * (_G[:, None] + 8 * (_D_REGISTER // 2)) + 2 * _T[:, None] + _D_REGISTER % 2
_D_REGISTERS = np.argsort(_D_PLACES, None).reshape(16, 8)


@cache
def _a_halves(registers):
    """Of each element of a its place among the halves of all registers, (16, 4 * registers)."""
    i, h = np.arange(registers)[None, :, None], np.arange(2)
    rows = _G[:, None, None] + 8 * (i % 2)
    places = 4 * registers * rows + 2 * _T[:, None, None] + h + 8 * (i // 2)
    return np.argsort(places, None).reshape(16, 4 * registers)


@cache
def _b_halves(registers):
    """Of each element of b its place among the halves of all registers, (8 * registers, 8)."""
    i, h = np.arange(registers)[None, :, None], np.arange(2)
    places = 8 * (2 * _T[:, None, None] + h + 8 * i) + _G[:, None, None]
    return np.argsort(places, None).reshape(8 * registers, 8)


def _multiply_16_bit(d, a, b, dtype):
    a_matrix = _halves(a, _a_halves(a.shape[1]), dtype)
    _accumulate(d, a_matrix, _halves(b, _b_halves(b.shape[1]), dtype), dtype)


def _halves(registers, places, dtype):
    """The halves of registers at these places, as float64."""
    halves = np.ascontiguousarray(registers, u32).view(u16).reshape(-1)
    return halves.take(places).view(_ELEMENTS[dtype]).astype(np.float64)


def _accumulate(d, a_matrix, b_matrix, dtype):
    total = add_products("mma", dtype, a_matrix, b_matrix, d.reshape(-1).take(_D_REGISTERS))
    d[...] = total.reshape(-1).take(_D_PLACES)


@instruction(
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 <d>, <a>, <b>, <d>;",
    sm=80,
    collective="warp",
)
def mma_m16n8k16_f16(d: Regs(f32, 4), a: Regs(u32, 4, "r"), b: Regs(u32, 2, "r")):
    """d += a b; a: 16 x 16, b: 16 x 8 float16. PTX ISA 9.7.14.5.8."""
    _multiply_16_bit(d, a, b, "float16")


@instruction(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 <d>, <a>, <b>, <d>;",
    sm=80,
    collective="warp",
)
def mma_m16n8k16_bf16(d: Regs(f32, 4), a: Regs(u32, 4, "r"), b: Regs(u32, 2, "r")):
    """d += a b; a: 16 x 16, b: 16 x 8 bfloat16. PTX ISA 9.7.14.5.8."""
    _multiply_16_bit(d, a, b, "bfloat16")


@instruction(
    "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 <d>, <a>, {<b>}, <d>;",
    sm=75,
    collective="warp",
)
def mma_m16n8k8_f16(d: Regs(f32, 4), a: Regs(u32, 2, "r"), b: u32):
    """d += a b; a: 16 x 8, b: 8 x 8 float16. PTX ISA 9.7.14.5.7."""
    _multiply_16_bit(d, a, b[:, None], "float16")


@instruction(
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 <d>, <a>, <b>, <d>;",
    sm=80,
    collective="warp",
)
def mma_m16n8k8_tf32(d: Regs(f32, 4), a: Regs(u32, 4, "r"), b: Regs(u32, 2, "r")):
    """d += a b; a: 16 x 8, b: 8 x 8 float32, of which the low 13 bits are ignored.

    PTX ISA 9.7.14.5.7.
    """
    i, j = np.arange(4), np.arange(2)
    a_matrix, b_matrix = np.empty((16, 8), np.float64), np.empty((8, 8), np.float64)
    a_matrix[_G[:, None] + 8 * (i % 2), _T[:, None] + 4 * (i // 2)] = _tf32(a)
    b_matrix[_T[:, None] + 4 * j, _G[:, None] + 0 * j] = _tf32(b)
    _accumulate(d, a_matrix, b_matrix, "tf32")


def _tf32(registers):
    words = np.ascontiguousarray(registers, u32) & u32(0xFFFFE000)
    return words.view(f32).astype(np.float64)


@instruction(
    "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 <d>, <a>, <b>, <d>;",
    sm=89,
    collective="warp",
)
def mma_m16n8k32_e4m3(d: Regs(f32, 4), a: Regs(u32, 4, "r"), b: Regs(u32, 2, "r")):
    """d += a b; a: 16 x 32, b: 32 x 8 e4m3. PTX ISA 9.7.14.5.10.

    One QMMA on sm_89, sm_120 and sm_121. On sm_90, sm_100, sm_103 and sm_110 the assembler makes
    12 conversions to float16 and two products of them.
    """
    i, j, h = np.arange(4)[:, None], np.arange(2)[:, None], np.arange(4)
    g, t = _G[:, None, None], _T[:, None, None]
    a_matrix, b_matrix = np.empty((16, 32), np.float64), np.empty((32, 8), np.float64)
    a_matrix[g + 8 * (i % 2), 4 * t + h + 16 * (i // 2)] = _e4m3(a)
    b_matrix[4 * t + h + 16 * j, g] = _e4m3(b)
    _accumulate(d, a_matrix, b_matrix, "e4m3")


def _e4m3(registers):
    """(32, registers, 4): the bytes of each register, the lowest first."""
    words = np.ascontiguousarray(registers, u32)
    return FORMATS["e4m3"].decode(words.view(u8).reshape(*words.shape, 4))


@instruction(
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 <frag>, [<source>];", sm=75, collective="warp"
)
def ldmatrix_x4(frag: Regs(u32, 4, "w"), source: Shared(u32, "offset"), offset: i64):
    """Four 8 x 8 matrices of 16-bit elements; lanes 8 m to 8 m + 7 name the rows of matrix m.

    `offset` is the first of a row's four words. frag[m] is word t of row g of matrix m, which are
    its columns 2 t and 2 t + 1. PTX ISA 9.7.14.5.15.
    """
    rows = _rows(source, offset)
    frag[...] = rows[:, _G, _T].T


@instruction(
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 <frag>, [<source>];",
    sm=75,
    collective="warp",
)
def ldmatrix_x4_trans(frag: Regs(u32, 4, "w"), source: Shared(u32, "offset"), offset: i64):
    """As `ldmatrix_x4`, each matrix transposed: frag[m] is column g of its rows 2 t and 2 t + 1.

    PTX ISA 9.7.14.5.15.
    """
    elements = _rows(source, offset).view(u16)
    low, high = elements[:, 2 * _T, _G].T, elements[:, 2 * _T + 1, _G].T
    frag[...] = low.astype(u32) | high.astype(u32) << u32(16)


@instruction(
    "stmatrix.sync.aligned.m8n8.x4.shared.b16 [<target>], <frag>;", sm=90, collective="warp"
)
def stmatrix_x4(target: Shared(u32, "offset"), offset: i64, frag: Regs(u32, 4, "r")):
    """Four 8 x 8 matrices to shared memory; lanes 8 m to 8 m + 7 name the rows of matrix m.

    The inverse of `ldmatrix_x4`. PTX ISA 9.7.14.5.16.
    """
    rows = np.empty((4, 8, 4), u32)
    rows[:, _G, _T] = frag.T
    _store_rows(target, offset, rows)


@instruction(
    "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [<target>], <frag>;", sm=90, collective="warp"
)
def stmatrix_x4_trans(target: Shared(u32, "offset"), offset: i64, frag: Regs(u32, 4, "r")):
    """As `stmatrix_x4`, each matrix transposed: frag[m] is column g of its rows 2 t and 2 t + 1.

    The inverse of `ldmatrix_x4_trans`. PTX ISA 9.7.14.5.16.
    """
    halves = np.ascontiguousarray(frag).view(u16).reshape(32, 4, 2)
    elements = np.empty((4, 8, 8), u16)
    elements[:, 2 * _T, _G], elements[:, 2 * _T + 1, _G] = halves[..., 0].T, halves[..., 1].T
    _store_rows(target, offset, elements.view(u32))


def _store_rows(target, offset, rows) -> None:
    """Four words to each lane's offset; `rows` are (4 matrices, 8 rows, 4 words)."""
    smem = target[0]
    smem[_row_words("stmatrix", smem, offset)] = rows.reshape(32, 4)
    # A row counts as stored by the lane that names it.
    running = current_thread()
    lanes = running.block.threads[running.index - running.lane :][:32]
    for thread, first in zip(lanes, offset, strict=True):
        thread.stores.append((smem, first, 4, thread.block.fences))


def _rows(source, offset) -> np.ndarray:
    """The four words at each lane's offset, (4 matrices, 8 rows, 4 words)."""
    smem = source[0]
    return smem[_row_words("ldmatrix", smem, offset)].reshape(4, 8, 4)


def _row_words(name, smem, offset) -> np.ndarray:
    """The indices of the four words of each lane's row, (32, 4)."""
    offset = np.asarray(offset)
    if (offset & 3).any():
        lane = int((offset & 3).argmax())
        raise ValueError(
            f"{name}: lane {lane} names a row at word {offset[lane]}, which is not a multiple of "
            "16 bytes"
        )
    if offset.min() < 0 or offset.max() > smem.size - 4:
        lane = int(((offset < 0) | (offset > smem.size - 4)).argmax())
        raise IndexError(f"{name}: lane {lane} names word {offset[lane]} of {smem.size}")
    return offset[:, None] + _WORDS_OF_A_ROW
