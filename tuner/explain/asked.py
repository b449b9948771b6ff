"""A call that is explained: its kernels, and what is known of each before it runs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from numflash.api.block_masks import FULL, PARTIAL, BlockMask, own
from numflash.api.explain import Explanation, Question
from numflash.configs import Config, Traits
from numflash.machine_code.compiler import get_cubin, known_cubin
from numflash.machine_code.report import NO_SIMULATOR, Report, disassembled, report_of
from numflash.problem.classes import ProblemClass
from numflash.problem.problem import AttentionProblem
from numflash.runtime.devices import Architecture
from numflash.runtime.driver import device_name
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.mode import SIMULATED
from numflash.selection.geometry import Geometry
from numflash.selection.layout import EDGE, EMPTY, WHOLE
from numflash.selection.rules import Choice

from .. import model
from ..model import Kept
from ..model.machine_code import MachineCode, analyse
from ..model.prediction import ROW_KERNELS, Prediction
from ..records import ResourceUsage
from ..space import machines
from ..space.machines import Machine
from ..space.target import local_machine

_MOST_SCORES_IN_TURN = 2**41


class NotShownError(LookupError):
    """A section does not apply to a call or a kernel; the message says why."""


@dataclass(frozen=True)
class Kernel:
    """A kernel of the call.

    Attributes:
        name: as in `Explanation.of_backward`, or "forward" and "combine".
        choice: its config, traits, and the rule that chose it.
        problem: the class of just the sizes that the call has, not rounded.
        geometry: of a forward, the layout over the machine; else all ones.
        report: its machine code in figures; None if it was not compiled.
        code: its instructions, counted; None if it was not compiled or not disassembled.
        prediction: the offline model's, from machine code where there is some; None of kernels
            that the model does not know.
        no_code: why there is no report; "" if there is one.
    """

    name: str
    choice: Choice
    problem: ProblemClass
    geometry: Geometry
    report: Report | None
    code: MachineCode | None
    prediction: Prediction | None
    no_code: str = ""

    @property
    def config(self) -> Config:
        """The config that runs."""
        return self.choice.config

    @property
    def traits(self) -> Traits:
        """What it is compiled for."""
        return self.choice.traits

    @property
    def is_tiled(self) -> bool:
        """Whether its blocks walk over tiles of scores."""
        return self.problem.family in TILED


@dataclass(frozen=True)
class Asked:
    """A call that is explained.

    Attributes:
        question: as it was asked; its `data` says whether elements of arrays may be read.
        explanation: the kernels.
        machine: the GPU's figures for the model.
        kernels: those that run, by name and in order; the forward's come first.
        kept: what its block mask keeps; None without one, or where it may not be read.
    """

    question: Question
    explanation: Explanation
    machine: Machine
    kernels: Mapping[str, Kernel]
    kept: Kept | None = None

    @property
    def problem(self) -> AttentionProblem:
        """The call in numbers."""
        return self.explanation.problem

    @property
    def forward(self) -> Kernel:
        """The kernel of `attention`."""
        return self.kernels["forward"]


TILED = ("forward", "backward-dq", "backward-dkdv", "backward")
"""Families of kernels whose blocks walk over tiles of scores."""
COMPILES = ("none", "forward", "all")
"""Kernels whose machine code is read: none, the forward and what is in the cache, or all."""


def ask(question: Question, compiles: str = "forward") -> Asked:
    """Find out what is known of the kernels of a call that some kernel runs.

    Args:
        question: with an answer.
        compiles: one of COMPILES. The others are described by formula, as where there is no
            compiler.

    Raises:
        ValueError: the model has no figures of this GPU.
    """
    answer, machine = question.answer, machine_of(question)
    chosen = {"forward": answer.forward}
    if answer.combine is not None:
        chosen["combine"] = answer.combine
    chosen |= answer.of_backward or answer.backward
    kernels, kept = {}, _kept(question)
    for name, choice in chosen.items():
        geometry = answer.geometry if name == "forward" else Geometry()
        kernels[name] = _kernel(name, choice, geometry, answer.problem, machine, compiles, kept)
    return Asked(question, answer, machine, kernels, kept)


def machine_of(question: Question) -> Machine:
    """The figures of the GPU that was asked about, or on which the arrays lie.

    Raises:
        ValueError: the model has none.
    """
    if question.gpu is not None:
        try:
            return machines.find(question.gpu)
        except ValueError as error:
            raise ValueError(
                "a page needs the offline model's figures of a GPU, and there are none of "
                f"{question.gpu!r}; numflash-explain --list-gpus lists those that it knows"
            ) from error
    device = question.answer.machine.device
    # The simulator is an architecture; the GPU that stands for it is in the table.
    return machines.find(device_name(device)) if SIMULATED else local_machine(device)


def _kept(question: Question) -> Kept | None:
    """What the block mask of a call keeps; None without one, or where it may not be read."""
    mask = own(question.options.get("block_mask"))
    if not question.data or not isinstance(mask, BlockMask):
        return None
    tiles = mask.tiles()
    kinds = np.select([tiles == FULL, tiles == PARTIAL], [WHOLE, EDGE], EMPTY).astype(np.uint8)
    return Kept(kinds, mask.block_size)


def exact_class(family: str, problem: AttentionProblem, traits: Traits) -> ProblemClass:
    """A problem's class with the problem's own sizes in the place of rounded ones."""
    found = ProblemClass.of(family, problem, traits)
    mask = found.mask
    if found.window is not None:
        mask = f"window{max(1, problem.band_hi - problem.band_lo + 1)}"
    return replace(
        found,
        mask=mask,
        seqlen_q=problem.tokens_q,
        seqlen_k=problem.tokens_k,
        batch_heads=problem.entries * problem.num_heads_q,
        group_size=problem.group_size,
    )


def _kernel(
    name: str,
    choice: Choice,
    geometry: Geometry,
    problem: AttentionProblem,
    machine: Machine,
    compiles: str,
    kept: Kept | None,
) -> Kernel:
    config, traits, limits = choice.config, choice.traits, machine.limits
    asked = exact_class(choice.family, problem, traits)
    report = code = resources = None
    no_code = NO_SIMULATOR if SIMULATED else _no_code(compiles, config, traits, limits)
    if not no_code:
        try:
            cubin = get_cubin(config, traits, limits)
            sass = disassembled(cubin)
            report = report_of(cubin, sass, config, traits, limits)
            resources = ResourceUsage.of(cubin, limits)
            code = None if sass is None else analyse(sass)
        except UnsupportedError as error:
            no_code = str(error)
    return Kernel(
        name,
        choice,
        asked,
        geometry,
        report,
        code,
        _prediction(machine, asked, config, resources, code, kept),
        no_code,
    )


def _no_code(compiles: str, config: Config, traits: Traits, limits: Architecture) -> str:
    """Why the machine code of a kernel is not looked at; "" if it is."""
    if compiles == "none":
        return "machine code was not asked for"
    if compiles == "forward" != config.family and known_cubin(config, traits, limits) is None:
        return "it is not in the cache of compiled kernels, and compiling it was not asked for"
    return ""


def _prediction(
    machine: Machine,
    asked: ProblemClass,
    config: Config,
    resources: ResourceUsage | None,
    code: MachineCode | None,
    kept: Kept | None,
) -> Prediction | None:
    """The model's prediction; None where it knows no such kernel, or there is nothing to do."""
    known = asked.family in (*TILED, *ROW_KERNELS)
    if not known or not asked.seqlen_q * asked.seqlen_k * asked.batch_heads:
        return None
    # Blocks that add to dQ in turn are played through, of more than a million tokens for long.
    of_a_head = asked.seqlen_q * asked.seqlen_k * asked.group_size
    if asked.family == "backward" and of_a_head > _MOST_SCORES_IN_TURN:
        return None
    try:
        if resources is None:
            return model.estimate(machine, asked, config, kept)
        return model.predict(machine, asked, config, resources, code, kept)
    except ValueError:
        return None
