"""Inputs for every instruction, and kernels that apply it: to compare hardware with its meaning.

`CASES` has them all. Those of tensor cores, 8-bit floats, asynchronous copies and Hopper's
instructions have files of their own.
"""

import numpy as np

from numflash.ptx import (
    bar_arrive,
    bar_sync,
    bits_as_float,
    bra_over_store,
    cos_approx_ftz_f32,
    cuda,
    cvt_f32_f16,
    cvt_rmi_f32_f32,
    cvt_rn_bf16x2_f32,
    cvt_rn_f16_f32,
    cvt_rn_f16x2_f32,
    cvt_rna_tf32_f32,
    cvt_rzi_s32_f32,
    div_full_ftz_f32,
    div_u32,
    ex2_approx_ftz_f32,
    f32,
    float_as_bits,
    fma_rn_f32,
    i32,
    i64,
    ld_global_v4_f32,
    ld_global_v4_u32,
    ld_shared_u32,
    ld_shared_v2_f32,
    ld_shared_v4_f32,
    lg2_approx_ftz_f32,
    max_f32,
    min_f32,
    mov_ctaid_x,
    mov_tid_x,
    mul_rn_f32,
    red_global_add_s64,
    rsqrt_approx_ftz_f32,
    sin_approx_ftz_f32,
    sqrt_approx_ftz_f32,
    st_global_v2_f32,
    st_global_v2_u32,
    st_global_v4_f32,
    st_global_v4_u32,
    st_shared_f32,
    st_shared_u32,
    st_shared_v4_f32,
    st_shared_v4_u32,
    u16,
    u32,
)
from numflash.runtime.views import Pointer
from tests.support.async_copy_cases import ASYNC_COPY_CASES
from tests.support.bulk_copy_cases import BULK_COPY_CASES
from tests.support.fp8_cases import FP8_CASES
from tests.support.instruction_harness import THREADS, InstructionCase
from tests.support.mbarrier_cases import MBARRIER_CASES
from tests.support.tensor_core_cases import TENSOR_CORE_CASES
from tests.support.wgmma_cases import WGMMA_CASES

# Inputs


def floats(*bits: int) -> np.ndarray:
    """float32 values by their bits."""
    return np.array(bits, np.uint32).view(np.float32)


TINY = np.finfo(np.float32).tiny
NANS = floats(0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF812345)
SUBNORMALS = floats(1, 2, 0x7FFFFF, 0x80000001, 0x807FFFFF)
SPECIALS = np.concatenate(
    [
        np.array([0.0, -0.0, 1, -1, 0.5, -2, 3, 1e10, -1e10, 1e-30, -1e-30], np.float32),
        np.array([np.inf, -np.inf, np.finfo(np.float32).max, np.finfo(np.float32).min], "f4"),
        np.array([TINY, -TINY, np.nextafter(TINY, f32(1))], np.float32),
        SUBNORMALS,
        NANS,
    ]
)


def _random_floats(n: int) -> np.ndarray:
    """Random bits: every kind of float32, also infinities and NaNs."""
    bits = np.random.default_rng(1).integers(0, 2**32, n, np.uint32)
    bits[: n // 32] |= 0x7F800000
    return bits.view(np.float32)


def _exponents() -> np.ndarray:
    rng = np.random.default_rng(2)
    edges = np.array([-126, -127, -149, -150, -1000, 127, 128, 1000, 24, -24], np.float32)
    return np.concatenate(
        [
            SPECIALS,
            edges,
            np.nextafter(edges, f32(np.inf)),
            np.nextafter(edges, f32(-np.inf)),
            rng.uniform(-130, 130, 2000).astype(np.float32),
            rng.uniform(-1, 1, 1000).astype(np.float32),
        ]
    )


def _angles() -> np.ndarray:
    return np.concatenate(
        [SPECIALS[np.abs(SPECIALS) < 4], np.linspace(-3.14, 3.14, 999, dtype="f4")]
    )


def _positive() -> np.ndarray:
    return np.concatenate([SPECIALS, np.abs(_random_floats(1000)), _random_floats(40)])


def _counts() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 2**32, (2, 1000), np.uint32)
    return a, np.maximum(b >> rng.integers(0, 32, 1000, np.uint32), np.uint32(1))


def _pairs() -> tuple[np.ndarray, np.ndarray]:
    a, b = (x.ravel() for x in np.meshgrid(SPECIALS, SPECIALS))
    return np.concatenate([a, _random_floats(500)]), np.concatenate(
        [b, _random_floats(1000)[500:]]
    )


HALF_CODES = np.arange(65536, dtype=np.uint16)


def _to_round() -> np.ndarray:
    """Every float16, midpoints of neighbours and what lies around them, and both ends."""
    with np.errstate(invalid="ignore"):
        exact = HALF_CODES.view(np.float16).astype(np.float32)
    finite = exact[:0x7C00]
    # The last midpoint is 65520, from which on the result is infinite.
    middle = (finite + np.append(finite[1:], f32(65536))) / f32(2)
    middle = np.concatenate([middle[::7], middle[:9], middle[1020:1030], middle[-9:]])
    around = [middle, np.nextafter(middle, f32(np.inf)), np.nextafter(middle, f32(0))]
    return np.concatenate([exact, *around, *(-a for a in around), SPECIALS, _random_floats(500)])


def _to_round_in_pairs() -> tuple[np.ndarray, np.ndarray]:
    """Numbers between float16 values, each with another number beside it."""
    x = _to_round()[65536:]
    return x, np.roll(x, 1001)


def _between_bfloat16() -> tuple[np.ndarray, np.ndarray]:
    """bfloat16 values of every kind, their midpoints and what lies around, likewise in pairs."""
    high = np.concatenate([np.arange(0, 65536, 61), [0x7F7E, 0x7F7F, 0xFF7F, 0, 1, 0x7F, 0x80]])
    low = np.array([0, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (high[:, None] << 16 | low).astype(np.uint32).ravel()
    x = np.concatenate([bits.view(np.float32), SPECIALS])
    return x, np.roll(x, 1001)


def _between_tf32() -> np.ndarray:
    """Normal and subnormal numbers with tf32 values, midpoints and what lies around; infinities.

    Also NaNs.
    """
    high = np.concatenate([np.arange(0, 2**19, 509), [0x3FBFF, 0x7FBFF, 0, 1, 0x3FF, 0x400]])
    low = np.array([0, 0xFFF, 0x1000, 0x1001, 0x1FFF])
    bits = (high[:, None] << 13 | low).astype(np.uint32).ravel()
    return np.concatenate([bits.view(np.float32), SPECIALS, _random_floats(500)])


# Kernels


def _map(instruction, x_type, y_type, n):
    def apply(x: Pointer(x_type), y: Pointer(y_type)):
        for i in range(cuda.threadIdx.x, n, THREADS):
            y[i] = instruction(x[i])

    return apply


def _map_and_add(instruction, summand, n):
    """An absolute error of the instruction is one in units of the sum's last place."""

    def apply(x: Pointer(f32), y: Pointer(f32)):
        for i in range(cuda.threadIdx.x, n, THREADS):
            y[i] = instruction(x[i]) + summand

    return apply


def _map_pairs(instruction, y_type, n, x_type=f32):
    def apply(a: Pointer(x_type), b: Pointer(x_type), y: Pointer(y_type)):
        for i in range(cuda.threadIdx.x, n, THREADS):
            y[i] = instruction(a[i], b[i])

    return apply


def _load_global(instruction, storage, register, step):
    """Thread t loads the vector `THREADS - 1 - t`; `step` elements of `storage` are 16 bytes."""

    def load(x: Pointer(storage), y: Pointer(register)):
        frag = cuda.local.array(4, register)
        t = cuda.threadIdx.x
        instruction(frag, x, step * (THREADS - 1 - t))
        for i in range(4):
            y[4 * t + i] = frag[i]

    return load


def _store_global(instruction, storage, register, n, step):
    """Thread t stores n registers at vector 2 t: what lies between must stay as it is."""

    def store(x: Pointer(register), y: Pointer(storage)):
        frag = cuda.local.array(n, register)
        t = cuda.threadIdx.x
        for i in range(n):
            frag[i] = x[n * t + i]
        instruction(y, 2 * step * t, frag)

    return store


def _load_shared(instruction, storage, register, n):
    """Thread t loads the vector `THREADS - 1 - t`."""

    def load(x: Pointer(storage), y: Pointer(register)):
        smem = cuda.shared.array(0, storage, alignment=16)
        frag = cuda.local.array(n, register)
        t = cuda.threadIdx.x
        for i in range(n):
            smem[n * t + i] = x[n * t + i]
        cuda.syncthreads()
        instruction(frag, smem, n * (THREADS - 1 - t))
        for i in range(n):
            y[n * t + i] = frag[i]

    return load


def _load_shared_word(x: Pointer(u32), y: Pointer(u32)):
    smem = cuda.shared.array(0, u32, alignment=16)
    t = cuda.threadIdx.x
    for i in range(4):
        smem[4 * t + i] = x[4 * t + i]
    cuda.syncthreads()
    for i in range(4):
        y[4 * t + i] = ld_shared_u32(smem, 4 * (THREADS - 1 - t) + i)


def _store_shared_vector(instruction, scalar):
    """Thread t stores vector `2 (THREADS - 1 - t)`: what lies between must stay 1."""

    def store(x: Pointer(scalar), y: Pointer(scalar)):
        smem = cuda.shared.array(0, scalar, alignment=16)
        frag = cuda.local.array(4, scalar)
        t = cuda.threadIdx.x
        for i in range(8):
            smem[8 * t + i] = scalar(1)
        cuda.syncthreads()
        for i in range(4):
            frag[i] = x[4 * t + i]
        instruction(smem, 8 * (THREADS - 1 - t), frag)
        cuda.syncthreads()
        for i in range(8):
            y[8 * t + i] = smem[8 * t + i]

    return store


def _store_shared(instruction, scalar):
    def store(x: Pointer(scalar), y: Pointer(scalar)):
        smem = cuda.shared.array(0, scalar, alignment=16)
        t = cuda.threadIdx.x
        for i in range(4):
            instruction(smem, 4 * (THREADS - 1 - t) + i, x[4 * t + i])
        cuda.syncthreads()
        for i in range(4):
            y[4 * t + i] = smem[4 * t + i]

    return store


def _thread_index(x: Pointer(u32), y: Pointer(u32)):
    """Read before and after a barrier, behind which other threads have run."""
    y[2 * cuda.threadIdx.x] = mov_tid_x()
    cuda.syncthreads()
    y[2 * cuda.threadIdx.x + 1] = x[mov_tid_x()]


def _branch(x: Pointer(f32), y: Pointer(u32)):
    """The store that is branched over would be seen, and its barrier never be filled."""
    smem = cuda.shared.array(4, u32)
    t = cuda.threadIdx.x
    if t < 4:
        smem[t] = t
    cuda.syncthreads()
    bra_over_store(smem, 2, x[t], x[t])
    cuda.syncthreads()
    y[t] = smem[t % 4]


def _block_index(x: Pointer(u32), y: Pointer(u32)):
    """Read before and after a barrier; an index may come of it."""
    t = cuda.threadIdx.x
    y[2 * t] = mov_ctaid_x()
    cuda.syncthreads()
    y[2 * t + 1] = x[THREADS * mov_ctaid_x() + t]


def _sum_in_memory(x: Pointer(i64), y: Pointer(i64)):
    """Threads of both warps meet, eight at each of eight sums."""
    t = cuda.threadIdx.x
    red_global_add_s64(y, t % 8, x[t])


_STEPS = 6


def _exchange(x: Pointer(u32), y: Pointer(u32)):
    """Two warps of three exchange values; the third, at its own barrier, does not hold them up."""
    tile = cuda.shared.array(96, u32)
    t = cuda.threadIdx.x
    if t < 64:
        for step in range(_STEPS):
            tile[t] = x[64 * step + t]
            bar_sync(1, 64)
            y[64 * step + t] = tile[63 - t]
            bar_sync(1, 64)
    else:
        tile[t] = x[t]
        bar_sync(2, 32)
        y[64 * _STEPS + t - 64] = tile[159 - t]


def _produce_consume(x: Pointer(u32), y: Pointer(u32)):
    """Warp 0 hands chunks to warp 1 through a ring of two."""
    ring = cuda.shared.array(64, u32)
    t, lane = cuda.threadIdx.x, cuda.threadIdx.x % 32
    for step in range(_STEPS):
        stage = step % 2
        if t < 32:
            if step >= 2:
                bar_sync(3 + stage, 64)
            ring[32 * stage + lane] = x[32 * step + lane]
            bar_arrive(1 + stage, 64)
        else:
            bar_sync(1 + stage, 64)
            y[32 * step + lane] = ring[32 * stage + 31 - lane]
            if step < _STEPS - 2:
                bar_arrive(3 + stage, 64)


def _map_case(instruction, x, x_type, y_type, tolerance_ulp=0) -> InstructionCase:
    return InstructionCase(
        instruction.__name__,
        "",
        _map(instruction, x_type, y_type, x.size),
        (x,),
        ((x.shape, y_type),),
        tolerance_ulp=tolerance_ulp,
    )


def _pairs_case(instruction, pairs, y_type, tolerance_ulp=0) -> InstructionCase:
    x_type = pairs[0].dtype.type
    return InstructionCase(
        instruction.__name__,
        "",
        _map_pairs(instruction, y_type, pairs[0].size, x_type),
        pairs,
        ((pairs[0].shape, y_type),),
        tolerance_ulp=tolerance_ulp,
    )


def _sum_case(instruction, x, summand, tolerance_ulp) -> InstructionCase:
    return InstructionCase(
        instruction.__name__,
        "",
        _map_and_add(instruction, f32(summand), x.size),
        (x,),
        ((x.shape, f32),),
        tolerance_ulp=tolerance_ulp,
    )


def _map_triples(instruction, n):
    def map_triples(a: Pointer(f32), b: Pointer(f32), c: Pointer(f32), y: Pointer(f32)):
        for i in range(cuda.threadIdx.x, n, THREADS):
            y[i] = instruction(a[i], b[i], c[i])

    return map_triples


def _triples() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Specials and random numbers of all sizes, and products that all but cancel.

    Also sums that lie halfway between two float32 but for a bit that float64 cannot hold, and
    sums that are exactly halfway, normal and subnormal.
    """
    rng = np.random.default_rng(4)
    a, b = _pairs()
    specials = a, b, np.roll(a, 7)
    x, y = rng.standard_normal((2, 1000)).astype(np.float32)
    near = x, y, -(x * y)
    shifts = 2.0 ** rng.integers(-20, 20, 1000)
    mixed = x, y, (rng.standard_normal(1000) * shifts).astype(np.float32)
    one = np.ones(8, np.float32)
    tiny = np.array([2.0**-60, -(2.0**-60)] * 4, np.float32)
    # 1 + 2 ** -24 is halfway between 1 and its neighbour.
    halfway = np.array([1 + 2.0**-23, 1 - 2.0**-24, 1, 3] * 2, np.float32)
    sticky = (
        np.concatenate([tiny, tiny, one * f32(2.0**-12), one * f32(TINY)]),
        np.concatenate([one, -one, one * f32(2.0**-12), one * f32(2.0**-24)]),
        np.concatenate([halfway, -halfway, halfway, halfway * f32(TINY)]),
    )
    # 2 ** -24 (1 - 2 ** -46): just beside half a place of the addend, where float64 says halfway.
    signs = rng.choice([-1, 1], 200).astype(np.float32)
    beside = (
        signs * f32((1 + 2.0**-23) * 2.0**-12),
        np.full(200, (1 - 2.0**-23) * 2.0**-12, np.float32),
        (rng.integers(2**23, 2**24, 200) * rng.choice([-1, 1], 200)).astype(np.float32)
        * f32(2.0**-23),
    )
    subnormal = beside[0], beside[1] * f32(2.0**-103), beside[2] * f32(2.0**-126)
    sets = specials, near, mixed, sticky, beside, subnormal
    return tuple(np.concatenate(parts) for parts in zip(*sets, strict=True))


def _triples_case(instruction) -> InstructionCase:
    triples = _triples()
    n = triples[0].size
    kernel = _map_triples(instruction, n)
    return InstructionCase(instruction.__name__, "", kernel, triples, (((n,), f32),))


def _memory_case(instruction, kernel, x, y_type=None, *, variant="", spread=1, smem=False):
    """The output is `spread` times as large as the input; shared memory as large as the output."""
    y_type = y_type or x.dtype.type
    n_bytes = spread * x.nbytes
    return InstructionCase(
        instruction.__name__,
        variant,
        kernel,
        (x,),
        (((n_bytes // np.dtype(y_type).itemsize,), y_type),),
        smem_bytes=n_bytes if smem else 0,
    )


def _arithmetic_cases() -> list[InstructionCase]:
    bits = np.concatenate([SPECIALS, _random_floats(1000)])
    return [
        _map_case(ex2_approx_ftz_f32, _exponents(), f32, f32, tolerance_ulp=2),
        _pairs_case(max_f32, _pairs(), f32),
        _pairs_case(min_f32, _pairs(), f32),
        _pairs_case(mul_rn_f32, _pairs(), f32),
        _triples_case(fma_rn_f32),
        _pairs_case(div_full_ftz_f32, _pairs(), f32, tolerance_ulp=2),
        _pairs_case(div_u32, _counts(), u32),
        _sum_case(lg2_approx_ftz_f32, _positive(), 8, tolerance_ulp=2),
        _map_case(sqrt_approx_ftz_f32, _positive(), f32, f32, tolerance_ulp=2),
        _map_case(rsqrt_approx_ftz_f32, _positive(), f32, f32, tolerance_ulp=2),
        _sum_case(sin_approx_ftz_f32, _angles(), 2, tolerance_ulp=8),
        _sum_case(cos_approx_ftz_f32, _angles(), 2, tolerance_ulp=8),
        _map_case(cvt_rmi_f32_f32, bits, f32, f32),
        _map_case(cvt_rzi_s32_f32, bits, f32, i32),
        _map_case(cvt_f32_f16, HALF_CODES, u16, f32),
        _map_case(cvt_rn_f16_f32, _to_round(), f32, u16),
        _pairs_case(cvt_rn_f16x2_f32, _to_round_in_pairs(), u32),
        _pairs_case(cvt_rn_bf16x2_f32, _between_bfloat16(), u32),
        _map_case(cvt_rna_tf32_f32, _between_tf32(), f32, u32),
        _map_case(float_as_bits, bits, f32, u32),
        _map_case(bits_as_float, bits.view(np.uint32), u32, f32),
    ]


def _memory_cases() -> list[InstructionCase]:
    x = _random_floats(4 * THREADS)
    words, halves = x.view(np.uint32), x.view(np.uint16)
    pairs = slice(2 * THREADS)
    cases = []

    def load_global(instruction, x, register, step, variant=""):
        kernel = _load_global(instruction, x.dtype.type, register, step)
        cases.append(_memory_case(instruction, kernel, x, register, variant=variant))

    def store_global(instruction, x, storage, n, step, variant=""):
        kernel = _store_global(instruction, storage, x.dtype.type, n, step)
        cases.append(_memory_case(instruction, kernel, x, storage, variant=variant, spread=2))

    def shared(instruction, kernel, x, y_type=None, spread=1):
        cases.append(_memory_case(instruction, kernel, x, y_type, spread=spread, smem=True))

    load_global(ld_global_v4_u32, words, u32, 4, "from u32")
    load_global(ld_global_v4_u32, halves, u32, 8, "from u16")
    load_global(ld_global_v4_f32, x, f32, 4)
    store_global(st_global_v4_f32, x, f32, 4, 4)
    store_global(st_global_v2_f32, x[pairs], f32, 2, 2)
    store_global(st_global_v2_u32, words[pairs], u32, 2, 2, "to u32")
    store_global(st_global_v2_u32, words[pairs], u16, 2, 4, "to u16")
    store_global(st_global_v4_u32, words, u32, 4, 4, "to u32")
    store_global(st_global_v4_u32, words, u16, 4, 8, "to u16")
    shared(ld_shared_v4_f32, _load_shared(ld_shared_v4_f32, f32, f32, 4), x)
    shared(ld_shared_v2_f32, _load_shared(ld_shared_v2_f32, u32, f32, 2), words[pairs], f32)
    shared(ld_shared_u32, _load_shared_word, words)
    shared(st_shared_v4_f32, _store_shared_vector(st_shared_v4_f32, f32), x, spread=2)
    shared(st_shared_v4_u32, _store_shared_vector(st_shared_v4_u32, u32), words, spread=2)
    shared(st_shared_f32, _store_shared(st_shared_f32, f32), x)
    shared(st_shared_u32, _store_shared(st_shared_u32, u32), words)
    return cases


def _register_cases() -> list[InstructionCase]:
    x = np.arange(THREADS, dtype=np.uint32) * np.uint32(2654435761)
    return [InstructionCase("mov_tid_x", "", _thread_index, (x,), (((2 * THREADS,), np.uint32),))]


def _sum_cases() -> list[InstructionCase]:
    """Sums that begin with what memory holds, -1, and overflow."""
    x = np.random.default_rng(4).integers(-(2**63), 2**63 - 1, THREADS, np.int64)
    return [
        InstructionCase("red_global_add_s64", "", _sum_in_memory, (x,), (((8,), np.int64),)),
    ]


def _branch_cases() -> list[InstructionCase]:
    x = np.resize(np.concatenate([NANS, [0.0, -0.0, 1.0, np.inf, TINY]]).astype(f32), THREADS)
    return [InstructionCase("bra_over_store", "", _branch, (x,), (((THREADS,), np.uint32),))]


def _barrier_cases() -> list[InstructionCase]:
    steps = np.arange(64 * _STEPS, dtype=np.uint32) * np.uint32(2654435761)
    return [
        InstructionCase(
            "bar_sync",
            "",
            _exchange,
            (steps,),
            (((64 * _STEPS + 32,), np.uint32),),
            block=96,
        ),
        InstructionCase(
            "bar_arrive",
            "",
            _produce_consume,
            (steps[: 32 * _STEPS],),
            (((32 * _STEPS,), np.uint32),),
        ),
    ]


def _block_cases() -> list[InstructionCase]:
    """Of one block, as all cases are; `tests.sim.test_fp8_attention` has several."""
    x = np.arange(1, 1 + THREADS, dtype=np.uint32)
    return [InstructionCase("mov_ctaid_x", "", _block_index, (x,), (((2 * THREADS,), np.uint32),))]


BASIC_CASES = [
    *_arithmetic_cases(),
    *_memory_cases(),
    *_register_cases(),
    *_sum_cases(),
    *_branch_cases(),
    *_barrier_cases(),
]
CASES: dict[str, list[InstructionCase]] = {}
"""Instruction name -> its cases."""
for _case in [
    *BASIC_CASES,
    *_block_cases(),
    *FP8_CASES,
    *TENSOR_CORE_CASES,
    *ASYNC_COPY_CASES,
    *MBARRIER_CASES,
    *BULK_COPY_CASES,
    *WGMMA_CASES,
]:
    CASES.setdefault(_case.instruction, []).append(_case)
