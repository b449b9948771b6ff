"""Communicators that count what is sent, and that move nothing."""

from collections.abc import Callable


class _Wrapped:
    """A communicator around another; see `numflash.distributed.communicators.Communicator`."""

    def __init__(self, comm):
        self._comm, self.rank, self.size, self.agreed = comm, comm.rank, comm.size, comm.agreed

    def exchange(self, sends, receives, what):
        """See `Communicator`."""
        return self._comm.exchange(sends, receives, what)

    def all_gather(self, array, what):
        """See `Communicator`."""
        return self._comm.all_gather(array, what)

    def agree(self, text):
        """See `Communicator`."""
        return self._comm.agree(text)


class Counting(_Wrapped):
    """Counts the bytes that a rank sends in exchanges.

    Attributes:
        sent: bytes so far.
    """

    def __init__(self, comm):
        super().__init__(comm)
        self.sent = 0

    def exchange(self, sends, receives, what):
        """See `Communicator`."""
        self.sent += sum(array.nbytes for array, _ in sends)
        return super().exchange(sends, receives, what)


class Still(_Wrapped):
    """Moves nothing: the time that is left is that of the calls, of copies and of merges.

    What was to be received is whatever the memory held: results are wrong, and times are not.
    """

    def exchange(self, sends, receives, what) -> Callable[[], None]:
        """See `Communicator`."""
        return _no_wait


def _no_wait() -> None:
    """Nothing was posted."""
