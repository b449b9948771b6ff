"""A Triton kernel without a GPU: compiled to PTX, run on the CPU, compared with NumPy.

    NUMBA_ENABLE_CUDASIM=1 python examples/run_triton_ptx.py [80 | 90]

Triton compiles for GPUs that are not there (`pip install triton` is all that it needs), and
`numflash.run_ptx` executes what it made: `cp.async` and `mma` on sm_80, `wgmma` on sm_90.
The profile counts the instructions that warps executed.
"""

import sys

import numpy as np

import numflash
from numflash.runtime.commands import command

try:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    print("triton is not installed: `pip install triton` (it needs no GPU)", file=sys.stderr)
    sys.exit(2)

TILE, DEPTH, WARPS = 64, 64, 4


@triton.jit
def matmul(a, b, c, N, K, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """c = a b of whole tiles; a is (., K), b (K, N)."""
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    k = tl.arange(0, DEPTH)
    total = tl.zeros((TILE, TILE), tl.float32)
    for first in range(0, K, DEPTH):
        x = tl.load(a + rows[:, None] * K + (first + k)[None, :])
        y = tl.load(b + (first + k)[:, None] * N + columns[None, :])
        total = tl.dot(x, y, total)
    tl.store(c + rows[:, None] * N + columns[None, :], total)


def compiled(target: int):
    """`matmul` for sm_<target>, as Triton's launcher would ask for it."""
    types = {"a": "*fp16", "b": "*fp16", "c": "*fp32", "N": "i32", "K": "i32"}
    constants = {"TILE": TILE, "DEPTH": DEPTH}
    # Pointers and sizes are multiples of 16: loads of 16 bytes may be made of it.
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
    source = ASTSource(
        fn=matmul,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs=aligned,
    )
    return triton.compile(
        source, target=GPUTarget("cuda", target, 32), options={"num_warps": WARPS}
    )


@command
def main() -> int:
    """Compile, run, compare; the exit status."""
    if not numflash.simulating():
        print("set NUMBA_ENABLE_CUDASIM=1: run_ptx needs the simulator", file=sys.stderr)
        return 2
    target = sys.argv[1] if len(sys.argv) > 1 else "90"
    if target not in ("80", "90"):
        print(f"the GPU must be 80 or 90, got {target!r}", file=sys.stderr)
        return 2
    kernel = compiled(int(target))
    rng = np.random.default_rng(0)
    a = rng.standard_normal((128, 192)).astype(np.float16)
    b = rng.standard_normal((192, 128)).astype(np.float16)
    c = np.full((128, 128), np.nan, np.float32)
    profile = numflash.run_ptx(
        kernel.asm["ptx"],
        kernel.metadata.name,
        grid=(128 // TILE, 128 // TILE),
        block=32 * WARPS,
        # Triton adds two pointers to scratch memory, of which this kernel has none.
        arguments=[a, b, c, 128, 192, None, None],
        shared_bytes=kernel.metadata.shared,
        profile=True,
    )
    error = np.abs(c - a.astype(np.float64) @ b.astype(np.float64)).max()
    products = {name: n for name, n in profile.by_opcode.items() if "mma" in name}
    print(f"Triton {triton.__version__} for sm_{target}: largest error {error:.1e}")
    for name, n in products.items():
        print(f"{n:6} {name}")
    print(f"{profile.bytes['store', 'global']:6} bytes stored to global memory")
    return 0 if error < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
