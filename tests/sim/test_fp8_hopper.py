"""The Hopper forward on 8-bit floats in the simulator, by the rules of `test_fp8_attention`.

Cases of other kernels for 8-bit floats on small configs in turn, cases with several of Hopper's
larger tiles, and kernels that are broken on purpose.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

import numflash
from numflash.calls import ready
from numflash.configs import parse_config
from numflash.kernels.wgmma import fp8_forward
from numflash.problem.fp8 import Fp8Recipe
from numflash.runtime import driver
from numflash.runtime.driver import limits_of_device
from numflash.selection import choice as selection
from numflash.simulator import SEED, warpgroup
from tests.sim.test_broken_kernels import first_failure
from tests.sim.test_fp8_attention import (
    SORTS,
    TURNS,
    Fp8Call,
    differences,
    fp8_array,
    make_call,
    quantized,
    run,
    tile_n_of,
    tokens_per_scale,
)
from tests.support.attention_cases import SIM_CASES, AttentionCase, is_of_masks, on_fp8
from tests.support.covering import FULL, some, thorough
from tests.support.faults import Early, events, load, mutations, source_of

KERNEL, TILES = "numflash.kernels.wgmma.fp8_forward", "numflash.tiles.wgmma"
SMALL = (
    "fp8-sm90-m64n128w4s2-overlap-persistent",
    "fp8-sm90-m64n64w4s2",
    "fp8-sm90-m64n128w4s1",
    "fp8-sm90-m64n64w4s1x2-packed-persistent",
    "fp8-sm90-m64n128w4s3-l128-overlap-fixed",
    "fp8-sm90-m128n64w8s2-pingpong-persistent",
    "fp8-sm90-m64n128w4s2x3-overlap",
    "fp8-sm90-m128n128w8s2-overlap-pingpong-persistent",
    "fp8-sm90-m64n256w4s1b2",
)
# One scale for all keys of a tile, whatever the config.
RECIPES = (
    Fp8Recipe(),
    Fp8Recipe("head", seed=7),
    Fp8Recipe("block", 256, hadamard=False),
    Fp8Recipe("tensor", hadamard=False),
)
HALVES = (Fp8Recipe("block", 64, seed=3), *RECIPES)
WIDEST = (RECIPES[1], *RECIPES[2:])


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """A simulated GPU that is a Hopper."""
    monkeypatch.setenv("NUMFLASH_SIM_ARCH", "sm_90a")
    monkeypatch.setattr(ready, "_ready", {})
    limits_of_device.cache_clear()
    yield
    limits_of_device.cache_clear()


def call_of(case: AttentionCase, sort: str, number: int, config: str) -> Fp8Call:
    """As `make_call`, with scales that the config can take."""
    recipes = {64: HALVES, 128: RECIPES, 256: WIDEST}[tile_n_of(config)]
    return make_call(case, sort, number, recipes=recipes)


def _storable(case: AttentionCase) -> AttentionCase:
    """The case, with rows of the result that are multiples of 16 bytes."""
    *rest, head_dim_v = case.shape
    return replace(case, shape=(*rest, -(-head_dim_v // 8) * 8))


def _small():
    """(case, sort, config): configs and sorts in turn, of the cases some; or all of them."""
    cases = [_storable(case) for case in on_fp8(SIM_CASES)]
    if FULL:
        return [
            (case, sort, config) for case in cases for sort in SORTS for config in _small_of(case)
        ]
    masks = [case for case in cases if is_of_masks(case)][::9]
    cases = [*masks, *(case for case in cases if not is_of_masks(case))]
    cases = list({case.name: case for case in cases if case.name != "67"}.values())[::2]
    found = []
    for i, case in enumerate(cases):
        configs = _small_of(case)
        found.append((case, TURNS[i % len(TURNS)], configs[i % len(configs)]))
    return found


def _small_of(case) -> list[str]:
    """The small configs that a case can run.

    Heads with slopes of their own cannot be packed, nor groups that do not divide 64 rows.
    """
    *_, heads, heads_kv, _, _ = case.shape
    can_pack = "alibi_slopes" not in case.options and 64 % (heads // heads_kv) == 0
    return [x for x in SMALL if can_pack or "packed" not in x]


def _large():
    """(case, sort, config): several tiles of rows and of keys."""
    causal, window = {"causal": True}, {"window_size": (150, 40)}
    table = (
        ((1, 100, 270, 1, 1, 64, 64), "overlap-pingpong", "m128n128w8s2", causal),
        ((1, 140, 270, 1, 1, 128, 128), "overlap-pingpong-persistent", "m128n128w8s2", causal),
        ((1, 70, 280, 1, 1, 128, 128), "pingpong-persistent", "m128n128w8s2", {"softcap": 3.0}),
        ((1, 130, 260, 1, 1, 192, 128), "overlap-persistent", "m128n128w8s1", window),
        ((1, 70, 260, 1, 1, 256, 256), "pingpong-persistent", "m128n64w8s2", causal),
        ((1, 70, 200, 1, 1, 128, 256), "persistent", "m64n64w4s3", {"softcap": 2.0, **causal}),
        ((1, 200, 150, 1, 1, 64, 128), "persistent", "m192n128w12s2", window),
        ((1, 150, 270, 1, 1, 64, 64), "overlap-pingpong", "m192n128w12s3", causal),
        ((1, 9, 400, 4, 1, 64, 64), "packed-overlap", "m64n128w4s2x3", causal),
        ((1, 17, 300, 2, 1, 64, 64), "unpacked-overlap", "m64n128w4s2x2", window),
        ((1, 70, 300, 2, 1, 64, 64), "persistent", "m64n256w4s2", {"alibi_slopes": (2,)}),
        ((1, 150, 270, 1, 1, 64, 64), "c2-overlap-persistent", "m64n128w4s2", causal),
        ((1, 150, 280, 1, 1, 128, 256), "c2", "m64n256w4s1", window),
    )
    for i, (shape, switches, tile, options) in enumerate(table):
        dtype = ("float16", "bfloat16")[i % 2]
        case = AttentionCase(f"d{shape[5]}-{shape[1]}x{shape[2]}", shape, dtype, options=options)
        yield case, ("codes", "arrays")[i % 2], f"fp8-sm90-{tile}-{switches}"


def _cases():
    chosen = [*some(_small(), every=9), *some(_large(), every=14)]
    return [pytest.param(*each, i, id="-".join(map(str, each))) for i, each in enumerate(chosen)]


@pytest.mark.parametrize(("case", "sort", "config", "number"), _cases())
def test_results_are_those_of_the_specification(case, sort, config, number, monkeypatch):
    monkeypatch.setattr(SEED, "value", number)
    call = call_of(case, sort, number, config)
    assert differences(*run(call, config), call, tile_n_of(config)) == []


BLOCKS = [
    (config, blocks)
    for config in ("m64n128w4s2-overlap-persistent", "m128n64w8s1-pingpong-persistent")
    for blocks in (1, 3)
]


@thorough
@pytest.mark.parametrize(("config", "blocks"), some(BLOCKS, BLOCKS[2]))
def test_blocks_take_several_tiles_of_rows(config, blocks, monkeypatch):
    """Of which some see no key: the first rows of these."""
    monkeypatch.setattr(driver, "multiprocessors", lambda device: (blocks, 2**20))
    monkeypatch.setattr(selection, "resident_blocks", lambda *about: 1)
    shape, config = (1, 300, 150, 2, 1, 64, 64), f"fp8-sm90-{config}"
    call = call_of(AttentionCase("rows", shape, options={"causal": True}), "codes", 1, config)
    out, lse = run(call, config)
    assert (out[0, :150] == 0).all() and (lse[0, :, :150] == -np.inf).all()
    assert differences(out, lse, call, tile_n_of(config)) == []


@thorough
def test_no_order_of_threads_changes_a_bit(monkeypatch):
    config, found = "fp8-sm90-m128n128w8s2-overlap-pingpong-persistent", set()
    call = call_of(AttentionCase("p", (1, 70, 140, 1, 1, 64, 64), "float16"), "arrays", 2, config)
    for seed in range(2):
        monkeypatch.setattr(SEED, "value", seed)
        found.add(tuple(x.tobytes() for x in run(call, config)))
    assert len(found) == 1


@pytest.mark.usefixtures("shipped_kernels")
@pytest.mark.parametrize("sort", some(SORTS, "arrays"))
def test_by_itself_a_hopper_takes_it(sort):
    """Through dispatch, without a config: more rows than the smaller kernels are for."""
    options, shape = {"causal": True}, (1, 130, 140, 1, 1, 80, 48)
    case = AttentionCase("by-itself", shape, "float16", options=options)
    call = make_call(case, sort, 0, recipes=RECIPES)
    everything = {**call.arguments, **call.options}
    chosen = numflash.explain_dispatch(**everything).forward.config
    assert str(chosen).startswith("fp8-sm90-m128n128")
    out, lse = numflash.attention(**everything, return_lse=True)
    assert differences(out, lse, call, 128) == []


@thorough
def test_codes_that_lie_apart_are_read_where_they_lie():
    """Slices along every axis, and heads before tokens."""
    case = AttentionCase("apart", (2, 70, 140, 2, 2, 64, 64), options={"layout": "bhsd"})
    call = make_call(case, "codes", 0)
    arguments = dict(call.arguments)
    for name in "qk":
        codes = arguments[name]
        whole = np.full((2, *codes.shape[:1], 3, *codes.shape[1:3], 128), 0x7F, np.uint8)
        part = whole[1, :, 1, :, :, 64:]
        part[...] = codes.view(np.uint8)
        arguments[name] = part
    call = replace(call, arguments=arguments)
    assert differences(*run(call, SMALL[0]), call, 128) == []


# Broken kernels

PLAIN = "fp8-sm90-m64n64w4s2"
OVERLAP = "fp8-sm90-m64n128w4s2-overlap"
WIDE = "fp8-sm90-m64n64w4s1-persistent"  # with head_dim_v 256: O in parts
TURNING = "fp8-sm90-m128n128w8s2-overlap-pingpong"
TURNS_ALONE = "fp8-sm90-m128n64w8s2-pingpong"


@cache
def problem(config: str) -> Fp8Call:
    """Tokens of Q with scales of their own; maxima, values and scales change along the keys."""
    head_dim_v, tile_n = (256 if config == WIDE else 64), tile_n_of(config)
    # Two tiles of rows: with one nothing shows that V is released too early.
    rows = 60 if config == PLAIN else 70
    rng, keys = np.random.default_rng(0), 3 * tile_n + 10
    shapes = (rows, 1, 64), (keys, 1, 64), (keys, 1, head_dim_v)
    q, k, v = (rng.standard_normal((1, *shape)).astype(np.float16) for shape in shapes)
    q *= np.linspace(1, 4, rows, dtype=np.float16)[:, None, None]
    k *= (1 + 3 * np.sin(np.linspace(0, 4, keys))).astype(np.float16)[:, None, None]
    v *= np.linspace(4, 0.5, keys).astype(np.float16)[:, None, None]
    v += np.float16(1)
    arrays, recipe = {"q": q, "k": k, "v": v}, Fp8Recipe("block", tile_n, hadamard=False)
    recipes = {"q": Fp8Recipe("token", hadamard=False), "k": recipe, "v": recipe}
    made = {n: fp8_array(x, recipes[n], "bshd", n == "v") for n, x in arrays.items()}
    codes, descales = zip(
        *(quantized(x, recipes[n], "bshd") for n, x in arrays.items()), strict=True
    )
    options = {"softmax_scale": 0.125, "causal": True}
    blocks = tuple(tokens_per_scale(r) for r in recipes.values())
    return Fp8Call(made, options, codes, descales, blocks, head_dim_v)


def first_failure_of(monkeypatch, config, module=None, fault=None, seeds=range(3)):
    """The failure of the kernel with a fault in `module` with a config; None if it is right."""
    if fault is not None:
        changed = load((module, KERNEL), module, fault, monkeypatch)
        monkeypatch.setattr(
            fp8_forward, "make_fp8_forward_kernel", changed.make_fp8_forward_kernel
        )

    return first_failure(lambda: is_right(config, config), monkeypatch, seeds)


def is_right(config: str, of_problem: str) -> bool:
    """Whether a config solves the problem for another, or its own."""
    ready._ready.clear()
    call = problem(of_problem)
    return not differences(*run(call, config), call, tile_n_of(config))


# The configs that show that an event is missing, (called, n); `OVERLAP` shows the others.
SHOWN_BY = {
    ("K.wait", 2): PLAIN,
    ("wait_for_s", 1): PLAIN,
    # Buffers must be filled twice, the last in another tile of rows.
    ("V.release", 0): WIDE,
    ("V.release", 2): WIDE,
    ("pass_turn", 0): TURNING,
    ("pass_turn", 1): TURNING,
    ("pass_turn", 2): TURNS_ALONE,
}
IDEAS = """
fp8  PLAIN  P in the order of tokens
    s_acc[i + 1], s_acc[i + 4], s_acc[i + 5]) -> s_acc[i + 4], s_acc[i + 1], s_acc[i + 5])
fp8  PLAIN  rows of P changed over
    p_frag[2 * half + 1] = -> p_frag[3 - 2 * half] =
fp8  PLAIN  weights of the other row
    part[i + 2], weights[1] -> part[i + 2], weights[0]
fp8  PLAIN  weights forgotten
    part[i], weights[0] -> part[i], f32(1)
fp8  PLAIN  P of at most one
    = shift_of_row(top_above -> = P_SCALE_LOG2 + shift_of_row(top_above
fp8  PLAIN  sums in units of a tile
    (sum_above, weights[0] -> (sum_above, f32(1)
fp8  OVERLAP  a unit that never moves
    limits[r], units[r] = limit -> limits[r], limits[r] = limit
fp8_forward  WIDE  parts in one place
    n_part * part, part_acc -> 0, part_acc
fp8_forward  WIDE  columns of the first part
    products.behind(v_operand, part * part_step) -> v_operand
fp8_forward  PLAIN  the first tile of K of a stage
    tile, k_tile_step) -> tile, 0)
fp8_forward  PLAIN  the first tile of V of a stage
    tile, v_tile_step) -> tile, 0)
fp8_forward  OVERLAP  the first stage of K
    products.advance(k, stage, k_step) -> k
fp8_forward  OVERLAP  the first stage of V
    products.advance(v, stage, v_step) -> v
fp8_forward  TURNING  rows of the first warpgroup
    group_of_thread(), q_step) -> 0, q_step)
fp8_forward  OVERLAP  weights of the next tile
    add_part(o_acc, 0, part_acc, weights) -> add_part(o_acc, 0, part_acc, next_weights)
fp8_forward  OVERLAP  V of the stage of K
    v_of(at.v, v_stage, v_tile)) -> v_of(at.v, stage, tile))
fp8_forward  PLAIN  the scale of V forgotten
    weights[0], weights[1] = weights[0] * v_scale, weights[1] * v_scale -> pass
fp8_forward  PLAIN  a scale of Q for all rows
    (token >> descales.q.shift) -> 0
fp8_forward  PLAIN  a scale of K for all keys
    scale_of_key(descales.k, known.k_first, key) -> descales.k.data[known.k_first]
"""


def faults() -> list:
    """(module, config, fault): of each event of `attend` that it is missing, and of each idea.

    What the forward on 16 bits shares is broken in `test_broken_hopper_kernels`.
    """
    source, found = source_of(KERNEL), []
    called = r"[KV]\.(wait|release)|wait_for_\w+|pass_turn|scale_rows"
    for fault in events(source, called):
        in_parts = fault.function == "make_attend.add_tile"
        config = WIDE if in_parts else SHOWN_BY.get((fault.called, fault.n), OVERLAP)
        found.append(pytest.param(KERNEL, config, fault, id=f"no {fault}"))
    early = Early("make_attend.attend", "V.release", 1)
    found.append(pytest.param(KERNEL, OVERLAP, early, id=f"early {early}"))
    configs = {"PLAIN": PLAIN, "OVERLAP": OVERLAP, "WIDE": WIDE, "TURNING": TURNING}
    for module, config, mutation in mutations(IDEAS):
        name = KERNEL if module == "fp8_forward" else f"{TILES}.{module}"
        found.append(pytest.param(name, configs[config], mutation, id=str(mutation)))
    return found


@pytest.mark.parametrize("config", some([PLAIN, OVERLAP, WIDE, TURNING, TURNS_ALONE], OVERLAP))
def test_the_kernel_is_right_for_every_seed(config, monkeypatch):
    seeds = range(3 if FULL else 1)
    assert first_failure_of(monkeypatch, config, seeds=seeds) is None


@pytest.mark.parametrize(("module", "config", "fault"), faults())
def test_a_broken_kernel_is_caught(module, config, fault, monkeypatch, record_property):
    caught = first_failure_of(monkeypatch, config, module, fault)
    record_property("caught", caught)
    assert caught


@thorough
@pytest.mark.parametrize("config", some([OVERLAP, WIDE, TURNING], OVERLAP))
def test_one_arrival_takes_products_to_be_over_for_all_warps_at_once(config, monkeypatch):
    """As in `test_broken_hopper_kernels`; buffers must be filled twice."""
    one = str(replace(parse_config("forward", config), arrivals=1))
    for apart, seeds in ((False, 1), (True, 6)):
        monkeypatch.setattr(warpgroup, "WARPS_APART", apart)
        failure = first_failure(lambda: is_right(one, config), monkeypatch, range(seeds))
        assert bool(failure) == apart, failure


@pytest.mark.parametrize("config", SMALL)
def test_every_config_is_its_string_form(config):
    assert str(parse_config("forward", config)) == config
