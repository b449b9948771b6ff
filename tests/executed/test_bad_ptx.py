"""What is wrong with PTX, or with a launch of it: errors that name the line, and the rule."""

import numpy as np
import pytest

import numflash
from numflash.runtime.errors import UnsupportedError
from numflash.simulator import DeadlockError, SimulationError
from tests.executed.by_hand import AXPY, run


@pytest.mark.parametrize(
    "ptx, message",
    [
        ("", "line 1: .*no .version"),
        ("hello", "line 1: .*no .version"),
        (".version 8.0\n", "line 1: .*no .target"),
        (AXPY.replace("ret;\n}", "ret;"), "line 27: .*has no closing brace"),
        (AXPY.replace("mov.u32 %r2, %ctaid.x;", "mov.u32 %r2 %ctaid.x;"), "line 12"),
        (AXPY.replace("bra DONE", "bra GONE"), "line 17: there is no label GONE"),
        (AXPY.replace("@%p1", "@%p7"), "line 17: .*%p7 is not declared"),
        (AXPY.replace(".reg .pred %p<2>", ".reg .pret %p<2>"), "line 7: .*no such registers"),
        (AXPY.replace("[x]", "[z]"), "line 8: .*z is not declared"),
        (
            AXPY.replace(".param .f32 a", ".param .f99 a"),
            "line 5: '.param .f99 a' is no",
        ),
        (AXPY.replace(".param .f32 a", "\n.param .f99 a"), "line 6: '.param .f99 a' is no param"),
        (
            AXPY.replace(".address_size 64", ".address_size 64\n.shared .align 4 .b99 x[4];"),
            "line 5: '.shared .align 4 .b99 x.4.' is no declaration",
        ),
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
    "statement, message",
    [
        ("add.u32 %r2, %r1;", "add.u32 has 2 operands; it takes 3"),
        ("add.u32 %r2, %r1, %r1, %r1;", "add.u32 has 4 operands; it takes 3"),
        ("max.f32 %f1, %f2;", "max.f32 has 2 operands; it takes 3 or 4"),
        ("fma.rn.f32 %f1, %f2, %f3;", "has 3 operands; it takes 4"),
        ("lop3.b32 %r2, %r1, %r1, %r1;", "has 4 operands; it takes 5"),
        ("setp.lt.u32 %p1, %r1, %r1, %p2;", "has 4 operands; it takes 3"),
        ("setp.lt.and.u32 %p1, %r1, %r1;", "has 3 operands; it takes 4"),
        ("selp.u32 %r2, %r1, %r1;", "has 3 operands; it takes 4"),
        ("mov.u32 %r2;", "has 1 operands; it takes 2"),
        ("cvt.rn.f16x2.f32 %r2, %f1;", "has 2 operands; it takes 3"),
        ("cvt.rn.f16.f32 %h1, %f1, %f2;", "has 3 operands; it takes 2"),
        ("cvta.to.global.u64 %rd4;", "has 1 operands; it takes 2"),
        ("ld.global.u32 %r2, [%rd3], %rd4;", "has 3 operands; it takes 2"),
        ("ld.global.L2::cache_hint.u32 %r2, [%rd3];", "has 2 operands; it takes 3"),
        ("st.global.u32 [%rd3];", "has 1 operands; it takes 2 or 3"),
        ("bar.sync;", "has 0 operands; it takes 1 or 2"),
        ("bar.warp.sync;", "has 0 operands; it takes 1"),
        ("shfl.sync.idx.b32 %r2, %r1, 0, 31;", "has 4 operands; it takes 5"),
        ("vote.sync.any.pred %p1, %p2;", "has 2 operands; it takes 3"),
        ("activemask.b32;", "has 0 operands; it takes 1"),
        ("mbarrier.arrive.expect_tx.shared.b64 _, [%r2];", "has 2 operands; it takes 3"),
        ("mbarrier.try_wait.parity.shared.b64 %p1, [%r2];", "has 2 operands; it takes 3 or 4"),
        ("mbarrier.init.shared.b64 [%r2];", "has 1 operands; it takes 2"),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r2,%r3,%r4,%r5};", "1 operands; it takes 2"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1};", "1 operands; it takes 4"),
        ("cp.async.commit_group %r1;", "has 1 operands; it takes none"),
        ("wgmma.fence.sync.aligned 0;", "has 1 operands; it takes none"),
        ("wgmma.wait_group.sync.aligned;", "has 0 operands; it takes 1"),
        ("membar.gl 1;", "has 1 operands; it takes none"),
        ("bra.uni;", "bra.uni has 0 operands; it takes 1"),
        ("ret %r1;", "ret has 1 operands; it takes none"),
    ],
)
def test_too_few_and_too_many_operands_are_counted(statement, message):
    with pytest.raises(ValueError, match=rf"^line 13: .*{message}$"):
        run(statement)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"grid": 0}, ValueError, "grid must be at least 1, got 0"),
        ({"grid": (1, 2, 3, 4)}, ValueError, "one to three integers"),
        ({"block": 2048}, ValueError, "at most 1024 threads, got 2048"),
        ({"block": 1.5}, TypeError, "block must be an integer, got 1.5"),
        ({"entry": "nobody"}, ValueError, r"no entry 'nobody'; it has 'axpy' \(line 5\)"),
        (
            {"ptx": AXPY + AXPY.replace("entry axpy", "entry other")},
            ValueError,
            r"one of the module's 2 entries: 'axpy' \(line 5\), 'other' \(line 32\)",
        ),
        ({"ptx": 7}, TypeError, "ptx must be text, got int"),
        (
            {"shared_bytes": 200_000},
            ValueError,
            r"entry \(line 5\) has 200000 bytes of shared memory .* sm_80 allows 166912",
        ),
        ({"shared_bytes": -1}, ValueError, "shared_bytes must be at least 0, got -1"),
        ({"arguments": []}, TypeError, r"entry \(line 5\) has 4 parameters, 0 arguments"),
        (
            {"arguments": [None, None, "a", 1]},
            TypeError,
            r"argument 2 for a \(line 5\), a parameter of 4 bytes \(.f32\), must be a number, got",
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


@pytest.mark.parametrize(
    "directive, message",
    [
        (".reqnctapercluster 2, 1, 1", r"grid of \(3, 1, 1\) .* wants \(2, 1, 1\) blocks in each"),
        (".reqnctapercluster 1, 2", r"entry \(line 5\) wants \(1, 2, 1\) blocks in each"),
        (".reqnctapercluster 17", r"entry \(line 5\) has clusters of \(17, 1, 1\) blocks"),
        (".reqnctapercluster 0", r"has clusters of \(0, 1, 1\) .* there are those of 1 to 16"),
        (".reqnctapercluster 3", None),
        (".reqnctapercluster 1, 1, 1", None),
        # How many there are the launch says: here, one.
        (".maxclusterrank 4", None),
    ],
)
def test_a_grid_has_whole_clusters(directive, message):
    ptx = AXPY.replace(".param .u32 n)", f".param .u32 n)\n{directive}")
    given = ptx, None, 3, 32, [np.ones(4, "f4"), np.ones(4, "f4"), 1.0, 4]
    if message is None:
        numflash.run_ptx(*given)
        return
    with pytest.raises(ValueError, match=message):
        numflash.run_ptx(*given)


def test_an_entry_says_how_many_threads_it_allows():
    ptx = AXPY.replace(".param .u32 n)", ".param .u32 n)\n.maxntid 64, 1, 1")
    with pytest.raises(ValueError, match=r"128 threads, the entry \(line 5\) allows \(64, 1, 1\)"):
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
