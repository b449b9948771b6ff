"""Matrix products of a warpgroup, which run while it does something else.

A product here is issued and committed as a group; no thread may touch its accumulator, nor the
shared memory it reads, before `make_wgmma_wait_group` has been called. Tiles are swizzled slabs of
rows of 128 bytes, as bulk copies leave them; each begins at a multiple of 1024 bytes.

Source: PTX ISA 9.7.15.5, shared memory layouts and matrix descriptors.
"""

from functools import cache

from numflash.ptx import (
    device_function,
    make_wgmma,
    u32,
    u64,
    wgmma_commit_group,
    wgmma_fence,
)
from numflash.tiles.mma.elements import MMA_ELEMENTS
from numflash.tiles.unrolled import make_unrolled

SLAB_BYTES = 128
_GROUP_BYTES = 8 * SLAB_BYTES  # after which the swizzle repeats
# The upper half of every descriptor: the swizzle's groups follow each other.
_UPPER = u64(_GROUP_BYTES >> 4 << 32 | 1 << 62)
_UPPER_HALF = u64(0xFFFFFFFF00000000)
# A step of a product consumes 32 bytes of a row of operand A.
_STEP_BYTES = 32
_STEPS_PER_SLAB = SLAB_BYTES // _STEP_BYTES

PACK_TWO = {dtype: MMA_ELEMENTS["sm80", dtype].pack_two for dtype in ("float16", "bfloat16")}
"""(low, high): a register of two 16-bit elements."""


@cache
def make_operand(slab_bytes, first_word=0):
    """operand(address): the operand whose first slab begins `first_word` words behind an address.

    It is a matrix descriptor. `slab_bytes` is from one slab to the next, for MN-major operands.
    """
    first, mask, shift = u32((slab_bytes >> 4 << 16) + (first_word >> 2)), u32(0x3FFFF), u32(4)

    @device_function
    def operand(address):
        return u64(u32(u32((address & mask) >> shift) + first)) | _UPPER

    return operand


@device_function
def advance(operand, number, step):
    """The operand that begins `number` times 16 x step bytes later.

    Nothing is carried to the upper half, but the assembler does not know that. Of an upper half
    that it knows it writes the constant anew for each product, one that it does not know stays in
    its register, and steps change the lower half only.
    """
    return u64(operand + u64(u32(number)) * u64(step))


@device_function
def behind(operand, offset):
    """The operand that begins 16 x offset bytes later, a constant: only the lower half changes."""
    return u64(u32(u32(operand) + u32(offset))) | u64(operand & _UPPER_HALF)


@cache
def make_product_nt(dtype, a_rows, b_rows, n_rows, columns):
    """product_nt(acc, a, b): begin acc = A B^T; both lie in shared memory by rows, equally wide.

    `a` and `b` are the operands (`make_operand`) of 64 rows of A and of n_rows of B, out of slabs
    of a_rows and b_rows.
    """
    multiply, multiply_more = (
        make_wgmma(n_rows, dtype, "shared", accumulates=more, in_place=more)
        for more in (False, True)
    )
    element_bytes = 1 if dtype == "e4m3" else 2
    steps = columns * element_bytes // _STEP_BYTES
    a_slab, b_slab = a_rows * SLAB_BYTES >> 4, b_rows * SLAB_BYTES >> 4

    @device_function
    def add_step(step, acc, a, b):
        slab, within = step // _STEPS_PER_SLAB, step % _STEPS_PER_SLAB * (_STEP_BYTES >> 4)
        a_step = behind(a, a_slab * slab + within)
        multiply_more(acc, a_step, behind(b, b_slab * slab + within))

    add_other_steps = make_unrolled(add_step, steps - 1)

    @device_function
    def product_nt(acc, a, b):
        # Hazard: the product would read registers that are still being written.
        wgmma_fence()
        multiply(acc, behind(a, 0), behind(b, 0))
        add_other_steps(1, acc, a, b)
        # Hazard: a wait for products would not wait for this one.
        wgmma_commit_group()

    return product_nt


@cache
def make_product_kn(dtype, a_rows, k_rows, columns):
    """product_kn(acc, a, b): begin acc = A B of 16-bit elements; both lie in shared memory.

    `a` names 64 rows of A, out of slabs of a_rows; `b` k_rows of B, by rows of k.
    """
    multiply, multiply_more = (
        make_wgmma(columns, dtype, "shared", "mn", accumulates=more, in_place=more)
        for more in (False, True)
    )
    steps, step_bytes, a_slab = k_rows // 16, 16 * SLAB_BYTES, a_rows * SLAB_BYTES >> 4

    @device_function
    def add_step(step, acc, a, b):
        slab, within = step // _STEPS_PER_SLAB, step % _STEPS_PER_SLAB * (_STEP_BYTES >> 4)
        b_step = behind(b, step * (step_bytes >> 4))
        multiply_more(acc, behind(a, a_slab * slab + within), b_step)

    add_other_steps = make_unrolled(add_step, steps - 1)

    @device_function
    def product_kn(acc, a, b):
        # Hazard: the product would read registers that are still being written.
        wgmma_fence()
        multiply(acc, behind(a, 0), behind(b, 0))
        add_other_steps(1, acc, a, b)
        # Hazard: a wait for products would not wait for this one.
        wgmma_commit_group()

    return product_kn


@cache
def make_product_pn(dtype, k_rows, columns):
    """product_pn(acc, p_frag, b): begin acc += P B of 16-bit elements; P lies in registers.

    `p_frag` is 64 x k_rows as `make_pack` leaves it; `b` names k_rows of B, by rows of k.
    """
    multiply = make_wgmma(columns, dtype, "registers", "mn")
    steps, step_bytes = k_rows // 16, 16 * SLAB_BYTES

    @device_function
    def add_step(step, acc, p_frag, b):
        b_step = behind(b, step * (step_bytes >> 4))
        multiply(acc, p_frag[4 * step : 4 * step + 4], b_step)

    add_steps = make_unrolled(add_step, steps)

    @device_function
    def product_pn(acc, p_frag, b):
        # Hazard: the product would read registers that are still being written.
        wgmma_fence()
        add_steps(0, acc, p_frag, b)
        # Hazard: a wait for products would not wait for this one.
        wgmma_commit_group()

    return product_pn


@cache
def make_product_pt(k_rows, columns, b_rows):
    """product_pt(acc, p_frag, b): begin acc = P B of e4m3; P lies in registers.

    `p_frag` is 64 x k_rows as `tiles.wgmma.fp8.make_pack` leaves it; `b` names B^T, `columns` rows
    of k_rows, out of slabs of b_rows.
    """
    multiply, multiply_more = (
        make_wgmma(columns, "e4m3", "registers", accumulates=more) for more in (False, True)
    )
    steps, b_slab = k_rows // _STEP_BYTES, b_rows * SLAB_BYTES >> 4

    @device_function
    def add_step(step, acc, p_frag, b):
        slab, within = step // _STEPS_PER_SLAB, step % _STEPS_PER_SLAB * (_STEP_BYTES >> 4)
        b_step = behind(b, b_slab * slab + within)
        multiply_more(acc, p_frag[4 * step : 4 * step + 4], b_step)

    add_other_steps = make_unrolled(add_step, steps - 1)

    @device_function
    def product_pt(acc, p_frag, b):
        # Hazard: the product would read registers that are still being written.
        wgmma_fence()
        multiply(acc, p_frag[0:4], behind(b, 0))
        add_other_steps(1, acc, p_frag, b)
        # Hazard: a wait for products would not wait for this one.
        wgmma_commit_group()

    return product_pt


@cache
def make_pack(dtype, n_tiles):
    """pack(p_frag, s_acc): scores as an operand A of 16-bit elements, in the same places."""
    pack_two = PACK_TWO[dtype]

    @device_function
    def pack(p_frag, s_acc):
        for tile in range(n_tiles):
            p_frag[2 * tile] = pack_two(s_acc[4 * tile], s_acc[4 * tile + 1])
            p_frag[2 * tile + 1] = pack_two(s_acc[4 * tile + 2], s_acc[4 * tile + 3])

    return pack
