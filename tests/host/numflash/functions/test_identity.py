"""Keys of functions: equal for equal meanings, none where nobody can be sure."""

import functools
import math
import operator
from types import SimpleNamespace

import numpy as np
import pytest
from numpy import tanh, where

import numflash
from numflash import masks
from numflash import math as nm
from numflash.functions import identity
from numflash.functions.identity import key_of

factor = 2.0
TABLE = np.zeros(3)
SETTINGS = SimpleNamespace(factor=2.0)


def scaled(x):
    return lambda s, b, h, q, k: s * x


def helper(x):
    return x * factor


def by_helper(s, b, h, q, k):
    return helper(s)


def recursive(n, s):
    return s if n == 0 else recursive(n - 1, s * 2)


def even(n):
    return n == 0 or odd(n - 1)


def odd(n):
    return n != 0 and even(n - 1)


def with_default(s, b, h, q, k, x=2.0):
    return s * x


def with_keyword(s, b, h, q, k, *, x=2.0):
    return s * x


def with_inner(s, b, h, q, k):
    def inner(x):
        return x * factor

    return inner(s)


KNOWN = {
    "closure": scaled(3),
    "global number": helper,
    "a function that it calls": by_helper,
    "recursion": recursive,
    "recursion of two": even,
    "default": with_default,
    "keyword": with_keyword,
    "inner": with_inner,
    "library": masks.causal,
    "of the library": masks.and_masks(masks.causal, masks.not_mask(masks.chunked(4))),
    "T5": masks.relative_position(),
    "partial": functools.partial(operator.mul, 3),
    "NumPy": lambda s, b, h, q, k: where(q > k, tanh(s), np.float32(factor)),
    "math": lambda s, b, h, q, k: s * math.log(2) + nm.exp(numflash.math.sin(s)),
    "a list": scaled([1.0, 2.0]),
    "a built-in": scaled(abs),
    "a ufunc": np.tanh,
    "none": None,
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_function_has_a_key_that_stays(name):
    key = key_of(KNOWN[name])
    assert (
        key is not None and hash(key) == hash(key_of(KNOWN[name])) and key == key_of(KNOWN[name])
    )


UNKNOWN = {
    "an array": scaled(TABLE),
    "an array of the module": lambda s, b, h, q, k: s + TABLE[q],
    "an object": scaled(SETTINGS),
    "an object of the module": lambda s, b, h, q, k: s * SETTINGS.factor,
    "a method of an object": "abc".upper,
    "a long list": scaled([1.0] * 100),
    "a module of others": scaled(pytest),
    "a name that is not there": lambda s, b, h, q, k: s * missing_name,  # noqa: F821
    "a callable object": functools.lru_cache(helper),
    "a class": scaled(SimpleNamespace),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_may_change_unseen_has_no_key(name):
    assert key_of(UNKNOWN[name]) is None


def test_a_function_that_changes_globals_or_imports_has_no_key():
    def changes(s, b, h, q, k):
        global factor
        factor = 3.0
        return s

    def imports(s, b, h, q, k):
        import json

        return s * len(json.dumps([]))

    assert key_of(changes) is None and key_of(imports) is None


def test_an_empty_cell_has_no_key():
    def outer():
        def function(s, b, h, q, k):
            return s * later

        found = key_of(function)
        later = 2.0
        return found, key_of(function)

    first, second = outer()
    assert first is None and second is not None


def test_closures_are_told_apart_by_their_numbers_only():
    assert key_of(scaled(3)) == key_of(scaled(3))
    others = [3.0, 4, True, 1, 0.0, -0.0, "3", None, np.float32(3), np.float64(3), (3,), [3]]
    keys = [key_of(scaled(x)) for x in others]
    assert len(set(keys)) == len(others) and key_of(scaled(3)) not in keys
    assert key_of(scaled(math.nan)) == key_of(scaled(math.nan))
    assert key_of(scaled(scaled(1))) == key_of(scaled(scaled(1))) != key_of(scaled(scaled(2)))


def test_a_number_that_changes_is_another_key(monkeypatch):
    keys = [key_of(x) for x in (helper, by_helper, with_inner)]
    monkeypatch.setitem(globals(), "factor", 3.0)
    changed = [key_of(x) for x in (helper, by_helper, with_inner)]
    assert all(a != b for a, b in zip(keys, changed, strict=True))
    monkeypatch.setitem(globals(), "factor", 2.0)
    assert [key_of(x) for x in (helper, by_helper, with_inner)] == keys


def test_a_cell_that_changes_is_another_key():
    x = 1.0

    def inner(s):
        return s * x

    def function(s, b, h, q, k):
        return inner(s)

    keys = [key_of(function)]
    x = 2.0
    keys.append(key_of(function))
    x = 1.0
    keys.append(key_of(function))
    assert keys[0] == keys[2] != keys[1]


def test_contents_and_defaults_that_change_are_another_key():
    numbers = [1.0, 2.0]
    function, other = scaled(numbers), scaled({"a": 1})
    first = key_of(function)
    numbers[1] = 3.0
    assert key_of(function) != first
    other.__closure__[0].cell_contents["a"] = 2
    assert key_of(other) != key_of(scaled({"a": 1}))

    def default(s, b, h, q, k, x=2.0):
        return s * x

    first = key_of(default)
    default.__defaults__ = (3.0,)
    second = key_of(default)
    default.__code__ = (lambda s, b, h, q, k, x=2.0: s + x).__code__
    assert len({first, second, key_of(default)}) == 3
    keyword = key_of(with_keyword)
    with_keyword.__kwdefaults__["x"] = 5.0
    try:
        assert key_of(with_keyword) != keyword
    finally:
        with_keyword.__kwdefaults__["x"] = 2.0


def test_a_function_that_is_replaced_is_another_key(monkeypatch):
    first = key_of(by_helper)
    monkeypatch.setitem(globals(), "helper", lambda x: x)
    assert key_of(by_helper) != first


def test_a_key_that_is_known_is_not_read_again(monkeypatch):
    function = masks.relative_position()
    key = key_of(function)
    monkeypatch.setattr(identity._Sight, "key", None)  # not to be called
    assert key_of(function) is key


def test_functions_are_not_kept_alive():
    before = len(identity._seen)
    for n in range(10):
        key_of(scaled(n))
    assert len(identity._seen) <= before + 1
