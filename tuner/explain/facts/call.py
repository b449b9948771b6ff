"""The call and the choice of its kernels."""

from collections.abc import Sequence
from dataclasses import dataclass

from numflash.runtime.devices import KB, Architecture, blocks_per_sm

from ...model import floor_ms
from ..asked import Asked, Kernel
from ..numbers import Number

_OF_MASKS = ("causal", "window_size")


@dataclass(frozen=True)
class KernelFacts:
    """A kernel that runs.

    Attributes:
        name, config, implementation, rule: which, and why.
        passed_over: (what, why not) of every other candidate.
        predicted: its time by the offline model; None where the model knows no such kernel.
        measured: its time where it was tuned on this GPU; None if it was not.
        bound_by: the part of the machine that takes longest, by the model; None without.
        blocks_per_sm, limited_by: blocks that fit on an SM; None without machine code.
        next_limits: what would let one more block fit.
        no_code: why there is no machine code; "" if there is.
    """

    name: str
    config: str
    implementation: str
    rule: str
    passed_over: Sequence[tuple[str, str]]
    predicted: Number | None
    measured: Number | None
    bound_by: str | None
    blocks_per_sm: Number | None
    limited_by: str | None
    next_limits: Sequence[str]
    no_code: str


@dataclass(frozen=True)
class CallFacts:
    """The call.

    Attributes:
        gpu, arch: the machine; gpu as `Gpu` says it where it need not be here.
        num_sms, clock: of it.
        shape: batch, queries, keys, heads of queries and of keys, columns of Q and K, and of V.
        dtype, mask: of the call; the mask in words.
        options: further options in words.
        floor: no forward is faster on this GPU, by the model.
        kernels: those that run, in order.
    """

    gpu: str
    arch: str
    num_sms: Number
    clock: Number
    shape: dict[str, Number]
    dtype: str
    mask: str
    options: Sequence[str]
    floor: Number | None
    kernels: Sequence[KernelFacts]


def find(asked: Asked) -> CallFacts:
    """The facts of a call."""
    problem, machine = asked.problem, asked.machine
    names = ("batch", "seqlen_q", "seqlen_k", "num_heads_q", "num_heads_kv")
    shape = {
        name: Number(getattr(problem, name), "chosen")
        for name in (*names, "head_dim", "head_dim_v")
    }
    kernels = [_kernel(kernel, machine.limits) for kernel in asked.kernels.values()]
    forward, floor = asked.forward, None
    if forward.prediction is not None:
        floor = Number(floor_ms(machine, forward.problem, asked.kept)["floor"], "model", "ms")
    return CallFacts(
        gpu=machine.name,
        arch=machine.arch,
        num_sms=Number(machine.num_sms, "counted"),
        clock=Number(machine.clock_mhz, "assumed", "MHz"),
        shape=shape,
        dtype=problem.dtype,
        mask=_mask(asked),
        options=_options(asked),
        floor=floor,
        kernels=kernels,
    )


def _mask(asked: Asked) -> str:
    """The mask in words: as the class has it, and what the caller's functions and blocks add."""
    problem, words = asked.problem, [asked.forward.problem.mask]
    if problem.blocks is not None:
        words.append("blocks of a list")
    if ";mask=" in problem.program:
        words.append("a mask of the caller")
    return " and ".join(words)


def _options(asked: Asked) -> list[str]:
    """Options of the call beside its mask, as they were given; arrays are not written out."""
    shown = (bool, int, float, str, tuple)
    given = asked.question.options.items()
    return [
        f"{name}={value}"
        for name, value in given
        if isinstance(value, shown) and name not in _OF_MASKS
    ]


def _kernel(kernel: Kernel, limits: Architecture) -> KernelFacts:
    choice, predicted, report = kernel.choice, kernel.prediction, kernel.report
    measured = choice.measured_ms
    return KernelFacts(
        name=kernel.name,
        config=str(choice.config),
        implementation=choice.config.implementation,
        rule=choice.rule,
        passed_over=choice.passed_over,
        predicted=None if predicted is None else Number(predicted.ms, "model", "ms"),
        measured=None if measured is None else Number(measured, "measured", "ms"),
        bound_by=None if predicted is None else predicted.bound_by,
        blocks_per_sm=None if report is None else Number(report.blocks_per_sm, "machine code"),
        limited_by=None if report is None else report.limited_by,
        next_limits=[] if report is None else _next_limits(report, limits),
        no_code=kernel.no_code,
    )


def _next_limits(report, limits: Architecture) -> list[str]:
    """What would let one more block share an SM, each alone."""
    wanted, found = report.blocks_per_sm + 1, []

    def fits(registers: int, smem_bytes: int) -> bool:
        return blocks_per_sm(limits, report.threads, registers, smem_bytes)[0] >= wanted

    registers = next((n for n in range(report.registers, 0, -1) if fits(n, report.smem_bytes)), 0)
    if 0 < registers < report.registers:
        fewer = report.registers - registers
        found.append(f"{fewer} fewer registers a thread would let {wanted} blocks share an SM")
    steps = range(report.smem_bytes, -1, -limits.smem_unit)
    smem = next((n for n in steps if fits(report.registers, n)), None)
    if smem is not None and smem < report.smem_bytes:
        less = (report.smem_bytes - smem) / KB
        found.append(f"{less:.3g} KiB less shared memory would let {wanted} blocks share an SM")
    return found
