"""A Numba kernel as users write it."""

from numba import cuda


@cuda.jit
def saxpy(a, x, y, out):
    """A grid-stride loop."""
    for i in range(cuda.grid(1), out.size, cuda.gridsize(1)):
        out[i] = a * x[i] + y[i]
