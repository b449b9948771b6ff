"""The offline model: tiles against the masks themselves, and what must hold for any constants."""

import heapq
import itertools
import time
from dataclasses import replace

import numpy as np
import pytest

from numflash.configs import MMA_CONFIGS, PORTABLE_CONFIGS, parse_config
from numflash.problem.classes import ProblemClass
from tuner import model
from tuner.model import dispatch, grid, prediction
from tuner.records import ResourceUsage
from tuner.space import machines
from tuner.space.configs import Space

A100 = machines.find("A100")
MACHINES = ["T4", "A100", "A10", "RTX 4090", "H100", "B200", "5090"]
# Of each family: configs of several shapes that fit most machines.
CONFIGS = {
    "forward": ["m128n64w4s1", "m64n64w4s2", "m16n16w1s1", "m32n32w2s1"],
    "backward-dq": ["m128n32w4s1", "m64n32w4s1", "m16n16w1s1"],
    "backward-dkdv": ["m32n64w4s1", "m32n32w2s1", "m16n16w1s1", "m32n64w4s1-apart"],
    "backward": ["m32n64w4s1", "m32n64w4s1x4", "m16n16w1s1"],
    "reduce-dq": ["m32n64w4s1x4"],
}
PORTABLE = {
    "forward": ["m64n32w4", "m16n16w4"],
    "backward-dq": ["m32n32w4", "m16n8w4"],
    "backward-dkdv": ["m32n32w4", "m8n16w4"],
    "delta": ["w8", "w1"],
    "combine": ["w4", "w16"],
}


def problem_class(
    family="forward",
    traits="float16-d128-dv128-vec",
    mask="full",
    q=4096,
    k=4096,
    heads=64,
    group=1,
):
    return ProblemClass.parse(f"{family} {traits} {mask} q{q} k{k} bh{heads} g{group}")


def config_of(machine, family, text):
    """The config; for tensor cores those of the machine's generation."""
    if text not in PORTABLE.get(family, ()):
        text = ("sm75-" if machine.arch == "sm_75" else "sm80-") + text
    return parse_config(family, text)


def estimate_ms(text, problem, machine=A100):
    return model.estimate(machine, problem, config_of(machine, problem.family, text)).ms


def visible(problem):
    """The mask of one head, from the definition of a class."""
    i, j = np.ogrid[: problem.seqlen_q, : problem.seqlen_k]
    last = i + problem.seqlen_k - problem.seqlen_q
    mask = np.ones((problem.seqlen_q, problem.seqlen_k), bool)
    if problem.mask != "full":
        mask &= j <= last
    if problem.window:
        mask &= j > last - problem.window
    return mask


def tiles_with_scores(mask, row_tile, column_tile):
    """Of each row block, how many column tiles have a visible score."""
    found = []
    for first in range(0, mask.shape[0], row_tile):
        columns = np.flatnonzero(mask[first : first + row_tile].any(axis=0))
        found.append(len(np.unique(columns // column_tile)))
    return sorted(found, reverse=True)


def tiles_at_an_edge(mask, row_tile, column_tile):
    """Column tiles with scores of both kinds, or cut by the last column, of a row block's mean."""
    found, blocks = 0, range(0, mask.shape[0], row_tile)
    for first in blocks:
        rows = mask[first : first + row_tile]
        tiles = [rows[:, at : at + column_tile] for at in range(0, mask.shape[1], column_tile)]
        found += sum(t.any() and not (t.all() and t.shape[1] == column_tile) for t in tiles)
    return found / len(blocks)


SHAPES = [(256, 256), (64, 512), (512, 64), (1, 1024), (33, 97)]


@pytest.mark.parametrize("mask", ["full", "causal", "window16", "window128"])
@pytest.mark.parametrize(("q", "k"), SHAPES)
def test_tiles_visited_are_those_with_a_visible_score(mask, q, k):
    problem = problem_class(mask=mask, q=q, k=k, heads=8)
    seen = visible(problem)
    for m, n in [(64, 32), (16, 32), (48, 96), (128, 128)]:
        config = parse_config("forward", f"sm80-m{m}n{n}w1s1")
        walks = grid.lay(problem, config).walks
        assert walks.tiles.tolist() == tiles_with_scores(seen, m, n)
        assert walks.edges == pytest.approx(tiles_at_an_edge(seen, m, n))
        back = replace(problem, family="backward-dkdv")
        config = parse_config("backward-dkdv", f"sm80-m{m}n{n}w1s1")
        walks = grid.lay(back, config).walks
        assert walks.tiles.tolist() == tiles_with_scores(seen.T, n, m)
        assert walks.edges == pytest.approx(tiles_at_an_edge(seen.T, n, m))
    assert grid.visible_scores(problem) == 8 * seen.sum()


def test_splits_share_the_tiles_of_a_walk():
    problem = problem_class(q=1, k=4096, heads=8)
    whole = grid.lay(problem, parse_config("forward", "sm80-m16n64w1s1"))
    split = grid.lay(problem, parse_config("forward", "sm80-m16n64w1s1x6"))
    assert whole.walks.tiles.tolist() == [64]
    assert split.walks.tiles.tolist() == [11] * 5 + [9]
    assert split.blocks == 6 * whole.blocks == 48
    causal = problem_class(mask="causal", q=512, k=512, heads=8)
    edges = [
        grid.lay(causal, parse_config("forward", f"sm80-m64n64w4s1{x}")).walks.edges
        for x in ("", "x4")
    ]
    assert edges == [1, 1 / 4]
    fused = problem_class("backward", mask="causal", q=512, k=512, heads=8)
    dealt = grid.lay(fused, parse_config("backward", "sm80-m32n64w4s1x4"))
    alone = grid.lay(fused, parse_config("backward", "sm80-m32n64w4s1"))
    # Of 512 keys 8 row blocks, each with 2 tiles of queries at the diagonal.
    assert (len(dealt.walks.tiles), dealt.walks.row_blocks, dealt.walks.edges) == (4, 2, 4)
    assert (len(alone.walks.tiles), alone.walks.row_blocks, alone.walks.edges) == (1, 8, 16)
    assert dealt.walks.total == alone.walks.total


def test_packed_heads_share_a_walk():
    decode = problem_class(q=1, k=8192, heads=32, group=8)
    packed = grid.lay(decode, parse_config("forward", "sm80-m16n64w1s1"))
    apart = grid.lay(decode, parse_config("forward", "sm80-m16n64w1s1-unpacked"))
    assert (packed.packed, packed.blocks) == (8, 4)
    assert (apart.packed, apart.blocks) == (1, 32)
    causal = problem_class(mask="causal", q=8, k=64, heads=4, group=4)
    config = parse_config("forward", "sm80-m16n16w1s1-packed")
    rows = np.repeat(visible(causal), 4, axis=0)
    assert grid.lay(causal, config).walks.tiles.tolist() == tiles_with_scores(rows, 16, 16)


def dealt_out(tiles, slots, per_tile):
    """When the last of the blocks is done, each given to the first slot that is free."""
    free = [0.0] * slots
    for tile in sorted(tiles, reverse=True):
        heapq.heappush(free, heapq.heappop(free) + tile * per_tile)
    return max(free)


@pytest.mark.parametrize("mask", ["full", "causal", "window512"])
@pytest.mark.parametrize("heads", [1, 8, 64, 256])
def test_waves_are_those_of_a_scheduler(mask, heads):
    problem = problem_class(mask=mask, q=2048, k=2048, heads=heads)
    laid = grid.lay(problem, parse_config("forward", "sm80-m128n64w4s1"))
    # One block on an SM, so that blocks do not slow each other down.
    found = dispatch.closed_form(laid, 108, 1, lambda tiles, together: 10.0 * tiles)
    true = dealt_out(list(laid.walks.tiles) * laid.heads, 108, 10.0)
    assert 0.85 * true <= found <= 1.001 * true


def every_case():
    for machine, mma in itertools.product(MACHINES, (True, False)):
        for family, texts in (CONFIGS if mma else PORTABLE).items():
            for text in texts:
                yield machines.find(machine), family, text


@pytest.mark.parametrize("mask", ["full", "causal", "window256"])
@pytest.mark.parametrize(("q", "k", "heads"), [(4096, 4096, 32), (1, 8192, 8), (128, 128, 1)])
def test_nothing_is_faster_than_the_floor_or_than_any_part(mask, q, k, heads):
    for machine, family, text in every_case():
        problem = problem_class(family, "float16-d64-dv64-vec", mask, q, k, heads)
        found = model.estimate(machine, problem, config_of(machine, family, text))
        floor = model.floor_ms(machine, problem)
        assert found.ms >= floor["floor"] == max(floor.values()), (machine.name, family, text)
        assert all(0 <= part < found.ms for part in found.parts.values()), (family, text)
        assert found.parts[found.bound_by] == max(found.parts.values())


@pytest.mark.parametrize(
    "rate",
    [
        "memory_gbps",
        "clock_mhz",
        "l2_bytes_per_clock",
        "mma_f16",
        "fp32_lanes",
        "alu_lanes",
        "sfu_lanes",
        "smem_bytes_per_clock",
    ],
)
def test_a_faster_machine_is_never_slower(rate):
    faster = replace(A100, **{rate: 2 * getattr(A100, rate)})
    gains = []
    for family, texts in CONFIGS.items():
        for text, q in itertools.product(texts, (1, 128, 4096)):
            # With a softcap the FMA units are as busy as any.
            for traits in ("float16-d64-dv64-vec", "float16-d64-dv64-softcap-vec"):
                problem = problem_class(family, traits, q=q)
                before, after = (estimate_ms(text, problem, m) for m in (A100, faster))
                assert after <= before * 1.0001, (family, text, q)
                gains.append(before / after)
    assert max(gains) > 1.002


def test_twice_the_heads_take_twice_as_long_on_a_full_machine():
    for family, texts in CONFIGS.items():
        times = [
            estimate_ms(texts[0], problem_class(family, "float16-d64-dv64-vec", heads=heads))
            for heads in (4096, 8192)
        ]
        assert times[1] / times[0] == pytest.approx(2, rel=0.03), family


def test_a_causal_mask_costs_about_half():
    full, causal = (
        estimate_ms("m128n64w4s1", problem_class(mask=mask, q=8192, k=8192))
        for mask in ("full", "causal")
    )
    assert 0.48 < causal / full < 0.6
    windows = [
        estimate_ms("m128n64w4s1", problem_class(mask=f"window{n}", q=8192, k=8192))
        for n in (256, 1024, 4096)
    ]
    assert windows[0] < windows[1] < windows[2] < causal


SEQLENS = (1, 32, 128, 1024, 16384)
HEADS = ((1, 1), (8, 1), (64, 8), (512, 1))
# Besides the mask, tiles at an edge cost a masking, and the longest block begins first.
TOLERANCE = 1.05


def times_by_class(machine, family, text, heads, group):
    """(mask, seqlen_q, seqlen_k) -> milliseconds."""
    config = config_of(machine, family, text)
    found = {}
    for key in itertools.product(("full", "causal", "window256"), SEQLENS, SEQLENS):
        problem = problem_class(family, "float16-d64-dv64-vec", *key, heads, group)
        found[key] = model.estimate(machine, problem, config).ms
    return found


@pytest.mark.parametrize("machine", ["A100", "T4"])
@pytest.mark.parametrize("family", ["forward", "backward-dq", "backward-dkdv", "backward"])
def test_more_to_do_never_takes_less_time(family, machine):
    machine = machines.find(machine)
    texts = [*CONFIGS[family], *(["m32n32w2s3"] if machine.arch != "sm_75" else [])]
    for text, (heads, group) in itertools.product(texts[:2] + texts[-1:], HEADS):
        found = times_by_class(machine, family, text, heads, group)
        for (mask, q, k), ms in found.items():
            assert ms <= TOLERANCE * found["full", q, k], (text, heads, mask, q, k)
            for shorter in itertools.product(*[[n for n in SEQLENS if n <= s] for s in (q, k)]):
                least = found[(mask, *shorter)]
                if mask != "window256":
                    assert least <= TOLERANCE * ms, (text, heads, mask, q, k, shorter)


def test_a_fused_backward_masks_each_tile_once():
    # The edge crosses one of 512 tiles; each of 512 walks ends amid a tile where queries are few.
    times = {
        (mask, q): estimate_ms(
            "m32n32w2s3",
            problem_class("backward", "float16-d64-dv64-vec", mask, q, 16384, heads=512),
        )
        for mask, q in (("full", 32), ("causal", 32), ("full", 8), ("full", 16))
    }
    assert times["causal", 32] == pytest.approx(times["full", 32], rel=0.01)
    assert times["full", 8] == pytest.approx(times["full", 16], rel=0.01)
    assert times["full", 8] == pytest.approx(times["full", 32], rel=0.05)


@pytest.mark.parametrize("machine", MACHINES)
def test_tiny_tiles_lose_for_long_sequences(machine):
    machine = machines.find(machine)
    problem = problem_class(traits="float16-d64-dv64-vec")
    assert estimate_ms("m128n64w4s1", problem, machine) < 0.8 * estimate_ms(
        "m16n16w1s1", problem, machine
    )


@pytest.mark.parametrize("machine", ["A100", "H100", "4090"])
def test_many_rows_lose_for_a_single_query(machine):
    machine = machines.find(machine)
    problem = problem_class(q=1, k=8192, heads=512)
    few = min(estimate_ms(f"m16n{n}w1s2", problem, machine) for n in (32, 64))
    assert few < estimate_ms("m128n32w4s1", problem, machine)


def test_splits_win_where_blocks_are_few_and_lose_where_they_are_many():
    few, many = problem_class(q=1, k=16384, heads=8), problem_class(q=4096, k=4096, heads=64)
    assert estimate_ms("m16n64w1s2x16", few) < 0.3 * estimate_ms("m16n64w1s2", few)
    assert estimate_ms("m128n64w4s1x4", many) > estimate_ms("m128n64w4s1", many)


def test_packed_heads_win_for_few_queries():
    decode = problem_class(q=1, k=8192, heads=512, group=8)
    assert estimate_ms("m16n64w1s2", decode) < 0.5 * estimate_ms("m16n64w1s2-unpacked", decode)


TILES = ["m128n128w4s1", "m128n64w4s1", "m128n32w4s1", "m64n64w4s1", "m64n16w4s1", "m16n16w1s1"]


@pytest.mark.parametrize(
    ("traits", "best"),
    [
        ("float16-d64-dv64-vec", {"m128n128w4s1", "m128n64w4s1"}),
        ("float16-d128-dv128-vec", {"m128n64w4s1", "m128n32w4s1"}),
    ],
)
def test_the_best_tiles_on_an_a100_are_those_of_flash_attention_2(traits, best):
    problem = problem_class(traits=traits)
    order = sorted(TILES, key=lambda text: estimate_ms(text, problem))
    assert set(order[:2]) == best


def test_a_cluster_reads_keys_from_the_l2_once():
    """Without a mask as if the L2 were twice as fast; with one its blocks wait for each other."""
    h200 = machines.find("H200")
    twice = replace(h200, l2_bytes_per_clock=2 * h200.l2_bytes_per_clock)
    config = parse_config("forward", "sm90-m128n80w8s2-overlap-persistent")
    pairs, gains = replace(config, cluster=2), {}
    for mask in ("full", "causal"):
        text = f"forward bfloat16-d256-dv256-vec {mask} q4096 k4096 bh32 g1"
        problem = ProblemClass.parse(text)
        alone, together = (model.estimate(h200, problem, each).ms for each in (config, pairs))
        if mask == "full":
            faster = model.estimate(twice, problem, config).ms
            assert together == pytest.approx(faster, rel=0.005)
        gains[mask] = alone / together
    assert gains["full"] > 1.05 > gains["causal"]


def test_products_and_softmax_follow_each_other():
    problem, text = problem_class(traits="float16-d64-dv64-vec"), "m128n128w4s1"
    found = model.estimate(A100, problem, config_of(A100, "forward", text))
    serial = found.parts["matrix"] + found.parts["exponential"]
    assert serial < found.ms < 1.25 * serial
    # Both count, whichever is the larger.
    for rate in ("mma_f16", "sfu_lanes"):
        faster = replace(A100, **{rate: 1.5 * getattr(A100, rate)}, alu_lanes=1e3)
        assert estimate_ms(text, problem, faster) < 0.97 * found.ms


def test_machine_rates_order_the_machines():
    problem = problem_class(traits="float16-d64-dv64-vec")
    order = ["B200", "H100", "A100", "A10", "T4"]
    times = [estimate_ms("m128n64w4s1", problem, machines.find(name)) for name in order[1:]]
    assert times == sorted(times)


def test_occupancy_and_spills_cost():
    problem, config = problem_class(), parse_config("forward", "sm80-m128n64w4s1")
    resources = ResourceUsage(255, 0, 65536, 128, 2, "registers")
    two = model.predict(A100, problem, config, resources, None)
    one = model.predict(A100, problem, config, replace(resources, blocks_per_sm=1), None)
    assert two.ms < one.ms
    assert two.blocks_per_sm == 2
    with pytest.raises(ValueError, match="no block of sm80-m128n64w4s1 fits"):
        model.predict(A100, problem, config, replace(resources, blocks_per_sm=0), None)
    with pytest.raises(ValueError, match="shared memory"):
        model.estimate(machines.find("T4"), problem, parse_config("forward", "sm75-m128n128w4s1"))
    tf32 = problem_class(traits="float32-d64-dv64-vec-tf32")
    with pytest.raises(ValueError, match="Tesla T4 have no tf32"):
        model.estimate(machines.find("T4"), tf32, parse_config("forward", "sm80-m64n32w4s1"))
    # 128 x 4 blocks leave 128 registers, where 192 accumulators alone need more.
    crowded = parse_config("forward", "sm80-m128n64w4s1b4")
    assert prediction.expected_registers(crowded, problem.traits) == (128, 88)
    assert model.estimate(A100, problem, crowded).ms > 2 * two.ms
    # 448 accumulators are more than any thread has.
    assert estimate_ms("m256n96w4s1", problem) > 2 * two.ms


@pytest.mark.parametrize("family", ["forward", "backward-dkdv", "combine"])
@pytest.mark.parametrize("machine", [A100, machines.find("H100")], ids=lambda m: m.arch)
def test_at_best_nothing_spills_and_nothing_is_slower(family, machine):
    problem = problem_class(family)
    for config in list(Space(problem, machine).feasible)[::7]:
        by_formula = model.estimate(machine, problem, config).ms
        at_best = model.at_best(machine, problem, config).ms
        assert at_best <= (1 - model.CODE_SAVES_OF_OTHERS) * by_formula * (1 + 1e-9), config
        # Whatever the compiler makes of it: more registers, more spills, fewer blocks.
        smem = config.smem_bytes(problem.traits)
        for blocks in (1, 2, 4):
            resources = ResourceUsage(255, 0, smem, config.num_threads, blocks, "registers")
            if blocks <= 65536 // (config.num_threads * 24):
                found = model.predict(machine, problem, config, resources, None)
                room = model.at_best(machine, problem, config).blocks_per_sm
                assert blocks > room or found.ms > at_best, (config, blocks)


def test_features_and_dtypes_are_counted():
    plain = estimate_ms("m128n64w4s1", problem_class(traits="float16-d64-dv64-vec"))
    capped = estimate_ms("m128n64w4s1", problem_class(traits="float16-d64-dv64-softcap-vec"))
    assert capped > 1.3 * plain
    tf32 = problem_class(traits="float32-d64-dv64-vec-tf32")
    exact = problem_class(traits="float32-d64-dv64-vec")
    assert plain < estimate_ms("m64n64w4s1", tf32)
    portable = model.estimate(A100, exact, parse_config("forward", "m64n64w4"))
    assert estimate_ms("m64n64w4s1", tf32) < portable.ms
    assert portable.bound_by == "fma"
    floors = [model.floor_ms(A100, p)["matrix"] for p in (tf32, exact)]
    assert floors[1] / floors[0] == pytest.approx(512 / 64)


def test_every_family_has_a_prediction():
    # Nothing is tuned, and nothing predicted, of the kernels for gradients of what scores are made
    # of, and of those that add up numbers.
    of_scores = {f"backward-{way}" for way in ("rows", "columns", "tiles", "scatter")}
    sums = {"array-sums", "clear-sums", "round-sums"}
    assert {*CONFIGS, *PORTABLE} | of_scores | sums == {*MMA_CONFIGS, *PORTABLE_CONFIGS}


def test_it_is_quick():
    config = parse_config("forward", "sm80-m128n64w4s1")
    problem = problem_class(mask="causal", q=32768, k=32768)
    resources = ResourceUsage(255, 0, 65536, 128, 2, "registers")
    model.estimate(A100, problem, config)

    def best_seconds(call):
        times = []
        for _ in range(200):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    assert best_seconds(lambda: model.estimate(A100, problem, config)) < 0.3e-3
    assert best_seconds(lambda: model.predict(A100, problem, config, resources, None)) < 1e-3
