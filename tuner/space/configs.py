"""The configs that may be tried for a class of problems on a machine, and why the others may not.

A space is a product of dimensions, such as tile_m and num_warps, each an ordered list of choices;
where several implementations can run a class it is the union of their products. Configs that obey
the rules that are known before anything is compiled are `feasible`; the others are counted by the
constraint that excludes them. `judge_resources` judges a config by its compiled kernel.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

from numflash.configs import (
    MMA_CONFIGS,
    PORTABLE_CONFIGS,
    WARPGROUP_ROWS,
    Config,
    MmaConfig,
    Sm90ForwardConfig,
    Traits,
    implementation_of,
)
from numflash.configs.features import FEATURES, Features
from numflash.problem.classes import ProblemClass
from numflash.problem.pages import PageTable
from numflash.problem.problem import AttentionProblem
from numflash.problem.sequences import NO_LIMIT, Lengths
from numflash.problem.tensor_maps import torn_pages
from numflash.runtime.devices import Architecture, blocks_per_sm
from numflash.runtime.errors import UnsupportedError
from numflash.selection.geometry import rows_packed
from numflash.selection.rules import choose, choose_forward

from ..lengths import heads_of, room_of_pages
from ..recipes import several_scales
from ..records import ResourceUsage
from .dimensions import GEOMETRY, kind_of, preferred, products, value_of
from .machines import Machine

_MIN_REGISTERS = 24
"""Registers that every kernel needs beside its accumulators: addresses, counters."""
_ACCUMULATORS_PER_OPERAND = 8
"""Larger tiles need more operands at once: a register for so many accumulators. By compiling."""
_MAX_REGISTERS = 255
_WARPGROUP_REGISTERS = 20
_OUTPUTS_PER_OPERAND = 6
"""As the two above, of the warps that multiply on Hopper: by compiling 35 configs. Configs that
pass may still spill; all that do not pass did, or were serialised."""
_GRADIENT_REGISTERS = 16
"""Registers of a warp that multiplies for gradients on Hopper, beside its accumulators."""

_OF_THE_USER = ("--sram-budget", "--min-occupancy")
"""Constraints that hold for the default, too."""

Failure = tuple[str, str]
"""(outcome, reason), outcomes as in `records.FAILURES`."""


@dataclass(frozen=True)
class Budgets:
    """Resources that the user grants a kernel.

    Attributes:
        smem_bytes: shared memory per block; None is all that the device has.
        min_occupancy: the part of an SM's threads that must be resident at once, 0 to 1.
    """

    smem_bytes: int | None = None
    min_occupancy: float = 0.0

    def __post_init__(self):
        if self.smem_bytes is not None and self.smem_bytes <= 0:
            raise ValueError(f"the shared-memory budget must be positive, got {self.smem_bytes}")
        if not 0 <= self.min_occupancy <= 1:
            raise ValueError(f"the occupancy must be between 0 and 1, got {self.min_occupancy}")


class EmptySpaceError(ValueError):
    """No config obeys every constraint; the message says which constraint excludes how many."""


@dataclass(frozen=True)
class Space:
    """The configs for a problem class on a machine.

    Attributes:
        problem: the class.
        machine: the GPU.
        budgets: the user's.
        is_measured: whether a GPU judges, or else the model.
    """

    problem: ProblemClass
    machine: Machine
    budgets: Budgets = field(default_factory=Budgets)
    is_measured: bool = False

    @cached_property
    def default(self) -> Config:
        """The config that runs untuned."""
        problem, limits = self.problem, self.machine.limits
        if problem.family != "forward":
            return choose(
                problem.family, problem.traits, limits, self._rows[0], True, self._unaligned
            ).config
        stands_for = self._stands_for
        choice = choose_forward(stands_for, problem.traits, limits, self.machine.num_sms)
        if choice.has_geometry and problem.group_size > 1 and problem.traits.of_a_head is None:
            return replace(choice.config, packed=rows_packed(stands_for) > 1)
        return choice.config

    @property
    def preferred(self) -> tuple[Config, ...]:
        """The configs that numflash chooses the default from, preferred first."""
        return preferred(self.problem, self.machine)

    @property
    def _rows(self) -> tuple[int, int]:
        """Rows that blocks share out, keys where they make dK and dV, and those they walk over."""
        rows = self.problem.seqlen_q, self.problem.seqlen_k
        return rows[::-1] if self.problem.family in ("backward", "backward-dkdv") else rows

    @property
    def _unaligned(self) -> str | None:
        """Why bulk copies cannot fetch the rows of the class, or None."""
        return None if self.problem.traits.vectorized else "rows are not aligned"

    @property
    def _stands_for(self) -> AttentionProblem:
        """A problem of the class, its mask aside."""
        problem, traits = self.problem, self.problem.traits
        dense = AttentionProblem(
            batch=1,
            seqlen_q=problem.seqlen_q,
            seqlen_k=problem.seqlen_k,
            num_heads_q=problem.batch_heads,
            num_heads_kv=max(1, problem.batch_heads // problem.group_size),
            head_dim=traits.head_dim,
            head_dim_v=traits.head_dim_v,
            dtype=traits.dtype,
            softmax_scale=1.0,
            band_lo=-problem.seqlen_q,
            band_hi=problem.seqlen_k,
            shift=0,
            features=Features(
                *(row.absent if row.name in traits.features else None for row in FEATURES)
            ),
            tf32=traits.tf32,
            no_tensor_maps=self._unaligned,
        )
        return self._with_lengths(dense) if traits.ragged else dense

    def _with_lengths(self, dense: AttentionProblem) -> AttentionProblem:
        """The same of sequences with lengths of their own, as `lengths.sequences_of` has them."""
        problem, heads = self.problem, heads_of(self.problem)
        entries = max(1, problem.batch_heads // heads)
        of_heads = {"num_heads_q": heads, "num_heads_kv": max(1, heads // problem.group_size)}
        of_heads |= {"band_lo": -NO_LIMIT, "band_hi": NO_LIMIT}
        if size := problem.page_size:
            room, count = room_of_pages(problem), problem.seqlen_k // size * entries
            sizes = {"batch": entries, "seqlen_k": room}
            pages = PageTable(entries, room // size, room // size, max(1, count), size)
            lengths = Lengths(entries, problem.seqlen_q, room, False, ("seqlens_k",))
            return replace(dense, **of_heads, **sizes, lengths=lengths, pages=pages)
        tokens = {n: getattr(problem, n) * entries for n in ("seqlen_q", "seqlen_k")}
        given = "cu_seqlens_q", "cu_seqlens_k"
        lengths = Lengths(entries, *tokens.values(), True, given)
        return replace(dense, **of_heads, **tokens, lengths=lengths)

    @property
    def runs(self) -> bool:
        """Whether calls of this class run this kernel at all, tuned or not."""
        problem = self.problem
        if problem.family == "combine":
            forward = Space(replace(problem, family="forward"), self.machine, self.budgets)
            return getattr(forward.default, "num_splits", 1) > 1
        try:
            return self.default is not None
        except UnsupportedError:
            return False

    @property
    def _on_tensor_cores(self) -> bool:
        return implementation_of(self.default).has_tensor_cores

    @property
    def without_tf32(self) -> str | None:
        """Why a class that allows tf32 does not use it; None if it does, or does not allow it."""
        problem, limits = self.problem, self.machine.limits
        has_products = problem.family in MMA_CONFIGS
        if not (problem.traits.tf32 and has_products) or self._on_tensor_cores:
            return None
        choice = choose(problem.family, problem.traits, limits, problem.seqlen_q)
        what, why = choice.passed_over[0]
        return (
            f"{self.machine.name} ({limits.arch}) multiplies {problem} exactly, on its FMA units, "
            f"not as tf32 ({what}: {why}); what runs there is tuned without --precision tf32"
        )

    @cached_property
    def dimensions(self) -> dict[str, tuple]:
        """Name -> choices in order; the names are those of the config's fields."""
        products = self.products
        return {
            name: tuple(sorted({each for choices in products for each in choices[name]}))
            for name in products[0]
        }

    @cached_property
    def products(self) -> tuple[dict[str, tuple], ...]:
        """The dimensions of each product of which the space is the union; names are the same."""
        packed = rows_packed(self._stands_for) if self.problem.family == "forward" else 1
        return products(self.problem, self.machine, self.default, packed, self.is_measured)

    def _make(self, values: dict) -> Config:
        family, default = self.problem.family, self.default
        if not self._on_tensor_cores:
            return PORTABLE_CONFIGS[family](**values)
        values = {"generation": default.generation} | values
        kind = kind_of(self.problem, values["generation"])
        names = {each.name for each in fields(kind)}
        return kind(**{name: each for name, each in values.items() if name in names})

    def failure(self, config: Config) -> Failure | None:
        """Why a config may not be tried; None if it may."""
        found = self._violation(config)
        return None if found is None else found[1]

    def _violation(self, config: Config) -> tuple[str, Failure] | None:
        """(constraint, failure) of the first constraint that a config violates."""
        traits, limits = self.problem.traits, self.machine.limits
        row = implementation_of(config)
        if row.has_tensor_cores and (why := config.misfit(traits)) is not None:
            return "instruction shapes", ("invalid", why)
        if traits.fp8 and (why := several_scales(self.problem, config.tile_n)) is not None:
            return "scales of keys", ("invalid", why)
        if (why := self._torn(config)) is not None:
            return "rows of a warpgroup", ("invalid", why)
        if row.needs_maps and self.problem.page_size:
            why = torn_pages(self.problem.page_size, config.box_n)
            if why is not None:
                return "pages", ("invalid", why)
        if (why := self._idle(config)) is not None:
            return "rows of the problem", ("invalid", why)
        needed, granted = config.smem_bytes(traits), limits.max_smem_per_block
        if needed > granted:
            why = f"needs {needed} bytes of shared memory, {limits.arch} has {granted} per block"
            return "shared memory of the device", ("over_budget", why)
        if self.budgets.smem_bytes is not None and needed > self.budgets.smem_bytes:
            why = f"needs {needed} bytes of shared memory, granted are {self.budgets.smem_bytes}"
            return "--sram-budget", ("over_budget", why)
        if row.has_tensor_cores:
            if (why := self._pointless_cap(config, limits)) is not None:
                return "register caps", ("invalid", why)
            cap, kept = _register_cap(config, limits), config.accumulators_per_thread(traits)
            needed_registers = _registers(kept, traits)
            if row.needs_maps:
                columns = config.part_columns(traits) if traits.fp8 else traits.head_dim_v
                widest = max(config.column_tile, columns) // 2
                if widest + _MIN_REGISTERS >= cap:
                    why = f"a product has {widest} accumulators, all blocks begin with {cap}"
                    return "registers", ("over_budget", why)
                cap = config.registers_of(traits)[1]
                needed_registers = warpgroup_registers(config, traits)
            if needed_registers > cap:
                why = f"needs {needed_registers} registers for {kept} accumulators, may have {cap}"
                return "registers", ("over_budget", why)
        # With the fewest registers that it could have.
        fit, by = blocks_per_sm(limits, config.num_threads, _MIN_REGISTERS, needed)
        if (why := self._below_occupancy(fit, by, config.num_threads)) is not None:
            return "--min-occupancy", ("over_budget", why)
        return None

    def _torn(self, config: Config) -> str | None:
        """Why bulk copies cannot lay packed heads into the rows of a warpgroup."""
        group = self.problem.group_size
        if getattr(config, "packed", False) and not implementation_of(config).packs(group):
            return f"the {group} heads of a group do not divide {WARPGROUP_ROWS} rows"
        return None

    def _idle(self, config: Config) -> str | None:
        """Why most of a block would idle; None if it would not."""
        rows, keys = self._rows
        if getattr(config, "packed", False):
            rows *= self.problem.group_size
        columns = getattr(config, "column_tile", 0)
        if config.block_rows >= 2 * max(rows, 16):
            return f"computes {config.block_rows} rows at a time, there are {rows}"
        if columns >= 2 * max(keys, 16):
            return f"walks in tiles of {columns} rows, there are {keys}"
        return None

    def _pointless_cap(self, config: MmaConfig, limits: Architecture) -> str | None:
        """Why a register cap would change nothing or cannot be met; None if it may help."""
        chosen = getattr(config, "consumer_registers", 0)
        if chosen and config.registers == replace(config, consumer_registers=0).registers:
            return f"{chosen} registers are what warps that multiply have anyway"
        if not config.min_blocks:
            return None
        smem = config.smem_bytes(self.problem.traits)
        fit, by = blocks_per_sm(limits, config.num_threads, _MIN_REGISTERS, smem)
        if fit < config.min_blocks:
            return f"{by} leaves room for {fit} blocks per SM, not {config.min_blocks}"
        is_hopper = implementation_of(config).needs_maps
        if not is_hopper and _register_cap(config, limits) >= _MAX_REGISTERS:
            return f"{config.min_blocks} blocks per SM leave all registers to each thread"
        return None

    def _below_occupancy(self, fit: int, limited_by: str, num_threads: int) -> str | None:
        occupied = fit * num_threads / self.machine.limits.max_threads_per_sm
        if occupied < self.budgets.min_occupancy:
            return (
                f"{limited_by} leaves room for {fit} blocks of {num_threads} threads per SM, "
                f"{occupied:.0%} of it, wanted are {self.budgets.min_occupancy:.0%}"
            )
        return None

    @cached_property
    def _walked(self) -> tuple[dict[Config, dict], Counter, dict[str, str]]:
        feasible, excluded, examples = {}, Counter(), {}
        for product in self.products:
            self._walk(product, feasible, excluded, examples)
        violation = self._violation(self.default)
        if violation is not None and violation[0] not in _OF_THE_USER:
            # The default stays, whatever its speed: it runs untuned.
            feasible[self.default] = {n: value_of(self.default, n) for n in self.dimensions}
            excluded[violation[0]] -= 1
        return feasible, excluded, examples

    def _walk(self, product: dict[str, tuple], feasible: dict, excluded: Counter, examples: dict):
        """Sort the configs of a product into feasible ones and others."""
        code = {n: c for n, c in product.items() if n not in GEOMETRY}
        orders = {n: c for n, c in product.items() if n in GEOMETRY and n != "packed"}
        packings = [{"packed": each} for each in product.get("packed", ())] or [{}]
        laid_out = list(_combinations(orders))
        for shape in _combinations(code):
            for packing in packings:
                try:
                    base = self._make(shape | packing)
                except ValueError as error:
                    excluded["instruction shapes"] += len(laid_out)
                    examples.setdefault("instruction shapes", str(error))
                    continue
                if (violation := self._violation(base)) is not None:
                    constraint, (_, reason) = violation
                    excluded[constraint] += len(laid_out)
                    examples.setdefault(constraint, f"{base} {reason}")
                    continue
                for layout in laid_out:
                    values = shape | packing | layout
                    feasible[replace(base, **layout)] = {n: values[n] for n in product}

    @property
    def feasible(self) -> dict[Config, dict]:
        """Every config that may be tried -> its values by name."""
        return self._walked[0]

    @property
    def excluded(self) -> Counter:
        """Constraint -> how many configs it excludes."""
        return self._walked[1]

    @property
    def examples(self) -> dict[str, str]:
        """Constraint -> one config that it excludes, and why."""
        return self._walked[2]

    def expect_any(self) -> None:
        """Raise EmptySpaceError if nothing is feasible."""
        if not self.feasible:
            counts = ", ".join(f"{name} {n}" for name, n in self.excluded.most_common())
            raise EmptySpaceError(
                f"no config of {self.problem} is possible on {self.machine.name}: of "
                f"{self.excluded.total()} configs each was excluded by a constraint ({counts})"
            )

    def judge_resources(self, resources: ResourceUsage) -> Failure | None:
        """Why a compiled config may not be used; None if it may."""
        if resources.spill_bytes:
            why = f"{resources.spill_bytes} bytes of registers spilled per thread"
            return "spilled", why
        if resources.warnings:
            return "spilled", f"the compiler warns: {resources.warnings[0]}"
        if resources.blocks_per_sm == 0:
            return "over_budget", f"no block fits on an SM: {resources.limited_by}"
        why = self._below_occupancy(
            resources.blocks_per_sm, resources.limited_by, resources.num_threads
        )
        return None if why is None else ("over_budget", why)


def _combinations(dimensions: dict[str, tuple]) -> Iterator[dict]:
    """Every combination of choices, as values by name."""
    for chosen in itertools.product(*dimensions.values()):
        yield dict(zip(dimensions, chosen, strict=True))


def _registers(accumulators: int, traits: Traits) -> int:
    """Registers without which a kernel with so many accumulators is sure to spill.

    On 8-bit floats 96 accumulators were compiled into 128 registers: operands take few.
    """
    if traits.fp8:
        return accumulators + _MIN_REGISTERS
    return accumulators + accumulators // _ACCUMULATORS_PER_OPERAND + _MIN_REGISTERS


def warpgroup_registers(config: MmaConfig, traits: Traits) -> int:
    """Registers without which a warp that multiplies on Hopper is sure to spill.

    While products overlap the softmax, S, P and O are there at once.
    """
    if config.family != Sm90ForwardConfig.family:
        return config.accumulators_per_thread(traits) + _GRADIENT_REGISTERS
    outputs = traits.head_dim_v // 2
    overlapping = config.probability_registers if config.overlap else 0
    kept = config.accumulators_per_thread(traits) + overlapping
    if traits.fp8:
        # Nobody has counted the registers of its operands.
        return kept + _WARPGROUP_REGISTERS
    return kept + outputs // _OUTPUTS_PER_OPERAND + _WARPGROUP_REGISTERS


def _register_cap(config: MmaConfig, limits: Architecture) -> int:
    """Registers that a thread may have."""
    blocks = max(1, config.min_blocks)
    per_thread = limits.registers_per_sm // (config.num_threads * blocks)
    return min(_MAX_REGISTERS, per_thread // 8 * 8)
