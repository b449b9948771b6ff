"""The kernels of a call: those that the caller forces, those that were tuned, else those by rule.

`rules` knows the rules and `tuned` the configs that numflash-tune has found; here they meet the
machine and the problem. `select` decides, and builds nothing: calls build launchers from its
`Selection`, `explain_dispatch` prints it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from numflash.configs import ArraySumsConfig, ClearSumsConfig, Config, HeadSumsConfig, Traits
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
    heads_in_flight,
    heads_of_a_bundle,
    heads_packed,
    resident_blocks,
    rows_packed,
    with_splits,
)
from numflash.selection.rules import (
    Choice,
    Spills,
    choose,
    choose_forward,
    force,
    without_bulk_copies,
)
from numflash.selection.spills import spilled_bytes

FORWARD = ("forward", "combine")
BACKWARD = ("backward-dkdv", "backward-dq")
OF_OPTIONS = ("backward-rows",)
"""The kernels that begin gradients of options."""
OF_ARRAYS = ("backward-rows", "backward-columns", "backward-tiles", "backward-scatter")
"""The kernels that begin gradients of arrays that scores read."""
FUSED = "backward"
HEAD_SUMS = Choice(
    HeadSumsConfig.family, HeadSumsConfig(), Traits("float32", 32, 32), "the only one", ()
)
"""It adds up float32 numbers, whatever a problem is."""
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
    return _expect_families(
        "backward", config, tuple(dict.fromkeys((*BACKWARD, *OF_OPTIONS, *OF_ARRAYS, FUSED)))
    )


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
    runs: bool = True,
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
        runs: whether this is a call and no question: only for calls are classes captured and
            tuned.

    Raises:
        TypeError, ValueError: the config is none of these families.
        UnsupportedError: it cannot run this problem, or no kernel can.
    """
    forced = _forced_configs(config, passes)
    found = Selection()
    if "forward" in passes:
        choice = _forward(problem, traits, machine, forced.get("forward"), runs)
        if tokens_per_scale is not None and tokens_per_scale % choice.config.tile_n:
            traits = replace(traits, key_scales=True)
            choice = _forward(problem, traits, machine, forced.get("forward"), runs)
        geometry, combine = _lay(choice, problem, machine), None
        if geometry.num_splits > 1:
            combine = _combine(problem, traits, machine, forced.get("combine"), runs)
        found = replace(found, forward=choice, geometry=geometry, combine=combine)
    if "backward" in passes:
        gradients = gradients or Gradients.of(traits.features)
        of_delta = traits_of_delta(traits, gradients)
        delta = choose("delta", of_delta, machine.limits, problem.seqlen_q)
        of_gradients = replace(traits, float32_out=gradients.in_float32)
        backward = _backward(problem, of_gradients, machine, forced, gradients, runs)
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
    runs: bool,
) -> Choice:
    """The forward kernel, with its splits over keys."""
    limits, num_sms = machine.limits, machine.num_sms
    if config is not None:
        choice = force("forward", config, traits, limits, problem.softmax_scale > 0, problem)
    else:
        spills = _spills(limits, runs)
        choice = by_rule = choose_forward(problem, traits, limits, num_sms, spills)
        if not (traits.fp8 or traits.selected):
            rows = problem.seqlen_q * rows_packed(problem)
            choice = _tuned(by_rule, problem, traits, machine, rows, runs)
        if choice is not by_rule and not choice.is_final and choice.has_geometry:
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


def _lay(choice: Choice, problem: AttentionProblem, machine: Machine) -> Geometry:
    """The layout of the chosen forward over the machine."""
    config, rows, heads = choice.config, problem.seqlen_q, problem.num_heads_q
    if not choice.has_geometry:
        return Geometry(blocks=problem.num_blocks(rows, heads, config.block_rows))
    pack, num_splits = heads_packed(config, problem), config.num_splits
    heads //= pack
    in_flight, all_heads = config.heads_in_flight, heads * problem.batch
    if not in_flight:
        # Packed heads are one: K and V are read once for all of them.
        fits = heads_in_flight(problem, choice.traits.operand_bytes, machine.l2_bytes) // pack
        sharing = problem.group_size // pack
        in_flight = heads_of_a_bundle(config, fits, all_heads, machine.num_sms, sharing)
    blocks = problem.num_blocks(rows * pack, heads * num_splits, config.block_rows)
    if getattr(config, "persistent", False):
        room = resident_blocks(config, choice.traits, machine.limits)
        blocks = min(blocks, machine.num_sms * room)
    return Geometry(pack, num_splits, min(in_flight, max(1, all_heads)), blocks)


def _combine(
    problem: AttentionProblem,
    traits: Traits,
    machine: Machine,
    config: str | Config | None,
    runs: bool,
) -> Choice:
    """The kernel that puts the parts of split keys together.

    It is the same after 8-bit floats, but then nothing is captured or tuned.
    """
    plain = replace(traits, fp8=False, key_scales=False, blocks=())
    if config is not None:
        return force("combine", config, plain, machine.limits)
    choice = choose("combine", plain, machine.limits)
    if traits.fp8:
        return choice
    return _tuned(choice, problem, traits, machine, problem.seqlen_q, runs)


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
    runs: bool,
) -> dict[str, Choice]:
    """The kernels of the backward by family, in the order in which they run.

    One kernel for all of dq, dk and dv runs if it is forced, or measured to be faster than two.
    """
    limits, positive = machine.limits, problem.softmax_scale > 0
    needed = {
        family: gradients.needs(family, traits.features) for family in (*BACKWARD, *OF_OPTIONS)
    }
    choices, times = {}, []
    if FUSED in forced and any(needed[family] for family in BACKWARD):
        choices[FUSED] = force(FUSED, forced[FUSED], traits, limits, positive)
        needed |= dict.fromkeys(BACKWARD, False)
    for family in (family for family, is_needed in needed.items() if is_needed):
        rows = problem.seqlen_k if family == "backward-dkdv" else problem.seqlen_q
        if family in forced:
            choices[family] = force(family, forced[family], traits, limits, positive)
            continue
        choice = choose(family, traits, limits, rows, positive, spills=_spills(limits, runs))
        if family in BACKWARD:
            choice = _tuned(choice, problem, traits, machine, rows, runs)
            times.append(choice.measured_ms)
        choices[family] = choice
    if len(times) == len(BACKWARD) and None not in times:
        wanted = ProblemClass.of(FUSED, problem, traits)
        fused = tuned.measured(wanted, device_key(machine.device), limits)
        if fused is not None and fused.measured_ms < sum(times):
            others = {f: choice for f, choice in choices.items() if f not in BACKWARD}
            return {FUSED: fused, **others}
    return choices


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


def _spills(limits: Architecture, runs: bool) -> Spills:
    """What `rules` asks of a config that fits."""
    return lambda config, traits: spilled_bytes(config, traits, limits, runs)


def _tuned(
    choice: Choice,
    problem: AttentionProblem,
    traits: Traits,
    machine: Machine,
    rows: int,
    runs: bool,
) -> Choice:
    """The tuned config for a problem in the place of the one by rule, if there is one.

    There is none for the caller's functions, block masks and results in float32: what they cost
    no table knows.
    """
    if traits.program or traits.blocks or traits.float32_out:
        return choice
    wanted = ProblemClass.of(choice.family, problem, traits)
    if runs:
        capture.note(wanted)
    if not tuned.enabled():
        return choice
    if not problem.softmax_scale > 0:
        return choice
    bulk_copies = without_bulk_copies(problem, rows_packed(problem)) is None
    key = device_key(machine.device)
    query = wanted, key, machine.limits, rows, choice.config, bulk_copies
    found = tuned.find(*query)
    is_measured = found is not None and found.measured_ms is not None
    if runs and not is_measured and autotune.tune(wanted, machine.device):
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
