"""Kernels with dropout as machine code: no spills, and eight scores for each run of Philox.

NUMFLASH_TEST_FULL=1 compiles every family for sm_80 and sm_90a at head_dim 64 and 128; by default
those whose registers are scarcest.
"""

import itertools
import re

import pytest

from numflash.configs import Traits
from numflash.machine_code.compiler import get_cubin
from numflash.machine_code.report import inspect_kernel
from numflash.machine_code.sass import disassemble
from numflash.runtime.devices import ARCHITECTURES
from numflash.selection.rules import choose
from tests.support.covering import FULL, some, thorough

FAMILIES = ("forward", "backward-dq", "backward-dkdv")
CASES = (
    list(itertools.product(FAMILIES, ("sm_80", "sm_90a"), (64, 128)))
    if FULL
    else [
        ("forward", "sm_80", 128),
        ("forward", "sm_90a", 64),
        ("backward-dq", "sm_90a", 128),
        ("backward-dkdv", "sm_80", 128),
    ]
)
ROUNDS = 10


def traits_of(head_dim: int, *features: str) -> Traits:
    return Traits("bfloat16", head_dim, head_dim, features)


@pytest.mark.parametrize(("family", "arch", "head_dim"), some(CASES, ("forward", "sm_90a", 64)))
def test_kernels_with_dropout_do_not_spill(family, arch, head_dim):
    limits = ARCHITECTURES[arch]
    choice = choose(family, traits_of(head_dim, "dropout"), limits)
    report = inspect_kernel(choice.config, choice.traits, limits)
    assert report.faults == (), choice.config


SERVED = ("forward", 64), ("backward-dkdv", 128)


@thorough
@pytest.mark.parametrize(("family", "head_dim"), SERVED)
def test_a_run_of_philox_serves_eight_scores(family, head_dim):
    """Each has two products a round; what draws share is computed once."""
    limits = ARCHITECTURES["sm_80"]
    config = choose(family, traits_of(head_dim, "dropout"), limits).config
    counts = []
    for traits in (traits_of(head_dim, "dropout"), traits_of(head_dim)):
        text = disassemble(get_cubin(config, traits, limits).code)
        counts.append(len(re.findall(r"IMAD\.(?:WIDE\.U32|HI\.U32)", text)))
    drawn = config.tile_m * config.tile_n // config.num_threads // 8
    assert ROUNDS * drawn <= counts[0] - counts[1] <= 2 * ROUNDS * drawn + 8
