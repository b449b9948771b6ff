"""Hopper's one backward kernel with blocks that draw places: bits, few blocks, and faults.

Its results have the bits of the kernel whose blocks have a place each, however many blocks there
are and however many of them run at once.
"""

from dataclasses import replace

import numpy as np
import pytest

import numflash
from numflash.calls import ready
from numflash.calls.backward import Backward
from numflash.configs import Traits
from numflash.configs.wgmma_backward import Sm90BackwardConfig
from numflash.problem.options import AttentionOptions, GradientOptions
from numflash.runtime import driver
from numflash.runtime.views import fresh
from numflash.simulator import SEED
from tests.support.covering import ALL, some
from tests.support.faults import Early, Mutation, events, load, mutations, source_of
from tests.support.gradient_problems import GradientProblem, first_failure

SEEDS = range(12)


@pytest.fixture
def hopper(on, monkeypatch):
    """`hopper(n)`: a simulated Hopper of n SMs; results hold NaN before they are written."""

    def sized(num_sms: int) -> None:
        on("sm_90a")
        monkeypatch.setattr(driver, "multiprocessors", lambda device: (num_sms, 2**20))
        ready._ready.clear()

    return sized


def lengths() -> dict:
    """Sequences of which the second has no queries, and the third fewer keys than a tile."""
    ends = {"cu_seqlens_q": [0, 70, 70, 99], "cu_seqlens_k": [0, 190, 200, 240]}
    return {name: np.array(each, np.int32) for name, each in ends.items()}


MASK = np.array([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]], bool)
# Config, (seqlen_q, seqlen_k, heads, key-value heads, head_dim), options of `numflash.check`.
CASES = {
    "causal": ("m64n64w4s2", (130, 330, 2, 2, 32), {"causal": True}),
    "groups": ("m64n64w4s1", (70, 130, 4, 2, 32), {}),
    "stages": ("m64n64w4s3", (200, 200, 1, 1, 32), {"causal": True}),
    "rows": ("m128n128w8s2", (130, 300, 1, 1, 32), {}),
    "first of two": ("m64n128w8s2", (130, 300, 1, 1, 32), {"softcap": 3.0}),
    # Keys that no query sees, between others.
    "unseen": (
        "m64n64w4s2",
        (70, 330, 2, 1, 32),
        {"window_size": (20, 30), "causal_align": "top_left"},
    ),
    "sequences": ("m64n64w4s2", (99, 240, 2, 1, 32), lengths() | {"causal": True}),
    # With `MASK`, whose lists a kernel makes: not before a test runs.
    "blocks": ("m64n64w4s2", (190, 250, 1, 1, 32), {}),
}


def gradients(name: str, letters: str, seed: int, blocks: int, monkeypatch) -> list[bytes]:
    """dQ, dK and dV of a case, of statistics that no kernel has made."""
    config, (seqlen_q, seqlen_k, heads, heads_kv, head_dim), options = CASES[name]
    if name == "blocks":
        options = {"block_mask": numflash.BlockMask.from_tiles(MASK, block_size=64)}
    batch = () if name == "sequences" else (1,)
    rng = np.random.default_rng(3)
    q, dout, k, v = (
        rng.standard_normal((*batch, n, h, head_dim)).astype(np.float16)
        for n, h in ((seqlen_q, heads),) * 2 + ((seqlen_k, heads_kv),) * 2
    )
    out = rng.standard_normal(q.shape).astype(np.float16)
    lse = rng.standard_normal((*batch, heads, seqlen_q)).astype(np.float32) + 4
    monkeypatch.setattr(SEED, "value", seed)
    monkeypatch.setenv("NUMFLASH_SIM_BLOCKS", str(blocks))
    ready._ready.clear()
    configs = {"backward": f"sm90-{config}{letters}"}
    call = numflash.attention_varlen_backward if options.get("cu_seqlens_q") is not None else None
    call = call or numflash.attention_backward
    found = call(dout, q, k, v, out, lse, config=configs, **options)
    return [x.tobytes() for x in found]


@pytest.mark.parametrize("name", some(CASES, "unseen", "sequences"))
def test_bits_are_those_of_blocks_with_a_place_each(name, hopper, monkeypatch):
    hopper(132)
    expected = gradients(name, "", 0, 1, monkeypatch)
    ways = [(1, 1), (2, 2), (3, 1), (3, 2), (5, 5)]
    for number, (num_sms, blocks) in enumerate(ways if ALL else ways[1:2]):
        hopper(num_sms)
        for seed in range(3 if ALL else 1):
            found = gradients(name, "-persistent", 10 * number + seed, blocks, monkeypatch)
            assert found == expected, (num_sms, blocks, seed)


@pytest.mark.parametrize("num_sms", [1, 3, 132])
def test_no_more_blocks_begin_than_run_at_once(num_sms, hopper):
    hopper(num_sms)
    q, k = (fresh((1, n, 2, 64), "float16", 0) for n in (100, 260))
    views = {"q": q, "k": k, "v": k, "dout": q, "out": q}
    views["lse"] = fresh((1, 2, 100), "float32", 0)
    options = AttentionOptions(config={"backward": "sm90-m64n64w4s2-persistent"})
    made = Backward(views, options, GradientOptions())
    launcher = made._launchers["backward"]
    assert launcher._num_blocks == min(num_sms, 10)


def test_where_blocks_have_no_room_for_places_they_are_refused():
    with pytest.raises(ValueError, match="160 registers, one too few"):
        Sm90BackwardConfig.parse("sm90-m64n192w12s2-persistent")
    config, bent = Sm90BackwardConfig.parse("sm90-m64n128w8s2-persistent"), ("softcap",)
    assert config.misfit(Traits("bfloat16", 128, 128)) is None
    assert "leave room for places" in config.misfit(Traits("bfloat16", 128, 128, bent))
    assert config.misfit(Traits("bfloat16", 64, 64, bent)) is None
    reduction = config.reduction()
    assert str(reduction) == "sm90-m64n128w8s2"
    with pytest.raises(ValueError, match="converts one tile"):
        replace(reduction, persistent=True)


PROBLEM = GradientProblem(
    {"backward": "sm90-m64n64w4s2-persistent"}, (40, 250, 1, 32), {}, SEEDS, 2
)
# Places without queries between others.
UNSEEN = replace(
    PROBLEM,
    shape=(40, 330, 1, 32),
    options={"window_size": (20, 30), "causal_align": "top_left"},
)
PROBLEMS = {"places": PROBLEM, "unseen": UNSEEN}
CHAIN = "channels", "gradient_ring", "places", "add_dq", "queries", "backward"
IDEAS = """
places  places  the same place twice
    number = atom_inc_gpu_u32(turns, i64(0), u32(places + u32(mov_nctaid_x()) - u32(1))) -> number = u32(turn)
places  places  the counter counts on
    u32(places + u32(mov_nctaid_x()) - u32(1)) -> u32(places)
places  places  a number is taken before it is drawn
    PLACES.wait(barriers, 0, turn) -> PLACES.wait(barriers, 0, u32(turn ^ u32(1)))
places  places  K and V are not claimed
    PLACES.claim(barriers, 0, u32(turn ^ u32(1))) -> PLACES.claim(barriers, 0, u32(1))
places  places  phases that never change
    turn = u32(turn ^ u32(1)) -> turn = u32(turn)
places  unseen  the turn is not handed on
    st_shared_u32(smem, turn_at, turn) -> st_shared_u32(smem, turn_at, u32(0))
places  places  one more is to give back
    others, groups = config.assisting_threads // 32 + 1, -> others, groups = config.assisting_threads // 32 + 2,
queries  unseen  a place without queries has no phase
    OWNED.expect(barriers, 0, owned_bytes if num_steps > 0 else u32(0)) -> OWNED.expect(barriers, 0, owned_bytes)
backward  places  stages begin anew in each place
    return (number, stage, parity), drawn, turn -> return (i32(0), i32(0), u32(0)), drawn, turn
"""  # noqa: E501
# What is not here of `backward` is in `test_broken_hopper_fused`. Without PLACES.gather a lane may
# miss a number: in the simulator none falls so far behind, where lanes are apart only at waits.
_EVENTS = {
    "places": r"PLACES\.(claim|wait|release)|mbarrier_arrive",
    "add_dq": r"places\.give_back\w*",
    "queries": r"places\.give_back|OWNED\.\w+",
    "backward": r"places\.give_back\w*|OWNED\.\w+",
}


def faults_of_events() -> list:
    """(part, fault): no wait, claim or release of places may be missing.

    Nor may a warp give a number back before it has read it.
    """
    found = []
    for part, called in _EVENTS.items():
        source = source_of(f"numflash.kernels.wgmma.{part}")
        found += [(part, fault, "no") for fault in events(source, called)]
        found += [(part, fault, "early") for fault in events(source, r"places\.give_back", Early)]
    return [pytest.param(part, fault, id=f"{how} {fault}") for part, fault, how in found]


def ideas() -> list:
    """(part, mutation, problem) of IDEAS."""
    return [
        pytest.param(part, mutation, problem, id=f"{part}: {mutation}")
        for part, problem, mutation in mutations(IDEAS)
    ]


def break_kernels(part: str, fault, monkeypatch) -> None:
    """Let the kernels be made of a part with a fault."""
    chain = [f"numflash.kernels.wgmma.{name}" for name in CHAIN[CHAIN.index(part) :]]
    load(chain, f"numflash.kernels.wgmma.{part}", fault, monkeypatch)


@pytest.mark.parametrize("name", some(PROBLEMS, "places"))
def test_the_kernel_is_right(name, hopper, monkeypatch):
    hopper(2)
    for seed in SEEDS if ALL else SEEDS[:1]:
        assert PROBLEMS[name].is_solved(seed, monkeypatch)


@pytest.mark.parametrize(("part", "fault"), faults_of_events())
def test_nothing_that_waits_can_be_left_out(part, fault, hopper, monkeypatch):
    hopper(2)
    break_kernels(part, fault, monkeypatch)
    assert first_failure(PROBLEMS, monkeypatch)


@pytest.mark.parametrize(("part", "mutation", "problem"), ideas())
def test_a_broken_kernel_is_caught(part, mutation, problem, hopper, monkeypatch):
    hopper(2)
    break_kernels(part, mutation, monkeypatch)
    assert first_failure({problem: PROBLEMS[problem]}, monkeypatch)


def test_k_and_v_that_are_given_back_early_are_overwritten(hopper, monkeypatch):
    hopper(2)
    source = source_of("numflash.kernels.wgmma.backward")
    first = source.index("        first_tile(arrays, ")
    last = source.index("        if adds:", first)
    tiles, back = source[first:last], "        places.give_back(barriers)\n"
    assert tiles.endswith(back)
    reads = tiles.index("        drawn, turn = ")
    early = tiles[reads:] + tiles[:reads]
    break_kernels("backward", Mutation("early", tiles, early), monkeypatch)
    assert first_failure(PROBLEMS, monkeypatch)


def test_the_counter_and_all_turns_are_0_again(hopper, monkeypatch):
    """Kernels that are timed are launched again without what clears their workspaces."""
    hopper(2)
    bind, turns = Backward.bind, []

    def bound(self, operands, library):
        results, launches = bind(self, operands, library)
        turns.append(launches["fill turns"]._operand.array)
        for again in range(2):
            launches[f"backward {again}"] = launches["backward"]
        return results, launches

    expected = gradients("unseen", "-persistent", 0, 2, monkeypatch)
    monkeypatch.setattr(Backward, "bind", bound)
    assert gradients("unseen", "-persistent", 1, 2, monkeypatch) == expected
    # A counter that is too large leaves results as they are: blocks find no places.
    assert len(turns) == 1 and not turns[0].any()
