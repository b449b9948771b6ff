"""A group of one rank, which exchanges nothing."""

from numflash.distributed.arrays import Arrays
from numflash.distributed.communicators import Agreed


class Alone:
    """Rank 0 of 1; see `Communicator`.

    Example:
        >>> from numflash.distributed.communicators.alone import Alone
        >>> Alone().agree("a text") is None
        True
    """

    rank, size = 0, 1

    def __init__(self):
        self.agreed = Agreed()

    def exchange(self, sends, receives, what):
        """See `Communicator`. Raises ValueError: there is nobody to send to."""
        if sends or receives:
            raise ValueError(f"{what}: a rank that is alone has nobody to exchange messages with")
        return _nothing

    def all_gather(self, array, what):
        """See `Communicator`: a copy of the array, with an axis of 1 before its own."""
        arrays = Arrays.of(array, "array")
        whole = arrays.empty((1, *array.shape), arrays.dtype_of(array))
        whole[0] = array
        return whole

    def agree(self, text):
        """See `Communicator`: None."""
        return None


def _nothing() -> None:
    pass
