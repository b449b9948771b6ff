"""Matrices that a warp stores and loads."""

import numpy as np

from tests.executed.by_hand import run


def test_matrices_are_stored_transposed():
    body = """
    .shared .align 16 .b8 room[512];
    mov.u32 %r2, room;
    shl.b32 %r3, %r1, 4;
    add.u32 %r3, %r2, %r3;
    shl.b32 %r4, %r1, 16;
    or.b32 %r4, %r4, %r1;
    add.u32 %r5, %r4, 0x00640064;
    stmatrix.sync.aligned.m8n8.x4TRANS.shared.b16 [%r3], {%r4, %r4, %r5, %r5};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4BACK.shared.b16 {%r6, %r7, %r8, %r9}, [%r3];
    sub.u32 %r8, %r8, 0x00640064;
    add.u32 %r6, %r6, %r7;
    add.u32 %r6, %r6, %r8;
    add.u32 %r6, %r6, %r9;
    sub.u32 %r6, %r6, 0x00640064;
    st.global.u32 [%rd3], %r6;"""
    lanes = np.arange(32, dtype=np.uint32)
    for transposes, right in (("", ""), (".trans", ".trans")):
        x = run(body.replace("TRANS", transposes).replace("BACK", right))
        np.testing.assert_array_equal(x[:32], 4 * (lanes << 16 | lanes))
    other = run(body.replace("TRANS", ".trans").replace("BACK", ""))[:32]
    # Element (row, column) is lane 4 column + row / 2 in either half.
    rows, pairs = lanes // 4, lanes % 4
    low, high = 4 * (2 * pairs) + rows // 2, 4 * (2 * pairs + 1) + rows // 2
    np.testing.assert_array_equal(other, 4 * (high << 16 | low))
