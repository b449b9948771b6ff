"""Layer 2: kernels. One file holds one kernel and the factory that builds it for a config.

`portable` runs on every GPU, `mma` and `wgmma` on tensor cores; `quantize` and `shared` hold the
kernels around them. `factories.make_kernel` finds the factory of a config.
"""
