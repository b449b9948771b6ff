"""The Hopper forward on 8-bit floats whose keys have scales of their own, in the simulator.

By the rules of `test_fp8_attention`. What it shares with scales of tiles is in `test_fp8_hopper`.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

import numflash
from numflash.calls import ready
from numflash.kernels.wgmma import fp8_forward
from numflash.problem.fp8 import Fp8Recipe
from numflash.runtime import driver
from numflash.selection import choice as selection
from numflash.simulator import SEED
from tests.sim.test_broken_kernels import first_failure
from tests.sim.test_fp8_attention import (
    Fp8Call,
    differences,
    fp8_array,
    make_call,
    poisoned_results,  # noqa: F401
    quantized,
    run,
    tile_n_of,
    tokens_per_scale,
)
from tests.sim.test_fp8_hopper import hopper  # noqa: F401
from tests.support.attention_cases import AttentionCase
from tests.support.covering import FULL, some, thorough
from tests.support.faults import events, load, mutations, source_of

KERNEL, TILES = "numflash.kernels.wgmma.fp8_forward", "numflash.tiles.wgmma.fp8"
SCALES, SKELETON = "numflash.kernels.wgmma.key_scales", "numflash.kernels.wgmma.skeleton"
# K and V may have scales of their own, or one of them only.
RECIPES = (
    Fp8Recipe("token", seed=1),
    Fp8Recipe("block", 16, seed=3),
    Fp8Recipe("token", hadamard=False),
    Fp8Recipe("block", 32, hadamard=False),
    Fp8Recipe("head", seed=7),
)


def _cases():
    """(case, sort, config, number)"""
    causal, window = {"causal": True}, {"window_size": (150, 40)}
    bhsd = {"layout": "bhsd", **causal}
    table = (
        ((1, 70, 300, 1, 1, 64, 64), "m64n128w4s2-overlap-persistent", causal),
        ((1, 140, 270, 1, 1, 64, 64), "m128n128w8s2-overlap-pingpong-persistent", causal),
        ((1, 70, 280, 1, 1, 128, 128), "m128n128w8s2-pingpong-persistent", {"softcap": 3.0}),
        ((1, 130, 260, 1, 1, 192, 128), "m128n128w8s1-persistent", window),
        ((1, 70, 260, 1, 1, 64, 256), "m128n64w8s2-pingpong-persistent", causal),
        ((1, 70, 200, 1, 1, 256, 256), "m64n64w4s2-persistent", {"softcap": 2.0, **causal}),
        ((1, 9, 400, 4, 1, 64, 64), "m64n128w4s2x3-packed-overlap", causal),
        ((1, 70, 300, 2, 1, 64, 64), "m64n256w4s2-persistent", {"alibi_slopes": (2,)}),
        ((2, 70, 150, 2, 2, 64, 64), "m64n64w4s3", {**window, "layout": "bhsd"}),
        ((2, 33, 257, 4, 2, 64, 64), "m64n128w4s1", {}),
        ((1, 150, 113, 1, 1, 64, 64), "m192n128w12s3-overlap-pingpong-persistent", bhsd),
        ((1, 40, 300, 1, 1, 64, 64), "m64n128w4s2b2-l128", window),
        ((1, 150, 270, 1, 1, 64, 64), "m64n128w4s2-c2-overlap-persistent", causal),
    )
    for i, (shape, tile, options) in enumerate(table):
        dtype = ("float16", "bfloat16")[i % 2]
        case = AttentionCase(f"d{shape[5]}-{shape[1]}x{shape[2]}", shape, dtype, options=options)
        config, sort = f"fp8-sm90-{tile}", ("arrays", "16-bit")[i % 5 == 4]
        yield pytest.param(case, sort, config, i, id=f"{case}-{config}")


@pytest.mark.parametrize(("case", "sort", "config", "number"), some([*_cases()], every=4))
def test_results_are_those_of_the_specification(case, sort, config, number, monkeypatch):
    monkeypatch.setattr(SEED, "value", number)
    call = make_call(case, sort, number, recipes=RECIPES)
    assert differences(*run(call, config), call, tile_n_of(config)) == []


@thorough
@pytest.mark.parametrize("blocks", some([1, 3], 1))
def test_blocks_take_several_tiles_of_rows(blocks, monkeypatch):
    """Of which some see no key: the first rows of these."""
    monkeypatch.setattr(driver, "multiprocessors", lambda device: (blocks, 2**20))
    monkeypatch.setattr(selection, "resident_blocks", lambda *about: 1)
    shape, config = (1, 300, 150, 2, 2, 64, 64), "fp8-sm90-m64n128w4s2-overlap-persistent"
    case = AttentionCase("rows", shape, "float16", options={"causal": True})
    call = make_call(case, "arrays", 2, recipes=(RECIPES[2],))
    out, lse = run(call, config)
    assert (out[0, :150] == 0).all() and (lse[0, :, :150] == -np.inf).all()
    assert differences(out, lse, call, tile_n_of(config)) == []


@pytest.mark.usefixtures("shipped_kernels")
@pytest.mark.parametrize("recipe", some([RECIPES[0], RECIPES[3]], RECIPES[0]))
def test_by_itself_a_hopper_takes_it(recipe):
    case = AttentionCase("tokens", (1, 70, 100, 1, 1, 64, 64), "float16")
    call = make_call(case, "16-bit", 0, recipes=(recipe,))
    everything = {**call.arguments, **call.options}
    chosen = numflash.explain_dispatch(**everything).forward
    assert str(chosen.config).startswith("fp8-sm90-m128n128") and chosen.traits.key_scales
    out, lse = numflash.attention(**everything, return_lse=True)
    assert differences(out, lse, call, chosen.config.tile_n) == []


@thorough
def test_no_order_of_threads_changes_a_bit(monkeypatch):
    config, found = "fp8-sm90-m128n128w8s2-overlap-pingpong-persistent", set()
    case = AttentionCase("p", (1, 70, 300, 1, 1, 64, 64), "float16")
    call = make_call(case, "arrays", 0, recipes=RECIPES)
    for seed in range(2):
        monkeypatch.setattr(SEED, "value", seed)
        found.add(tuple(x.tobytes() for x in run(call, config)))
    assert len(found) == 1


@pytest.mark.parametrize("name", ["k", "v"])
def test_scales_behind_the_last_are_not_read(name):
    """Behind a head's scales are those of the next, or nothing: here NaN."""
    case = AttentionCase("end", (1, 40, 140, 1, 1, 64, 64), "float16", options={"causal": True})
    call = make_call(case, "arrays", 0, recipes=(RECIPES[2],))
    given = call.arguments[name]
    longer = np.full((1, 2, 150), np.nan, np.float32)
    longer[:, :1, :140] = given.descale
    call.arguments[name] = replace(given, descale=longer[:, :1, :140])
    assert differences(*run(call, OVERLAP), call, 128) == []


# Broken kernels

PLAIN = "fp8-sm90-m64n64w4s2"
OVERLAP = "fp8-sm90-m64n128w4s2-overlap"
TURNING = "fp8-sm90-m128n128w8s1-pingpong"


@cache
def problem(config: str) -> Fp8Call:
    """Tokens of Q, K and V with scales of their own, four stages of keys; values change.

    For `TURNING` a warpgroup does not see the first stage that the other one sees.
    """
    rows, keys, rng = (140 if config == TURNING else 70), 3 * 128 + 10, np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, n, 1, 64)).astype(np.float16) for n in (rows, keys, keys))
    k *= (1 + 3 * np.sin(np.linspace(0, 4, keys))).astype(np.float16)[:, None, None]
    v *= np.linspace(4, 0.5, keys).astype(np.float16)[:, None, None]
    v += np.float16(1)
    recipe, arrays = Fp8Recipe("token", hadamard=False), {"q": q, "k": k, "v": v}
    made = {n: fp8_array(x, recipe, "bshd", n == "v") for n, x in arrays.items()}
    codes, descales = zip(*(quantized(x, recipe, "bshd") for x in arrays.values()), strict=True)
    options = {"softmax_scale": 0.125, "causal": True}
    if config == TURNING:
        options["window_size"] = 40, 0
    return Fp8Call(made, options, codes, descales, (tokens_per_scale(recipe),) * 3, 64)


def is_right(config: str) -> bool:
    """Whether a config solves the problem."""
    ready._ready.clear()
    call = problem(config)
    return not differences(*run(call, config), call, tile_n_of(config))


def first_failure_of(monkeypatch, config, module=None, fault=None, seeds=range(3)):
    """The failure of the kernel with a fault in `module` with a config; None if it is right."""
    if fault is not None:
        changed = load((module, KERNEL), module, fault, monkeypatch)
        monkeypatch.setattr(
            fp8_forward, "make_fp8_forward_kernel", changed.make_fp8_forward_kernel
        )
    return first_failure(lambda: is_right(config), monkeypatch, seeds)


IDEAS = """
key_scales  OVERLAP  a scale of the next key
    key = i32(min(key, seqlen_k - 1)) -> key = i32(min(key + 1, seqlen_k - 1))
key_scales  OVERLAP  scales in the order of keys
    place_of_column(mov_tid_x() % threads)) -> mov_tid_x() % threads)
key_scales  OVERLAP  scales of the stage before
    tile_at(mask, step) -> tile_at(mask, max(step - 1, n_begin))
key_scales  OVERLAP  scales of half a stage
    % threads + threads * part) -> % threads)
key_scales  OVERLAP  the scale of V left out
    lg2_approx_ftz_f32(v_scales[part]) -> f32(0)
key_scales  OVERLAP  sums with the scales of V
    ex2_approx_ftz_f32(-v_log2) -> f32(1)
key_scales  PLAIN  the scale of V of K
    = scale_of_key(descales.v, -> = scale_of_key(descales.k,
fp8_forward  OVERLAP  the first stage of scales
    stage * scale_words + within -> within
fp8_forward  PLAIN  the first tile of scales of a stage
    tile * tile_n + place_of_column -> place_of_column
fp8_forward  OVERLAP  scales of the thread before
    place_of_column(accumulator_column()) -> 0
fp8_forward  OVERLAP  rows scaled twice
    scales[0], scales[1] = f32(1), f32(1) -> pass
fp8  OVERLAP  sums of the first keys
    position + MMA_COLUMNS * tile -> position
fp8  PLAIN  sums with the scales of neighbours
    a, b = four[tile % 2 * 2], -> b, a = four[tile % 2 * 2],
"""


def faults() -> list:
    """(module, config, fault): of each verb of scales that it is missing, and of each idea."""
    called, found = r"SCALES\.(claim|filled|wait|release|gather|skip)|scale_keys", []
    for module in (SCALES, KERNEL, SKELETON):
        for fault in events(source_of(module), called):
            config = TURNING if module == SKELETON else OVERLAP
            found.append(pytest.param(module, config, fault, id=f"no {fault}"))
    modules = {"key_scales": SCALES, "fp8_forward": KERNEL, "fp8": TILES}
    configs = {"PLAIN": PLAIN, "OVERLAP": OVERLAP}
    for module, config, mutation in mutations(IDEAS):
        found.append(pytest.param(modules[module], configs[config], mutation, id=str(mutation)))
    return found


@thorough
@pytest.mark.parametrize("config", some([PLAIN, OVERLAP, TURNING], OVERLAP))
def test_the_kernel_is_right_for_every_seed(config, monkeypatch):
    seeds = range(3 if FULL else 1)
    assert first_failure_of(monkeypatch, config, seeds=seeds) is None


@pytest.mark.parametrize(("module", "config", "fault"), faults())
def test_a_broken_kernel_is_caught(module, config, fault, monkeypatch, record_property):
    caught = first_failure_of(monkeypatch, config, module, fault)
    record_property("caught", caught)
    assert caught
