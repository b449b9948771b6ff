"""Configs of the portable kernels, which compute on the FMA units.

Their string form: `m64n32w4`.
"""

from dataclasses import dataclass, fields
from functools import cache
from typing import ClassVar

from numflash.configs.letters import Lettered, number
from numflash.configs.traits import Traits
from numflash.configs.warps import WarpsConfig
from numflash.runtime.devices import Architecture

FLOAT_BYTES = 4


class SmemLayout:
    """The places of a block's float32 tiles in its shared memory.

    A pitch is the distance between rows, in floats. Rows of `head_dim` floats are padded by 4;
    rows of scores, a multiple of 8, to an odd multiple of 8. This spreads the lanes of
    `tiles.portable.lanes` over all banks.
    """

    def __init__(self, **shapes: tuple[int, int]):
        self.pitches: dict[str, int] = {}
        self.offsets: dict[str, int] = {}
        end = 0
        for name, (rows, columns) in shapes.items():
            self.offsets[name] = end
            self.pitches[name] = columns | 8 if name == "p" else columns + 4
            end += rows * self.pitches[name]
        self.smem_bytes = end * FLOAT_BYTES


@dataclass(frozen=True)
class _Tiled(Lettered):
    """Common to the tiled kernels: tile sizes and warps. Which of them is the row tile differs."""

    tile_m: int = number("m")
    tile_n: int = number("n")
    num_warps: int = number("w")

    implementation: ClassVar = "portable"
    example: ClassVar = "m64n32w4"
    _row_tile: ClassVar[str] = "tile_m"

    def __post_init__(self):
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(
                    f"{field.name} of {type(self).__name__} must be positive, "
                    f"got {getattr(self, field.name)}"
                )
        rows, columns = self.row_tile, self.column_tile
        if rows % (4 * self.num_warps) or columns % 8:
            raise ValueError(
                f"{type(self).__name__} {self}: the row tile ({self._row_tile} = {rows}) must be "
                f"a multiple of 4 x num_warps and the other tile ({columns}) of 8"
            )
        if self.num_threads > 1024:
            raise ValueError(f"{type(self).__name__} {self}: a block has at most 32 warps")

    @property
    def row_tile(self) -> int:
        """The tile whose rows are shared out over the warps."""
        return getattr(self, self._row_tile)

    @property
    def column_tile(self) -> int:
        """The tile that the main loop walks in."""
        return self.tile_n if self._row_tile == "tile_m" else self.tile_m

    @property
    def num_threads(self) -> int:
        """Threads per block."""
        return 32 * self.num_warps

    @property
    def block_rows(self) -> int:
        """Rows of the output that one block computes."""
        return self.row_tile

    def misfit(self, traits: Traits) -> str | None:
        """Why it cannot be built for these traits; None if it can."""
        return traits.torn(self.tile_m, self.tile_n)

    def smem_layout(self, traits: Traits) -> SmemLayout:
        """The shared-memory tiles of a kernel with these traits."""
        raise NotImplementedError

    def smem_bytes(self, traits: Traits) -> int:
        """Bytes of dynamic shared memory per block."""
        return self.smem_layout(traits).smem_bytes

    def accumulators_per_thread(self, traits: Traits) -> int:
        """float32 accumulators that a thread keeps through the main loop."""
        raise NotImplementedError

    def _rows_per_thread(self) -> int:
        return self.row_tile // (4 * self.num_warps)

    def _scores_per_thread(self) -> int:
        return self._rows_per_thread() * self.column_tile // 8


@dataclass(frozen=True)
class ForwardConfig(_Tiled):
    """A block computes tile_m rows of O; K and V come in tiles of tile_n."""

    family: ClassVar = "forward"

    def smem_layout(self, traits: Traits) -> SmemLayout:
        """The shared-memory tiles of a kernel with these traits."""
        return SmemLayout(
            q=(self.tile_m, traits.head_dim),
            k=(self.tile_n, traits.head_dim),
            v=(self.tile_n, traits.head_dim_v),
            p=(self.tile_m, self.tile_n),
        )

    def accumulators_per_thread(self, traits: Traits) -> int:
        """float32 accumulators that a thread keeps through the main loop."""
        return self._scores_per_thread() + self._rows_per_thread() * (traits.head_dim_v // 8)


@dataclass(frozen=True)
class BackwardDqConfig(_Tiled):
    """A block computes tile_m rows of dQ; K and V come in tiles of tile_n."""

    family: ClassVar = "backward-dq"

    def smem_layout(self, traits: Traits) -> SmemLayout:
        """The shared-memory tiles of a kernel with these traits."""
        return SmemLayout(
            q=(self.tile_m, traits.head_dim),
            do=(self.tile_m, traits.head_dim_v),
            k=(self.tile_n, traits.head_dim),
            v=(self.tile_n, traits.head_dim_v),
            p=(self.tile_m, self.tile_n),
        )

    def accumulators_per_thread(self, traits: Traits) -> int:
        """float32 accumulators that a thread keeps through the main loop."""
        return 2 * self._scores_per_thread() + self._rows_per_thread() * (traits.head_dim // 8)


class _OfScores(_Tiled):
    """Common to the kernels that make dS again, for the gradient of something scores are made of.

    Q and dO come in tiles of tile_m, K and V in tiles of tile_n.
    """

    def smem_layout(self, traits: Traits) -> SmemLayout:
        """The shared-memory tiles of a kernel with these traits."""
        return SmemLayout(
            q=(self.tile_m, traits.head_dim),
            do=(self.tile_m, traits.head_dim_v),
            k=(self.tile_n, traits.head_dim),
            v=(self.tile_n, traits.head_dim_v),
        )


@dataclass(frozen=True)
class BackwardRowsConfig(_OfScores):
    """A block computes a number for each of tile_m rows of Q."""

    family: ClassVar = "backward-rows"

    def accumulators_per_thread(self, traits: Traits) -> int:
        """float32 accumulators that a thread keeps through the main loop."""
        return 2 * self._scores_per_thread() + self._rows_per_thread()


@dataclass(frozen=True)
class BackwardColumnsConfig(_OfScores):
    """A block computes a number for each of tile_n keys."""

    family: ClassVar = "backward-columns"

    @property
    def block_rows(self) -> int:
        """Rows of the output that one block computes."""
        return self.tile_n

    def accumulators_per_thread(self, traits: Traits) -> int:
        """float32 accumulators that a thread keeps through the main loop."""
        return 2 * self._scores_per_thread() + self.tile_n // 8


@dataclass(frozen=True)
class BackwardTilesConfig(_OfScores):
    """A block computes a number for each of tile_m queries and tile_n keys."""

    family: ClassVar = "backward-tiles"

    def accumulators_per_thread(self, traits: Traits) -> int:
        """float32 accumulators that a thread keeps through the main loop."""
        return 3 * self._scores_per_thread()


@dataclass(frozen=True)
class BackwardScatterConfig(_OfScores):
    """A block adds what tile_m rows of Q contribute to the sums of an array."""

    family: ClassVar = "backward-scatter"

    def accumulators_per_thread(self, traits: Traits) -> int:
        """float32 accumulators that a thread keeps through the main loop; a sum of 64 bits."""
        return 2 * self._scores_per_thread() + 4


@dataclass(frozen=True)
class BackwardDkDvConfig(_Tiled):
    """A block computes tile_n rows of dK and dV; Q and dO come in tiles of tile_m."""

    family: ClassVar = "backward-dkdv"
    _row_tile: ClassVar = "tile_n"

    def smem_layout(self, traits: Traits) -> SmemLayout:
        """The shared-memory tiles of a kernel with these traits."""
        return SmemLayout(
            k=(self.tile_n, traits.head_dim),
            v=(self.tile_n, traits.head_dim_v),
            q=(self.tile_m, traits.head_dim),
            do=(self.tile_m, traits.head_dim_v),
            p=(self.tile_n, self.tile_m),
        )

    def accumulators_per_thread(self, traits: Traits) -> int:
        """float32 accumulators that a thread keeps through the main loop."""
        columns = traits.head_dim // 8 + traits.head_dim_v // 8
        return 2 * self._scores_per_thread() + self._rows_per_thread() * columns


@dataclass(frozen=True)
class _ByRow(WarpsConfig):
    """Common to the kernels that go row by row, a warp or a block to each."""

    implementation: ClassVar = "portable"
    example: ClassVar = "w8"

    def accumulators_per_thread(self, traits: Traits) -> int:
        """float32 accumulators that a thread keeps: one, of the value that it sums up."""
        return 1


@dataclass(frozen=True)
class DeltaConfig(_ByRow):
    """Each warp computes delta = rowsum(O * dO) of one row."""

    num_warps: int = number("w", 8, always=True)

    family: ClassVar = "delta"


@dataclass(frozen=True)
class ArraySumsConfig(_ByRow):
    """Each block adds up what rows or columns of heads add to an element of a gradient."""

    num_warps: int = number("w", 8, always=True)

    family: ClassVar = "array-sums"

    def smem_bytes(self, traits: Traits) -> int:
        """Bytes of dynamic shared memory per block: a sum for each warp."""
        return 4 * self.num_warps


@dataclass(frozen=True)
class ClearSumsConfig(_ByRow):
    """Each thread writes a zero."""

    num_warps: int = number("w", 8, always=True)

    family: ClassVar = "clear-sums"

    @property
    def block_rows(self) -> int:
        """Elements that one block has."""
        return self.num_threads


@dataclass(frozen=True)
class RoundSumsConfig(ClearSumsConfig):
    """Each thread makes a float of a sum in fixed point."""

    family: ClassVar = "round-sums"


@dataclass(frozen=True)
class CombineConfig(_ByRow):
    """Each block puts one row of O together from the parts of a forward split over keys.

    Its warps share `num_chains` sums of splits: warp w has those whose number is w modulo
    num_warps. That number is the same for all configs, so that they give the same bits.
    """

    num_warps: int = number("w", 4, always=True)

    family: ClassVar = "combine"
    num_chains: ClassVar = 16

    def __post_init__(self):
        # One warp alone has no registers for 16 rows of 256.
        if self.num_warps not in (2, 4, 8, 16):
            raise ValueError(
                f"num_warps of {type(self).__name__} must be 2, 4, 8 or 16, got {self.num_warps}"
            )

    @property
    def block_rows(self) -> int:
        """Rows that one block computes."""
        return 1

    def smem_bytes(self, traits: Traits) -> int:
        """Bytes of dynamic shared memory per block: a row and the sum of its weights a chain."""
        return 4 * self.num_chains * (traits.head_dim_v + 1)


PORTABLE_CONFIGS: dict[str, type] = {
    config.family: config
    for config in (
        ForwardConfig,
        BackwardDkDvConfig,
        BackwardDqConfig,
        BackwardRowsConfig,
        BackwardColumnsConfig,
        BackwardTilesConfig,
        BackwardScatterConfig,
        DeltaConfig,
        ArraySumsConfig,
        ClearSumsConfig,
        RoundSumsConfig,
        CombineConfig,
    )
}
"""Kernel family -> its config class."""

_OF_SCORES = ("m32n32w4", "m32n16w4", "m16n16w4", "m16n8w4")
# Preferred first. The first that the rows fill, whose registers fit the head dims and whose shared
# memory fits the device is the default.
_PREFERENCES = {
    "forward": ("m64n64w4", "m64n32w4", "m32n32w4", "m32n16w4", "m16n16w4"),
    "backward-dq": ("m64n32w4", "m32n32w4", "m32n16w4", "m16n16w4", "m16n8w4"),
    "backward-rows": ("m64n32w4", *_OF_SCORES),
    **dict.fromkeys(("backward-columns", "backward-tiles", "backward-scatter"), _OF_SCORES),
    "backward-dkdv": ("m32n64w4", "m32n32w4", "m16n32w4", "m16n16w4", "m8n16w4"),
    "delta": ("w8",),
    **dict.fromkeys(("array-sums", "clear-sums", "round-sums"), ("w8",)),
    "combine": ("w4",),
}
# float32 accumulators a thread can hold next to its operands without spilling.
_MAX_ACCUMULATORS = 112


@cache
def candidates(family: str) -> tuple:
    """The configs that are shipped for a family, preferred first; none if it has none."""
    return tuple(PORTABLE_CONFIGS[family].parse(text) for text in _PREFERENCES.get(family, ()))


def refuses(traits: Traits, *_) -> str | None:
    """Why no config can compute a problem; None if one may."""
    return "it does not decode K and V of 8 bits" if traits.codes else None


def cannot_run(config, traits: Traits, *_) -> str | None:
    """Why a config cannot compute a problem; None if it can."""
    return refuses(traits) or config.misfit(traits)


def misfit(config, traits: Traits, limits: Architecture, rows: int = 2**30) -> str | None:
    """Why a candidate is not the one to use; None if it is."""
    if (why := config.misfit(traits)) is not None:
        return why
    if (needed := config.smem_bytes(traits)) > limits.max_smem_per_block:
        return (
            f"needs {needed} bytes of shared memory per block, {limits.arch} has "
            f"{limits.max_smem_per_block}"
        )
    if (needed := config.accumulators_per_thread(traits)) > _MAX_ACCUMULATORS:
        return f"keeps {needed} accumulators a thread, at most {_MAX_ACCUMULATORS} do not spill"
    if config.block_rows >= 2 * rows:
        return f"computes {config.block_rows} rows at a time, there are {rows}"
    return None
