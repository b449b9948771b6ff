"""Blocks that run together in the executor, and what mistakes in their turns show.

The kernel is `tests.support.chain_kernels`, written by hand.
"""

import re

import numpy as np
import pytest

import numflash
from numflash.runtime import driver
from numflash.simulator import SEED, DeadlockError, SimulationError
from tests.executed.by_hand import run
from tests.support.chain_kernels import CHAINS, THREADS
from tests.support.covering import ALL, some, thorough

SEEDS = range(6 if ALL else 2)
PTX = """
.version 8.6
.target sm_90a
.address_size 64
.visible .entry chain(.param .u64 x, .param .u64 y, .param .u64 turns, .param .u64 steps,
                      .param .u32 rows)
{
    .reg .pred %p<8>; .reg .b32 %r<24>; .reg .b64 %rd<16>; .reg .f32 %f<4>;
    .shared .align 16 .b8 room[256];
    ld.param.u64 %rd1, [x];
    ld.param.u64 %rd2, [y];
    ld.param.u64 %rd3, [turns];
    ld.param.u64 %rd4, [steps];
    ld.param.u32 %r20, [rows];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    and.b32 %r3, %r1, 31;
    mov.u32 %r5, room;
    add.u32 %r6, %r20, 1;
    mul.lo.u32 %r6, %r6, %r2;
    mul.wide.u32 %rd5, %r6, 8;
    add.u64 %rd6, %rd4, %rd5;
    setp.lt.u32 %p1, %r1, 32;
    setp.eq.u32 %p3, %r3, 0;
    setp.eq.u32 %p7, %r3, 1;
    @%p1 bra CONSUMER;
    bar.arrive 2, 64;
ADD:
    ld.global.v2.u32 {%r9, %r10}, [%rd6];
    setp.lt.s32 %p2, %r9, 0;
    @%p2 bra DONE;
    bar.sync 1, 64;
    mul.wide.u32 %rd7, %r9, 4;
    add.u64 %rd8, %rd3, %rd7;
    add.u32 %r14, %r10, 1;
    @!%p3 bra MEET;
WAIT:
    ld.acquire.gpu.global.u32 %r11, [%rd8];
    setp.ne.u32 %p4, %r11, %r10;
    @%p4 bra WAIT;
    fence.proxy.async.global;
    mul.wide.u32 %rd9, %r9, 256;
    add.u64 %rd10, %rd2, %rd9;
    setp.eq.u32 %p5, %r10, 0;
    @%p5 cp.async.bulk.global.shared::cta.bulk_group [%rd10], [%r5], 256;
    @!%p5 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd10], [%r5], 256;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
MEET:
    bar.warp.sync 0xffffffff;
    add.u64 %rd6, %rd6, 8;
    ld.global.u32 %r12, [%rd6];
    setp.ge.s32 %p6, %r12, 0;
    @%p6 bar.arrive 2, 64;
    @%p3 cp.async.bulk.wait_group 0;
    @%p3 st.release.gpu.global.u32 [%rd8], %r14;
    bra ADD;
CONSUMER:
    ld.global.v2.u32 {%r9, %r10}, [%rd6];
    setp.lt.s32 %p2, %r9, 0;
    @%p2 bra DONE;
    add.u64 %rd6, %rd6, 8;
    bar.sync 2, 64;
    mad.lo.u32 %r15, %r2, %r20, %r9;
    mul.wide.u32 %rd11, %r15, 256;
    mul.wide.u32 %rd12, %r3, 8;
    add.u64 %rd11, %rd11, %rd12;
    add.u64 %rd11, %rd11, %rd1;
    ld.global.v2.f32 {%f1, %f2}, [%rd11];
    shl.b32 %r16, %r3, 3;
    add.u32 %r16, %r16, %r5;
    st.shared.v2.f32 [%r16], {%f1, %f2};
    fence.proxy.async;
    bar.arrive 1, 64;
    bra CONSUMER;
DONE:
    ret;
}
"""
# What is wrong: (statement, what stands there instead, what every order says).
ALWAYS = {
    "turn": (
        *("ld.acquire.gpu.global.u32 %r11, [%rd8]", "mov.u32 %r11, %r10"),
        r"block .* (adds to|writes) what block .* has written",
    ),
    "global fence": ("    fence.proxy.async.global;", "", "without a fence_proxy_async_global"),
    "fence": ("    fence.proxy.async;", "", "without a fence_proxy_async of that thread"),
    "store": ("setp.eq.u32 %p5, %r10, 0", "setp.eq.u32 %p5, %r10, 99", "wrong"),
    "complete": (
        "    @%p3 cp.async.bulk.wait_group 0;",
        "",
        "cp_async_bulk_wait_group is missing",
    ),
    "only read": (
        *("@%p3 cp.async.bulk.wait_group 0", "@%p3 cp.async.bulk.wait_group.read 0"),
        "cp_async_bulk_wait_group is missing",
    ),
    "released by another early": (
        "    @%p3 cp.async.bulk.wait_group 0;\n    @%p3 st.release",
        "    @%p7 st.release.gpu.global.u32 [%rd8], %r14;\n    @%p3 cp.async.bulk.wait_group 0;\n"
        "    @%p2 st.release",
        r"(adds to|writes) what block",
    ),
    "release": ("    @%p3 st.release", "    @%p2 st.release", "again and again at what nobody"),
    "plain release": ("st.release.gpu", "st", r"reads what block .* has written"),
}


def outcome(name, seed, old="", new=""):
    """How a launch ends: "right", "wrong", or the text of an error."""
    chain = CHAINS[name]
    x, y, turns, steps = chain.arrays()
    steps = np.concatenate([steps, np.full((chain.num_blocks, 1, 2), -1, np.int32)], 1)
    ptx = PTX.replace(old, new) if old else PTX
    assert not old or ptx != PTX
    arguments = [x, y, turns, np.ascontiguousarray(steps), chain.num_rows]
    try:
        numflash.run_ptx(ptx, "chain", chain.num_blocks, THREADS, arguments, seed=seed)
    except (SimulationError, DeadlockError) as error:
        return f"{type(error).__name__}: {error}"
    pairs = zip((y, turns), chain.expected(), strict=True)
    return "right" if all((a == b).all() for a, b in pairs) else "wrong"


@pytest.fixture
def resident(monkeypatch):
    """A function that says how many blocks run together."""
    return lambda number: monkeypatch.setenv("NUMFLASH_SIM_BLOCKS", str(number))


@pytest.mark.parametrize(
    "name, number",
    [(name, n) for name in ("ascending", "falling") for n in (1, 2, 5)]
    + [("shifted", 3), ("shifted", 5)],
)
def test_turns_give_the_same_bits(name, number, resident):
    resident(number)
    assert [outcome(name, seed) for seed in SEEDS] == ["right"] * len(SEEDS)


def test_the_seed_draws_how_many_run_together():
    assert [outcome("falling", seed) for seed in SEEDS] == ["right"] * len(SEEDS)


@pytest.mark.parametrize("number", [1, 2])
def test_groups_need_their_blocks(number, resident):
    resident(number)
    found = outcome("shifted", 0)
    assert found.startswith("DeadlockError")
    assert f"{number} are resident at a time (NUMFLASH_SIM_BLOCKS)" in found
    for block in range(number):
        assert re.search(
            rf"deadlock in block \({block}, 0, 0\).*\n(.*\n)*?  threads 32 at .*ld.acquire", found
        )


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("what", ALWAYS)
def test_each_order_shows_what_is_wrong(what, number, resident):
    resident(number)
    old, new, message = ALWAYS[what]
    for seed in SEEDS[:2]:
        assert re.search(message, outcome("ascending", seed, old, new))


@pytest.mark.parametrize("number", [1, 2])
def test_a_loop_that_does_not_acquire_is_refused(number, resident):
    resident(number)
    found = outcome("ascending", 0, "ld.acquire.gpu", "ld.relaxed.gpu")
    assert re.search(r"reads what block .* has written", found)


@pytest.mark.parametrize("name", CHAINS)
def test_some_order_shows_a_buffer_that_is_given_back_early(name, resident):
    resident(3)
    old = "    cp.async.bulk.wait_group.read 0;\n"
    found = (outcome(name, seed, old, "") for seed in range(8))
    assert any("changed after the store was issued" in text for text in found)


def test_lanes_of_a_warp_may_wait_for_each_other(resident):
    """Lane 0 looks until lane 1 has released, further behind in the program."""
    body = """
    setp.eq.u32 %p1, %r1, 0;
    setp.eq.u32 %p2, %r1, 1;
    @!%p1 bra OTHERS;
    LOOK:
    ld.acquire.gpu.global.u32 %r2, [%rd1];
    setp.ne.u32 %p3, %r2, 7;
    @%p3 bra LOOK;
    st.global.u32 [%rd1+4], 9;
    bra END;
    OTHERS:
    @%p2 st.release.gpu.global.u32 [%rd1], 7;
    END:
    bar.sync 0;"""
    x = run(body, x=np.zeros(64, np.uint32))
    assert x[0] == 7 and x[1] == 9


def test_atomic_operations_hand_over_too(resident):
    """Blocks count themselves by `acq_rel`; the last one reads what the others have written."""
    body = """
    mov.u32 %r3, %ctaid.x;
    mul.wide.u32 %rd4, %r3, 4;
    add.u64 %rd5, %rd1, %rd4;
    setp.eq.u32 %p1, %r1, 0;
    @!%p1 bra END;
    st.global.u32 [%rd5+16], 3;
    atom.acq_rel.gpu.global.add.u32 %r4, [%rd1], 1;
    setp.eq.u32 %p2, %r4, 2;
    @!%p2 bra END;
    ld.acquire.gpu.global.u32 %r8, [%rd1];
    ld.global.u32 %r5, [%rd1+16];
    ld.global.u32 %r6, [%rd1+20];
    ld.global.u32 %r7, [%rd1+24];
    add.u32 %r5, %r5, %r6;
    add.u32 %r5, %r5, %r7;
    st.global.u32 [%rd1+4], %r5;
    END:"""
    resident(3)
    for seed in SEEDS:
        assert run(body, grid=3, seed=seed)[1] == 9
    with pytest.raises(SimulationError, match=r"reads what block .* has written"):
        run(body.replace("acq_rel", "relaxed"), grid=3, seed=0)


# Compiled: Hopper's backward in one kernel, whose blocks add to dQ in turn


def gradients(config: str, monkeypatch, seed: int) -> list[bytes]:
    """dQ, dK and dV of one problem, whose statistics no kernel under test has made."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, n, 1, 16)) for n in (70, 130, 130, 70))
    given = [x.astype(np.float16) for x in (dout, q, k, v)]
    out, lse = numflash.reference.attention(*given[1:], causal=True)
    given += out.astype(np.float16), lse.astype(np.float32)
    monkeypatch.setattr(SEED, "value", seed)
    found = numflash.attention_backward(*given, causal=True, config={"backward": config})
    return [x.tobytes() for x in found]


FUSED = "sm90-m64n64w4s2"


def test_a_compiled_kernel_gives_the_simulators_bits(executed, resident, monkeypatch):
    resident(1)
    executed("sm_90a", code="python")
    expected = gradients(FUSED, monkeypatch, 0)
    executed("sm_90a")
    for number in (1, 2, 3) if ALL else (2,):
        resident(number)
        assert gradients(FUSED, monkeypatch, number) == expected


@pytest.mark.parametrize("num_sms", some([1, 2, 3], 2))
def test_compiled_blocks_draw_places(num_sms, executed, resident, monkeypatch):
    resident(1)
    executed("sm_90a", code="python")
    expected = gradients(FUSED, monkeypatch, 0)
    monkeypatch.setattr(driver, "multiprocessors", lambda device: (num_sms, 2**20))
    for number in (1, 2):
        resident(number)
        executed("sm_90a")
        assert gradients(f"{FUSED}-persistent", monkeypatch, number) == expected


@thorough
def test_a_compiled_kernel_adds_dq_of_each_sequence(executed, resident, monkeypatch):
    rng = np.random.default_rng(1)
    q, k, v, dout = (rng.standard_normal((n, 1, 16)) for n in (99, 170, 170, 99))
    q, k, v, dout = (x.astype(np.float16) for x in (q, k, v, dout))
    ends = {"cu_seqlens_q": [0, 70, 70, 99], "cu_seqlens_k": [0, 90, 100, 170]}
    ends = {name: np.array(each, np.int32) for name, each in ends.items()}
    lse = rng.standard_normal((1, 99)).astype(np.float32) + 4

    def made(number, code=None):
        resident(number)
        executed("sm_90a", code=code) if code else executed("sm_90a")
        monkeypatch.setattr(SEED, "value", number)
        config = {"backward": FUSED}
        found = numflash.attention_varlen_backward(dout, q, k, v, q, lse, config=config, **ends)
        return [x.tobytes() for x in found]

    assert made(3) == made(1, code="python")


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("fence.proxy.async.global;", ";", "without a fence_proxy_async_global"),
        (r"cp.async.bulk.wait_group 0;", ";", "cp_async_bulk_wait_group is missing"),
        (
            *(r"cp.async.bulk.wait_group 0;", "cp.async.bulk.wait_group.read 0;"),
            "cp_async_bulk_wait_group is missing",
        ),
        ("st.release.gpu.global", "st.global", r"reads what block .* has written"),
        ("st.release.gpu[^;]*;", ";", "again and again at what nobody writes"),
    ],
)
def test_a_compiled_kernel_with_a_mistake_is_refused(
    old, new, message, executed, resident, monkeypatch
):
    def mutate(ptx: str) -> str:
        changed = re.sub(old, new, ptx)
        # Other kernels of the call have no such thing.
        assert changed != ptx or "ld.acquire" not in ptx
        return changed

    resident(2)
    executed("sm_90a", mutate)
    with pytest.raises((SimulationError, DeadlockError), match=message):
        gradients(FUSED, monkeypatch, 0)
