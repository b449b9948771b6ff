"""Array sums: the gradient of an array or option, of the shares of rows or columns of each head.

    array_gradient[b, h, x] = the sum of shares[b, h, x] over those that share an element

`delta`, `backward_rows` and `backward_columns` leave the shares; an option that a head has shares
its element among all rows. A block adds up one element: `lanes` threads share the row of a head,
and each adds up every lanes-th of its places, row after row, in order; then the lanes of a warp,
then the warps. No atomics: the same bits in every run.
"""

from numflash.configs import ArraySumsConfig, Traits
from numflash.kernels.arguments import Pointer, Reduced
from numflash.kernels.kernel import Kernel
from numflash.ptx import cuda, f32, i32, i64, mov_ctaid_x, st_shared_f32
from numflash.tiles.division import divide, quotient
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.portable.lanes import FULL_WARP


def make_array_sums_kernel(config: ArraySumsConfig, traits: Traits) -> Kernel:
    """The kernel for one config, with results of dtype `traits.dtype`."""
    num_warps, num_threads, result = config.num_warps, config.num_threads, ELEMENTS[traits.dtype]
    from_f32 = result.from_f32

    def array_sums(
        shares: Pointer(f32),  # (batch, heads, length), contiguous
        array_gradient: Pointer(result.storage),  # the array's shape, contiguous
        reduced: Reduced,
    ):
        smem = cuda.shared.array(0, f32, alignment=16)
        kept, summed = reduced.kept, reduced.summed
        heads, length = i32(kept.heads * summed.heads), i32(kept.length * summed.length)
        above, place = divide(i32(mov_ctaid_x()), kept.length)
        batch, head = divide(above, kept.heads)
        thread = i32(cuda.threadIdx.x)
        lanes = max(i32(1), min(i32(num_threads), summed.length))
        # As many rows at once as there are threads; those left over add up nothing.
        rows_at_once = quotient(i32(num_threads), lanes)
        first_row, first_place = divide(thread, lanes)
        end = i32(summed.batch * summed.heads if first_row < rows_at_once else 0)
        total = f32(0)
        for row in range(first_row, end, rows_at_once):
            more_batches, more_heads = divide(i32(row), summed.heads)
            first = (i64(batch + more_batches) * heads + head + more_heads) * length + place
            for more_places in range(first_place, summed.length, lanes):
                total += shares[first + more_places]
        for distance in (16, 8, 4, 2, 1):
            total += cuda.shfl_xor_sync(FULL_WARP, total, distance)
        if thread % 32 == 0:
            st_shared_f32(smem, thread // 32, total)
        # Hazard: the sum of a warp would be missing.
        cuda.syncthreads()
        if thread == 0:
            total = f32(0)
            for i in range(num_warps):
                total += smem[i]
            of_head = reduced.first + i64(batch) * reduced.batch + i64(head) * reduced.head
            array_gradient[of_head + i64(place) * reduced.row] = from_f32(total)

    return Kernel(config.family, array_sums, num_threads, config.smem_bytes(traits))
