"""What moves the bytes between ranks. numflash has no transport of its own.

local           ranks that are threads of one process, on one GPU, several, or in the simulator
torch_groups    a ProcessGroup of torch.distributed: NCCL, gloo, ...
cupy_nccl       CuPy's NcclCommunicator, or its NCCLBackend
"""

from collections.abc import Callable
from typing import Any, Protocol


class CommunicatorError(RuntimeError):
    """A peer died, never came, or sent something else; the communicator can't be used again."""


class Communicator(Protocol):
    """A rank among others.

    What is posted comes after the work that is on the array library's current stream at that
    moment; what follows a wait on that stream comes after what arrived. Where there is no stream
    (the simulator, gloo) the wait blocks. Messages between two ranks arrive in the order in which
    they are posted, on both sides alike.

    Attributes:
        rank: this rank's number.
        size: how many ranks there are.
    """

    rank: int
    size: int

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
