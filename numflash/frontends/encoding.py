"""A call's options as named arrays and a text, and back.

Graphs of frameworks (`torch.compile`, `torch.export`, XLA's cache) outlive the process that made
them. They hold arrays as arrays, and all else of a call in a text: numbers, words, and functions
of users as the texts of their programs. `decode` checks a text as if it came from a stranger, and
evaluates none of it.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import Any, NamedTuple

from numflash.functions.trace import trace
from numflash.functions.written import WrittenFunction
from numflash.problem.block_masks import NUMBER, Blocks, ListedBlocks
from numflash.problem.fp8 import Fp8Recipe
from numflash.problem.options import OPTIONS, AttentionOptions

FUNCTIONS = {"score_mod": "score", "score_mod_grad": "slope", "mask_mod": "keep"}
"""Option -> the result of a program that it is."""
_DEFAULTS = {option.name: option.default for option in OPTIONS}
# A schedule belongs to the process: without it each call lists its tiles.
BY_THEMSELVES = (*FUNCTIONS, "aux", "block_mask", "config", "fp8", "schedule")
"""Options that are neither arrays nor numbers and words."""


class Encoded(NamedTuple):
    """A call's options.

    Attributes:
        arrays: the caller's, by the names that `AttentionOptions.arrays` gives them.
        text: all else, and the order of the arrays; equal options have equal texts.
    """

    arrays: dict[str, Any]
    text: str


def encode(options: AttentionOptions, view_of: Callable[[Any, str], Any]) -> Encoded:
    """The options of a call, checked.

    Args:
        options: of the call.
        view_of: (array, name) -> its metadata, with `dtype` (a name), `shape` and `strides` in
            elements; for tracing functions.

    Raises:
        TypeError, ValueError: options that no call has, or functions that cannot be traced.
    """
    options.check()
    arrays, said = options.arrays(), {}
    for name, default in _DEFAULTS.items():
        value = getattr(options, name)
        if name not in BY_THEMSELVES and name not in arrays and value != default:
            said[name] = [*map(_plain, value)] if isinstance(value, tuple) else _plain(value)
    given = options.score_mod, options.mask_mod
    if given != (None, None):
        views = [_view(x, f"aux{n}", view_of) for n, x in enumerate(options.aux)]
        traced = trace(*given, views, score_mod_grad=options.score_mod_grad)
        said["program"] = traced.program.text
    said["aux"] = _numbers(options.aux)
    if options.block_mask is not None:
        said["block_mask"] = _said_of_blocks(options.block_mask, view_of)
    if options.fp8 is not None:
        said["fp8"] = asdict(options.fp8)
    if options.config is not None:
        config = options.config
        is_dict = isinstance(config, Mapping)
        said["config"] = {n: str(x) for n, x in config.items()} if is_dict else str(config)
    said["arrays"] = list(arrays)
    return Encoded(arrays, json.dumps(said, sort_keys=True, separators=(",", ":")))


def decode(text: str, arrays: Iterable[Any]) -> AttentionOptions:
    """The options of a text, with these arrays, in the order in which `encode` gave them.

    Raises:
        ValueError: no options have this text.
    """
    options, names = _decoded(text)
    return options.with_arrays(dict(zip(names, arrays, strict=True)))


def names_of(text: str) -> tuple[str, ...]:
    """The names of a text's arrays, in order. Raises ValueError as `decode`."""
    return _decoded(text).names


def _view(x, name: str, view_of: Callable):
    return x if isinstance(x, NUMBER) else view_of(x, name)


def _numbers(aux: Iterable[Any]) -> list:
    """The numbers of aux; None where an array stands."""
    return [_plain(x) if isinstance(x, NUMBER) else None for x in aux]


def _plain(x):
    return x.item() if hasattr(x, "item") else x


def _said_of_blocks(mask: ListedBlocks, view_of: Callable) -> dict[str, Any]:
    said = {"blocks": mask.blocks, "seqlens": mask.seqlens, "aux": _numbers(mask.aux)}
    if mask.mask_mod is not None:
        views = [_view(x, f"aux{n}", view_of) for n, x in enumerate(mask.aux)]
        said["program"] = trace(None, mask.mask_mod, views).program.text
    return said | {"is_of_function": mask.is_of_function}


class _Decoded(NamedTuple):
    """What a text says, None in place of arrays, and their names."""

    options: AttentionOptions
    names: tuple[str, ...]


@lru_cache(1024)
def _decoded(text: str) -> _Decoded:
    try:
        said = json.loads(text)
        names, program = tuple(said.pop("arrays")), said.pop("program", None)
        if program:
            for name, result in FUNCTIONS.items():
                if f"{result}=" in program:
                    said[name] = WrittenFunction(program, result)
        if "fp8" in said:
            said["fp8"] = Fp8Recipe(**said["fp8"])
        if "block_mask" in said:
            said["block_mask"] = _blocks(said["block_mask"])
        for name in ("window_size", "origin", "aux"):
            if name in said:
                said[name] = tuple(said[name])
        options = AttentionOptions(**said)
        options.check()
        options.with_arrays(dict.fromkeys(names))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"a call's options cannot be {text[:200]!r}: {error}") from error
    return _Decoded(options, names)


def _blocks(said: dict) -> ListedBlocks:
    (size, *rest), seqlens, program = said["blocks"], said["seqlens"], said.get("program")
    return ListedBlocks(
        Blocks(tuple(size), *rest),
        None if seqlens is None else tuple(seqlens),
        *[None] * 4,
        WrittenFunction(program, "keep") if program else None,
        tuple(said["aux"]),
        said["is_of_function"],
    )
