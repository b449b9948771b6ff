"""Structures as arguments."""

import numpy as np
import pytest

import numflash
from tests.executed.by_hand import module


def test_a_structure_is_a_tuple_of_its_members():
    body = """
    ld.param.u64 %rd4, [s];
    ld.param.u32 %r2, [s+8];
    ld.param.u32 %r3, [s+12];
    add.s64 %rd4, %rd4, %rd2;
    ld.global.u32 %r4, [%rd4];
    mad.lo.u32 %r5, %r4, %r2, %r3;
    st.global.u32 [%rd3], %r5;"""
    ptx = module(body, ".param .u64 x, .param .align 8 .b8 s[16]")
    x, y = np.zeros(32, np.uint32), np.arange(32, dtype=np.uint32)
    numflash.run_ptx(ptx, None, 1, 32, [x, (y, np.uint32(3), (5).to_bytes(4, "little"))])
    np.testing.assert_array_equal(x, 3 * y + 5)
    with pytest.raises(ValueError, match=r"argument 1 .* has 12 bytes"):
        numflash.run_ptx(ptx, None, 1, 32, [x, (y, np.uint32(3))])
    with pytest.raises(TypeError, match=r"argument 1 .* has a member of type int"):
        numflash.run_ptx(ptx, None, 1, 32, [x, (y, 3)])
