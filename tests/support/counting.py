"""Communicators that count what leaves their rank."""

from numflash.distributed.communicators.local import local


class Counting:
    """A communicator that counts.

    Attributes:
        sent: bytes that left this rank.
        agreements: how often the ranks compared what they ask for.
    """

    def __init__(self, comm):
        self._comm, self.rank, self.size, self.agreed = comm, comm.rank, comm.size, comm.agreed
        self.sent = self.agreements = 0

    def exchange(self, sends, receives, what):
        """See `Communicator`."""
        self.sent += sum(array.nbytes for array, _ in sends)
        return self._comm.exchange(sends, receives, what)

    def all_gather(self, array, what):
        """See `Communicator`."""
        self.sent += (self.size - 1) * array.nbytes
        return self._comm.all_gather(array, what)

    def agree(self, text):
        """See `Communicator`."""
        self.agreements += 1
        return self._comm.agree(text)


def counting(size: int) -> list[Counting]:
    """Of `size` ranks, by rank."""
    return [Counting(comm) for comm in local(size, timeout=60.0)]
