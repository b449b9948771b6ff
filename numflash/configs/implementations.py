"""The implementations of the kernels, a row each: all that other modules know of them.

A row says which families an implementation has, on which GPUs, which problems it refuses and why,
which configs it ships, and how its blocks are laid over a machine. `selection` goes through the
rows from the fastest to the most general; `kernels.factories` has the kernel of each row and
family. A new generation of GPUs is a new row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from numflash.configs import fp8, mma_rules, portable, quantize, wgmma, wgmma_backward
from numflash.configs.block_masks import BLOCK_MASK_CONFIGS
from numflash.configs.fp8 import PREFIX, Fp8ForwardConfig
from numflash.configs.merging import MERGING_CONFIGS
from numflash.configs.mma import MMA_CONFIGS
from numflash.configs.portable import PORTABLE_CONFIGS
from numflash.configs.quantize import QUANTIZE_CONFIGS
from numflash.configs.sequences import SEQUENCE_CONFIGS
from numflash.configs.traits import Asked, Traits
from numflash.configs.wgmma import Sm90ForwardConfig, Sm90Fp8ForwardConfig
from numflash.configs.wgmma_backward import WGMMA_BACKWARD_CONFIGS
from numflash.runtime.devices import Architecture

_MOST_REGISTERS = 255


def _nothing(*_) -> None:
    """No reason against it."""


def _without_tf32(traits: Traits) -> Traits:
    """The traits of a kernel without products of tf32: that of float32, compiled once for both."""
    return replace(traits, tf32=False)


@dataclass(frozen=True)
class Implementation:
    """A row.

    Attributes:
        name: of the row; `kernels.factories` goes by it.
        configs: kernel family -> its config class.
        generation: of a GPU, the instructions that it has for these kernels; None if it has none,
            and `explain_dispatch` passes the row over in silence.
        candidates: of a family, traits and a GPU, the configs that are shipped, preferred first.
        misfit: (config, traits, limits, rows, warps) -> why a candidate is not the one to use,
            None if it is; at least so many warps must fit on an SM.
        refuses: (traits, limits, asked) -> why it has no config for a problem, or None.
        cannot_run: (config, traits, limits, asked) -> why a config that the caller forces cannot
            run at all, or None; shared memory aside.
        adapts: of a problem's traits those that its kernels are compiled for.
        warps: that should fit on an SM at once, the best number first.
        rule: that chooses a config, in words for messages.
        slower: why it is not taken where a row before it runs.
        title: in messages where it refuses; {} is the generation.
        begins: the beginning of its configs' string forms, and of those of no row before it.
        takes_last: whether its last candidate runs where none fits.
        fp8: whether it computes on 8-bit floats; others never do.
        has_tensor_cores: whether its products are those of tensor cores. Its forwards then pack
            heads, split the keys and have an order of blocks.
        needs_maps: whether bulk copies fetch its tiles, by tensor maps, and warpgroups multiply.
        packs: whether it can have so many packed heads in the rows of a tile.
        blocks_to_fuse: blocks of keys for each SM from which on its one kernel for dQ, dK and dV
            comes before its two; None if it never does.
        resident: (config, limits) -> registers that a thread is taken to use where occupancy is
            estimated before a kernel is compiled.
    """

    name: str
    configs: Mapping[str, type]
    generation: Callable[[Architecture], str | None]
    candidates: Callable[[str, Traits, Architecture], tuple]
    misfit: Callable[..., str | None]
    refuses: Callable[[Traits, Architecture, Asked], str | None] = _nothing
    cannot_run: Callable[..., str | None] = _nothing
    adapts: Callable[[Traits], Traits] = lambda traits: traits
    warps: tuple[int, ...] = (1,)
    rule: str = ""
    slower: str = ""
    title: str = "{}"
    begins: str = ""
    takes_last: bool = False
    fp8: bool = False
    has_tensor_cores: bool = True
    needs_maps: bool = False
    packs: Callable[[int], bool] = lambda pack: True
    blocks_to_fuse: int | None = None
    resident: Callable[..., int] = lambda config, limits: _MOST_REGISTERS

    def called(self, limits: Architecture) -> str:
        """Its name in messages on a GPU: as its configs' string forms begin there."""
        kind = next(iter(self.configs.values()))
        return f"{kind.prefix}{self.generation(limits)}"

    def serves(self, family: str, traits: Traits, limits: Architecture) -> bool:
        """Whether it has a kernel of a family and kind of elements for a GPU."""
        is_there = family in self.configs and self.fp8 == traits.fp8
        return is_there and self.generation(limits) is not None


_TENSOR_CORES = "the first tensor-core config of which {} warps fit on an SM"
_WGMMA = {
    "generation": wgmma.generation,
    "candidates": lambda family, traits, limits: wgmma.candidates(traits),
    "misfit": lambda config, traits, limits, rows, warps: wgmma.misfit(
        config, traits, limits, rows
    ),
    "refuses": wgmma.refuses,
    "cannot_run": wgmma.cannot_run,
    # TMA copes with any row alignment, so `vectorized` must not tell two kernels apart.
    "adapts": lambda traits: replace(traits, vectorized=True),
    "rule": "the first that fits of the configs for wgmma",
    "needs_maps": True,
    "packs": lambda pack: wgmma.torn(pack) is None,
    "resident": wgmma.registers_of_a_block,
}

IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation(
        name="wgmma",
        configs={"forward": Sm90ForwardConfig},
        begins="sm90",
        **_WGMMA,
    ),
    Implementation(
        name="wgmma-fp8",
        configs={"forward": Sm90Fp8ForwardConfig},
        begins=PREFIX + "sm90",
        title=PREFIX + "{}",
        fp8=True,
        **_WGMMA,
    ),
    Implementation(
        name="wgmma-backward",
        configs=WGMMA_BACKWARD_CONFIGS,
        begins="sm90",
        generation=wgmma.generation,
        candidates=lambda family, traits, limits: wgmma_backward.candidates(family, traits),
        misfit=lambda config, traits, limits, rows, warps: wgmma_backward.misfit(
            config, traits, limits, rows
        ),
        refuses=wgmma.refuses,
        cannot_run=wgmma_backward.cannot_run,
        rule=_WGMMA["rule"],
        needs_maps=True,
        # By the tuner's model. With fewer the last blocks leave SMs idle, or wait for each other.
        blocks_to_fuse=8,
        resident=wgmma.registers_of_a_block,
    ),
    Implementation(
        name="mma",
        configs=MMA_CONFIGS,
        begins="sm",
        generation=mma_rules.generation,
        candidates=lambda family, _, limits: mma_rules.candidates(
            family, mma_rules.generation(limits)
        ),
        misfit=mma_rules.misfit,
        refuses=lambda traits, limits, asked: mma_rules.no_products(
            traits, mma_rules.generation(limits), asked
        ),
        cannot_run=mma_rules.cannot_run,
        warps=mma_rules.WARPS_PER_SM,
        rule=_TENSOR_CORES,
        slower="wgmma is faster",
        title="{} (tensor cores)",
    ),
    Implementation(
        name="mma-fp8",
        configs={"forward": Fp8ForwardConfig},
        generation=fp8.generation,
        candidates=lambda family, traits, limits: fp8.candidates(limits),
        misfit=fp8.misfit,
        refuses=lambda traits, limits, asked: mma_rules.no_softmax(asked),
        cannot_run=fp8.cannot_run,
        warps=mma_rules.WARPS_PER_SM,
        rule=_TENSOR_CORES,
        slower="wgmma multiplies codes, mma.sync must make float16 of them",
        title="{} (tensor cores)",
        begins=PREFIX,
        fp8=True,
    ),
    Implementation(
        name="portable",
        configs=PORTABLE_CONFIGS,
        generation=lambda limits: "portable",
        candidates=lambda family, traits, limits: portable.candidates(family),
        misfit=lambda config, traits, limits, rows, warps: portable.misfit(
            config, traits, limits, rows
        ),
        refuses=portable.refuses,
        cannot_run=portable.cannot_run,
        adapts=_without_tf32,
        rule="the first that fits of the portable configs",
        slower="tensor cores are faster",
        takes_last=True,
        has_tensor_cores=False,
    ),
    Implementation(
        name="quantize",
        configs=QUANTIZE_CONFIGS,
        generation=fp8.generation,
        # `quantize_config` makes the only one.
        candidates=lambda family, traits, limits: (),
        misfit=_nothing,
        cannot_run=quantize.cannot_run,
        adapts=_without_tf32,
        has_tensor_cores=False,
    ),
    Implementation(
        name="block-mask",
        configs=BLOCK_MASK_CONFIGS,
        generation=lambda limits: "block-mask",
        candidates=lambda family, traits, limits: (BLOCK_MASK_CONFIGS[family](),),
        misfit=_nothing,
        has_tensor_cores=False,
    ),
    Implementation(
        name="merging",
        configs=MERGING_CONFIGS,
        generation=lambda limits: "merging",
        candidates=lambda family, traits, limits: (MERGING_CONFIGS[family](),),
        misfit=_nothing,
        has_tensor_cores=False,
    ),
    Implementation(
        name="sequences",
        configs=SEQUENCE_CONFIGS,
        generation=lambda limits: "sequences",
        candidates=lambda family, traits, limits: (SEQUENCE_CONFIGS[family](),),
        misfit=lambda config, traits, limits, rows, warps: config.misfit(traits),
        cannot_run=lambda config, traits, limits, asked: config.misfit(traits),
        adapts=_without_tf32,
        has_tensor_cores=False,
    ),
)
"""From the fastest to the most general: the first that does not refuse runs."""

_OF_CONFIG = {kind: row for row in IMPLEMENTATIONS for kind in row.configs.values()}


def implementation_of(config) -> Implementation:
    """The row of a config, or of a class of configs."""
    return _OF_CONFIG[config if type(config) is type else type(config)]
