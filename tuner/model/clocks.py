"""The clocks of one block, from which a prediction and a picture of a launch are made alike."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from numflash.selection.layout import Places

from .dispatch import Schedule, dispatched, persistent


@dataclass(frozen=True)
class BlockClocks:
    """How long a block of a kernel takes, by the model.

    Blocks of Hopper's backward in one kernel also wait for each other (`model.turns`); that is not
    counted here.

    Attributes:
        start: clocks from a block's beginning to its first tile. Of persistent blocks, which begin
            once, it is no part of `place`; of others it is, as far as nothing hides it.
        place: (tiles, together) -> clocks of a place with so many tiles of columns, for as long as
            `together` blocks share an SM. Where blocks are not persistent a block is one place.
        resident: blocks on an SM, as many as fit and as there are.
        persistent: whether blocks stay, and go from place to place.
        drawn: whether each then takes the next place that nobody has; else they are dealt out.
    """

    start: float
    place: Callable[[float, int], float]
    resident: int
    persistent: bool = False
    drawn: bool = False

    @property
    def turn(self) -> float:
        """Clocks from a tile to the next while `resident` blocks share an SM."""
        return self.place(2, self.resident) - self.place(1, self.resident)

    def places(self, tiles: float, count: int) -> float:
        """Clocks of so many places of a persistent block, which have so many tiles together."""
        return self.place(tiles, self.resident) + (count - 1) * self.place(0, self.resident)

    def schedule(self, places: Places, num_sms: int) -> Schedule:
        """When each block, or place of persistent blocks, runs and where.

        Args:
            places: of the launch, `selection.layout.places` or `listed_places`.
            num_sms: SMs of the GPU.

        Example:
            >>> clocks = BlockClocks(0.0, lambda tiles, together: 10.0 * tiles, 1)
            >>> launch = Launch(Tiling(256, 256, 128, 64, -256, 0), "last queries first", 1)
            >>> clocks.schedule(places(launch), 1).end.tolist()
            [40.0, 60.0]
        """
        tiles = places.tiles
        if not self.persistent:
            tiles = np.bincount(places.block, tiles).astype(np.int64)
        return self.played(tiles, num_sms)

    def played(self, tiles: np.ndarray, num_sms: int) -> Schedule:
        """As `schedule`, by the tiles of each block, or place of persistent blocks."""
        begin = self.start if self.persistent else 0.0
        if self.persistent and not self.drawn:
            return persistent(tiles, self.place, num_sms, self.resident, begin)
        return dispatched(tiles, self.place, num_sms, self.resident, start=begin)
