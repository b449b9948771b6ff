"""Calls made ready: checked, their kernels chosen and bound, and found again.

Checking and choosing happen once for each distinct problem; calls with the same shapes, strides,
dtypes and options then find a ready `Forward` or `Backward` under the problem's key and only
allocate and launch.
"""

from collections.abc import Callable
from typing import Any

from numflash.calls.forward import Forward
from numflash.calls.fp8_forward import AutoForward, Fp8Forward
from numflash.calls.fp8_options import (
    has_fp8,
    take_apart,
    with_budget,
)
from numflash.problem.fp8 import Fp8Array, PrecisionDecision
from numflash.problem.options import AttentionOptions
from numflash.runtime.arrays import library_of, on_stream, stream_address
from numflash.runtime.views import Operand
from numflash.selection.store import generation

# Objects made ready; emptied when it grows past this, so that varying shapes cannot leak.
_MAX_READY = 4096
_ready: dict[tuple, Any] = {}


class BoundForward:
    """A forward call that is checked, allocated and bound.

    Attributes:
        stream: the address of the one that it was allocated on.
        kernel: which kernel runs.
    """

    def __init__(
        self,
        launches: tuple[Callable[[int], None], ...],
        stream: int,
        kernel: str,
        hand_back: Callable[[int], tuple],
    ):
        self._launches, self.stream, self.kernel = launches, stream, kernel
        self.hand_back = hand_back

    def launch(self, stream: int) -> tuple:
        """Enqueue on a stream; what `hand_back` returns then."""
        for launch in self._launches:
            launch(stream)
        return self.hand_back(stream)


def bind_forward(
    q, k, v, out, options: AttentionOptions, stream, descales: tuple = (None, None, None)
) -> BoundForward:
    """Check a forward call, allocate and bind it.

    Its `hand_back` gives (out, lse, decision or None) as objects of q's library.
    """
    arrays, kind, more = {"q": q, "k": k, "v": v}, Forward, ()
    if options.precision == "auto" or options.max_rel_error is not None:
        options = with_budget(options)
    is_fp8 = options.precision in ("fp8", "auto") or any(x is not None for x in descales)
    if is_fp8 or has_fp8(q, k, v):
        kind, q = Fp8Forward, q.data if isinstance(q, Fp8Array) else q
        arrays, options, *more = take_apart(arrays, descales, options)
        if options.precision == "auto":
            kind = AutoForward
    elif options.fp8 is not None:
        raise ValueError(
            f'fp8 says how to quantise with precision="fp8"; precision is {options.precision!r}'
        )
    if out is not None:
        arrays["out"] = out
    forward, operands, stream = prepare(kind, arrays, options, stream, *more)
    library = library_of(q, "q")

    def work(stream: int) -> tuple:
        return stream, *forward.bind(operands, library)

    stream, result, lse, launches = on_stream(work, stream, forward.device, arrays, operands)
    decided = ()
    if kind is AutoForward:
        decided = operands["in_fp8"].array, operands["estimate"].array

    def hand_back(stream: int) -> tuple:
        given = library.hand_back(result, q, stream) if out is None else out
        decision = None
        if decided:
            decision = PrecisionDecision(*(library.hand_back(x, q, stream) for x in decided))
        return given, library.hand_back(lse, q, stream), decision

    return BoundForward(tuple(launches.values()), stream, forward.kernel, hand_back)


def prepare(kind: type, arrays: dict[str, Any], options: AttentionOptions, stream, *more):
    """Check a call.

    Args:
        kind: Forward, Backward or one of those on 8-bit floats.
        arrays: of the call, by name; those among the options are added.
        options: of the call.
        stream: of the call.
        more: what else `kind` takes, and the key has.

    Returns:
        The `kind`, Forward or Backward, for this call: found, or made now; the call's arrays as
        operands, and numbers that launches fill in; the address of `stream`, or None.
    """
    arrays |= options.arrays()
    # A tuning of this process changes the ready calls.
    key, operands = [kind, generation()], options.numbers()
    key += operands
    for name, array in arrays.items():
        operands[name], identity = library_of(array, name).glance(array)
        key += name, identity
    if stream is not None:
        stream = stream_address(stream)

    def make():
        views = {name: library_of(x, name).view(x, name) for name, x in arrays.items()}
        return kind(views, options, *more)

    try:
        key = (*key, *options.key(), *more)
    except TypeError:
        return make(), operands, stream
    return remembered(key, make), operands, stream


def remembered(key: tuple, make: Callable[[], Any]):
    """The object that `make` makes, or made before for an equal key."""
    try:
        ready = _ready.get(key)
    except TypeError:
        return make()  # an option cannot even be hashed: `make` finds what is wrong with it
    if ready is None:
        ready = make()
        if len(_ready) >= _MAX_READY:
            _ready.clear()
        _ready[key] = ready
    return ready


def run(ready, arrays: dict[str, Any], operands: dict[str, Operand], stream) -> list:
    """Bind and launch: the arrays that `ready` makes, of the kind of the first of `arrays`."""
    first = next(iter(arrays.values()))
    library = library_of(first, next(iter(arrays)))

    def work(stream: int) -> list:
        *made, launches = ready.bind(*operands.values(), library)
        for launch in launches.values():
            launch(stream)
        return [library.hand_back(x, first, stream) for x in made if x is not None]

    address = None if stream is None else stream_address(stream)
    return on_stream(work, address, ready.device, arrays, operands)
