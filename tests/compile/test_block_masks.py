"""Machine code of kernels with block masks: as long as with a causal mask, and no spills."""

import pytest

from bench.machine_code.figures import main_loop
from numflash.configs import (
    MaskListsConfig,
    MaskScatterConfig,
    MaskTilesConfig,
    Traits,
    parse_config,
)
from numflash.functions.trace import trace
from numflash.machine_code.compiler import get_cubin
from numflash.machine_code.sass import disassemble
from numflash.runtime.devices import architecture
from numflash.selection.rules import choose
from tests.support.covering import some, thorough

CAUSAL = trace(None, lambda batch, head, q_idx, kv_idx: q_idx >= kv_idx, ()).program.text
BLOCKS = (128, 128)


def compiled(config, traits, arch):
    cubin = get_cubin(config, traits, architecture(arch))
    spills = cubin.spill_store_bytes, cubin.spill_load_bytes, cubin.stack_bytes
    assert (*spills, cubin.warnings) == (0, 0, 0, ())
    return cubin


FORWARDS = (
    ("sm80-m128n64w4s1", "sm_80", 128),
    ("sm90-m128n128w8s2-overlap-pingpong-persistent", "sm_90a", 128),
)


@thorough
@pytest.mark.parametrize(("config", "arch", "head_dim"), FORWARDS)
def test_causal_as_a_function_with_its_blocks_has_a_main_loop_as_long(config, arch, head_dim):
    """Within 10 % of the instructions that a causal mask issues; full tiles ask nothing."""
    config = parse_config("forward", config)
    issued = []
    for more in ({}, {"blocks": BLOCKS, "program": CAUSAL}):
        traits = Traits("bfloat16", head_dim, head_dim, **more)
        issued.append(main_loop(disassemble(compiled(config, traits, arch).code))["issued"])
    assert issued[1] <= 1.1 * issued[0]


@pytest.mark.parametrize("family", some(["backward-dq", "backward-dkdv"], "backward-dkdv"))
@pytest.mark.parametrize("arch", some(["sm_80", "sm_75"], "sm_80"))
def test_the_default_kernels_of_the_backward_do_not_spill(arch, family):
    dtype = "float16" if arch == "sm_75" else "bfloat16"
    choice = choose(family, Traits(dtype, 128, 128, blocks=BLOCKS), architecture(arch))
    compiled(choice.config, choice.traits, arch)


@pytest.mark.parametrize("arch", some(["sm_75", "sm_90a", "sm_120"], "sm_90a"))
def test_kernels_that_make_block_masks_compile(arch):
    traits = Traits("float16", 32, 32)
    compiled(MaskTilesConfig(), Traits("float16", 32, 32, program=CAUSAL, blocks=BLOCKS), arch)
    compiled(MaskListsConfig(), traits, arch)
    compiled(MaskScatterConfig(), traits, arch)
