"""The kernels of a call: those that the caller forces, those that were tuned, else those by rule.

`rules` knows the rules and `tuned` the configs that numflash-tune has found; here they meet the
machine and the problem. `select` decides, and builds nothing: calls build launchers from its
`Selection`, `explain_dispatch` prints it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from numflash.configs import ArraySumsConfig, ClearSumsConfig, Config, Traits
from numflash.configs.features import rows_of
from numflash.problem.classes import ProblemClass
from numflash.problem.gradients import Gradients
from numflash.problem.problem import AttentionProblem
from numflash.runtime.devices import Architecture
from numflash.runtime.driver import Machine, device_name, limits_of_device, multiprocessors
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.gpus import Gpu
from numflash.runtime.mode import SIMULATED
from numflash.selection import autotune, capture, tuned
from numflash.selection.entries import DeviceKey
from numflash.selection.geometry import (
    Geometry,
    blocks_at_once,
    blocks_of,
    heads_in_flight,
    heads_of_a_bundle,
    heads_packed,
    resident_blocks,
    rows_packed,
    tiles_listed,
    with_splits,
)
from numflash.selection.rules import (
    Choice,
    Spills,
    choose,
    choose_forward,
    force,
    with_invariant_sums,
    without_bulk_copies,
)
from numflash.selection.spills import spilled_bytes


class Purpose(Enum):
    """What kernels are chosen for.

    Only for a CALL are classes of problems captured and tuned. Kernels compiled AHEAD are for
    calls of many sizes: they are those by rule, also where a call's sizes will say which of them
    run. For a QUESTION nothing is compiled, so that a config that spills may not be known as one.
    """

    CALL = "call"
    AHEAD = "ahead"
    QUESTION = "question"


FORWARD = ("forward", "combine")
BACKWARD = ("backward-dkdv", "backward-dq")
OF_OPTIONS = ("backward-rows",)
"""The kernels that begin gradients of options."""
OF_ARRAYS = ("backward-rows", "backward-columns", "backward-tiles", "backward-scatter")
"""The kernels that begin gradients of arrays that scores read."""
FUSED = "backward"
_ONE_WARP_ADDS = 1024


def array_sums(dtype: str, terms: int) -> Choice:
    """The kernel that adds up so many numbers for each element of an array."""
    config = ArraySumsConfig(1 if terms <= _ONE_WARP_ADDS else 8)
    return Choice(config.family, config, Traits(dtype, 32, 32), f"for {terms} numbers each", ())


def fixed_point(config: ClearSumsConfig, dtype: str) -> Choice:
    """The kernel that clears sums in fixed point, or makes floats of a dtype of them."""
    return Choice(config.family, config, Traits(dtype, 32, 32), "the only one", ())


def device_key(device: int | Gpu) -> DeviceKey:
    """The key under which tuned configs know a CUDA device, or an architecture by itself."""
    named = not device.is_architecture if isinstance(device, Gpu) else not SIMULATED
    num_sms = multiprocessors(device)[0] if named else 0
    return DeviceKey(device_name(device), limits_of_device(device).arch, num_sms)


def forward_configs(config) -> dict[str, str | Config]:
    """The forced configs of a forward call by family. Raises TypeError, ValueError."""
    if config is None:
        return {}
    if not isinstance(config, dict):
        return {"forward": config}
    return _expect_families("forward", config, FORWARD)


def backward_configs(config) -> dict[str, str | Config]:
    """The forced configs of a backward call by family. Raises TypeError, ValueError."""
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise TypeError(f"config of a backward must map families to configs, got {config!r}")
    families = tuple(dict.fromkeys((*BACKWARD, *OF_OPTIONS, *OF_ARRAYS, FUSED)))
    config = _expect_families("backward", config, families)
    if FUSED in config and (others := [family for family in BACKWARD if family in config]):
        raise ValueError(
            f"config has {FUSED!r}, one kernel for dq, dk and dv, and {others[0]!r}, which would "
            "not run: give one of them"
        )
    return config


def split_configs(config) -> tuple[dict, dict]:
    """The configs that a dictionary forces: (forward's, backward's). Raises as both."""
    if not isinstance(config, dict):
        return forward_configs(config), {}
    forward = {family: each for family, each in config.items() if family in FORWARD}
    others = {family: each for family, each in config.items() if family not in FORWARD}
    return forward, backward_configs(others)


def _expect_families(call: str, config: dict, families: tuple[str, ...]) -> dict:
    for family in config:
        if family not in families:
            names = ", ".join(families[:-1]) + f" or {families[-1]}"
            raise ValueError(f"config of a {call} has the keys {names}, got {family!r}")
    return config


@dataclass(frozen=True)
class Selection:
    """The kernels of a problem: chosen, and nothing of them built.

    Attributes:
        forward: the kernel of `attention`; None if it was not asked about.
        geometry: how the forward is laid over the machine.
        combine: the kernel that puts the parts of split keys together; None without splits.
        delta: the kernel that computes delta for the backward; None if it was not asked about.
        backward: the kernels of `attention_backward` by family, in the order in which they run.
        arrays: the kernels that walk over scores for gradients of arrays that scores read, by the
            array's name, in order.
    """

    forward: Choice | None = None
    geometry: Geometry = field(default_factory=Geometry)
    combine: Choice | None = None
    delta: Choice | None = None
    backward: Mapping[str, Choice] = field(default_factory=dict)
    arrays: Mapping[str, tuple[Choice, ...]] = field(default_factory=dict)


def select(
    problem: AttentionProblem,
    traits: Traits,
    machine: Machine,
    config=None,
    *,
    passes: tuple[str, ...] = ("forward",),
    gradients: Gradients | None = None,
    tokens_per_scale: int | None = None,
    purpose: Purpose = Purpose.CALL,
) -> Selection:
    """Choose the kernels of a problem.

    Args:
        problem: sizes, mask and features.
        traits: of its kernels. With `selected` keys are not split: parts would be put together
            for heads of either kind.
        machine: the GPU.
        config: the caller's: a config or its string form for the forward, a dictionary by family,
            or None.
        passes: "forward", "backward" or both.
        gradients: of the backward; None for those that it returns by default.
        tokens_per_scale: with 8-bit floats, the fewest that share a scale of K or V.
        purpose: what they are chosen for.

    Raises:
        TypeError, ValueError: the config is none of these families.
        UnsupportedError: it cannot run this problem, or no kernel can.
    """
    forced = _forced_configs(config, passes)
    found = Selection()
    if "forward" in passes:
        choice = _forward(
            problem, traits, machine, forced.get("forward"), purpose, tokens_per_scale
        )
        geometry, combine = _lay(choice, problem, machine), None
        if geometry.num_splits > 1:
            combine = _combine(problem, traits, machine, forced.get("combine"), purpose)
        found = replace(found, forward=choice, geometry=geometry, combine=combine)
    if "backward" in passes:
        gradients = gradients or Gradients.of(traits.features)
        of_delta = traits_of_delta(traits, gradients)
        delta = choose("delta", of_delta, machine.limits, problem.seqlen_q)
        of_gradients = replace(traits, float32_out=gradients.in_float32)
        backward = _backward(problem, of_gradients, machine, forced, gradients, purpose)
        arrays = _of_arrays(problem, traits, machine, forced, gradients)
        found = replace(found, delta=delta, backward=backward, arrays=arrays)
    return found


def _forced_configs(config, passes: tuple[str, ...]) -> dict[str, str | Config]:
    """The caller's configs by family, if all are of these passes."""
    if passes == ("forward",):
        return forward_configs(config)
    if passes == ("backward",):
        return backward_configs(config)
    forward, backward = split_configs(config)
    return forward | backward


def _forward(
    problem: AttentionProblem,
    traits: Traits,
    machine: Machine,
    config: str | Config | None,
    purpose: Purpose,
    tokens_per_scale: int | None = None,
) -> Choice:
    """The forward kernel, with its splits over keys.

    On 8-bit floats its tiles hold keys of one scale, or it looks each key's scale up: which of
    the two follows from the tiles by rule, and tuned ones must agree with it.
    """
    limits, num_sms = machine.limits, machine.num_sms
    choice = by_rule = _untuned(problem, traits, machine, config, purpose)
    if tokens_per_scale is not None and tokens_per_scale % choice.config.tile_n:
        traits, tokens_per_scale = replace(traits, key_scales=True), None
        choice = by_rule = _untuned(problem, traits, machine, config, purpose)
    if config is None:
        if not (traits.codes or traits.selected):
            rows = problem.tokens_q * rows_packed(problem)
            choice = _tuned(by_rule, problem, traits, machine, rows, purpose, tokens_per_scale)
        as_tuned = choice.is_final and not problem.num_splits
        if choice is not by_rule and not as_tuned and choice.has_geometry:
            split = with_splits(choice.config, problem, traits, limits, num_sms)
            choice = replace(choice, config=split)
    if traits.selected:
        if not choice.has_geometry:
            raise UnsupportedError(
                'precision="auto" needs tensor cores in 16 bits: '
                + "; ".join(f"{what}: {why}" for what, why in choice.passed_over[:1])
            )
        choice = replace(choice, config=replace(choice.config, num_splits=1))
    return choice


def _untuned(
    problem: AttentionProblem,
    traits: Traits,
    machine: Machine,
    config: str | Config | None,
    purpose: Purpose,
) -> Choice:
    """The forward kernel that the caller asks for, or that by rule."""
    limits, num_sms = machine.limits, machine.num_sms
    if config is None:
        return choose_forward(problem, traits, limits, num_sms, _spills(limits, purpose))
    choice = force("forward", config, traits, limits, problem.softmax_scale > 0, problem)
    if problem.batch_invariant:
        choice = with_invariant_sums(choice, problem, traits, limits, num_sms)
    return choice


def _lay(choice: Choice, problem: AttentionProblem, machine: Machine) -> Geometry:
    """The layout of the chosen forward over the machine."""
    config, heads = choice.config, problem.num_heads_q
    if not choice.has_geometry:
        listed = None if problem.lengths is None else tiles_listed(problem, config)
        return Geometry(blocks=blocks_of(problem, config, heads), listed=listed)
    pack, num_splits = heads_packed(config, problem), config.num_splits
    heads //= pack
    in_flight, all_heads = config.heads_in_flight, heads * problem.batch
    if not in_flight:
        # Packed heads are one: K and V are read once for all of them.
        fits = heads_in_flight(problem, choice.traits.operand_bytes, machine.l2_bytes) // pack
        sharing = problem.group_size // pack
        in_flight = heads_of_a_bundle(config, fits, all_heads, machine.num_sms, sharing)
    room, listed = resident_blocks(config, choice.traits, machine.limits), None
    if problem.lengths is None:
        blocks = blocks_of(problem, config, heads * num_splits, pack)
    else:
        slots = machine.num_sms * max(1, room)
        listed = tiles_listed(problem, config, pack, blocks=slots)
        blocks = blocks_of(problem, config, heads, pack, listed=listed)
    if getattr(config, "persistent", False):
        blocks = min(blocks, blocks_at_once(config, machine.num_sms, room))
    return Geometry(pack, num_splits, min(in_flight, max(1, all_heads)), blocks, listed)


def _combine(
    problem: AttentionProblem,
    traits: Traits,
    machine: Machine,
    config: str | Config | None,
    purpose: Purpose,
) -> Choice:
    """The kernel that puts the parts of split keys together.

    It is the same after 8-bit floats, and its class that of 16 bits.
    """
    plain = replace(traits, fp8=False, key_scales=False, blocks=(), paged=False, codes=False)
    if config is not None:
        return force("combine", config, plain, machine.limits)
    choice = choose("combine", plain, machine.limits)
    if traits.codes:
        return choice
    return _tuned(choice, problem, plain, machine, problem.tokens_q, purpose)


def traits_of_delta(traits: Traits, gradients: Gradients) -> Traits:
    """The traits of the kernel of delta.

    Of the features those whose gradient it begins, and those that weigh P, whose factor it has.
    """
    begun = gradients.options_of("delta", traits.features)
    asked = rows_of(traits.features)
    features = tuple(row.name for row in asked if row.option in begun or row.hook == "weigh")
    return replace(
        traits,
        features=features,
        blocks=(),
        ragged=False,
        dlse=gradients.dlse,
        given_delta=gradients.delta,
        float32_out=gradients.float32_out,
        plain_delta=bool(gradients.arrays)
        or any(gradients.needs(family, traits.features) for family in OF_OPTIONS),
    )


def _backward(
    problem: AttentionProblem,
    traits: Traits,
    machine: Machine,
    forced: Mapping[str, str | Config],
    gradients: Gradients,
    purpose: Purpose,
) -> dict[str, Choice]:
    """The kernels of the backward by family, in the order in which they run.

    One kernel for all of dq, dk and dv runs if it is forced, or measured to be faster than two; or
    by rule, unless two are measured to be faster. Ahead of calls all three are chosen where a rule
    can choose either.
    """
    limits, positive = machine.limits, problem.softmax_scale > 0
    no_bulk_copies = without_bulk_copies(problem, pack=1)
    needed = {
        family: gradients.needs(family, traits.features) for family in (*BACKWARD, *OF_OPTIONS)
    }
    choices, times, by_rule = {}, [], None
    if FUSED in forced and any(needed[family] for family in BACKWARD):
        choices[FUSED] = force(FUSED, forced[FUSED], traits, limits, positive, problem)
        needed |= dict.fromkeys(BACKWARD, False)
    elif all(needed[family] for family in BACKWARD) and not forced.keys() & {*BACKWARD}:
        by_rule = _fused_by_rule(problem, traits, machine, purpose)
    for family in (family for family, is_needed in needed.items() if is_needed):
        rows = problem.tokens_k if family == "backward-dkdv" else problem.tokens_q
        if family in forced:
            choices[family] = force(family, forced[family], traits, limits, positive, problem)
            continue
        asks = purpose
        if by_rule is not None and family in BACKWARD and purpose is Purpose.CALL:
            # Nothing is compiled for two kernels where one runs.
            asks = Purpose.QUESTION
        spills = _spills(limits, asks)
        choice = choose(family, traits, limits, rows, positive, no_bulk_copies, spills)
        if family in BACKWARD:
            choice = _tuned(choice, problem, traits, machine, rows, asks)
            times.append(choice.measured_ms)
        choices[family] = choice
    fused = by_rule
    if len(times) == len(BACKWARD) and None not in times:
        wanted = ProblemClass.of(FUSED, problem, traits)
        measured = tuned.measured(
            wanted, device_key(machine.device), limits, bulk_copies=no_bulk_copies is None
        )
        if measured is not None:
            fused = measured if measured.measured_ms < sum(times) else None
    if fused is None:
        return choices
    left_out = () if purpose is Purpose.AHEAD else BACKWARD
    return {FUSED: fused, **{f: choice for f, choice in choices.items() if f not in left_out}}


def _fused_by_rule(
    problem: AttentionProblem, traits: Traits, machine: Machine, purpose: Purpose
) -> Choice | None:
    """The kernel for all of dq, dk and dv, if it comes before two kernels without being measured.

    It has five products for seven, but its blocks add to dq in turn.
    """
    limits, rows, spills = machine.limits, problem.tokens_k, _spills(machine.limits, purpose)
    asked = problem.softmax_scale > 0, without_bulk_copies(problem, pack=1)
    try:
        choice = choose(FUSED, traits, limits, rows, *asked)
    except UnsupportedError:
        return None
    least, config = choice.implementation.blocks_to_fuse, choice.config
    blocks = problem.batch * problem.num_heads_kv * -(-problem.seqlen_k // config.block_rows)
    if least is None or (blocks < least * machine.num_sms and purpose is not Purpose.AHEAD):
        return None
    choice = choose(FUSED, traits, limits, rows, *asked, spills=spills)
    if spills(choice.config, choice.traits):
        return None
    choice = _tuned(choice, problem, traits, machine, rows, purpose)
    why = f"of one kernel {blocks} blocks share {machine.num_sms} SMs, which is enough"
    return replace(choice, passed_over=(*choice.passed_over, ("a kernel for dq apart", why)))


def _of_arrays(
    problem: AttentionProblem,
    traits: Traits,
    machine: Machine,
    forced: Mapping[str, str | Config],
    gradients: Gradients,
) -> dict[str, tuple[Choice, ...]]:
    """The kernels that walk over scores for gradients of arrays, by the array's name."""
    limits, positive = machine.limits, problem.softmax_scale > 0
    found = {}
    for array in gradients.arrays:
        choices = []
        for family, read, absolute in array.kernels:
            in_float32 = gradients.in_float32 and family == "backward-tiles"
            of_read = replace(traits, read=str(read), absolute=absolute, float32_out=in_float32)
            rows = problem.seqlen_k if family == "backward-columns" else problem.seqlen_q
            if family in forced:
                choices.append(force(family, forced[family], of_read, limits, positive))
            else:
                choices.append(choose(family, of_read, limits, rows, positive))
        found[array.name] = tuple(choices)
    return found


def _spills(limits: Architecture, purpose: Purpose) -> Spills:
    """What `rules` asks of a config that fits."""
    compiles = purpose is not Purpose.QUESTION
    return lambda config, traits: spilled_bytes(config, traits, limits, compiles)


def _tuned(
    choice: Choice,
    problem: AttentionProblem,
    traits: Traits,
    machine: Machine,
    rows: int,
    purpose: Purpose,
    tokens_per_scale: int | None = None,
) -> Choice:
    """The tuned config for a problem in the place of the one by rule, if there is one.

    With `tokens_per_scale`, of 8-bit floats, it is one whose tiles hold keys of one scale.

    There is none for the caller's functions, block masks and results in float32: what they cost
    no table knows. Nor is there one ahead of calls, whose class is not known, or where sums must
    not depend on other sequences, from whose number and sizes a class follows.
    """
    given = traits.program or traits.blocks or traits.float32_out or problem.batch_invariant
    if given or purpose is Purpose.AHEAD:
        return choice
    runs = purpose is Purpose.CALL
    wanted = ProblemClass.of(choice.family, problem, traits)
    if runs:
        capture.note(wanted)
    if not tuned.enabled():
        return choice
    if not problem.softmax_scale > 0:
        return choice
    pack = rows_packed(problem) if choice.family in FORWARD else 1
    bulk_copies = without_bulk_copies(problem, pack) is None
    key = device_key(machine.device)
    query = wanted, key, machine.limits, rows, choice.config, bulk_copies, tokens_per_scale
    found = tuned.find(*query)
    is_new = runs and tuned.measured(wanted, key, machine.limits, bulk_copies) is None
    if is_new and autotune.tune(wanted, machine.device):
        found = tuned.find(*query)
    if found is None:
        return choice
    return replace(found, passed_over=_passed_over(found, choice))


def _passed_over(found: Choice, default: Choice) -> tuple[tuple[str, str], ...]:
    """Alternatives to a tuned config: the candidates that the rules passed over, and their choice.

    That choice may be the tuned config itself, and the rules may have passed it over.
    """
    chosen = tuned.without_geometry(found.config)
    others = {str(chosen), found.config.implementation}
    passed_over = [(what, why) for what, why in default.passed_over if what not in others]
    is_default = chosen == tuned.without_geometry(default.config)
    if is_default and (not found.is_final or found.config == default.config):
        return tuple(passed_over)
    rule = f"the default ({default.rule}); what was tuned comes first"
    return (str(default.config), rule), *passed_over
