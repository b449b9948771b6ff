"""Clusters of several blocks: PTX written by hand, in many orders of warps."""

import re

import numpy as np
import pytest

from numflash.runtime.errors import UnsupportedError
from numflash.simulator import DeadlockError, SimulationError
from tests.executed.by_hand import module, run
from tests.support.covering import some, thorough

SEEDS = range(12)
SIZES = (2, 4)
MEET = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
# The block's place in a grid of one dimension, its rank, and the rank after it.
PLACE = """
    mov.u32 %r15, %ctaid.x;
    mov.u32 %r14, %cluster_ctarank;
    mov.u32 %r13, %cluster_nctarank;
    add.u32 %r12, %r14, 1;
    rem.u32 %r12, %r12, %r13;"""


def test_special_registers():
    names = [
        *(f"{name}.{axis}" for name in ("clusterid", "nclusterid") for axis in "xyz"),
        *(f"{name}.{axis}" for name in ("cluster_ctaid", "cluster_nctaid") for axis in "xyz"),
        *("cluster_ctarank", "cluster_nctarank", "ctaid.x", "ctaid.y", "ctaid.z"),
    ]
    body = """
    mov.u32 %r2, %ctaid.z; mov.u32 %r3, %nctaid.y; mov.u32 %r4, %ctaid.y;
    mad.lo.u32 %r2, %r2, %r3, %r4;
    mov.u32 %r3, %nctaid.x; mov.u32 %r4, %ctaid.x;
    mad.lo.u32 %r2, %r2, %r3, %r4;
    mul.wide.u32 %rd4, %r2, 128;
    add.s64 %rd3, %rd1, %rd4;"""
    for i, name in enumerate(names):
        body += f"mov.u32 %r5, %{name}; st.global.u32 [%rd3+{4 * i}], %r5;\n"
    grid, cluster = np.array([4, 6, 2]), np.array([2, 3, 1])
    x = np.zeros((2, 6, 4, 32), np.uint32)
    run(body, x=x, grid=grid.tolist(), cluster="2, 3, 1")
    for z, y, x_ in np.ndindex(2, 6, 4):
        position = np.array([x_, y, z])
        within = position % cluster
        expected = [
            *(position // cluster),
            *(grid // cluster),
            *within,
            *cluster,
            *(within[0] + 2 * within[1], 6),
            *position,
        ]
        assert x[z, y, x_, : len(names)].tolist() == expected


# Each other's shared memory

ROOM = f""".shared .align 16 .b8 room[128];
    {PLACE}
    mov.u32 %r2, room;
    shl.b32 %r3, %r1, 2;
    add.u32 %r2, %r2, %r3;
    cvt.u64.u32 %rd4, %r2;
    cvta.shared.u64 %rd4, %rd4;
    mul.wide.u32 %rd5, %r15, 128;
    add.s64 %rd3, %rd3, %rd5;
    mad.lo.u32 %r4, %r14, 100, %r1;
    """
BACK = """
    ld.shared.u32 %r5, [%r2];
    st.global.u32 [%rd3], %r5;"""


def exchanged(body: str, size: int, seed: int, num_clusters: int = 2) -> np.ndarray:
    """What every thread of every block has at last, (clusters, blocks, threads)."""
    x = np.zeros((num_clusters, size, 32), np.uint32)
    return run(ROOM + body, x=x, grid=num_clusters * size, cluster=size, seed=seed)


WAYS = {
    "a store": f"""{MEET}
    mapa.shared::cluster.u32 %r6, %r2, %r12;
    st.shared::cluster.u32 [%r6], %r4;
    {MEET} {BACK}""",
    "a generic store": f"""{MEET}
    mapa.u64 %rd6, %rd4, %r12;
    st.u32 [%rd6], %r4;
    {MEET} {BACK}""",
    "a load": f"""
    st.shared.u32 [%r2], %r4;
    {MEET}
    add.u32 %r7, %r14, %r13;
    sub.u32 %r7, %r7, 1;
    rem.u32 %r7, %r7, %r13;
    mapa.shared::cluster.u32 %r6, %r2, %r7;
    ld.shared::cluster.u32 %r5, [%r6];
    st.global.u32 [%rd3], %r5;
    {MEET}""",
    # Of an address that is mapped already, and given on.
    "an address": f"""
    mapa.u64 %rd6, %rd4, 0;
    mapa.u64 %rd6, %rd6, %r12;
    cvta.to.shared::cluster.u64 %rd6, %rd6;
    cvt.u32.u64 %r6, %rd6;
    {MEET}
    st.shared::cluster.u32 [%r6], %r4;
    {MEET} {BACK}""",
    "an atomic": f"""
    mov.u32 %r5, 1;
    st.shared.u32 [%r2], %r5;
    {MEET}
    mapa.shared::cluster.u32 %r6, %r2, %r12;
    sub.u32 %r5, %r4, 1;
    red.relaxed.cluster.shared::cluster.add.u32 [%r6], %r5;
    {MEET} {BACK}""",
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", WAYS)
def test_what_a_block_gives_the_next(way, size):
    expected = np.roll(100 * np.arange(size)[:, None] + np.arange(32), 1, 0)
    for seed in SEEDS:
        assert (exchanged(WAYS[way], size, seed) == expected).all()


def test_whose_an_address_is():
    """That of a block's own variable has its rank, too."""
    body = """
    mapa.shared::cluster.u32 %r6, %r2, %r12;
    mapa.u64 %rd6, %rd4, %r12;
    getctarank.shared::cluster.u32 %r4, %r2;
    getctarank.u64 %r5, %rd4;
    getctarank.shared::cluster.u32 %r7, %r6;
    getctarank.u64 %r8, %rd6;
    mad.lo.u32 %r4, %r4, 10, %r5;
    mad.lo.u32 %r4, %r4, 10, %r7;
    mad.lo.u32 %r4, %r4, 10, %r8;
    st.global.u32 [%rd3], %r4;"""
    found = exchanged(body, 4, 0)
    assert (found == np.array([11, 1122, 2233, 3300])[:, None]).all()


@pytest.mark.parametrize("way", ["a store", "a load", "an atomic"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_missing_cluster_barrier_is_seen(way, number):
    parts = WAYS[way].split(MEET)
    body = MEET.join(parts[: number + 1]) + MEET.join(parts[number + 1 :])
    assert_seen(
        lambda seed: exchanged(body, 2, seed),
        exchanged(WAYS[way], 2, 0),
        "has not begun yet|has ended",
    )


def assert_seen(execute, expected, message: str = "") -> None:
    """In one of the orders it is refused, with this message, or gives something else."""
    for seed in range(40):
        try:
            if (execute(seed) != expected).any():
                return
        except (RuntimeError, IndexError, ValueError) as error:
            assert re.search(message, str(error)), error
            return
    pytest.fail("nobody has seen it")


# Through global memory, with blocks of other clusters running

TALK = f"""{PLACE}
    mad.lo.u32 %r4, %r15, 100, %r1;
    mul.wide.u32 %rd4, %r15, 128;
    add.s64 %rd5, %rd3, %rd4;
    st.global.u32 [%rd5], %r4;
    {MEET}
    sub.u32 %r5, %r15, %r14;
    add.u32 %r5, %r5, %r12;
    mul.wide.u32 %rd6, %r5, 128;
    add.s64 %rd6, %rd3, %rd6;
    ld.global.u32 %r6, [%rd6];
    mov.u32 %r7, 0;
    setp.ge.u32 %p1, %r15, 2;
    @%p1 bra LATER;
    setp.eq.u32 %p2, %r15, 1;
    setp.eq.u32 %p3, %r1, 0;
    and.pred %p2, %p2, %p3;
    mov.u32 %r8, 1;
    @%p2 st.release.gpu.global.u32 [%rd1+1024], %r8;
    bra OVER;
LATER:
    ld.acquire.gpu.global.u32 %r8, [%rd1+1024];
    setp.eq.u32 %p2, %r8, 0;
    @%p2 bra LATER;
    ld.global.u32 %r7, [%rd3];
OVER:
    add.u32 %r6, %r6, %r7;
    st.global.u32 [%rd5+512], %r6;"""


def told(body: str, seed: int) -> np.ndarray:
    x = np.zeros(257, np.uint32)
    return run(body, x=x, grid=4, cluster=2, seed=seed)[128:256].reshape(4, 32)


def test_a_block_releases_what_its_cluster_has_done():
    lanes = np.arange(32)
    expected = np.stack([100 + lanes, lanes, 300 + 2 * lanes, 200 + 2 * lanes])
    for seed in SEEDS:
        assert (told(TALK, seed) == expected).all()
    without = TALK.replace(MEET, "")
    assert_seen(lambda seed: told(without, seed), expected, "has not acquired a release")


# A ring of stages, each fetched in parts by all blocks for all

STAGES, TILES, TILE_BYTES = 2, 6, 512


def ring(size: int) -> str:
    """Warp 0 fetches tiles of x, of which warp 1 writes the words, behind x, by blocks.

    r2 is the buffers, r3 and r4 the mbarriers of full and of empty ones; r5 counts tiles, r6 is
    the stage and r7 the parity of its next phase.
    """
    part = TILE_BYTES // size
    release = "\n".join(
        f"mapa.shared::cluster.u32 %r11, %r10, {rank};\n"
        "    @%p1 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r11];"
        for rank in range(size)
    )
    return f"""
    .shared .align 128 .b8 buffers[{STAGES * TILE_BYTES}];
    .shared .align 8 .b8 full[{8 * STAGES}];
    .shared .align 8 .b8 empty[{8 * STAGES}];
    {PLACE}
    mov.u32 %r2, buffers; mov.u32 %r3, full; mov.u32 %r4, empty;
    setp.eq.u32 %p2, %r1, 0;
    and.b32 %r5, %r1, 31;
    setp.eq.u32 %p1, %r5, 0;
    {" ".join(f"@%p2 mbarrier.init.shared::cta.b64 [%r3+{8 * i}], 1;" for i in range(STAGES))}
    {" ".join(f"@%p2 mbarrier.init.shared::cta.b64 [%r4+{8 * i}], {size};" for i in range(STAGES))}
    @%p2 fence.mbarrier_init.release.cluster;
    {MEET}
    mov.u32 %r5, 0; mov.u32 %r6, 0; mov.u32 %r7, 0;
    setp.ge.u32 %p3, %r1, 32;
    @%p3 bra CONSUMER;
PRODUCER:
    shl.b32 %r8, %r6, 3;
    add.u32 %r9, %r4, %r8;
    xor.b32 %r10, %r7, 1;
FREE:
    mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p4, [%r9], %r10;
    @!%p4 bra FREE;
    add.u32 %r9, %r3, %r8;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], {TILE_BYTES};
    mul.lo.u32 %r10, %r14, {part};
    mad.lo.u32 %r11, %r5, {TILE_BYTES}, %r10;
    cvt.u64.u32 %rd4, %r11;
    add.s64 %rd4, %rd1, %rd4;
    mad.lo.u32 %r10, %r6, {TILE_BYTES}, %r10;
    add.u32 %r10, %r10, %r2;
    mov.b16 %h1, {(1 << size) - 1};
    @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster \
[%r10], [%rd4], {part}, [%r9], %h1;
    add.u32 %r5, %r5, 1; add.u32 %r6, %r6, 1;
    setp.eq.u32 %p4, %r6, {STAGES};
    @%p4 xor.b32 %r7, %r7, 1;
    @%p4 mov.u32 %r6, 0;
    setp.lt.u32 %p4, %r5, {TILES};
    @%p4 bra PRODUCER;
    bra OVER;
CONSUMER:
    shl.b32 %r8, %r6, 3;
    add.u32 %r9, %r3, %r8;
FILLED:
    mbarrier.try_wait.parity.shared::cta.b64 %p4, [%r9], %r7;
    @!%p4 bra FILLED;
    and.b32 %r10, %r1, 31;
    shl.b32 %r10, %r10, 4;
    mad.lo.u32 %r11, %r6, {TILE_BYTES}, %r10;
    add.u32 %r11, %r11, %r2;
    ld.shared.v4.b32 {{%f1, %f2, %f3, %f4}}, [%r11];
    add.u32 %r11, %r15, 1;
    mad.lo.u32 %r11, %r11, {TILES}, %r5;
    mad.lo.u32 %r11, %r11, {TILE_BYTES}, %r10;
    cvt.u64.u32 %rd4, %r11;
    add.s64 %rd4, %rd1, %rd4;
    st.global.v4.b32 [%rd4], {{%f1, %f2, %f3, %f4}};
    bar.warp.sync -1;
    add.u32 %r10, %r4, %r8;
    {release}
    add.u32 %r5, %r5, 1; add.u32 %r6, %r6, 1;
    setp.eq.u32 %p4, %r6, {STAGES};
    @%p4 xor.b32 %r7, %r7, 1;
    @%p4 mov.u32 %r6, 0;
    setp.lt.u32 %p4, %r5, {TILES};
    @%p4 bra CONSUMER;
OVER:
    {MEET}"""


def tiles(body: str, size: int, seed: int) -> np.ndarray:
    """The tiles as each block of two clusters has seen them."""
    x = np.zeros((1 + 2 * size, TILES * TILE_BYTES // 4), np.uint32)
    x[0] = np.arange(x.shape[1])
    run(body, x=x, grid=2 * size, block=64, cluster=size, seed=seed)
    return x[1:]


@thorough
@pytest.mark.parametrize("size", SIZES)
def test_a_ring_of_stages(size):
    expected = np.arange(TILES * TILE_BYTES // 4)
    for seed in range(40 // size):
        assert (tiles(ring(size), size, seed) == expected).all()


OWN_ONLY = r"mapa\.shared::cluster\.u32 %r11, %r10, [1-9];\n.*?;"
FAULTS = {
    # Pattern, what is in its place, and what is said of it; "" where results differ, or any.
    "buffers are free when the own block has read them": (
        rf"({OWN_ONLY})|(\[%r4\+\d+\]), 2",
        lambda m: f"{m[2]}, 1" if m[2] else "",
        "",
    ),
    "buffers are freed twice in the own block": (
        r"(mapa\.shared::cluster\.u32 %r11, %r10, )1",
        r"\g<1>%r14",
        "one arrival more|deadlock",
    ),
    "buffers are not freed in the other block": (OWN_ONLY, "", "deadlock"),
    "buffers are never waited for": (r"@!%p4 bra FREE;", "", "under way|one arrival more"),
    "the first cluster barrier": (re.escape(MEET), "", "made it one|without a fence"),
    "the last cluster barrier": (re.escape(MEET) + "$", "", "has ended"),
    "the fence": (r"@%p2 fence[^;]*;", "", "without a fence_mbarrier_init"),
    "bytes go to the own block only": (
        r"mov\.b16 %h1, 3;",
        "mov.b16 %h1, 1; cvt.u16.u32 %h2, %r14; shl.b16 %h1, %h1, %r14;",
        "deadlock",
    ),
    "bytes go to the other block only": (
        r"mov\.b16 %h1, 3;",
        "mov.b16 %h1, 2; shr.u16 %h1, %h1, %r14;",
        "deadlock",
    ),
    "the same half": (r"mul\.lo\.u32 %r10, %r14", "mul.lo.u32 %r10, 0", "under way"),
    "half of the bytes are expected": (rf"(\[%r9\]), {TILE_BYTES};", r"\1, 256;", ""),
}


@pytest.mark.parametrize(
    "fault", some(FAULTS, "buffers are free when the own block has read them")
)
def test_a_fault_of_the_ring_is_seen(fault):
    pattern, other, message = FAULTS[fault]
    body = re.sub(pattern, other, ring(2), count=0 if "free " in fault else 1)
    assert body != ring(2)
    assert_seen(lambda seed: tiles(body, 2, seed), np.arange(TILES * TILE_BYTES // 4), message)


# The barrier


def test_the_barrier_is_for_those_that_have_not_returned():
    """Also for who arrives and returns: others are waited for all the same."""
    body = f"""{PLACE}
    shr.u32 %r2, %r1, 5;
    mad.lo.u32 %r2, %r14, 2, %r2;
    mul.wide.u32 %rd4, %r15, 256;
    add.s64 %rd3, %rd3, %rd4;
    setp.eq.u32 %p1, %r2, 1;
    @%p1 barrier.cluster.arrive;
    setp.lt.u32 %p2, %r2, 2;
    @%p2 ret;
    setp.eq.u32 %p3, %r2, 2;
    mov.u32 %r4, 7;
    @%p3 st.global.u32 [%rd3], %r4;
    {MEET}
    ld.global.u32 %r5, [%rd3-128];
    @!%p3 st.global.u32 [%rd3], %r5;"""
    for seed in range(30):
        x = run(body, x=np.zeros((4, 32), np.uint32), grid=2, block=64, cluster=2, seed=seed)
        assert (x == np.array([0, 0, 7, 7])[:, None]).all()


# What is wrong

BARRIER = f""".shared .align 16 .b8 room[64];
    .shared .align 8 .b8 barrier[8];
    {PLACE}
    mov.u32 %r2, barrier; mov.u32 %r3, room;
    setp.eq.u32 %p1, %r1, 0; setp.eq.u32 %p2, %r14, 0; and.pred %p3, %p1, %p2;
    @%p1 mbarrier.init.shared::cta.b64 [%r2], 1;
    @%p1 fence.mbarrier_init.release.cluster;
    {MEET}
    mapa.shared::cluster.u32 %r4, %r2, %r12;
    mov.b16 %h1, 2;
"""
LOAD = (
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r3], "
    "[%rd1], 16, [%r2], "
)


@pytest.mark.parametrize(
    "statement, error, message",
    [
        (
            "mapa.shared::cluster.u32 %r4, %r2, 2;",
            SimulationError,
            "mapa to the block of rank 2: the ranks of the cluster are 0 to 1",
        ),
        ("mapa.u64 %rd4, %rd1, 1;", IndexError, "is no address in shared memory"),
        ("mapa.shared::cta.u32 %r2, %r3, 0;", UnsupportedError, "does not know mapa"),
        ("getctarank.u64 %r4, %rd1;", IndexError, "is no address in shared memory"),
        (
            "@%p3 mbarrier.arrive.shared::cluster.b64 _, [%r4+33554432];",
            SimulationError,
            r"to the block of rank 3: the cluster of block \(0, 0, 0\) has ranks up to 1",
        ),
        (f"@%p3 {LOAD} 0;", SimulationError, "to no block: its mask is 0"),
        (
            f"@%p3 {LOAD} 6;",
            SimulationError,
            r"to the block of rank 2: the cluster of block \(0, 0, 0\) has ranks up to 1",
        ),
        ("ld.shared.u32 %r5, [%r4];", IndexError, "lie outside every array: shared memory"),
        ("ld.shared::cluster.u32 %r5, [%r4+4096];", IndexError, "lie outside every array"),
        ("ld.shared::cluster.u32 %r5, [%r4+33554432];", IndexError, "lie outside every array"),
        (
            "mbarrier.try_wait.parity.shared::cta.b64 %p4, [%r4], 0;",
            IndexError,
            "shared address .* lies outside the block's shared memory",
        ),
        (
            "mbarrier.arrive.shared::cta.b64 _, [%r4];",
            IndexError,
            "shared address .* lies outside the block's shared memory",
        ),
        (
            "mbarrier.arrive.shared::cluster.b64 %rd4, [%r4];",
            UnsupportedError,
            "tells nothing of the phase: it wants _",
        ),
        (
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r4], [%rd1], 16, "
            "[%r4];",
            IndexError,
            "lies outside the block's shared memory",
        ),
    ],
)
def test_what_is_wrong_names_its_line(statement, error, message):
    assert_wrong(f"{statement} //!\n{MEET}", error, message)


@pytest.mark.parametrize(
    "statement",
    [
        "@%p1 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r4];",
        "st.shared::cluster.u32 [%r4], %r1;",
        f"@%p1 {LOAD} %h1;",
    ],
)
def test_a_block_that_has_ended_is_out_of_reach(statement):
    """It does not count for the barrier, and what comes after it finds no memory."""
    body = f"@!%p2 ret;\n {MEET}\n {statement} //!"
    assert_wrong(body, SimulationError, r"block \(1, 0, 0\) of its cluster has ended")


def test_threads_that_never_come():
    body = f"@%p2 bra THERE;\n{MEET.replace(' ', chr(10), 1)} //!\nret;\nTHERE: bar.sync 1, 64;"
    assert_wrong(body, DeadlockError, "wait for the cluster: 32 of 64 threads came")


def assert_wrong(body: str, error: type, message: str) -> None:
    """In every order: an error that names the line that ends with //!."""
    before, _, _ = module(BARRIER + body).partition("//!")
    line = before.count("\n") + 1
    for seed in range(6):
        with pytest.raises(error, match=rf"line {line}: [\s\S]*{message}"):
            run(BARRIER + body, grid=2, cluster=2, seed=seed)
