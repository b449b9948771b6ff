"""Kernels for gradients of heads, and with results in float32, as machine code: no spills."""

import pytest

from numflash.configs import Traits
from numflash.machine_code.report import inspect_kernel
from numflash.runtime.devices import ARCHITECTURES
from numflash.selection.rules import choose
from tests.support.covering import some

CASES = (
    ("backward-rows", "sm_75", Traits("float16", 64, 64, ("alibi",))),
    ("backward-rows", "sm_80", Traits("bfloat16", 128, 128, ("softcap", "alibi"))),
    ("backward-rows", "sm_90a", Traits("float32", 64, 64, ("alibi",))),
    ("delta", "sm_75", Traits("float16", 64, 64, ("sinks",), dlse=True, plain_delta=True)),
    ("delta", "sm_90a", Traits("bfloat16", 64, 64, given_delta=True)),
    ("delta", "sm_90a", Traits("bfloat16", 64, 64, float32_out=True)),
    ("forward", "sm_90a", Traits("bfloat16", 128, 128, float32_out=True)),
    ("backward-dq", "sm_80", Traits("bfloat16", 128, 128, float32_out=True)),
    ("backward-dkdv", "sm_80", Traits("bfloat16", 64, 64, float32_out=True)),
)


KEPT = CASES[1], CASES[5]


@pytest.mark.parametrize(("family", "arch", "traits"), some(CASES, *KEPT), ids=str)
def test_kernels_do_not_spill(family, arch, traits):
    limits = ARCHITECTURES[arch]
    choice = choose(family, traits, limits)
    report = inspect_kernel(choice.config, choice.traits, limits)
    assert report.faults == (), choice.config
