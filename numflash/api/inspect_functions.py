"""The functions that `numflash-inspect` is asked about: from a command line to a program."""

import re
import runpy
from collections.abc import Callable
from importlib import import_module

from numflash.functions.trace import trace
from numflash.problem.programs import with_pairs
from numflash.runtime.views import ArrayView, contiguous_strides

_ARRAY = re.compile(r"(\w+)\[(\d)\]")
_RULE = "FILE.py:NAME or MODULE:NAME"


def program_of(
    score_mod: str | None, mask_mod: str | None, aux: list[str], bias: str | None, mask: bool
) -> str:
    """The text of the program that these describe.

    Args:
        score_mod, mask_mod: functions, as FILE.py:NAME, which is run, or MODULE:NAME.
        aux: what they get: an array as DTYPE[AXES], as in "float32[2]", or a number.
        bias: dtype of a bias with all four axes, contiguous; pairs of keys are aligned.
        mask: whether there is a mask like it.

    Raises:
        TypeError, ValueError: one of them is wrong.
    """
    read = [_described(text, f"aux{n}") for n, text in enumerate(aux)]
    given = {f"aux{n}": each for n, each in enumerate(read)}
    if bias is not None:
        given["bias"] = _array(bias, 4)
    if mask:
        given["mask"] = _array("bool", 4)
    traced = trace(
        None if score_mod is None else _function(score_mod),
        None if mask_mod is None else _function(mask_mod),
        read,
        bias=given.get("bias"),
        mask=given.get("mask"),
    )
    return with_pairs(*traced, given).text


def _function(text: str) -> Callable:
    where, colon, name = text.rpartition(":")
    if not colon or not name.isidentifier():
        raise ValueError(f"a function must be named as {_RULE}, got {text!r}")
    try:
        names = runpy.run_path(where) if where.endswith(".py") else vars(import_module(where))
    except (ImportError, OSError) as error:
        raise ValueError(f"{where} cannot be read: {error}") from error
    if not callable(names.get(name)):
        raise ValueError(f"{where} has no function {name}")
    return names[name]


def _described(text: str, name: str) -> ArrayView | int | float:
    if (found := _ARRAY.fullmatch(text)) is not None:
        return _array(found[1], int(found[2]))
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise ValueError(f"{name} must be a number or DTYPE[AXES], as in float32[2], got {text!r}")


def _array(dtype: str, axes: int) -> ArrayView:
    shape = (2,) * axes
    return ArrayView(0, shape, contiguous_strides(shape), dtype, 0)
