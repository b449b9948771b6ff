"""The vocabulary of programs: what a role of a block does, one step after another, without time.

A role is a thread, a warp, a warpgroup or a block whose threads do the same. Its program is a
generator of steps, and a kernel is a `Program`: its roles, with the channels and barriers at which
they meet. `engine` plays a program in time. In the simulator the real kernels have the same steps
in the same order (`tests/sim/test_pipeline_order.py`).

The verbs of a channel are those of `numflash.kernels.wgmma.channels`:

    by who fills buffers        Claim, then Fetch (a bulk copy) or Fill (written by itself)
    by who reads them           Wait, then Release; Send, by who stores what is there

Other steps:

    Begin, Until                products that run by themselves (`wgmma`), and a wait for them
    Multiply                    products that are finished when the next step begins
    Copy, Commit, Arrived       copies of threads (`cp.async`), their groups, and a wait for them
    Sync, Arrive                named barriers: with, and without a wait
    Work                        everything else that takes time: maxima, exponentials, a mask
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

REGISTERS = ("registers", 0)
"""An operand of products that lies in registers."""


class Claim(NamedTuple):
    """Wait until a buffer is empty, to fill it."""

    channel: str
    buffer: int


class Fetch(NamedTuple):
    """Announce the bytes of a buffer, and begin the bulk copies that bring them."""

    channel: str
    buffer: int
    tile: int


class Fill(NamedTuple):
    """Write a share of a buffer, which takes the time of `work`, and say so."""

    channel: str
    buffer: int
    tile: int
    work: str


class Wait(NamedTuple):
    """Wait until a buffer is full, to read it."""

    channel: str
    buffer: int


class Release(NamedTuple):
    """Give a buffer back that was read."""

    channel: str
    buffer: int


class Send(NamedTuple):
    """Store a full buffer to global memory, or add it there, and wait until it has been read."""

    channel: str
    buffer: int
    tile: int


class Begin(NamedTuple):
    """Issue products and commit them as a group.

    Attributes:
        product: its name: a key of `Rates.products`.
        tile: of the walk.
        operands: (name of the tile in shared memory, buffer) of both; or `REGISTERS`.
    """

    product: str
    tile: int
    operands: tuple[tuple[str, int], ...]


class Until(NamedTuple):
    """Wait until at most `pending` groups of products are under way."""

    pending: int


class Multiply(NamedTuple):
    """Products that the role waits for while they are computed; fields as of `Begin`."""

    product: str
    tile: int
    operands: tuple[tuple[str, int], ...]


class Copy(NamedTuple):
    """Begin to copy a tile to a buffer, by all threads."""

    name: str
    buffer: int
    tile: int


class Load(NamedTuple):
    """Copy a tile to a buffer through registers: it is there when the next step begins."""

    name: str
    buffer: int
    tile: int


class Commit(NamedTuple):
    """Make a group of the copies since the last one."""


class Arrived(NamedTuple):
    """Wait until at most `pending` groups of copies are under way."""

    pending: int


class Sync(NamedTuple):
    """Arrive at a barrier, and wait for all others."""

    barrier: str


class Arrive(NamedTuple):
    """Arrive at a barrier, and go on."""

    barrier: str


class Work(NamedTuple):
    """What takes time and waits for nobody.

    Attributes:
        kind: a key of `Rates.work`; "exp" takes the special-function units.
        tile: of the walk.
        reads: the (tile in shared memory, buffer) that it reads, if it does.
    """

    kind: str
    tile: int
    reads: tuple[str, int] | None = None


Step = (
    Claim
    | Fetch
    | Fill
    | Wait
    | Release
    | Send
    | Begin
    | Until
    | Multiply
    | Copy
    | Load
    | Commit
    | Arrived
    | Sync
    | Arrive
    | Work
)


def role(steps: Callable[..., Iterator[Step]], *args) -> Callable[[], Iterator[Step]]:
    """A role of a `Program`: its steps with these arguments, anew at each call."""
    return lambda: steps(*args)


class Channel(NamedTuple):
    """Buffers that roles fill and others empty, in turn.

    Attributes:
        title: what lies in them, in words: "K", "Q and dO".
        buffers: how many.
        readers: roles that release each; 0 where nobody does, because it is filled once, or given
            back with another.
        writers: roles that fill each.
    """

    title: str
    buffers: int
    readers: int = 1
    writers: int = 1

    def lane(self, buffer: int) -> str:
        """The name of a buffer's lane."""
        return self.title if self.buffers == 1 else f"{self.title} {buffer}"


class Walk(NamedTuple):
    """The tiles that a block walks over for one tile of its own rows.

    Attributes:
        tiles: how many.
        seen: (first, end) of those that the rows of each warpgroup see; () where all see all.
        masked: tiles that an edge of the mask crosses.
    """

    tiles: int
    seen: tuple[tuple[int, int], ...] = ()
    masked: tuple[int, ...] = ()

    def of_group(self, group: int) -> tuple[int, int]:
        """(first, end) of the tiles that a warpgroup's rows see."""
        return self.seen[group] if self.seen else (0, self.tiles)


@dataclass(frozen=True)
class Program:
    """What the roles of a block do.

    Attributes:
        roles: name -> a function that returns its steps. The first ones multiply.
        channels: name -> `Channel`.
        barriers: name -> the roles that arrive in each of its phases. Those named "turn" and a
            number say whose turn it is to multiply.
        buffers: tile in shared memory -> its number of buffers, of tiles that `Copy` and `Load`
            fill.
        shapes: product -> (rows, columns, depth) of one role's products in a tile.
        n_bytes: channel, or tile in shared memory -> bytes of a buffer that is copied to.
        scores: of one role in a tile.
        stored: elements that a role leaves in shared memory for others, or stores at its end.
        first: the product that begins a tile.
        unit: what multiplies: "tensor" or "FMA".
        is_in_step: whether a role is a whole block, whose warps wait for each other at barriers.
    """

    roles: Mapping[str, Callable[[], Iterator[Step]]]
    shapes: Mapping[str, tuple[int, int, int]]
    n_bytes: Mapping[str, int]
    scores: int
    stored: int = 0
    channels: Mapping[str, Channel] = field(default_factory=dict)
    barriers: Mapping[str, int] = field(default_factory=dict)
    buffers: Mapping[str, int] = field(default_factory=dict)
    first: str = "S"
    unit: str = "tensor"
    is_in_step: bool = False
