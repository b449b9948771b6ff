"""The Hopper forward broken on purpose: every wait, barrier and fence is needed, and every idea.

As `test_broken_kernels`: a mutation replaces a piece of source text, and the kernel must then give
a wrong result, or an error of the simulator, for at least one problem and seed. Errors of Python
do not count: they would say that the mutation is wrong, not the kernel.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

import numflash
from numflash.calls import forward as calls
from numflash.calls import ready
from numflash.configs import parse_config
from numflash.kernels import wgmma
from numflash.runtime.driver import limits_of_device
from numflash.simulator import SEED, warpgroup
from numflash.simulator.errors import DeadlockError, SimulationError
from tests.support.faults import Dropped, Mutation, events, load, source_of

SEEDS = range(8)
# In the order of imports: what is mutated is in all that follow.
CHAIN = (
    "tiles/blocks",
    "tiles/wgmma/turns",
    "tiles/wgmma/products",
    "tiles/wgmma/results",
    "tiles/mma/softmax",
    "tiles/wgmma/softmax",
    "kernels/wgmma/ring",
    "kernels/wgmma/producer",
    "kernels/wgmma/finish",
    "kernels/wgmma/forward",
)


@dataclass(frozen=True)
class Problem:
    """What a kernel must solve: a config and sizes that need what was taken away.

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
        return numflash.check(q, k, v, config=f"sm90-{self.config}", **self.options).passed


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
    "split": Problem("m64n16w4s2x2-persistent", 70, 60, options=_CAUSAL),
    # A warpgroup that passes many tiles of keys by, with nothing else to hold its warps together.
    "bypassed": Problem("m128n16w8s1", 100, 112, options=_CAUSAL, seeds=range(40)),
}
# What one thread does for its warpgroup, where products hold warps together.
PROBLEMS |= {f"{n} for one": PROBLEMS[n].with_one_arrival(False) for n in ("empty", "bypassed")}
USUAL = ("persistent", "overlap", "turns")
ALL = (*USUAL, "shared", "split", "empty")
# What may be left out as far as results go, and the simulator can tell: (function, called, n).
NOT_NEEDED = {
    ("make_pass_by.pass_by", "mbarrier_wait_parity", 0): (
        "the producer fetches this K before the V that was waited for last"
    ),
    ("make_turns.take_turn", "bar_sync", 0): "turns are for speed",
    ("make_pass_by.pass_by", "take_turn", 0): "turns are for speed",
    **{("make_forward_kernel.forward", "take_turn", n): "turns are for speed" for n in range(3)},
    ("make_forward_kernel.forward", "take_registers", 0): (
        "the simulator does not count the registers that a thread uses"
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
    monkeypatch.setitem(wgmma.FACTORIES, "forward", changed.make_forward_kernel)


def first_failure(problems, monkeypatch) -> str | None:
    """How the kernel fails, for the first of the problems and seeds."""
    for name in problems:
        problem = PROBLEMS[name]
        for seed in problem.seeds:
            monkeypatch.setattr(SEED, "value", seed)
            monkeypatch.setattr(warpgroup, "WARPS_APART", problem.apart)
            try:
                if not problem.is_solved():
                    return f"{name}: wrong result with seed {seed}"
            except (SimulationError, DeadlockError) as error:
                return f"{name}: {type(error).__name__} with seed {seed}: {error}"
    return None


_SYNCHRONISATION = (
    r"mbarrier_(wait_parity|arrive|arrive_expect_tx|init)|wait_for_\w+|bar_sync|bar_arrive|meet|gather"
    r"|cp_async_bulk_(wait_group_read|commit_group)|fence_\w+|wgmma_(fence|commit_group)"
    r"|give_\w+|take_\w+|pass_turn|cuda\.sync(threads|warp)"
)


_FORWARD, _PRODUCER, _RING, _FINISH = (
    f"kernels/wgmma/{name}" for name in ("forward", "producer", "ring", "finish")
)
_PRODUCTS, _RESULTS, _SOFTMAX, _TURNS = (
    f"tiles/wgmma/{name}" for name in ("products", "results", "softmax", "turns")
)
_ROWS = "tiles/mma/softmax"


def _problems_for(part: str, fault: Dropped) -> tuple[str, ...]:
    """What shall show that a call is missing: first that for which it is there."""
    called, context = fault.called, fault.before(SOURCES[part], 4)
    if called == "gather":
        return ("bypassed",) if part == _RING else ("empty",)
    if part == _TURNS and called in ("meet", "cuda.syncwarp"):
        one = " for one" * (called == "meet")
        return (f"empty{one}", f"bypassed{one}")
    if "o_replaces_q and leads" in context:
        return ("shared",)
    if part == _RING and called not in ("mbarrier_init", "fence_mbarrier_init"):
        return ("overlap", "turns")  # passing tiles of keys by
    without_overlap = "not overlap" in context or "else:" in context
    return tuple(dict.fromkeys(("turns", *ALL))) if without_overlap else ALL


def synchronisations() -> list:
    """(part, fault, problems) that leaves out one wait, barrier or fence, for each of them."""
    found = []
    for part in CHAIN:
        for fault in events(SOURCES[part], _SYNCHRONISATION):
            of_8_bits = fault.function.startswith("make_product_pt.")
            if of_8_bits or (fault.function, fault.called, fault.n) in NOT_NEEDED:
                continue
            name = f"{part}: no {fault}"
            found.append(pytest.param(part, fault, _problems_for(part, fault), id=name))
    return found


_P, _O, _T, _S, _C = ("persistent",), ("overlap",), ("turns",), ("shared",), ("slabs",)
_ARRIVE_K = """                if gives_back():
                    mbarrier_arrive(barriers, k_empty + stage)
"""
_ARRIVE_V_STAGE = """                        if gives_back():
                            mbarrier_arrive(barriers, v_empty + v_stage)
"""


_WAIT_FOR_O = "                        wait_for_o(o_acc)\n"


def _early(wait: str, arrive: str, rest: str = "") -> tuple[str, str]:
    """A buffer is given back before the wait for those who read it."""
    return wait + arrive + rest, arrive + wait + rest


# (part, problems, name, old, new[, times]): one for each idea that the kernel could get wrong.
IDEAS = [
    # Phases and buffers
    (
        _FORWARD,
        _P,
        "the first K given back early",
        *_early("                wait_for_s(s_acc)\n", _ARRIVE_K),
    ),
    (
        _FORWARD,
        _P,
        "V given back early with overlap",
        *_early(_WAIT_FOR_O, _ARRIVE_V_STAGE, " " * 20 + "pack_p"),
    ),
    (
        _FORWARD,
        _T,
        "V given back early without overlap",
        *_early(_WAIT_FOR_O, _ARRIVE_V_STAGE, " " * 24 + "mbarrier_wait_parity"),
    ),
    (
        _FORWARD,
        _P,
        "Q given back before it was read",
        "            q_parity = u32(q_parity ^ u32(1))\n",
        """            q_parity = u32(q_parity ^ u32(1))
            if gives_back():
                mbarrier_arrive(barriers, q_empty + group)
""",
    ),
    (
        _FORWARD,
        _P,
        "the first phase of K",
        "stage, parity, q_parity = i32(0), u32(0)",
        "stage, parity, q_parity = i32(0), u32(1)",
    ),
    (_FORWARD, _P, "the phase of the next Q", "q_parity = u32(q_parity ^ u32(1))", "pass"),
    (
        _FORWARD,
        _P,
        "the phase of V",
        "v_stage, v_parity = stage, parity",
        "v_stage, v_parity = stage, u32(parity ^ u32(1))",
    ),
    (
        _FORWARD,
        _P,
        "the stage of V",
        "v_stage, v_parity = stage, parity",
        "v_stage, v_parity = next_stage(stage, parity)",
    ),
    (
        _PRODUCER,
        _P,
        "the first phase of an empty buffer",
        "i32(0), u32(1), u32(1)",
        "i32(0), u32(0), u32(1)",
    ),
    (_PRODUCER, _P, "the phase of an empty Q", "q_parity = u32(q_parity ^ u32(1))", "pass"),
    (_RING, _P, "phases that never change", "u32(parity ^ u32(last))", "u32(parity)"),
    (_RING, _P, "phases that change too often", "u32(parity ^ u32(last))", "u32(parity ^ u32(1))"),
    (_RING, _P, "one buffer of two", "i32(0) if last else i32(stage + 1)", "i32(0)"),
    (
        _RING,
        _O,
        "one warpgroup empties K",
        "mbarrier_init(barriers, k_empty + stage, arrivals)",
        "mbarrier_init(barriers, k_empty + stage, ring.arrivals)",
    ),
    (
        _RING,
        _P,
        "one warp empties K",
        "mbarrier_init(barriers, k_empty + stage, arrivals)",
        "mbarrier_init(barriers, k_empty + stage, 1)",
    ),
    (
        _RING,
        ("split",),
        "one thread gives back a Q that each warp has read",
        "o_replaces_q=config.num_splits == 1 and not apart",
        "o_replaces_q=not apart",
    ),
    (
        _RING,
        _O,
        "all threads fill K",
        "mbarrier_init(barriers, k_full + stage, 1)",
        "mbarrier_init(barriers, k_full + stage, 2)",
    ),
    (_RING, _P, "mbarriers on top of each other", "v_full=k_full + 2 * stages", "v_full=k_full"),
    (_TURNS, _S, "all threads lead", "return mov_tid_x() % _WARPGROUP == 0", "return True"),
    (_TURNS, _P, "all threads give back", "return mov_tid_x() % threads == 0", "return True"),
    (
        _TURNS,
        _O,
        "one warpgroup gives back",
        "return mov_tid_x() % threads == 0",
        "return mov_tid_x() < _WARPGROUP and mov_tid_x() % threads == 0",
    ),
    (
        _TURNS,
        _P,
        "the first warp gives back for all",
        "return mov_tid_x() % threads == 0",
        "return mov_tid_x() % _WARPGROUP < arrivals",
    ),
    (
        _FORWARD,
        _P,
        "four warps fetch",
        "if mov_tid_x() < num_consumers + 32 and elect_sync() != 0",
        "if elect_sync() != 0",
    ),
    (_FORWARD, _P, "the warp that fetches does it with all lanes", " and elect_sync() != 0", ""),
    (
        _FORWARD,
        _S,
        "Q on top of O",
        "if o_replaces_q and leads():",
        "if o_replaces_q and leads() and False:",
    ),
    # Bytes and addresses
    (
        _PRODUCER,
        _P,
        "too few bytes of Q",
        "u32(ring.q_bytes), u32",
        "u32(ring.q_bytes - 128), u32",
    ),
    (
        _PRODUCER,
        _P,
        "too many bytes of K",
        "u32(ring.k_bytes), u32",
        "u32(ring.k_bytes + 128), u32",
    ),
    (_PRODUCER, _P, "too few bytes of V", "u32(ring.v_bytes)", "u32(ring.v_bytes // 2)"),
    (
        _RING,
        _P,
        "bytes of K without its second slab",
        "k_bytes=4 * k_words",
        "k_bytes=2 * k_words",
    ),
    (_PRODUCER, _C, "slabs of K on top of each other", "slab * stage_n * SLAB_WORDS", "slab * 0"),
    (_PRODUCER, _C, "slabs of V on top of each other", "slab * v_slab_words", "slab * 0"),
    (
        _PRODUCER,
        _C,
        "slabs of Q too close",
        "slab * WARPGROUP_ROWS * SLAB_WORDS",
        "slab * 32 * SLAB_WORDS",
    ),
    (_PRODUCER, _P, "K of one stage", "i32(k + stage * k_words", "i32(k + 0 * k_words"),
    (_PRODUCER, _P, "V of one stage", "i32(v + stage * v_words", "i32(v + 0 * v_words"),
    (_PRODUCER, _O, "Q of one warpgroup", "i32(q + group * q_words", "i32(q + 0 * q_words"),
    (_PRODUCER, _O, "rows of one warpgroup", " + group * tokens", ""),
    (
        _PRODUCER,
        _C,
        "K and V of another head",
        "head_kv = token_of_row(head, shape.group_size)",
        "head_kv = head",
    ),
    (
        _PRODUCER,
        _P,
        "keys from the first on",
        "i32(n * stage_n), k_full",
        "i32(0 * stage_n), k_full",
    ),
    (
        _FORWARD,
        _P,
        "the step of the stages of K",
        "q_step, k_step, v_step = ring.q_words >> 2, ring.k_words >> 2",
        "q_step, k_step, v_step = ring.q_words >> 2, ring.k_words >> 3",
    ),
    (_FORWARD, _P, "the step of the stages of V", "ring.v_words >> 2", "0"),
    (
        _FORWARD,
        _O,
        "the step of the warpgroups' Q",
        "q_step, k_step, v_step = ring.q_words >> 2",
        "q_step, k_step, v_step = 0",
    ),
    (
        _PRODUCTS,
        _P,
        "the step of a descriptor",
        "step % _STEPS_PER_SLAB * (_STEP_BYTES >> 4)",
        "step % _STEPS_PER_SLAB * (_STEP_BYTES >> 3)",
        2,
    ),
    (_PRODUCTS, _C, "the second slab of A", "a_slab * slab + within", "within"),
    (
        _PRODUCTS,
        _C,
        "the second slab of B",
        "_descriptor(b, b_slab * slab + within)",
        "_descriptor(b, within)",
        2,
    ),
    (_PRODUCTS, _C, "rows of V", "step * (step_bytes >> 4)", "step * (step_bytes >> 5)"),
    (_PRODUCTS, _P, "no swizzle in descriptors", "| 1 << 62", "| 0 << 62"),
    (
        _PRODUCTS,
        _P,
        "rows that are too close",
        "_GROUP_BYTES >> 4 << 32",
        "_GROUP_BYTES >> 5 << 32",
    ),
    (_PRODUCTS, _C, "the next slab of V", "slab_bytes >> 4 << 16", "slab_bytes >> 5 << 16"),
    # Numbers
    (
        _PRODUCTS,
        _P,
        "S on top of the last S",
        "accumulates=more, in_place=more",
        "accumulates=True, in_place=True",
    ),
    (_PRODUCTS, _P, "rows of P changed over", "p_frag[2 * tile + 1] =", "p_frag[2 * tile ^ 3] ="),
    (
        _PRODUCTS,
        _P,
        "columns of P changed over",
        "pack_two(s_acc[4 * tile], s_acc[4 * tile + 1])",
        "pack_two(s_acc[4 * tile + 1], s_acc[4 * tile])",
    ),
    (
        _FORWARD,
        _P,
        "O not rescaled",
        "                        scale_rows(o_acc, factors)",
        "                        pass",
    ),
    (
        _FORWARD,
        (*_P, *_O, *_T),
        "O rescaled twice",
        "                        scale_rows(o_acc, factors)",
        "                        scale_rows(o_acc, factors)\n" * 2,
    ),
    (
        _FORWARD,
        _P,
        "O of the tile before",
        "                o_acc[i] = f32(0)",
        "                pass",
    ),
    (
        _SOFTMAX,
        _P,
        "maxima of the tile before",
        "row_max[r], limits[r] = NEG_INF, NEG_INF",
        "pass",
    ),
    (_SOFTMAX, _P, "sums of the tile before", "row_sum[r], shifts[r] = f32(0), f32(0)", "pass"),
    (_ROWS, _P, "sums that are not rescaled", "row_sum[r] *= factors[r]", "pass"),
    (_ROWS, _P, "a maximum that never moves", "row_max[r] = new_max\n", "pass\n"),
    (_ROWS, _P, "factors of rows changed over", "factors[r] = ex2", "factors[1 - r] = ex2"),
    (_ROWS, _P, "rows without keys", "shift if abs(shift) <= HUGE else f32(0)", "shift"),
    # Results
    (_RESULTS, _P, "results that are not swizzled", " ^ (row % 8)", ""),
    (_RESULTS, _P, "half of the swizzle", " ^ (row % 8)", " ^ (row % 4)"),
    (_RESULTS, _P, "chunks of lanes", "thread % 32 // 16", "thread % 16 // 8"),
    (_RESULTS, _P, "rows of warps", "thread // 32 % 4 * 16", "thread // 32 % 2 * 16"),
    (_RESULTS, _C, "one slab of results", "block // _BLOCKS_PER_SLAB * _ROWS * _SLAB_WORDS", "0"),
    (_RESULTS, _C, "columns of the second slab", "i32(slab * 64)", "i32(slab * 32)"),
    (_FINISH, _O, "rows of one warpgroup", "m_start + WARPGROUP_ROWS * group", "m_start"),
    (
        _FINISH,
        ("overlap", "turns"),
        "results on top of each other",
        "o_smem + o_words * group",
        "o_smem",
    ),
    (_ROWS, _P, "lse in base 2", "max_scale, LN_2,", "max_scale, f32(1),"),
    (_FINISH, _P, "rows without keys", "if total != f32(0) else f32(0)", ""),
    # Who waits for whom
    (
        _TURNS,
        _O,
        "a turn for oneself",
        "following = 0 if group == last else group + 1",
        "following = group",
    ),
    (
        _TURNS,
        _O,
        "turns and meetings in one place",
        "_FIRST_MEETING = 1, 4",
        "_FIRST_MEETING = 1, 1",
    ),
    (
        _RING,
        _O,
        "more registers than there are",
        '"inc", many',
        '"inc", many + 8',
    ),
    (
        _RING,
        _O,
        "all registers kept",
        '"dec", few',
        '"dec", few + 128',
    ),
]


def ideas() -> list:
    """IDEAS as parameters of a test."""
    found = []
    for part, problems, name, old, new, *times in IDEAS:
        title = f"{part.rpartition('/')[2]}: {name}"
        found.append(pytest.param(part, Mutation(title, old, new, *times), problems, id=title))
    return found


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_kernel_is_right(name, monkeypatch):
    monkeypatch.setitem(PROBLEMS, name, replace(PROBLEMS[name], seeds=range(1)))
    assert first_failure([name], monkeypatch) is None


@pytest.mark.parametrize(("part", "mutation", "problems"), synchronisations())
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
    tensor_maps = calls.Forward._tensor_maps

    def mutated(self, *about):
        maps = tensor_maps(self, *about)
        mapped = maps[name]
        return maps | {name: mapped._replace(layout=replace(mapped.layout, swizzle_bytes=0))}

    monkeypatch.setattr(calls.Forward, "_tensor_maps", mutated)
    assert first_failure(_P, monkeypatch)


@pytest.mark.parametrize("name", ALL)
def test_one_arrival_takes_products_to_be_over_for_all_warps_at_once(name, monkeypatch):
    """Right if that is so; and if each warp has its own, as the PTX ISA says, it is found out."""
    for apart, seeds in ((False, range(2)), (True, SEEDS)):
        monkeypatch.setitem(PROBLEMS, name, PROBLEMS[name].with_one_arrival(apart))
        monkeypatch.setitem(PROBLEMS, name, replace(PROBLEMS[name], seeds=seeds))
        failure = first_failure([name], monkeypatch)
        assert bool(failure) == apart, failure
