"""Machine code: made from kernels, kept in a cache, and read."""
