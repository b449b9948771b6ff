"""The options of a call: each said once, and each where it belongs."""

import inspect

import numpy as np
import pytest

import numflash
from numflash.api import attention as api
from numflash.problem.options import ARRAY_OPTIONS, OPTIONS, AttentionOptions

NAMES = AttentionOptions._fields


class Asked(Exception):
    """Raised with the options that a call came to."""


def _asked(monkeypatch, function, *arrays, **given) -> AttentionOptions:
    def stop(*args):
        raise Asked(next(x for x in args if isinstance(x, AttentionOptions)))

    monkeypatch.setattr(api, "bind_forward", stop)
    monkeypatch.setattr(api, "prepare", stop)
    with pytest.raises(Asked) as caught:
        function(*arrays, **given)
    return caught.value.args[0]


@pytest.mark.parametrize(
    ("function", "arrays"), [(numflash.attention, 3), (numflash.attention_backward, 6)]
)
def test_every_option_comes_by_its_name(monkeypatch, function, arrays):
    """Public functions pass options by position: each must arrive in its own field."""
    taken = inspect.signature(function).parameters
    of_results = {"fp8", "max_rel_error", "out_dtype"}
    assert {name for name in NAMES if name in taken} >= {*NAMES} - of_results
    for name in NAMES:
        if name in taken:
            mark = object()
            options = _asked(monkeypatch, function, *[None] * arrays, **{name: mark})
            others = {n: x for n, x in options._asdict().items() if n != name}
            assert getattr(options, name) is mark
            assert others == {n: x for n, x in AttentionOptions()._asdict().items() if n != name}


def test_defaults_are_those_of_the_signature():
    parameters = inspect.signature(numflash.attention).parameters
    assert {option.name: option.default for option in OPTIONS} == {
        name: parameters[name].default for name in NAMES
    }
    AttentionOptions().check()


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
        "layout": "bhsd",
        "precision": "tf32",
        "config": "m16n16w2",
        "fp8": numflash.Fp8Recipe("token"),
        "max_rel_error": 0.5,
        "out_dtype": "float32",
    }
    # Of numbers that a launch fills in the key has the names.
    assert set(others) == {*NAMES} - {*ARRAY_OPTIONS, "dropout_p"}
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


def test_unknown_options_are_named_with_what_there_is():
    with pytest.raises(TypeError, match="plan got unknown options: colour; it takes out, softmax"):
        AttentionOptions.of("plan", {"colour": 1, "causal": True}, ("out",))


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
