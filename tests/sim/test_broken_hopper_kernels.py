"""The Hopper forward broken on purpose: every wait, barrier and fence is needed, and every idea.

As `test_broken_kernels`: a kernel with a fault must give a wrong result, or an error of the
simulator, for at least one problem and seed. Errors of Python do not count: they would say that
the fault is wrong, not the kernel. What the forward on 8-bit floats shares, `skeleton` and all
below, is broken here only; `test_fp8_hopper` breaks what is its own.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

import numflash
from numflash.calls import forward as calls
from numflash.calls import ready
from numflash.configs import parse_config
from numflash.kernels.wgmma import forward
from numflash.runtime.driver import limits_of_device
from numflash.simulator import SEED, warpgroup
from numflash.simulator.errors import DeadlockError, SimulationError
from tests.support.covering import some
from tests.support.faults import (
    Dropped,
    Early,
    Event,
    Twice,
    attempts,
    events,
    load,
    mutations,
    source_of,
)

SEEDS = range(8)
# In the order of imports: what is mutated is in all that follow.
CHAIN = (
    "tiles/blocks",
    "tiles/rows",
    "tiles/wgmma/turns",
    "tiles/wgmma/clusters",
    "tiles/wgmma/products",
    "tiles/wgmma/results",
    "tiles/mma/softmax",
    "tiles/wgmma/softmax",
    "tiles/wgmma/scores",
    "kernels/wgmma/channels",
    "kernels/wgmma/ring",
    "kernels/wgmma/origins",
    "kernels/wgmma/producer",
    "kernels/wgmma/finish",
    "kernels/wgmma/skeleton",
    "kernels/wgmma/forward",
)


@dataclass(frozen=True)
class Problem:
    """A problem for a kernel: a config and sizes that need the part that was taken away.

    `apart` is the simulator's `WARPS_APART`.
    """

    config: str
    seqlen_q: int
    seqlen_k: int
    num_heads_q: int = 1
    num_heads_kv: int = 1
    head_dim: int = 32
    options: dict = field(default_factory=dict)
    seeds: range = SEEDS
    apart: bool = True

    def with_one_arrival(self, apart: bool) -> "Problem":
        """The same for a config by which one thread arrives for a warpgroup."""
        config = replace(parse_config("forward", f"sm90-{self.config}"), arrivals=1)
        return replace(self, config=str(config).removeprefix("sm90-"), apart=apart)

    def is_solved(self) -> bool:
        """Whether the kernel's results are right."""
        rng = np.random.default_rng(0)
        shapes = (
            (1, self.seqlen_q, self.num_heads_q, self.head_dim),
            *[(1, self.seqlen_k, self.num_heads_kv, self.head_dim)] * 2,
        )
        q, k, v = (rng.standard_normal(shape).astype(np.float16) for shape in shapes)
        # Scores grow along the keys, so that maxima move and what was summed is rescaled.
        k *= np.linspace(1, 12, self.seqlen_k, dtype=np.float16)[:, None, None]
        ready._ready.clear()
        config = {"forward": f"sm90-{self.config}", "combine": "w2"}
        return numflash.check(q, k, v, config=config, **self.options).passed


_CAUSAL = {"causal": True}
PROBLEMS = {
    # Three tiles of rows in a block, one of which sees no key; the ring comes round.
    "persistent": Problem(
        "m64n16w4s2-overlap-persistent",
        150,
        60,
        options={"causal": True, "window_size": (20, 0)},
    ),
    # Two warpgroups, of which one passes keys by.
    "overlap": Problem("m128n16w8s2-overlap-pingpong", 100, 80, options=_CAUSAL),
    "turns": Problem("m128n16w8s1-pingpong", 100, 80, options=_CAUSAL),
    # V has other stages than K.
    "apart": Problem("m128n16w8s2-v3-overlap-pingpong", 100, 80, options=_CAUSAL),
    # O takes the place of Q of the next tile of rows.
    "shared": Problem("m64n96w4s2-persistent", 70, 100, head_dim=256),
    # Tiles of rows without keys between others.
    "empty": Problem(
        "m64n16w4s2-h1-unpacked-persistent",
        200,
        20,
        2,
        2,
        options={"window_size": (9, 9), "causal_align": "top_left"},
        seeds=range(24),
    ),
    # Two slabs of columns, heads in groups.
    "slabs": Problem("m64n32w4s2-unpacked-overlap", 40, 70, 4, 2, 128),
    # Few orders of threads show that Q was given back for one warp only.
    "split": Problem("m64n16w4s2x2-persistent", 70, 60, options=_CAUSAL, seeds=range(24, 48)),
    # Two blocks, the second of which has no rows of the second tile; the ring comes round.
    "cluster": Problem(
        "m64n16w4s2-c2-overlap-persistent", 180, 60, options={"causal": True}, seeds=range(12)
    ),
    # A warpgroup that passes many tiles of keys by, with nothing else to hold its warps together.
    "bypassed": Problem("m128n16w8s1", 100, 112, options=_CAUSAL, seeds=range(40)),
}
# Work of one thread for its warpgroup, where products hold warps together.
PROBLEMS |= {f"{n} for one": PROBLEMS[n].with_one_arrival(False) for n in ("empty", "bypassed")}
USUAL = ("persistent", "overlap", "turns")
# The cheap ones first.
ALL = (*USUAL, "empty", "shared", "split")
# Calls that results do not need, as far as the simulator can tell: (function, called, n).
NOT_NEEDED = {
    ("make_turns.take_turn", "bar_sync", 0): "turns are for speed",
    ("make_skeleton.skip_keys", "take_turn", 0): "turns are for speed",
    **{("make_attend.attend", "take_turn", n): "turns are for speed" for n in range(2)},
    ("meet_cluster", "cuda.syncwarp", 0): (
        "the simulator takes the lanes of a warp to a cluster's barrier one by one"
    ),
    ("make_skeleton.run_block", "take_registers", 0): (
        "the simulator does not count the registers that a thread uses"
    ),
}
# Releases of which the simulator cannot tell that they come a statement too early.
NEVER_TOO_EARLY = {
    ("make_skeleton.consume", "Q.release", 1): (
        "the thread that releases Q goes on to the wait for its copy before another one runs"
    ),
    ("make_attend.attend", "V.release", 2): (
        "the producer fetches the next V after the next Q, which has not been released yet"
    ),
}


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """A simulated GPU that is a Hopper."""
    monkeypatch.setenv("NUMFLASH_SIM_ARCH", "sm_90a")
    monkeypatch.setattr(ready, "_ready", {})
    limits_of_device.cache_clear()
    yield
    limits_of_device.cache_clear()


def module_of(part: str) -> str:
    """The module of a part."""
    return "numflash." + part.replace("/", ".")


SOURCES = {part: source_of(module_of(part)) for part in CHAIN}


def break_kernel(part: str, fault, monkeypatch) -> None:
    """Let the forward be made of a part with a fault."""
    chain = [module_of(name) for name in CHAIN[CHAIN.index(part) :]]
    changed = load(chain, module_of(part), fault, monkeypatch)
    monkeypatch.setattr(forward, "make_forward_kernel", changed.make_forward_kernel)


def first_failure(problems, monkeypatch) -> str | None:
    """The failure of the kernel, for the first of `attempts`."""
    for name, seed in attempts(problems, lambda name: PROBLEMS[name].seeds):
        problem = PROBLEMS[name]
        monkeypatch.setattr(SEED, "value", seed)
        monkeypatch.setattr(warpgroup, "WARPS_APART", problem.apart)
        try:
            if not problem.is_solved():
                return f"{name}: wrong result with seed {seed}"
        except (SimulationError, DeadlockError) as error:
            return f"{name}: {type(error).__name__} with seed {seed}: {error}"
    return None


_SYNCHRONISATION = (
    r"([QKV]\.)?(init|claim|expect|wait|release|gather|skip)"
    r"|mbarrier_(wait_parity|arrive|arrive_expect_tx|init)|wait_for_\w+|bar_sync|bar_arrive|meet"
    r"|cp_async_bulk_(wait_group_read|commit_group)|fence_\w+|wgmma_(fence|commit_group)"
    r"|give_\w+|take_\w+|pass_turn|cuda\.sync(threads|warp)"
    r"|meet_cluster|barrier_cluster_\w+|mbarrier_arrive_remote"
)
_OF_8_BITS = "make_product_pt.product_pt"
# And of those that only kernels for pages have: `test_broken_ragged_kernels` has their faults.
# The backward's product has its own in `test_backward_tiles`, what its warps fill by themselves in
# `test_broken_hopper_backward`.
_OF_BACKWARD = "make_product_kn.product_kn", "make_channel.filled"
_OF_OTHERS = (
    *(_OF_8_BITS, *_OF_BACKWARD),
    *("make_produce.fetch_paged_k", "make_produce.fetch_paged_v"),
)


def _problems_for(part: str, fault: Event) -> tuple[str, ...]:
    """Problems that show a fault of an event: first the one that the event is there for."""
    called, context = fault.called, fault.before(SOURCES[part], 4)
    if "cluster" in fault.function or "cluster" in called or called.endswith("remote"):
        return ("cluster",)
    if called == "gather":
        return ("bypassed",)
    if called == "Q.gather":
        # Where each warp gives back, the shuffle that finds its number holds it together, too.
        return ("empty for one",)
    if fault.function == "make_channel.gather":
        return ("empty for one", "bypassed for one") if called == "meet" else ("bypassed",)
    if "if o_replaces_q" in context:
        return ("shared",)
    if "skip" in fault.function:
        return ("overlap", "turns")
    without_overlap = "not overlap" in context or "else:" in context
    return tuple(dict.fromkeys(("turns", *ALL))) if without_overlap else ALL


def faults_of_events() -> list:
    """(part, fault, problems): no wait, barrier or fence may be missing, no release come early."""
    found = []
    for part in CHAIN:
        for fault in events(SOURCES[part], _SYNCHRONISATION):
            if (fault.function, fault.called, fault.n) in NOT_NEEDED:
                continue
            if fault.function not in _OF_OTHERS:
                found.append((part, fault, "no"))
        for fault in events(SOURCES[part], r"[QKV]\.release", Early):
            if (fault.function, fault.called, fault.n) not in NEVER_TOO_EARLY:
                found.append((part, fault, "early"))
    found.append(("kernels/wgmma/forward", Dropped("make_attend.attend", "scale_rows"), "no"))
    found.append(("kernels/wgmma/forward", Twice("make_attend.attend", "scale_rows"), "twice"))
    return [
        pytest.param(part, fault, _problems_for(part, fault), id=f"{part}: {how} {fault}")
        for part, fault, how in found
    ]


IDEAS = """
skeleton  persistent  Q given back before it was read
    q_parity = u32(q_parity ^ u32(1)) -> q_parity ^= u32(1); Q.release(barriers, group)
skeleton  persistent  the first phase of K
    begin(u32(0)) -> begin(u32(1))
skeleton  persistent  the phase of the next Q
    q_parity = u32(q_parity ^ u32(1)) -> pass
forward  persistent  the phase of V  x2
    v_parity = stages[-2], stages[-1] -> v_parity = stages[-2], u32(stages[-1] ^ u32(1))
forward  persistent  the stage of V  x2
    v_parity = stages[-2], stages[-1] -> v_parity = V.following(stages[-2], stages[-1])
forward  apart  V where K is  x2
    v_stage, v_parity = stages[-2], stages[-1] -> v_stage, v_parity = stages[0], stages[1]
producer  apart  V to where K is
    stage, parity = stages[-2], stages[-1] -> stage, parity = stages[0], stages[1]
skeleton  apart  V passed by where K is
    V.skip(barriers, group, stages[-2], stages[-1]) -> V.skip(barriers, group, *stages[:2])
producer  persistent  the first phase of an empty buffer
    begin(u32(1)) -> begin(u32(0))
producer  persistent  the phase of an empty Q
    q_parity = u32(q_parity ^ u32(1)) -> pass
channels  persistent  phases that never change
    u32(parity ^ u32(wraps)) -> u32(parity)
channels  persistent  phases that change too often
    u32(parity ^ u32(wraps)) -> u32(parity ^ u32(1))
channels  persistent  one buffer of two
    i32(0) if wraps else i32(stage + 1) -> i32(0)
ring  overlap  one warpgroup empties K
    "readers": groups -> "readers": 1
channels  persistent  one warp empties a buffer
    empty + stage, arrivals * readers -> empty + stage, 1
ring  split  one thread gives back a Q that each warp has read
    o_replaces_q = config.num_splits == 1 and not apart -> o_replaces_q = not apart
channels  overlap  all threads fill a buffer
    full + stage, writers) -> full + stage, writers + 1)
ring  persistent  mbarriers on top of each other
    v_full = k_full + 2 * stages -> v_full = k_full
turns  shared  all threads lead
    return mov_tid_x() % WARPGROUP == 0 -> return True
channels  persistent  all threads give back
    if mov_tid_x() % threads == 0 -> if True
channels  overlap  one warpgroup gives back
    if mov_tid_x() % threads == 0 -> if mov_tid_x() < WARPGROUP and mov_tid_x() % threads == 0
channels  persistent  the first warp gives back for all
    if mov_tid_x() % threads == 0 -> if mov_tid_x() % WARPGROUP < arrivals
skeleton  persistent  four warps fetch
    if mov_tid_x() < num_consumers + 32: -> if True:
skeleton  persistent  the warp that fetches does it with all lanes
    if elect_sync() != 0: -> if True:
skeleton  overlap  more registers than there are
    "inc", many -> "inc", many + 8
skeleton  overlap  all registers kept
    "dec", few -> "dec", few + 128
producer  persistent  too few bytes of Q
    u32(ring.q_bytes), -> u32(ring.q_bytes - 128),
producer  persistent  too many bytes of K
    u32(ring.k_bytes), -> u32(ring.k_bytes + 128),
producer  persistent  too few bytes of V
    u32(ring.v_bytes) -> u32(ring.v_bytes // 2)
ring  persistent  bytes of K without its second slab
    k_bytes=4 * k_words -> k_bytes=2 * k_words
producer  slabs  slabs of K on top of each other  x2
    (slab * stage_n + first) * SLAB_WORDS -> first * SLAB_WORDS
producer  slabs  slabs of V on top of each other  x2
    slab * v_slab_words -> slab * 0
producer  slabs  slabs of Q too close
    slab * WARPGROUP_ROWS * SLAB_WORDS -> slab * 32 * SLAB_WORDS
producer  persistent  K of one stage  x2
    i32(k.first + stage * k.words -> i32(k.first + 0 * k.words
producer  persistent  V of one stage  x2
    i32(v.first + stage * v.words -> i32(v.first + 0 * v.words
producer  overlap  Q of one warpgroup
    i32(q.first + group * q.words -> i32(q.first + 0 * q.words
producer  overlap  rows of one warpgroup
    + group * tokens ->
producer  slabs  K and V of another head
    .start, place.head, place.head_kv -> .start, place.head_kv, place.head
producer  persistent  keys from the first on
    i32(n * stage_n + origin.row), K.full -> i32(0 * stage_n + origin.row), K.full
forward  persistent  the step of the stages of K
    ring.k.words >> 2 -> ring.k.words >> 3
forward  persistent  the step of the stages of V
    ring.v.words >> 2 -> 0
forward  overlap  the step of the warpgroups' Q
    ring.q.words >> 2 -> 0
products  persistent  the step of a descriptor  x3
    % _STEPS_PER_SLAB * (_STEP_BYTES >> 4) -> % _STEPS_PER_SLAB * (_STEP_BYTES >> 3)
products  slabs  the second slab of A  x2
    a_slab * slab + within -> within
products  slabs  the second slab of B  x2
    behind(b, b_slab * slab + within) -> behind(b, within)
products  slabs  rows of V  x2
    step * (step_bytes >> 4) -> step * (step_bytes >> 5)
products  persistent  no swizzle in descriptors
    | 1 << 62 -> | 0 << 62
products  persistent  rows that are too close
    _GROUP_BYTES >> 4 << 32 -> _GROUP_BYTES >> 5 << 32
products  slabs  the next slab of V
    slab_bytes >> 4 << 16 -> slab_bytes >> 5 << 16
products  persistent  S on top of the last S  x2
    accumulates=more, in_place=more -> accumulates=True, in_place=True
products  persistent  rows of P changed over
    p_frag[2 * tile + 1] = -> p_frag[2 * tile ^ 3] =
products  persistent  columns of P changed over
    (s_acc[4 * tile], s_acc[4 * tile + 1]) -> (s_acc[4 * tile + 1], s_acc[4 * tile])
skeleton  persistent  O of the tile before
    sums.o_acc[i] = f32(0) -> pass
skeleton  persistent  maxima of the tile before
    sums.row_max[r], sums.row_sum[r] = NEG_INF, f32(0) -> sums.row_sum[r] = f32(0)
skeleton  persistent  sums of the tile before
    sums.row_max[r], sums.row_sum[r] = NEG_INF, f32(0) -> sums.row_max[r] = NEG_INF
softmax  persistent  limits of the tile before
    limits[r], shifts[r] = NEG_INF, f32(0) -> pass
rows  persistent  sums that are not rescaled
    row_sum[r] *= factors[r] -> pass
rows  persistent  a maximum that never moves
    row_max[r] = new_max -> pass
rows  persistent  factors of rows changed over
    factors[r] = ex2 -> factors[1 - r] = ex2
rows  persistent  rows without keys
    shift if abs(shift) <= HUGE else f32(0) -> shift
results  persistent  results that are not swizzled
    ^ (row % 8) ->
results  persistent  half of the swizzle
    ^ (row % 8) -> ^ (row % 4)
results  persistent  chunks of lanes
    thread % 32 // 16 -> thread % 16 // 8
results  persistent  rows of warps
    thread // 32 % 4 * 16 -> thread // 32 % 2 * 16
results  slabs  one slab of results
    block // _BLOCKS_PER_SLAB * _ROWS * _SLAB_WORDS -> 0
results  slabs  columns of the second slab
    i32(slab * 64) -> i32(slab * 32)
finish  overlap  rows of one warpgroup
    m_start + WARPGROUP_ROWS * group -> m_start
finish  overlap  results on top of each other
    o.first + o.words * group -> o.first
finish  persistent  lse in base 2
    LN_2, is_split -> 2 * LN_2, is_split
row_ends  persistent  rows without keys
    if total != f32(0) else f32(0) ->
channels  cluster  released in the own block only
    arrive_remote(barriers, empty + stage, block) -> arrive(barriers, empty + stage)
channels  cluster  released in one block only
    if block < cluster: -> if block < 1:
channels  cluster  a buffer that is empty in one block
    arrivals * readers * cluster + -> arrivals * readers +
ring  cluster  blocks that know nothing of each other
    "cluster": config.cluster} -> "cluster": 1}
clusters  cluster  all blocks have the first rows
    start + mov_cluster_ctarank() * tile_m -> start
clusters  cluster  all blocks fetch the first half
    mov_cluster_ctarank() * share -> 0 * share
clusters  cluster  halves changed over
    mov_cluster_ctarank() * share -> (1 - mov_cluster_ctarank()) * share * 2
clusters  cluster  a copy for the first block only
    u16((1 << cluster) - 1) -> u16(1)
producer  cluster  half of K to the place of the other  x2
    (slab * stage_n + first) * SLAB_WORDS -> slab * stage_n * SLAB_WORDS
producer  cluster  half of V of the other's keys
    i32(slab * slab_elements), i32(key + first) -> i32(slab * slab_elements), key
producer  cluster  Q of the first block
    own_rows(place).start -> place.start
finish  cluster  results of the first block
    own_rows(place_of(number, grid, shape, mask)) -> place_of(number, grid, shape, mask)
skeleton  cluster  blocks that take places of their own
    make_walk(config.block_rows, traits, cluster) -> make_walk(config.block_rows, traits)
blocks  cluster  clusters that are counted as blocks
    cluster, clusters = mov_clusterid_x(), mov_nclusterid_x() -> cluster = clusters = mov_ctaid_x()
turns  overlap  a turn for oneself
    following = 0 if group == last else group + 1 -> following = group
turns  overlap  turns and meetings in one place
    _FIRST_MEETING = 1, 4 -> _FIRST_MEETING = 1, 1
"""


def ideas() -> list:
    """(part, mutation, problems) of IDEAS."""
    parts = {part.rpartition("/")[2]: part for part in CHAIN if part.split("/")[1] == "wgmma"}
    parts |= {"rows": "tiles/mma/softmax", "row_ends": "tiles/rows", "blocks": "tiles/blocks"}
    return [
        pytest.param(parts[part], mutation, (problem,), id=f"{part}: {mutation}")
        for part, problem, mutation in mutations(IDEAS)
    ]


@pytest.mark.parametrize("name", some(PROBLEMS, "persistent"))
def test_the_kernel_is_right(name, monkeypatch):
    monkeypatch.setitem(PROBLEMS, name, replace(PROBLEMS[name], seeds=range(1)))
    assert first_failure([name], monkeypatch) is None


@pytest.mark.parametrize(("part", "mutation", "problems"), faults_of_events())
def test_nothing_that_waits_can_be_left_out(
    part, mutation, problems, monkeypatch, record_property
):
    break_kernel(part, mutation, monkeypatch)
    caught = first_failure(problems, monkeypatch)
    record_property("caught", caught)
    assert caught


@pytest.mark.parametrize(("part", "mutation", "problems"), ideas())
def test_a_broken_kernel_is_caught(part, mutation, problems, monkeypatch, record_property):
    break_kernel(part, mutation, monkeypatch)
    caught = first_failure(problems, monkeypatch)
    record_property("caught", caught)
    assert caught


@pytest.mark.parametrize("name", ["q_map", "k_map", "v_map", "out_map"])
def test_a_tensor_map_without_swizzle_is_caught(name, monkeypatch):
    tensor_maps = calls._tensor_maps

    def mutated(self, *about):
        maps = tensor_maps(self, *about)
        mapped = maps[name]
        return maps | {name: mapped._replace(layout=replace(mapped.layout, swizzle_bytes=0))}

    monkeypatch.setattr(calls, "_tensor_maps", mutated)
    assert first_failure(["persistent"], monkeypatch)


@pytest.mark.parametrize("name", some(ALL, "persistent"))
def test_one_arrival_takes_products_to_be_over_for_all_warps_at_once(name, monkeypatch):
    """Right if that is so; and if each warp has its own, as the PTX ISA says, it is found out."""
    for apart, seeds in ((False, range(1)), (True, SEEDS)):
        monkeypatch.setitem(PROBLEMS, name, PROBLEMS[name].with_one_arrival(apart))
        monkeypatch.setitem(PROBLEMS, name, replace(PROBLEMS[name], seeds=seeds))
        failure = first_failure([name], monkeypatch)
        assert bool(failure) == apart, failure
