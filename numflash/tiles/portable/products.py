"""Matrix products of shared tiles, accumulated in float32 registers with one FFMA per term.

Every thread owns a small rectangle of the result (see `lanes`) and walks the inner dimension four
elements at a time: each 16-byte load from shared memory feeds as many FFMAs as the rectangle is
wide or high, which is what keeps the FMA units, not shared memory, busy.
"""

from functools import cache

from numflash.ptx import cuda, device_function, f32, fma_rn_f32, ld_shared_v4_f32
from numflash.tiles.portable.lanes import COLUMN_LANES, OUTPUT_STEP, ROW_LANES


@device_function
def add_four_products(total, a0, b0, a1, b1, a2, b2, a3, b3):
    """total + a0 b0 + a1 b1 + a2 b2 + a3 b3, term after term, each rounded once."""
    total = fma_rn_f32(a1, b1, fma_rn_f32(a0, b0, total))
    return fma_rn_f32(a3, b3, fma_rn_f32(a2, b2, total))


@cache
def make_product_nt(rows, columns, depth, a_pitch, b_pitch):
    """product_nt(acc, smem, a, b): acc = A B^T over `depth`; acc is rows x columns a thread.

    `a` and `b` are the offsets in smem of this thread's first row of A and of B.
    """
    n_acc, n_a = rows * columns, 4 * rows
    a_step, b_step = ROW_LANES * a_pitch, COLUMN_LANES * b_pitch

    @device_function
    def product_nt(acc, smem, a, b):
        a_frag = cuda.local.array(n_a, f32)
        b_frag = cuda.local.array(4, f32)
        for i in range(n_acc):
            acc[i] = f32(0)
        for k in range(0, depth, 4):
            for r in range(rows):
                ld_shared_v4_f32(a_frag[4 * r : 4 * r + 4], smem, a + a_step * r + k)
            for c in range(columns):
                ld_shared_v4_f32(b_frag, smem, b + b_step * c + k)
                b0, b1, b2, b3 = b_frag[0], b_frag[1], b_frag[2], b_frag[3]
                for r in range(rows):
                    a0, a1, a2, a3 = (
                        a_frag[4 * r],
                        a_frag[4 * r + 1],
                        a_frag[4 * r + 2],
                        a_frag[4 * r + 3],
                    )
                    i = columns * r + c
                    acc[i] = add_four_products(acc[i], a0, b0, a1, b1, a2, b2, a3, b3)

    return product_nt


@cache
def make_product_nn(rows, groups, depth, a_pitch, b_pitch):
    """product_nn(acc, smem, a, b): acc += A B over `depth`; acc is rows x 4 groups a thread.

    `a` is the offset in smem of this thread's first row of A, `b` of B's row 0 at this thread's
    first column.
    """
    n_a = 4 * rows
    a_step = ROW_LANES * a_pitch

    @device_function
    def product_nn(acc, smem, a, b):
        a_frag = cuda.local.array(n_a, f32)
        b_frag = cuda.local.array(16, f32)
        for k in range(0, depth, 4):
            for r in range(rows):
                ld_shared_v4_f32(a_frag[4 * r : 4 * r + 4], smem, a + a_step * r + k)
            for g in range(groups):
                for i in range(4):
                    row_k = b + (k + i) * b_pitch
                    ld_shared_v4_f32(b_frag[4 * i : 4 * i + 4], smem, row_k + OUTPUT_STEP * g)
                for r in range(rows):
                    a0, a1, a2, a3 = (
                        a_frag[4 * r],
                        a_frag[4 * r + 1],
                        a_frag[4 * r + 2],
                        a_frag[4 * r + 3],
                    )
                    for j in range(4):
                        b0, b1, b2, b3 = b_frag[j], b_frag[4 + j], b_frag[8 + j], b_frag[12 + j]
                        i = 4 * (groups * r + g) + j
                        acc[i] = add_four_products(acc[i], a0, b0, a1, b1, a2, b2, a3, b3)

    return product_nn
