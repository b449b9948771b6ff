"""The options of a call: each said once, and each where it belongs."""

import inspect

import numpy as np
import pytest

import numflash
from numflash.api import attention as api
from numflash.api import explain, plans
from numflash.problem.options import (
    ARRAY_OPTIONS,
    GRADIENT_OPTIONS,
    OPTIONS,
    AttentionOptions,
    GradientOptions,
    options_of,
)

NAMES = AttentionOptions._fields
# Of sequences that lie one after another, and of caches: other functions take them.
OF_OTHERS = {"cu_seqlens_q", "cu_seqlens_k", "schedule", "page_table", "appended", "cached"} | {
    "num_splits"
}


class Asked(Exception):
    """Raised with the options that a call came to."""


def _asked(monkeypatch, function, *arrays, **given) -> AttentionOptions:
    def stop(*args):
        raise Asked(next(x for x in args if isinstance(x, AttentionOptions)))

    monkeypatch.setattr(api, "bind_forward", stop)
    monkeypatch.setattr(api, "bind_backward", stop)
    with pytest.raises(Asked) as caught:
        function(*arrays, **given)
    return caught.value.args[0]


@pytest.mark.parametrize(
    ("function", "arrays"), [(numflash.attention, 3), (numflash.attention_backward, 6)]
)
def test_every_option_comes_by_its_name(monkeypatch, function, arrays):
    """Public functions pass options by position: each must arrive in its own field."""
    taken = inspect.signature(function).parameters
    of_forward = {option.name for option in OPTIONS if not option.in_backward}
    left_out = of_forward if function is numflash.attention_backward else set()
    assert {name for name in NAMES if name in taken} == {*NAMES} - left_out - OF_OTHERS
    for name in NAMES:
        if name in taken:
            mark = object()
            options = _asked(monkeypatch, function, *[None] * arrays, **{name: mark})
            others = {n: x for n, x in options._asdict().items() if n != name}
            assert getattr(options, name) is mark
            assert others == {n: x for n, x in AttentionOptions()._asdict().items() if n != name}


def test_defaults_are_those_of_the_signature():
    parameters = inspect.signature(numflash.attention).parameters
    options = [option for option in OPTIONS if option.name not in OF_OTHERS]
    assert {option.name: option.default for option in options} == {
        option.name: parameters[option.name].default for option in options
    }
    AttentionOptions().check()
    parameters = inspect.signature(numflash.attention_backward).parameters
    taken = [option for option in options if option.in_backward] + [*GRADIENT_OPTIONS]
    given = {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert given.pop("stream") is None and given.pop("check_lengths") is False
    assert given == {option.name: option.default for option in taken}


def test_options_of_gradients_come_by_their_names(monkeypatch):
    def stop(*args):
        raise Asked(next(x for x in args if isinstance(x, GradientOptions)))

    monkeypatch.setattr(api, "bind_backward", stop)
    for name in GradientOptions._fields:
        mark = object()
        with pytest.raises(Asked) as caught:
            numflash.attention_backward(*[None] * 6, **{name: mark})
        assert caught.value.args[0] == GradientOptions(**{name: mark})


def test_a_key_of_gradients_holds_no_arrays():
    array = np.zeros(3)
    for wrt in (["q"], ("q",)):
        asked = GradientOptions(dlse=array, wrt=wrt, grad_dtype="float32")
        assert asked.arrays() == {"dlse": array}
        assert asked.without_arrays() == GradientOptions(wrt=("q",), grad_dtype="float32")


@pytest.mark.parametrize("function", [numflash.explain_dispatch, numflash.plan, numflash.warmup])
def test_functions_around_a_call_take_what_calls_take(monkeypatch, function):
    """Their options come by one table: none is taken by a call and refused by these."""
    seen = []
    for module in (explain, plans):
        monkeypatch.setattr(module, "options_of", lambda *args: seen.append(options_of(*args)))
    values = {option.name: object() for option in (*OPTIONS, *GRADIENT_OPTIONS)}
    arrays = [None] * 3 if function is not numflash.warmup else []
    with pytest.raises(TypeError, match="NoneType"):
        function(*arrays, **values)
    assert seen[0][0]._asdict() | seen[0][1]._asdict() == values


def test_the_key_tells_apart_whatever_a_call_is_made_ready_for():
    others = {
        "softmax_scale": 1.0,
        "causal": True,
        "causal_align": "top_left",
        "shift": 3,
        "window_size": (3, None),
        "softcap": 2.0,
        "origin": (0, 0, 0),
        "score_mod": lambda score, b, h, i, j: score + 1,
        "score_mod_grad": lambda score, b, h, i, j: score,
        "mask_mod": lambda b, h, i, j: i > j,
        "aux": (1.0,),
        "block_mask": numflash.BlockMask.from_tiles(np.ones((1, 1), bool)),
        "appended": 1,
        "cached": True,
        "batch_invariant": True,
        "num_splits": 4,
        "layout": "bhsd",
        "precision": "tf32",
        "config": "m16n16w2",
        "fp8": numflash.Fp8Recipe("token"),
        "max_rel_error": 0.5,
        "out_dtype": "float32",
    }
    # Of numbers that a launch fills in the key has the names.
    assert set(others) == {*NAMES} - {*ARRAY_OPTIONS, "dropout_p", "schedule"}
    keys = {AttentionOptions(**{name: value}).key() for name, value in others.items()}
    assert len(keys | {AttentionOptions().key()}) == len(others) + 1
    # Equal numbers of other types are other calls: one of them may be wrong.
    for name, one, other in (
        ("softcap", 1, True),
        ("causal", True, 1),
        ("window_size", (1, 2), (True, 2)),
        ("max_rel_error", 1, True),
        ("origin", (0, 0, 1), (0, 0, True)),
    ):
        assert AttentionOptions(**{name: one}).key() != AttentionOptions(**{name: other}).key()


def test_numbers_that_a_launch_fills_in_are_those_of_the_call_and_in_no_key():
    one, other = AttentionOptions(dropout_p=0.5, seed=1), AttentionOptions(dropout_p=0.1, seed=2)
    assert one.key() == other.key()
    assert one.numbers().keys() == other.numbers().keys()
    assert one.numbers() != other.numbers() and not AttentionOptions().numbers()
    assert not AttentionOptions(seed=3).numbers() and not AttentionOptions(dropout_p=0).numbers()
    assert one.arrays() == {} and AttentionOptions(seed=np.int64(3)).arrays() == {}
    array = np.array([1])
    assert AttentionOptions(dropout_p=0.5, seed=array).arrays() == {"seed": array}


@pytest.mark.parametrize("name", sorted({*ARRAY_OPTIONS} - {"seed"}))
def test_a_number_where_an_array_belongs_is_an_array_to_be_refused(name):
    """Dropped, it would be a mask or lengths that the caller thinks are there."""
    for number in (0, True, np.int32(3)):
        assert AttentionOptions(**{name: number}).arrays() == {name: number}


def test_unknown_options_are_named_with_what_there_is():
    with pytest.raises(TypeError, match="plan got unknown options: colour; it takes out, softmax"):
        options_of("plan", {"colour": 1, "causal": True}, ("out",))


def test_a_number_of_aux_that_changes_leaves_a_call_ready():
    def score_mod(score, batch, head, q_idx, kv_idx, factor, offset):
        return score * factor + offset

    def of(*aux):
        return AttentionOptions(score_mod=score_mod, aux=aux)

    assert of(0.5, 3).key() == of(2.0, -7).key()
    assert of(2.0, -7).numbers() == {"aux0": 2.0, "aux1": -7}
    assert of(0.5, 3).key() != of(1, 3).key() and of(0.5, 3).key() != of(0.5, 3.0).key()
    with pytest.raises(ValueError, match="aux1 must fit into 32 bits"):
        of(0.5, 2**31).numbers()
