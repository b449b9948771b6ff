"""Kernels with bias, masks and functions: float32 alone, nothing in local memory, no spill.

Each GPU, family and kind of program is there; NUMFLASH_TEST_FULL=1 compiles all with all. The
config is the one that is chosen, or where that spills the next one that does not.
"""

import re
from itertools import product

import ml_dtypes
import numpy as np
import pytest

from numflash import masks
from numflash.configs import Traits
from numflash.functions.trace import trace
from numflash.machine_code.compiler import get_cubin
from numflash.machine_code.sass import disassemble, opcodes
from numflash.math import exp
from numflash.runtime.devices import ARCHITECTURES
from numflash.selection.rules import choose
from tests.support.covering import covering
from tests.support.program_values import metadata

BIAS = np.empty((2, 4, 8, 8), np.float16)
TABLE = np.empty((32, 4), np.float32)
SLOPES = np.empty(4, ml_dtypes.bfloat16)
DOCUMENTS = np.empty(8, np.int32)


def gaussian(score, batch, head, q_idx, kv_idx, width):
    """Bends scores, and looks at a number."""
    distance = (q_idx - kv_idx) / width
    return score * exp(-distance * distance)


PROGRAMS = {
    "bias": trace(bias=metadata(BIAS)),
    "mask": trace(mask=metadata(np.empty((2, 1, 1, 8), bool))),
    "T5": trace(masks.relative_position(), None, (metadata(TABLE),)),
    "alibi and causal": trace(masks.alibi, masks.causal, (metadata(SLOPES),)),
    "documents": trace(None, masks.document, (metadata(DOCUMENTS),)),
    "gaussian": trace(gaussian, None, (3.0,)),
}
FAMILIES = ("forward", "backward-dkdv", "backward-dq")
ARCHS = ("sm_75", "sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120")


def _cases():
    rows = product(ARCHS, FAMILIES, (64, 128), PROGRAMS)
    # Together 3: Hopper's forward has kernels of its own, which meet each program.
    chosen = covering(rows, lambda row: (row[0], row[1], row[2], None))
    programs = list(PROGRAMS)
    found = [
        (*row[:3], programs[n % len(programs)]) if row[3] == programs[0] else row
        for n, row in enumerate(chosen)
    ]
    found += [("sm_90a", "forward", 128, program) for program in ("bias", "T5", "gaussian")]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("case", _cases(), ids="-".join)
def test_machine_code_is_clean(case):
    arch, family, head_dim, name = case
