"""A kernel of your own in numflash's style: softmax of each row, one warp a row.

With NUMBA_ENABLE_CUDASIM=1 this runs it on the CPU, lane by lane; without, it compiles it for an
H100 and prints registers, spills and size, which needs no GPU either.
"""

import sys

import numpy as np

import numflash
from numflash.kernels.kernel import Kernel
from numflash.ptx import cuda, ex2_approx_ftz_f32, f32, i32, instruction, max_f32
from numflash.runtime.commands import command
from numflash.runtime.views import Pointer

LOG2_E = f32(1.4426950408889634)


# An instruction is its PTX and, in Python, its meaning for the simulator.
@instruction("rcp.approx.ftz.f32 <ret>, <x>;", sm=75)
def rcp_approx_ftz_f32(x: f32) -> f32:
    """1 / x, to 1 ulp. PTX ISA 9.7.3.14."""
    return f32(1) / x


def softmax_rows(x: Pointer(f32), y: Pointer(f32), columns: i32):
    """y[row] = softmax(x[row]); the block is one warp, the grid has one block a row."""
    lane, first = cuda.laneid, cuda.blockIdx.x * columns
    largest = f32(-np.inf)
    for column in range(lane, columns, 32):
        largest = max_f32(largest, x[first + column])
    for distance in (16, 8, 4, 2, 1):
        largest = max_f32(largest, cuda.shfl_xor_sync(0xFFFFFFFF, largest, distance))
    total = f32(0)
    for column in range(lane, columns, 32):
        total += ex2_approx_ftz_f32((x[first + column] - largest) * LOG2_E)
    for distance in (16, 8, 4, 2, 1):
        total += cuda.shfl_xor_sync(0xFFFFFFFF, total, distance)
    for column in range(lane, columns, 32):
        exponential = ex2_approx_ftz_f32((x[first + column] - largest) * LOG2_E)
        y[first + column] = exponential * rcp_approx_ftz_f32(total)


@command
def main() -> int:
    """Simulate or compile, as this process can; the exit status."""
    if numflash.simulating():
        from numflash.simulator import GlobalPointer, launch

        x = np.random.default_rng(0).standard_normal((5, 77)).astype(np.float32)
        y = np.full_like(x, np.nan)
        args = [GlobalPointer(x, x.dtype, "x"), GlobalPointer(y, y.dtype, "y"), i32(77)]
        launch(softmax_rows, grid=5, block=32, args=args)
        exact = np.exp(x.astype(np.float64))
        exact /= exact.sum(1, keepdims=True)
        print(f"simulated 5 rows of 77: largest error {np.abs(y - exact).max():.1e}")
    else:
        from numflash.machine_code.compiler import compile_kernel
        from numflash.runtime.devices import architecture

        kernel = Kernel("softmax-rows", softmax_rows, num_threads=32, smem_bytes=0)
        cubin = compile_kernel(lambda: kernel, architecture("sm_90a"))
        print(
            f"compiled for sm_90a in {cubin.compile_ms:.0f} ms: {cubin.registers} registers, "
            f"{cubin.spill_store_bytes} bytes spilled, {len(cubin.code)} bytes of machine code"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
