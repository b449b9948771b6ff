"""Hopper's backward broken on purpose: every wait, release, claim and fence is needed.

As `test_broken_hopper_kernels`, whose problems show what is wrong with channels and products.
"""

import pytest

from numflash.calls import ready
from numflash.runtime.driver import limits_of_device
from tests.support.covering import ALL, some, thorough
from tests.support.faults import Early, events, load, mutations, source_of
from tests.support.gradient_problems import GradientProblem as Problem
from tests.support.gradient_problems import first_failure

CHAIN = (
    "tiles/wgmma/gradients",
    "tiles/wgmma/handover",
    "tiles/wgmma/scores",
    "kernels/wgmma/channels",
    "kernels/wgmma/gradient_ring",
    "kernels/wgmma/queries",
    "kernels/wgmma/roles",
    "kernels/wgmma/backward_dq",
    "kernels/wgmma/backward_dkdv",
)
SEEDS = range(8)


# The rings come round; two warpgroups, of which one may run ahead; several slabs, one stage.
PROBLEMS = {
    "dq": Problem({"backward-dq": "sm90-m128n16w8s2"}, (100, 90, 1, 32), {"causal": True}),
    "dq-slabs": Problem({"backward-dq": "sm90-m64n32w4s1"}, (40, 100, 1, 96)),
    "dkdv": Problem({"backward-dkdv": "sm90-m32n128w8s2"}, (150, 100, 1, 32), {"causal": True}),
    # Few orders show that a warp's lanes have not written yet: those in which it falls behind.
    "dkdv-lanes": Problem({"backward-dkdv": "sm90-m32n64w4s1"}, (33, 130, 1, 16), seeds=range(60)),
    # Two warps fetch lse and delta.
    "dkdv-warps": Problem({"backward-dkdv": "sm90-m64n64w4s2"}, (200, 40, 1, 16)),
    "dkdv-slabs": Problem({"backward-dkdv": "sm90-m32n64w4s1"}, (70, 40, 2, 96)),
    "roles": Problem(
        {"backward-dkdv": "sm90-m32n64w8s2-roles"},
        (100, 40, 1, 32),
        {"causal": True, "causal_align": "top_left"},
    ),
    "roles-slabs": Problem({"backward-dkdv": "sm90-m32n64w8s1-roles"}, (40, 40, 2, 96)),
    # P is left in 32 bits.
    "roles-bent": Problem(
        {"backward-dkdv": "sm90-m32n64w8s1-roles"}, (40, 40, 1, 32), {"softcap": 2.0}
    ),
}
# Calls that results do not need, as far as the simulator can tell: (function, called, n).
NOT_NEEDED = {
    # They are there for the order in which the tile's buffers are given back not to matter.
    ("_make_produce.produce", "V.claim", 0): "K, claimed before, is given back after V",
    ("make_produce.produce_place", "DO.claim", 0): "Q, claimed before, is given back after dO",
    (
        "_make_consume.consume",
        "wait_for_dv",
        0,
    ): "only dO is given back between it and wait_for_dk",
    ("_make_own_dk.own_dk", "Q.wait", 0): "P, which is there, was made of this Q",
    ("make_run_block.run_block", "take_registers", 0): (
        "the simulator does not count the registers that a thread uses"
    ),
}
_OF_FEW = "dkdv-lanes", "dkdv-warps"
# What takes many seeds to show, and `test_broken_hopper_kernels` shows of the same channels.
DEAR = "cuda.syncwarp", "cuda.syncthreads"
# Those that the forward's tests break: these kernels have no use for them, or the same one.
_OF_FORWARD = ("make_channel.gather", "make_channel.skip")
_SYNCHRONISATION = (
    r"((OWNED|[QKVP]|DO|ROWS)\.)?(init|claim|expect|filled|wait|release)|init(_first|_others)?"
    r"|mbarrier_(wait_parity|arrive|arrive_expect_tx|init)|wait_for_\w+|fence_\w+"
    r"|give_\w+|take_(?!kept)\w+|cuda\.sync(threads|warp)"
)
# Releases of which the simulator cannot tell that they come a statement too early.
NEVER_TOO_EARLY = {
    ("_make_consume.consume", "ROWS.release", 0): "Q.release before it waits for nothing",
    ("_make_own_dv.own_dv", "DO.release", 0): (
        "the other warpgroup, which needs P first, releases it later: no warp falls so far behind"
    ),
    ("_make_own_dv.own_dv", "Q.release", 0): "DO.release before it waits for nothing",
    ("_make_own_dv.own_dv", "ROWS.release", 0): "Q.release before it waits for nothing",
    ("_make_own_dk.own_dk", "DO.release", 0): "Q.release before it waits for nothing",
    ("_make_own_dk.own_dk", "ROWS.release", 0): "DO.release before it waits for nothing",
    # Who fetches claims the K, or Q, of a stage first, which is given back last.
    ("_make_consume.consume", "V.release", 0): "K of the stage has not been released yet",
    ("_make_consume.consume", "DO.release", 0): "Q of the stage has not been released yet",
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


def break_kernels(part: str, fault, monkeypatch) -> None:
    """Let both kernels be made of a part with a fault."""
    load(
        [module_of(name) for name in CHAIN[CHAIN.index(part) :]],
        module_of(part),
        fault,
        monkeypatch,
    )


def _problems_of(part: str, fault) -> tuple[str, ...]:
    if fault.called == "cuda.syncwarp":
        return ("dkdv-lanes",)
    if part.endswith("dq"):
        return ("dq", "dq-slabs")
    if part.endswith(("dkdv", "queries")):
        return ("dkdv", "dkdv-slabs")
    if part.endswith("roles"):
        return ("roles", "roles-slabs")
    return tuple(name for name in PROBLEMS if name.startswith("d") and name not in _OF_FEW)


def faults_of_events() -> list:
    """(part, fault, problems): no wait, claim or fence may be missing, no release come early."""
    found = []
    for part in CHAIN:
        for fault in events(SOURCES[part], _SYNCHRONISATION):
            where = fault.function, fault.called, fault.n
            dear = not ALL and fault.called in DEAR
            if where not in NOT_NEEDED and fault.function not in _OF_FORWARD and not dear:
                found.append((part, fault, "no"))
        for fault in events(SOURCES[part], r"([QKV]|DO|ROWS)\.release", Early):
            if (fault.function, fault.called, fault.n) not in NEVER_TOO_EARLY:
                found.append((part, fault, "early"))
    return [
        pytest.param(part, fault, _problems_of(part, fault), id=f"{part}: {how} {fault}")
        for part, fault, how in found
    ]


IDEAS = """
queries  dkdv  statistics of other queries
    tile_m * stage + place_of_column(thread) -> tile_m * stage + thread
gradients  dq  lse of the other row  x2
    scale_log2, -lses[1])) -> scale_log2, -lses[0]))
backward_dkdv  dkdv  statistics of one stage
    i32(tile_m * stage + mov_tid_x() -> i32(mov_tid_x()
backward_dkdv  dkdv  rows of one warpgroup  x2
    0), group, group_step) -> 0), 0, group_step)
backward_dq  dq  rows of one warpgroup  x2
    0), group, group_step) -> 0), 0, group_step)
queries  dkdv-slabs  queries of the first head only  x2
    step, head, end = next_step(walk -> step, _, end = next_step(walk
scores  roles  edges are not masked
    if m_start < keys.whole.first or -> if m_start < keys.whole.first and
handover  roles  steps on top of each other
    first + _STEP_WORDS * step, p_packed -> first, p_packed
handover  roles-bent  steps of 32 bits on top of each other
    first + _STEP_WORDS * step, p_acc -> first, p_acc
handover  roles  halves exchanged
    words[i] >> u32(16) -> words[i] & u32(0xFFFF)
roles  roles  P of one stage  x2
    p_smem + p_words * stage) -> p_smem)
roles  roles  rows of the second warpgroup
    accumulator_row(MMA_ROWS) - rows_before -> accumulator_row(MMA_ROWS)
roles  roles  delta of another stage
    delta_smem + tile_m * stage + -> delta_smem + tile_m * (1 - stage) +
roles  roles-bent  P without slopes
    bend(s_acc, slopes) -> bend(slopes, slopes)
gradient_ring  dq-slabs  slabs on top of each other
    slab * rows * SLAB_WORDS -> slab * 0
gradient_ring  roles  operands of one stage
    advance(operand(start), stage, step) -> advance(operand(start), 0, step)
gradient_ring  dkdv  one stage
    first + stage * words -> first
gradient_ring  dkdv  channels on top of each other
    first + 2 + 2 * stages * i -> first + 2 + stages * i
gradient_ring  dkdv-warps  one warp stands for two
    config.assisting_threads // 32 -> 1
"""


def ideas() -> list:
    """(part, mutation, problems) of IDEAS."""
    parts = {part.rpartition("/")[2]: part for part in CHAIN}
    return [
        pytest.param(parts[part], mutation, (problem,), id=f"{part}: {mutation}")
        for part, problem, mutation in mutations(IDEAS)
    ]


@thorough
@pytest.mark.parametrize("name", some(PROBLEMS, "dq"))
def test_the_kernels_are_right(name, monkeypatch):
    for seed in SEEDS if ALL else SEEDS[:1]:
        assert PROBLEMS[name].is_solved(seed, monkeypatch)


@pytest.mark.parametrize(("part", "mutation", "problems"), faults_of_events())
def test_nothing_that_waits_can_be_left_out(part, mutation, problems, monkeypatch):
    break_kernels(part, mutation, monkeypatch)
    assert first_failure({name: PROBLEMS[name] for name in problems}, monkeypatch)


@pytest.mark.parametrize(("part", "mutation", "problems"), ideas())
def test_a_broken_kernel_is_caught(part, mutation, problems, monkeypatch):
    break_kernels(part, mutation, monkeypatch)
    assert first_failure({name: PROBLEMS[name] for name in problems}, monkeypatch)
