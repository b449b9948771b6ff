"""`numflash.run_ptx`: PTX written by hand."""

import numpy as np
import pytest

import numflash
from tests.executed.by_hand import AXPY, run


def test_a_kernel_changes_its_arrays():
    x, y = np.arange(100, dtype="f4"), np.ones(100, "f4")
    assert numflash.run_ptx(AXPY, "axpy", 2, 64, [x, y, 2.0, 100]) is None
    np.testing.assert_array_equal(y, 2 * x + 1)


def test_strides_may_be_negative_and_arrays_views():
    x, y = np.arange(400, dtype="f4"), np.zeros(100, "f4")
    memory = x.copy()
    numflash.run_ptx(AXPY, None, 1, 32, [x[:32], y[:32], 1.0, 32])
    np.testing.assert_array_equal(y[:32], x[:32])
    last = memory[::-1]
    # Element 0 of the view is the last of its memory: nothing lies behind it.
    with pytest.raises(IndexError, match=r"line 21: ld.global.f32"):
        numflash.run_ptx(AXPY, None, 1, 32, [last, y, 1.0, 32])


def test_a_profile_counts_instructions_lines_and_bytes():
    x, y = np.arange(100, dtype="f4"), np.ones(100, "f4")
    profile = numflash.run_ptx(AXPY, "axpy", 2, 64, [x, y, 2.0, 100], profile=True)
    assert profile.by_opcode["fma.rn.f32"] == 4  # warps, of which the last has four lanes left
    assert profile.by_line[23] == 4
    assert profile.bytes["load", "global"] == 800
    assert profile.bytes["store", "global"] == 400


def test_lanes_that_went_apart_meet_again():
    body = """
    and.b32 %r2, %r1, 1;
    setp.eq.u32 %p1, %r2, 0;
    mov.u32 %r5, 0;
    @%p1 bra EVEN;
    mov.u32 %r5, 7;
    bra.uni MEET;
EVEN:
    mov.u32 %r5, 5;
MEET:
    shfl.sync.bfly.b32 %r6, %r5, 1, 31, -1;
    st.global.u32 [%rd3], %r6;"""
    assert run(body)[:4].tolist() == [7, 5, 7, 5]


def test_loops_of_different_lengths():
    body = """
    mov.u32 %r2, 0;
    mov.u32 %r3, 0;
AGAIN:
    add.u32 %r3, %r3, %r2;
    add.u32 %r2, %r2, 1;
    setp.le.u32 %p1, %r2, %r1;
    @%p1 bra AGAIN;
    st.global.u32 [%rd3], %r3;"""
    assert run(body)[:32].tolist() == [n * (n + 1) // 2 for n in range(32)]


def test_static_and_dynamic_shared_memory():
    declares = ".extern .shared .align 16 .b8 dynamic[];\n.shared .align 4 .b8 fixed[128];"
    body = """
    mov.u32 %r2, dynamic;
    mov.u32 %r3, fixed;
    shl.b32 %r4, %r1, 2;
    add.u32 %r5, %r2, %r4;
    add.u32 %r6, %r3, %r4;
    st.shared.u32 [%r5], %r1;
    st.shared.u32 [%r6], %r4;
    bar.sync 0;
    ld.shared.u32 %r7, [dynamic+16];
    ld.shared.u32 %r8, [%r6];
    add.u32 %r9, %r7, %r8;
    st.global.u32 [%rd3], %r9;"""
    got = run(body, declares=declares, shared_bytes=128)
    assert got[:32].tolist() == [4 + 4 * lane for lane in range(32)]


def test_local_memory_is_each_lanes_own_also_by_generic_addresses():
    body = """
    .local .align 16 .b8 depot[32];
    mov.u64 %rd4, depot;
    cvta.local.u64 %rd5, %rd4;
    st.local.u32 [%rd4+4], %r1;
    ld.u32 %r2, [%rd5+4];
    st.global.u32 [%rd3], %r2;"""
    assert run(body)[:32].tolist() == list(range(32))


def test_constants_and_atomics():
    declares = ".const .align 4 .u32 table[2] = {5, 7};"
    body = """
    ld.const.u32 %r2, [table+4];
    atom.global.add.u32 %r3, [%rd1], %r2;
    red.global.max.u32 [%rd1+4], %r3;"""
    assert run(body, declares=declares)[:2].tolist() == [7 * 32, 7 * 31]


def test_wide_accesses_move_every_element():
    body = """
    .shared .align 16 .b8 room[512];
    mul.wide.u32 %rd4, %r1, 16;
    add.s64 %rd5, %rd1, %rd4;
    ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%rd5];
    shl.b32 %r6, %r1, 4;
    mov.u32 %r7, room;
    add.u32 %r8, %r6, %r7;
    st.shared.v4.u32 [%r8], {%r5, %r4, %r3, %r2};
    ld.shared.v2.u32 {%r9, %r10}, [%r8+8];
    ld.shared.u8 %h1, [%r8];
    st.global.v2.u32 [%rd5], {%r9, %r10};
    st.global.u16 [%rd5+8], %h1;"""
    x = np.arange(128, dtype=np.uint32)
    expected = x.reshape(32, 4).copy()
    expected[:, 2] = expected[:, 3] & 0xFF  # a byte, as 16 bits: numbers below 128
    expected[:, :2] = expected[:, 1::-1]
    np.testing.assert_array_equal(run(body, x=x).reshape(32, 4), expected)


def test_what_a_kernel_reads_before_it_wrote_is_poison():
    declares = ".shared .align 4 .b8 room[128];"
    got = run("ld.shared.u32 %r2, [room];\n st.global.u32 [%rd3], %r2;", declares=declares)
    assert got[0] == 0xFFFFFFFF


def test_a_kernel_that_writes_nothing_is_no_crash():
    assert not run("").any()


def test_parameters_have_generic_addresses():
    body = """
    mov.b32 %r2, n;
    cvt.u64.u32 %rd4, %r2;
    cvta.param.u64 %rd5, %rd4;
    ld.u32 %r3, [%rd5];
    ld.param.u32 %r4, [n];
    add.u32 %r5, %r3, %r4;
    st.global.u32 [%rd3], %r5;"""
    assert run(body, n=21)[0] == 42


def test_seeds_repeat_the_order_of_warps():
    # The last warp to come wins.
    body = """
    shr.u32 %r2, %r1, 5;
    st.global.u32 [%rd1], %r2;"""
    winners = [int(run(body, block=256, seed=seed)[0]) for seed in range(16)]
    assert len(set(winners)) > 2
    assert winners == [int(run(body, block=256, seed=seed)[0]) for seed in range(16)]
