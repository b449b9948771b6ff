"""`numflash.run_ptx`: PTX written by hand, and what is wrong with it."""

import numpy as np
import pytest

import numflash
from numflash.problem.tensor_maps import TensorLayout
from numflash.runtime.errors import UnsupportedError
from numflash.simulator import DeadlockError, SimulatedTensorMap, SimulationError


def module(body: str, parameters: str = ".param .u64 x, .param .u32 n", declares="") -> str:
    """A module with one entry `kernel`, whose registers are p, r, f, h and rd, 16 of each."""
    return f"""
.version 8.0
.target sm_90a
.address_size 64
{declares}
.visible .entry kernel({parameters})
{{
    .reg .pred %p<16>; .reg .b32 %r<16>; .reg .f32 %f<16>; .reg .b16 %h<16>; .reg .b64 %rd<16>;
    ld.param.u64 %rd1, [x];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
{body}
    ret;
}}
"""


def run(body, *, grid=1, block=32, x=None, n=0, declares="", **options):
    x = np.zeros(64, np.uint32) if x is None else x
    found = numflash.run_ptx(
        module(body, declares=declares), "kernel", grid, block, [x, n], **options
    )
    return found if options.get("profile") else x


AXPY = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry axpy(.param .u64 x, .param .u64 y, .param .f32 a, .param .u32 n)
{
    .reg .pred %p<2>; .reg .b32 %r<6>; .reg .f32 %f<5>; .reg .b64 %rd<6>;
    ld.param.u64 %rd1, [x];
    ld.param.u64 %rd2, [y];
    ld.param.f32 %f1, [a];
    ld.param.u32 %r1, [n];
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mad.lo.s32 %r5, %r2, %r3, %r4;
    setp.ge.s32 %p1, %r5, %r1;
    @%p1 bra DONE;
    mul.wide.s32 %rd3, %r5, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    ld.global.f32 %f2, [%rd4];
    ld.global.f32 %f3, [%rd5];
    fma.rn.f32 %f4, %f1, %f2, %f3;
    st.global.f32 [%rd5], %f4;
DONE:
    ret;
}
"""


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


# What other compilers write and our kernels do not


def test_hints_of_caches_make_no_other_instruction():
    body = """
    .shared .align 16 .b8 room[512];
    mul.wide.u32 %rd4, %r1, 16;
    add.s64 %rd5, %rd1, %rd4;
    shl.b32 %r2, %r1, 4;
    mov.u32 %r3, room;
    add.u32 %r4, %r2, %r3;
    cp.async.cg.shared::cta.global.L2::256B [%r4], [%rd5], 16, 16;
    cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared.u32 %r5, [%r4+12];
    st.global.u32 [%rd5], %r5;"""
    x = np.arange(128, dtype=np.uint32)
    assert run(body, x=x)[::4].tolist() == list(range(3, 128, 4))
    with pytest.raises(UnsupportedError, match=r"know cp\.async\.ca\.shared::cta\.global"):
        run(body.replace("async.cg", "async.ca"))  # 16 bytes through L1: no kernel has it


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


def squares(*products: str, before: str = "") -> np.ndarray:
    """The accumulators of n = 8 of a warpgroup after these products of ones by ones."""
    body = f"""
    .shared .align 1024 .b8 a[8192];
    .reg .b32 %d<4>; .reg .pred %adds;
    shl.b32 %r2, %r1, 6;
    mov.u32 %r3, a;
    add.u32 %r4, %r2, %r3;
    mov.u32 %r5, 0;
    mov.b32 %r6, 0x3c003c00;
FILL:
    st.shared.u32 [%r4], %r6;
    add.u32 %r4, %r4, 4;
    add.u32 %r5, %r5, 1;
    setp.lt.u32 %p1, %r5, 16;
    @%p1 bra FILL;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    shr.u32 %r7, %r3, 4;
    cvt.u64.u32 %rd4, %r7;
    or.b64 %rd5, %rd4, {1 << 16 | 64 << 32 | 1 << 62};
    mov.b32 %d0, 0x41200000; mov.b32 %d1, %d0; mov.b32 %d2, %d0; mov.b32 %d3, %d0;
    {before}
    wgmma.fence.sync.aligned;
    {" ".join(products)}
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    st.global.b32 [%rd3], %d3;"""
    return run(body, x=np.zeros(128, np.float32), block=128)


def product(scale_d: str) -> str:
    return (
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%d0, %d1, %d2, %d3}, %rd5, %rd5, "
        f"{scale_d}, 1, 1, 0, 0;"
    )


def test_a_predicate_says_whether_a_product_adds():
    holds, fails = "setp.eq.u32 %adds, %r5, 16;", "setp.ne.u32 %adds, %r5, 16;"
    assert (squares(product("%adds"), before=holds) == 10 + 16).all()
    assert (squares(product("%adds"), before=fails) == 16).all()
    assert (squares(product("1"), product("%adds"), before=fails) == 16).all()
    assert (squares(product("!%adds"), product("1"), before=fails) == 10 + 32).all()
    with pytest.raises(SimulationError, match="scale-d differs from lane to lane"):
        squares(product("%adds"), before="setp.lt.u32 %adds, %r1, 40;")


INVALIDATED = """
    .shared .align 8 .b8 barrier[8];
    mov.u32 %r2, barrier;
    setp.eq.u32 %p1, %r1, 0;
    @%p1 mbarrier.init.shared.b64 [%r2], 1;
    bar.sync 0;
    @%p1 mbarrier.inval.shared::cta.b64 [%r2];
    bar.sync 0;
    """


def test_an_mbarrier_that_is_no_more():
    used = "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r2];"
    with pytest.raises(SimulationError, match=r"line 21: .*mbarrier_init has not made it one"):
        run(INVALIDATED + used)
    run(INVALIDATED + "@%p1 mbarrier.init.shared::cta.b64 [%r2], 1;\n" + used)
    with pytest.raises(SimulationError, match="initialised twice"):
        run(INVALIDATED.replace("inval.shared::cta.b64 [%r2]", "init.shared.b64 [%r2], 1"))


@pytest.mark.parametrize("way", ["", ".read"])
def test_bulk_stores_are_over_or_have_only_read(way):
    body = f"""
    .shared .align 128 .b8 room[128];
    mov.u32 %r2, room;
    shl.b32 %r3, %r1, 2;
    add.u32 %r4, %r2, %r3;
    mov.u32 %r9, 7;
    st.shared.u32 [%r4], %r9;
    fence.proxy.async.shared::cta;
    bar.warp.sync -1;
    mov.b32 %r5, map;
    cvt.u64.u32 %rd4, %r5;
    cvta.param.u64 %rd5, %rd4;
    mov.u32 %r6, 0;
    setp.eq.u32 %p1, %r1, 0;
    @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd5, {{%r6, %r6}}], [%r2];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group{way} 0;
    bar.warp.sync -1;
    ld.global.u32 %r7, [%rd3];
    st.global.u32 [%rd3+128], %r7;"""
    x = np.zeros((2, 32), np.float32)
    layout = TensorLayout("float32", (32, 1), (128,), (32, 1))
    parameters = ".param .u64 x, .param .u32 n, .param .align 64 .b8 map[128]"
    arguments = [x, 0, SimulatedTensorMap(x, layout)]
    numflash.run_ptx(module(body, parameters), None, 1, 32, arguments)
    stored, seen = x.view(np.uint32)
    # Only who waits for writes may read them; otherwise they come as late as they can.
    assert (stored == 7).all() and (seen == (0 if way else 7)).all()


# Errors


@pytest.mark.parametrize(
    "ptx, message",
    [
        ("", "no .version"),
        ("hello", "no .version"),
        (".version 8.0\n", "no .target"),
        (AXPY.replace("ret;\n}", "ret;"), "has no closing brace"),
        (AXPY.replace("mov.u32 %r2, %ctaid.x;", "mov.u32 %r2 %ctaid.x;"), "line 12"),
        (AXPY.replace("bra DONE", "bra GONE"), "line 17: there is no label GONE"),
        (AXPY.replace("@%p1", "@%p7"), "line 17: .*%p7 is not declared"),
        (AXPY.replace(".reg .pred %p<2>", ".reg .pret %p<2>"), "line 7: .*no such registers"),
        (AXPY.replace("[x]", "[z]"), "line 8: .*z is not declared"),
        (AXPY.replace(".param .f32 a", ".param .f99 a"), "is no parameter"),
    ],
)
def test_text_that_is_no_ptx_is_refused_by_its_line(ptx, message):
    with pytest.raises((ValueError, UnsupportedError), match=message):
        numflash.run_ptx(ptx, None, 1, 32, [])


@pytest.mark.parametrize(
    "body, name",
    [
        ("tex.2d.v4.f32.f32 {%f1,%f2,%f3,%f4}, [tex, {%f1,%f2}];", "tex.2d"),
        ("add.rz.f32 %f1, %f2, %f3;", "add.rz.f32: .rz"),
        ("cvt.rz.f16.f32 %h1, %f1;", "cvt.rz.f16.f32"),
        ("add.cc.u32 %r1, %r2, %r3;", "add.cc.u32"),
        ("call.uni printf;", "call.uni"),
        ("mov.u32 %r2, %clock;", "%clock"),
        ("mov.u32 %q2, 1;", "%q2 is no declared register"),
        ("mov.u32 %r2, %q2;", "%q2 is not declared"),
        (
            "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%rd4}, {%rd4}, {%rd4}, {%rd4};",
            "m8n8",
        ),
        (
            "wgmma.mma_async.sync.aligned.m64n8k16.f16.f16.f16 {%r2}, %rd4, %rd4, 1, 1, 1, 0, 0;",
            "f16",
        ),
        (
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r2}, %rd4, %rd4;",
            "with these operands",
        ),
        (
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r2,%r3,%r4,%r5}, %rd4, %rd4, "
            "%p1, 1, 1, %r6, 0;",
            "with these operands",
        ),
        ("multimem.ld_reduce.global.add.f32 %f1, [%rd3];", "multimem"),
    ],
)
def test_an_instruction_that_is_not_known_is_named_with_its_line(body, name):
    with pytest.raises(UnsupportedError, match=r"line 13: .*") as caught:
        run(body)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"grid": 0}, ValueError, "grid must be at least 1, got 0"),
        ({"grid": (1, 2, 3, 4)}, ValueError, "one to three integers"),
        ({"block": 2048}, ValueError, "at most 1024 threads, got 2048"),
        ({"block": 1.5}, TypeError, "block must be an integer, got 1.5"),
        ({"entry": "nobody"}, ValueError, "no entry 'nobody'; it has .'axpy'."),
        ({"ptx": 7}, TypeError, "ptx must be text, got int"),
        ({"shared_bytes": 200_000}, ValueError, "200000 bytes of shared memory .* sm_80 allows"),
        ({"shared_bytes": -1}, ValueError, "shared_bytes must be at least 0, got -1"),
        ({"arguments": []}, TypeError, "has 4 parameters, 0 arguments"),
        (
            {"arguments": [None, None, "a", 1]},
            TypeError,
            "argument 2 .* must be a number, got str",
        ),
        ({"arguments": [1.5, None, 1.0, 1]}, TypeError, "argument 0 .* must be an integer"),
        ({"arguments": [None, None, 1.0, 2**32]}, ValueError, "argument 3 .* got 4294967296"),
        ({"arguments": [None, None, np.ones(3), 1]}, TypeError, "argument 2"),
        ({"arguments": [np.array([{}]), None, 1.0, 1]}, TypeError, "Python objects"),
        ({"arguments": [b"123", None, 1.0, 1]}, ValueError, "argument 0 .* has 3 bytes"),
        ({"seed": "x"}, TypeError, "seed must be an integer"),
    ],
)
def test_what_a_launch_is_given_is_checked(changes, error, message):
    x = np.ones(4, "f4")
    given = {"ptx": AXPY, "entry": None, "grid": 1, "block": 32, "arguments": [x, x, 1.0, 4]}
    with pytest.raises(error, match=message):
        numflash.run_ptx(**(given | changes))


@pytest.mark.parametrize("directive", [".reqnctapercluster 2, 1, 1", ".maxclusterrank 4"])
def test_clusters_of_several_blocks_are_refused(directive):
    ptx = AXPY.replace(".param .u32 n)", f".param .u32 n)\n{directive}")
    with pytest.raises(ValueError, match="clusters of one block only"):
        numflash.run_ptx(ptx, None, 1, 32, [None, None, 0.0, 0])
    one = AXPY.replace(".param .u32 n)", ".param .u32 n)\n.reqnctapercluster 1, 1, 1")
    numflash.run_ptx(one, None, 1, 32, [np.ones(4, "f4"), np.ones(4, "f4"), 1.0, 4])


def test_an_entry_says_how_many_threads_it_allows():
    ptx = AXPY.replace(".param .u32 n)", ".param .u32 n)\n.maxntid 64, 1, 1")
    with pytest.raises(ValueError, match=r"block has 128 threads, the entry allows \(64, 1, 1\)"):
        numflash.run_ptx(ptx, None, 1, 128, [None, None, 0.0, 0])


@pytest.mark.parametrize(
    "body, error, message",
    [
        ("ld.global.u32 %r2, [%rd1+4096];", IndexError, "line 13: ld.global.u32.*outside every"),
        ("ld.global.u32 %r2, [%rd1+-4];", IndexError, "line 13: .*outside every array"),
        ("ld.global.u32 %r2, [%rd1+2];", ValueError, "line 13: .*4-byte access.*misaligned"),
        ("ld.global.v4.u32 {%r2,%r3,%r4,%r5}, [%rd1+4];", ValueError, "16-byte.*misaligned"),
        (
            "mov.u32 %r2, 0;\n st.shared.u32 [%r2], %r1;",
            IndexError,
            "line 14: .*shared address 0x0",
        ),
        ("st.shared.u32 [room+128], %r1;", IndexError, "line 13: .*shared memory"),
        ("ld.param.u32 %r2, [n+4096];", IndexError, "line 13: .*the parameters"),
        ("mov.u64 %rd4, 0;\n ld.u32 %r2, [%rd4];", IndexError, "line 14: .*0x0"),
        ("trap;", SimulationError, "line 13: trap: the kernel has trapped"),
        ("bar.sync 0, 33;", SimulationError, "line 13: .*multiple of 32"),
    ],
)
def test_what_goes_wrong_names_its_line(body, error, message):
    with pytest.raises(error, match=message) as caught:
        run(body, declares=".shared .align 4 .b8 room[128];")
    assert "NUMFLASH_SIM_SEED" in " ".join(caught.value.__notes__)


def test_an_array_that_must_not_be_written_is_not():
    x = np.zeros(64, np.uint32)
    x.flags.writeable = False
    with pytest.raises(ValueError, match=r"line 13: .*must not be"):
        run("st.global.u32 [%rd3], %r1;", x=x)


def test_a_barrier_that_never_fills_is_a_deadlock_that_names_its_line():
    body = """
    setp.lt.u32 %p1, %r1, 32;
    @%p1 bra END;
    bar.sync 1, 64;
END:"""
    with pytest.raises(DeadlockError, match=r"threads 32-63 at line 16: bar.sync 1, 64") as caught:
        run(body, block=64)
    assert "32 of 64 threads came" in str(caught.value)


def test_lanes_that_never_come_are_a_deadlock():
    body = """
    setp.lt.u32 %p1, %r1, 8;
    @%p1 bra APART;
    bar.warp.sync -1;
    bra.uni END;
APART:
    bar.sync 0;
END:"""
    with pytest.raises(DeadlockError, match=r"threads 8-31 at line 16: bar.warp.sync"):
        run(body)


def test_an_mbarrier_that_nobody_arrives_at_is_a_deadlock():
    body = """
    .shared .align 8 .b8 barrier[8];
    mov.u32 %r2, barrier;
    setp.eq.u32 %p1, %r1, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r2], 2;
    bar.sync 0;
    @%p1 mbarrier.arrive.shared::cta.b64 _, [%r2];
AGAIN:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;
    @!%p2 bra AGAIN;"""
    with pytest.raises(DeadlockError, match=r"line 21: mbarrier.try_wait.parity") as caught:
        run(body)
    assert "lacks 1 of 2 arrivals" in str(caught.value)


def test_seeds_repeat_the_order_of_warps():
    # The last warp to come wins.
    body = """
    shr.u32 %r2, %r1, 5;
    st.global.u32 [%rd1], %r2;"""
    winners = [int(run(body, block=256, seed=seed)[0]) for seed in range(16)]
    assert len(set(winners)) > 2
    assert winners == [int(run(body, block=256, seed=seed)[0]) for seed in range(16)]
