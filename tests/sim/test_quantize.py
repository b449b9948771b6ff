"""Quantisation and back in the simulator: the bits of `numflash.reference`, whatever the config.

Results are poisoned before, inputs hold infinities and NaN, and what lies around them is NaN.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from numflash import reference
from numflash.api import quantize as fp8_arrays
from numflash.api.quantize import dequantize_fp8, quantize_fp8
from numflash.calls import quantization, ready
from numflash.calls.quantization import Quantization, Relayout
from numflash.configs import QuantizeConfig
from numflash.configs.formats import FORMATS
from numflash.problem.fp8 import Fp8Array, Fp8Recipe
from numflash.reference.fp8 import tokens_innermost
from numflash.runtime.arrays import library_of
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.numpy_arrays import NumPy
from numflash.runtime.views import numpy_dtype
from numflash.simulator import SEED as SEED_OF_SIMULATOR
from tests.support.covering import some

SEED = 5


@dataclass(frozen=True)
class Case:
    """An array and its quantisation; `form` is its layout in memory, `values` its numbers."""

    shape: tuple[int, ...]
    dtype: str = "float16"
    granularity: str = "block"
    block: int = 32
    hadamard: bool = False
    transposed: bool = False
    format: str = "e4m3"
    generation: str = "sm80"
    form: str = "plain"
    values: str = "special"
    layout: str = "bshd"

    def __str__(self):
        flags = [name for name in ("hadamard", "transposed") if getattr(self, name)]
        shape = "x".join(map(str, self.shape))
        share = self.granularity + (str(self.block) if self.granularity == "block" else "")
        more = self.format, self.generation, self.form, self.values, self.layout
        return "-".join([shape, self.dtype, share, *flags, *more])

    def array(self) -> np.ndarray:
        rng = np.random.default_rng(sum(self.shape))
        x = rng.standard_normal(self.shape)
        flat = x.reshape(-1)
        flat[::7] *= 30
        if self.values == "special":
            flat[3::5] = 0
            flat[4::10] = -0.0
            flat[11 :: self.shape[-1] * 3] = np.inf
            flat[13 :: self.shape[-1] * 5] = -np.inf
            flat[17 :: self.shape[-1] * 4] = np.nan
        factor = {"huge": 2e3 if self.dtype == "float16" else 1e36, "tiny": 1e-7}
        with np.errstate(over="ignore"):
            x = (x * factor.get(self.values, 1)).astype(numpy_dtype(self.dtype))
        if self.values == "zeros":
            x[:] = 0
        if self.values == "subnormal":
            x[:] = rng.integers(-3, 4, self.shape) * 1e-45
        return placed(x, self.form)


def placed(x: np.ndarray, form: str) -> np.ndarray:
    """The same numbers, lying in memory in another way, amid 0xff bytes."""
    if form == "plain":
        return x
    first = {"strided": 16, "unaligned": 1, "columns": 0}[form]
    whole = np.zeros([n + 16 for n in x.shape[:-1]] + [x.shape[-1] + 32], x.dtype)
    whole.view(np.uint8)[...] = 0xFF
    if form == "columns":
        whole = np.ascontiguousarray(np.moveaxis(whole, -1, 0))
        whole = np.moveaxis(whole, 0, -1)
    view = whole[(*(slice(3, 3 + n) for n in x.shape[:-1]), slice(first, first + x.shape[-1]))]
    view[...] = x
    return view


CASES = [
    # Every granularity, rotated or not, transposed or not; dtypes, head dims and GPUs in turn.
    Case((1, 33, 2, 64)),
    Case((2, 33, 1, 32), "bfloat16", hadamard=True, generation="sm89"),
    Case((1, 33, 1, 80), "float32", transposed=True, generation="sm75"),
    Case((1, 113, 1, 64), "float16", block=128, hadamard=True, transposed=True, format="e5m2"),
    Case((1, 33, 1, 128), "bfloat16", "token", generation="sm75", form="strided"),
    Case((1, 17, 1, 192), "float16", "token", hadamard=True, generation="sm89"),
    Case((2, 19, 1, 64), "float32", "token", transposed=True, generation="sm89"),
    Case((1, 20, 1, 128), "float16", "token", hadamard=True, transposed=True, form="unaligned"),
    Case((2, 33, 1, 64), "float32", "head", format="e5m2"),
    Case((1, 21, 1, 128), "float16", "head", hadamard=True, generation="sm89"),
    Case((1, 21, 2, 32), "bfloat16", "head", transposed=True, form="strided"),
    Case((1, 9, 1, 192), "float16", "head", hadamard=True, transposed=True, form="columns"),
    Case((1, 9, 2, 64), "bfloat16", "tensor", form="unaligned"),
    Case((2, 5, 1, 64), "float16", "tensor", hadamard=True, generation="sm75"),
    Case((1, 70, 1, 64), "float16", "tensor", transposed=True, generation="sm89"),
    Case((1, 9, 2, 33), "float32", "tensor", hadamard=True, transposed=True),
    # Other blocks: one row, two maxima to a scale, one scale of more than a block can own.
    Case((1, 17, 1, 128), block=16, hadamard=True, transposed=True, generation="sm89"),
    Case((1, 17, 1, 256), "bfloat16", block=16, hadamard=True, generation="sm89"),
    Case((1, 33, 1, 256), "float16", transposed=True, generation="sm89"),
    Case((1, 257, 1, 32), block=128, transposed=True, generation="sm89"),
    Case((1, 257, 1, 17), block=256, generation="sm89"),
    Case((1, 70, 1, 192), block=512, generation="sm89", values="normal"),
    Case((1, 1, 1, 1), "float32", block=128, hadamard=True, transposed=True),
    # Values.
    Case((1, 17, 1, 64), values="zeros", hadamard=True),
    Case((1, 17, 1, 64), values="huge", generation="sm75"),
    Case((1, 17, 1, 64), "bfloat16", values="huge", hadamard=True, format="e5m2"),
    Case((1, 17, 1, 64), "float32", values="tiny", generation="sm89"),
    Case((1, 17, 1, 64), "float32", values="subnormal"),
    # Layouts, and arrays with fewer axes.
    Case((1, 2, 33, 64), layout="bhsd", transposed=True, generation="sm89"),
    Case((19, 2, 80), "float32", block=16, form="unaligned", hadamard=True),
    Case((33, 80), "bfloat16", form="strided", generation="sm89"),
]


@pytest.fixture(autouse=True)
def poisoned_results(monkeypatch):
    """0xff bytes wherever a kernel leaves a result out: NaN, and a NaN's code."""
    monkeypatch.setattr(ready, "_ready", {})
    empty = NumPy.empty

    def poisoned(self, shape, dtype, device):
        array = empty(self, shape, dtype, device)
        array.view(np.uint8)[...] = 0xFF
        return array

    monkeypatch.setattr(NumPy, "empty", poisoned)


@pytest.fixture
def use_generation(monkeypatch):
    """Make the kernels those of another generation of instructions."""
    return lambda name: monkeypatch.setattr(quantization, "generation", lambda limits: name)


def expected(case: Case, x):
    """(codes as they are stored, codes, descale) by the reference."""
    recipe = case.granularity, case.block, case.hadamard, SEED, case.format
    with np.errstate(over="ignore"):
        codes, descale = reference.quantize_fp8(x, *recipe, layout=case.layout)
    stored = codes.reshape((1,) * (4 - codes.ndim) + codes.shape)
    if codes.ndim == 2:
        stored = codes[None, :, None]
    if case.layout == "bhsd":
        stored = stored.swapaxes(1, 2)
    return tokens_innermost(stored) if case.transposed else stored, codes, descale


def quantized(case: Case, x) -> Fp8Array:
    return quantize_fp8(
        x,
        case.granularity,
        case.block,
        case.hadamard,
        SEED,
        format=case.format,
        transposed=case.transposed,
        layout=case.layout,
    )


def expect_equal_bits(got, wanted):
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    assert got.tobytes() == np.ascontiguousarray(wanted).tobytes()


@pytest.mark.parametrize("case", some(CASES, every=9), ids=str)
def test_codes_and_scales_have_the_bits_of_the_reference_there_and_back(case, use_generation):
    use_generation(case.generation)
    x = case.array()
    stored, codes, descale = expected(case, x)
    got = quantized(case, x)
    expect_equal_bits(got.data, stored)
    expect_equal_bits(got.descale, descale)
    assert (got.shape, got.dtype, got.layout) == (x.shape, case.dtype, case.layout)
    assert (got.format, got.transposed) == (case.format, case.transposed)

    block = case.block if case.granularity == "block" else 1
    turn = case.hadamard, SEED, case.format, case.layout
    with np.errstate(over="ignore"):
        numbers = reference.dequantize_fp8(codes, descale, x.shape[-1], block, *turn)
    back = dequantize_fp8(got, "float32")
    assert (back.shape, back.dtype) == (x.shape, np.float32)
    np.testing.assert_array_equal(back, numbers)
    is_number = ~np.isnan(numbers)
    expect_equal_bits(back[is_number], numbers[is_number])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_way_back_rounds_once(dtype):
    x = Case((1, 5, 1, 80), dtype, values="normal").array()
    got = quantize_fp8(x, block=16, hadamard=True)
    exact = dequantize_fp8(got, "float32")
    expect_equal_bits(dequantize_fp8(got), exact.astype(x.dtype))


ORDERED = Case((1, 33, 1, 64), block=64, hadamard=True, transposed=True, values="normal")


def test_results_do_not_depend_on_the_order_of_threads(each_seed, use_generation):
    use_generation("sm89")
    for granularity in ("block", "tensor")[: 1 + (each_seed == 0)]:
        case = replace(ORDERED, granularity=granularity)
        x = case.array()
        stored, _, descale = expected(case, x)
        got = quantized(case, x)
        expect_equal_bits(got.data, stored)
        expect_equal_bits(got.descale, descale)


def test_codes_are_of_x_times_the_scale():
    # Not of x / descale; next to ties it matters.
    rng = np.random.default_rng(0)
    amax = rng.uniform(1, 2, 4096).astype(np.float32)
    peak, e4m3 = np.float32(256), FORMATS["e4m3"]
    ties = rng.choice((e4m3.values[1:118] + e4m3.values[2:119]) / 2, 4096)
    scale, descale = peak / amax, amax / peak
    x = (ties * descale).astype(np.float32)
    codes = e4m3.encode(x * scale)
    differ = np.nonzero(codes != e4m3.encode(x / descale))[0][:8]
    assert differ.size == 8
    rows = np.zeros((1, 8, 1, 64), np.float32)
    rows[0, :, 0, 0], rows[0, :, 0, 1] = amax[differ], x[differ]
    got = quantize_fp8(rows, "token")
    expect_equal_bits(got.data[0, :, 0, 1], codes[differ])
    expect_equal_bits(got.descale[0, 0], descale[differ])
    block = quantize_fp8(rows[:, :1])
    expect_equal_bits(block.data[0, :, 0, 1], codes[differ[:1]])


def test_each_scale_of_more_tokens_than_a_block_owns_has_maxima_of_its_own(monkeypatch):
    def small_blocks(generation, head_dim, block=None, **options):
        return None if block else QuantizeConfig(generation, 16, 1, **options)

    monkeypatch.setattr(quantization, "quantize_config", small_blocks)
    case = Case((2, 70, 1, 64), block=32)
    x = case.array()
    got = quantized(case, x)
    stored, _, descale = expected(case, x)
    expect_equal_bits(got.data, stored)
    expect_equal_bits(got.descale, descale)
    assert len(np.unique(descale)) == 6


def bound(ready, *arrays):
    """The results of a made-ready object for arrays, launched."""
    library = library_of(arrays[0], "x")
    *results, launches = ready.bind(*(library.operand(x) for x in arrays), library)
    for launch in launches.values():
        launch(0)
    return results


@pytest.mark.parametrize(
    ("granularity", "transposed", "format", "generation"),
    [
        ("block", False, "e4m3", "sm80"),
        ("token", True, "e5m2", "sm89"),
        ("head", True, "e4m3", "sm89"),
    ],
)
def test_statistics_are_those_of_the_codes(
    granularity, transposed, format, generation, use_generation
):
    use_generation(generation)
    x = Case((2, 35, 1, 64), values="normal").array()
    recipe = Fp8Recipe(granularity, 32, True, SEED)
    options = {"format": format, "transposed": transposed}
    view = library_of(x, "x").view(x)
    ready = Quantization(view, "bshd", recipe, statistics=True, **options)
    data, descale, statistics = bound(ready, x)
    tokens = ready.statistics_tokens
    assert statistics.shape == ready.statistics_shape == (2, 1, -(-35 // tokens), 2)

    codes, wanted = reference.quantize_fp8(x, granularity, 32, True, SEED, format)
    expect_equal_bits(data, tokens_innermost(codes) if transposed else codes)
    expect_equal_bits(descale, wanted)
    block = 32 if granularity == "block" else 1
    turned = reference.fp8.rotate(x.astype(np.float32), SEED).astype(np.float64)
    error = turned - reference.dequantize_fp8(codes, wanted, 64, block, format=format)
    for i in range(statistics.shape[2]):
        part = slice(tokens * i, tokens * (i + 1))
        for j, values in enumerate((turned, error)):
            sums = np.square(values[:, part]).sum((1, 3))
            np.testing.assert_allclose(statistics[:, :, i, j], sums, rtol=1e-5)


def test_statistics_are_the_same_whatever_the_order_of_threads(monkeypatch):
    x = Case((1, 33, 1, 64), values="normal").array()
    ready = Quantization(library_of(x, "x").view(x), "bshd", Fp8Recipe(block=64), statistics=True)
    found = set()
    for seed in range(3):
        monkeypatch.setattr(SEED_OF_SIMULATOR, "value", seed)
        found.add(bound(ready, x)[2].tobytes())
    assert len(found) == 1


def test_rows_are_rotated_only_where_that_is_wanted():
    x = Case((1, 9, 1, 64), values="normal").array()
    view = library_of(x, "x").view(x)
    ready = Quantization(view, "bshd", Fp8Recipe(hadamard=True), rotated=False)
    expect_equal_bits(bound(ready, x)[0], reference.quantize_fp8(x)[0])


@pytest.mark.parametrize(
    ("shape", "transposed", "form"),
    [
        ((1, 33, 2, 64), False, "strided"),
        ((1, 33, 2, 64), True, "plain"),
        ((2, 17, 1, 80), False, "plain"),
        ((2, 17, 1, 80), True, "unaligned"),
        ((1, 17, 1, 128), False, "columns"),
        ((1, 17, 1, 128), True, "strided"),
        ((1, 70, 1, 192), True, "plain"),
        ((1, 17, 1, 250), False, "unaligned"),
        ((1, 17, 1, 250), True, "strided"),
    ],
    ids=str,
)
def test_codes_are_laid_out_anew(shape, transposed, form):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    dtypes = {"plain": "uint8", "strided": "e4m3", "unaligned": "e5m2", "columns": "uint8"}
    kind = FORMATS.get(dtypes[form])
    x = placed(codes.view(kind.dtype) if kind else codes, form)
    ready = Relayout(library_of(x, "x").view(x), "bshd", transposed=transposed)
    (data,) = bound(ready, x)
    wanted = np.pad(codes, [(0, 0)] * 3 + [(0, -shape[3] % 64)])
    expect_equal_bits(data, tokens_innermost(wanted) if transposed else wanted)
    assert data.shape == ready.data_shape


def test_codes_of_the_other_layout_are_laid_out_anew():
    codes = np.arange(2 * 3 * 64, dtype=np.uint8).reshape(1, 2, 3, 64)
    ready = Relayout(library_of(codes, "x").view(codes), "bhsd", transposed=False)
    expect_equal_bits(bound(ready, codes)[0], codes.swapaxes(1, 2))


@pytest.mark.parametrize("granularity", ["tensor", "head", "block", "token"])
@pytest.mark.parametrize("shape", [(1, 0, 2, 64), (0, 3, 2, 64), (2, 3, 0, 64)], ids=str)
def test_nothing_is_quantized_to_nothing(granularity, shape):
    x = np.zeros(shape, np.float16)
    for transposed in (False, True):
        got = quantize_fp8(x, granularity, transposed=transposed)
        assert got.data.size == 0
        assert got.descale.shape == got.recipe.descale_shape(shape[0], shape[2], shape[1])
        assert (got.descale == np.float32(2.0**-100) / np.float32(256)).all()
        assert dequantize_fp8(got).shape == shape


def test_a_problem_is_made_ready_once(monkeypatch):
    made = []

    class Counted(Quantization):
        def __init__(self, *args, **kwargs):
            made.append(args)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(fp8_arrays, "Quantization", Counted)
    x = Case((1, 5, 1, 64)).array()
    first, second = quantize_fp8(x), quantize_fp8(x.copy())
    assert len(made) == 1 and first.data is not second.data
    expect_equal_bits(first.data, second.data)
    quantize_fp8(x[:, :4])
    quantize_fp8(x, seed=1)
    quantize_fp8(x, transposed=True)
    quantize_fp8(x, format="e5m2")
    assert len(made) == 5
    monkeypatch.setattr(ready, "_MAX_READY", 2)
    quantize_fp8(x, block=64)
    assert len(ready._ready) == 1


X = np.zeros((1, 4, 1, 64), np.float16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": X.astype(np.int8)}, TypeError, "x must have one of the dtypes .* got int8"),
        ({"x": [1.0]}, TypeError, "x must be a NumPy array"),
        ({"x": X[0, 0, 0]}, ValueError, "x must have 2 dimensions"),
        ({"x": np.zeros((4, 0), np.float16)}, ValueError, "head_dim of x must be at least 1"),
        ({"x": np.zeros((4, 257), np.float16)}, UnsupportedError, "at most 256, got 257"),
        ({"format": "e3m4"}, ValueError, "format must be one of e4m3, e5m2, got 'e3m4'"),
        ({"format": []}, TypeError, "format must be a string, got \\[\\]"),
        ({"transposed": 1}, TypeError, "transposed must be True or False, got 1"),
        ({"layout": "sbhd"}, ValueError, "layout must be one of bshd, bhsd, got 'sbhd'"),
        ({"layout": 3}, TypeError, "layout must be a string, got 3"),
        ({"granularity": "row"}, ValueError, "granularity must be one of"),
        ({"block": 48}, ValueError, "block must be a power of two"),
        ({"stream": "now"}, TypeError, "stream must be a CUDA stream"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    if "transposed" in arguments:
        quantize_fp8(X, transposed=True)  # an equal 1 must not pass for it afterwards
    with pytest.raises(error, match=message):
        quantize_fp8(**{"x": X, **arguments})


def test_wrong_arguments_of_the_way_back_are_refused():
    got = quantize_fp8(X)
    for wrong, error, message in (
        (X, TypeError, "x must be an Fp8Array"),
        (
            replace(got, data=got.data[:, :2]),
            ValueError,
            r"x.data must have shape \(1, 4, 1, 64\)",
        ),
        (replace(got, data=got.data.view(np.int8)), TypeError, "x.data must be uint8"),
        (replace(got, descale=got.descale[0]), ValueError, "x.descale must have shape"),
        (replace(got, format="e3m4"), ValueError, "format must be one of"),
    ):
        with pytest.raises(error, match=message):
            dequantize_fp8(wrong)
    with pytest.raises(ValueError, match="dtype must be one of"):
        dequantize_fp8(got, "int8")
    with pytest.raises(TypeError, match="dtype must be a string"):
        dequantize_fp8(got, np.float16)
    with pytest.raises(TypeError, match="x must have one of the dtypes uint8, float8_e4m3fn"):
        Relayout(library_of(X, "x").view(X), "bshd", transposed=True)
