"""Ranks agree on a call before its first message: messages that do not fit raise no error.

Too many bytes end the receiver's process, too few give garbage, another dtype of as many bytes
gives wrong numbers. So before the first call of each kind the ranks compare what they ask for, as
texts, and a rank that refuses the call says so in the same round: all of them raise, none waits.

What was agreed on is remembered on the communicator (`Agreed`), and later calls of the same kind
exchange nothing. Two things can then go wrong unseen, on a rank alone: it asks for something else
that is new to it, and waits for the others until the deadline; or its own checks refuse a call
that all know, so that it raises while the others wait for its messages until theirs.
NUMFLASH_DISTRIBUTED_CHECK=1, on all ranks, compares each call, and finds both at once.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from numbers import Integral, Real
from typing import Any, TypeVar

from numflash.distributed.communicators import Agreed, Communicator, CommunicatorError
from numflash.functions.identity import key_of
from numflash.functions.trace import trace
from numflash.problem.block_masks import ListedBlocks
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.switches import is_on
from numflash.runtime.version import __version__
from numflash.runtime.views import ArrayView, contiguous_strides

Result = TypeVar("Result")

FUNCTIONS = ("score_mod", "mask_mod", "score_mod_grad")
_CHANGING = ("seed", "aux")
"""Numbers that change from call to call: compared with what is new, and where each call is."""
_ERRORS = {kind.__name__: kind for kind in (TypeError, ValueError, UnsupportedError)}
_CHECK = "NUMFLASH_DISTRIBUTED_CHECK"
_LONGEST = 300
"""Characters of a value in an error."""


@dataclass(frozen=True)
class Shard:
    """An array whose extent along `axis` is each rank's own: it is not compared.

    Attributes:
        array: of this rank.
        axis: of the tokens.
    """

    array: Any
    axis: int


def agree(
    comms: Communicator | tuple[Communicator, ...],
    call: str,
    items: Mapping[str, Any],
    check: Callable[[], Result],
    key: Hashable | None = None,
) -> Result:
    """What `check` returns, once all ranks are known to ask for the same.

    Args:
        comms: one communicator; or (that of neighbouring ranks, that of the ranks with this one's
            number among their neighbours), for rank `comms[1].rank * comms[0].size +
            comms[0].rank`.
        call: the name of the function that is called.
        items: all that the ranks must share, by names that errors say: arrays are compared by
            dtype and shape, `Shard`s without the axis of the tokens, dataclasses (a layout) field
            by field, score_mod, mask_mod and score_mod_grad by the text of what they compute, and
            numbers, strings, tuples and None as they are. None is as good as absent.
        check: the checks of this rank alone; it must not communicate.
        key: all that items and the result of check depend on: `recalled` then finds that result.
            None: nothing finds it.

    Raises:
        ValueError: the ranks differ; on all of them, and with the same message, which names the
            item and says each side's value.
        TypeError, ValueError, UnsupportedError: a rank's check refused. All raise what it raised,
            with its number; where all refuse alike, what each has raised itself. Any other
            exception of a check is raised on its own rank, and is a RuntimeError on the others.
        CommunicatorError: a rank is gone, or did not come within the deadline; or a call before
            ended on this rank in the middle.

    Example:
        >>> from numflash.distributed.agreement import agree
        >>> from numflash.distributed.communicators.alone import Alone
        >>> agree(Alone(), "attention", {"causal": True}, lambda: "ready")
        'ready'
    """
    comms = comms if isinstance(comms, tuple) else (comms,)
    memory, place = comms[0].agreed, _place(comms)
    if all(comm.size == 1 for comm in comms):
        return memory.keep(key, place, None, check())
    for comm in comms:
        if comm.agreed.fault is not None:
            raise CommunicatorError(
                f"{call}: the communicator cannot be used any more after a fault: "
                f"{comm.agreed.fault}"
            )
    result, refusal, digest, texts = None, None, None, {}
    checks_each_call = False
    try:
        checks_each_call = is_on(_CHECK)
        result = check()
        digest = _digest_of(memory, call, items, comms)
        if not checks_each_call and memory.has(digest, place):
            return memory.keep(key, place, digest, result)
    except Exception as error:
        refusal = error
    try:
        texts = _texts(call, items, comms, changing=True)
        digest = digest or _digest(_texts(call, items, comms, changing=False))
    except Exception as error:
        refusal = refusal or error
    if refusal is not None and not checks_each_call and memory.has(digest, place):
        raise refusal
    said = None if refusal is None else [_kind_of(refusal), str(refusal)]
    found = _texts_of_all(comms, json.dumps([texts, said], sort_keys=True))
    if found is not None:
        _raise_difference([json.loads(text) for text in found], _rank_of(comms), refusal)
    if refusal is not None:
        raise refusal
    memory.add(digest, place, comms[1:])
    return memory.keep(key, place, digest, result)


def recalled(comms: tuple[Communicator, ...], key: Hashable | None) -> Any:
    """What `agree` returned for an equal key, if the ranks still know that call; else None.

    Args:
        comms: as of `agree`.
        key: as of `agree`.
    """
    memory, place = comms[0].agreed, _place(comms)
    digest, result = memory.kept(key, place)
    if digest is None:
        return result
    if any(comm.agreed.fault is not None for comm in comms):
        return None  # `agree` says so
    try:
        is_known = not is_on(_CHECK) and memory.has(digest, place)
    except ValueError:
        return None  # `agree` says what is wrong with it
    return result if is_known else None


def _place(comms: tuple[Communicator, ...]) -> tuple[int, ...]:
    """What tells the other communicators of the first one."""
    return tuple(map(id, comms[1:])) if len(comms) > 1 else ()


@contextmanager
def on_its_way(comms: tuple[Communicator, ...], call: str) -> Iterator[None]:
    """Around the messages of a call: where it ends in the middle, its communicators are spent.

    Else a rank that catches the error and calls again would send its peers, which still wait, the
    messages of another step.
    """
    try:
        yield
    except BaseException as error:
        what = f"{type(error).__name__}: {error}"
        for comm in comms:
            if comm.size > 1:
                comm.agreed.fault = f"{call} ended on this rank with {what}"
                # So that its peers need not wait for the deadline, where it can tell them.
                if hasattr(comm, "abandon"):
                    comm.abandon(f"{call} ended there with {what}")
        raise


def _kind_of(refusal: Exception) -> str:
    for name, kind in _ERRORS.items():
        if isinstance(refusal, kind):
            return name
    return type(refusal).__name__


def _rank_of(comms: tuple[Communicator, ...]) -> int:
    rank = 0
    for comm in reversed(comms):
        rank = rank * comm.size + comm.rank
    return rank


def _texts_of_all(comms: tuple[Communicator, ...], text: str) -> list[str] | None:
    """None if the texts of all ranks are equal, else all of them, by rank."""
    texts, differs = [text], False
    for comm in comms:
        found = comm.agree(json.dumps(texts))
        differs = differs or found is not None
        texts = texts * comm.size if found is None else [x for y in found for x in json.loads(y)]
    return texts if differs else None


# What a rank asks for, as texts


def _digest_of(memory: Agreed, call: str, items: Mapping, comms: tuple) -> bytes:
    """The digest of a call's kind; of one that was seen before without writing its texts."""
    parts: list = [call]
    try:
        for name, value in items.items():
            kind = type(value)
            if kind in _PLAIN and name not in _CHANGING:
                parts += name, kind, value
            elif value is not None:
                parts += name, key_of_item(name, value, _key_of_array)
        key = tuple(parts)
        found = memory.digests.get(key)
    except (NoKeyError, TypeError):  # or one that cannot be hashed
        return _digest(_texts(call, items, comms, changing=False))
    if found is None:
        found = _digest(_texts(call, items, comms, changing=False))
        memory.remember(key, found)
    return found


def _digest(texts: dict[str, str]) -> bytes:
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).digest()


def _texts(call: str, items: Mapping, comms: tuple, changing: bool) -> dict[str, str]:
    """The text of each item; numbers that change from call to call by their type, or as said."""
    sizes = [str(comm.size) for comm in comms]
    found = {"function": call, "numflash": __version__, "ranks": " x ".join(sizes)}
    for name, value in items.items():
        if value is not None and name not in FUNCTIONS:
            found |= _texts_of(name, value, changing or name not in _CHANGING)
    if any(items.get(name) is not None for name in FUNCTIONS):
        found["score_mod and mask_mod"] = _text_of_functions(items)
    return found


def _texts_of(name: str, value, by_value: bool) -> dict[str, str]:
    if isinstance(value, Shard):
        extents = list(map(str, value.array.shape))
        extents[value.axis] = "tokens"
        shape = f"({', '.join(extents)})"
        return {f"dtype of {name}": _dtype(value.array), f"shape of {name}": shape}
    if _is_array(value):
        shape = str(tuple(map(int, value.shape)))
        return {f"dtype of {name}": _dtype(value), f"shape of {name}": shape}
    if isinstance(value, ListedBlocks):
        aux = [_view(x) if _is_array(x) else x for x in value.aux]
        found = {f"blocks of {name}": str(value.blocks), f"seqlens of {name}": str(value.seqlens)}
        return found | {f"mask_mod of {name}": trace(None, value.mask_mod, aux).program.text}
    if is_dataclass(value) and not isinstance(value, type):
        inner = {}
        for field in fields(value):
            inner |= _texts_of(f"{field.name} of {name}", getattr(value, field.name), by_value)
        return inner
    if isinstance(value, tuple | list) and any(map(_is_array, value)):
        inner = {}
        for n, each in enumerate(value):
            inner |= _texts_of(f"{name}[{n}]", each, by_value)
        return inner
    return {name: _text(value, by_value)}


def _text(value, by_value: bool = True) -> str:
    """The same on all ranks for values that mean the same."""
    if isinstance(value, tuple | list):
        return f"({', '.join(_text(each, by_value) for each in value)})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_text(x, by_value)}' for key, x in value.items())}}}"
    if isinstance(value, Real) and not isinstance(value, bool):
        whole = isinstance(value, Integral)
        if not by_value:
            return "an integer" if whole else "a number"
        return repr(int(value) if whole else float(value) + 0.0)  # without -0.0
    if value is None or isinstance(value, bool | str):
        return str(value)
    text = str(value)
    return type(value).__qualname__ if " at 0x" in text else text  # an address is of one process


def _text_of_functions(items: Mapping) -> str:
    """The program that they make, whose text does not depend on names or on the process."""
    aux = [_view(x) if _is_array(x) else x for x in items.get("aux") or ()]
    score_mod, mask_mod, slope = (items.get(name) for name in FUNCTIONS)
    return trace(score_mod, mask_mod, aux, score_mod_grad=slope).program.text or "the score itself"


def _view(array) -> ArrayView:
    shape = tuple(map(int, array.shape))
    return ArrayView(0, shape, contiguous_strides(shape), _dtype(array), -1)


def _is_array(value) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, Real)


def _dtype(array) -> str:
    return str(array.dtype).removeprefix("torch.")


# A key of an item: quicker than its text, and of this process only

_PLAIN = frozenset((bool, int, float, str))


class NoKeyError(Exception):
    """An item has no key."""


def key_of_item(name: str, value, of_array: Callable[[Any], Hashable]) -> Hashable:
    """A key of an item of `agree`: items with equal keys have equal texts.

    Numbers that change from call to call are in it by their type.

    Args:
        name: of the item.
        value: of the item.
        of_array: makes the key of an array, alone or in a tuple, and of a `Shard`.

    Raises:
        NoKeyError: nobody can tell whether it means what it meant before.
    """
    kind = type(value)
    if name in _CHANGING and isinstance(value, Real):
        return kind
    if kind in _PLAIN or value is None or isinstance(value, Real):
        return kind, value
    if kind is tuple or kind is list:
        return kind, *[key_of_item(name, each, of_array) for each in value]
    if kind is dict:
        return kind, *[(each, key_of_item(name, x, of_array)) for each, x in value.items()]
    if kind is Shard or _is_array(value):
        return of_array(value)
    if isinstance(value, ListedBlocks):
        return value.key(), *map(of_array, value.arrays().values())
    if name in FUNCTIONS:
        key = key_of(value)
    else:
        key = value if is_dataclass(value) and value.__hash__ is not None else None
    if key is None:
        raise NoKeyError
    return key


def _key_of_array(array) -> Hashable:
    """Of its dtype and shape; of a `Shard` without the axis of the tokens."""
    if type(array) is not Shard:
        return tuple(array.shape), array.dtype
    shape = array.array.shape
    axis = array.axis % len(shape)
    return axis, (*shape[:axis], *shape[axis + 1 :]), array.array.dtype


# Where they differ


def _raise_difference(all_said: list, rank: int, refusal: Exception | None) -> None:
    """Raise the error of ranks whose texts differ: on all of them the same.

    Args:
        all_said: (texts by item, None or (name of an error, its message)) of each rank.
        rank: this rank's number.
        refusal: of this rank.
    """
    refused = [n for n, (_, said) in enumerate(all_said) if said is not None]
    # A rank that refuses may have items that nobody can describe.
    described = {n: texts for n, (texts, _) in enumerate(all_said) if texts}
    differences = "; ".join(_differences(described))
    if not refused:
        raise ValueError(f"all ranks must ask for the same: {differences}")
    name, reason = all_said[refused[0]][1]
    message = f"{_ranks([refused[0]])} refuses the call: {reason}"
    if others := refused[1:]:
        message += f" ({_ranks(others)} {'refuse' if len(others) > 1 else 'refuses'}, too)"
    if differences:
        message += f"; the ranks also differ: {differences}"
    if name not in _ERRORS and refused[0] == rank and refusal is not None:
        raise refusal
    raise _ERRORS.get(name, RuntimeError)(message) from refusal


def _differences(described: dict[int, dict[str, str]]) -> list[str]:
    """For each item in which ranks differ, who has what; the value that most have comes last."""
    names = dict.fromkeys(name for texts in described.values() for name in texts)
    found = []
    for name in names:
        values = {rank: texts.get(name) for rank, texts in described.items()}
        (usual, _), *others = Counter(values.values()).most_common()
        if others:
            sides = [f"{_ranks(_who(values, x))} {_has(x, values)}" for x, _ in others]
            common = f"where {_ranks(_who(values, usual))} {_has(usual, values)}"
            found.append(f"{name}: {', '.join(sides)} {common}")
    return found


def _who(values: dict[int, str | None], value: str | None) -> list[int]:
    return [rank for rank, each in values.items() if each == value]


def _ranks(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    return f"ranks {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def _has(value: str | None, values: dict[int, str | None]) -> str:
    verb = "have" if len(_who(values, value)) > 1 else "has"
    if value is None:
        return f"{verb} none"
    if len(value) > _LONGEST:
        digest = hashlib.sha256(value.encode()).hexdigest()[:12]
        value = f"{value[:_LONGEST]}... ({len(value)} characters, SHA-256 {digest}...)"
    return f"{verb} {value}"
