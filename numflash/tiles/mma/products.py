"""Matrix products of one warp on the tensor cores, accumulated in float32 registers.

An operand B is read once for all `m_tiles` 16-row tiles of the warp: with two, a load of 512 bytes
from shared memory feeds four products, which keeps shared memory below the tensor cores' pace.
"""

from functools import cache

from numflash.ptx import cuda, device_function, f32, ldmatrix_x4_trans, u32
from numflash.tiles.mma.elements import MmaElement, make_transposed_operand
from numflash.tiles.mma.fragments import MMA_ROWS
from numflash.tiles.mma.layouts import CHUNK_WORDS, TileLayout, make_advance


@cache
def make_product_nt(element: MmaElement, m_tiles, n_tiles, a_layout: TileLayout, b_layout):
    """product_nt(acc, smem, a, b): acc = A B^T; both lie in shared memory by rows, equally wide.

    `a` is this lane's position in A as a row operand of the warp's first 16 rows, `b` in B as a
    column operand (see `fragments`). n_tiles is even.
    """
    n_acc, n_a = 4 * m_tiles * n_tiles, 4 * m_tiles
    steps, periods = a_layout.period // 2, a_layout.chunks // a_layout.period
    period_words = CHUNK_WORDS * a_layout.period
    a_tile_words, b_tile_words = MMA_ROWS * a_layout.pitch, MMA_ROWS * b_layout.pitch
    advance_a, advance_b = make_advance(a_layout), make_advance(b_layout)
    mma, load_frag = element.mma, element.load_frag

    @device_function
    def product_nt(acc, smem, a, b):
        a_frag = cuda.local.array(n_a, u32)
        b_frag = cuda.local.array(4, u32)
        for i in range(n_acc):
            acc[i] = f32(0)
        # Within a period of the swizzle addresses differ by constants, from one to the next by a
        # sum: the compiler may or may not unroll the outer loop.
        for period in range(periods):
            a_period, b_period = a + period * period_words, b + period * period_words
            for step in range(steps):
                for i in range(m_tiles):
                    a_tile = advance_a(a_period, step) + i * a_tile_words
                    load_frag(a_frag[4 * i : 4 * i + 4], smem, a_tile)
                for j in range(n_tiles // 2):
                    load_frag(b_frag, smem, advance_b(b_period, step) + j * b_tile_words)
                    for i in range(m_tiles):
                        left = 4 * (n_tiles * i + 2 * j)
                        mma(acc[left : left + 4], a_frag[4 * i : 4 * i + 4], b_frag[0:2])
                        mma(acc[left + 4 : left + 8], a_frag[4 * i : 4 * i + 4], b_frag[2:4])

    return product_nt


@cache
def make_product_pn(element: MmaElement, m_tiles, k_tiles, n_tiles, b_layout: TileLayout):
    """product_pn(acc, p_acc, smem, b): acc += P B, P from the accumulators of another product.

    P is 16 m_tiles x 8 k_tiles, rounded to the element type in registers; B lies in shared memory
    by rows of k. `b` is this lane's position in B as a transposed operand.
    """
    side_by_side = element.tiles_per_step
    steps, columns = 8 * k_tiles // element.k_step, n_tiles // side_by_side
    b_step, n_a, n_p = element.k_step * b_layout.pitch, 4 * m_tiles, 4 * element.k_step // 8
    advance = make_advance(b_layout)
    _, load_transposed = make_transposed_operand(element, b_layout)
    mma, pack = element.mma, element.pack

    @device_function
    def product_pn(acc, p_acc, smem, b):
        a_frag = cuda.local.array(n_a, u32)
        b_frag = cuda.local.array(4, u32)
        for step in range(steps):
            for i in range(m_tiles):
                pack(a_frag[4 * i : 4 * i + 4], p_acc, 4 * k_tiles * i + n_p * step)
            for j in range(columns):
                load_transposed(b_frag, smem, advance(b, j) + step * b_step)
                for i in range(m_tiles):
                    left = 4 * (n_tiles * i + side_by_side * j)
                    mma(acc[left : left + 4], a_frag[4 * i : 4 * i + 4], b_frag[0:2])
                    if side_by_side == 2:
                        mma(acc[left + 4 : left + 8], a_frag[4 * i : 4 * i + 4], b_frag[2:4])

    return product_pn


@cache
def make_product_tn(element: MmaElement, depth, n_tiles, a_layout: TileLayout, b_layout):
    """product_tn(acc, smem, a, b): acc += A^T B for 16-bit elements, 16 rows of the result a warp.

    Both lie in shared memory by rows of `depth`. `a` is this lane's position in A as a column
    operand, at the chunks of the warp's 16 columns of A; `b` in B as a transposed operand.
    """
    steps = depth // element.k_step
    a_step, b_step = element.k_step * a_layout.pitch, element.k_step * b_layout.pitch
    advance, mma = make_advance(b_layout), element.mma

    @device_function
    def product_tn(acc, smem, a, b):
        a_frag = cuda.local.array(4, u32)
        b_frag = cuda.local.array(4, u32)
        for step in range(steps):
            ldmatrix_x4_trans(a_frag, smem, a + step * a_step)
            for j in range(n_tiles // 2):
                ldmatrix_x4_trans(b_frag, smem, advance(b, j) + step * b_step)
                mma(acc[8 * j : 8 * j + 4], a_frag, b_frag[0:2])
                mma(acc[8 * j + 4 : 8 * j + 8], a_frag, b_frag[2:4])

    return product_tn
