"""The kernel that runs a problem, its config, and the reasons against the others.

One loop goes through the rows of `configs.implementations`, from the fastest to the most general:
on Hopper `wgmma` and bulk copies, then the tensor cores through `mma.sync`, then the portable
kernels. A row refuses, or its configs come in the order of preference; the first that no rule
excludes runs. A config that the caller forces is held to the same rules, except those that only
concern speed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from numflash.configs import (
    FAMILIES,
    IMPLEMENTATIONS,
    Asked,
    Config,
    Implementation,
    Traits,
    implementation_of,
    parse_config,
    wgmma,
)
from numflash.problem.problem import AttentionProblem
from numflash.problem.tensor_maps import torn_pages
from numflash.runtime.devices import Architecture
from numflash.runtime.errors import UnsupportedError
from numflash.selection.geometry import apart_by_blocks, rows_packed, with_splits

_MANY_ROWS = 2**30
_SAME_INSTRUCTIONS = "batch_invariant: few queries and many must have the same instructions"
# Rows of the smallest product: fewer cost as much.
_MIN_ROWS = 16

Spills = Callable[[Config, Traits], int]
"""Bytes that a config's kernel is known to spill; see `selection.spills`."""


def _nothing(config: Config) -> None:
    """No reason against it."""


def _no_spills(config: Config, traits: Traits) -> int:
    """The shipped configs do not spill."""
    return 0


@dataclass(frozen=True)
class Choice:
    """A kernel chosen.

    Attributes:
        family, config, traits: the kernel.
        rule: that chose it.
        passed_over: (what, why not) of every other candidate and of each other implementation.
        is_final: whether splits, packing and order are the config's own; otherwise they follow
            from the problem.
        measured_ms: its time where it was measured on this device; None if it was not.
    """

    family: str
    config: Config
    traits: Traits
    rule: str
    passed_over: tuple[tuple[str, str], ...]
    is_final: bool = False
    measured_ms: float | None = None

    @property
    def implementation(self) -> Implementation:
        """The row of `configs.implementations` that the kernel belongs to."""
        return implementation_of(self.config)

    @property
    def has_geometry(self) -> bool:
        """Whether its config decides the layout of a forward over the machine."""
        return self.implementation.has_tensor_cores

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
    spills: Spills = _no_spills,
    excludes: Callable[[Config], str | None] = _nothing,
) -> Choice:
    """The kernel to run.

    Args:
        family: one of `configs.FAMILIES`.
        traits: that the problem needs.
        limits: the GPU.
        rows, positive_scale, no_bulk_copies: of the problem, see `configs.Asked`.
        spills: asked of a config that no rule excludes: one that spills gives way to the next, or
            where all do the one that spills least runs.

    Raises:
        ValueError: the family is unknown.
        UnsupportedError: no implementation has a kernel of this family that fits.
    """
    if family not in FAMILIES:
        raise ValueError(f"kernel family must be one of {', '.join(FAMILIES)}, got {family!r}")
    asked = Asked(rows, positive_scale, no_bulk_copies)
    there = [row for row in IMPLEMENTATIONS if row.serves(family, traits, limits)]
    passed_over = []
    for number, row in enumerate(there):
        why = row.refuses(traits, limits, asked)
        if why is not None:
            passed_over.append((row.title.format(row.generation(limits)), why))
            continue
        adapted = row.adapts(traits)
        config, rule, reasons = _first(
            row, row.candidates(family, traits, limits), adapted, limits, rows, spills, excludes
        )
        passed_over += reasons
        if config is not None:
            passed_over += [(later.called(limits), later.slower) for later in there[number + 1 :]]
            return Choice(family, config, adapted, rule, tuple(passed_over))
    found = "; ".join(f"{what}: {why}" for what, why in passed_over)
    raise UnsupportedError(f"no {family} kernel runs {traits} on {limits.arch}: {found}")


def _first(
    row: Implementation,
    candidates: Sequence[Config],
    traits: Traits,
    limits: Architecture,
    rows: int,
    spills: Spills,
    excludes: Callable[[Config], str | None],
) -> tuple[Config | None, str, list[tuple[str, str]]]:
    """The first candidate that fits and does not spill, its rule, and reasons against the others.

    Where all that fit spill it is the one that spills least. Where none fits the config is None,
    and the reasons are those of the least demanding rule.
    """
    spilled: dict[Config, int] = {}
    for warps in row.warps:
        reasons = {
            x: excludes(x) or row.misfit(x, traits, limits, rows, warps) for x in candidates
        }
        fitting = [x for x, why in reasons.items() if why is None and x not in spilled]
        chosen = None
        for config in fitting:
            if not (bytes_ := spills(config, traits)):
                chosen = config
                break
            spilled[config] = bytes_
        if chosen is not None:
            break
    else:
        chosen = candidates[-1] if row.takes_last else None
        chosen = min(spilled, key=spilled.get, default=chosen)
    reasons |= {x: f"spills {n} bytes a thread with these functions" for x, n in spilled.items()}
    others = [
        (str(x), why or f"fits too, and comes after {chosen}")
        for x, why in reasons.items()
        if x is not chosen
    ]
    return chosen, row.rule.format(warps), others


def choose_forward(
    problem: AttentionProblem,
    traits: Traits,
    limits: Architecture,
    num_sms: int,
    spills: Spills = _no_spills,
) -> Choice:
    """The forward kernel to run, with its splits over keys. As `choose`."""
    pack = rows_packed(problem)
    asked = problem.softmax_scale > 0, without_bulk_copies(problem, pack)

    def split(config: Config) -> Config:
        if not implementation_of(config).has_tensor_cores:
            return config
        return with_splits(config, problem, traits, limits, num_sms)

    def spills_split(config: Config, adapted: Traits) -> int:
        return spills(split(config), adapted)

    rows = problem.tokens_q
    if problem.batch_invariant:
        return _choose_invariant(problem, traits, limits, rows * pack, split)
    more = spills_split, lambda config: _torn_pages(config, problem)
    choice = choose("forward", traits, limits, rows * pack, *asked, *more)
    if not choice.has_geometry and pack > 1:
        # The portable kernels do not pack.
        choice = choose("forward", traits, limits, rows, *asked, *more)
    return replace(choice, config=split(choice.config))


def _torn_pages(config: Config, problem: AttentionProblem) -> str | None:
    """Why a config that copies boxes cannot read the pages of a problem's cache, or None."""
    if problem.pages is None or not implementation_of(config).needs_maps:
        return None
    return torn_pages(problem.pages.size, config.box_n)


def _choose_invariant(
    problem: AttentionProblem,
    traits: Traits,
    limits: Architecture,
    rows: int,
    split: Callable[[Config], Config],
) -> Choice:
    """The forward kernel where a row's sums must not depend on what else there is.

    Whatever the rows, it is one kind of instruction, and tiles of as many keys.
    """
    many = _of_invariant_sums(problem, traits, limits)
    asked = problem.softmax_scale > 0, _SAME_INSTRUCTIONS

    def excludes(config: Config) -> str | None:
        return _other_sums(config, many.config)

    found = [
        choose("forward", traits, limits, n, *asked, excludes=excludes) for n in (rows, _MANY_ROWS)
    ]
    for choice in found:
        if _other_sums(choice.config, many.config) is None:
            return replace(choice, config=split(choice.config))
    raise UnsupportedError(
        f"batch_invariant=True: no forward kernel of {traits} on {limits.arch} has the sums of "
        f"{many.config}"
    )


def _of_invariant_sums(problem: AttentionProblem, traits: Traits, limits: Architecture) -> Choice:
    """The kernel whose instruction and whose tiles of keys `batch_invariant` has.

    It is that of many rows, which are not aligned and whose keys lie in pages: others have room
    for the same tiles, and a row has the same bits there.
    """
    scarcest = replace(traits, vectorized=False, paged=traits.ragged)
    positive = problem.softmax_scale > 0
    return choose("forward", scarcest, limits, _MANY_ROWS, positive, _SAME_INSTRUCTIONS)


def _other_sums(config: Config, invariant: Config) -> str | None:
    """Why a row's sums are not those of `batch_invariant`; None if they are."""
    if implementation_of(config) is not implementation_of(invariant):
        return f"batch_invariant: its instructions are not those of {invariant}"
    if config.tile_n != invariant.tile_n:
        return (
            f"batch_invariant: its tiles are of {config.tile_n} keys, and sums are those of "
            f"tiles of {invariant.tile_n}"
        )
    return None


def with_invariant_sums(
    choice: Choice,
    problem: AttentionProblem,
    traits: Traits,
    limits: Architecture,
    num_sms: int,
) -> Choice:
    """A choice of the caller's, split where `batch_invariant` does. Raises UnsupportedError."""
    why = _other_sums(choice.config, _of_invariant_sums(problem, traits, limits).config)
    if why is not None:
        raise UnsupportedError(f"config {choice.config} cannot run this forward: {why}")
    if not choice.has_geometry:
        return choice
    return replace(choice, config=with_splits(choice.config, problem, traits, limits, num_sms))


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
        family: one of `configs.FAMILIES` or `configs.QUANTIZE_CONFIGS`.
        config: the caller's.
        traits: what the problem needs.
        limits: the GPU.
        positive_scale: whether softmax_scale is above 0.
        problem: of the forward; without it bulk copies are not checked.

    Raises:
        TypeError: `config` is neither a string nor a config of this family.
        ValueError: the string is no config of this family.
        UnsupportedError: it cannot run this problem on this GPU.
    """
    if isinstance(config, str):
        config = parse_config(family, config)
    if isinstance(config, type) or getattr(config, "family", None) != family:
        raise TypeError(f"config must be a string or a config of {family}, got {config!r}")
    row = implementation_of(config)
    if traits.fp8 != row.fp8:
        why = "it computes on 8-bit floats" if row.fp8 else "it has no 8-bit floats"
    else:
        no_bulk_copies = None
        if problem is not None and row.needs_maps:
            pack = problem.group_size if config.packed else 1
            no_bulk_copies = _torn_pages(config, problem) or without_bulk_copies(problem, pack)
        asked = Asked(positive_scale=positive_scale, no_bulk_copies=no_bulk_copies)
        why = row.cannot_run(config, traits, limits, asked)
        traits = row.adapts(traits)
    if why is None and problem is not None and getattr(config, "packed", None):
        why = apart_by_blocks(problem)
    if why is None and (needed := config.smem_bytes(traits)) > limits.max_smem_per_block:
        why = (
            f"it needs {needed} bytes of shared memory per block with head dims "
            f"{traits.head_dim} and {traits.head_dim_v}, {limits.arch} has "
            f"{limits.max_smem_per_block}"
        )
    if why is not None:
        raise UnsupportedError(f"config {config} cannot run this {family}: {why}")
    return Choice(family, config, traits, "as the caller asks", (), is_final=True)


def without_bulk_copies(problem: AttentionProblem, pack: int) -> str | None:
    """Why the Hopper forward cannot run a problem with so many packed heads; None if it can."""
    return wgmma.torn(pack) or problem.no_tensor_maps


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
    row = implementation_of(config)
    return row.misfit(config, row.adapts(traits), limits, rows, warps=1)
