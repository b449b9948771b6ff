"""The emitted functions of programs, run by a tiny kernel, against NumPy."""

import ml_dtypes
import numpy as np
import pytest

import numflash
from numflash import masks
from numflash import math as nm
from numflash.functions import emission
from numflash.functions.arrays import Array, Number
from numflash.functions.nodes import LEAF, apply, const, load, number, to
from numflash.functions.program import Program
from numflash.functions.trace import trace
from numflash.tiles import programs
from tests.host.numflash.functions.test_program import random_program
from tests.support.program_kernel import SHAPE, run
from tests.support.program_values import in_float64, metadata, value
from tests.support.score_functions import SCORES

S, B, H, I, J = (LEAF[name] for name in "sbhij")
PLACES = dict(zip("bhij", np.ogrid[tuple(slice(n) for n in SHAPE)], strict=True))


def inputs(seed=0):
    return (np.random.default_rng(seed).standard_normal(SHAPE) * 2).astype(np.float32)


def close(got, expected, rtol=3e-5):
    expected = np.broadcast_to(expected, got.shape)
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", SCORES)
def test_a_function_does_in_a_kernel_what_it_does_in_numpy(name):
    function, aux = SCORES[name]
    program = trace(function, masks.causal, tuple(map(metadata, aux))).program
    x = inputs()
    scores, slopes, kept = run(program, aux, x)
    leaves = {"s": x.astype("f8"), **PLACES}
    with np.errstate(all="ignore"):
        expected = function(leaves["s"], *PLACES.values(), *in_float64(aux))
    close(scores, expected)
    close(slopes, value(program.slope, leaves, aux), rtol=1e-4)
    np.testing.assert_array_equal(
        kept, np.broadcast_to(PLACES["j"] <= PLACES["i"], SHAPE).astype("i4")
    )


AT_PLACES = {
    "T5",
    "documents",
    "checkerboard",
    "bias",
    "flags",
    "bytes",
    "division",
    "of a float index",
    "whole arithmetic",
    "number of keys a group",
    # Multiples of a distance may be whole numbers that no float holds.
    "twice",
    "compared",
}
LONG_DISTANCES = {
    "product": lambda s, b, h, q, k: s - 0.5 * (q - k) * (q - k) * (h + 1),
    "twice": lambda s, b, h, q, k: s + (2 * q - 3 - 2 * k) * 0.25 - nm.maximum(k - q, 3),
    "selected": lambda s, b, h, q, k: s * nm.where(q >= k + 2, q - k, b) - nm.where(k == q, 1, h),
    "compared": lambda s, b, h, q, k: nm.where((q - k > 3) | (3 * k + h < 3 * q), s, 2 * s),
}


@pytest.mark.parametrize("name", [*SCORES, *LONG_DISTANCES])
def test_a_function_of_the_distance_only(name):
    function, aux = SCORES.get(name) or (LONG_DISTANCES[name], ())
    program = trace(function, masks.sliding_window(4, 1), tuple(map(metadata, aux))).program
    functions = programs.make_program(program.text)
    assert (functions.score_by_distance is None) == (name in AT_PLACES)
    assert functions.keep_by_distance is not None
    if name in AT_PLACES:
        return
    expected, got = (run(program, aux, inputs(), by_distance=way) for way in (False, True))
    for one, other in zip(expected, got, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)


def test_a_mask_at_places_has_no_distance():
    for mask in (masks.prefix(4), masks.chunked(3), lambda b, h, q, k: q + k < 9):
        functions = programs.make_program(trace(None, mask).program.text)
        assert functions.keep_by_distance is None
        assert functions.score_by_distance is not None  # it does nothing


@pytest.mark.parametrize("seed", range(12))
def test_a_random_program(seed):
    program, rng = random_program(seed), np.random.default_rng(seed)
    half = rng.standard_normal((3, 26)).astype(np.float16)[:, ::2]
    counts = rng.integers(-9, 9, 13).astype(np.int32)
    aux = (half, counts, rng.integers(0, 2, 13).astype(np.bool_), 1.5, 5, np.array(7, np.uint8))
    x = inputs(seed)
    scores, _, kept = run(program, aux, x)
    leaves = {"s": x.astype("f8"), **PLACES}
    expected = np.broadcast_to(value(program.score, leaves, aux), SHAPE)
    # Large numbers have few digits left, and floors and casts jump.
    usual = np.isfinite(expected) & (np.abs(expected) < 1e4)
    near = np.isclose(scores, expected, rtol=1e-3, atol=1e-3)
    assert not usual.any() or near[usual].mean() > 0.97
    if program.keep is not None:
        np.testing.assert_array_equal(
            kept, np.broadcast_to(value(program.keep, leaves, aux), SHAPE).astype("i4")
        )


DTYPES = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
    "bool": np.bool_,
}


@pytest.mark.parametrize("name", DTYPES)
def test_an_array_of_each_dtype_is_read_with_any_strides(name):
    numbers = np.random.default_rng(1).integers(0, 100, (2, 3, 13, 10)) - (name[0] in "fi") * 40
    array = (numbers % 2 if name == "bool" else numbers).astype(DTYPES[name])
    array = array.transpose(0, 1, 3, 2)[:, :, ::-1]
    described = Array(name, 4)
    element = load(0, described.type, [B, H, I, J])
    program = Program((described,), apply("add", S, to(element, "f")))
    x = inputs()
    scores, _, _ = run(program, (array,), x)
    close(scores, x + array.astype("f8"), rtol=1e-6)


def test_a_computed_index_is_brought_inside_and_a_row_of_neighbours_needs_no_stride():
    table = np.arange(15, dtype=np.float32).reshape(3, 5)
    index = apply("sub", apply("mul", J, const(2)), const(6))
    program = Program((Array("float32", 2, True),), apply("add", S, load(0, "f", [H, index])))
    assert "a0_s1" not in dict(program.fields)
    x = inputs()
    scores, _, _ = run(program, (table,), x)
    close(scores, x + table[PLACES["h"], np.clip(2 * PLACES["j"] - 6, 0, 4)], rtol=1e-6)


def test_whole_division_is_python_s_for_every_sign():
    """By constants, by powers of two, and by a number that may have any sign."""
    for divisor in (1, 2, 3, 7, 8, 97, 2**31 - 1):
        for op, numpy_op in (("floordiv", np.floor_divide), ("mod", np.mod)):
            for dividend, values in (
                (apply("sub", J, I), PLACES["j"] - PLACES["i"]),
                (apply("add", J, I), PLACES["j"] + PLACES["i"]),
                (apply("mul", apply("sub", J, I), const(99_999_999)), None),
            ):
                values = (PLACES["j"] - PLACES["i"]) * 99_999_999 if values is None else values
                program = Program((), apply("float", apply(op, dividend, const(divisor))))
                got = run(program)[0]
                close(got, numpy_op(values, divisor).astype("f4"), rtol=1e-7)
    for divisor in (-7, -1, 1, 4, 5):
        for op, numpy_op in (("floordiv", np.floor_divide), ("mod", np.mod)):
            program = Program(
                (Number("i32"),), apply("float", apply(op, apply("sub", J, I), number(0, "i")))
            )
            got = run(program, (divisor,))[0]
            close(got, numpy_op(PLACES["j"] - PLACES["i"], divisor), rtol=1e-7)
            assert not run(program, (0,))[0].any()


def test_powers_of_all_kinds():
    x = np.resize(np.array([-3, -2, -0.5, 0.0, 0.5, 2, 3, np.inf], np.float32), SHAPE)
    for exponent in (0, 1, 2, 3, -1, -2, 0.5, 2.5, -1.5):
        program = Program((Number("f32"),), apply("pow", S, number(0, "f")))
        with np.errstate(all="ignore"):
            close(run(program, (exponent,), x)[0], np.power(x.astype("f8"), exponent), rtol=1e-5)


@pytest.mark.parametrize("name", ["alibi", "T5", "bias", "of a float index"])
def test_a_partial_and_where_its_element_lies(name):
    function, aux = SCORES[name]
    program = trace(function, aux=tuple(map(metadata, aux))).program
    (partial,) = program.partials
    x = inputs()
    _, values, offsets = run(program, aux, x, with_partial=True)
    leaves = {"s": x.astype("f8"), **PLACES}
    close(values, value(partial.slope, leaves, aux))
    array = aux[partial.aux]
    flat = np.arange(array.size).reshape(array.shape)
    expected = value(load(partial.aux, "i", partial.load.args), leaves, (flat,))
    np.testing.assert_array_equal(offsets, np.broadcast_to(expected, SHAPE))


def test_the_empty_program_changes_nothing():
    functions = programs.make_program("")
    known = functions.known_of_head(None, 0, 0)
    assert functions.score(np.float32(2), 0, 0, known) == (2, 1)
    assert functions.keep(0, 0, known)


def test_what_a_head_knows_is_computed_once():
    slopes = metadata(np.zeros(3, np.float32))

    def score(s, b, h, q, k, slopes, factor):
        return s / (factor * slopes[h] + b) - slopes[h] * (q - k) * factor

    source = emission.source_of(trace(score, aux=(slopes, 0.5)).program)
    head, function, *_ = source.split("\n\n")
    # A division by what a head knows is a product, and factors of a head are put together.
    assert head.count("div(") == 1 and "div(" not in function
    assert function.count(" * ") == 1 and function.count("fma_rn_f32(") == 1
    assert "a0[" in head and "a0[" not in function


def test_the_source_has_no_name_that_is_not_given():
    for seed in range(30):
        program = random_program(seed)
        scope = {"__builtins__": {}, **programs._NAMES}
        exec(emission.source_of(program, True), scope)
        allowed = {*programs._NAMES, "abs", "min", "max", *dict(program.fields)}
        made = scope.keys() - programs._NAMES.keys() - {"__builtins__"}
        assert {"known_of_head", "score", "keep", "partial_0", "offset_0"} <= made
        for name in made:
            assert set(scope[name].__code__.co_names) <= allowed


def test_attention_by_functions_with_an_if_and_without_arrays():
    """The library's functions beside those that read arrays; and a given derivative."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, 9, 2, 32)).astype("float16") for _ in range(4))

    def leaky(s, b, h, i, j, slopes):
        if s < 0:
            return slopes[h] * s
        return s

    def slope(s, b, h, i, j, slopes):
        return slopes[h] if s < 0 else 1.0

    def strictly_before(b, h, i, j):
        return j < i or i == 0

    report = numflash.check(
        q,
        k,
        v,
        dout=dout,
        score_mod=leaky,
        score_mod_grad=slope,
        mask_mod=strictly_before,
        aux=(np.array([0.25, 0.5], np.float32),),
    )
    assert report.passed, f"\n{report}"
