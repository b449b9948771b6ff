"""Configs of the backward for Hopper, through `wgmma` and bulk copies.

Their string form: `sm90-m64n128w8s2`, which is tile_m, tile_n, the warps that multiply and stages.
Appended is `-roles` where of two warpgroups one owns dV and the other dK, and in the one kernel
for all three gradients `-persistent` where blocks take one place after another.
"""

from dataclasses import dataclass, fields
from functools import cache
from typing import ClassVar

from numflash.configs.letters import switch
from numflash.configs.mma import MmaBackwardDkDvConfig, MmaBackwardDqConfig, MmaConfig
from numflash.configs.mma_rules import no_softmax
from numflash.configs.traits import Asked, Traits
from numflash.configs.wgmma import SLAB_BYTES, WARPGROUP_ROWS, no_wgmma
from numflash.runtime.devices import ARCHITECTURES, Architecture

# Registers a thread of the warpgroup that copies, and of those that multiply, by how many these
# are: the most that 64 Ki registers allow.
_REGISTERS = {1: (56, 256), 2: (24, 240), 3: (32, 160)}
# Of warps that look up lists, or places; and of those that look up lists of blocks for places.
_REGISTERS_TO_LOOK_UP = (40, 232), (56, 224)
_PRODUCER_THREADS = 128
_WORD_BYTES, _BARRIER_WORDS, _ELEMENT_BYTES = 4, 2, 2
_MOST_SMEM = ARCHITECTURES["sm_90a"].max_smem_per_block
# Columns of dK and of dV, where a warpgroup owns both.
_MOST_COLUMNS = 128
# Registers of a thread beside its accumulators; more in which random bits are drawn; and more for
# bent scores whose heads have numbers of their own.
_OTHER_REGISTERS, _DROPOUT_REGISTERS, _BENT_REGISTERS = 16, 8, 8


class _OnWarpgroups:
    """Common to all of them; 4 warps are a warpgroup and own 64 rows, and 4 more copy."""

    implementation: ClassVar = "sm90"
    generations: ClassVar = ("sm90",)
    # Whether its kernel draws the random bits of dropout.
    draws: ClassVar = False

    def _check(self) -> None:
        name = f"{type(self).__name__} {self}"
        if self.row_tile != 16 * self.row_warps or self.num_warps not in (4, 8, 12):
            raise ValueError(
                f"{name}: {self._row_tile} must be 16 x num_warps, 4, 8 or 12 of them"
            )
        if self.column_tile > 256:
            raise ValueError(f"{name}: the tile that is walked in has at most 256 rows")
        if not self.swizzled:
            raise ValueError(f"{name}: tiles are always swizzled")
        if self.min_blocks or self.num_splits > 1 or self.apart:
            raise ValueError(f"{name}: it has neither b, nor x, nor -apart")

    @property
    def num_warpgroups(self) -> int:
        """Warpgroups that multiply."""
        return self.num_warps // 4

    @property
    def num_threads(self) -> int:
        """Threads per block."""
        return 32 * self.num_warps + _PRODUCER_THREADS

    @property
    def assisting_threads(self) -> int:
        """Threads beside the producer that fetch what bulk copies do not: none."""
        return 0

    @property
    def registers(self) -> tuple[int, int]:
        """Registers a thread of the warpgroup that copies, and of those that multiply."""
        return _REGISTERS[self.num_warpgroups]

    def registers_of(self, traits: Traits) -> tuple[int, int]:
        """`registers`; warps that copy want more where they look up lists, or places."""
        draws = getattr(self, "persistent", False)
        looks_up = bool(traits.blocks) or traits.ragged or draws
        if looks_up and self.assisting_threads and self.num_warpgroups == 2:
            return _REGISTERS_TO_LOOK_UP[bool(traits.blocks) and draws]
        return self.registers

    @property
    def min_blocks_per_sm(self) -> int:
        """Blocks an SM must have registers for; `setmaxnreg` needs it said."""
        return 1

    def slabs(self, columns: int) -> int:
        """Slabs side by side that hold so many columns of an operand."""
        return -(-columns * _ELEMENT_BYTES // SLAB_BYTES)

    def _words(self, rows: int, columns: int) -> int:
        return rows * self.slabs(columns) * SLAB_BYTES // _WORD_BYTES

    def _barriers(self, channels: int) -> int:
        # Full and empty: for what a block owns, and for each stage of the channels.
        return _BARRIER_WORDS * (2 + 2 * channels * self.num_stages)

    def misfit(self, traits: Traits) -> str | None:
        """Why it cannot be built for these traits; None if it can."""
        if traits.drops_weights and not self.draws:
            return "it draws no random bits for dropout"
        return super().misfit(traits)


@dataclass(frozen=True)
class Sm90BackwardDqConfig(_OnWarpgroups, MmaBackwardDqConfig):
    """A block computes tile_m rows of dQ, 64 to a warpgroup; K and V come in tiles of tile_n."""

    example: ClassVar = "sm90-m128n128w8s1"
    draws: ClassVar = True

    def __post_init__(self):
        super().__post_init__()
        self._check()

    def tiles(self, traits: Traits) -> dict[str, int]:
        """The words of each tile in shared memory, in order; the barriers come last."""
        stages = self.num_stages
        return {
            "q": self._words(self.tile_m, traits.head_dim),
            "do": self._words(self.tile_m, traits.head_dim_v),
            "k": stages * self._words(self.tile_n, traits.head_dim),
            "v": stages * self._words(self.tile_n, traits.head_dim_v),
            "barriers": self._barriers(channels=2),
        }


@dataclass(frozen=True)
class Sm90BackwardDkDvConfig(_OnWarpgroups, MmaBackwardDkDvConfig):
    """A block computes tile_n rows of dK and dV; Q and dO come in tiles of tile_m.

    A warpgroup owns 64 rows of both. With `roles` two warpgroups work on the same 64 rows: the
    first owns dV, the second dK, which leaves each registers for twice the columns.
    """

    roles: bool = switch("roles", kw_only=True)

    example: ClassVar = "sm90-m64n128w8s2 or sm90-m64n64w8s2-roles"
    draws: ClassVar = True

    def __post_init__(self):
        if self.roles and (self.tile_n, self.num_warps) != (WARPGROUP_ROWS, 8):
            raise ValueError(
                f"{type(self).__name__} {self}: with roles tile_n must be {WARPGROUP_ROWS} and "
                "num_warps 8"
            )
        super().__post_init__()
        self._check()
        if self.tile_m % 32:
            raise ValueError(f"{type(self).__name__} {self}: tile_m must be a multiple of 32")

    @property
    def row_warps(self) -> int:
        """Warps that share out the rows of a result: with roles those of one warpgroup."""
        return 4 if self.roles else self.num_warps

    @property
    def assisting_threads(self) -> int:
        """Threads that fetch lse and delta of a tile of queries: some of three warps."""
        return next(threads for threads in (64, 96, 32) if self.tile_m % threads == 0)

    def misfit(self, traits: Traits) -> str | None:
        """Why it cannot be built for these traits; None if it can."""
        columns = max(traits.head_dim, traits.head_dim_v)
        if not self.roles and columns > _MOST_COLUMNS:
            return (
                f"a thread keeps dK and dV of at most {_MOST_COLUMNS} columns, there are "
                f"{columns}; with -roles it keeps one of them"
            )
        return super().misfit(traits)

    def accumulators_per_thread(self, traits: Traits) -> int:
        """float32 accumulators, and P packed, of a thread before it begins dV."""
        scores = self._scores_per_thread()
        if self.roles:
            # The first warpgroup has S, perhaps with slopes, the second dP and the first one's P.
            return 2 * scores + max(traits.head_dim, traits.head_dim_v) // 2
        of_scores = 3 * scores if traits.bends_scores else 2 * scores + scores // 2
        return of_scores + (traits.head_dim + traits.head_dim_v) // 2

    def tiles(self, traits: Traits) -> dict[str, int]:
        """The words of each tile in shared memory, in order; the barriers come last."""
        stages = self.num_stages
        tiles = {
            "k": self._words(self.tile_n, traits.head_dim),
            "v": self._words(self.tile_n, traits.head_dim_v),
            "q": stages * self._words(self.tile_m, traits.head_dim),
            "do": stages * self._words(self.tile_m, traits.head_dim_v),
        }
        if self.roles:
            tiles["p"] = stages * self.tile_m * self.tile_n // (1 if traits.bends_scores else 2)
            if traits.drops_weights:
                # A bit for each of a thread's scores goes with P.
                tiles["p"] += stages * 2 * WARPGROUP_ROWS * -(-self.tile_m // 64)
        return tiles | {
            "lse": stages * self.tile_m,
            "delta": stages * self.tile_m,
            "barriers": self._barriers(channels=4 if self.roles else 3),
        }


@dataclass(frozen=True)
class Sm90BackwardConfig(_OnWarpgroups, MmaConfig):
    """A block computes tile_n rows of dK and dV, 64 to a warpgroup, and adds its share to dQ.

    Q and dO come in tiles of tile_m: 64, or 64 for each warpgroup.

    Attributes:
        persistent: a block takes one tile of keys after another, and fetches the next while it
            stores dK and dV of one.
    """

    persistent: bool = switch("persistent", kw_only=True)

    family: ClassVar = "backward"
    _row_tile: ClassVar = "tile_n"
    example: ClassVar = "sm90-m64n128w8s2"
    draws: ClassVar = True

    def __post_init__(self):
        super().__post_init__()
        self._check()
        if self.tile_m not in (WARPGROUP_ROWS, self.tile_n):
            raise ValueError(
                f"{type(self).__name__} {self}: tile_m must be {WARPGROUP_ROWS} or tile_n, "
                f"products of dQ have {WARPGROUP_ROWS} rows of queries"
            )
        if self.persistent and self.num_warpgroups == 3:
            raise ValueError(
                f"{type(self).__name__} {self}: blocks take one place after another with 4 or 8 "
                f"warps; with 12 a thread has {self.registers[1]} registers, one too few"
            )

    @property
    def assisting_threads(self) -> int:
        """Threads that fetch lse and delta of a tile of queries: two warps."""
        return 64

    def dq_groups(self, traits: Traits) -> int:
        """Warpgroups that share dQ of a tile: by queries, by slabs of columns, or one has all."""
        whole_slabs = traits.head_dim % (WARPGROUP_ROWS * self.num_warpgroups) == 0
        shared = self.tile_m > WARPGROUP_ROWS or whole_slabs
        return self.num_warpgroups if shared else 1

    def dq_columns(self, traits: Traits) -> int:
        """Columns of dQ that a warpgroup computes, of 64 queries."""
        shares_columns = self.tile_m == WARPGROUP_ROWS
        return traits.head_dim // (self.dq_groups(traits) if shares_columns else 1)

    def dq_buffers(self, traits: Traits) -> int:
        """Buffers of dQ: two, if shared memory has room for them."""
        return 2 if _WORD_BYTES * sum(self._tiles(traits, 2).values()) <= _MOST_SMEM else 1

    def accumulators_per_thread(self, traits: Traits) -> int:
        """float32 accumulators, and P packed, of a thread before it begins dV."""
        scores = self._scores_per_thread()
        of_scores = 3 * scores if traits.bends_scores else 2 * scores + scores // 2
        return of_scores + (traits.head_dim + traits.head_dim_v) // 2

    def misfit(self, traits: Traits) -> str | None:
        """Why it cannot be built for these traits; None if it can."""
        if (columns := max(traits.head_dim, traits.head_dim_v)) > _MOST_COLUMNS:
            return (
                f"a block keeps dK and dV of at most {_MOST_COLUMNS} columns, there are {columns}"
            )
        kept = self.accumulators_per_thread(traits)
        most = self.registers_of(traits)[1] - _OTHER_REGISTERS
        if self.persistent and kept > most:
            return f"keeps {kept} accumulators a thread, at most {most} leave room for places"
        return super().misfit(traits)

    def tiles(self, traits: Traits) -> dict[str, int]:
        """The words of each tile in shared memory, in order; the barriers come last."""
        return self._tiles(traits, self.dq_buffers(traits))

    def _tiles(self, traits: Traits, dq_buffers: int) -> dict[str, int]:
        stages = self.num_stages
        buffers = dq_buffers + self.persistent
        return {
            "k": self._words(self.tile_n, traits.head_dim),
            "v": self._words(self.tile_n, traits.head_dim_v),
            "q": stages * self._words(self.tile_m, traits.head_dim),
            "do": stages * self._words(self.tile_m, traits.head_dim_v),
            # Two buffers: before warpgroups meet over dS of a tile, each has waited for its
            # product with dS of the tile before. So that buffer is free for the tile after.
            "ds": 2 * self._words(self.tile_m, self.tile_n),
            "dq": dq_buffers * self.tile_m * traits.head_dim,
            "lse": stages * self.tile_m,
            "delta": stages * self.tile_m,
            # The number of the place, and its turn.
            **({"places": 2} if self.persistent else {}),
            "barriers": self._barriers(channels=3) + 2 * _BARRIER_WORDS * buffers,
        }

    def reduction(self) -> "Sm90ReduceDqConfig":
        """The config of the kernel that makes dQ of the sums."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        # It adds nothing up, and has no places to take one after another.
        return Sm90ReduceDqConfig(**given | {"persistent": False})


@dataclass(frozen=True)
class Sm90ReduceDqConfig(Sm90BackwardConfig):
    """A block converts tile_m rows of dQ from the sums of a `Sm90BackwardConfig`."""

    family: ClassVar = "reduce-dq"

    def __post_init__(self):
        super().__post_init__()
        if self.persistent:
            raise ValueError(f"{type(self).__name__} {self}: a block converts one tile")

    @property
    def num_threads(self) -> int:
        """Threads per block: in the places of a warpgroup."""
        return 2 * WARPGROUP_ROWS

    @property
    def min_blocks_per_sm(self) -> int | None:
        """Blocks an SM must have registers for: the assembler may choose."""
        return None

    @property
    def block_rows(self) -> int:
        """Rows of the output that one block computes."""
        return self.tile_m

    def tiles(self, traits: Traits) -> dict[str, int]:
        """The words of each tile in shared memory: none."""
        return {}


WGMMA_BACKWARD_CONFIGS: dict[str, type] = {
    config.family: config
    for config in (
        Sm90BackwardDkDvConfig,
        Sm90BackwardDqConfig,
        Sm90BackwardConfig,
        Sm90ReduceDqConfig,
    )
}
"""Kernel family -> its config class."""


# Preferred first, by the larger head dim: what shared memory and registers allow. Two stages,
# because with one each K is waited for. Smaller tiles are for scores that take more registers.
_PREFERENCES = {
    "backward-dq": {
        64: ("m128n128w8s2", "m128n64w8s2"),
        128: ("m128n128w8s2", "m128n64w8s2"),
        192: ("m128n80w8s2", "m128n64w8s2", "m128n32w8s2"),
        256: ("m128n48w8s2", "m128n32w8s2"),
    },
    # Not m128n128w8s2: the warps that fetch lse and delta spill there, with two queries a lane.
    "backward": {
        64: ("m64n192w12s2", "m64n128w8s2"),
        128: ("m64n128w8s2",),
    },
    "backward-dkdv": {
        64: ("m64n192w12s2", "m64n128w8s2", "m32n128w8s2"),
        128: ("m64n128w8s2", "m32n128w8s2"),
        192: ("m96n64w8s2-roles", "m64n64w8s2-roles", "m32n64w8s2-roles"),
        256: ("m64n64w8s2-roles", "m32n64w8s2-roles"),
    },
}
_PREFERENCES["reduce-dq"] = _PREFERENCES["backward"]


@cache
def candidates(family: str, traits: Traits) -> tuple:
    """The configs that are shipped for these traits, preferred first."""
    columns, preferences = max(traits.head_dim, traits.head_dim_v), _PREFERENCES[family]
    texts = next((texts for most, texts in preferences.items() if columns <= most), ())
    return tuple(WGMMA_BACKWARD_CONFIGS[family].parse(f"sm90-{text}") for text in texts)


def misfit(config, traits: Traits, limits: Architecture, rows: int) -> str | None:
    """Why a candidate is not the one to use; None if it is.

    A block has an SM for itself, so that nothing hides its start: with fewer than two blocks of
    rows `mma.sync` is faster, by the tuner's model.
    """
    if (why := config.misfit(traits)) is not None:
        return why
    if (needed := config.smem_bytes(traits)) > limits.max_smem_per_block:
        return (
            f"needs {needed} bytes of shared memory per block, {limits.arch} has "
            f"{limits.max_smem_per_block}"
        )
    kept = config.accumulators_per_thread(traits)
    most = config.registers_of(traits)[1] - _OTHER_REGISTERS
    if traits.drops_weights:
        most -= _DROPOUT_REGISTERS
    if traits.bends_scores and traits.of_a_head:
        most -= _BENT_REGISTERS
    if kept > most:
        return f"keeps {kept} accumulators a thread, at most {most} do not spill"
    if rows < 2 * config.block_rows:
        return f"computes {config.block_rows} rows at a time, there are {rows}, not two times that"
    return None


def cannot_run(config, traits: Traits, limits: Architecture, asked: Asked) -> str | None:
    """Why a config cannot compute a problem on a GPU; None if it can."""
    why = no_wgmma(traits, limits) or no_softmax(asked)
    return why or config.misfit(traits) or asked.no_bulk_copies
