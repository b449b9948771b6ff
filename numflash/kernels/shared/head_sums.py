"""Head sums: what all rows of a query head add to the gradient of something the head has.

    sums[head] = the sum of row_gradients[batch, head, row] over batch and row

`shared.delta` leaves the row_gradients. A block adds up one head: each thread every
num_threads-th row of each batch entry, in order; then the lanes of a warp, then the warps. No
atomics: the same bits in every run.
"""

from numflash.configs import HeadSumsConfig, Traits
from numflash.kernels.arguments import Pointer, Shape
from numflash.kernels.kernel import Kernel
from numflash.ptx import cuda, f32, i64, st_shared_f32
from numflash.tiles.portable.lanes import FULL_WARP


def make_head_sums_kernel(config: HeadSumsConfig, traits: Traits) -> Kernel:
    """The kernel for one config; see the module's docstring."""
    num_warps, num_threads = config.num_warps, config.num_threads

    def head_sums(
        row_gradients: Pointer(f32),  # (batch, num_heads_q, seqlen_q)
        sums: Pointer(f32),  # (num_heads_q,)
        shape: Shape,
    ):
        smem = cuda.shared.array(0, f32, alignment=16)
        head, lane, warp = cuda.blockIdx.x, cuda.threadIdx.x % 32, cuda.threadIdx.x // 32
        total = f32(0)
        for batch in range(shape.batch_size):
            first = i64(batch * shape.num_heads_q + head) * shape.seqlen_q
            for row in range(cuda.threadIdx.x, shape.seqlen_q, num_threads):
                total += row_gradients[first + row]
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
            sums[head] = total

    return Kernel(config.family, head_sums, num_threads, config.smem_bytes(traits))
