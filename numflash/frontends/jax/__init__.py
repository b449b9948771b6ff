"""JAX: attention for `jit`, `grad`, `vmap` and `shard_map`, through XLA's foreign functions.

ffi          XLA's C interface: its structs, call frames, errors, versions
buffers      XLA's buffers as arrays, and the memory of a call, which XLA owns
calls        a call as the text that XLA's programs hold, and the handler that runs it
transforms   a call with its gradients and its batching rule
attention    the functions
ring         attention of a sequence that lies on several devices

On a GPU a handler launches on XLA's stream, on XLA's memory. In the simulator kernels run on the
buffers of JAX's CPU platform.
"""

_LEAST = (0, 5, 0)

try:
    import jax
except ImportError as error:
    raise ImportError('numflash.jax needs JAX: pip install "numflash[jax]"') from error
if jax.__version_info__ < _LEAST:
    raise ImportError(
        f"numflash.jax needs jax {'.'.join(map(str, _LEAST))} or newer, got {jax.__version__}"
    )
