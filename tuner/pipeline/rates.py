"""Clocks of each step of a program: of a machine, and of machine code where it is there.

By formula everything follows from the sizes that a program names: products from their shapes,
copies from their bytes, other work from the scores of a role's tile. Machine code says better how
long a warpgroup's maxima, exponentials, conversions and masks take.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from numflash.configs import Config, Traits
from numflash.configs.implementations import implementation_of
from numflash.machine_code.report import Report

from ..model.grid import l2_share
from ..model.prediction import BARRIER_LATENCY, L2_LATENCY
from ..space.machines import Machine
from .steps import Program

_ISSUE_LANES = 128
# A row's maximum goes across its four lanes by two shuffles. Assumed.
_ACROSS_LANES = 60
_ISSUE_CLOCKS = 20
"""Clocks of a thread that begins a copy, or of a warp that stores what it has read. Assumed."""
# Blocks that share an SM begin apart by so much of the first product: what chance does. Assumed.
_OFFSET = 1.4
_MASK_ISSUED, _GRADIENT_ISSUED, _SCALE_ISSUED = 4, 2, 2


@dataclass(frozen=True)
class Rates:
    """Clocks of an SM.

    Attributes:
        products: name -> clocks of one role's products in a tile.
        work: kind -> clocks of one role in a tile; "exp" those of the special-function units.
        copies: channel, or tile in shared memory -> clocks that its bytes take on the way from the
            L2.
        latency: from the last of these until the bytes are there.
        barrier: that a barrier takes once all have come.
        issue: of who begins a copy.
        offset: that each further block on the SM begins late.
        origin: "machine code" or "formula".
    """

    products: Mapping[str, float]
    work: Mapping[str, float]
    copies: Mapping[str, float]
    latency: float = float(L2_LATENCY)
    barrier: float = 0.0
    issue: float = _ISSUE_CLOCKS
    offset: float = 0.0
    origin: str = "formula"

    def with_copies(self, clocks: float) -> "Rates":
        """The same where each copy takes so many clocks: 0 where copies are hidden."""
        return replace(self, copies=dict.fromkeys(self.copies, clocks))


def rates_of(
    program: Program,
    machine: Machine,
    config: Config,
    traits: Traits,
    report: Report | None = None,
    blocks: int = 2**30,
) -> Rates:
    """The clocks of a program's steps.

    Args:
        program: of the config and the traits.
        machine: whose SM it is.
        config, traits: of the kernel.
        report: on its machine code; None takes all by formula.
        blocks: of the whole grid, which share the L2.

    Raises:
        ValueError: the machine cannot multiply like this.

    Example:
        >>> rates_of(program_of(config, traits, 8), machines.find("H100"), config, traits)
    """
    l2 = l2_share(machine, blocks)
    work, origin = _work(program, machine), "formula"
    if report is not None and report.main_loop is not None:
        work, origin = work | _from_machine_code(report), "machine code"
    products = _products(program, machine, config, traits)
    return Rates(
        products=products,
        work=work,
        copies={name: n_bytes / l2 for name, n_bytes in program.n_bytes.items()},
        barrier=float(BARRIER_LATENCY) if program.is_in_step else 0.0,
        offset=_OFFSET * products[program.first],
        origin=origin,
    )


def _products(
    program: Program, machine: Machine, config: Config, traits: Traits
) -> dict[str, float]:
    implementation = implementation_of(config)
    of_codes = traits.fp8 and config.multiplies_codes
    if implementation.needs_maps:
        rate = machine.wgmma_e4m3 if of_codes else machine.wgmma_f16
    elif implementation.has_tensor_cores:
        rate = machine.mma_tf32 if traits.tf32 else machine.mma_f16
        # Where e4m3 is no instruction, its products are made of those of float16.
        rate = (machine.mma_e4m3 if of_codes else 0) or rate
        rate *= machine.mma_efficiency
    else:
        rate = float(machine.fp32_lanes)
    if not rate:
        raise ValueError(f"{machine.name} has no products as {config} needs them")
    return {
        name: rows * columns * depth / rate
        for name, (rows, columns, depth) in program.shapes.items()
    }


def _work(program: Program, machine: Machine) -> dict[str, float]:
    """By formula."""
    scores, stored = program.scores, program.stored
    pack = scores / 2 / machine.alu_lanes
    return {
        "mask": _MASK_ISSUED * scores / _ISSUE_LANES,
        "max": scores / machine.alu_lanes + _ACROSS_LANES,
        "exp": scores / machine.sfu_lanes,
        "pack": pack,
        "gradients": _GRADIENT_ISSUED * scores / _ISSUE_LANES + pack,
        "store": 2 * scores / machine.smem_bytes_per_clock,
        "leave": 4 * stored / machine.smem_bytes_per_clock,
        "decode": scores / machine.alu_lanes,
        "statistics": float(L2_LATENCY),
        "scale": _SCALE_ISSUED * scores / _ISSUE_LANES,
        "place": float(_ISSUE_CLOCKS),
        "finish": stored / machine.alu_lanes,
    }


def _from_machine_code(report: Report) -> dict[str, float]:
    """Of a warpgroup's main loop: what its instructions take at least."""
    loop = report.main_loop
    found = {"exp": float(loop.clocks["special"])}
    if loop.instructions["fmnmx"]:
        # A forward, whose conversions are those of P.
        found["pack"] = 2.0 * loop.instructions["conversions"]
        found["max"] = loop.clocks["half_rate"] - found["pack"] + _ACROSS_LANES
    if loop.skipped["mask"]:
        found["mask"] = float(loop.skipped["mask"])
    return found
