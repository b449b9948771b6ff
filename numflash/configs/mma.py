"""Configs of the kernels for tensor cores through `mma.sync`.

Their string form: `sm80-m128n64w4s2`, which is the generation of instructions, tile_m, tile_n,
warps and stages. Appended are `b2` if registers must leave room for 2 blocks per SM, `x8` for 8
splits over the keys, `-h4` for 4 heads in flight, `-packed` or `-unpacked` heads, `-apart` where
dK and dV have blocks of their own, `-linear` for tiles that are not swizzled.
"""

from dataclasses import dataclass, fields, replace
from typing import ClassVar

from numflash.configs.letters import Lettered, chosen, number, switch, word
from numflash.configs.traits import Traits

GENERATIONS = ("sm75", "sm80")
"""sm75 has half-size products of float16 only, and copies that go through registers."""
MAX_STAGES = 3
ROW_STEP = 16
"""Rows of a product."""
_COLUMN_STEP = 16
_WORD_BYTES = 4


@dataclass(frozen=True)
class MmaConfig(Lettered):
    """Common to the kernels for tensor cores.

    Attributes:
        generation: of instructions: "sm75" or "sm80".
        tile_m: rows of Q in a tile.
        tile_n: rows of K and V in a tile.
        num_warps: per block; they share the rows of the result.
        num_stages: tiles of the walk in shared memory at once, for loads that run ahead.
        num_splits: parts that the keys are dealt out to, each with its own blocks; forward and
            backward only.
        apart: dK and dV are computed by blocks of their own, for head dims whose accumulators a
            thread cannot hold both; backward-dkdv only.
        swizzled: False only to measure what the swizzle is worth.
        min_blocks: blocks for which registers must suffice on an SM; 0 leaves it to the assembler.
        packed: whether the query heads of a group are neighbouring rows of a tile; None packs
            them where there are few queries. Forward only.
        heads_in_flight: heads whose blocks are interleaved; 0 takes as many as have their K and V
            in half of the L2 cache. Forward only.
    """

    generation: str = word(r"sm\d+", "-")
    tile_m: int = number("m")
    tile_n: int = number("n")
    num_warps: int = number("w")
    num_stages: int = number("s")
    min_blocks: int = number("b", 0, kw_only=True)
    num_splits: int = number("x", 1)
    heads_in_flight: int = number("-h", 0, kw_only=True)
    packed: bool | None = chosen(
        {None: "", True: "-packed", False: "-unpacked"}, None, kw_only=True
    )
    apart: bool = switch("apart")
    swizzled: bool = switch("linear", default=True)

    implementation: ClassVar = "sm80"
    family: ClassVar[str]
    generations: ClassVar[tuple[str, ...]] = GENERATIONS
    _row_tile: ClassVar[str] = "tile_m"
    example: ClassVar[str] = "m64n32w4 or sm80-m64n32w4s2"

    def __post_init__(self):
        if self.generation not in self.generations:
            raise ValueError(
                f"{type(self).__name__} must begin with one of {', '.join(self.generations)}, "
                f"got {self.generation!r}"
            )
        for name in ("tile_m", "tile_n", "num_warps", "num_stages", "num_splits"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"{name} of {type(self).__name__} must be positive, got {getattr(self, name)}"
                )
        rows, columns = self.row_tile, self.column_tile
        if rows % (ROW_STEP * self.row_warps) or columns % _COLUMN_STEP:
            raise ValueError(
                f"{type(self).__name__} {self}: the row tile ({self._row_tile} = {rows}) must be "
                f"a multiple of {ROW_STEP} x num_warps and the other tile ({columns}) of "
                f"{_COLUMN_STEP}"
            )
        if self.num_threads > 1024:
            raise ValueError(f"{type(self).__name__} {self}: a block has at most 32 warps")
        if self.num_stages > MAX_STAGES:
            raise ValueError(f"{type(self).__name__} {self}: at most {MAX_STAGES} stages")
        if self.num_splits > 1 and self.family.startswith("backward-"):
            raise ValueError(
                f"{type(self).__name__} {self}: only forward and backward can be split, not "
                f"{self.family}"
            )
        if self.apart and self.family != "backward-dkdv":
            raise ValueError(f"{type(self).__name__} {self}: only dK and dV can be apart")
        if self.family != "forward" and (self.packed is not None or self.heads_in_flight):
            raise ValueError(
                f"{type(self).__name__} {self}: only the forward packs heads and orders its blocks"
            )

    @property
    def row_tile(self) -> int:
        """The tile whose rows are shared out over the warps."""
        return getattr(self, self._row_tile)

    @property
    def row_warps(self) -> int:
        """Warps that share out the rows of the row tile: all of them."""
        return self.num_warps

    @property
    def column_tile(self) -> int:
        """The tile that the main loop walks in."""
        return self.tile_n if self._row_tile == "tile_m" else self.tile_m

    @property
    def stage_n(self) -> int:
        """Rows of K and V that are fetched at once: one or more tiles."""
        return self.tile_n

    @property
    def m_tiles(self) -> int:
        """Products of 16 rows that one warp keeps below each other."""
        return self.row_tile // (ROW_STEP * self.row_warps)

    @property
    def num_threads(self) -> int:
        """Threads per block."""
        return 32 * self.num_warps

    @property
    def block_rows(self) -> int:
        """Rows of the output that one block computes."""
        return self.row_tile

    @property
    def min_blocks_per_sm(self) -> int | None:
        """Blocks an SM must have registers for; None leaves it to the assembler."""
        return self.min_blocks or None

    def misfit(self, traits: Traits) -> str | None:
        """Why it cannot be built for these traits; None if it can."""
        if self.packed and traits.of_a_head:
            return f"heads with {traits.of_a_head} of their own cannot be packed"
        return traits.torn(self.tile_m, self.stage_n)

    @property
    def without_geometry(self) -> "MmaConfig":
        """The config without what belongs to one class of problems only."""
        return replace(self, num_splits=1, packed=None, heads_in_flight=0)

    @property
    def compiled(self) -> "MmaConfig":
        """The config whose machine code this one shares: how it is laid out is an argument."""
        return replace(self.without_geometry, num_splits=min(self.num_splits, 2))

    def tiles(self, traits: Traits) -> dict[str, int]:
        """The words of each tile in shared memory, in order."""
        raise NotImplementedError

    def accumulators_per_thread(self, traits: Traits) -> int:
        """float32 accumulators that a thread keeps through the main loop."""
        raise NotImplementedError

    def smem_offsets(self, traits: Traits) -> dict[str, int]:
        """The word at which each tile begins."""
        offsets, end = {}, 0
        for name, words in self.tiles(traits).items():
            offsets[name] = end
            end += words
        return offsets

    def smem_bytes(self, traits: Traits) -> int:
        """Bytes of dynamic shared memory per block."""
        return _WORD_BYTES * sum(self.tiles(traits).values())

    def _scores_per_thread(self) -> int:
        return self.m_tiles * self.column_tile // 2

    def _gradient_scores(self, traits: Traits) -> int:
        # S and dP, and the derivative of S if it is kept; where an array is read its places.
        more = traits.bends_scores or traits.read
        return (3 if more else 2) * self._scores_per_thread()


def _words(rows: int, columns: int, traits: Traits) -> int:
    return rows * columns * traits.dtype_bytes // _WORD_BYTES


@dataclass(frozen=True)
class MmaForwardConfig(MmaConfig):
    """A block computes tile_m rows of O; K and V come in tiles of tile_n."""

    family: ClassVar = "forward"

    @property
    def stage_n(self) -> int:
        """Rows of K and V that are fetched at once: one or more tiles."""
        return self.tile_n

    def tiles(self, traits: Traits) -> dict[str, int]:
        """The words of each tile in shared memory, in order. Of codes only these have stages."""
        k, v = (_words(self.tile_n, n, traits) for n in (traits.head_dim, traits.head_dim_v))
        tiles, stages = {"q": _words(self.tile_m, traits.head_dim, traits)}, self.num_stages
        if traits.codes:
            of_codes = {"k_codes": stages * k // 2, "v_codes": stages * v // 2}
            return tiles | {"k": k, "v": v} | of_codes
        return tiles | {"k": stages * k, "v": stages * v}

    def accumulators_per_thread(self, traits: Traits) -> int:
        """float32 accumulators that a thread keeps through the main loop."""
        return self._scores_per_thread() + self.m_tiles * traits.head_dim_v // 2


@dataclass(frozen=True)
class MmaBackwardDqConfig(MmaConfig):
    """A block computes tile_m rows of dQ; K and V come in tiles of tile_n."""

    family: ClassVar = "backward-dq"

    def tiles(self, traits: Traits) -> dict[str, int]:
        """The words of each tile in shared memory, in order."""
        return {
            "q": _words(self.tile_m, traits.head_dim, traits),
            "do": _words(self.tile_m, traits.head_dim_v, traits),
            "k": self.num_stages * _words(self.tile_n, traits.head_dim, traits),
            "v": self.num_stages * _words(self.tile_n, traits.head_dim_v, traits),
        }

    def accumulators_per_thread(self, traits: Traits) -> int:
        """float32 accumulators that a thread keeps through the main loop."""
        return self._gradient_scores(traits) + self.m_tiles * traits.head_dim // 2


@dataclass(frozen=True)
class MmaBackwardRowsConfig(MmaBackwardDqConfig):
    """A block computes a number for each of tile_m rows of Q; K and V come in tiles of tile_n."""

    family: ClassVar = "backward-rows"

    def accumulators_per_thread(self, traits: Traits) -> int:
        """float32 accumulators that a thread keeps through the main loop."""
        return self._gradient_scores(traits) + 2 * self.m_tiles


@dataclass(frozen=True)
class _OfArrays(MmaBackwardRowsConfig):
    """Common to the kernels for gradients of arrays that scores read: tiles are not ahead."""

    def misfit(self, traits: Traits) -> str | None:
        """Why it cannot be built for these traits; None if it can."""
        if self.num_stages != 1:
            return f"its tiles have one stage, the config has {self.num_stages}"
        return super().misfit(traits)


@dataclass(frozen=True)
class MmaBackwardColumnsConfig(_OfArrays):
    """A block computes a number for each of tile_n keys; Q and dO come in tiles of tile_m."""

    family: ClassVar = "backward-columns"

    @property
    def block_rows(self) -> int:
        """Rows of the output that one block computes."""
        return self.tile_n

    def accumulators_per_thread(self, traits: Traits) -> int:
        """float32 accumulators that a thread keeps through the main loop."""
        return self._gradient_scores(traits) + self.tile_n // 4


@dataclass(frozen=True)
class MmaBackwardTilesConfig(_OfArrays):
    """A block computes a number for each of tile_m queries and tile_n keys."""

    family: ClassVar = "backward-tiles"

    def accumulators_per_thread(self, traits: Traits) -> int:
        """float32 accumulators that a thread keeps through the main loop."""
        return self._gradient_scores(traits) + self._scores_per_thread()


@dataclass(frozen=True)
class MmaBackwardScatterConfig(_OfArrays):
    """A block adds what tile_m rows of Q contribute to the sums of an array."""

    family: ClassVar = "backward-scatter"

    def accumulators_per_thread(self, traits: Traits) -> int:
        """float32 accumulators that a thread keeps through the main loop; a sum of 64 bits."""
        return self._gradient_scores(traits) + 4


@dataclass(frozen=True)
class MmaBackwardDkDvConfig(MmaConfig):
    """A block computes tile_n rows of dK and dV; Q and dO come in tiles of tile_m."""

    family: ClassVar = "backward-dkdv"
    _row_tile: ClassVar = "tile_n"

    def tiles(self, traits: Traits) -> dict[str, int]:
        """The words of each tile in shared memory, in order."""
        return {
            "k": _words(self.tile_n, traits.head_dim, traits),
            "v": _words(self.tile_n, traits.head_dim_v, traits),
            "q": self.num_stages * _words(self.tile_m, traits.head_dim, traits),
            "do": self.num_stages * _words(self.tile_m, traits.head_dim_v, traits),
            "lse": self.num_stages * self.tile_m,
            "delta": self.num_stages * self.tile_m,
        }

    def accumulators_per_thread(self, traits: Traits) -> int:
        """float32 accumulators that a thread keeps through the main loop."""
        columns = traits.head_dim + traits.head_dim_v
        if self.apart:
            columns = max(traits.head_dim, traits.head_dim_v)
        return self._gradient_scores(traits) + self.m_tiles * columns // 2


@dataclass(frozen=True)
class MmaBackwardConfig(MmaConfig):
    """A block computes dK and dV of row blocks of tile_n, and their share of dQ, in one walk."""

    family: ClassVar = "backward"
    _row_tile: ClassVar = "tile_n"

    def __post_init__(self):
        super().__post_init__()
        m_warps = self.tile_m // ROW_STEP
        if self.m_tiles != 1 or self.num_warps % m_warps:
            raise ValueError(
                f"{type(self).__name__} {self}: tile_n must be {ROW_STEP} x num_warps, and "
                f"num_warps a multiple of tile_m / {ROW_STEP} = {m_warps}"
            )

    @property
    def ds_columns(self) -> int:
        """Columns of the tile of dS in shared memory."""
        return max(32, self.tile_m)

    def misfit(self, traits: Traits) -> str | None:
        """Why it cannot be built for these traits; None if it can."""
        if traits.tf32:
            return "dS goes through shared memory transposed, which only 16-bit elements can"
        if traits.ragged:
            return "of sequences with lengths of their own dK, dV and dQ come from two kernels"
        if traits.blocks:
            return "with block_mask dK, dV and dQ come from two kernels, each with its own lists"
        if self.tile_m % 32 and self.tile_m != 16:
            return f"tile_m must be 16 or a multiple of 32, got {self.tile_m}"
        column_warps = self.num_warps * ROW_STEP // self.tile_m
        columns = traits.head_dim // column_warps
        if columns % 32 or (column_warps > 1 and columns & (columns - 1)):
            return (
                f"{column_warps} warps share the columns of dQ, and head_dim / {column_warps} = "
                f"{traits.head_dim / column_warps:g} is no power of two from 32 on"
            )
        return None

    def tiles(self, traits: Traits) -> dict[str, int]:
        """The words of each tile in shared memory, in order."""
        return {
            "k": _words(self.tile_n, traits.head_dim, traits),
            "v": _words(self.tile_n, traits.head_dim_v, traits),
            "q": self.num_stages * _words(self.tile_m, traits.head_dim, traits),
            "do": self.num_stages * _words(self.tile_m, traits.head_dim_v, traits),
            "ds": _words(self.tile_n, self.ds_columns, traits),
            "lse": self.num_stages * self.tile_m,
            "delta": self.num_stages * self.tile_m,
        }

    def accumulators_per_thread(self, traits: Traits) -> int:
        """float32 accumulators that a thread keeps through the main loop."""
        return self._gradient_scores(traits) + (traits.head_dim + traits.head_dim_v) // 2

    def reduction(self) -> "ReduceDqConfig":
        """The config of the kernel that adds up the parts of dQ."""
        return ReduceDqConfig(**{field.name: getattr(self, field.name) for field in fields(self)})


@dataclass(frozen=True)
class ReduceDqConfig(MmaBackwardConfig):
    """A block adds up tile_m rows of dQ from the parts of a `MmaBackwardConfig`."""

    family: ClassVar = "reduce-dq"

    @property
    def block_rows(self) -> int:
        """Rows of the output that one block computes."""
        return self.tile_m

    def tiles(self, traits: Traits) -> dict[str, int]:
        """The words of each tile in shared memory: none."""
        return {}


MMA_CONFIGS: dict[str, type] = {
    config.family: config
    for config in (
        MmaForwardConfig,
        MmaBackwardDkDvConfig,
        MmaBackwardDqConfig,
        MmaBackwardRowsConfig,
        MmaBackwardColumnsConfig,
        MmaBackwardTilesConfig,
        MmaBackwardScatterConfig,
        MmaBackwardConfig,
        ReduceDqConfig,
    )
}
"""Kernel family -> its config class."""
