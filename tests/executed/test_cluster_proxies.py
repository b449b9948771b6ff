"""What another block of the cluster has stored is unseen by copies and products until a fence.

The fence is the reader's: one of the block that stored is not in the thread block of the access
(`numflash.simulator.proxies`). PTX written by hand, in many orders of warps.
"""

import numpy as np
import pytest

from numflash.simulator import SimulationError
from tests.executed.by_hand import run
from tests.executed.test_clusters import MEET, PLACE

SEEDS = range(8)
UNSEEN = "touches what another block of the cluster stored"
FENCES = (
    "fence.proxy.async;",
    "fence.proxy.async.shared::cta;",
    "fence.proxy.async.shared::cluster;",
)
# What each thread does to its word of the next block's `room`, at r2 here.
STORES = {
    "a store": """
    mapa.shared::cluster.u32 %r6, %r2, %r12;
    st.shared::cluster.u32 [%r6], %r4;""",
    "a generic store": """
    cvt.u64.u32 %rd4, %r2;
    cvta.shared.u64 %rd4, %rd4;
    mapa.u64 %rd6, %rd4, %r12;
    st.u32 [%rd6], %r4;""",
    "an atomic": """
    mapa.shared::cluster.u32 %r6, %r2, %r12;
    atom.relaxed.cluster.shared::cluster.exch.b32 %r7, [%r6], %r4;""",
}
# Blocks of even rank give, those of odd rank are given; there is room for what a warpgroup stores.
GIVING, GIVEN = "%p2", "%p3"
ROOM = f""".shared .align 1024 .b8 room[8192];
    {PLACE}
    mov.u32 %r3, room;
    shl.b32 %r2, %r1, 2;
    add.u32 %r2, %r2, %r3;
    mad.lo.u32 %r4, %r14, 100, %r1;
    and.b32 %r5, %r14, 1;
    setp.eq.u32 {GIVING}, %r5, 0;
    setp.ne.u32 {GIVEN}, %r5, 0;
    {MEET}
"""
COPY = f"""
    setp.eq.u32 %p1, %r1, 0;
    and.pred %p1, %p1, {GIVEN};
    mul.wide.u32 %rd5, %r15, 128;
    add.s64 %rd5, %rd1, %rd5;
    @%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd5], [%r3], 128;
    @%p1 cp.async.bulk.commit_group;
    @%p1 cp.async.bulk.wait_group 0;"""


def given(store: str, giver: str, early: str, reader: str, then: str) -> str:
    """A body: givers store and execute `giver`; the given `early`, a cluster barrier, `reader`."""
    return f"""{ROOM}
    @{GIVEN} bra EARLY;
    {store} {giver}
    bra TOGETHER;
EARLY: {early}
TOGETHER: {MEET}
    @{GIVING} bra OVER;
    {reader} {then}
OVER: {MEET}"""


def copied(store, giver="", early="", reader="", seed=0, size=2):
    """What copies of the given blocks write."""
    body = given(STORES[store], giver, early, reader, COPY)
    return run(body, x=np.zeros((size, 32), np.uint32), grid=size, cluster=size, seed=seed)


@pytest.mark.parametrize("fence", FENCES)
@pytest.mark.parametrize("store", STORES)
def test_a_copy_sees_what_another_block_stored_after_a_fence(store, fence):
    for size in (2, 4):
        expected = np.zeros((size, 32), np.uint32)
        expected[1::2] = 100 * np.arange(0, size, 2)[:, None] + np.arange(32)
        for seed in SEEDS:
            assert (copied(store, reader=fence, seed=seed, size=size) == expected).all()


@pytest.mark.parametrize("fence", ["", *FENCES])
@pytest.mark.parametrize("store", STORES)
def test_a_copy_without_a_fence_of_its_own_is_refused(store, fence):
    """In every order, whether or not who stored has fenced."""
    for seed in SEEDS:
        with pytest.raises(SimulationError, match=UNSEEN):
            copied(store, giver=fence, seed=seed)


def test_a_fence_of_global_memory_is_none_of_shared_memory():
    with pytest.raises(SimulationError, match=UNSEEN):
        copied("a store", reader="fence.proxy.async.global;")


def test_a_fence_before_the_barrier_is_found_by_some_order():
    """Where the other block stores after it."""
    found = set()
    for seed in range(40):
        try:
            copied("a store", early=FENCES[0], seed=seed)
            found.add("nothing")
        except SimulationError as error:
            assert UNSEEN in str(error)
            found.add("refused")
    assert found == {"nothing", "refused"}


def test_a_word_that_its_own_block_stores_over_is_its_own_again():
    """Who stored last may fence before the block's barrier, as for any of its words."""
    over = f"st.shared.u32 [%r2], %r1; {FENCES[1]} bar.warp.sync -1;"
    for seed in SEEDS:
        x = copied("a store", reader=over, seed=seed)
        assert (x[1] == np.arange(32)).all()
    with pytest.raises(SimulationError, match="touches what thread 0 stored"):
        copied("a store", reader=over.replace(FENCES[1], ""))


# Products

# A is the first 2 KiB of the room, which the other block fills with ones, and so is B.
PRODUCT = f"""
    shr.u32 %r7, %r3, 4;
    cvt.u64.u32 %rd4, %r7;
    or.b64 %rd5, %rd4, {1 << 16 | 64 << 32 | 1 << 62};
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%f1, %f2, %f3, %f4}}, %rd5, %rd5, 0, \
1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    mul.wide.u32 %rd6, %r15, 512;
    add.s64 %rd6, %rd3, %rd6;
    st.global.f32 [%rd6], %f4;"""


def multiplied(giver="", reader="", seed=0):
    """The last sum of each thread of the block that is given two tiles, and multiplies them."""
    store = "mapa.shared::cluster.u32 %r6, %r2, %r12; mov.b32 %r4, 0x3c003c00;"
    store += " ".join(f"st.shared::cluster.u32 [%r6+{512 * i}], %r4;" for i in range(16))
    body = given(store, giver, "", reader, PRODUCT)
    return run(body, x=np.zeros((2, 128), np.float32), grid=2, block=128, cluster=2, seed=seed)[1]


@pytest.mark.parametrize("fence", FENCES)
def test_a_product_sees_what_another_block_stored_after_a_fence(fence):
    for seed in SEEDS:
        assert (multiplied(reader=fence, seed=seed) == 16).all()


@pytest.mark.parametrize("fence", ["", *FENCES])
def test_a_product_without_a_fence_of_its_own_is_refused(fence):
    for seed in SEEDS:
        with pytest.raises(SimulationError, match=UNSEEN):
            multiplied(giver=fence, seed=seed)


def test_a_fence_of_some_readers_is_not_one_of_all():
    with pytest.raises(SimulationError, match=UNSEEN):
        multiplied(reader=f"setp.eq.u32 %p1, %r1, 0; @%p1 {FENCES[1]}")


# Copies under way


def test_a_store_to_where_a_copy_is_under_way():
    body = f"""{ROOM}
    .shared .align 8 .b8 barrier[8];
    setp.eq.u32 %p1, %r1, 0;
    mov.u32 %r5, barrier;
    @%p1 mbarrier.init.shared::cta.b64 [%r5], 1;
    @%p1 fence.mbarrier_init.release.cluster;
    bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], 128;
    @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd1], 128, \
[%r5];
    {MEET} {STORES["a store"]} {MEET}
WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p4, [%r5], 0;
    @!%p4 bra WAIT;"""
    for seed in SEEDS:
        with pytest.raises(SimulationError, match=r"a thread of another block stored to .* while"):
            run(body, grid=2, cluster=2, seed=seed)
