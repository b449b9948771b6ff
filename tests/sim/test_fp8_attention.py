"""FP8 attention in the simulator, against attention in float64 of the very same codes.

Two rules. The error is within twice that of the specification, `reference.attention_of_codes`, and
one rounding of the result. And the kernel is the specification, with P rounded as it says: what
lies between them is a tenth of what the specification loses, and that rounding. `Fp8Call` and
`differences` are what the tests of broken kernels and those on a GPU share.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest

import numflash
from numflash import reference
from numflash.api.comparison import measure, remainder_of_codes
from numflash.calls import ready
from numflash.configs import parse_config
from numflash.configs.formats import FORMATS
from numflash.problem.fp8 import Fp8Array, Fp8Recipe
from numflash.ptx import cuda, mov_ctaid_x, u32
from numflash.reference.arrays import heads_first
from numflash.reference.fp8 import attention_of_codes, tokens_innermost
from numflash.runtime.arrays import to_numpy
from numflash.runtime.driver import limits_of_device
from numflash.runtime.numpy_arrays import NumPy
from numflash.runtime.views import Pointer
from numflash.simulator import SEED, GlobalPointer, launch
from tests.support.attention_cases import (
    FP8_CONFIGS,
    SIM_CASES,
    AttentionCase,
    is_of_masks,
    on_fp8,
)
from tests.support.covering import FULL, some

SORTS = ("16-bit", "arrays", "codes")
# Quantising takes longest in the simulator, and has tests of its own.
TURNS = ("16-bit", *("codes", "arrays") * 4)
RECIPES = (
    Fp8Recipe(),
    Fp8Recipe("token", seed=1),
    Fp8Recipe("block", 32, hadamard=False),
    Fp8Recipe("head", seed=7),
    Fp8Recipe("block", 16, seed=3),
    Fp8Recipe("tensor", hadamard=False),
    Fp8Recipe("block", 64),
)
# Half a unit in the last place, relative.
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
E4M3 = FORMATS["e4m3"]


def rms(x) -> float:
    """The root of the mean square."""
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


@dataclass(frozen=True)
class Fp8Call:
    """A call on 8-bit floats, and the codes and scales that it attends to.

    Attributes:
        arguments: q, k, v and what goes with them.
        options: the other options, with arrays on the host.
        codes, descales, blocks: as `attention_of_codes` takes them.
        head_dim_v: of the result.
    """

    arguments: dict
    options: dict
    codes: tuple
    descales: tuple
    blocks: tuple
    head_dim_v: int

    def expected(self, tile_n: int | None) -> tuple[np.ndarray, np.ndarray]:
        """(out, lse) in float64; tile_n None leaves P as it is."""
        out, lse = attention_of_codes(
            *self.codes, *self.descales, blocks=self.blocks, tile_n=tile_n, **self.options
        )
        return out[..., : self.head_dim_v], lse


def tokens_per_scale(recipe: Fp8Recipe) -> int:
    """The block that the reference takes."""
    return 1 if recipe.granularity == "token" else recipe.block


def fp8_array(
    x, recipe: Fp8Recipe, layout: str, transposed: bool, upload: Callable = np.ascontiguousarray
) -> Fp8Array:
    """An `Fp8Array` made by the reference."""
    codes, descale = quantized(x, recipe, layout)
    stored = heads_first(codes, layout == "bhsd").swapaxes(1, 2)
    stored = tokens_innermost(stored) if transposed else stored
    arrays = upload(np.ascontiguousarray(stored)), upload(np.ascontiguousarray(descale))
    return Fp8Array(*arrays, recipe, x.shape, x.dtype.name, layout, transposed=transposed)


def quantized(x, recipe: Fp8Recipe, layout: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales by the reference."""
    share = recipe.granularity, recipe.block, recipe.hadamard, recipe.seed
    return reference.quantize_fp8(x, *share, layout=layout)


def codes_of_heads(x, heads_kv: int, layout: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales (batch, heads_kv), as flash-attn has them: groups of heads share one."""
    first = heads_first(x, layout == "bhsd").astype(np.float32)
    batch, heads, *rest = first.shape
    groups = first.reshape(batch, heads_kv, -1)
    descale = np.maximum(np.abs(groups).max(-1), np.float32(1e-20)) / np.float32(E4M3.largest)
    codes = E4M3.encode(groups / descale[..., None]).reshape(batch, heads, *rest)
    codes = codes if layout == "bhsd" else np.ascontiguousarray(codes.swapaxes(1, 2))
    return codes, descale


def make_call(
    case: AttentionCase,
    sort: str,
    number: int,
    upload: Callable = np.ascontiguousarray,
    recipes: tuple[Fp8Recipe, ...] = RECIPES,
) -> Fp8Call:
    """The case as a call of a sort; `number` chooses among recipes and forms of arrays."""
    arrays = {name: x for name, x in case.arrays().items() if name in "qkv"}
    options, layout = case.call_options(), case.options.get("layout", "bshd")
    head_dim, head_dim_v = case.shape[5:]
    options.setdefault("softmax_scale", head_dim**-0.5)
    if sort == "codes":
        made = {n: codes_of_heads(x, case.shape[4], layout) for n, x in arrays.items()}
        arguments = {}
        for i, (name, (codes, descale)) in enumerate(made.items()):
            is_float = (number + i) % 2 and upload is np.ascontiguousarray
            arguments[name] = upload(codes.view(E4M3.dtype) if is_float else codes)
            arguments[f"{name}_descale"] = upload(descale)
        codes, descales = zip(*made.values(), strict=True)
        descales = tuple(descale[:, :, None] for descale in descales)
        return Fp8Call(arguments, options, codes, descales, (1, 1, 1), head_dim_v)
    choices, recipe = recipes, recipes[number % len(recipes)]
    recipes = dict.fromkeys("qkv", recipe)
    arguments = {name: upload_view(x, upload) for name, x in arrays.items()}
    if sort == "16-bit":
        arguments |= {"fp8": recipe}
    else:
        # Scales of their own, but the same rotation.
        others = [choices[(number + i) % len(choices)] for i in (2, 3)]
        recipes["k"] = replace(others[0], hadamard=recipe.hadamard, seed=recipe.seed)
        recipes["v"] = replace(others[1], hadamard=False)
        for name in ("qkv", "kv", "k", "qv")[number % 4]:
            transposed = name == "v" and number % 3 > 0
            each = replace(recipes[name], hadamard=False) if name == "v" else recipes[name]
            arguments[name] = fp8_array(arrays[name], each, layout, transposed, upload)
        for name in "qkv":
            if not isinstance(arguments[name], Fp8Array):
                recipes[name] = recipe
                arguments["fp8"] = recipe
    recipes["v"] = replace(recipes["v"], hadamard=False)
    made = {name: quantized(x, recipes[name], layout) for name, x in arrays.items()}
    codes, descales = zip(*made.values(), strict=True)
    blocks = tuple(tokens_per_scale(recipes[name]) for name in "qkv")
    return Fp8Call({**arguments, "precision": "fp8"}, options, codes, descales, blocks, head_dim_v)


def upload_view(x, upload: Callable):
    """A host array stays as it lies; elsewhere it is copied."""
    return x if upload is np.ascontiguousarray else upload(np.ascontiguousarray(x))


def differences(out, lse, call: Fp8Call, tile_n: int, lse_tolerance: float = 1e-5) -> list[str]:
    """Which rules a result breaks: none, if the kernel is right."""
    spec, spec_lse = call.expected(tile_n)
    exact, exact_lse = call.expected(None)
    got, lse = to_numpy(out), to_numpy(lse).astype(np.float64)
    got_dtype, rounding = got.dtype.name, ROUNDING[got.dtype.name]
    got = got.astype(np.float64)
    found = []
    error = measure("out", got, exact, spec, rounding, remainder_of_codes(exact, exact_lse))
    if not error.passed:
        found.append(f"error {error.error:.3g}, budget {error.budget:.3g}")
    with np.errstate(invalid="ignore"):
        # Not above, as a NaN is not below.
        apart = rms(got - spec)
        allowed = 0.1 * rms(spec - exact) + rounding * rms(spec) + 2.0**-25
    if got.size and not apart <= allowed:
        found.append(f"{apart:.3g} from the specification, {allowed:.3g} allowed")
    seen = np.isfinite(spec_lse)
    if not (lse[~seen] == spec_lse[~seen]).all():
        found.append("lse of rows that see no key")
    if got_dtype == "bfloat16":
        # A score is then the cap times a tanh that is right to 2 ** -11 of itself.
        lse_tolerance += 2.0**-11 * call.options.get("softcap", 0.0)
    off = np.abs(lse[seen] - spec_lse[seen]) / np.maximum(1, np.abs(spec_lse[seen]))
    if not (off <= lse_tolerance).all():
        found.append(f"lse is off by {off.max():.3g}")
    return found


def tile_n_of(config: str) -> int:
    """Keys of a tile of a config."""
    return parse_config("forward", config).tile_n


@pytest.fixture(autouse=True)
def every_instruction(monkeypatch):
    """A simulated GPU that has those for 8-bit floats, too."""
    monkeypatch.setenv("NUMFLASH_SIM_ARCH", "sm_89")
    monkeypatch.setattr(ready, "_ready", {})
    limits_of_device.cache_clear()
    yield
    limits_of_device.cache_clear()


@pytest.fixture(autouse=True)
def poisoned_results(monkeypatch):
    """0xff bytes, which are NaN, wherever a kernel leaves a result out."""
    empty = NumPy.empty

    def poisoned(self, shape, dtype, device):
        array = empty(self, shape, dtype, device)
        array.view(np.uint8)[...] = 0xFF
        return array

    monkeypatch.setattr(NumPy, "empty", poisoned)


def run(call: Fp8Call, config: str, **more):
    """(out, lse) of a call with a config."""
    config = config.removesuffix("-packed") if "alibi_slopes" in call.options else config
    everything = {**call.arguments, **call.options, **more}
    # The simulator runs all threads of the kernel that puts splits together, also idle ones.
    configs = {"forward": config, "combine": "w2"}
    return numflash.attention(**everything, return_lse=True, config=configs)


def _cases():
    """(case, sort, config, number): configs and sorts in turn; all of them if asked for.

    Of the masks, which other kernels have too, each form and some masks; each name once.
    """
    cases, found = on_fp8(SIM_CASES), []
    if FULL:
        chosen = [(c, s, f) for c in cases for s in SORTS for f in FP8_CONFIGS]
    else:
        masks = [case for case in cases if is_of_masks(case)][::9]
        cases = [*masks, *(case for case in cases if not is_of_masks(case))]
        cases = list({case.name: case for case in reversed(cases) if case.name != "67"}.values())
        chosen = [
            (case, TURNS[i % len(TURNS)], FP8_CONFIGS[i % len(FP8_CONFIGS)])
            for i, case in enumerate(cases)
        ]
    for i, (case, sort, config) in enumerate(chosen):
        found.append(pytest.param(case, sort, config, i, id=f"{case}-{sort}-{config}"))
    return found


@pytest.mark.parametrize(("case", "sort", "config", "number"), some(_cases(), every=12))
def test_results_are_those_of_the_specification(case, sort, config, number):
    call = make_call(case, sort, number)
    assert differences(*run(call, config), call, tile_n_of(config)) == []


def problem(seqlen_q=18, seqlen_k=70, heads=1, head_dim=64, **options) -> AttentionCase:
    """A problem with one key-value head."""
    shape = (1, seqlen_q, seqlen_k, heads, 1, head_dim, head_dim)
    return AttentionCase("problem", shape, "float16", options=options)


@pytest.mark.parametrize("config", some(["fp8-sm89-m32n64w2s2", "fp8-sm80-m32n32w2s1"], every=2))
def test_no_order_of_threads_changes_a_bit(config, monkeypatch):
    # Number 6: K and V with scales for 32 and for each token.
    call = make_call(problem(causal=True), "arrays", 6)
    found = set()
    for seed in (1, 2):
        monkeypatch.setattr(SEED, "value", seed)
        found.add(tuple(x.tobytes() for x in run(call, config)))
    assert len(found) == 1


@pytest.mark.parametrize("config", some(["fp8-sm89-m16n64w1s1", "fp8-sm80-m16n32w1s1x2"], every=2))
def test_queries_that_see_no_key_give_zeros(config):
    call = make_call(problem(21, 5, causal=True), "arrays", 1)
    out, lse = run(call, config)
    assert (out[0, :16] == 0).all() and (lse[0, 0, :16] == -np.inf).all()
    assert (out[0, 16:] != 0).any() and np.isfinite(lse[0, 0, 16:]).all()


@pytest.mark.parametrize("config", some(["fp8-sm89-m16n64w1s1", "fp8-sm75-m16n32w1s1"], every=2))
def test_without_keys_all_is_zero(config):
    q, k = np.ones((1, 3, 1, 64), np.float16), np.ones((1, 0, 1, 64), np.float16)
    out, lse = numflash.attention(q, k, k, precision="fp8", return_lse=True, config=config)
    assert (out == 0).all() and (lse == -np.inf).all()


@pytest.mark.parametrize("hadamard", some([False, True], True))
@pytest.mark.parametrize(
    "config", some(["fp8-sm89-m16n64w1s1", "fp8-sm75-m16n32w1s1"], "fp8-sm89-m16n64w1s1")
)
def test_a_nan_in_q_is_one_in_its_row_only(config, hadamard):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, n, 1, 64)).astype(np.float16) for n in (18, 40, 40))
    recipe = Fp8Recipe("block", 32, hadamard)

    def attend():
        return numflash.attention(
            q, k, v, precision="fp8", fp8=recipe, return_lse=True, config=config
        )

    # The largest of its row is another, so that the scale stays.
    q[0, 5, 0, 3] = 0.0
    others, other_lse = attend()
    q[0, 5, 0, 3] = np.nan
    out, lse = attend()
    assert np.isnan(out[0, 5]).all() and np.isnan(lse[0, 0, 5])
    rest = np.arange(18) != 5
    if not hadamard:
        assert (out[0, rest] == others[0, rest]).all()
        assert (lse[0, 0, rest] == other_lse[0, 0, rest]).all()
    assert np.isfinite(out[0, rest].astype(np.float32)).all()


def test_a_nan_in_v_is_one_in_its_column_only():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, n, 1, 64)).astype(np.float16) for n in (18, 40, 40))
    v[0, 33, 0, 7] = np.nan
    out = numflash.attention(q, k, v, precision="fp8", config="fp8-sm89-m16n64w1s1")
    assert np.isnan(out[..., 7]).all() and np.isfinite(np.delete(out, 7, 3)).all()


def test_infinities_become_the_largest_number():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, n, 1, 64)).astype(np.float16) for n in (18, 40, 40))
    for x in (q, k, v):
        x[0, 7, 0, 5], x[0, 9, 0, 6] = np.inf, -np.inf
    recipe = Fp8Recipe("head", hadamard=False)
    codes, descales = zip(*(quantized(x, recipe, "bshd") for x in (q, k, v)), strict=True)
    assert all(c[0, 7, 0, 5] == 0x7E and c[0, 9, 0, 6] == 0xFE for c in codes)
    call = Fp8Call(
        {"q": q, "k": k, "v": v, "precision": "fp8", "fp8": recipe},
        {"softmax_scale": 0.125},
        codes,
        descales,
        (1, 1, 1),
        64,
    )
    out, lse = run(call, "fp8-sm89-m16n64w1s1")
    assert np.isfinite(out).all() and differences(out, lse, call, 64) == []


def test_each_block_reads_where_it_stands():
    def where(y: Pointer(u32)):
        y[2 * (cuda.blockIdx.x * 32 + cuda.threadIdx.x)] = mov_ctaid_x()
        cuda.syncthreads()
        y[2 * (cuda.blockIdx.x * 32 + cuda.threadIdx.x) + 1] = mov_ctaid_x()

    y = np.full(5 * 64, 99, np.uint32)
    launch(where, 5, 32, [GlobalPointer(y, u32)], 0)
    assert (y == np.repeat(np.arange(5), 64)).all()


def broken_results(call: Fp8Call, tile_n: int):
    """(what is wrong, out, lse): results that the rules must refuse."""
    out, lse = (x.astype(t) for x, t in zip(call.expected(tile_n), ("f2", "f4"), strict=True))
    exact = call.expected(None)[0].astype(np.float16)
    yield "P not rounded", exact, lse
    row = out.copy()
    row[0, 3] = out[0, 4]
    yield "a row of another", row, lse
    yield "a NaN", np.where(np.arange(64) == 9, np.float16(np.nan), out), lse
    yield "lse off", out, lse + np.float32(1e-3)
    yield "lse infinite", out, np.full_like(lse, -np.inf)


def test_the_rules_refuse_what_is_wrong():
    call = make_call(problem(), "arrays", 0)
    out, lse = call.expected(64)
    assert differences(out.astype(np.float16), lse.astype(np.float32), call, 64) == []
    for what, out, lse in broken_results(call, 64):
        assert differences(out, lse, call, 64), what
    # Tiles of another width have other units of P.
    out, lse = call.expected(32)
    assert differences(out.astype(np.float16), lse.astype(np.float32), call, 64)
