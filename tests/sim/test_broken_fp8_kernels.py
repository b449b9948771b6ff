"""The forward on 8-bit floats broken on purpose: every barrier, wait and scale is needed.

As `test_broken_mma_kernels`. Results are held to the rules of `test_fp8_attention`, of which the
second also sees a kernel that is more exact than its specification.
"""

import itertools
from functools import cache

import numpy as np
import pytest

import numflash
from numflash.calls import ready
from numflash.kernels.mma import fp8_forward
from numflash.problem.fp8 import Fp8Recipe
from tests.sim.test_broken_kernels import first_failure
from tests.sim.test_fp8_attention import (
    Fp8Call,
    differences,
    every_instruction,  # noqa: F401
    fp8_array,
    poisoned_results,  # noqa: F401
    quantized,
    tile_n_of,
    tokens_per_scale,
)
from tests.support.covering import some
from tests.support.faults import (
    Dropped,
    Mutation,
    attempts,
    events,
    load,
    source_of,
)

KERNEL = "numflash.kernels.mma.fp8_forward"
TILES = "numflash.tiles.mma.fp8_"
CONVERSIONS = "numflash.tiles.quantize.conversions"
SEEDS = range(3)
# Two warps, so that they need each other; several tiles to walk over.
NATIVE = ("fp8-sm89-m32n64w2s1", "fp8-sm89-m32n64w2s2")
HALF = ("fp8-sm80-m32n32w2s1",)
ALL = (*HALF, *NATIVE)
# The other modules that hold a module's text, in the order of imports.
IMPORTERS = {CONVERSIONS: [f"{TILES}operands"]}
# Tokens that share a scale of K and V: as many as a tile has, or fewer.
OF_TILES, OF_KEYS = Fp8Recipe("block", 64), Fp8Recipe("block", 16)

# What is one head's and taken for the other's; and P of which too little is lost in few rows.
SHOWN_BY_TWO_HEADS = "another head's scales of Q", "P of at most one"


@cache
def call(recipe: Fp8Recipe, heads: int) -> Fp8Call:
    """A small problem, whose scores and values change along the keys."""
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((1, n, h, 64)).astype(np.float16)
        for n, h in ((20, heads), (150, 1), (150, 1))
    )
    q *= np.linspace(1, 4, 20, dtype=np.float16)[:, None, None]
    # Maxima move at first and later stay behind; no two tiles are alike.
    k *= (1 + 3 * np.sin(np.linspace(0, 4, 150))).astype(np.float16)[:, None, None]
    v *= np.linspace(4, 0.5, 150).astype(np.float16)[:, None, None]
    v += np.float16(1)
    recipes = {"q": Fp8Recipe("token", hadamard=False)}
    recipes |= dict.fromkeys("kv", Fp8Recipe(recipe.granularity, recipe.block, hadamard=False))
    arrays = {"q": q, "k": k, "v": v}
    made = {n: fp8_array(x, recipes[n], "bshd", n == "v") for n, x in arrays.items()}
    codes, descales = zip(
        *(quantized(x, recipes[n], "bshd") for n, x in arrays.items()), strict=True
    )
    options = {"softmax_scale": 0.125, "causal": True, "window_size": (140, 0)}
    blocks = tuple(tokens_per_scale(r) for r in recipes.values())
    return Fp8Call(made, options, codes, descales, blocks, 64)


def is_right(recipe: Fp8Recipe, config: str, heads: int) -> bool:
    """Whether a kernel solves the problem."""
    ready._ready.clear()
    each = call(recipe, heads)
    out, lse = numflash.attention(**each.arguments, **each.options, return_lse=True, config=config)
    return not differences(out, lse, each, tile_n_of(config))


def first_failure_of(
    monkeypatch, module=None, mutation=None, recipes=(OF_TILES, OF_KEYS), configs=ALL, seeds=SEEDS
) -> str | None:
    """The failure of the kernel with a mutated `module`, for any config, scales and seed."""
    heads = 2 if str(mutation) in SHOWN_BY_TWO_HEADS else 1
    if mutation is not None:
        chain = (module, *IMPORTERS.get(module, ()), KERNEL)
        changed = load(chain, module, mutation, monkeypatch)
        monkeypatch.setattr(fp8_forward, "make_forward_kernel", changed.make_forward_kernel)
    problems = itertools.product(configs, recipes)
    for (config, recipe), seed in attempts(problems, lambda problem: seeds):
        failure = first_failure(
            lambda recipe=recipe, config=config: is_right(recipe, config, heads),
            monkeypatch,
            [seed],
        )
        if failure:
            return f"{config} with scales of {recipe.block}: {failure}"
    return None


def synchronisations() -> list:
    """(fault, configs) that leaves out one barrier or wait, for each of them."""
    return [
        pytest.param(fault, NATIVE if "wait" in fault.called else ALL, id=f"without {fault}")
        for fault in events(source_of(KERNEL), r"cuda\.syncthreads|wait_for_tile")
    ]


# (module, mutation, scales, configs) for each idea that the kernel could get wrong.
MUTATIONS = [
    (
        "operands",
        Mutation(
            "keys of V in the order of tokens", "pair[0], pair[1]", "pair[1], pair[0]", times=1
        ),
        OF_TILES,
        HALF,
    ),
    (
        "operands",
        Mutation(
            "P in the order of tokens",
            "encode_four(acc[i], acc[i + 1], acc[i + 4], acc[i + 5])",
            "encode_four(acc[i], acc[i + 4], acc[i + 1], acc[i + 5])",
        ),
        OF_TILES,
        NATIVE,
    ),
    (
        "operands",
        Mutation("rows of P changed over", "frag[2 * half + 1] =", "frag[3 - 2 * half] ="),
        OF_TILES,
        NATIVE,
    ),
    (
        "operands",
        Mutation(
            "P that is not rounded",
            "frag[i] = round_two(acc[first + 2 * i], acc[first + 2 * i + 1])",
            "frag[i] = float16.pack_two(acc[first + 2 * i], acc[first + 2 * i + 1])",
        ),
        OF_TILES,
        HALF,
    ),
    (
        "conversions",
        Mutation(
            "P cut off",
            "total = fma_rn_f32(power, to_last_bit, x)\n        return",
            "total = fma_rn_f32(power, to_last_bit, x) - power * f32(0.0625)\n        return",
        ),
        OF_TILES,
        HALF,
    ),
    (
        "softmax",
        Mutation("P of at most one", "P_SCALE_LOG2 = f32(8)", "P_SCALE_LOG2 = f32(0)"),
        OF_TILES,
        NATIVE,
    ),
    (
        "softmax",
        Mutation(
            "P in units of the row's maximum",
            """            weights[r] = ex2_approx_ftz_f32(tops[r] - unit_of_row(row_max[r]))
            shifts[r] = shift_of_row(tops[r], row_max[r])
""",
            """            weights[r] = ex2_approx_ftz_f32(-P_SCALE_LOG2)
            shifts[r] = shift_of_row(row_max[r], row_max[r])
""",
        ),
        OF_TILES,
        NATIVE,
    ),
    (
        "softmax",
        Dropped("make_tile_softmax.tile_softmax", "scale_rows"),
        OF_TILES,
        HALF,
    ),
    (
        "softmax",
        Mutation("sums that are not rescaled", "row_sum[r] *= factors[r]", "pass"),
        OF_TILES,
        HALF,
    ),
    (
        "softmax",
        Mutation(
            "sums in units of their tile",
            "fma_rn_f32(sums[r], weights[r],",
            "fma_rn_f32(sums[r], f32(1),",
        ),
        OF_TILES,
        HALF,
    ),
    (
        "softmax",
        Mutation(
            "sums with the scales of V",
            "sums[r] = fma_rn_f32(p1, b, fma_rn_f32(p0, a, sums[r]))",
            "sums[r] += p0 + p1",
        ),
        OF_KEYS,
        HALF,
    ),
    (
        "softmax",
        Mutation(
            "scales of the first keys",
            "position + MMA_COLUMNS * (tile % n_tiles)",
            "position + MMA_COLUMNS * (tile % 1)",
        ),
        OF_KEYS,
        HALF,
    ),
    (
        "softmax",
        Mutation(
            "a scale of the other row",
            "fma_rn_f32(s_acc[i + 2], scales[r + 1], a)",
            "fma_rn_f32(s_acc[i + 2], scales[r], a)",
        ),
        OF_KEYS,
        HALF,
    ),
    (
        "softmax",
        Mutation("a scale of the next key", "s_acc[i + 1] *= b", "s_acc[i + 1] *= a"),
        Fp8Recipe("token"),
        HALF,
    ),
    (
        "products",
        Mutation("weights forgotten", "weight = weights[2 * i + e // 2 % 2]", "weight = f32(1)"),
        OF_TILES,
        HALF,
    ),
    (
        "products",
        Mutation("weights of the first row", "weights[2 * i + e // 2 % 2]", "weights[2 * i]"),
        OF_TILES,
        NATIVE,
    ),
    (
        "products",
        Mutation("a part that does not begin at zero", "part[i] = f32(0)", "pass"),
        OF_TILES,
        HALF,
    ),
    (
        "forward",
        Mutation("the scale of V forgotten", "weights[r] *= v_scale", "pass"),
        OF_TILES,
        HALF,
    ),
    (
        "forward",
        Mutation("the scale of K forgotten", "ROW_STEP * r)) * k_scale", "ROW_STEP * r))"),
        OF_TILES,
        HALF,
    ),
    (
        "forward",
        Dropped("make_forward_kernel.forward", "scale_keys"),
        OF_KEYS,
        HALF,
    ),
    (
        "forward",
        Mutation(
            "scales of values forgotten",
            "f32(math.log(v_scale)) * LOG2_E",
            "f32(0)",
        ),
        OF_KEYS,
        HALF,
    ),
    (
        "forward",
        Mutation("scales of V as they are", "f32(1) / v_scale", "v_scale"),
        OF_KEYS,
        NATIVE,
    ),
    (
        "forward",
        Mutation(
            "the scale of the row above",
            "bits_as_float(ld_shared_u32(smem, row + ROW_STEP * r))",
            "bits_as_float(ld_shared_u32(smem, row))",
        ),
        OF_TILES,
        HALF,
    ),
    (
        "forward",
        Mutation(
            "the scale of the first row",
            "i = i32(min(m_start + row, num_rows - 1))",
            "i = m_start",
        ),
        OF_TILES,
        HALF,
    ),
    (
        "forward",
        Mutation(
            "the scale of the next tile of K",
            "k_descale_base), n_start)",
            "k_descale_base), min(n_start + tile_n, shape.seqlen_k - 1))",
        ),
        OF_TILES,
        NATIVE,
    ),
    (
        "forward",
        Mutation(
            "the scale of the next tile of V",
            "v_descale_base), n_start)",
            "v_descale_base), min(n_start + tile_n, shape.seqlen_k - 1))",
        ),
        OF_TILES,
        NATIVE,
    ),
    (
        "forward",
        Mutation(
            "another head's scales of Q",
            "offset = q_descale_base + (i - token * layout.pack) * descales.q.packed",
            "offset = q_descale_base",
        ),
        OF_TILES,
        HALF,
    ),
    (
        "forward",
        Mutation("scores not in base 2", "if not bends:\n", "if bends:\n"),
        OF_TILES,
        HALF,
    ),
    (
        "forward",
        Mutation("keys past the end of V", "v_base) + first, v.length - first", "v_base), 64"),
        OF_TILES,
        HALF,
    ),
]


@pytest.mark.parametrize("config", some(ALL, *HALF))
def test_the_kernel_is_right_for_every_seed(config, monkeypatch):
    assert first_failure_of(monkeypatch, configs=(config,), seeds=range(1)) is None


@pytest.mark.parametrize(("mutation", "configs"), synchronisations())
def test_no_barrier_and_no_wait_can_be_left_out(mutation, configs, monkeypatch, record_property):
    caught = first_failure_of(monkeypatch, KERNEL, mutation, configs=configs)
    record_property("caught", caught)
    assert caught


@pytest.mark.parametrize(
    ("module", "mutation", "recipe", "configs"),
    MUTATIONS,
    ids=[str(row[1]) for row in MUTATIONS],
)
def test_a_broken_kernel_is_caught(
    module, mutation, recipe, configs, monkeypatch, record_property
):
    name = {"forward": KERNEL, "conversions": CONVERSIONS}.get(module, f"{TILES}{module}")
    caught = first_failure_of(monkeypatch, name, mutation, (recipe,), configs)
    record_property("caught", caught)
    assert caught


@pytest.mark.parametrize("config", some(NATIVE, NATIVE[1]))
def test_what_no_tile_needs_is_not_copied(config, monkeypatch, record_property):
    """Three tiles of keys for four splits: nobody would wait for Q of the last."""
    mutation = Mutation("Q for no tile", "if n_begin < n_end:", "if True:")
    about = {"recipes": (OF_TILES,), "configs": (f"{config}x4",)}
    with monkeypatch.context() as broken:
        caught = first_failure_of(broken, KERNEL, mutation, **about)
    record_property("caught", caught)
    assert "cp.async of thread" in caught
    assert first_failure_of(monkeypatch, seeds=range(1), **about) is None
