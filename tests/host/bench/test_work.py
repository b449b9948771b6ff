"""Points and their work, against numbers worked out by hand."""

import pytest

from bench.points import points, work
from bench.points.points import Point
from bench.studies import schedule

CEILINGS = work.Ceilings(matmul_tflops=788.0, copy_gbps=4300.0, num_sms=132, sm_clock_mhz=1830.0)


def _point(direction="forward", dtype="float16", causal=False, **sizes):
    sizes = {"batch": 1, "seqlen_q": 16, "seqlen_k": 16, "num_heads_q": 1, **sizes}
    sizes.setdefault("num_heads_kv", sizes["num_heads_q"])
    sizes.setdefault("head_dim", 8)
    return Point(direction=direction, kind="grid", dtype=dtype, causal=causal, **sizes)


def test_the_grid_is_the_papers():
    grid = points.grid("forward")
    assert len(grid) == len(set(grid)) == 6 * 3 * 2 * 2
    for point in grid:
        assert point.batch * point.seqlen_q == 16384
        assert point.num_heads_q * point.head_dim == 2048
    sizes = {(p.batch, p.seqlen_q) for p in grid}
    assert sizes == {(32, 512), (16, 1024), (8, 2048), (4, 4096), (2, 8192), (1, 16384)}


def test_what_a_short_visit_needs_comes_first():
    plan = points.plan("forward", quick=False)
    quick = points.plan("forward", quick=True)
    # 2 head dims, 2 masks, 3 seqlens; GPT-2 and two decode points.
    assert len(quick) == 12 + 3
    assert plan[:12] == quick[:12]
    assert {p.kind for p in plan[12:15]} == {"gpt2-medium", "decode"}
    assert {p.dtype for p in quick[:12]} == {"bfloat16"}
    assert "decode" not in {p.kind for p in points.plan("backward", quick=False)}


def test_a_plan_keeps_what_is_asked_for():
    plan = points.plan("backward", False, seqlens=[512], head_dims=[256], dtypes=["float16"])
    grid = [p for p in plan if p.kind == "grid"]
    assert [(p.seqlen_q, p.head_dim, p.dtype, p.causal) for p in grid] == [
        (512, 256, "float16", False),
        (512, 256, "float16", True),
    ]


def test_a_point_survives_json():
    point = points.decode()[1]
    assert Point.from_dict({**point.as_dict(), "methods": {}}) == point
    assert str(point) == "forward bfloat16 b1 s1x65536 h32/8 d128"


@pytest.mark.parametrize("change", [{"direction": "sideways"}, {"num_heads_kv": 3}])
def test_an_impossible_point_is_refused(change):
    with pytest.raises(ValueError, match=r"direction|num_heads_kv"):
        Point(**{**points.gpt2_medium("forward").as_dict(), **change})


def test_flops_by_hand():
    # 4 b h s^2 d: 16384 tokens in all and hidden 2048 give 1.342e8 x seqlen for every head_dim.
    for point in points.grid("forward"):
        expected = 4 * 16384 * 2048 * point.seqlen_q / (2 if point.causal else 1)
        assert work.flops(point) == expected
        backward = Point(**{**point.as_dict(), "direction": "backward"})
        assert work.flops(backward) == 2.5 * expected
    # One query that sees all of 65,536 keys.
    assert work.flops(points.decode()[0]) == 4 * 16 * 65536 * 128


def test_a_causal_mask_that_is_not_square():
    # 4 queries, 16 keys: (max(0, 16 - 4) + 16) / 2 = 14 keys on average.
    assert work.average_keys(_point(causal=True, seqlen_q=4)) == 14
    assert work.average_keys(_point(causal=True, seqlen_q=16, seqlen_k=4)) == 2


def test_bytes_by_hand():
    point = _point(batch=2, seqlen_q=3, seqlen_k=5, num_heads_q=4, num_heads_kv=2, head_dim=8)
    q, kv, lse = 2 * 3 * 4 * 8 * 2, 2 * 5 * 2 * 8 * 2, 2 * 4 * 3 * 4
    assert work.min_bytes(point) == q + 2 * kv + q + lse
    backward = Point(**{**point.as_dict(), "direction": "backward"})
    # Q, O, dO, dQ and K, V, dK, dV.
    assert work.min_bytes(backward) == 4 * q + 4 * kv + lse


def test_the_floor_is_the_slowest_resource():
    # KERNELS.md 5: 2199 GFLOP at 788 TFLOP/s are 2.791 ms; exponentials at d64 2.223 ms.
    slow = next(
        p for p in points.grid("forward")
        if (p.seqlen_q, p.head_dim, p.causal) == (16384, 64, False)
    )  # fmt: skip
    floor = work.floor_ms(slow, CEILINGS)
    assert floor["matmul"] == pytest.approx(2.791, abs=1e-3)
    assert floor["exponentials"] == pytest.approx(2.223, abs=1e-3)
    assert floor["bytes"] == pytest.approx(0.063, abs=1e-3)
    assert floor["floor"] == floor["matmul"]
    decode = work.floor_ms(points.decode()[0], CEILINGS)
    assert decode["floor"] == decode["bytes"] == pytest.approx(0.1249, abs=1e-4)
    unknown = work.Ceilings(788.0, 4300.0, 132, None)
    assert "exponentials" not in work.floor_ms(slow, unknown)


def test_rates():
    point = points.decode()[0]
    assert work.tflops(point, 2.0) == pytest.approx(work.flops(point) / 2e9)
    assert work.gbps(point, 2.0) == pytest.approx(work.min_bytes(point) / 2e6)


def test_forward_traffic_by_hand():
    # 2 heads of 5 rows and 7 keys, tiles 4 x 4: blocks of 4 and 1 rows, two tiles of keys each.
    point = _point(seqlen_q=5, seqlen_k=7, num_heads_q=2)
    traffic = schedule.forward(point, 4, 4)
    row = 8 * 2
    assert traffic.flops == 2 * (2 * 2) * 2 * (2 * 4 * 4 * 8)
    assert traffic.read_bytes == 2 * ((4 + 1) * row + 2 * (2 * 7 * row))
    assert traffic.written_bytes == 2 * 5 * (row + 4)


def test_a_causal_forward_does_not_visit_what_it_masks():
    # 8 x 8, tiles 4 x 4: the first block sees one tile, the second two.
    traffic = schedule.forward(_point(seqlen_q=8, seqlen_k=8, causal=True), 4, 4)
    assert traffic.flops == 3 * 2 * (2 * 4 * 4 * 8)
    assert traffic.read_bytes == 8 * 16 + 2 * (4 + 8) * 16


def test_a_split_forward_also_moves_its_parts():
    point = _point(seqlen_q=1, seqlen_k=64)
    whole, split = schedule.forward(point, 4, 8), schedule.forward(point, 4, 8, num_splits=4)
    parts = 4 * (8 + 1) * 4
    assert split.read_bytes == whole.read_bytes + 3 * 16 + parts
    assert split.written_bytes == whole.written_bytes + parts
    assert split.flops == whole.flops


def test_backward_traffic_by_hand():
    point = _point("backward", seqlen_q=8, seqlen_k=8, causal=True)
    row, product = 16, 2 * 4 * 4 * 8
    dq = schedule.backward_dq(point, 4, 4)
    assert dq.flops == 3 * 3 * product
    # Q and dO of 8 rows, K and V of 4 + 8 keys, lse and delta.
    assert dq.read_bytes == 2 * 8 * row + 2 * 12 * row + 2 * 8 * 4
    assert dq.written_bytes == 8 * row
    dkdv = schedule.backward_dkdv(point, 4, 4)
    # The first keys are seen by both blocks of rows, the last by the second alone.
    assert dkdv.flops == 4 * 3 * product
    assert dkdv.read_bytes == 2 * 8 * row + 2 * 12 * row + 2 * 12 * 4
    assert dkdv.written_bytes == 2 * 8 * row
    assert schedule.delta(point).read_bytes == 2 * 8 * row


def test_grouped_heads_share_their_keys():
    point = _point("backward", seqlen_q=8, seqlen_k=8, num_heads_q=4, num_heads_kv=2)
    one = _point("backward", seqlen_q=8, seqlen_k=8)
    grouped, single = schedule.backward_dkdv(point, 4, 4), schedule.backward_dkdv(one, 4, 4)
    assert grouped.flops == 4 * single.flops
    assert grouped.written_bytes == 2 * single.written_bytes


def test_no_count_is_below_the_minimum():
    for direction, kernels in (
        ("forward", (schedule.forward,)),
        ("backward", (schedule.backward_dq, schedule.backward_dkdv)),
    ):
        for point in points.grid(direction):
            done = schedule.Traffic()
            for kernel in kernels:
                done += kernel(point, 128, 64)
            assert done.total_bytes >= work.min_bytes(point)
            assert done.flops >= work.flops(point)


def test_standard_attention_by_hand():
    point = _point(seqlen_q=4, seqlen_k=4)
    matrix, tensor = 4 * 4 * 2, 4 * 8 * 2
    forward = schedule.standard(point)
    assert forward.flops == 4 * 4 * 4 * 8
    assert forward.total_bytes == 4 * matrix + 4 * tensor
    assert schedule.standard(_point(seqlen_q=4, seqlen_k=4, causal=True)) == forward
    backward = schedule.standard(_point("backward", seqlen_q=4, seqlen_k=4))
    assert backward.flops == 2 * forward.flops
    assert backward.total_bytes == 7 * matrix + 10 * tensor


def test_gpt2_medium_has_the_papers_counts():
    both = [schedule.standard(points.gpt2_medium(d)) for d in points.DIRECTIONS]
    # KERNELS.md 1.1: 12 b h n^2 d = 825 GFLOP; one matrix is 2.147 GB.
    assert sum(t.flops for t in both) / 1e9 == pytest.approx(824.6, abs=0.1)
    passes = (sum(t.total_bytes for t in both) - 14 * 64 * 1024 * 1024 * 2) / 2.147483648e9
    assert passes == pytest.approx(11)


def test_memory_is_linear_and_standard_is_not():
    short, long = (
        next(p for p in points.grid("forward") if p.seqlen_q == seqlen) for seqlen in (512, 16384)
    )
    assert schedule.memory_bytes(short) == schedule.memory_bytes(long)
    results = 16384 * 2048 * 2
    assert schedule.standard_memory_bytes(long) == results + 32 * 16384**2 * 2
    point = _point("backward", seqlen_q=4, seqlen_k=6)
    assert schedule.memory_bytes(point) == (4 + 2 * 6) * 8 * 2 + 4 * 4
    assert schedule.standard_memory_bytes(point) == (4 + 2 * 6) * 8 * 2 + 2 * 4 * 6 * 2
    assert schedule.memory_bytes(_point(seqlen_q=1), 8) == 1 * 8 * 2 + 4 + 8 * 9 * 4
