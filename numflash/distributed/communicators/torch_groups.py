"""A ProcessGroup of torch.distributed: gloo for tensors on the CPU, NCCL for those on GPUs.

NCCL orders messages by streams, and its watchdog keeps the deadline; gloo's waits block. NumPy's
arrays, of the simulator, travel as tensors over the same memory.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np

from numflash.distributed.arrays import Arrays
from numflash.distributed.communicators import (
    Agreed,
    CommunicatorError,
    in_groups,
    texts_that_differ,
)
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.torch_tensors import is_tensor


class TorchGroup:
    """One rank of `of_torch`; see `Communicator`."""

    def __init__(self, group: Any, timeout: float | None):
        import torch
        import torch.distributed as dist

        self._torch, self._dist, self._group, self._timeout = torch, dist, group, timeout
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.agreed = Agreed()
        self._globals = dist.get_process_group_ranks(group)
        # The second is the older name.
        self._all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        # As in "cpu:gloo,cuda:nccl".
        config = dist.get_backend_config(group)
        self._backends = dict(each.split(":") for each in config.split(",") if ":" in each)
        self._fault: str | None = None
        self._wreck: list[Any] = []  # what a back end may still read or fill after a fault

    def exchange(self, sends, receives, what):
        """See `Communicator`. Raises UnsupportedError: no back end sends from such a device."""
        self._expect_no_fault(what)
        sends = [(self._tensor(x, what), self._expect_peer(peer, what)) for x, peer in sends]
        receives = [(self._tensor(x, what), self._expect_peer(peer, what)) for x, peer in receives]
        posted: list[tuple[Any, str]] = []
        held = sends, receives, posted
        for group in in_groups(sends, receives, self.size):
            self._post(*group, what, posted, held)

        def wait() -> None:
            deadline = self._deadline([tensor for tensor, _ in (*sends, *receives)])
            while posted:
                work, whose = posted[0]
                with self._faults(f"{what}: {whose}", held):
                    self._wait(work, deadline)
                del posted[0]

        return wait

    def all_gather(self, array, what):
        """See `Communicator`. Raises as `exchange`."""
        self._expect_no_fault(what)
        arrays = Arrays.of(array, "array")
        whole = arrays.empty((self.size, *array.shape), arrays.dtype_of(array))
        own = self._tensor(arrays.as_bytes(arrays.contiguous(array)), what)
        if own.numel():
            self._gather(own, self._tensor(arrays.as_bytes(whole), what), what)
        return whole

    def agree(self, text):
        """See `Communicator`: 32 bytes of each rank, and texts only where those differ."""
        what = "the agreement of ranks"
        self._expect_no_fault(what)
        return texts_that_differ(text, lambda own: self._gather_bytes(own, what))

    def _post(self, sends, receives, what: str, posted: list, held: Any) -> None:
        """Post messages in one group; `posted` gets works and what each of them is."""
        if not sends and not receives:
            return
        dist, makers = self._dist, []
        ends = []
        for verb, relation, side in (
            (dist.isend, "to", sends),
            (dist.irecv, "from", receives),
        ):
            for tensor, peer in side:
                makers.append(dist.P2POp(verb, tensor, self._globals[peer], self._group))
                ends.append(f"{tensor.numel()} bytes {relation} rank {peer}")
        every = ", ".join(ends)
        with self._faults(f"{what}: {every}", held):
            works = dist.batch_isend_irecv(makers)
        # NCCL has one work for all of them.
        names = ends if len(works) == len(ends) else [every] * len(works)
        posted += zip(works, names, strict=True)

    def _gather(self, own, whole, what: str) -> None:
        """Fill `whole` with the bytes of all ranks."""
        held = own, whole
        with self._faults(f"{what}: {own.numel()} bytes from each rank", held):
            work = self._all_gather(whole, own, self._group, async_op=True)
            self._wait(work, self._deadline([whole]))

    def _gather_bytes(self, own: bytes, what: str) -> list[bytes]:
        """The bytes of all ranks, as many each."""
        torch = self._torch
        # The first call of NCCL must be one of all ranks, which this is.
        on_gpu = self._backends.get("cuda", "gloo") != "gloo" and torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu"
        sent = torch.tensor(list(own), dtype=torch.uint8, device=device)
        whole = sent.new_empty(self.size * len(own))
        self._gather(sent, whole, what)
        rows = whole.cpu().view(self.size, -1).numpy()
        return [row.tobytes() for row in rows]

    def _tensor(self, array, what: str):
        """An array as a tensor over the same memory, which a back end moves."""
        if isinstance(array, np.ndarray):
            # PyTorch warns of arrays that nobody may write; they are only sent.
            array = self._torch.from_numpy(array if array.flags.writeable else array.copy())
        elif not is_tensor(array):
            raise TypeError(
                f"{what}: a group of torch.distributed moves PyTorch's tensors, got "
                f"{type(array).__module__}.{type(array).__qualname__}"
            )
        kind = array.device.type
        backend = self._backends.get(kind)
        if backend is None or (kind == "cuda" and backend == "gloo"):
            has = ", ".join(f"{name} for {device}" for device, name in self._backends.items())
            raise UnsupportedError(
                f"{what}: the process group moves no tensors on {array.device}; it has {has}, and "
                "gloo moves messages on the CPU only"
            )
        return array

    def _expect_peer(self, peer: int, what: str) -> int:
        if not 0 <= peer < self.size:
            raise ValueError(f"{what}: no rank {peer} among {self.size}")
        return peer

    def _deadline(self, tensors) -> float | None:
        # With a time NCCL's wait would block the host, and its watchdog has one of its own.
        if self._timeout is None or any(tensor.is_cuda for tensor in tensors):
            return None
        return time.monotonic() + self._timeout

    def _wait(self, work, deadline: float | None) -> None:
        if deadline is None:
            work.wait()
        else:
            work.wait(timedelta(seconds=max(1e-3, deadline - time.monotonic())))

    def _expect_no_fault(self, what: str) -> None:
        if self._fault is not None:
            raise CommunicatorError(
                f"{what}: the communicator cannot be used any more after a fault: {self._fault}"
            )

    @contextmanager
    def _faults(self, where: str, held: Any) -> Iterator[None]:
        """Turn the back end's errors into those of the protocol, and remember them."""
        if self._fault is not None:
            self._expect_no_fault(where)
        try:
            yield
        except RuntimeError as error:
            limit = "" if self._timeout is None else f" within {self._timeout:g} s"
            text = f"{where}: did not come through{limit}: {error}"
            self._fault = text
            self._wreck.append(held)
            raise CommunicatorError(text) from error


def of_torch(group: Any = None, timeout: float | None = None) -> TorchGroup:
    """The communicator of this process in a group of torch.distributed.

    Args:
        group: a ProcessGroup; None is the default one. Its ranks are those of the communicator.
        timeout: seconds that a wait may take, for back ends whose waits block, as gloo's. None,
            and always with NCCL: the group's own, `init_process_group(timeout=...)`, which NCCL's
            watchdog keeps by ending the process, unless `TORCH_NCCL_*` say otherwise.

    Returns:
        a communicator for tensors on the devices that the group has back ends for; on the CPU
        also for NumPy's arrays. Gloo is only asked to move messages on the CPU.

    Raises:
        TypeError: it is no ProcessGroup.
        ValueError: this process is not in it; a timeout that is not positive.
        UnsupportedError: torch.distributed was not initialised, or is not there.

    Example:
        >>> from numflash.distributed import of_torch
        >>> try:
        ...     comm = of_torch(timeout=60.0)
        ... except RuntimeError as error:
        ...     print(error)
        there is no process group: call torch.distributed.init_process_group first
    """
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout must be positive, or None for the group's, got {timeout}")
    try:
        import torch.distributed as dist

        is_there = dist.is_available() and dist.is_initialized()
    except ImportError:
        is_there = False
    if not is_there:
        raise UnsupportedError(
            "there is no process group: call torch.distributed.init_process_group first"
        )
    group = dist.group.WORLD if group is None else group
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group must have this process as a member")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup of torch.distributed, got {group!r}")
    return TorchGroup(group, timeout)
