"""Configs of the kernels for Hopper, through `wgmma` and bulk copies.

Their string form: `sm90-m128n176w8s2-overlap-pingpong-persistent`, which is tile_m, tile_n, the
warps that multiply, stages, and the switches that are on. `x8`, `-h4` and `-packed` as in
`configs.mma`, `b2` where two blocks share an SM; with `-v3` V has 3 stages; `-r232` gives the
warps that multiply 232 registers a thread instead of the usual; with `-a1` one thread arrives for
a warpgroup; with `-l128` the L2 cache fetches 128 bytes at once for a bulk copy, not 256; with
`-c2` two blocks fetch K and V for each other; with `-fixed`, which comes last, warps keep the
registers that they begin with. Those on 8-bit floats begin with `fp8-sm90-`.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

from numflash.configs.fp8 import PREFIX
from numflash.configs.letters import number, switch
from numflash.configs.mma import MmaForwardConfig
from numflash.configs.mma_rules import no_softmax
from numflash.configs.traits import Asked, Traits
from numflash.runtime.devices import Architecture, architecture

WARPGROUP_ROWS = 64
"""Rows of Q, and of the result, that a warpgroup computes."""
SLAB_BYTES = 128
"""Tiles in shared memory are made of slabs of rows of 128 bytes."""
# Registers a thread of the warpgroup that copies, and of those that multiply, by how many these
# are and how many blocks share an SM: the most that 64 Ki registers allow.
_REGISTERS = {(1, 1): (56, 256), (1, 2): (24, 232), (2, 1): (24, 240), (3, 1): (32, 160)}
# Registers a thread of warps that fetch the scales of keys.
_ASSISTANTS_REGISTERS = 40
# Of blocks in clusters: the thread that copies for both does not do with 24, by compiling.
_CLUSTER_REGISTERS = _REGISTERS | {(2, 1): (40, 232)}
# Registers of each of 256 threads where one block has an SM and no thread gives any away.
_EVEN_REGISTERS = 256
_PRODUCER_THREADS = 128
_WORD_BYTES, _BARRIER_WORDS = 4, 2
# Of products of 8-bit floats, which have accumulators of their own.
_MOST_COLUMNS, _PART_COLUMNS = 128, 64
# Of K; of V its logarithm and its inverse.
_SCALES_OF_A_KEY = 3
_MAX_SMEM_BYTES = architecture("sm_90a").max_smem_per_block
_ARRIVALS = (1, 4)
_L2_BYTES = (128, 256)
_CLUSTERS = (1, 2)


@dataclass(frozen=True)
class Sm90ForwardConfig(MmaForwardConfig):
    """A block computes tile_m rows of O, 64 to a warpgroup; another warpgroup fetches K and V.

    Attributes:
        num_warps: those that multiply, of which 4 are a warpgroup; 4 more copy.
        overlap: a warpgroup computes the softmax of one tile while the tensor cores multiply P and
            V of the tile before.
        pingpong: warpgroups take turns with the tensor cores, so that one multiplies while another
            computes its softmax.
        persistent: a block computes one tile of rows after another, and fetches the next while it
            finishes one.
        v_stages: buffers of V, if V has more or fewer than K; otherwise 0. V of a tile is used
            after K of the next, and longer: with two buffers of each its copy begins late.
        consumer_registers: per thread of the warps that multiply; 0 for the usual number.
        arrivals: with which a warpgroup gives back a buffer that its products have read: 4, one of
            each warp, or 1 for all. One is for measurements on a GPU only. It assumes
            that a product is over for all four warps at once, which the PTX ISA does not say: the
            simulator, where warps are apart, may report that a buffer was overwritten while
            another warp's product read it (`kernels.wgmma.channels.make_channel`).
        l2_bytes: bytes that the L2 cache fetches at once for a bulk copy: 256 or 128. It is an
            argument of the tensor maps, so that the machine code is the same.
        cluster: blocks that are neighbours and see the same keys: 1, or 2 of which each fetches
            half of K and V for both.
        fixed: warps keep the registers that they begin with, without `setmaxnreg`. Only for one
            warpgroup that multiplies and one block an SM: threads have 256 each then.
    """

    v_stages: int = number("-v", 0)
    consumer_registers: int = number("-r", 0)
    arrivals: int = number("-a", 4)
    l2_bytes: int = number("-l", 256)
    cluster: int = number("-c", 1)
    overlap: bool = switch("overlap")
    pingpong: bool = switch("pingpong")
    persistent: bool = switch("persistent")
    fixed: bool = switch("fixed")

    implementation: ClassVar = "sm90"
    generations: ClassVar = ("sm90",)
    operand_bytes: ClassVar = 2
    example: ClassVar = "sm90-m128n128w8s2-overlap"

    def __post_init__(self):
        super().__post_init__()
        if self.tile_m != 16 * self.num_warps or self.num_warps not in (4, 8, 12):
            raise ValueError(
                f"{type(self).__name__} {self}: tile_m must be 16 x num_warps, 4, 8 or 12 of them"
            )
        if self.tile_n > 256:
            raise ValueError(f"{type(self).__name__} {self}: tile_n must be at most 256")
        if not self.swizzled:
            raise ValueError(f"{type(self).__name__} {self}: tiles are always swizzled")
        if (self.num_warpgroups, self.min_blocks_per_sm) not in _REGISTERS:
            raise ValueError(
                f"{type(self).__name__} {self}: two blocks share an SM only with 4 warps"
            )
        if self.pingpong and self.num_warpgroups == 1:
            raise ValueError(f"{type(self).__name__} {self}: one warpgroup has no turns to take")
        if self.fixed and (self.num_warpgroups, self.min_blocks_per_sm) != (1, 1):
            raise ValueError(
                f"{type(self).__name__} {self}: registers are fixed only with 4 warps and one "
                "block an SM; otherwise those that multiply need some of those that copy"
            )
        if self.fixed and self.consumer_registers:
            raise ValueError(
                f"{type(self).__name__} {self}: with fixed registers there is no choice of "
                f"consumer_registers, got {self.consumer_registers}"
            )
        few, many = self.registers
        if not self.fixed and (many % 8 or not 24 <= few < many <= 256):
            raise ValueError(
                f"{type(self).__name__} {self}: consumer_registers must be a multiple of 8, and "
                f"leave 24 to the warps that copy"
            )
        if self.v_stages == self.num_stages:
            raise ValueError(
                f"{type(self).__name__} {self}: v_stages says how many stages V has where K has "
                f"others, got {self.v_stages} for both; leave it out"
            )
        if self.arrivals not in _ARRIVALS:
            raise ValueError(
                f"{type(self).__name__} {self}: a warpgroup arrives {self.arrivals} times; it can "
                "only do so 1 or 4 times"
            )
        if self.l2_bytes not in _L2_BYTES:
            raise ValueError(
                f"{type(self).__name__} {self}: the L2 cache fetches 128 or 256 bytes, "
                f"not {self.l2_bytes}"
            )
        if self.cluster not in _CLUSTERS:
            raise ValueError(
                f"{type(self).__name__} {self}: a cluster has 1 block or 2, not {self.cluster}"
            )

    @property
    def num_warpgroups(self) -> int:
        """Warpgroups that multiply."""
        return self.num_warps // 4

    @property
    def stages_of_v(self) -> int:
        """Buffers of V."""
        return self.v_stages or self.num_stages

    @property
    def num_threads(self) -> int:
        """Threads per block."""
        return 32 * self.num_warps + _PRODUCER_THREADS

    @property
    def assisting_threads(self) -> int:
        """Threads beside the producer that fetch the scales of keys, where keys have their own."""
        return 64

    @property
    def block_rows(self) -> int:
        """Rows of the output that one block computes, or the blocks of a cluster together."""
        return self.cluster * self.tile_m

    @property
    def box_n(self) -> int:
        """Rows of K and V that a block fetches at once: its share of a stage."""
        return self.stage_n // self.cluster

    @property
    def registers(self) -> tuple[int, int]:
        """Registers a thread of the warpgroup that copies, and of those that multiply."""
        if self.fixed:
            return _EVEN_REGISTERS, _EVEN_REGISTERS
        usual = self._usual_registers
        if not self.consumer_registers:
            return usual
        pool = usual[0] + usual[1] * self.num_warpgroups
        left = pool - self.consumer_registers * self.num_warpgroups
        return left // 8 * 8, self.consumer_registers

    def registers_of(self, traits: Traits) -> tuple[int, int]:
        """`registers`; warps that fetch the scales of keys want more, if nobody has chosen."""
        few, many = self.registers
        if not traits.key_scales or self.consumer_registers or few >= _ASSISTANTS_REGISTERS:
            return few, many
        less = -(-(_ASSISTANTS_REGISTERS - few) // (8 * self.num_warpgroups)) * 8
        return few + less * self.num_warpgroups, many - less

    @property
    def _usual_registers(self) -> tuple[int, int]:
        found = _REGISTERS if self.cluster == 1 else _CLUSTER_REGISTERS
        return found[self.num_warpgroups, self.min_blocks_per_sm]

    @property
    def min_blocks_per_sm(self) -> int:
        """Blocks an SM must have registers for; `setmaxnreg` needs it said."""
        return max(1, self.min_blocks)

    def misfit(self, traits: Traits) -> str | None:
        """Why it cannot be built for these traits; None if it can."""
        if traits.ragged and self.num_splits > 1:
            return "of sequences with lengths of their own it stores whole results, and no parts"
        return super().misfit(traits) or traits.torn(self.block_rows, self.stage_n)

    @property
    def compiled(self) -> "Sm90ForwardConfig":
        """The config whose machine code this one shares: tensor maps are arguments, too."""
        return replace(super().compiled, l2_bytes=type(self).l2_bytes)

    @property
    def probability_registers(self) -> int:
        """Registers of a thread that hold P as an operand."""
        return self.tile_n * self.operand_bytes // 8

    def o_is_apart(self, traits: Traits) -> bool:
        """Whether results have shared memory of their own; otherwise they take the place of Q."""
        words = sum(self._tiles(traits).values()) + self._o_words(traits)
        return self.persistent and self.num_splits == 1 and _WORD_BYTES * words <= _MAX_SMEM_BYTES

    def tiles(self, traits: Traits) -> dict[str, int]:
        """The words of each tile in shared memory, in order; the barriers come last."""
        tiles = self._tiles(traits)
        if self.o_is_apart(traits):
            # Slabs begin at multiples of 1024 bytes: what is no slab stays behind them.
            rest = {name: tiles.pop(name) for name in ("key_scales", "barriers")}
            tiles |= {"o": self._o_words(traits), **rest}
        return tiles

    def _tiles(self, traits: Traits) -> dict[str, int]:
        row = SLAB_BYTES // _WORD_BYTES
        q_slabs = max(self.slabs(traits.head_dim), self._o_words(traits) // (self.tile_m * row))
        # Rows of V are keys, or with 8-bit floats columns of O.
        v_rows = traits.head_dim_v if traits.fp8 else self.stage_n
        scaled_stages = self.num_stages if traits.key_scales else 0
        return {
            "q": self.tile_m * row * q_slabs,
            "k": self.num_stages * self.stage_n * row * self.slabs(traits.head_dim),
            "v": self.stages_of_v * v_rows * row * self.v_slabs(traits),
            "key_scales": _SCALES_OF_A_KEY * scaled_stages * self.stage_n,
            # Full and empty, for Q of each warpgroup and for K, V and scales of each stage.
            "barriers": 2
            * _BARRIER_WORDS
            * (self.num_warpgroups + self.num_stages + self.stages_of_v + scaled_stages),
        }

    def slabs(self, columns: int) -> int:
        """Slabs side by side that hold so many columns of an operand."""
        return -(-columns * self.operand_bytes // SLAB_BYTES)

    def v_slabs(self, traits: Traits) -> int:
        """Slabs of a tile of V: of columns, or with 8-bit floats of keys."""
        return self.slabs(self.stage_n if traits.fp8 else traits.head_dim_v)

    def _o_words(self, traits: Traits) -> int:
        slabs = -(-traits.head_dim_v * traits.dtype_bytes // SLAB_BYTES)
        return self.tile_m * slabs * SLAB_BYTES // _WORD_BYTES


# Preferred first, by the larger head dim; the first holds what shared memory and registers allow,
# those behind it are for fewer rows.
_PREFERENCES = {
    64: (
        "m192n128w12s2-overlap-pingpong-persistent",
        "m128n128w8s2-overlap-pingpong-persistent",
        "m64n128w4s2-overlap-persistent",
    ),
    128: (
        "m128n128w8s2-overlap-pingpong-persistent",
        "m64n128w4s2-overlap-persistent",
    ),
    192: (
        "m128n96w8s2-overlap-persistent",
        "m64n96w4s2-overlap-persistent",
    ),
    256: (
        "m128n80w8s2-overlap-persistent",
        "m64n64w4s2-overlap-persistent",
    ),
}
# With the caller's functions, which need registers that nobody knows before they are compiled:
# behind those above of as many rows.
_WITH_FUNCTIONS = {
    128: (
        "m128n96w8s2-overlap-pingpong-persistent",
        "m128n64w8s2-overlap-pingpong-persistent",
        "m64n96w4s2-overlap-persistent",
        "m64n64w4s2-overlap-persistent",
    ),
    192: ("m128n64w8s2-overlap-persistent", "m64n64w4s2-overlap-persistent"),
    256: ("m128n48w8s2-overlap-persistent", "m64n48w4s2-overlap-persistent"),
}
# The preferred ones on 8-bit floats.
_FP8_PREFERENCES = {
    64: (
        "m128n128w8s2-overlap-pingpong-persistent",
        "m64n128w4s2-overlap-persistent",
    ),
    128: (
        "m128n128w8s2-overlap-pingpong-persistent",
        "m128n128w8s2-pingpong-persistent",
        "m64n128w4s2-persistent",
    ),
    256: (
        "m128n64w8s2-pingpong-persistent",
        "m64n64w4s2-persistent",
    ),
}
# Registers of a thread that hold neither S, nor P, nor O; and as many more where 8-bit floats have
# softcap or ALiBi.
_OTHER_REGISTERS, _FP8_BENT_REGISTERS = 32, 32
# And as many more that random bits are drawn in.
_DROPOUT_REGISTERS = 16


@cache
def candidates(traits: Traits) -> tuple[Sm90ForwardConfig, ...]:
    """The configs that are shipped for these traits, preferred first."""
    columns = max(traits.head_dim, traits.head_dim_v)
    kind, prefix, preferences = Sm90ForwardConfig, "", _PREFERENCES
    if traits.fp8:
        kind, prefix, preferences = Sm90Fp8ForwardConfig, PREFIX, _FP8_PREFERENCES
    texts = next(texts for most, texts in preferences.items() if columns <= most)
    if traits.program and not traits.fp8:
        texts += next(texts for most, texts in _WITH_FUNCTIONS.items() if columns <= most)
    found = [kind.parse(f"{prefix}sm90-{text}") for text in texts]
    return tuple(sorted(found, key=lambda config: -config.tile_m))


def generation(limits: Architecture) -> str | None:
    """Which instructions of warpgroups a GPU has; None if it has none."""
    return "sm90" if limits.compute_capability == (9, 0) else None


def no_wgmma(traits: Traits, limits: Architecture) -> str | None:
    """Why kernels of `wgmma` cannot compute with these traits on a GPU; None if they can."""
    if generation(limits) is None:
        return f"wgmma is an instruction of sm_90a only, this GPU is {limits.arch}"
    if traits.dtype == "float32":
        return "its products are of float16 or bfloat16, not of float32"
    if traits.codes:
        return "bulk copies do not decode K and V of 8 bits on their way to shared memory"
    return None


def refuses(traits: Traits, limits: Architecture, asked: Asked) -> str | None:
    """Why no config can compute a problem on a GPU, or should not; None if one may."""
    return no_wgmma(traits, limits) or no_softmax(asked) or asked.no_bulk_copies


def cannot_run(
    config: Sm90ForwardConfig, traits: Traits, limits: Architecture, asked: Asked
) -> str | None:
    """Why a config cannot compute a problem on a GPU; None if it can."""
    why = no_wgmma(traits, limits) or no_softmax(asked)
    return why or config.misfit(traits) or asked.no_bulk_copies


def torn(pack: int) -> str | None:
    """Why bulk copies cannot lay so many packed heads into the rows of a warpgroup, or None."""
    if WARPGROUP_ROWS % pack == 0:
        return None
    return (
        f"the {pack} query heads of a group cannot be packed: their number does not divide "
        f"the {WARPGROUP_ROWS} rows of a warpgroup"
    )


def registers_of_a_block(config: Sm90ForwardConfig, limits: Architecture) -> int:
    """Registers a thread when a block begins: an equal share of what is promised to it."""
    threads = config.num_threads * config.min_blocks_per_sm
    return limits.registers_per_sm // threads // 8 * 8


def misfit(
    config: Sm90ForwardConfig, traits: Traits, limits: Architecture, rows: int
) -> str | None:
    """Why a candidate is not the one to use; None if it is."""
    if (why := config.misfit(traits)) is not None:
        return why
    if (needed := config.smem_bytes(traits)) > limits.max_smem_per_block:
        return (
            f"needs {needed} bytes of shared memory per block, {limits.arch} has "
            f"{limits.max_smem_per_block}"
        )
    kept = config.accumulators_per_thread(traits) + config.probability_registers
    most = config.registers_of(traits)[1] - _OTHER_REGISTERS
    if traits.fp8 and traits.shapes_scores:
        most -= _FP8_BENT_REGISTERS
    if traits.drops_weights:
        most -= _DROPOUT_REGISTERS
    if kept > most:
        return f"keeps {kept} registers of S, P and O a thread, at most {most} do not spill"
    if config.block_rows >= 2 * rows:
        return f"computes {config.block_rows} rows at a time, there are {rows}"
    return None


@dataclass(frozen=True)
class Sm90Fp8ForwardConfig(Sm90ForwardConfig):
    """As `Sm90ForwardConfig` on e4m3 codes; V comes with tokens innermost."""

    operand_bytes: ClassVar = 1
    multiplies_codes: ClassVar = True
    prefix: ClassVar = PREFIX
    example: ClassVar = "fp8-sm90-m128n128w8s2-pingpong"

    def __post_init__(self):
        super().__post_init__()
        if self.stage_n % SLAB_BYTES:
            raise ValueError(f"{type(self).__name__} {self}: tile_n must be 64, 128 or 256")
        if self.v_stages:
            raise ValueError(
                f"{type(self).__name__} {self}: codes of K and of V have as many stages, got "
                f"v_stages {self.v_stages}"
            )
        if self.overlap and self.stage_n != self.tile_n:
            raise ValueError(f"{type(self).__name__} {self}: tiles that overlap have 128 keys")

    @property
    def stage_n(self) -> int:
        """Rows of K and V that are fetched at once: those of V are 128 bytes wide."""
        return SLAB_BYTES if self.tile_n == SLAB_BYTES // 2 else self.tile_n

    def part_columns(self, traits: Traits) -> int:
        """Columns of O that are computed at once: all, as far as registers suffice."""
        return traits.head_dim_v if traits.head_dim_v <= _MOST_COLUMNS else _PART_COLUMNS

    def accumulators_per_thread(self, traits: Traits) -> int:
        """float32 accumulators that a thread keeps through the main loop."""
        s, part = self._scores_per_thread(), self.part_columns(traits) // 2
        # Without overlap S has become P before P is multiplied.
        return traits.head_dim_v // 2 + (s + part if self.overlap else max(s, part))
