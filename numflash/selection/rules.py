"""Which kernel runs a problem, with which config, and why not the others.

Kernels for tensor cores come before the portable ones, and on Hopper those of `wgmma` and bulk
copies before both; of each, configs come in the order of preference of `configs`. The first that
no rule excludes runs. A config that the caller forces is held to the same rules, except those that
only concern speed.
"""

from dataclasses import dataclass, replace

from numflash.configs import (
    FAMILIES,
    FP8_FORWARDS,
    PORTABLE_CONFIGS,
    WARPGROUP_ROWS,
    Config,
    MmaConfig,
    Sm90ForwardConfig,
    Traits,
    fp8,
    mma,
    parse_config,
    portable,
    wgmma,
)
from numflash.problem.problem import AttentionProblem
from numflash.runtime.devices import Architecture
from numflash.runtime.errors import UnsupportedError
from numflash.selection.geometry import rows_packed, with_splits

_MANY_ROWS = 2**30
# Rows of the smallest product: fewer cost as much.
_MIN_ROWS = 16


@dataclass(frozen=True)
class Choice:
    """A kernel chosen.

    Attributes:
        family, config, traits: the kernel.
        rule: what chose it.
        passed_over: (what, why not) of every other candidate and of each other implementation.
        is_final: whether splits, packing and order are the config's own; otherwise they follow
            from the problem.
        measured_ms: how long it took where it was measured on this device; None if it was not.
    """

    family: str
    config: Config
    traits: Traits
    rule: str
    passed_over: tuple[tuple[str, str], ...]
    is_final: bool = False
    measured_ms: float | None = None

    def __str__(self) -> str:
        lines = [f"{self.family}: {self.config} ({self.config.implementation}), {self.rule}"]
        return "\n".join([*lines, *(f"  not {what}: {why}" for what, why in self.passed_over)])


def choose(
    family: str,
    traits: Traits,
    limits: Architecture,
    rows: int = _MANY_ROWS,
    positive_scale: bool = True,
    no_bulk_copies: str | None = None,
) -> Choice:
    """The kernel to run.

    Args:
        family: one of `configs.FAMILIES`.
        traits: what the problem needs.
        limits: the GPU.
        rows: rows of the output per head; tiles of twice as many and more would mostly idle.
        positive_scale: whether softmax_scale is above 0.
        no_bulk_copies: why bulk copies cannot fetch and store what the problem is about, or its
            rows do not fit warpgroups; None if they can.

    Raises:
        ValueError: the family is unknown.
        UnsupportedError: the family has no portable kernel, and none for tensor cores fits.
    """
    if family not in FAMILIES:
        raise ValueError(f"kernel family must be one of {', '.join(FAMILIES)}, got {family!r}")
    passed_over, found = _hopper(family, traits, limits, rows, positive_scale, no_bulk_copies)
    if found is not None:
        return found
    if traits.fp8:
        generation, misfit = fp8.generation(limits), fp8.misfit
        mma_candidates = fp8.candidates(limits) if family == "forward" else ()
    else:
        generation, misfit = _generation(limits), mma.misfit
        mma_candidates = mma.candidates(family, generation)
    why = _no_tensor_cores(traits, generation, positive_scale)
    if mma_candidates and why is not None:
        passed_over.append((f"{generation} (tensor cores)", why))
        mma_candidates = []
    reasons = []
    for warps in mma.WARPS_PER_SM:
        reasons = []
        for config in mma_candidates:
            why = misfit(config, traits, limits, rows, warps)
            if why is None:
                later = mma_candidates[mma_candidates.index(config) + 1 :]
                for other in later:
                    why = misfit(other, traits, limits, rows, warps)
                    reasons.append((str(other), why or f"fits too, and comes after {config}"))
                passed_over += reasons
                if family in PORTABLE_CONFIGS and not traits.fp8:
                    passed_over.append(("portable", "tensor cores are faster"))
                rule = f"the first tensor-core config of which {warps} warps fit on an SM"
                return Choice(family, config, traits, rule, tuple(passed_over))
            reasons.append((str(config), why))
    passed_over += reasons
    if family not in PORTABLE_CONFIGS or traits.fp8:
        found = "; ".join(f"{what}: {why}" for what, why in passed_over)
        raise UnsupportedError(f"no {family} kernel runs {traits} on {limits.arch}: {found}")
    plain = replace(traits, tf32=False)
    candidates = portable.candidates(family)
    for config in candidates:
        why = portable.misfit(config, plain, limits, rows)
        if why is None or config is candidates[-1]:
            for other in candidates[candidates.index(config) + 1 :]:
                why = portable.misfit(other, plain, limits, rows)
                passed_over.append((str(other), why or f"fits too, and comes after {config}"))
            rule = "the first that fits of the portable configs"
            return Choice(family, config, plain, rule, tuple(passed_over))
        passed_over.append((str(config), why))
    raise AssertionError("portable.candidates is never empty")


def _hopper(
    family: str,
    traits: Traits,
    limits: Architecture,
    rows: int,
    positive_scale: bool,
    no_bulk_copies: str | None,
) -> tuple[list[tuple[str, str]], Choice | None]:
    """What of `configs.sm90` was passed over, and why; and the choice among it, or None."""
    if family != Sm90ForwardConfig.family or limits.compute_capability != (9, 0):
        return [], None
    why = wgmma.no_wgmma(traits, limits) or _no_scale(positive_scale) or no_bulk_copies
    if why is not None:
        return [(f"{fp8.PREFIX}sm90" if traits.fp8 else "sm90", why)], None
    candidates = wgmma.candidates(traits)
    reasons = {x: wgmma.misfit(x, traits, limits, rows) for x in candidates}
    config = next((x for x, why in reasons.items() if why is None), None)
    passed_over = [
        (str(x), why or f"fits too, and comes after {config}")
        for x, why in reasons.items()
        if x is not config
    ]
    if config is None:
        return passed_over, None
    if traits.fp8:
        slower = f"{fp8.PREFIX}{fp8.generation(limits)}"
        passed_over.append((slower, "wgmma multiplies codes, mma.sync must make float16 of them"))
    else:
        passed_over += [("sm80", "wgmma is faster"), ("portable", "tensor cores are faster")]
    rule = "the first that fits of the configs for wgmma"
    return passed_over, Choice(family, config, _for_wgmma(traits), rule, tuple(passed_over))


def _for_wgmma(traits: Traits) -> Traits:
    """The traits of the kernel, to which it is all one how rows are aligned."""
    return replace(traits, vectorized=True)


def choose_forward(
    problem: AttentionProblem, traits: Traits, limits: Architecture, num_sms: int
) -> Choice:
    """The forward kernel to run, with its splits over keys. As `choose`."""
    positive, packed_rows = problem.softmax_scale > 0, problem.seqlen_q * rows_packed(problem)
    no_bulk_copies = without_bulk_copies(problem)
    choice = choose("forward", traits, limits, packed_rows, positive, no_bulk_copies)
    if not isinstance(choice.config, MmaConfig):
        # The portable kernels do not pack.
        return choose("forward", traits, limits, problem.seqlen_q, positive, no_bulk_copies)
    config = with_splits(choice.config, problem, traits, limits, num_sms)
    return replace(choice, config=config)


def force(
    family: str,
    config: str | Config,
    traits: Traits,
    limits: Architecture,
    positive_scale: bool = True,
    problem: AttentionProblem | None = None,
) -> Choice:
    """The kernel that the caller asks for.

    Args:
        family: one of `configs.FAMILIES`.
        config: the caller's.
        traits: what the problem needs.
        limits: the GPU.
        positive_scale: whether softmax_scale is above 0.
        problem: of the forward; without it nothing is said of bulk copies.

    Raises:
        TypeError: `config` is neither a string nor a config of this family.
        ValueError: the string is no config of this family.
        UnsupportedError: it cannot run this problem on this GPU.
    """
    if isinstance(config, str):
        config = parse_config(family, config)
    if isinstance(config, type) or getattr(config, "family", None) != family:
        raise TypeError(f"config must be a string or a config of {family}, got {config!r}")
    why = None
    if traits.fp8 != isinstance(config, FP8_FORWARDS):
        why = "it computes on 8-bit floats" if not traits.fp8 else "it has no 8-bit floats"
    elif isinstance(config, Sm90ForwardConfig):
        why = wgmma.no_wgmma(traits, limits) or _no_scale(positive_scale) or config.misfit(traits)
        if why is None and problem is not None:
            why = without_bulk_copies(problem, config)
        traits = _for_wgmma(traits)
    elif isinstance(config, MmaConfig):
        why = _no_tensor_cores(traits, config.generation, positive_scale)
        why = why or config.misfit(traits)
        if _FIRST[config.generation] > limits.compute_capability:
            first = config.generation.replace("sm", "sm_")
            why = f"its instructions begin with {first}, this GPU is {limits.arch}"
    else:
        traits = replace(traits, tf32=False)
    if why is None and (needed := config.smem_bytes(traits)) > limits.max_smem_per_block:
        why = (
            f"it needs {needed} bytes of shared memory per block with head dims "
            f"{traits.head_dim} and {traits.head_dim_v}, {limits.arch} has "
            f"{limits.max_smem_per_block}"
        )
    if why is not None:
        raise UnsupportedError(f"config {config} cannot run this {family}: {why}")
    return Choice(family, config, traits, "as the caller asks", (), is_final=True)


_FIRST = {"sm75": (7, 5), "sm80": (8, 0), "sm89": (8, 9)}


def _generation(limits: Architecture) -> str:
    return "sm75" if limits.compute_capability < (8, 0) else "sm80"


def _no_tensor_cores(traits: Traits, generation: str, positive_scale: bool) -> str | None:
    """Why the tensor cores cannot be used; None if they can."""
    if (why := _no_scale(positive_scale)) is not None or traits.fp8:
        return why
    if traits.dtype == "float32" and not traits.tf32:
        return 'float32 is multiplied exactly unless precision="tf32"'
    if generation == "sm75" and traits.dtype != "float16":
        return f"Turing's tensor cores have float16, not {'tf32' if traits.tf32 else traits.dtype}"
    return None


def _no_scale(positive_scale: bool) -> str | None:
    """Why the softmax of the tensor-core kernels cannot be used; None if it can."""
    if positive_scale:
        return None
    return "softmax_scale is not positive, and the softmax in base 2 folds it into its maximum"


def without_bulk_copies(
    problem: AttentionProblem, config: Sm90ForwardConfig | None = None
) -> str | None:
    """Why the Hopper forward cannot run a problem, or should not; None if it may.

    `config` is the one that the caller asks for: only what it says of packing counts then.
    """
    packed = config is None or config.packed
    pack = rows_packed(problem, config and config.packed)
    if packed and WARPGROUP_ROWS % pack:
        return (
            f"the {pack} query heads of a group cannot be packed: their number does not divide "
            f"the {WARPGROUP_ROWS} rows of a warpgroup"
        )
    return problem.no_tensor_maps


def unfit(
    config: Config, traits: Traits, limits: Architecture, rows: int, proven: bool
) -> str | None:
    """Why a config tuned for another problem should not run this one; None if it may.

    Args:
        config: the config.
        traits: of this problem.
        limits: the GPU.
        rows: rows of this problem's output per head.
        proven: the config was compiled for just these traits, and did not spill.
    """
    if proven:
        if config.block_rows >= 2 * max(rows, _MIN_ROWS):
            return f"computes {config.block_rows} rows at a time, there are {rows}"
        return None
    if isinstance(config, Sm90ForwardConfig):
        return wgmma.misfit(config, traits, limits, rows)
    if isinstance(config, MmaConfig):
        return (fp8 if traits.fp8 else mma).misfit(config, traits, limits, rows, warps=1)
    return portable.misfit(config, replace(traits, tf32=False), limits, rows)
