"""Lists of tiles kept for many calls: `plan_varlen`."""

from collections.abc import Callable
from typing import Any

from numflash.calls.sequences import ScheduleKernel
from numflash.problem.sequences import NAMES, lengths_of
from numflash.runtime.arrays import library_of, on_stream, stream_address
from numflash.runtime.views import Operand


class _Lists:
    """Lists that one kernel makes, and whether they have been made."""

    def __init__(
        self, launch: Callable[[int], None], operands: dict[str, Operand], names: list[str]
    ):
        self._launch, self.operands, self.names = launch, operands, names
        self._is_made = False

    def make(self, stream: int) -> None:
        """Make them, of the lengths that there are now."""
        self._launch(stream)
        self._is_made = True

    def make_once(self, stream: int) -> None:
        """Make them unless they are there."""
        if not self._is_made:
            self.make(stream)


class Schedule:
    """The order in which kernels take the tiles of sequences; `numflash.plan_varlen` makes it.

    It holds the arrays that say where sequences lie, and lists of tiles that were made of them. A
    list is made by the first call that needs it, and kept: layers of a model, which have the same
    sequences, share it. Each kind of tiles and mask has its own.

    Attributes:
        arrays: cu_seqlens_q and the like, by name.

    Example:
        >>> import numpy as np, numflash
        >>> ends = np.array([0, 20, 50], np.int32)
        >>> numflash.plan_varlen(ends, ends)
        Schedule(2 sequences, cu_seqlens_q, cu_seqlens_k, 0 lists)
    """

    def __init__(self, arrays: dict[str, Any]):
        """Made by `numflash.plan_varlen`."""
        self.arrays = arrays
        views = {name: library_of(x, name).view(x, name) for name, x in arrays.items()}
        name, first = next(iter(arrays.items()))
        self._device, self._library = views[name].device, library_of(first, name)
        self._entries = lengths_of(views, (0, 0), self._device).entries
        self._operands = {name: library_of(x, name).glance(x)[0] for name, x in arrays.items()}
        self._lists: dict[tuple, _Lists] = {}

    def bind(self, kernel: ScheduleKernel, operands: dict[str, Operand]) -> Callable[[int], None]:
        """The lists of a call become operands, by their names; a function that launches.

        The first launch makes the lists, later ones and those of other calls find them.

        Args:
            kernel: that makes them.
            operands: of the call; its arrays of lengths must be those of this schedule.

        Raises:
            ValueError: other arrays.
        """
        self._expect_for(operands)
        if kernel.key not in self._lists:
            own = dict(self._operands)
            launch = kernel.bind(own, self._library)
            made = {name: own[name] for name in kernel.operands}
            self._lists[kernel.key] = _Lists(launch, made, kernel.names)
        lists = self._lists[kernel.key]
        operands |= lists.operands
        return lists.make_once

    def renew(self, stream=None) -> None:
        """Make its lists again, after other lengths were written into its arrays.

        Args:
            stream: a CUDA stream, or its address; None is the current one of the array library.
                Calls that use the lists must come after it.

        Nothing is allocated or copied: a CUDA graph can capture it.
        """

        def work(stream: int) -> None:
            for lists in self._lists.values():
                lists.make(stream)

        address = None if stream is None else stream_address(stream)
        on_stream(work, address, self._device, self.arrays, self._operands)

    def __repr__(self) -> str:
        return (
            f"Schedule({self._entries} sequences, {', '.join(self.arrays)}, "
            f"{sum(len(lists.names) for lists in self._lists.values())} lists)"
        )

    def _expect_for(self, operands: dict[str, Operand]) -> None:
        for name in NAMES:
            own, given = self._operands.get(name), operands.get(name)
            if (own is None) != (given is None) or (own and own.pointer != given.pointer):
                raise ValueError(
                    f"schedule must be planned for the arrays of the call: {name} is another one"
                )


def plan_varlen(
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    *,
    seqlens_q=None,
    seqlens_k=None,
    starts_q=None,
    starts_k=None,
) -> Schedule:
    """Plan calls of `attention_varlen` that have the same sequences, as those of all layers.

    Args:
        cu_seqlens_q, cu_seqlens_k, seqlens_q, seqlens_k, starts_q, starts_k: as for
            `attention_varlen`. They stay where they are, and are read when a list is made.

    Returns:
        For `attention_varlen(..., schedule=)` and its backward, with these very arrays. The first
        call makes the list of its tiles, later ones find it, and must come after it: where a CUDA
        graph captures the first, after a launch of the graph. After other lengths were written
        into the arrays, `Schedule.renew` makes the lists again.

    Raises:
        TypeError: an array that is not int32, or not on a GPU.
        ValueError: an array of a wrong shape, strides or device, or one too few.
        UnsupportedError: too many sequences.

    Memory of a list: 32 bytes for each tile that sequences in these arrays may have, and 4 for
    each sequence. Where tiles are split, 12 more for each tile, 36 for each record that splits
    add, and 32 for each tile that is split.

    Example:
        >>> import numpy as np, numflash
        >>> ends = np.array([0, 20, 50], np.int32)
        >>> schedule = numflash.plan_varlen(ends, ends)
        >>> x = np.random.default_rng(0).standard_normal((50, 2, 16)).astype("float16")
        >>> for layer in range(2):
        ...     x = numflash.attention_varlen(x, x, x, ends, ends, schedule=schedule)
        >>> schedule
        Schedule(2 sequences, cu_seqlens_q, cu_seqlens_k, 1 lists)
    """
    given = seqlens_q, seqlens_k, starts_q, starts_k
    arrays = dict(zip(NAMES, (cu_seqlens_q, cu_seqlens_k, *given), strict=True))
    arrays = {name: array for name, array in arrays.items() if array is not None}
    if not arrays:
        raise TypeError("plan_varlen needs cu_seqlens_q and cu_seqlens_k")
    return Schedule(arrays)
