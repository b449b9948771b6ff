"""Configs of the forward on 8-bit floats.

Their string form is that of `configs.mma` behind `fp8-`, as in `fp8-sm89-m128n64w4s2`, with
`-half` at the end where e4m3 is multiplied as float16.
"""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from numflash.configs.letters import switch
from numflash.configs.mma import MmaForwardConfig
from numflash.configs.mma_rules import no_softmax, too_new
from numflash.configs.traits import Asked, Traits
from numflash.runtime.devices import Architecture, blocks_per_sm

PREFIX = "fp8-"
_HALF = "-half"
_WORD_BYTES = 4
_CHUNKS = 4  # of 16 bytes: rows of a tile in shared memory are a multiple of this


@dataclass(frozen=True)
class Fp8ForwardConfig(MmaForwardConfig):
    """A block computes tile_m rows of O; K and V come in tiles of tile_n.

    Attributes:
        generation: of instructions: "sm75" and "sm80" convert e4m3 by arithmetic and multiply
            it as float16, "sm89" has instructions for both.
        half: multiply as float16 although there are instructions for e4m3. They are made of
            float16 products on Hopper and on data-centre Blackwell, where only `wgmma` and
            `tcgen05` multiply e4m3.
    """

    half: bool = switch("half")

    implementation: ClassVar = "fp8"
    prefix: ClassVar = PREFIX
    example: ClassVar = "fp8-sm89-m128n64w4s2"
    generations: ClassVar = ("sm75", "sm80", "sm89")

    def __post_init__(self):
        super().__post_init__()
        if self.half and self.generation != "sm89":
            raise ValueError(f"{self}: {self.generation} multiplies as float16 anyway")
        if self.tile_n * self.operand_bytes % (16 * _CHUNKS):
            raise ValueError(
                f"tile_n of {self} must be a multiple of {16 * _CHUNKS // self.operand_bytes}"
            )

    @property
    def multiplies_codes(self) -> bool:
        """Whether operands of products are e4m3 codes; otherwise they are float16."""
        return self.generation == "sm89" and not self.half

    @property
    def operand_bytes(self) -> int:
        """Bytes of an element in shared memory."""
        return 1 if self.multiplies_codes else 2

    def tiles(self, traits: Traits) -> dict[str, int]:
        """The words of each tile in shared memory, in order."""
        per_column = self.operand_bytes / _WORD_BYTES
        keys = self.num_stages * self.tile_n
        return {
            "q": int(self.tile_m * traits.head_dim * per_column),
            "k": int(keys * traits.head_dim * per_column),
            "v": int(keys * traits.head_dim_v * per_column),
            "q_scales": self.tile_m,
            "kept": 12,
            "key_scales": 3 * self.tile_n if traits.key_scales else 0,
        }


def generation(limits: Architecture) -> str:
    """The generation of instructions for 8-bit floats that a GPU has."""
    if limits.compute_capability >= (8, 9):
        return "sm89"
    return "sm75" if limits.compute_capability < (8, 0) else "sm80"


def multiplies_codes(limits: Architecture) -> bool:
    """Whether `mma.sync` of e4m3 is an instruction, as on Ada and on Blackwell's sm_120."""
    return limits.compute_capability == (8, 9) or limits.compute_capability >= (12, 0)


# Preferred first. Where codes are multiplied, tensor cores take so long for each operand that one
# row of products a warp is enough, and leaves registers for three blocks an SM. As float16, two
# rows of products halve the traffic with shared memory.
_PREFERENCES = {
    "codes": (
        "m64n64w4s1",
        "m64n64w4s2",
        "m32n64w2s1",
        "m16n64w1s2",
        "m16n64w1s1",
    ),
    "half": (
        "m128n64w4s1",
        "m128n32w4s1",
        "m64n64w4s1",
        "m64n32w4s1",
        "m32n64w2s1",
        "m32n32w2s1",
        "m16n64w1s1",
        "m16n32w1s1",
    ),
}
_MAX_REGISTERS = 255
# float32 accumulators a thread can hold next to its operands without spilling, found by compiling.
_MAX_ACCUMULATORS = {"codes": 160, "sm89": 152, "sm80": 152, "sm75": 144}
# Results a thread has on Turing where they are bfloat16, which takes arithmetic there: longer
# loops over them are not unrolled.
_MAX_BFLOAT16_ON_TURING = 64


def cannot_run(
    config: Fp8ForwardConfig, traits: Traits, limits: Architecture, asked: Asked
) -> str | None:
    """Why a config cannot compute a problem on a GPU; None if it can."""
    return too_new(config.generation, limits) or no_softmax(asked) or config.misfit(traits)


@cache
def candidates(limits: Architecture) -> tuple[Fp8ForwardConfig, ...]:
    """The configs that are shipped for a GPU, preferred first."""
    codes = multiplies_codes(limits)
    half = _HALF if generation(limits) == "sm89" and not codes else ""
    return tuple(
        Fp8ForwardConfig.parse(f"{PREFIX}{generation(limits)}-{text}{half}")
        for text in _PREFERENCES["codes" if codes else "half"]
    )


def misfit(
    config: Fp8ForwardConfig, traits: Traits, limits: Architecture, rows: int, warps: int
) -> str | None:
    """Why a candidate is not the one to use; None if it is. As `configs.mma_rules.misfit`."""
    if (why := config.misfit(traits)) is not None:
        return why
    if (needed := config.smem_bytes(traits)) > limits.max_smem_per_block:
        return (
            f"needs {needed} bytes of shared memory per block, {limits.arch} has "
            f"{limits.max_smem_per_block}"
        )
    kind = "codes" if config.multiplies_codes else config.generation
    most = _MAX_ACCUMULATORS[kind]
    outputs = config.m_tiles * traits.head_dim_v // 2
    if kind == "sm75" and traits.dtype == "bfloat16" and outputs > _MAX_BFLOAT16_ON_TURING:
        return (
            f"rounds {outputs} results a thread to bfloat16, for which Turing has no instruction; "
            f"at most {_MAX_BFLOAT16_ON_TURING} stay in registers. float16 has one"
        )
    if (accumulators := config.accumulators_per_thread(traits)) > most:
        return f"keeps {accumulators} accumulators a thread, at most {most} do not spill"
    if config.block_rows >= max(2 * rows, 32):
        return f"computes {config.block_rows} rows at a time, there are {rows}"
    fit, _ = blocks_per_sm(limits, config.num_threads, _MAX_REGISTERS, needed)
    if fit * config.num_warps < warps:
        return (
            f"needs {needed} bytes of shared memory per block, which leaves room for "
            f"{fit * config.num_warps} warps per SM instead of {warps}"
        )
    return None
