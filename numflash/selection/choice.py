"""Which kernels run a call: those the caller forces, those that were tuned, else those by rule.

`rules` knows the rules and `tuned` the configs that numflash-tune has found; here they meet the
device and the problem.
"""

from dataclasses import replace

from numflash.configs import Config, Traits
from numflash.problem.classes import ProblemClass
from numflash.problem.problem import AttentionProblem
from numflash.runtime.driver import device_name, limits_of_device, multiprocessors
from numflash.runtime.gpus import Gpu
from numflash.runtime.mode import SIMULATED
from numflash.selection import autotune, capture, tuned
from numflash.selection.entries import DeviceKey
from numflash.selection.geometry import (
    Geometry,
    heads_in_flight,
    heads_of_a_bundle,
    heads_packed,
    rows_packed,
    with_splits,
)
from numflash.selection.rules import Choice, choose, choose_forward, force, without_bulk_copies

FORWARD = ("forward", "combine")
BACKWARD = ("backward-dkdv", "backward-dq")
FUSED = "backward"


def device_key(device: int | Gpu) -> DeviceKey:
    """What tuned configs know a CUDA device, or an architecture by itself, by."""
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
    return _expect_families("backward", config, (*BACKWARD, FUSED))


def split_configs(config) -> tuple[dict, dict]:
    """What a dictionary forces for the forward and for the backward. Raises as both."""
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


def forward_choice(
    problem: AttentionProblem,
    traits: Traits,
    device: int | Gpu,
    config: str | Config | None,
    runs: bool = True,
) -> tuple[Choice, Geometry]:
    """The forward kernel for a problem, and how it is laid over the machine.

    `runs` tells a call from a question: only for calls are classes captured and tuned.
    """
    limits, positive = limits_of_device(device), problem.softmax_scale > 0
    num_sms, _ = multiprocessors(device)
    if config is not None:
        choice = force("forward", config, traits, limits, positive, problem)
    else:
        choice = choose_forward(problem, traits, limits, num_sms)
        rows = problem.seqlen_q * rows_packed(problem)
        if not (traits.fp8 or traits.selected):
            choice = _tuned(choice, problem, traits, device, rows, runs)
    config = choice.config
    if not isinstance(config, MmaConfig):
        return choice, Geometry()
    pack = heads_packed(config, problem)
    if not choice.is_final:
        config = with_splits(config, problem, traits, limits, num_sms)
        choice = replace(choice, config=config)
    in_flight, heads = config.heads_in_flight, problem.num_heads_q // pack * problem.batch
    if not in_flight:
        _, l2_bytes = multiprocessors(device)
        # Packed heads are one: K and V are read once for all of them.
        fits = heads_in_flight(problem, traits.operand_bytes, l2_bytes) // pack
        sharing = problem.group_size // pack
        in_flight = heads_of_a_bundle(config, fits, heads, num_sms, sharing)
    in_flight = min(in_flight, max(1, heads))
    return choice, Geometry(pack, choice.config.num_splits, in_flight)


def combine_choice(
    problem, traits: Traits, device: int, config: str | Config | None, runs: bool = True
) -> Choice:
    """The kernel that puts the parts of split keys together; `runs` as in `forward_choice`.

    It is the same after 8-bit floats, but then nothing is captured or tuned.
    """
    limits, plain = limits_of_device(device), replace(traits, fp8=False, key_scales=False)
    if config is not None:
        return force("combine", config, plain, limits)
    choice = choose("combine", plain, limits)
    if traits.fp8:
        return choice
    return _tuned(choice, problem, traits, device, problem.seqlen_q, runs)


def backward_choices(
    problem: AttentionProblem,
    traits: Traits,
    device: int | Gpu,
    forced: dict[str, str | Config],
    runs: bool = True,
) -> dict[str, Choice]:
    """The kernels of the backward by family, in the order in which they run.

    One kernel for all gradients runs if it is forced, or measured to be faster than two. `runs`
    as in `forward_choice`.
    """
    limits, positive = limits_of_device(device), problem.softmax_scale > 0
    if FUSED in forced:
        return {FUSED: force(FUSED, forced[FUSED], traits, limits, positive)}
    choices, times = {}, []
    for family in BACKWARD:
        rows = problem.seqlen_k if family == "backward-dkdv" else problem.seqlen_q
        if family in forced:
            choices[family] = force(family, forced[family], traits, limits, positive)
            continue
        choice = choose(family, traits, limits, rows, positive)
        choices[family] = _tuned(choice, problem, traits, device, rows, runs)
        times.append(choices[family].measured_ms)
    if not forced and None not in times:
        fused = tuned.measured(ProblemClass.of(FUSED, problem, traits), device_key(device), limits)
        if fused is not None and fused.measured_ms < sum(times):
            return {FUSED: fused}
    return choices


def _tuned(
    choice: Choice, problem: AttentionProblem, traits: Traits, device: int, rows: int, runs: bool
) -> Choice:
    """The tuned config for a problem in the place of the one by rule, if there is one."""
    wanted = ProblemClass.of(choice.family, problem, traits)
    if runs:
        capture.note(wanted)
    if not tuned.enabled():
        return choice
    limits = limits_of_device(device)
    if not problem.softmax_scale > 0:
        return choice
    bulk_copies = without_bulk_copies(problem, rows_packed(problem)) is None
    query = wanted, device_key(device), limits, rows, choice.config, bulk_copies
    found = tuned.find(*query)
    is_measured = found is not None and found.measured_ms is not None
    if runs and not is_measured and autotune.tune(wanted, device):
        found = tuned.find(*query)
    if found is None:
        return choice
    return replace(found, passed_over=_passed_over(found, choice))


def _passed_over(found: Choice, default: Choice) -> tuple[tuple[str, str], ...]:
    """What else than a tuned config might have run: what the rules passed over, and their choice.

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
