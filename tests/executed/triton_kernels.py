"""Kernels for Triton, and the process that compiles them: no GPU is needed, no simulator wanted.

    python triton_kernels.py < request

reads the pickled arguments of `compiled`, and answers with what it returns, pickled, too.
"""

import pickle
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def add(x, y, z, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(z + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


@triton.jit
def places(z, BLOCK: tl.constexpr):
    """z[i] = 1000 blocks + the block of i."""
    block = tl.program_id(0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(z + i, tl.zeros((BLOCK,), tl.int32) + 1000 * tl.num_programs(0) + block)


@triton.jit
def matmul(
    a,
    b,
    c,
    M,
    N,
    K,
    TA: tl.constexpr,
    TB: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """c (M, N) = a (M, K) b (K, N); where TA or TB is set, memory has the transpose."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(0, K, BK):
        if TA:
            x = tl.load(a + (first + k)[None, :] * M + rows[:, None])
        else:
            x = tl.load(a + rows[:, None] * K + (first + k)[None, :])
        if TB:
            y = tl.load(b + columns[None, :] * K + (first + k)[:, None])
        else:
            y = tl.load(b + (first + k)[:, None] * N + columns[None, :])
        total = tl.dot(x, y, total)
    where = c + rows[:, None] * N + columns[None, :]
    tl.store(where, total.to(c.dtype.element_ty))


@triton.jit
def matmul_of_tiles(
    a, b, c, K, TB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """As `matmul`, by tensor maps: what lies outside is zero, or not written."""
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(0, K, BK):
        x = a.load([row, first])
        if TB:
            y = b.load([column, first]).T
        else:
            y = b.load([first, column])
        total = tl.dot(x, y, total)
    c.store([row, column], total.to(tl.float16))


@triton.jit
def copy_3d(x, y, B: tl.constexpr, C: tl.constexpr):
    i = tl.program_id(0)
    y.store([i, B, C], x.load([i, B, C]))


@triton.jit
def copy_4d(x, y, B: tl.constexpr, C: tl.constexpr):
    i = tl.program_id(0)
    y.store([i, B, 1, C], x.load([i, B, 1, C]))


@triton.jit
def copy_5d(x, y, B: tl.constexpr, C: tl.constexpr):
    i = tl.program_id(0)
    y.store([i, B, 1, 0, C], x.load([i, B, 1, 0, C]))


@triton.jit
def convert(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n).to(y.dtype.element_ty), mask=i < n)


@triton.jit
def scalars(x, y, low, halves, product, wide, narrow, brain, chosen, n, BLOCK: tl.constexpr):
    """Calculations of one lane: each output by one instruction, or by two beside each other."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seen = i < n
    u, v = tl.load(x + i, mask=seen), tl.load(y + i, mask=seen)
    tl.store(low + i, tl.minimum(u, v), mask=seen)
    h = tl.load(halves + i, mask=seen)
    tl.store(product + i, h * h, mask=seen)
    tl.store(wide + i, h.to(tl.float32) * u, mask=seen)
    tl.store(narrow + i, u.to(tl.float16), mask=seen)
    tl.store(brain + i, v.to(tl.bfloat16), mask=seen)
    a, b = u.to(tl.int32, bitcast=True), v.to(tl.int32, bitcast=True)
    tl.store(chosen + i, (0x00FFFF00 & a) | (~0x00FFFF00 & b), mask=seen)


@triton.jit
def kept(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c (BM, BN) = a (BM, BK) times the sum of the BK rows high blocks of b (K, BN).

    One load each time round: an odd number of copies is under way.
    """
    rows, columns, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    x = tl.load(a + rows[:, None] * BK + k[None, :])
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(0, K, BK):
        y = tl.load(b + (first + k)[:, None] * BN + columns[None, :])
        total = tl.dot(x, y, total)
    tl.store(c + rows[:, None] * BN + columns[None, :], total)


@triton.jit
def attention(
    q,
    k,
    v,
    out,
    lse,
    n,
    scale_log2,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Causal, of (heads, n, D); lse in natural logarithms."""
    block, head = tl.program_id(0), tl.program_id(1)
    q += head * n * D
    k += head * n * D
    v += head * n * D
    out += head * n * D
    rows, columns, keys = block * BM + tl.arange(0, BM), tl.arange(0, D), tl.arange(0, BN)
    x = tl.load(q + rows[:, None] * D + columns[None, :], mask=rows[:, None] < n, other=0.0)
    largest = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    result = tl.zeros((BM, D), tl.float32)
    for first in range(0, tl.minimum(n, (block + 1) * BM), BN):
        at = first + keys
        y = tl.load(k + at[None, :] * D + columns[:, None], mask=at[None, :] < n, other=0.0)
        seen = (at[None, :] < n) & (rows[:, None] >= at[None, :])
        scores = tl.where(seen, tl.dot(x, y) * scale_log2, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.math.exp2(scores - larger[:, None])
        shrink = tl.math.exp2(largest - larger)
        total = total * shrink + tl.sum(weights, 1)
        z = tl.load(v + at[:, None] * D + columns[None, :], mask=at[:, None] < n, other=0.0)
        result = tl.dot(weights.to(v.dtype.element_ty), z, result * shrink[:, None])
        largest = larger
    where = out + rows[:, None] * D + columns[None, :]
    tl.store(where, (result / total[:, None]).to(out.dtype.element_ty), mask=rows[:, None] < n)
    tl.store(lse + head * n + rows, largest * 0.6931471805599453 + tl.log(total), mask=rows < n)


def compiled(
    kernel: str,
    target: int,
    signature: dict,
    constants: dict,
    warps: int = 4,
    stages: int = 2,
    aligned: bool = True,
) -> dict:
    """What `tests/executed/test_witnesses_triton.py` runs.

    Args:
        kernel: its name here.
        target: 80 for sm_80.
        signature: the types of parameters that are no constants, as Triton writes them.
        constants: the others' values.
        aligned: whether pointers and sizes are multiples of 16, as Triton's launcher would find.
    """
    function = globals()[kernel]
    names = list(function.arg_names)
    kinds = {name: signature.get(name, "constexpr") for name in names}
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if aligned and (kind == "i32" or kind.startswith("*"))
    }
    source = ASTSource(fn=function, signature=kinds, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return {
        "ptx": made.asm["ptx"],
        "entry": made.metadata.name,
        "shared_bytes": made.metadata.shared,
        "threads": 32 * made.metadata.num_warps,
        "maps": made.metadata.tensordesc_meta,
        "version": triton.__version__,
    }


if __name__ == "__main__":
    answer = compiled(**pickle.load(sys.stdin.buffer))
    sys.stdout.buffer.write(pickle.dumps(answer))
