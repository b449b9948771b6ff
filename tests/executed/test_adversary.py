"""What the executor does on purpose: registers that nobody wrote, loops that spin."""

import numpy as np
import pytest

import numflash
from numflash.simulator import DeadlockError
from tests.executed.by_hand import AXPY, run
from tests.support.covering import thorough


def test_what_a_predicate_holds_before_it_is_written_is_anything():
    body = """
    selp.u32 %r2, 1, 2, %p5;
    st.global.u32 [%rd3], %r2;"""
    results = [tuple(run(body, seed=seed)[:32].tolist()) for seed in range(8)]
    assert len(set(results)) > 4
    assert all(set(lanes) == {1, 2} for lanes in results)
    assert results == [tuple(run(body, seed=seed)[:32].tolist()) for seed in range(8)]


@pytest.mark.parametrize("written", [True, False])
def test_a_branch_on_an_unwritten_predicate_goes_both_ways(written):
    """As a compiler's mistake would be found: the result depends on the seed."""
    body = f"""
    {"setp.eq.u32 %p5, %r1, 99;" if written else ""}
    mov.u32 %r2, 1;
    @%p5 bra OUT;
    mov.u32 %r2, 2;
OUT:
    st.global.u32 [%rd3], %r2;"""
    results = {tuple(run(body, seed=seed)[:32].tolist()) for seed in range(4)}
    assert len(results) == (1 if written else 4)


def test_a_register_that_nobody_wrote_is_nan():
    body = "add.f32 %f2, %f3, 0f3f800000; st.global.f32 [%rd3], %f2;"
    assert np.isnan(run(body, x=np.zeros(64, np.float32))[:32]).all()


SPIN = """
AGAIN:
    ld.volatile.global.u32 %r2, [%rd1];
    setp.eq.u32 %p1, %r2, 0;
    @%p1 bra AGAIN;"""


def test_a_loop_that_waits_for_memory_names_its_line():
    with pytest.raises(DeadlockError, match=r"0-31 at line 15: ld\.volatile\.global") as caught:
        run(SPIN, max_steps=1000)
    text = str(caught.value)
    assert "warp 0 has executed 10" in text and "nothing happened in its block" in text
    assert "a larger max_steps" in text and "seed" in text


@pytest.mark.parametrize(
    "lock",
    [
        pytest.param(
            "atom.global.cas.b32 %r2, [%rd3], 7, 1; setp.ne.u32 %p1, %r2, 7;", marks=thorough
        ),
        "atom.global.exch.b32 %r2, [%rd3], 1; setp.ne.u32 %p1, %r2, 0;",
        pytest.param(
            "atom.global.add.u32 %r2, [%rd3], 0; setp.eq.u32 %p1, %r2, %r2;", marks=thorough
        ),
    ],
)
def test_a_lock_that_nobody_opens_is_found(lock):
    """Also where another warp waits, at a barrier, for those that spin."""
    body = f"""
    setp.lt.u32 %p2, %r1, 32;
    @%p2 bra MEET;
AGAIN:
    {lock}
    @%p1 bra AGAIN;
MEET:
    bar.sync 0;"""
    with pytest.raises(DeadlockError, match=r"threads 32-63 at line 17: atom") as caught:
        run(body, x=np.ones(64, np.uint32), block=64, max_steps=5000)
    assert "threads 0-31 at line 20: bar.sync 0" in str(caught.value)


@pytest.mark.parametrize(
    "way", ["st.global.u32 [%rd1], %r3;", "atom.global.add.u32 %r4, [%rd1], 9;"]
)
def test_who_is_waited_for_may_take_its_time(way):
    """A warp that falls behind all others runs where they only spin."""
    body = f"""
    setp.ge.u32 %p2, %r1, 32;
    @%p2 bra WRITE;
    {SPIN}
    bra.uni END;
WRITE:
    mov.u32 %r3, 0;
MORE:
    bar.warp.sync -1;
    add.u32 %r3, %r3, 1;
    setp.lt.u32 %p3, %r3, 300;
    @%p3 bra MORE;
    {way}
END:
    st.global.u32 [%rd3], %r2;"""
    for seed in range(8):
        assert run(body, block=64, seed=seed, max_steps=20_000)[1] in (300, 32 * 9)


def test_a_long_loop_is_none_that_spins():
    """Work without a barrier: the default leaves room, and less is an error that says so."""
    body = """
    mov.u32 %r2, 0;
MORE:
    add.u32 %r2, %r2, 1;
    setp.lt.u32 %p1, %r2, 5000;
    @%p1 bra MORE;
    st.global.u32 [%rd3], %r2;"""
    assert (run(body)[:32] == 5000).all()
    with pytest.raises(DeadlockError, match="only takes its time needs a larger max_steps"):
        run(body, max_steps=4000)


def test_what_happens_in_the_block_begins_the_count_again():
    body = """
    mov.u32 %r2, 0;
MORE:
    add.u32 %r2, %r2, 1;
    bar.sync 0;
    setp.lt.u32 %p1, %r2, 2000;
    @%p1 bra MORE;"""
    run(body, block=64, max_steps=2100)


def test_blocks_run_one_after_the_other():
    """One that waits for a later one is told so."""
    body = f"""
    mov.u32 %r3, %ctaid.x;
    setp.ne.u32 %p2, %r3, 0;
    @%p2 bra WRITE;
    {SPIN}
WRITE:
    st.global.u32 [%rd1], %r3;"""
    with pytest.raises(DeadlockError, match=r"blocks run one after the other"):
        run(body, grid=2, max_steps=500)


@pytest.mark.parametrize("given, error", [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_the_limit_is_a_number(given, error):
    with pytest.raises(error, match="max_steps must be"):
        numflash.run_ptx(AXPY, None, 1, 32, [None, None, 0.0, 0], max_steps=given)
