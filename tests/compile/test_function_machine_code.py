"""Kernels with bias, masks and functions: float32 alone, nothing in local memory, no spill.

Each GPU, family and program is there; NUMFLASH_TEST_FULL=1 compiles all with all. The config is
the one that is chosen, and where that spills the next one, which does not.
"""

import re
from dataclasses import replace
from itertools import product

import ml_dtypes
import numpy as np
import pytest

from numflash import masks
from numflash.configs import Traits
from numflash.functions.trace import Traced, trace
from numflash.machine_code.compiler import get_cubin
from numflash.machine_code.report import inspect_kernel
from numflash.machine_code.sass import disassemble, opcodes
from numflash.math import exp
from numflash.runtime.devices import ARCHITECTURES
from numflash.selection.rules import choose
from numflash.selection.spills import spilled_bytes
from tests.support.covering import FULL, some
from tests.support.program_values import metadata

BIAS = np.empty((2, 4, 8, 8), np.float16)
TABLE = np.empty((32, 4), np.float32)
SLOPES = np.empty(4, ml_dtypes.bfloat16)
DOCUMENTS = np.empty(8, np.int32)
MASK = np.empty((2, 4, 8, 8), bool)


def gaussian(score, batch, head, q_idx, kv_idx, width):
    """Bends scores, and looks at a number."""
    distance = (q_idx - kv_idx) / width
    return score * exp(-distance * distance)


def aligned(traced: Traced) -> Traced:
    """The program where all pairs of neighbours are aligned."""
    return traced._replace(program=traced.program.with_pairs(range(len(traced.names))))


PROGRAMS = {
    "bias": trace(bias=metadata(BIAS)),
    "mask": trace(mask=metadata(np.empty((2, 1, 1, 8), bool))),
    "T5": trace(masks.relative_position(), None, (metadata(TABLE),)),
    "alibi and causal": trace(masks.alibi, masks.causal, (metadata(SLOPES),)),
    "documents": trace(None, masks.document, (metadata(DOCUMENTS),)),
    "gaussian": trace(gaussian, None, (3.0,)),
    "bias by pairs": aligned(trace(bias=metadata(BIAS))),
    "mask by pairs": aligned(trace(mask=metadata(MASK))),
    "documents by pairs": aligned(trace(None, masks.document, (metadata(DOCUMENTS),))),
}
FAMILIES = ("forward", "backward-dkdv", "backward-dq")
ARCHS = ("sm_75", "sm_80", "sm_89", "sm_90a", "sm_100", "sm_120")
CASES = (
    ("sm_75", "forward", 128, "documents"),
    ("sm_75", "backward-dq", 64, "alibi and causal"),
    ("sm_80", "forward", 64, "bias"),
    ("sm_80", "backward-dkdv", 128, "gaussian"),
    ("sm_89", "backward-dq", 64, "T5"),
    ("sm_90a", "forward", 64, "mask"),
    ("sm_90a", "forward", 128, "T5"),
    ("sm_90a", "forward", 64, "bias"),
    ("sm_90a", "backward-dkdv", 64, "bias"),
    ("sm_75", "forward", 64, "mask by pairs"),
    ("sm_80", "backward-dq", 64, "bias by pairs"),
    ("sm_90a", "forward", 128, "bias by pairs"),
    ("sm_100", "forward", 128, "alibi and causal"),
    ("sm_120", "forward", 128, "documents by pairs"),
    ("sm_120", "backward-dkdv", 128, "mask"),
    ("sm_120", "backward-dq", 128, "bias"),
)
if FULL:
    CASES = tuple(product(ARCHS, FAMILIES, (64, 128), PROGRAMS))


@pytest.mark.parametrize("case", some(CASES, CASES[2]), ids=lambda case: "-".join(map(str, case)))
def test_machine_code_is_clean(case):
    arch, family, head_dim, name = case
    limits = ARCHITECTURES[arch]
    traits = Traits("float16", head_dim, head_dim, program=PROGRAMS[name].program.text)

    def spills(config, traits):
        return spilled_bytes(config, traits, limits, True)

    config = choose(family, traits, limits, spills=spills).config
    cubin = get_cubin(config, traits, limits)
    assert not cubin.warnings
    assert cubin.stack_bytes == cubin.spill_store_bytes == cubin.spill_load_bytes == 0, config
    found = list(opcodes(disassemble(cubin.code)))
    assert not [o for o in found if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)|.*F64|LDL|STL", o)]
    # Scores of a thread; there are copies of the loop over them, in the middle and at ends.
    scores = config.tile_m * config.tile_n // (32 * config.num_warps)
    if name == "bias" and family == "forward":
        assert found.count("LDG.E.U16") % scores == 0 < found.count("LDG.E.U16")
    if name == "bias by pairs" and family != "backward-dkdv":
        pairs, lone = (found.count(f"LDG.E{kind}.CONSTANT") for kind in ("", ".U16"))
        assert pairs % (scores // 2) == 0 and pairs == 2 * lone > 0, (pairs, lone)
    if name == "bias by pairs" and arch == "sm_90a":
        # 32 reads of two, 64 halves made floats, 64 multiply-adds, and 55 for two rows' addresses
        # and descriptors that find no uniform register; one by one it is 282 more.
        plain = inspect_kernel(config, replace(traits, program=""), limits).main_loop
        loop = inspect_kernel(config, traits, limits).main_loop
        assert str(config).startswith("sm90-m128n128w8s2") and loop.issued - plain.issued < 220
