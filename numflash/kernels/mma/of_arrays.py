"""The kernels for gradients of what scores are made of besides Q and K, on the tensor cores.

`shared` has their walks over tiles, `score_gradients` what a tile is.
"""

from numflash.configs import Traits
from numflash.kernels.kernel import Kernel
from numflash.kernels.mma.score_gradients import make_score_gradients
from numflash.kernels.shared.backward_columns import make_columns_kernel
from numflash.kernels.shared.backward_rows import make_rows_kernel
from numflash.kernels.shared.backward_scatter import make_scatter_kernel, of_a_read
from numflash.kernels.shared.backward_tiles import make_tiles_kernel


def make_backward_rows_kernel(config, traits: Traits) -> Kernel:
    """The kernel of options and arrays that heads have, or queries."""
    return make_rows_kernel(config, traits, make_score_gradients(config, traits))


def make_backward_tiles_kernel(config, traits: Traits) -> Kernel:
    """The kernel of arrays with an axis of queries and one of keys."""
    return make_tiles_kernel(config, traits, make_score_gradients(config, traits))


def make_backward_columns_kernel(config, traits: Traits) -> Kernel:
    """The kernel of arrays with an axis of keys."""
    return make_columns_kernel(config, traits, make_score_gradients(config, traits))


def make_backward_scatter_kernel(config, traits: Traits) -> Kernel:
    """The kernel of arrays that are read at computed places."""
    traits = of_a_read(traits)
    return make_scatter_kernel(config, traits, make_score_gradients(config, traits))
