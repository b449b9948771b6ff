"""The scalar types of kernels: NumPy scalar classes, known to Numba and the simulator.

`f32(x)` converts, `cuda.local.array(n, f32)` declares, on the GPU and in the simulator alike.
`TensorMap` annotates a kernel parameter that describes a tensor to bulk copies.
"""

import numpy as np

f32 = np.float32
i32 = np.int32
i64 = np.int64
u8 = np.uint8
u16 = np.uint16
u32 = np.uint32
u64 = np.uint64


class TensorMap:
    """A kernel parameter of 128 bytes that describes a tensor and its tiles to bulk copies."""

    n_bytes = 128
