"""The second product of attention, O = O + weights P V, a tile of keys by itself."""

from functools import cache

from numflash.ptx import cuda, device_function, f32, fma_rn_f32, u32
from numflash.tiles.mma.elements import MmaElement
from numflash.tiles.mma.fragments import MMA_ROWS
from numflash.tiles.mma.layouts import CHUNK_WORDS, TileLayout, make_advance


@cache
def make_accumulate(element: MmaElement, m_tiles, k_tiles, n_tiles, b_layout: TileLayout):
    """accumulate(acc, p_acc, smem, b, weights): acc += weights * (P B), row by row.

    P is 16 m_tiles x 8 k_tiles, rounded to the operand type in registers; B^T lies in shared
    memory by rows, which are columns of the result. `b` is this lane's position in B^T as a column
    operand.

    P B begins at zero for each tile and is added in float32: FP8 tensor cores sum with 13 bits
    after the point, which is enough within a tile and too little over all of them. The weights
    bring the tile's P to the units of acc in a multiply-add, so that the addition is free.
    """
    per_step = 4 * element.k_step // 8
    steps, n_p = 8 * k_tiles // element.k_step, 4 * m_tiles * (8 * k_tiles // element.k_step)
    steps_per_period = b_layout.period // 2
    period_words, tile_words = CHUNK_WORDS * b_layout.period, MMA_ROWS * b_layout.pitch
    advance = make_advance(b_layout)
    mma, load_frag, pack, n_parts = element.mma, element.load_frag, element.pack, 8 * m_tiles

    @device_function
    def accumulate(acc, p_acc, smem, b, weights):
        p_frag = cuda.local.array(n_p, u32)
        b_frag = cuda.local.array(4, u32)
        part = cuda.local.array(n_parts, f32)
        for i in range(m_tiles):
            for step in range(steps):
                left = 4 * (steps * i + step)
                pack(p_frag[left : left + 4], p_acc, 4 * k_tiles * i + per_step * step)
        for j in range(n_tiles // 2):
            # No instruction, but a fence for the assembler: without it so many columns begin at
            # once that registers spill.
            cuda.syncwarp()
            for i in range(n_parts):
                part[i] = f32(0)
            for step in range(steps):
                period = step // steps_per_period
                position = advance(b + period * period_words, step % steps_per_period)
                load_frag(b_frag, smem, position + j * tile_words)
                for i in range(m_tiles):
                    p, left = 4 * (steps * i + step), 8 * i
                    mma(part[left : left + 4], p_frag[p : p + 4], b_frag[0:2])
                    mma(part[left + 4 : left + 8], p_frag[p : p + 4], b_frag[2:4])
            for i in range(m_tiles):
                left = 4 * (n_tiles * i + 2 * j)
                for e in range(8):
                    weight = weights[2 * i + e // 2 % 2]
                    acc[left + e] = fma_rn_f32(part[8 * i + e], weight, acc[left + e])

    return accumulate
