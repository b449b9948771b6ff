"""Lists of the tiles of sequences with lengths of their own, made ready to be made."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from numflash.calls.launch import Launcher
from numflash.configs import PrepareConfig, ScheduleConfig, Traits
from numflash.kernels.sequences.arguments import BothEnds, Ends, ListPlan
from numflash.problem.sequences import (
    HEADER_WORDS,
    RECORD_WORDS,
    Lengths,
    ListRoom,
    ListShape,
    room_of,
    words_of_list,
)
from numflash.runtime.arrays import ArrayLibrary
from numflash.runtime.views import Operand

_LISTS = "lists"
_PER_LAUNCH = 2
# The kernel is the same for all problems.
_TRAITS = Traits("float16", 32, 32)


class Beside(Protocol):
    """What the launch that makes a list does besides, in blocks behind the first.

    Attributes:
        options: of the `PrepareConfig`, but for those of the list.
        traits: that its kernel is compiled for.
    """

    options: dict[str, Any]
    traits: Traits

    def laid_out(self, config: PrepareConfig) -> tuple[int, dict[str, Any]]:
        """(blocks, arguments besides those of the list)."""


class ScheduleKernel:
    """Lists of tiles made ready: the kernel bound to everything but addresses.

    Attributes:
        key: (lengths, shapes): kernels of equal keys make equal lists.
        names: of the lists among operands, in the order of their shapes.
        most: records that each may have.
        rooms: what else each may have.
    """

    def __init__(
        self,
        lengths: Lengths,
        shapes: Sequence[ListShape],
        device: int,
        config: ScheduleConfig | None = None,
        beside: Beside | None = None,
    ):
        """Say what is to be made; nothing is compiled before `build`.

        Args:
            lengths: of the call.
            shapes: of the lists.
            device: of the lengths.
            config: of the kernel, whose `splits` follows from the shapes; None is the one that is
                shipped.
            beside: what the launch of a list, which is the only one, does besides.

        Raises:
            UnsupportedError: a list of more records than a list has.
        """
        self.key = lengths, tuple(shapes)
        self.names = [shape.name for shape in shapes]
        self.rooms = [room_of(lengths, shape) for shape in shapes]
        self.most = [room.records for room in self.rooms]
        self._device, self._words, self._launchers = device, 0, []
        # Of each operand its first word.
        self._begins: dict[str, int] = {}
        plans: dict[bool, list[ListPlan]] = {False: [], True: []}
        for shape, room in zip(shapes, self.rooms, strict=True):
            # As the kernel lays them out, each at a multiple of 8 words.
            begin = self._words
            split_tiles = begin + HEADER_WORDS + RECORD_WORDS * room.records
            slots = split_tiles + HEADER_WORDS + RECORD_WORDS * room.split_tiles
            # In a list that is not split the tiles before each sequence come behind the records.
            parts = begin, split_tiles, slots
            self._begins |= dict(zip(shape.operands, parts, strict=False))
            plans[shape.least > 0].append(_plan(shape, begin, room))
            self._words += words_of_list(lengths, shape)
        for splits, of_kind in plans.items():
            of_kernel = config or ScheduleConfig()
            of_kernel = replace(of_kernel, splits=splits)
            for i in range(0, len(of_kind), _PER_LAUNCH):
                some = of_kind[i : i + _PER_LAUNCH]
                arguments = {"lengths": _ends_of(lengths), "lists": _LISTS}
                arguments |= {"first": some[0], "second": some[-1]}
                launch = of_kernel, _TRAITS, device, len(some), arguments
                if beside is not None:
                    of_both = PrepareConfig(splits=splits, **beside.options)
                    blocks, more = beside.laid_out(of_both)
                    launch = of_both, beside.traits, device, 1 + blocks, arguments | more
                self._launchers.append(Launcher(*launch))

    @property
    def operands(self) -> tuple[str, ...]:
        """The names of all operands that `bind` adds."""
        return tuple(self._begins)

    def build(self) -> None:
        """Compile and load; `bind` does it where this was not done before."""
        for launcher in self._launchers:
            launcher.build()

    def bind(self, operands: dict[str, Operand], library: ArrayLibrary) -> Callable[[int], None]:
        """Allocate, and a function that launches.

        Args:
            operands: the arrays of lengths, by the names of `problem.sequences.NAMES`. The lists
                are added, by `ListShape.operands`.
            library: that allocates.
        """
        room = library.empty((self._words,), "int32", self._device)
        for name, begin in self._begins.items():
            operands[name] = library.operand(room[begin:])
        given = operands | {_LISTS: library.operand(room)}
        launches = [launcher.bind(given) for launcher in self._launchers]

        def launch(stream: int) -> None:
            for each in launches:
                each(stream)

        return launch

    def bind_or_find(
        self, operands: dict[str, Any], library: ArrayLibrary
    ) -> dict[str, Callable[[int], None]]:
        """As `bind`, or with the lists of a `Schedule` among the operands; the launch by name.

        Raises:
            ValueError: the schedule is another call's.
        """
        planned = operands.get("schedule")
        launch = self.bind(operands, library) if planned is None else planned.bind(self, operands)
        return {"schedule": launch}


def _plan(shape: ListShape, begin: int, room: ListRoom) -> ListPlan:
    tile, stage, pack, by_keys, *band, _, shares, in_turn = shape
    tiles = tile, stage, pack, int(by_keys)
    most = room.tiles, room.records, room.slots, room.split_tiles
    return ListPlan(begin, *most, *tiles, *band, room.least, shares, int(in_turn))


def _ends_of(lengths: Lengths) -> BothEnds:
    def ends(side: str) -> Ends:
        names = f"cu_seqlens_{side}", f"seqlens_{side}", f"starts_{side}"
        found = [name if name in lengths.given else None for name in names]
        has = [int(name is not None) for name in found]
        of_keys = (lengths.added_k, int(lengths.with_start_k)) if side == "k" else (0, 0)
        return Ends(*found, *has, lengths.bound(side), lengths.most(side), *of_keys)

    return BothEnds(ends("q"), ends("k"), lengths.entries)
