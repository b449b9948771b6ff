"""FP8 attention end to end in the simulator: forms of arrays, caches, plans, gradients.

Whether the numbers are right for every mask and size is `test_fp8_attention`'s business; its rules
hold here, too.
"""

from dataclasses import replace

import numpy as np
import pytest

import numflash
from numflash import reference
from numflash.calls import ready
from numflash.problem.fp8 import Fp8Array, Fp8Recipe
from tests.sim.test_fp8_attention import (
    E4M3,
    Fp8Call,
    codes_of_heads,
    differences,
    fp8_array,
    poisoned_results,  # noqa: F401
    quantized,
    rms,
    tile_n_of,
    tokens_per_scale,
)
from tests.support.covering import some, thorough

CONFIG = "fp8-sm80-m16n32w1s1"
TOKENS = Fp8Recipe("token", seed=3)
V_TOKENS = Fp8Recipe("token", hadamard=False)
BLOCKS = Fp8Recipe("block", 32, seed=2)


@pytest.fixture(autouse=True)
def nothing_ready(monkeypatch):
    """Calls of other tests do not count."""
    monkeypatch.setattr(ready, "_ready", {})


@pytest.fixture
def rng():
    """Random numbers, the same in every run."""
    return np.random.default_rng(0)


def arrays(rng, seqlen_q=5, seqlen_k=37, heads=2, heads_kv=1, dims=(64, 64), dtype=np.float16):
    """q, k, v of one batch entry."""
    shapes = (
        (seqlen_q, heads, dims[0]),
        (seqlen_k, heads_kv, dims[0]),
        (seqlen_k, heads_kv, dims[1]),
    )
    return [rng.standard_normal((1, *shape)).astype(dtype) for shape in shapes]


def call_of(q, k, v, recipes, **options) -> Fp8Call:
    """The numbers that a call with these arrays attends to; `recipes` of q, k and v, or one."""
    if isinstance(recipes, Fp8Recipe):
        recipes = recipes, recipes, replace(recipes, hadamard=False)
    layout = options.get("layout", "bshd")
    made = [quantized(x, r, layout) for x, r in zip((q, k, v), recipes, strict=True)]
    codes, descales = zip(*made, strict=True)
    options.setdefault("softmax_scale", q.shape[-1] ** -0.5)
    blocks = tuple(map(tokens_per_scale, recipes))
    return Fp8Call({}, options, codes, descales, blocks, v.shape[-1])


def attend(q, k, v, config=CONFIG, **options):
    """(out, lse) with a small config."""
    return numflash.attention(q, k, v, return_lse=True, config=config, **options)


def wrong(result, call: Fp8Call, config=CONFIG) -> list[str]:
    """The rules that (out, lse) breaks."""
    return differences(*result, call, tile_n_of(config))


# Forms of arrays


@pytest.mark.parametrize("layout", some(["bshd", "bhsd"], "bhsd"))
@pytest.mark.parametrize("ndim", some([4, 3, 2], 3))
def test_arrays_of_4_3_and_2_dimensions(rng, layout, ndim):
    q, k, v = arrays(rng)
    part = {4: np.s_[:], 3: np.s_[0], 2: np.s_[0, :, 0]}[ndim]
    q, k, v = (x[part] for x in (q, k, v))
    if layout == "bhsd" and ndim > 2:
        q, k, v = (x.swapaxes(-3, -2) for x in (q, k, v))
    recipe, options = Fp8Recipe("block", 32, seed=1), {"layout": layout, "causal": True}
    out, lse = attend(q, k, v, precision="fp8", fp8=recipe, **options)
    assert out.shape == q.shape and lse.ndim == ndim - 1
    call = call_of(q, k, v, recipe, **options)
    assert wrong((out, lse), call) == []
    k8 = numflash.quantize_fp8(k, "block", 32, True, 1, layout=layout)
    v8 = numflash.quantize_fp8(v, "block", 32, transposed=True, layout=layout)
    again, _ = attend(q, k8, v8, fp8=recipe, **options)
    assert again.tobytes() == out.tobytes()


@thorough
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_head_dims_that_are_no_multiples_of_64(rng, dtype):
    q, k, v = arrays(rng, dims=(80, 48), dtype=numflash.runtime.views.numpy_dtype(dtype))
    out, lse = attend(q, k, v, precision="fp8", fp8=BLOCKS)
    assert (out.shape, out.dtype) == ((1, 5, 2, 48), q.dtype)
    assert wrong((out, lse), call_of(q, k, v, BLOCKS)) == []


def test_the_recipe_is_a_scale_for_128_tokens_and_a_rotation(rng):
    q, k, v = arrays(rng)
    (out, _), (same, _) = (
        attend(q, k, v, precision="fp8", fp8=fp8)
        for fp8 in (None, Fp8Recipe("block", 128, True, 0))
    )
    assert out.tobytes() == same.tobytes()


def test_an_array_of_its_own_may_be_written_to(rng):
    q, k, v = arrays(rng)
    whole = np.zeros((1, 5, 4, 64), np.float16)
    out = whole[:, :, 1:3]
    got, _ = attend(q, k, v, precision="fp8", fp8=BLOCKS, out=out)
    assert got is out and (whole[:, :, [0, 3]] == 0).all()
    assert out.tobytes() == attend(q, k, v, precision="fp8", fp8=BLOCKS)[0].tobytes()


@pytest.mark.parametrize("name", ["q", "k", "v", "k_descale"])
def test_what_is_written_to_must_not_overlap_an_input(rng, name):
    q, k, v = arrays(rng, 5, 5, 1)
    (q, q_descale), (k, k_descale), (v, v_descale) = (
        codes_of_heads(x, 1, "bshd") for x in (q, k, v)
    )
    memory = np.zeros(1024, np.float16)
    inputs = {"q": q, "k": k, "v": v, "k_descale": k_descale}
    held = inputs[name]
    view = memory.view(held.dtype)[16 : 16 + held.size].reshape(held.shape)
    view[...] = held
    inputs |= {name: view, "q_descale": q_descale, "v_descale": v_descale}
    out = memory[8 : 8 + 320].reshape(1, 5, 1, 64)
    with pytest.raises(ValueError, match=f"out must not overlap {name}, but"):
        numflash.attention(**inputs, out=out, config=CONFIG)


# Caches


def cache_of(k, v, transposed=True) -> tuple[Fp8Array, Fp8Array]:
    """K and V in 8 bits, a scale for each token, as `quantize_fp8` makes them."""
    return fp8_array(k, TOKENS, "bshd", False), fp8_array(v, V_TOKENS, "bshd", transposed)


def first_tokens(x: Fp8Array, n: int) -> Fp8Array:
    """The cache of the first n tokens, without a copy."""
    batch, _, heads, head_dim = x.shape
    data = x.data[..., : -(-n // 64) * 64] if x.transposed else x.data[:, :n]
    return replace(x, data=data, descale=x.descale[:, :, :n], shape=(batch, n, heads, head_dim))


@pytest.mark.parametrize("transposed", some([True, False], True))
@pytest.mark.parametrize("n", some([37, 30, 1], 30))
def test_one_query_attends_to_a_cache_and_to_the_beginning_of_one(rng, transposed, n):
    q, k, v = arrays(rng, 1, 37, heads=4, heads_kv=2)
    cache = [first_tokens(x, n) for x in cache_of(k, v, transposed)]
    # q is rotated as k is, though nothing says so.
    got = attend(q, *cache, config="fp8-sm80-m16n32w1s1-packed")
    recipes = replace(Fp8Recipe(), seed=3), TOKENS, V_TOKENS
    assert wrong(got, call_of(q, k[:, :n], v[:, :n], recipes)) == []


def test_a_cache_may_be_longer_than_what_is_seen(rng):
    # More than a tile is cut off: transposed codes then end where a multiple of 64 does.
    q, k, v = arrays(rng, 1, 100)
    cache = [first_tokens(x, 33) for x in cache_of(k, v)]
    assert cache[1].data.shape[-1] == 64 and not cache[1].data.flags.c_contiguous
    recipes = replace(Fp8Recipe(), seed=3), TOKENS, V_TOKENS
    assert wrong(attend(q, *cache), call_of(q, k[:, :33], v[:, :33], recipes)) == []


@thorough
def test_a_cache_that_grows_in_place_is_read_anew(rng):
    q, k, v = arrays(rng, 1, 37)
    k8, v8 = cache_of(k, v)
    room = np.zeros((1, 50, 1, 64), np.uint8), np.ones((1, 1, 50), np.float32)
    room[0][:, :36], room[1][..., :36] = k8.data[:, :36], k8.descale[..., :36]
    grown = [
        replace(k8, data=room[0][:, :n], descale=room[1][..., :n], shape=(1, n, 1, 64))
        for n in (36, 37)
    ]
    attend(q, grown[0], first_tokens(v8, 36))
    room[0][:, 36], room[1][..., 36] = k8.data[:, 36], k8.descale[..., 36]
    out, _ = attend(q, grown[1], v8)
    assert out.tobytes() == attend(q, k8, v8)[0].tobytes()


SPLIT = "fp8-sm80-m16n32w1s1x2", "fp8-sm75-m16n32w1s1x5-packed"


@thorough
@pytest.mark.parametrize("config", some(SPLIT, SPLIT[1]))
def test_splits_over_keys_change_nothing_but_rounding(rng, config):
    q, k, v = arrays(rng, 1, 150)
    k8, v8 = cache_of(k, v)
    (out, lse), (parts, part_lse) = (attend(q, k8, v8, config=c) for c in (CONFIG, config))
    assert rms(out - parts) <= 2.0**-10 * rms(out)
    np.testing.assert_allclose(part_lse, lse, rtol=1e-5)


# flash-attn's convention


FORMS = {
    "uint8": lambda codes: codes,
    "float8_e4m3fn": lambda codes: codes.view(E4M3.dtype),
    "heads-apart": lambda codes: np.ascontiguousarray(codes.swapaxes(1, 2)).swapaxes(1, 2),
    "every-other-row": lambda codes: np.repeat(codes, 2, axis=1)[:, ::2],
    "every-other-column": lambda codes: np.repeat(codes, 2, axis=3)[..., ::2],
    "unaligned": lambda codes: np.concatenate([codes.ravel()[:1], codes.ravel()])[1:].reshape(
        codes.shape
    ),
    "backwards": lambda codes: np.ascontiguousarray(codes[:, ::-1])[:, ::-1],
}


@pytest.mark.parametrize("form", some(FORMS, every=6))
def test_codes_of_the_callers_own_have_a_scale_for_each_head_of_k(rng, form):
    q, k, v = arrays(rng, heads=4, heads_kv=2, dims=(80, 64) if form == "uint8" else (64, 64))
    made = [codes_of_heads(x, 2, "bshd") for x in (q, k, v)]
    descales = {f"{n}_descale": d for n, (_, d) in zip("qkv", made, strict=True)}
    out, lse = attend(*(FORMS[form](codes) for codes, _ in made), **descales)
    assert out.dtype.name == "bfloat16" and out.shape == (1, 5, 4, 64)
    codes, scales = zip(*made, strict=True)
    scales = tuple(scale[..., None] for scale in scales)
    options = {"softmax_scale": q.shape[-1] ** -0.5}
    call = Fp8Call({}, options, codes, scales, (1, 1, 1), 64)
    assert wrong((out, lse), call) == []


def test_the_result_of_codes_is_of_the_type_of_out(rng):
    q, k, v = arrays(rng)
    made = [codes_of_heads(x, 1, "bshd") for x in (q, k, v)]
    descales = {f"{n}_descale": d for n, (_, d) in zip("qkv", made, strict=True)}
    out = np.zeros((1, 5, 2, 64), np.float16)
    attend(*(codes for codes, _ in made), **descales, out=out)
    exact, _ = reference.attention(q, k, v)
    assert 0 < rms(out - exact) < 0.08 * rms(exact)


def test_scales_may_be_strided_and_shared_by_batch_entries(rng):
    q, k, v = (np.concatenate([x, -x[:, ::-1]]) for x in arrays(rng, 5, 20))
    made = {n: codes_of_heads(x, 1, "bshd") for n, x in zip("qkv", (q, k, v), strict=True)}
    codes = [codes for codes, _ in made.values()]
    plain = {f"{n}_descale": d for n, (_, d) in made.items()}
    strided = {n: np.repeat(d, 2, axis=0)[::2] for n, d in plain.items()}
    assert strided["q_descale"].strides[0] == 8
    out = attend(*codes, **plain)[0]
    assert attend(*codes, **strided)[0].tobytes() == out.tobytes()
    # Both entries have the same scales.
    shared = {n: d[:1] for n, d in plain.items()}
    assert attend(*codes, **shared)[0].tobytes() == out.tobytes()


# Plans


@thorough
def test_a_plan_quantises_anew_at_each_launch(rng):
    q, k, v = arrays(rng)
    plan = numflash.plan(q, k, v, precision="fp8", fp8=BLOCKS, config=CONFIG)
    assert CONFIG in plan.kernel
    for _ in range(2):
        assert plan.launch() is plan.out
        expected, lse = attend(q, k, v, precision="fp8", fp8=BLOCKS)
        assert plan.out.tobytes() == expected.tobytes() and plan.lse.tobytes() == lse.tobytes()
        for x in (q, k, v):
            x[...] = rng.standard_normal(x.shape) * 3


@thorough
def test_a_plan_on_a_cache_sees_what_changes_in_it(rng):
    q, k, v = arrays(rng, 1)
    k8, v8 = cache_of(k, v)
    others = cache_of(k[:, ::-1], 2 * v)
    plan = numflash.plan(q, k8, v8, config=CONFIG)
    before = plan.launch().copy()
    for x, other in zip((k8, v8), others, strict=True):
        x.data[...], x.descale[...] = other.data, other.descale
    after = plan.launch()
    assert after.tobytes() == attend(q, *others)[0].tobytes() != before.tobytes()


# There and back


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dequantised_numbers_are_quantised_to_the_same_codes(rng, dtype):
    # Codes are exact in 16 bits, and a scale that is a power of two changes nothing.
    x = E4M3.decode(rng.integers(0, 120, (1, 9, 2, 64))) * np.float32(2.0**-4)
    x[0, :, :, 0] = E4M3.peak * 2.0**-4
    first = numflash.quantize_fp8(x.astype(numflash.runtime.views.numpy_dtype(dtype)), "token")
    back = numflash.dequantize_fp8(first)
    assert (back.astype(np.float32) == x).all() and back.dtype.name == dtype
    again = numflash.quantize_fp8(back, "token")
    assert again.data.tobytes() == first.data.tobytes()
    assert again.descale.tobytes() == first.descale.tobytes()


def test_gradients_are_those_of_the_dequantised_numbers_in_16_bits(rng):
    q, k, v = arrays(rng, 18, 20, 1)
    inputs = {"q": numflash.quantize_fp8(q, "head", hadamard=True)}
    inputs |= {"k": numflash.quantize_fp8(k, "head", hadamard=True)}
    inputs |= {"v": numflash.quantize_fp8(v, "head", transposed=True)}
    out8, lse8 = attend(**inputs)
    with pytest.raises(numflash.UnsupportedError, match="no backward on 8-bit floats"):
        numflash.attention_backward(out8, *inputs.values(), out8, lse8)
    numbers = {name: numflash.dequantize_fp8(x) for name, x in inputs.items()}
    assert all(
        0 < rms(numbers[n] - x) < 0.06 * rms(x) for n, x in zip("qkv", (q, k, v), strict=True)
    )
    report = numflash.check(
        **numbers,
        dout=rng.standard_normal(out8.shape).astype(np.float16),
        config={
            "forward": "sm80-m16n16w1s1",
            "backward-dq": "sm80-m16n16w1s2",
            "backward-dkdv": "sm80-m16n16w1s2",
        },
    )
    assert [e.name for e in report.errors] == ["out", "lse", "dq", "dk", "dv"]
    assert report.passed, f"\n{report}"
