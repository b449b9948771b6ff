"""Inputs for every instruction, and kernels that apply it: to compare hardware with its meaning.

Each case is a kernel that compiles for a GPU and runs in the simulator. Its parameters are
pointers, to the inputs and then to the outputs. A run on hardware must give what
`run_simulated` gives: the same bits, or for approximations a result within `tolerance_ulp`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from numflash.ptx import (
    Pointer,
    bar_arrive,
    bar_sync,
    bits_as_float,
    cuda,
    cvt_f32_f16,
    cvt_rn_f16_f32,
    ex2_approx_ftz_f32,
    f32,
    float_as_bits,
    ld_global_v4_f32,
    ld_global_v4_u32,
    ld_shared_v4_f32,
    max_f32,
    st_global_v2_u32,
    st_global_v4_f32,
    st_shared_f32,
    st_shared_v4_f32,
    u16,
    u32,
)

# Allocators on the GPU align at least to this.
_ALIGNMENT = 256
_THREADS = 64


@dataclass(frozen=True)
class InstructionCase:
    """One kernel for one instruction, with its arguments.

    Attributes:
        instruction: name in `INSTRUCTIONS`.
        variant: tells cases of one instruction apart.
        kernel: takes pointers to the inputs, then to the outputs.
        inputs: arrays of the storage type of their pointers.
        outputs: shape and dtype of each output, which must hold 0xFF bytes before the launch.
        block: threads of the only block.
        smem_bytes: dynamic shared memory.
        tolerance_ulp: largest difference between hardware and simulator, in units in the last
            place; 0 means the same bits, also of a NaN.
    """

    instruction: str
    variant: str
    kernel: Callable
    inputs: tuple[np.ndarray, ...]
    outputs: tuple[tuple[tuple[int, ...], type], ...]
    block: int = _THREADS
    smem_bytes: int = 0
    tolerance_ulp: int = 0

    def __str__(self) -> str:
        return f"{self.instruction}-{self.variant}" if self.variant else self.instruction

    def new_outputs(self) -> list[np.ndarray]:
        """The outputs as they must be before the launch."""
        return [_aligned(shape, dtype) for shape, dtype in self.outputs]

    def difference(self, expected: list[np.ndarray], got: list[np.ndarray]) -> str | None:
        """The first element in which a run differs from what was expected; None if none does."""
        for number, (x, y) in enumerate(zip(expected, got, strict=True)):
            distance = bit_distance(x, y)
            if self.tolerance_ulp:
                distance[np.isnan(x) & np.isnan(y)] = 0
            wrong = np.flatnonzero(distance > self.tolerance_ulp)
            if wrong.size:
                first = wrong[0]
                inputs = [str(a.flat[first]) for a in self.inputs if a.size == x.size]
                return (
                    f"{self}: {wrong.size} of {x.size} elements of output {number} differ, first "
                    f"element {first} (input {', '.join(inputs) or 'elsewhere'}): expected "
                    f"{x.flat[first]!r}, got {y.flat[first]!r}"
                )
        return None


def run_simulated(case: InstructionCase) -> list[np.ndarray]:
    """The outputs of the case's kernel in the simulator."""
    from numflash.simulator import GlobalPointer, launch

    outputs = case.new_outputs()
    arrays = [_aligned(a.shape, a.dtype, a) for a in case.inputs] + outputs
    args = [GlobalPointer(array, array.dtype) for array in arrays]
    launch(case.kernel, 1, case.block, args, case.smem_bytes)
    return outputs


def bit_distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How many representable values lie between x and y; for integers |x - y|."""
    return np.abs(_position(x) - _position(y))


def _position(x: np.ndarray) -> np.ndarray:
    """Integers in the order of the values, -0.0 just below 0.0."""
    if x.dtype.kind != "f":
        return x.astype(np.int64).ravel()
    signed = x.ravel().view(f"i{x.itemsize}").astype(np.int64)
    return np.where(signed < 0, -(signed & (2 ** (8 * x.itemsize - 1) - 1)) - 1, signed)


def _aligned(shape, dtype, content=None) -> np.ndarray:
    """A copy of `content`, or 0xFF bytes, at an address like that of a GPU allocation."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    whole = np.full(n_bytes + _ALIGNMENT, 0xFF, np.uint8)
    start = -whole.__array_interface__["data"][0] % _ALIGNMENT
    array = whole[start : start + n_bytes].view(dtype).reshape(shape)
    if content is not None:
        array[...] = content
    return array


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


# Kernels


def _map(instruction, x_type, y_type, n):
    def apply(x: Pointer(x_type), y: Pointer(y_type)):
        for i in range(cuda.threadIdx.x, n, _THREADS):
            y[i] = instruction(x[i])

    return apply


def _map_pairs(instruction, n):
    def apply(a: Pointer(f32), b: Pointer(f32), y: Pointer(f32)):
        for i in range(cuda.threadIdx.x, n, _THREADS):
            y[i] = instruction(a[i], b[i])

    return apply


def _load_global(instruction, storage, register, step):
    """Thread t loads the vector `_THREADS - 1 - t`; `step` elements of `storage` are 16 bytes."""

    def load(x: Pointer(storage), y: Pointer(register)):
        frag = cuda.local.array(4, register)
        t = cuda.threadIdx.x
        instruction(frag, x, step * (_THREADS - 1 - t))
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


def _load_shared(x: Pointer(f32), y: Pointer(f32)):
    smem = cuda.shared.array(0, f32, alignment=16)
    frag = cuda.local.array(4, f32)
    t = cuda.threadIdx.x
    for i in range(4):
        smem[4 * t + i] = x[4 * t + i]
    cuda.syncthreads()
    ld_shared_v4_f32(frag, smem, 4 * (_THREADS - 1 - t))
    for i in range(4):
        y[4 * t + i] = frag[i]


def _store_shared_vector(x: Pointer(f32), y: Pointer(f32)):
    smem = cuda.shared.array(0, f32, alignment=16)
    frag = cuda.local.array(4, f32)
    t = cuda.threadIdx.x
    for i in range(8):
        smem[8 * t + i] = f32(-1)
    cuda.syncthreads()
    for i in range(4):
        frag[i] = x[4 * t + i]
    st_shared_v4_f32(smem, 8 * (_THREADS - 1 - t), frag)
    cuda.syncthreads()
    for i in range(8):
        y[8 * t + i] = smem[8 * t + i]


def _store_shared(x: Pointer(f32), y: Pointer(f32)):
    smem = cuda.shared.array(0, f32, alignment=16)
    t = cuda.threadIdx.x
    for i in range(4):
        st_shared_f32(smem, 4 * (_THREADS - 1 - t) + i, x[4 * t + i])
    cuda.syncthreads()
    for i in range(4):
        y[4 * t + i] = smem[4 * t + i]


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


def _cases() -> list[InstructionCase]:
    a, b = _pairs()
    bits = np.concatenate([SPECIALS, _random_floats(1000)])
    vectors = _random_floats(4 * _THREADS)
    words = vectors.view(np.uint32)
    pairs = words[: 2 * _THREADS]
    steps = np.arange(64 * _STEPS, dtype=np.uint32) * np.uint32(2654435761)
    n = vectors.size
    return [
        _map_case(ex2_approx_ftz_f32, _exponents(), f32, f32, tolerance_ulp=2),
        InstructionCase(
            "max_f32", "", _map_pairs(max_f32, a.size), (a, b), ((a.shape, np.float32),)
        ),
        _map_case(cvt_f32_f16, HALF_CODES, u16, f32),
        _map_case(cvt_rn_f16_f32, _to_round(), f32, u16),
        _map_case(float_as_bits, bits, f32, u32),
        _map_case(bits_as_float, bits.view(np.uint32), u32, f32),
        InstructionCase(
            "ld_global_v4_u32",
            "from u32",
            _load_global(ld_global_v4_u32, u32, u32, 4),
            (words,),
            ((words.shape, np.uint32),),
        ),
        InstructionCase(
            "ld_global_v4_u32",
            "from u16",
            _load_global(ld_global_v4_u32, u16, u32, 8),
            (words.view(np.uint16),),
            ((words.shape, np.uint32),),
        ),
        InstructionCase(
            "ld_global_v4_f32",
            "",
            _load_global(ld_global_v4_f32, f32, f32, 4),
            (vectors,),
            ((vectors.shape, np.float32),),
        ),
        InstructionCase(
            "st_global_v4_f32",
            "",
            _store_global(st_global_v4_f32, f32, f32, 4, 4),
            (vectors,),
            (((2 * n,), np.float32),),
        ),
        InstructionCase(
            "st_global_v2_u32",
            "to u32",
            _store_global(st_global_v2_u32, u32, u32, 2, 2),
            (pairs,),
            (((2 * pairs.size,), np.uint32),),
        ),
        InstructionCase(
            "st_global_v2_u32",
            "to u16",
            _store_global(st_global_v2_u32, u16, u32, 2, 4),
            (pairs,),
            (((4 * pairs.size,), np.uint16),),
        ),
        InstructionCase(
            "ld_shared_v4_f32",
            "",
            _load_shared,
            (vectors,),
            ((vectors.shape, np.float32),),
            smem_bytes=4 * n,
        ),
        InstructionCase(
            "st_shared_v4_f32",
            "",
            _store_shared_vector,
            (vectors,),
            (((2 * n,), np.float32),),
            smem_bytes=8 * n,
        ),
        InstructionCase(
            "st_shared_f32",
            "",
            _store_shared,
            (vectors,),
            ((vectors.shape, np.float32),),
            smem_bytes=4 * n,
        ),
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


CASES: dict[str, list[InstructionCase]] = {}
"""Instruction name -> its cases."""
for _case in _cases():
    CASES.setdefault(_case.instruction, []).append(_case)
