"""All ranks of groups that have a communicator within each, and one across them."""

from numflash.distributed.communicators import Communicator


class Grid:
    """Rank `across.rank * within.size + within.rank` of all.

    Attributes:
        rank, size: of all ranks.

    Example:
        >>> import numpy as np
        >>> from numflash.distributed.communicators.alone import Alone
        >>> from numflash.distributed.communicators.grid import Grid
        >>> Grid(Alone(), Alone()).all_gather(np.zeros(3, "float32"), "numbers").shape
        (1, 3)
    """

    def __init__(self, within: Communicator, across: Communicator):
        """Of neighbours, and of the ranks with this one's number among theirs."""
        self._within, self._across = within, across
        self.rank = across.rank * within.size + within.rank
        self.size = within.size * across.size

    def all_gather(self, array, what: str):
        """See `Communicator`."""
        of_group = self._within.all_gather(array, what)
        return self._across.all_gather(of_group, what).reshape((self.size, *array.shape))
