"""What moves the bytes between ranks. numflash has no transport of its own.

alone           a group of one rank
local           ranks that are threads of one process, on one GPU, several, or in the simulator
torch_groups    a ProcessGroup of torch.distributed: NCCL, gloo, ...
cupy_nccl       CuPy's NcclCommunicator, or its NCCLBackend
"""

import hashlib
from collections.abc import Callable, Hashable
from typing import Any, Protocol


class CommunicatorError(RuntimeError):
    """A peer died, never came, or sent something else; the communicator can't be used again.

    Example:
        >>> from numflash.distributed import CommunicatorError, local
        >>> comm, _ = local(2, timeout=0.1)
        >>> try:
        ...     comm.agree("a text")
        ... except CommunicatorError as error:
        ...     print(error)
        the agreement of ranks: rank 1 did not come within 0.1 s
    """


class Agreed:
    """What the ranks of a communicator have agreed on so far; `agreement` keeps it.

    Attributes:
        digests: of kinds of calls, by keys of this process.
        fault: of a call that ended on this rank in the middle, so that messages of later calls
            would meet those of its peers that wait; or None.
    """

    def __init__(self):
        self.fault: str | None = None
        self.digests: dict[Hashable, bytes] = {}
        self._known: dict[tuple, tuple] = {}
        self._results: dict[tuple, tuple[bytes | None, Any]] = {}

    def has(self, digest: bytes | None, place: tuple[int, ...]) -> bool:
        """Whether all ranks have agreed on it; `place` tells the other communicators."""
        return (digest, place) in self._known

    def add(self, digest: bytes, place: tuple[int, ...], others: tuple) -> None:
        """Remember it, and keep the communicators whose addresses `place` has.

        The oldest is forgotten first: all ranks add in the same order, so they forget alike.
        """
        self._known[digest, place] = others
        if len(self._known) > _MOST_AGREED:
            del self._known[next(iter(self._known))]

    def remember(self, key: Hashable, digest: bytes) -> None:
        """Remember the digest of a key."""
        if len(self.digests) >= _MOST_AGREED:
            self.digests.clear()
        self.digests[key] = digest

    def keep(self, key: Hashable | None, place: tuple[int, ...], digest: bytes | None, result):
        """The result, kept for a key that is not None.

        Args:
            key: of this process; one that cannot be hashed keeps nothing.
            place: as of `has`.
            digest: of the call; None where there are no others to agree with.
            result: of the checks of the call.
        """
        try:
            if key is not None:
                if len(self._results) >= _MOST_AGREED:
                    self._results.clear()
                self._results[key, place] = digest, result
        except TypeError:
            pass
        return result

    def kept(self, key: Hashable | None, place: tuple[int, ...]) -> tuple[bytes | None, Any]:
        """(digest, result) of a key; (None, None) where nothing was kept."""
        try:
            return self._results.get((key, place), _NOTHING)
        except TypeError:
            return _NOTHING


_MOST_AGREED = 4096
_NOTHING = (None, None)


class Communicator(Protocol):
    """A rank among others.

    What is posted comes after the work that is on the array library's current stream at that
    moment; what follows a wait on that stream comes after what arrived. Where there is no stream
    (the simulator, gloo) the wait blocks. Messages between two ranks arrive in the order in which
    they are posted, on both sides alike.

    A communicator may also have `abandon(why)`: tell the others at once that a call of this rank
    ended in an error. Without it they learn that at the group's deadline.

    Attributes:
        rank: this rank's number.
        size: how many ranks there are.
        agreed: what the ranks have agreed on.
    """

    rank: int
    size: int
    agreed: Agreed

    def exchange(
        self, sends: list[tuple[Any, int]], receives: list[tuple[Any, int]], what: str
    ) -> Callable[[], None]:
        """Post messages.

        Args:
            sends: (contiguous array of bytes, to which rank) each.
            receives: (contiguous array of bytes to fill, from which rank) each.
            what: names the step in errors, as in "ring step 2 of 4, keys and values".

        Returns:
            a function that waits. Until it has returned, what is sent must not be written, and
            what is received not be read.

        Raises:
            CommunicatorError: here or in the wait: a peer is gone, or did not come within the
                deadline of the group; the message names `what`, the peer and the bytes.
        """

    def all_gather(self, array, what: str):
        """The arrays of all ranks, of equal shapes and dtypes: a new one, (size, *its shape).

        Waits as an exchange's wait does. Raises CommunicatorError.
        """

    def agree(self, text: str) -> list[str] | None:
        """None if all ranks call this with the same text, else the texts of all, by rank.

        Waits on the host. Raises CommunicatorError.
        """


def in_groups(
    sends: list[tuple[Any, int]], receives: list[tuple[Any, int]], size: int
) -> list[tuple[list[tuple[Any, int]], list[tuple[Any, int]]]]:
    """Messages in groups of as many operations as NCCL takes, the same on all ranks.

    The n-th message from one rank to another is in the same group on both of them: a group ends
    only when each of its messages has met its other end. Messages without bytes are left out.
    """
    each = max(1, _MOST_OPERATIONS // (2 * max(1, size - 1)))
    groups: list[tuple[list, list]] = []
    for side, ends in enumerate((sends, receives)):
        counts: dict[int, int] = {}
        for array, peer in ends:
            if not array.nbytes:
                continue
            n = counts[peer] = counts.get(peer, -1) + 1
            while len(groups) <= n // each:
                groups.append(([], []))
            groups[n // each][side].append((array, peer))
    return groups


_MOST_OPERATIONS = 256
"""Of a group: with more NCCL was seen to hang."""


def texts_that_differ(text: str, gather_bytes: Callable[[bytes], list[bytes]]) -> list[str] | None:
    """What `Communicator.agree` returns: 32 bytes of each rank travel, texts where those differ.

    Args:
        text: this rank's.
        gather_bytes: gives the bytes of all ranks, by rank, of as many of this rank.
    """
    said = text.encode()
    if len(set(gather_bytes(hashlib.sha256(said).digest()))) == 1:
        return None
    sizes = [int.from_bytes(x, "little") for x in gather_bytes(len(said).to_bytes(8, "little"))]
    padded = gather_bytes(said.ljust(max(sizes), b"\0"))
    return [each[:size].decode() for each, size in zip(padded, sizes, strict=True)]
