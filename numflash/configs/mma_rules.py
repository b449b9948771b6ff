"""Which configs for tensor cores through `mma.sync` are shipped, and where each can run.

The rules know what a config's registers, shared memory and instructions need of a GPU.
"""

from functools import cache

from numflash.configs.mma import MMA_CONFIGS, ROW_STEP, MmaConfig
from numflash.configs.traits import Asked, Traits
from numflash.runtime.devices import Architecture, blocks_per_sm

# Preferred first. Two products of 16 rows below each other halve the traffic with shared memory.
_PREFERENCES = {
    "forward": (
        "m128n64w4s1",
        "m128n32w4s1",
        "m64n64w4s1",
        "m64n32w4s1",
        "m64n16w4s1",
        "m32n64w2s1",
        "m32n32w2s1",
        "m16n64w1s2",
        "m16n32w1s1",
        "m16n16w1s1",
    ),
    "backward-dq": (
        "m128n64w4s2",
        "m128n64w4s1",
        "m128n32w4s2",
        "m128n32w4s1",
        "m64n64w4s2",
        "m64n64w4s1",
        "m64n32w4s1",
        "m64n16w4s1",
        "m32n32w2s1",
        "m16n32w1s1",
        "m16n16w1s1",
    ),
    "backward": (
        "m32n128w8s2",
        "m32n128w8s1",
        "m64n64w4s1",
        "m32n64w4s1",
        "m32n32w2s1",
        "m16n16w1s1",
    ),
    "backward-dkdv": (
        "m32n128w4s2",
        "m64n64w4s2",
        "m64n64w4s1",
        "m32n64w4s1",
        "m16n64w4s1",
        "m64n64w4s1-apart",
        "m32n64w4s1-apart",
        "m16n64w4s1-apart",
        "m32n32w2s1",
        "m16n32w2s1",
        "m16n32w2s1-apart",
        "m32n16w1s1",
        "m16n16w1s1",
        "m16n16w1s1-apart",
    ),
}
_PREFERENCES["backward-rows"] = _PREFERENCES["backward-dq"]
_ONE_STAGE = ("m64n32w4s1", "m32n32w2s1", "m16n16w1s1")
_PREFERENCES["backward-tiles"] = _ONE_STAGE
_PREFERENCES["backward-columns"] = _PREFERENCES["backward-scatter"] = ("m64n64w4s1", *_ONE_STAGE)
_PREFERENCES["reduce-dq"] = _PREFERENCES["backward"]
WARPS_PER_SM = (8, 4, 1)
"""Warps that should fit on an SM at once, the best number first."""

_MAX_REGISTERS = 255
# Elements of one output a thread: the compiler does not unroll longer loops over them. Half of it
# for tf32, whose loops do more; a little less for Turing where rows are not aligned.
_MAX_OUTPUTS = 128
# float32 accumulators a thread can hold next to its operands without spilling, found by compiling:
# plainly; where features shape or drop scores, rows are not aligned, or keys lie in pages; where
# operands are rounded to tf32. Turing's copies take registers, too: its forward, and what keeps dK
# and dV together, spill earlier than its dQ, but not where nothing is asked for beside head dims
# that are equal or both small. "lists" is of dQ with a block mask.
_MAX_ACCUMULATORS = {
    "sm80": {"plain": 192, "features": 176, "tf32": 112, "lists": 176},
    "sm75": {
        "plain": 152,
        "features": 136,
        "forward": 136,
        "dK and dV": 136,
        "even": 160,
        "lists": 120,
    },
}
_EVEN_HEAD_DIM = 128


# The first compute capability that has the instructions.
_FIRST = {"sm75": (7, 5), "sm80": (8, 0), "sm89": (8, 9)}


def generation(limits: Architecture) -> str:
    """Which instructions of tensor cores a GPU has."""
    return "sm75" if limits.compute_capability < _FIRST["sm80"] else "sm80"


def too_new(generation: str, limits: Architecture) -> str | None:
    """Why a GPU does not have the instructions of a generation; None if it does."""
    if _FIRST[generation] <= limits.compute_capability:
        return None
    first = generation.replace("sm", "sm_")
    return f"its instructions begin with {first}, this GPU is {limits.arch}"


def no_softmax(asked: Asked) -> str | None:
    """Why the softmax of the tensor-core kernels cannot be used; None if it can."""
    if asked.positive_scale:
        return None
    return "softmax_scale is not positive, and the softmax in base 2 folds it into its maximum"


def no_products(traits: Traits, generation: str, asked: Asked) -> str | None:
    """Why the tensor cores of a generation cannot be used; None if they can."""
    if (why := no_softmax(asked)) is not None:
        return why
    if traits.dtype == "float32" and not traits.tf32:
        return 'float32 is multiplied exactly unless precision="tf32"'
    if generation == "sm75" and traits.dtype != "float16":
        return f"Turing's tensor cores have float16, not {'tf32' if traits.tf32 else traits.dtype}"
    return None


def cannot_run(
    config: MmaConfig, traits: Traits, limits: Architecture, asked: Asked
) -> str | None:
    """Why a config cannot compute a problem on a GPU; None if it can."""
    why = too_new(config.generation, limits) or no_products(traits, config.generation, asked)
    return why or config.misfit(traits)


@cache
def candidates(family: str, generation: str) -> tuple[MmaConfig, ...]:
    """The configs that are shipped for a family, preferred first."""
    texts = _PREFERENCES.get(family, ())
    return tuple(MMA_CONFIGS[family].parse(f"{generation}-{text}") for text in texts)


def _most_accumulators(config: MmaConfig, traits: Traits, kind: str) -> int:
    """The accumulators that a config can hold, of a kind as in `_MAX_ACCUMULATORS`."""
    most_of = _MAX_ACCUMULATORS[config.generation]
    most = most_of["tf32" if traits.tf32 else kind]
    if traits.blocks and config.family == "backward-dq":
        most = min(most, most_of["lists"])
    together = config.family == "backward-dkdv" and not config.apart
    own = "dK and dV" if together else config.family
    if own not in most_of:
        return most
    d, dv = traits.head_dim, traits.head_dim_v
    asks_nothing_else = traits == Traits(traits.dtype, d, dv)
    if asks_nothing_else and (d == dv or max(d, dv) <= _EVEN_HEAD_DIM):
        return most_of["even"]
    return min(most, most_of[own])


def misfit(
    config: MmaConfig, traits: Traits, limits: Architecture, rows: int, warps: int
) -> str | None:
    """Why a candidate is not the one to use; None if it is.

    At least `warps` must fit on an SM: while some wait for copies and barriers, others compute.
    """
    if (why := config.misfit(traits)) is not None:
        return why
    if (needed := config.smem_bytes(traits)) > limits.max_smem_per_block:
        return (
            f"needs {needed} bytes of shared memory per block, {limits.arch} has "
            f"{limits.max_smem_per_block}"
        )
    # Transposed tiles have room for random bits where they have it for dP beside S.
    bends = traits.shapes_scores or (traits.drops_weights and config.family != "backward-dkdv")
    asks = bends or traits.paged or traits.codes
    kind = "plain" if traits.vectorized and not asks else "features"
    most = _most_accumulators(config, traits, kind)
    columns = traits.head_dim if config.family == "backward-dq" else traits.head_dim_v
    outputs, most_outputs = config.m_tiles * columns // 2, _MAX_OUTPUTS
    if traits.tf32:
        most_outputs //= 2
    elif config.generation == "sm75" and not traits.vectorized:
        most_outputs -= 16
    if outputs > most_outputs:
        return f"keeps {outputs} outputs a thread, loops over at most {most_outputs} are unrolled"
    if (accumulators := config.accumulators_per_thread(traits)) > most:
        return f"keeps {accumulators} accumulators a thread, at most {most} do not spill"
    if config.block_rows >= max(2 * rows, 2 * ROW_STEP):
        return f"computes {config.block_rows} rows at a time, there are {rows}"
    fit, _ = blocks_per_sm(limits, config.num_threads, _MAX_REGISTERS, needed)
    if fit * config.num_warps < warps:
        return (
            f"needs {needed} bytes of shared memory per block, which leaves room for "
            f"{fit * config.num_warps} warps per SM instead of {warps}"
        )
    return None
