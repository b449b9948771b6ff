"""Machine code of the kernel that lists tiles, and of those that go through lists: no spills."""

from dataclasses import replace

import pytest

from numflash.configs import ScheduleConfig, Traits
from numflash.machine_code.compiler import get_cubin
from numflash.machine_code.report import inspect_kernel
from numflash.runtime.devices import ARCHITECTURES
from numflash.selection.rules import choose
from tests.support.covering import some, thorough

TRAITS = Traits("float16", 32, 32)
ARCHS = "sm_75", "sm_80", "sm_86", "sm_90a", "sm_100", "sm_120"


@pytest.mark.parametrize("arch", some(ARCHS, "sm_80"))
@pytest.mark.parametrize("splits", some([False, True], True))
def test_the_shipped_config_is_clean_and_fits(arch, splits):
    limits = ARCHITECTURES[arch]
    cubin = get_cubin(ScheduleConfig(splits=splits), TRAITS, limits)
    spills = cubin.spill_store_bytes, cubin.spill_load_bytes, cubin.stack_bytes
    assert (*spills, cubin.warnings) == (0, 0, 0, ())
    assert cubin.smem_bytes <= limits.max_smem_per_block


def ragged(dtype: str, head_dim: int, features: tuple[str, ...] = (), **more) -> Traits:
    return Traits(dtype, head_dim, head_dim, features, ragged=True, **more)


TABLE = {"program": "1;float32[1u];score=add(aux0[sub(j,i)],s)", "read": "0"}
KERNELS = (
    ("forward", "sm_75", ragged("float16", 64)),
    ("forward", "sm_80", ragged("bfloat16", 128)),
    ("forward", "sm_86", ragged("float32", 64)),
    ("forward", "sm_120", ragged("bfloat16", 128, ("softcap",))),
    ("backward-dq", "sm_75", ragged("float16", 64, ("alibi",))),
    ("backward-dq", "sm_80", ragged("bfloat16", 128)),
    ("backward-dq", "sm_120", ragged("float32", 64)),
    ("backward-dkdv", "sm_75", ragged("float16", 128)),
    ("backward-dkdv", "sm_80", ragged("bfloat16", 128)),
    ("backward-dkdv", "sm_90a", ragged("float16", 64, ("softcap",))),
    ("backward-dkdv", "sm_120", ragged("float32", 64, tf32=True)),
    ("backward-rows", "sm_80", ragged("bfloat16", 64, ("alibi",))),
    ("backward-scatter", "sm_90a", ragged("float16", 64, **TABLE)),
)
"""Of each family that goes through lists what has many registers; each GPU, and each dtype."""


@pytest.mark.parametrize(
    ("family", "arch", "traits"), some(KERNELS, KERNELS[9]), ids=lambda each: str(each)
)
def test_kernels_that_go_through_lists_do_not_spill(family, arch, traits):
    limits = ARCHITECTURES[arch]
    choice = choose(family, traits, limits)
    report = inspect_kernel(choice.config, choice.traits, limits)
    assert report.faults == (), choice.config


# Kernels that a call may choose whose registers are the scarcest: of sequences whose keys lie in
# pages or are split. What is chosen is asked of the rules, so that a config that spills shows.
FORWARDS = {
    "pages": (128, {"paged": True}),
    "pages, not aligned": (128, {"paged": True, "vectorized": False}),
    "sequences": (128, {}),
    "a sink": (64, {"features": ("sinks",)}),
}


@pytest.mark.parametrize("arch", some(["sm_75", "sm_80", "sm_90a", "sm_120"], "sm_80"))
@pytest.mark.parametrize("name", some(FORWARDS, "pages"))
def test_forwards_of_split_sequences_are_clean(name, arch):
    head_dim, more = FORWARDS[name]
    traits = Traits("float16", head_dim, head_dim, **{"vectorized": True, "ragged": True, **more})
    limits = ARCHITECTURES[arch]
    choice = choose("forward", traits, limits, no_bulk_copies="as if not describable")
    cubin = get_cubin(replace(choice.config, num_splits=2), choice.traits, limits)
    spills = cubin.spill_store_bytes, cubin.spill_load_bytes, cubin.stack_bytes
    assert (*spills, cubin.warnings) == (0, 0, 0, ())


@thorough
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_boxes_of_pages_cost_hoppers_main_loop_little(head_dim):
    """The config that runs, and the same on arrays of one length: the producer does the rest."""
    limits = ARCHITECTURES["sm_90a"]
    traits = ragged("float16", head_dim, vectorized=True, paged=True)
    choice = choose("forward", traits, limits)
    assert choice.implementation.needs_maps
    report = inspect_kernel(choice.config, choice.traits, limits)
    dense = inspect_kernel(choice.config, Traits("float16", head_dim, head_dim), limits)
    assert report.faults == dense.faults == ()
    # Descriptors that find no uniform register are moved: 347 for 327 at head_dim 192.
    more = {128: 7, 192: 20}.get(head_dim, 0)
    assert report.main_loop.issued <= dense.main_loop.issued + more
