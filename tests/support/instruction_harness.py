"""A kernel that applies one instruction, its arguments, and how two runs of it are compared.

The kernel compiles for a GPU and runs in the simulator. Its parameters are pointers, or tensor
maps, to the inputs and then to the outputs. A run on hardware must give what `run_simulated`
gives: the same bits, or for approximations a result within `tolerance_ulp`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from numflash.problem.tensor_maps import TensorLayout

# Allocators on the GPU align at least to this.
_ALIGNMENT = 256
THREADS = 64


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
        tensor_maps: for the first arrays, inputs before outputs, the layout of the tensor map that
            the kernel takes in the place of a pointer, or None.
        min_blocks: as for `compile_kernel`.
    """

    instruction: str
    variant: str
    kernel: Callable
    inputs: tuple[np.ndarray, ...]
    outputs: tuple[tuple[tuple[int, ...], type], ...]
    block: int = THREADS
    smem_bytes: int = 0
    tolerance_ulp: int = 0
    tensor_maps: tuple[TensorLayout | None, ...] = ()
    min_blocks: int | None = None

    @property
    def layouts(self) -> list[TensorLayout | None]:
        """For every array, inputs before outputs, the layout of its tensor map, if it has one."""
        n_arrays = len(self.inputs) + len(self.outputs)
        return [*self.tensor_maps, *[None] * (n_arrays - len(self.tensor_maps))]

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
    from numflash.simulator import GlobalPointer, SimulatedTensorMap, launch

    outputs = case.new_outputs()
    arrays = [_aligned(a.shape, a.dtype, a) for a in case.inputs] + outputs
    args = [
        SimulatedTensorMap(array, layout) if layout else GlobalPointer(array, array.dtype)
        for array, layout in zip(arrays, case.layouts, strict=True)
    ]
    launch(case.kernel, 1, case.block, args, case.smem_bytes)
    return outputs


def refusal(case: InstructionCase, limits) -> str | None:
    """Why a GPU cannot run a case; None if it can."""
    from numflash.ptx import INSTRUCTIONS

    major, minor = limits.compute_capability
    declared = INSTRUCTIONS[case.instruction]
    if case.tensor_maps and major > 9:
        return "tensor maps are passed as Hopper's compiler reads them"
    if not declared.runs_on(10 * major + minor):
        return f"{case.instruction} is of sm_{declared.sm}, this GPU is {limits.arch}"
    return None


def run_on_gpu(case: InstructionCase, cubin, upload: Callable, download: Callable, ordinal: int):
    """The outputs of the case's compiled kernel on a GPU.

    Args:
        case: what to run.
        cubin: its kernel, compiled for the GPU.
        upload: makes an array on the GPU of an array of bytes in NumPy, (bytes,).
        download: its inverse; waits for the launch.
        ordinal: of the GPU.
    """
    from numflash.calls.launch import DriverLaunch
    from numflash.runtime.arrays import library_of

    arrays = [*case.inputs, *case.new_outputs()]
    on_gpu = [upload(np.ascontiguousarray(a).reshape(-1).view(np.uint8)) for a in arrays]
    library = library_of(on_gpu[0], "input")
    names = [name for name, _ in cubin.parameters]
    operands = dict(zip(names, map(library.operand, on_gpu), strict=True))
    maps = {n: layout for n, layout in zip(names, case.layouts, strict=True) if layout}
    DriverLaunch(cubin, ordinal, 1, maps).bind(operands)(library.stream(ordinal))
    got = []
    for content, array in zip(on_gpu, arrays, strict=True):
        got.append(download(content).view(array.dtype).reshape(array.shape))
    return got[len(case.inputs) :]


def bit_distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The number of representable values between x and y; for integers |x - y|."""
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
