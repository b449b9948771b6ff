"""The scalar types of kernels: NumPy scalar classes, known to Numba and the simulator.

`f32(x)` converts, `cuda.local.array(n, f32)` declares, on the GPU and in the simulator alike.
`Pointer(f32)` annotates a kernel parameter: the address of an array's first element. In a kernel
it is indexed like an array, `q[offset]`, with a 64-bit element offset. `TensorMap` annotates one
that describes a tensor to bulk copies.
"""

from dataclasses import dataclass

import numpy as np

f32 = np.float32
i32 = np.int32
i64 = np.int64
u8 = np.uint8
u16 = np.uint16
u32 = np.uint32
u64 = np.uint64


@dataclass(frozen=True)
class Pointer:
    """A kernel parameter that points to elements of `element` in global memory."""

    element: type


class TensorMap:
    """A kernel parameter of 128 bytes that describes a tensor and its tiles to bulk copies."""

    n_bytes = 128
