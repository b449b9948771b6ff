"""The factories that build the kernels of configs."""

from importlib import import_module

from numflash.configs import Config, Traits, implementation_of
from numflash.kernels.kernel import Kernel

FACTORIES = {
    ("wgmma", "forward"): "wgmma.forward.make_forward_kernel",
    ("wgmma-fp8", "forward"): "wgmma.fp8_forward.make_fp8_forward_kernel",
    ("wgmma-backward", "backward-dq"): "wgmma.backward_dq.make_backward_dq_kernel",
    ("wgmma-backward", "backward-dkdv"): "wgmma.backward_dkdv.make_backward_dkdv_kernel",
    ("wgmma-backward", "backward"): "wgmma.backward.make_backward_kernel",
    ("wgmma-backward", "reduce-dq"): "wgmma.reduce_dq.make_reduce_dq_kernel",
    ("mma", "forward"): "mma.forward.make_forward_kernel",
    ("mma", "backward-dkdv"): "mma.backward_dkdv.make_backward_dkdv_kernel",
    ("mma", "backward-dq"): "mma.backward_dq.make_backward_dq_kernel",
    ("mma", "backward-rows"): "mma.of_arrays.make_backward_rows_kernel",
    ("mma", "backward"): "mma.backward.make_backward_kernel",
    ("mma", "reduce-dq"): "mma.reduce_dq.make_reduce_dq_kernel",
    ("mma", "backward-tiles"): "mma.of_arrays.make_backward_tiles_kernel",
    ("mma", "backward-columns"): "mma.of_arrays.make_backward_columns_kernel",
    ("mma", "backward-scatter"): "mma.of_arrays.make_backward_scatter_kernel",
    ("mma-fp8", "forward"): "mma.fp8_forward.make_forward_kernel",
    ("portable", "forward"): "portable.forward.make_forward_kernel",
    ("portable", "backward-dkdv"): "portable.backward_dkdv.make_backward_dkdv_kernel",
    ("portable", "backward-dq"): "portable.backward_dq.make_backward_dq_kernel",
    ("portable", "backward-rows"): "portable.of_arrays.make_backward_rows_kernel",
    ("portable", "backward-tiles"): "portable.of_arrays.make_backward_tiles_kernel",
    ("portable", "backward-columns"): "portable.of_arrays.make_backward_columns_kernel",
    ("portable", "backward-scatter"): "portable.of_arrays.make_backward_scatter_kernel",
    ("portable", "delta"): "shared.delta.make_delta_kernel",
    ("portable", "array-sums"): "shared.array_sums.make_array_sums_kernel",
    ("portable", "clear-sums"): "shared.fixed_point.make_clear_sums_kernel",
    ("portable", "round-sums"): "shared.fixed_point.make_round_sums_kernel",
    ("portable", "combine"): "shared.combine.make_combine_kernel",
    ("quantize", "quantize"): "quantize.quantize.make_quantize_kernel",
    ("quantize", "amax"): "quantize.amax.make_amax_kernel",
    ("quantize", "dequantize"): "quantize.dequantize.make_dequantize_kernel",
    ("quantize", "estimate"): "quantize.estimate.make_estimate_kernel",
    ("sequences", "prepare"): "sequences.prepare.make_prepare_kernel",
    ("sequences", "rotary"): "sequences.rotary.make_rotary_kernel",
    ("block-mask", "mask-tiles"): "masks.tiles.make_mask_tiles_kernel",
    ("block-mask", "mask-scatter"): "masks.scatter.make_mask_scatter_kernel",
    ("block-mask", "mask-lists"): "masks.lists.make_mask_lists_kernel",
    ("merging", "merge-onto"): "shared.merge_onto.make_merge_onto_kernel",
    ("sequences", "schedule"): "sequences.schedule.make_schedule_kernel",
}
"""(row of `configs.implementations`, kernel family) -> factory(config, traits) -> Kernel, by name
below `numflash.kernels`: only what is asked for is imported."""


def make_kernel(config: Config, traits: Traits) -> Kernel:
    """The kernel of a config. Imports its module, and no others."""
    module, factory = _found(config)
    return getattr(import_module(module), factory)(config, traits)


def module_of(config: Config) -> str:
    """The dotted name of the module that makes the kernel of a config."""
    return _found(config)[0]


def modules_of(family: str) -> list[str]:
    """The dotted names of the modules that make kernels of a family."""
    return [
        f"numflash.kernels.{factory.rpartition('.')[0]}"
        for (_, of), factory in FACTORIES.items()
        if of == family
    ]


def _found(config: Config) -> tuple[str, str]:
    """(module, factory) of a config."""
    module, _, factory = FACTORIES[implementation_of(config).name, config.family].rpartition(".")
    return f"numflash.kernels.{module}", factory
