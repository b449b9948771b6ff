"""The kernels for gradients of arrays that scores read, on the FMA units.

`shared` has their walks over tiles, `score_gradients` what a tile is.
"""

from numflash.configs import Traits
from numflash.kernels.kernel import Kernel
from numflash.kernels.portable.score_gradients import make_score_gradients
from numflash.kernels.shared import backward_columns, backward_scatter, backward_tiles


def make_backward_tiles_kernel(config, traits: Traits) -> Kernel:
    """The kernel of arrays with an axis of queries and one of keys."""
    return backward_tiles.make_kernel(config, traits, make_score_gradients(config, traits))


def make_backward_columns_kernel(config, traits: Traits) -> Kernel:
    """The kernel of arrays with an axis of keys."""
    return backward_columns.make_kernel(config, traits, make_score_gradients(config, traits))


def make_backward_scatter_kernel(config, traits: Traits) -> Kernel:
    """The kernel of arrays that are read at computed places."""
    traits = backward_scatter.of_a_read(traits)
    return backward_scatter.make_kernel(config, traits, make_score_gradients(config, traits))
