"""Layer 2: kernels. One file holds one kernel and the factory that builds it for a config.

`portable` runs on every GPU; a folder named after a compute capability holds what is built
differently for one. `factories.make_kernel` finds what a config belongs to.
"""
