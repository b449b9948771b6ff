"""A warp: its registers, and its lanes in groups that are at the same place of a program.

Of the groups that can go on the one that is furthest behind does, so that lanes that went apart
meet again where their ways do. An instruction that lanes execute together waits until all of them
are there.
"""

import numpy as np

from numflash.executor.memory import RANK_BYTES, WINDOWS, Memory, poisoned, space_of
from numflash.executor.operands import WAITS
from numflash.executor.program import END, TRUE, Program
from numflash.executor.special_registers import special_registers
from numflash.executor.text import TYPE_BYTES
from numflash.executor.types import BITS
from numflash.runtime.errors import UnsupportedError
from numflash.simulator.bulk_copies import BulkCopies
from numflash.simulator.engine import become
from numflash.simulator.proxies import AsyncProxy

_LANES = np.arange(32)
_POISON = {n: np.full(32, (1 << 8 * n) - 1, BITS[n]) for n in (1, 2, 4, 8)}
_NOTHING = {n: np.zeros(32, BITS[n]) for n in (1, 2, 4, 8)}


class Thread:
    """A lane, as the bodies of instructions ask for it."""

    __slots__ = ("block", "index", "lane", "warp", "stores")

    def __init__(self, block, index: int):
        self.block, self.index, self.lane, self.warp = block, index, index % 32, index // 32
        self.stores: list[tuple] = []


class Group:
    """Lanes at the same piece of the program.

    Attributes:
        state: of an instruction that waits, to go on with; None before it began.
        waits_for: the awaited thing, in words.
    """

    __slots__ = ("piece", "mask", "full", "state", "waits", "waits_for")

    def __init__(self, piece: int, mask: np.ndarray):
        self.piece, self.mask, self.full = piece, mask, bool(mask.all())
        self.state, self.waits, self.waits_for = None, False, ""


class Warp:
    """32 lanes, of which the block may have fewer.

    Attributes:
        alive: the lanes that have not returned.
        steps: pieces executed since something happened in the block.
        looked: whether it has looked at memory by an acquire, which ends its turn.
        group: the group that runs.
    """

    WINDOWS = WINDOWS

    def __init__(self, block, number: int, program: Program):
        self.block, self.number, self.program = block, number, program
        self.threads = [Thread(block, 32 * number + lane) for lane in range(32)]
        # What a predicate holds before it is written is anything, in each lane.
        unwritten = int(block.random() * 2**32) >> _LANES & 1 == 1
        self.registers = [
            unwritten if type_ == "pred" else _POISON[TYPE_BYTES[type_]]
            for type_ in program.entry.register_types
        ]
        self.alive = 32 * number + _LANES < block.size
        self.groups = [Group(0, self.alive)] if program.pieces else []
        self.group: Group | None = None
        self.steps, self.looked = 0, False
        self.memory: Memory = block.memory
        # Accumulators of products under way, and registers that they read: see `products`.
        self.sums, self.being_read = [], []
        self._special = special_registers(
            *(number, block.grid, block.extents, block.position, program.entry.cluster),
            program.dynamic_bytes,
        )
        self._local = poisoned(32 * program.local_bytes).reshape(32, program.local_bytes)

    def special(self, name: str) -> np.ndarray:
        """A special register."""
        return self._special[name]

    # Running

    def run(self, most: int) -> int:
        """Execute at most so many pieces. Returns their number, 0 where all groups wait."""
        done, counts = 0, self.block.counts
        # Lanes that look at memory may wait for others of this warp.
        fair, self.looked = self.looked and self.block.random() < 0.5, False
        for group in self.groups:
            group.waits = False
        while done < most:
            ready = [group for group in self.groups if not group.waits]
            if not ready:
                break
            if fair:
                group = self.group = ready[int(self.block.random() * len(ready))]
            else:
                group = self.group = min(ready, key=lambda group: group.piece)
            while done < most:
                piece = group.piece
                function = self.program.function(piece, not group.full)
                following = function(self, self.registers, group.mask)
                if following is WAITS:
                    group.waits = True
                    break
                done += 1
                if self.looked:
                    most = done
                if counts is not None:
                    counts[piece] += 1
                group.state = None
                if type(following) is tuple:
                    following = self._part(group, *following)
                    if following is None:
                        break
                if len(self.groups) == 1 and following != END:
                    group.piece = following
                    continue
                self.groups.remove(group)
                self._arrive(following, group.mask)
                break
        return done

    def _part(self, group: Group, taken, target: int, following: int) -> int | None:
        """The piece at which a group goes on after a branch; None where its lanes went apart."""
        there = group.mask & taken
        if not there.any():
            return following
        if (there == group.mask).all():
            return target
        self.groups.remove(group)
        self._arrive(target, there)
        self._arrive(following, group.mask & ~taken)
        return None

    def _arrive(self, piece: int, mask: np.ndarray) -> None:
        for group in self.groups:
            group.waits = False
        if piece == END:
            self.alive = self.alive & ~mask
            self.block.something_happened()
            return
        for group in self.groups:
            if group.piece == piece and group.state is None:
                group.mask = group.mask | mask
                group.full = bool(group.mask.all())
                return
        self.groups.append(Group(piece, mask))

    # Memory

    def acquire(self, space: str, address, size: int, count: int, mask) -> list[np.ndarray]:
        """`load`, of what another block may have released. It ends the warp's turn."""
        self.looked = True
        proxy = self.block.part(AsyncProxy)
        for lane in _LANES if mask is None else np.flatnonzero(mask):
            proxy.acquire(self.threads[lane])
        return self.load(space, address, size, count, mask, "acquire")

    def release(self, space: str, address, size: int, values, mask) -> None:
        """`store`, for another block to acquire."""
        copies = self.block.part(BulkCopies)
        for lane in _LANES if mask is None else np.flatnonzero(mask):
            become(self.threads[lane])
            copies.check_written("a release")
        self.store(space, address, size, values, mask, "release")
        self.block.something_happened()
        self.block.patience.polls = 0

    def load(
        self, space: str, address, size: int, count: int, mask, access: str = "load"
    ) -> list[np.ndarray]:
        """`count` elements of `size` bytes at each lane's address, an array of bits for each."""
        if mask is not None and not mask.any():
            return [_NOTHING[size]] * count
        space, address, low, high = self._extent(space, address, size * count, mask)
        if space == "local":
            rows, index = self._local_rows(address, low, high, size, count, mask)
            found = rows[_LANES, index]
        else:
            region = self._region(space, low, high, size * count)
            if region is None:
                return self._lane_by_lane(space, address, size, count, mask, access)
            start, rows = region.view(size, count)
            index = (address - start) // (size * count)
            found = rows[index if mask is None else np.where(mask, index, 0)]
        if self.block.traffic:
            self.block.traffic.loaded(space.split("::")[0], size * count, mask)
        if space == "global" and self.block.writes:
            self.tell(access, address, size * count, mask)
        return list(found.T.copy())

    def store(self, space: str, address, size: int, values, mask, access: str = "store") -> None:
        """Write an array of bits for each element to each lane's address."""
        count = len(values)
        lanes = _LANES if mask is None else np.flatnonzero(mask)
        if not lanes.size:
            return
        # Before it is known that registers are no products under way nothing is written.
        content = np.stack([np.asarray(value) for value in values], 1)[lanes]
        space, address, low, high = self._extent(space, address, size * count, mask)
        if space == "local":
            rows, index = self._local_rows(address, low, high, size, count, mask)
            rows[lanes, index[lanes]] = content
            return
        region = self._region(space, low, high, size * count)
        if region is None:
            for lane, row in zip(lanes, content, strict=True):
                own = self.memory.find(space, int(address[lane]), size * count)
                self._write(own, address[lane : lane + 1], size, row[None])
        else:
            self._write(region, address[lanes], size, content)
        if self.block.traffic:
            self.block.traffic.stored(space.split("::")[0], size * count, mask)
        if space == "global" and self.block.writes:
            self.tell(access, address, size * count, mask)
        if space.startswith("shared") and self.program.follows_stores:
            self._tell_proxy(address, size * count, lanes)

    def _tell_proxy(self, address, n_bytes: int, lanes) -> None:
        """Let the asynchronous proxy of each block know of the bytes stored to its memory."""
        block, n_words = self.block, max(1, n_bytes // 4)
        for lane in lanes.tolist():
            rank, offset = divmod(int(address[lane]), RANK_BYTES)
            if rank == block.rank:
                store = block.words, offset // 4, n_words, block.fences
                self.threads[lane].stores.append(store)
            else:
                proxy = block.cluster.blocks[rank].part(AsyncProxy)
                proxy.store_from_outside(offset // 4, n_words)

    def tell(self, access: str, address, n_bytes: int, mask) -> None:
        """Let the launch know what lanes do to global memory, unless it is "none" of its ways."""
        if access == "none":
            return
        tell, number = getattr(self.block.writes, access), self.block.number
        for each in (address if mask is None else address[mask]).tolist():
            tell(number, each, n_bytes)

    def _write(self, region, address, size: int, content) -> None:
        if not region.writeable:
            raise ValueError(f"{region} is written and must not be")
        start, rows = region.view(size, content.shape[1])
        rows[(address - start) // (size * content.shape[1])] = content

    def _extent(self, space: str, address, n_bytes: int, mask):
        """(space, addresses in it, the lowest, the highest) of an access, aligned."""
        active = address if mask is None else address[mask]
        low, high = int(active.min()), int(active.max())
        if space == "generic":
            space, window = space_of(low)
            if space_of(high)[0] != space:
                raise UnsupportedError("lanes of one access reach different memory spaces")
            address, low, high = address - window, low - window, high - window
        if (active % n_bytes).any():
            wrong = int(active[active % n_bytes != 0][0])
            raise ValueError(
                f"a {n_bytes}-byte access to {space} memory at {wrong:#x} is misaligned"
            )
        return space, address, low, high

    def _region(self, space: str, low: int, high: int, n_bytes: int):
        """The region that holds all lanes' accesses; None where lanes reach several."""
        region = self.memory.find(space, low, n_bytes)
        if high + n_bytes <= region.end:
            return region
        self.memory.find(space, high, n_bytes)
        return None

    def _lane_by_lane(self, space: str, address, size: int, count: int, mask, access: str):
        if space == "global" and self.block.writes:
            self.tell(access, address, size * count, mask)
        found = np.zeros((count, 32), BITS[size])
        for lane in np.flatnonzero(TRUE if mask is None else mask):
            region = self.memory.find(space, int(address[lane]), size * count)
            start, rows = region.view(size, count)
            found[:, lane] = rows[(int(address[lane]) - start) // (size * count)]
        return list(found)

    def _local_rows(self, address, low: int, high: int, size: int, count: int, mask):
        """Rows of each lane's local memory, and each lane's row."""
        n_bytes = size * count
        if low < 0 or high + n_bytes > self.program.local_bytes:
            raise IndexError(
                f"{n_bytes} bytes at local address {low if low < 0 else high:#x} lie outside the "
                f"{self.program.local_bytes} bytes of a lane"
            )
        whole = self.program.local_bytes // n_bytes * n_bytes
        rows = self._local[:, :whole].reshape(32, -1, n_bytes)
        index = address // n_bytes
        return _ElementRows(rows, size), index if mask is None else np.where(mask, index, 0)


class _ElementRows:
    """(32, rows, count) elements over bytes that are not consecutive from lane to lane."""

    def __init__(self, rows: np.ndarray, size: int):
        self.rows, self.dtype = rows, BITS[size]

    def __getitem__(self, index):
        return np.ascontiguousarray(self.rows[index]).view(self.dtype)

    def __setitem__(self, index, content):
        self.rows[index] = np.ascontiguousarray(content).view(np.uint8)
