"""Array sums: the gradient of an array, of the shares of rows or columns of each head.

    array_gradient[b, h, x] = the sum of shares[b, h, x] over those that share an element

`backward_rows` and `backward_columns` leave the shares. A block adds up one element: each thread
every num_threads-th share, in order; then the lanes of a warp, then the warps. No atomics: the
same bits in every run.
"""

from numflash.configs import ArraySumsConfig, Traits
from numflash.kernels.arguments import Pointer, Reduced
from numflash.kernels.kernel import Kernel
from numflash.ptx import cuda, f32, i32, i64, mov_ctaid_x, st_shared_f32
from numflash.tiles.blocks import divide
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
        lane, warp = cuda.threadIdx.x % 32, cuda.threadIdx.x // 32
        kept, summed = reduced.kept, reduced.summed
        heads, length = i32(kept.heads * summed.heads), i32(kept.length * summed.length)
        above, place = divide(i32(mov_ctaid_x()), kept.length)
        batch, head = divide(above, kept.heads)
        total = f32(0)
        for term in range(
            cuda.threadIdx.x, summed.batch * summed.heads * summed.length, num_threads
        ):
            above, more_places = divide(i32(term), summed.length)
            more_batches, more_heads = divide(above, summed.heads)
            row = i64(batch + more_batches) * heads + (head + more_heads)
            total += shares[row * length + (place + more_places)]
        for distance in (16, 8, 4, 2, 1):
            total += cuda.shfl_xor_sync(FULL_WARP, total, distance)
        if lane == 0:
            st_shared_f32(smem, warp, total)
        # Hazard: the sum of a warp would be missing.
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            total = f32(0)
            for i in range(num_warps):
                total += smem[i]
            of_head = reduced.first + i64(batch) * reduced.batch + i64(head) * reduced.head
            array_gradient[of_head + i64(place) * reduced.row] = from_f32(total)

    return Kernel(config.family, array_sums, num_threads, config.smem_bytes(traits))
