"""Tracing: what functions may be written with, what they get, and what is refused, and where."""

import functools
import inspect
import math
import operator

import numpy as np
import pytest

import numflash
from numflash import masks
from numflash import math as nm
from numflash.functions import trace as tracing
from numflash.functions.paths import MAX_PATHS
from numflash.functions.trace import describe, trace
from tests.support.program_values import metadata

SLOPES = metadata(np.zeros(3, np.float32))
IDS = metadata(np.zeros(9, np.int32))
OUTSIDE = np.zeros(9, np.float32)


def text(score_mod=None, mask_mod=None, aux=(), **options):
    return trace(score_mod, mask_mod, aux, **options).program.text


# Ways to write functions


class Torch:
    """As PyTorch asks an argument: by `__torch_function__`, with a function that has a name."""

    def __getattr__(self, name):
        def function(*args, **keywords):
            (symbol, *_) = (a for a in args if hasattr(a, "__torch_function__"))
            return type(symbol).__torch_function__(function, (), args, keywords)

        function.__name__ = name
        return function


torch = Torch()
SAME = {
    "ours": lambda s, b, h, q, k: nm.where(q >= k, 20 * nm.tanh(s / 20), -math.inf),
    "NumPy's": lambda s, b, h, q, k: np.where(q >= k, 20 * np.tanh(s / 20), -np.inf),
    "PyTorch's": lambda s, b, h, q, k: torch.where(
        torch.ge(q, k), torch.mul(torch.tanh(torch.true_divide(s, 20)), 20), -float("inf")
    ),
    "methods": lambda s, b, h, q, k: ((s / 20).tanh() * 20).masked_fill(~q.ge(k), -math.inf),
    "casts": lambda s, b, h, q, k: nm.where(
        (q - k >= 0).bool(), (20 * nm.tanh(s.to("float32") / 20)).to(s.dtype), -math.inf
    ),
}


def test_functions_are_the_same_program_however_they_are_written():
    texts = {name: text(function) for name, function in SAME.items()}
    assert texts.pop("casts").replace("le(0,sub(i,j))", "le(j,i)") == texts["ours"]
    assert len(set(texts.values())) == 1


NAMED = {
    "clip": (lambda x: np.clip(x, -1, 2), lambda x: nm.minimum(nm.maximum(x, -1), 2)),
    "clip from above": (lambda x: np.clip(x, None, 2), lambda x: nm.minimum(x, 2)),
    "clamp": (lambda x: torch.clamp(x, min=-1.0), lambda x: nm.maximum(x, -1)),
    "square": (np.square, lambda x: x * x),
    "reciprocal": (lambda x: torch.reciprocal(x), lambda x: 1 / x),
    "negative": (np.negative, operator.neg),
    "abs": (np.absolute, abs),
    "power": (lambda x: np.power(x, 3), lambda x: x * (x * x)),
    "log1p": (np.log1p, lambda x: nm.log(x + 1)),
    "expm1": (np.expm1, lambda x: nm.exp(x) - 1),
    "relu": (lambda x: torch.relu(x), lambda x: nm.maximum(x, 0.0)),
    "silu": (lambda x: torch.silu(x), lambda x: x * nm.sigmoid(x)),
    "ceil": (np.ceil, lambda x: -nm.floor(-x)),
    "sign": (np.sign, lambda x: nm.where(x > 0, 1.0, nm.where(x < 0, -1.0, 0.0))),
    "floor": (math.floor, lambda x: nm.floor(x).int()),
    "trunc": (math.trunc, lambda x: x.int()),
    "divmod": (lambda x: divmod(x, 2.0)[0], lambda x: nm.floor(x / 2)),
    "remainder": (lambda x: x % 2.0, lambda x: x - nm.floor(x / 2) * 2.0),
    "logical": (
        lambda x: nm.where(np.logical_and(x > 0, np.logical_not(x > 1)), x, 0),
        lambda x: nm.where((x > 0) & ~(x > 1), x, 0),
    ),
    "a power of e": (lambda x: math.e**x, lambda x: nm.exp2(x * math.log2(math.e))),
    "__rsub__": (lambda x: torch.__rsub__(x, 2.0), lambda x: 2.0 - x),
}


@pytest.mark.parametrize("name", NAMED)
def test_functions_of_libraries_are_what_they_are_made_of(name):
    one, other = NAMED[name]
    assert text(lambda s, *_: one(s)) == text(lambda s, *_: other(s))


def test_numbers_of_any_kind_are_constants():
    for two in (2, 2.0, np.float32(2), np.int64(2), np.array(2.0), np.float16(2)):
        assert text(lambda s, *_, x=two: s * x) == "1;;score=mul(s,2.0)"
        assert text(lambda s, *_, x=two: x * s) == "1;;score=mul(s,2.0)"
    assert text(lambda s, *_: s * True) == ""


def test_callables_of_any_kind():
    class Scaled:
        def __init__(self, x):
            self.x = x

        def __call__(self, s, b, h, q, k):
            return s * self.x

        def method(self, s, b, h, q, k):
            return self(s, b, h, q, k)

    def scaled(x, s, b, h, q, k):
        return s * x

    scored = "1;;score=mul(s,3.0)"
    assert text(Scaled(3)) == text(Scaled(3).method) == scored
    assert text(functools.partial(scaled, 3)) == scored
    # What has no key is traced each time: its number is not remembered.
    instance = Scaled(3)
    assert text(instance) == scored
    instance.x = 4
    assert text(instance) == "1;;score=mul(s,4.0)"


# What functions get


def test_a_bias_comes_first_and_its_broadcast_axes_are_not_indexed():
    bias = metadata(np.zeros((2, 1, 5, 9), np.float16))
    found = trace(lambda s, b, h, q, k, x: s * x[h], None, (SLOPES,), bias=bias)
    assert found.names == ("bias", "aux0")
    assert found.program.text == (
        "1;float16[4u],float32[1u];score=mul(add(aux0[b,0,i,j],s),aux1[h])"
    )
    expanded = np.broadcast_to(np.zeros((1, 3, 1, 9), np.float32), (2, 3, 5, 9))
    assert text(bias=metadata(expanded)) == "1;float32[4u];score=add(aux0[0,h,0,j],s)"
    assert text(bias=metadata(np.zeros(9, np.float32))) == "1;float32[1u];score=add(aux0[j],s)"


def test_a_mask_and_mask_mod_are_both_obeyed():
    mask = metadata(np.zeros((5, 9), np.bool_))
    both = text(None, masks.causal, mask=mask)
    assert both in (
        "1;bool[2u];keep=and(aux0[i,j],le(j,i))",
        "1;bool[2u];keep=and(le(j,i),aux0[i,j])",
    )
    assert trace(None, None, mask=mask, bias=mask_bias()).names == ("bias", "mask")


def mask_bias():
    return metadata(np.zeros((1, 1), np.float32))


def test_numbers_of_aux_are_arguments_of_the_kernel():
    def score(s, b, h, q, k, factor, count):
        return s * factor + k // count

    kinds = [(0.5, 3), (np.float32(2), np.int64(5)), (np.float64(1), True)]
    assert len({text(score, aux=aux) for aux in kinds}) == 1
    assert text(score, aux=kinds[0]).startswith("1;f32,i32;")


def test_arrays_may_be_indexed_axis_by_axis():
    table = metadata(np.zeros((4, 5, 6), np.float32))
    one = text(lambda s, b, h, q, k, t: s + t[b, h, k - q], aux=(table,))
    other = text(lambda s, b, h, q, k, t: s + t[b][h][k - q], aux=(table,))
    assert one == other
    scalar = metadata(np.zeros((), np.float32))
    assert text(lambda s, b, h, q, k, t: s + t, aux=(scalar,)).endswith("add(aux0[],s)")


def test_a_shape_that_a_function_asks_for_is_part_of_its_program():
    def score(s, b, h, q, k, t):
        return s + t[nm.minimum(k, t.shape[0] - 1)]

    sizes = [metadata(np.zeros(n, np.float32)) for n in (5, 9, 5)]
    texts = [text(score, aux=(x,)) for x in sizes]
    assert texts[0] == texts[2] != texts[1] and "min(j,8)" in texts[1]

    def plain(s, b, h, q, k, t):
        return s + t[k]

    assert len({text(plain, aux=(x,)) for x in sizes}) == 1


def test_one_of_two_functions_may_take_no_arrays():
    both = text(masks.alibi, masks.causal, (SLOPES,))
    assert both.endswith("keep=le(j,i)") and "aux0[h]" in both
    assert "aux0[i]" in text(masks.soft_cap(5.0), masks.document, (IDS,))
    with pytest.raises(TypeError, match="neither score_mod nor mask_mod takes any"):
        text(masks.soft_cap(5.0), masks.causal, (IDS,))
    # One that takes any number takes all.
    assert "aux0" in text(masks.alibi, lambda b, h, q, k, *aux: aux[0][h] > 0, (SLOPES,))


def test_a_function_is_traced_once_for_all_arrays_of_a_kind(monkeypatch):
    monkeypatch.setattr(tracing, "_known", {})
    calls = []

    def made(x):
        def score(s, b, h, q, k, t, n):
            return s * x + t[h] * n

        return score

    original = tracing._trace
    monkeypatch.setattr(tracing, "_trace", lambda *args: calls.append(1) or original(*args))
    for n, x in ((1.0, 2.0), (2.0, 2.0), (3.0, 2.0)):
        text(made(x), aux=(metadata(np.zeros(3, np.float32)), n))
        text(made(x), aux=(metadata(np.zeros(7, np.float32)), n))
    assert len(calls) == 1
    text(made(3.0), aux=(metadata(np.zeros(3, np.float32)), 1.0))
    text(made(2.0), aux=(metadata(np.zeros(3, np.float16)), 1.0))
    text(made(2.0), aux=(metadata(np.zeros(6, np.float32)[::2]), 1.0))
    text(made(2.0), aux=(metadata(np.zeros(3, np.float32)), 1))
    assert len(calls) == 5


# Python's `if`


def test_a_mask_may_have_an_if():
    def causal(b, h, q, k):
        if q < k:
            seen = False
        else:
            seen = True
        return seen

    assert text(None, causal) == text(None, masks.causal)
    window = text(None, lambda b, h, q, k: 0 <= q - k < 5)
    assert window == text(None, lambda b, h, q, k: (q - k >= 0) & (q - k < 5))


def test_an_if_on_a_score_needs_the_derivative():
    def leaky(s, b, h, q, k):
        if s < 0:
            return 0.1 * s
        return s

    with pytest.raises(TypeError, match=r"where\(\).*score_mod_grad="):
        text(leaky)
    found = text(leaky, score_mod_grad=lambda s, b, h, q, k: 0.1 if s < 0 else 1.0)
    assert found == "1;;t0=lt(s,0.0);score=where(t0,mul(s,0.1),s);slope=where(t0,0.1,1.0)"
    with pytest.raises(TypeError, match="which is not given"):
        text(score_mod_grad=leaky)


def test_a_loop_over_what_only_the_device_knows_is_refused():
    def forever(b, h, q, k):
        n = 0
        while q > n:
            n += 1
        return k < n

    with pytest.raises(TypeError, match=f"forever.*more than {MAX_PATHS} times"):
        text(None, forever)

    def many(b, h, q, k):
        return sum(1 if q > 2 * n else 0 for n in range(7)) > k

    with pytest.raises(TypeError, match=f"many.*more than {MAX_PATHS} ways"):
        text(None, many)


# What is refused: the message names the function, its line and the rule


def if_on_a_score(s, b, h, q, k):
    t = s * 2
    if t > 0:  # here
        return t
    return s


def pythons_math(s, b, h, q, k):
    return math.exp(s)  # here


def an_array_outside(s, b, h, q, k):
    return s + OUTSIDE[q]  # here


def an_array_outside_added(s, b, h, q, k):
    return OUTSIDE + s  # here


def a_list_outside(s, b, h, q, k):
    return s + [1.0, 2.0][h]  # here


def through_another(s, b, h, q, k):
    return inner(s)


def inner(x):
    return float(x)  # here


def an_unknown_function(s, b, h, q, k):
    return np.arctan2(s, 1.0)  # here


def a_bad_argument(s, b, h, q, k):
    return np.tanh(s, where=q)  # here


def an_array_as_a_whole(s, b, h, q, k, x):
    return s + x  # here


def too_many_indices(s, b, h, q, k, x):
    return s + x[h, q]  # here


def a_float_index(s, b, h, q, k, x):
    return s + x[q / 2]  # here


def a_negative_index(s, b, h, q, k, x):
    return s + x[-1]  # here


def a_slice(s, b, h, q, k, x):
    return s + x[:]  # here


def a_method_of_an_array(s, b, h, q, k, x):
    return s + x.sum()  # here


def bits_of_a_float(s, b, h, q, k):
    return s & q  # here


def a_large_number(s, b, h, q, k):
    return s * (q + 2**40)  # here


def a_long_loop(s, b, h, q, k):
    return sum(s for _ in range(3000))  # here


def a_string(s, b, h, q, k):
    return s * "2"  # here


REFUSED = {
    if_on_a_score: (0, "known on the device only; write where"),
    pythons_math: (0, "use those of numflash.math"),
    an_array_outside: (0, "outside of the function.*give it in aux"),
    an_array_outside_added: (0, r"shape \(9,\) comes from outside.*give it in aux"),
    a_list_outside: (0, "give it in aux"),
    an_unknown_function: (0, "arctan2 is not among the functions"),
    a_bad_argument: (0, "cannot be traced with these arguments"),
    an_array_as_a_whole: (1, r"aux0 is an array; index it"),
    too_many_indices: (1, r"aux0, of shape \(3,\), got 2 indices"),
    a_float_index: (1, "index 0 of aux0 is a float"),
    a_negative_index: (1, "must be at least 0, got -1"),
    a_slice: (1, "an index must be a whole number"),
    a_method_of_an_array: (1, "only elements can be read"),
    bits_of_a_float: (0, "truth values or whole numbers, not floats"),
    a_large_number: (0, "32 bits, got 1099511627776"),
    a_long_loop: (0, "more than 2000 operations"),
    a_string: (0, "str is no number"),
}


def place_of(function) -> str:
    """The line with `# here`."""
    lines, first = inspect.getsourcelines(function)
    (line,) = (n for n, line in enumerate(lines) if "# here" in line)
    return f"{__file__}:{first + line}", lines[line].strip()


@pytest.mark.parametrize("function", REFUSED, ids=lambda f: f.__name__)
def test_what_cannot_be_traced_is_refused_at_its_line(function):
    count, rule = REFUSED[function]
    with pytest.raises(TypeError, match=rule) as error:
        text(function, aux=(SLOPES,) * count)
    place, line = place_of(function)
    assert f"score_mod {function.__name__} ({place}), in `{line}`: " in str(error.value)


def test_the_line_may_be_in_a_function_that_is_called():
    with pytest.raises(TypeError) as error:
        text(through_another)
    place, line = place_of(inner)
    assert f"score_mod through_another ({place}), in `{line}`: " in str(error.value)


def test_an_error_of_the_users_own_stays_as_it_is():
    def wrong(s, b, h, q, k):
        return s * {}["scale"]

    with pytest.raises(KeyError, match="scale"):
        text(wrong)


@pytest.mark.parametrize(
    "function, rule",
    [
        (lambda s, b, h, q, k: s > 0, "it returns a truth value, where a number is wanted"),
        (lambda s, b, h, q, k: True, "it returns a truth value"),
        (lambda s, b, h, q, k: None, "it returns nothing"),
        (lambda s, b, h, q, k: (s, s), "a tuple is no number"),
        (lambda s, b, h, q, k: OUTSIDE, "give it in aux"),
        (lambda s, b, h, q: s, r"called with \(score, batch, head, q_idx, kv_idx\), and takes"),
        (lambda s, b, h, q, k, x: s, r"and takes \(s, b, h, q, k, x\)"),
        (3, "score_mod must be a function, got int"),
    ],
)
def test_a_score_mod_that_gives_no_score(function, rule):
    with pytest.raises(TypeError, match=rule):
        text(function)


@pytest.mark.parametrize(
    "function, rule",
    [
        (lambda b, h, q, k: q - k, "it returns a number, where a truth value is wanted"),
        (lambda b, h, q, k: 1, "it returns a number"),
        (lambda b, h, q, k: None, "it returns nothing"),
        (lambda s, b, h, q, k: q > k, r"called with \(batch, head, q_idx, kv_idx\), and takes"),
        ("causal", "mask_mod must be a function, got str"),
    ],
)
def test_a_mask_mod_that_is_no_mask(function, rule):
    with pytest.raises(TypeError, match=rule):
        text(None, function)


@pytest.mark.parametrize(
    "options, error, rule",
    [
        ({"bias": metadata(np.zeros((5, 5), np.int32))}, TypeError, "bias must be of a float"),
        ({"mask": metadata(np.zeros((5, 5), np.int32))}, TypeError, "mask must be of bool"),
        ({"mask": metadata(np.zeros((5, 5), np.float32))}, TypeError, "mask must be of bool"),
        ({"bias": metadata(np.zeros((1,) * 5, np.float32))}, ValueError, "got 5 axes"),
        ({"bias": metadata(np.zeros(5))}, TypeError, "bias: arrays of aux must be of float16"),
        ({"aux": (metadata(np.zeros(5)),)}, TypeError, "aux0: arrays of aux must be of"),
        ({"aux": ("2",)}, TypeError, "aux0 must be an array or a number, got str"),
        ({"aux": (2**31,)}, ValueError, "aux0 must fit into 32 bits, got 2147483648"),
        ({"aux": (None,)}, TypeError, "aux0 must be an array or a number, got NoneType"),
    ],
)
def test_arrays_and_numbers_that_no_program_reads(options, error, rule):
    with pytest.raises(error, match=rule):
        text(lambda s, b, h, q, k, *aux: s * 2, **options)


def test_descriptions():
    assert str(describe(metadata(np.zeros((3, 4), np.float16)), "x")) == "float16[2u]"
    assert str(describe(metadata(np.zeros((3, 4), np.float16).T), "x")) == "float16[2]"
    assert str(describe(metadata(np.zeros((3, 1), np.float16).T), "x")) == "float16[2u]"
    assert [str(describe(x, "x")) for x in (1, True, np.int8(3), np.bool_(True))] == ["i32"] * 4
    assert [str(describe(x, "x")) for x in (1.0, np.float16(3))] == ["f32"] * 2


def test_the_modules_are_reached_by_name():
    assert numflash.math.tanh is nm.tanh and numflash.masks.causal is masks.causal
    assert set(nm.__all__) >= {"where", "minimum", "rsqrt", "sigmoid", "floor", "abs"}
