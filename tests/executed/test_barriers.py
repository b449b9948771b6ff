"""mbarriers, and clusters of one block; those of several are in `test_clusters`."""

import numpy as np
import pytest

from numflash.runtime.errors import UnsupportedError
from numflash.simulator import DeadlockError, SimulationError
from tests.executed.by_hand import run

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


@pytest.mark.parametrize("order", ["", "release.cta.", "release.cluster."])
def test_arrivals_are_counted(order):
    """One thread arrives for the others, too; what it is told of the phase nobody needs."""
    arrive = f"mbarrier.arrive.{order}shared::cta.b64 %rd5, [%r2], %r3;"
    body = """
    .shared .align 8 .b8 barrier[8];
    mov.u32 %r2, barrier;
    mov.u32 %r3, 5;
    setp.eq.u32 %p1, %r1, 0;
    @%p1 mbarrier.init.shared.b64 [%r2], COUNT;
    bar.sync 0;
    @%p1 ARRIVE
    AGAIN:
    mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 %p2, [%r2], 0;
    @!%p2 bra AGAIN;
    st.global.u32 [%rd3], %r3;""".replace("ARRIVE", arrive)
    assert (run(body.replace("COUNT", "5"), block=64) == 5).all()
    with pytest.raises(DeadlockError, match=r"lacks 1 of 6 arrivals"):
        run(body.replace("COUNT", "6"), block=64)
    with pytest.raises(SimulationError, match="5 arrivals at once, the phase lacks 4"):
        run(body.replace("COUNT", "4"), block=64)


# Clusters of one block


def test_what_lies_in_the_cluster_lies_in_the_block():
    body = """
    .shared .align 16 .b8 room[256];
    mov.u32 %r2, room;
    mapa.shared::cluster.u32 %r3, %r2, 0;
    shl.b32 %r4, %r1, 2;
    add.u32 %r3, %r3, %r4;
    st.shared::cluster.u32 [%r3], %r1;
    barrier.cluster.arrive.release.aligned;
    barrier.cluster.wait.acquire.aligned;
    cvt.u64.u32 %rd4, %r2;
    cvta.shared::cluster.u64 %rd5, %rd4;
    mov.u32 %r5, %cluster_ctarank;
    mapa.u64 %rd6, %rd5, %r5;
    xor.b32 %r4, %r4, 252;
    cvt.u64.u32 %rd7, %r4;
    add.s64 %rd6, %rd6, %rd7;
    ld.u32 %r6, [%rd6];
    getctarank.shared::cluster.u32 %r7, %r3;
    mov.u32 %r8, %cluster_nctarank;
    mad.lo.u32 %r6, %r7, 1000, %r6;
    mad.lo.u32 %r6, %r8, 100, %r6;
    mov.u32 %r9, %clusterid.x;
    mov.u32 %r10, %nclusterid.x;
    mad.lo.u32 %r6, %r9, 10000, %r6;
    mad.lo.u32 %r6, %r10, 100000, %r6;
    mov.u32 %r11, %ctaid.x;
    mul.wide.u32 %rd8, %r11, 256;
    add.s64 %rd3, %rd3, %rd8;
    st.global.u32 [%rd3], %r6;"""
    got = run(body, block=64, grid=3, x=np.zeros(192, np.uint32)).reshape(3, 64)
    for block in range(3):
        assert got[block].tolist() == [300100 + 10000 * block + 63 - i for i in range(64)]


ARRIVE, WAIT = "barrier.cluster.arrive;", "barrier.cluster.wait;"


@pytest.mark.parametrize(
    "body, error, message",
    [
        (WAIT, SimulationError, "line 13: .*wait without an arrive before"),
        (ARRIVE + ARRIVE, SimulationError, "line 13: .*arrive again without a wait between"),
        (
            f"setp.lt.u32 %p1, %r1, 32;\n @%p1 bra ON;\n{ARRIVE}\n{WAIT}\nON:\n bar.sync 1, 64;",
            DeadlockError,
            "line 16: barrier.cluster.wait\n    wait for the cluster: 32 of 64 threads came",
        ),
        ("mapa.shared::cluster.u32 %r2, %r3, 1;", SimulationError, "line 13: .*block of rank 1"),
        ("mapa.shared::cluster.u32 %r2, %r3;", ValueError, "line 13: .*2 operands; it takes 3"),
        ("mapa.shared::cta.u32 %r2, %r3, 0;", UnsupportedError, "line 13: .*not know mapa"),
        ("barrier.cluster.arrive.acquire;", UnsupportedError, "line 13: .*not know barrier.clu"),
        ("barrier.cluster.wait 1;", ValueError, "line 13: .*has 1 operands; it takes none"),
    ],
)
def test_what_is_wrong_with_a_cluster_names_its_line(body, error, message):
    with pytest.raises(error, match=message):
        run(body, block=64)
