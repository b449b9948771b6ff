"""8-bit floats on a GPU: quantisation bit for bit, and attention by the rules of the simulator.

All cases at full size, with what is chosen for this GPU; and the small configs of every kind of
instruction that it has. How inputs are made and results judged is `test_fp8_attention`'s.
"""

import numpy as np
import pytest

import numflash
from numflash import reference
from numflash.configs import parse_config
from numflash.configs.fp8 import multiplies_codes
from numflash.problem.fp8 import Fp8Recipe
from numflash.problem.options import ARRAY_OPTIONS
from numflash.reference.arrays import heads_first
from numflash.reference.fp8 import tokens_innermost
from numflash.runtime.arrays import to_numpy
from numflash.runtime.driver import limits_of_device
from numflash.runtime.views import numpy_dtype
from tests.sim.test_fp8_attention import SORTS, differences, make_call, rms
from tests.support.attention_cases import FP8_CONFIGS, GPU_CASES, on_fp8

# float32 would be the same cases once more.
CASES = on_fp8([case for case in GPU_CASES if case.dtype != "float32"])
SHAPES = ((2, 513, 3, 64), (1, 1000, 2, 128), (2, 257, 1, 192), (1, 300, 2, 256), (2, 333, 2, 80))


def wrong(result, call, case, tile_n: int) -> list[str]:
    """The rules that a result breaks.

    Products of e4m3 are summed with 13 bits after the point: scores are off by that, and those of
    the large cases by more than one.
    """
    if not multiplies_codes(limits_of_device(0)):
        return differences(*result, call, tile_n)
    if case.inputs == "large":
        pytest.skip("e4m3 products of this GPU sum large scores too coarsely")
    return differences(*result, call, tile_n, lse_tolerance=2.0**-10)


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy")


def upload(x):
    """A CuPy array of the same numbers."""
    import cupy

    return cupy.asarray(x)


def _forced():
    """(case, sort, config, number): every sixth case with each of the small configs."""
    for i, config in enumerate(FP8_CONFIGS):
        for j, case in enumerate(CASES[i::6]):
            number = i + j
            sort = SORTS[number % 3]
            yield pytest.param(case, sort, config, number, id=f"{case}-{sort}-{config}")


def run(call, **more):
    """(out, lse) of a call."""
    options = dict(call.options)
    given = [name for name in ARRAY_OPTIONS if name in options]
    options |= {name: upload(options[name]) for name in given}
    return numflash.attention(**call.arguments, **options, return_lse=True, **more)


def tile_n_of_choice(call) -> int:
    """Keys of a tile of the config that is chosen."""
    options = dict(call.options)
    given = [name for name in ARRAY_OPTIONS if name in options]
    options |= {name: upload(options[name]) for name in given}
    return tile_n_of(numflash.plan(**call.arguments, **options))


def tile_n_of(plan: numflash.Plan) -> int:
    """Keys of a tile of a plan's kernel."""
    return parse_config("forward", plan.kernel.split()[1]).tile_n


@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)), ids=str)
def test_results_are_those_of_the_specification(case, number, poisoned_pool):
    call = make_call(case, SORTS[number % 3], number, upload)
    assert wrong(run(call), call, case, tile_n_of_choice(call)) == []


@pytest.mark.parametrize(("case", "sort", "config", "number"), list(_forced()))
def test_results_of_forced_configs(case, sort, config, number, poisoned_pool):
    call = make_call(case, sort, number, upload)
    if "alibi_slopes" in call.options:
        config = config.removesuffix("-packed")
    try:
        got = run(call, config=config)
    except numflash.UnsupportedError as error:
        pytest.skip(str(error))
    assert wrong(got, call, case, parse_config("forward", config).tile_n) == []


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_long_sums_stay_as_exact_as_short_ones(head_dim, cupy, poisoned_pool):
    # FP8 tensor cores sum with 13 bits after the point, which 8192 keys in one sum would show.
    rng = np.random.default_rng(head_dim)
    q, k = (rng.standard_normal((1, n, 1, head_dim)).astype(np.float16) for n in (32, 8192))
    q *= np.float16(0.1)  # nearly equal weights: all keys count
    v = (np.abs(rng.standard_normal((1, 8192, 1, head_dim))) + 1).astype(np.float16)
    recipe = Fp8Recipe("block", 128, hadamard=False)
    plan = numflash.plan(*map(upload, (q, k, v)), precision="fp8", fp8=recipe)
    out = to_numpy(plan.launch()).astype(np.float64)
    spec, _ = reference.attention_fp8(q, k, v, hadamard=False, tile_n=tile_n_of(plan))
    assert rms(out - spec) <= (2.0**-11 + 2.0**-13) * rms(spec)


def test_results_are_the_same_bits_every_time(cupy):
    rng = np.random.default_rng(0)
    q, k, v = (upload(rng.standard_normal((2, 700, 4, 128)).astype(np.float16)) for _ in "qkv")
    first, *others = (
        numflash.attention(q, k, v, precision="fp8", causal=True).tobytes() for _ in range(4)
    )
    assert all(other == first for other in others)


def test_a_plan_of_one_query_on_a_cache_is_captured_in_a_graph(cupy):
    rng = np.random.default_rng(0)
    q = upload(rng.standard_normal((4, 1, 8, 128)).astype(np.float16))
    k, v = (upload(rng.standard_normal((4, 3000, 2, 128)).astype(np.float16)) for _ in "kv")
    k8 = numflash.quantize_fp8(k, "token", hadamard=True, seed=5)
    v8 = numflash.quantize_fp8(v, "token", transposed=True)
    plan = numflash.plan(q, k8, v8)
    stream = cupy.cuda.Stream(non_blocking=True)
    plan.launch(stream)
    stream.begin_capture()
    plan.launch(stream)
    graph = stream.end_capture()
    q[...] = upload(rng.standard_normal((4, 1, 8, 128)).astype(np.float16))
    cupy.cuda.Device().synchronize()
    graph.launch(stream)
    stream.synchronize()
    assert bool((plan.out == numflash.attention(q, k8, v8)).all())
    exact, _ = reference.attention(*map(to_numpy, (q, k, v)))
    assert rms(to_numpy(plan.out) - exact) < 0.08 * rms(exact)


# Quantisation

RECIPES = [
    Fp8Recipe(granularity, block, hadamard, seed=3)
    for granularity, block in (
        ("tensor", 128),
        ("head", 128),
        ("block", 16),
        ("block", 128),
        ("block", 1024),
        ("token", 128),
    )
    for hadamard in (False, True)
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_codes_and_scales_have_the_bits_of_the_reference(
    shape, recipe, format, cupy, poisoned_pool
):
    rng = np.random.default_rng(sum(shape))
    x = rng.standard_normal(shape) * 30 ** rng.integers(0, 2, shape)
    x.reshape(-1)[::1009], x.reshape(-1)[::2003], x.reshape(-1)[5::3001] = np.inf, -np.inf, np.nan
    number = RECIPES.index(recipe) + len(shape)
    dtype = ("float16", "bfloat16", "float32")[number % 3]
    x, transposed = x.astype(numpy_dtype(dtype)), bool(number % 2)
    share = recipe.granularity, recipe.block, recipe.hadamard, recipe.seed
    got = numflash.quantize_fp8(upload(x), *share, format=format, transposed=transposed)
    codes, descale = reference.quantize_fp8(x, *share, format)
    stored = heads_first(codes, False).swapaxes(1, 2)
    wanted = tokens_innermost(stored) if transposed else stored
    assert to_numpy(got.data).tobytes() == np.ascontiguousarray(wanted).tobytes()
    assert to_numpy(got.descale).tobytes() == descale.tobytes()
    block = recipe.block if recipe.granularity == "block" else 1
    back = to_numpy(numflash.dequantize_fp8(got, "float32"))
    turn = recipe.hadamard, recipe.seed, format
    numbers = reference.dequantize_fp8(codes, descale, shape[3], block, *turn)
    np.testing.assert_array_equal(back, numbers)


def test_dequantised_numbers_have_gradients_in_16_bits(cupy):
    rng = np.random.default_rng(0)
    q, k, v, dout = (
        upload(rng.standard_normal((2, 257, 2, 64)).astype(np.float16)) for _ in "qkvd"
    )
    numbers = [numflash.dequantize_fp8(numflash.quantize_fp8(x, hadamard=True)) for x in (q, k, v)]
    report = numflash.check(*numbers, dout=dout, causal=True)
    assert report.passed, f"\n{report}"
