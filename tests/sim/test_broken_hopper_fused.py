"""Hopper's backward in one kernel broken on purpose: waits, releases, fences, turns, and ideas.

As `test_broken_hopper_backward`, whose problems break what this kernel shares with the others.
"""

from dataclasses import replace

import numpy as np
import pytest

import numflash
from numflash.calls import ready
from numflash.simulator.errors import DeadlockError, SimulationError
from tests.support.covering import ALL, some, thorough
from tests.support.faults import Early, Mutation, events, load, mutations, source_of
from tests.support.gradient_problems import GradientProblem, first_failure

CHAIN = (
    "tiles/wgmma/scores",
    "tiles/wgmma/transposition",
    "tiles/wgmma/turns_of_blocks",
    "kernels/wgmma/gradient_ring",
    "kernels/wgmma/add_dq",
    "kernels/wgmma/backward",
    "kernels/wgmma/reduce_dq",
)
SEEDS = range(12)


def _problem(config: str, shape: tuple, options: dict | None = None, blocks: int = 2, **more):
    """A problem for this kernel; `blocks` of it run together."""
    configs = {"backward": f"sm90-{config}"}
    return GradientProblem(configs, shape, options or {}, SEEDS, blocks, **more)


# One warpgroup and several blocks; dQ by columns, by rows, by the first of two.
PROBLEMS = {
    "turns": _problem("m64n64w4s2", (180, 130, 1, 32), {"causal": True}, blocks=3),
    "columns": _problem("m64n128w8s2", (130, 130, 1, 128)),
    "rows": _problem("m128n128w8s2", (200, 130, 1, 32)),
    "first": _problem("m64n128w8s2", (300, 70, 1, 32)),
    "heads": _problem("m64n64w4s1", (70, 130, 2, 32)),
    "window": _problem("m64n64w4s2", (130, 200, 1, 32), {"window_size": (20, 30)}),
    "unseen": _problem(
        "m64n64w4s2", (190, 70, 1, 32), {"window_size": (20, 30), "causal_align": "top_left"}
    ),
    "far": _problem("m64n64w4s1", (64, 40, 1, 32), far=True),
}
# Calls that results do not need, as far as the simulator can tell: (function, called, n).
NOT_NEEDED = {
    ("_make_tile.tile", "wait_for_dv", 0): "only dO is given back between it and wait_for_dk",
    (
        "make_add_dq.add_dq_of_place",
        "mbarrier_arrive",
        0,
    ): "of sequences that have the same queries",
}
_SYNCHRONISATION = (
    r"((OWNED|Q|DO|ROWS|DQ)\.)?(claim|expect|filled|wait|release)|wait_for_\w+|fence_\w+"
    r"|mbarrier_arrive|bar_sync|cp_async_bulk_(commit|wait)_\w+|st_release_\w+"
)
# What takes many seeds to show, and `test_broken_hopper_kernels` shows of other copies.
DEAR = "cp_async_bulk_wait_group_read", "DQ.claim"
# Releases that come a statement too early and do no harm, in any order of threads.
NEVER_TOO_EARLY = {
    ("_make_tile.tile", "ROWS.release", 0): "Q.release before it waits for nothing",
    # The thread that fetches a stage's dO has claimed the stage's Q before. That claim passes when
    # all warps are behind `Q.release`, so behind `wait_for_dk`: groups end in the order in which
    # they were issued, and dV, which reads dO, was issued before dK. All warps' products have read
    # dO by then. `test_a_release_that_another_hides` takes the order of the claims away.
    ("_make_tile.tile", "DO.release", 0): "who fetches claims Q, given back later, before dO",
}


@pytest.fixture(autouse=True)
def hopper(on):
    """A simulated GPU that is a Hopper, and results that hold NaN before they are written."""
    on("sm_90a")


def module_of(part: str) -> str:
    """The module of a part."""
    return "numflash." + part.replace("/", ".")


KERNEL, FETCHING = "kernels/wgmma/backward", "kernels/wgmma/queries"


def break_kernels(part: str, fault, monkeypatch) -> None:
    """Let the kernels be made of a part with a fault."""
    chain = [module_of(name) for name in CHAIN[CHAIN.index(part) :]]
    load(chain, module_of(part), fault, monkeypatch)


def faults_of_events() -> list:
    """(part, fault, problems): no wait, claim or fence may be missing, no release come early."""
    found = []
    for part in ("kernels/wgmma/add_dq", KERNEL):
        source = source_of(module_of(part))
        for fault in events(source, _SYNCHRONISATION):
            dear = not ALL and fault.called in DEAR
            if (fault.function, fault.called, fault.n) not in NOT_NEEDED and not dear:
                found.append((part, fault, "no"))
        for fault in events(source, r"(Q|DO|ROWS)\.release|mbarrier_arrive|st_release_\w+", Early):
            if (fault.function, fault.called, fault.n) not in NEVER_TOO_EARLY | NOT_NEEDED:
                found.append((part, fault, "early"))
    problems = "turns", "first"
    return [pytest.param(part, fault, problems, id=f"{how} {fault}") for part, fault, how in found]


IDEAS = """
add_dq  turns  a turn is not taken
    while ld_acquire_gpu_u32(turns, i64(at) + 1) != rank: -> while False:
add_dq  turns  the turn of another tile is passed on
    st_release_gpu_u32(turns, i64(at) -> st_release_gpu_u32(turns, i64(at // 2)
add_dq  turns  nobody stores first
    if rank == u32(0): -> if rank == u32(999):
add_dq  turns  everyone stores
    if rank == u32(0): -> if rank != u32(999):
backward  first  one buffer of dS
    ds_now = stage if alternates else number & 1 -> ds_now = 0
add_dq  first  one buffer of dQ
    return i32(number & 1), u32(number >> 1 & 1) -> return i32(0), u32(number >> 1 & 1)
backward  columns  dQ of the first columns
    products.advance(k_of(start, 0), group, k_step) -> k_of(start, 0)
backward  rows  dQ of the first queries
    products.advance(ds, group, ds_part) -> ds
backward  columns  parts of dQ on top of each other
    mov_tid_x() // WARPGROUP * part -> mov_tid_x() // WARPGROUP * 0
transposition  rows  dS of one warpgroup
    WARPGROUP * slab_words -> WARPGROUP * 0
backward  first  warpgroups share the keys of one  x2
    0), group, group_step) -> 0), 0, group_step)
backward  far  keys past the end are not masked
    masks_keys=True -> masks_keys=False
backward  far  edges of the last keys are taken for whole tiles
    whole = Whole(whole.first, i32(-1)) -> whole = Whole(whole.first, whole.last)
transposition  turns  steps on top of each other
    _STEP * _ROW_WORDS * step -> _ROW_WORDS * step
turns_of_blocks  heads  the first keys come first
    i32((num_blocks - 1 - block) * tile_n) -> i32(block * tile_n)
turns_of_blocks  heads  turns of the first head
    i32(places.first_head + head) * places.num_tiles -> i32(places.first_head) * places.num_tiles
turns_of_blocks  window  the rank of a tile that all see
    min(last_key, i32(sequence.seqlen_k - 1)) -> i32(sequence.seqlen_k - 1)
turns_of_blocks  unseen  tiles that no key sees have sums
    end > tile * tile_m + sequence.lo -> end > 0
reduce_dq  columns  columns of the first part
    column_step * part -> 0
reduce_dq  rows  rows of the first part
    row + row_step * part -> row
gradient_ring  turns  nobody adds
    if mov_tid_x() < num_consumers + 64 + assisting and -> if mov_tid_x() < num_consumers and
"""


def ideas() -> list:
    """(part, mutation, problems) of IDEAS."""
    parts = {part.rpartition("/")[2]: part for part in CHAIN}
    return [
        pytest.param(parts[part], mutation, (problem,), id=f"{part}: {mutation}")
        for part, problem, mutation in mutations(IDEAS)
    ]


@thorough
@pytest.mark.parametrize("name", some(PROBLEMS, "turns"))
def test_the_kernel_is_right(name, monkeypatch):
    for seed in SEEDS if ALL else SEEDS[:1]:
        assert PROBLEMS[name].is_solved(seed, monkeypatch)


@pytest.mark.parametrize(("part", "fault", "problems"), faults_of_events())
def test_nothing_that_waits_can_be_left_out(part, fault, problems, monkeypatch):
    break_kernels(part, fault, monkeypatch)
    assert first_failure({name: PROBLEMS[name] for name in problems}, monkeypatch)


def fetch_dO_first() -> Mutation:
    """The thread that fetches claims and fetches a stage's dO, then its Q."""
    source = source_of(module_of(FETCHING))
    begins = "# Hazard: this Q would", "# Hazard: this dO would", "stage, parity = Q.following"
    q, do = (source.index(f"{' ' * 12}{text}") for text in begins[:2])
    end = source.index(f"{' ' * 12}{begins[2]}", do)
    return Mutation("dO first", source[q:end], source[do:end] + source[q:do])


@thorough
@pytest.mark.parametrize("early", [False, True])
def test_a_release_that_another_hides(early, monkeypatch):
    """dO given back early is seen where dO is claimed before Q."""
    fetching, kernel = module_of(FETCHING), module_of(KERNEL)
    if early:
        load([fetching], fetching, fetch_dO_first(), monkeypatch)
        load([kernel], kernel, Early("_make_tile.tile", "DO.release"), monkeypatch)
    else:
        load([fetching, kernel], fetching, fetch_dO_first(), monkeypatch)
    seeds = SEEDS if early or ALL else SEEDS[:1]
    problems = {"first": replace(PROBLEMS["first"], seeds=seeds)}
    assert bool(first_failure(problems, monkeypatch)) is early


@pytest.mark.parametrize(("part", "mutation", "problems"), ideas())
def test_a_broken_kernel_is_caught(part, mutation, problems, monkeypatch):
    break_kernels(part, mutation, monkeypatch)
    assert first_failure({name: PROBLEMS[name] for name in problems}, monkeypatch)


# Tiles that lists say: sequences with lengths of their own, and a block mask


LISTED = ("kernels/sequences/schedule", *CHAIN)
IDEAS_OF_LISTS = """
schedule  sequences  the first keys of a sequence come first
    place = i32(_tiles_of(owning, plan) - 1 - place) -> place = i32(place)
schedule  sequences  tiles with the most work come first
    work = i32(_tiles_of(_owning(tile.sequence, plan), plan)) -> work = i32(work + 0)
turns_of_blocks  sequences  sequences share their sums
    shape.tiles_before[batch]) -> i32(0))
turns_of_blocks  blocks  blocks that are empty count
    return u32(end - begin) -> return u32(last_block(tile, sequence) - block)
turns_of_blocks  blocks  all rows have sums
    return begin < end -> return True
add_dq  blocks  steps are tiles
    tile, _ = tile_at(mask, step) -> tile = step
add_dq  blocks  dQ goes by the lists of keys
    mask.hi, mask.lists_of_queries -> mask.hi, mask.lists
"""
TILES = np.array([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]], bool)


def listed_problem(name: str) -> dict:
    """The arguments of `numflash.check`."""
    rng = np.random.default_rng(4)
    rows, heads = ((139, 280), 2) if name == "sequences" else ((190, 250), 1)
    shapes = [(n, h, 32) for n, h in ((rows[0], heads), *[(rows[1], 1)] * 2, (rows[0], heads))]
    if name == "sequences":
        ends = {"q": [0, 70, 73, 139], "k": [0, 70, 80, 280]}
        options = {f"cu_seqlens_{side}": np.array(x, np.int32) for side, x in ends.items()}
        options["causal"] = True
    else:
        shapes = [(1, *shape) for shape in shapes]
        options = {"block_mask": numflash.BlockMask.from_tiles(TILES, block_size=64)}
    arrays = (rng.standard_normal(shape).astype(np.float16) for shape in shapes)
    configs = {"forward": "sm80-m32n32w2s1", "backward": "sm90-m64n64w4s1"}
    return dict(zip(("q", "k", "v", "dout"), arrays, strict=True)) | options | {"config": configs}


def is_listed_right(name: str, blocks: int, monkeypatch) -> bool:
    """Whether gradients are right, with so many blocks together."""
    monkeypatch.setenv("NUMFLASH_SIM_BLOCKS", str(blocks))
    ready._ready.clear()
    try:
        return numflash.check(**listed_problem(name)).passed
    except (SimulationError, DeadlockError, IndexError):
        return False


@pytest.mark.parametrize("name", some(["sequences", "blocks"]))
def test_lists_are_right(name, monkeypatch):
    assert is_listed_right(name, 3, monkeypatch)


def ideas_of_lists() -> list:
    """(part, mutation, problem) of IDEAS_OF_LISTS."""
    parts = {part.rpartition("/")[2]: part for part in LISTED}
    return [
        pytest.param(parts[part], mutation, problem, id=f"{part}: {mutation}")
        for part, problem, mutation in mutations(IDEAS_OF_LISTS)
    ]


@thorough
@pytest.mark.parametrize(("part", "mutation", "name"), ideas_of_lists())
def test_broken_lists_are_caught(part, mutation, name, monkeypatch):
    chain = [module_of(each) for each in LISTED[LISTED.index(part) :]]
    load(chain, module_of(part), mutation, monkeypatch)
    assert not all(is_listed_right(name, blocks, monkeypatch) for blocks in (1, 2))
