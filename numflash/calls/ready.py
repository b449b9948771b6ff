"""Calls made ready: checked, their kernels chosen and bound, and found again.

Checking and choosing happen once for each distinct problem; calls with the same shapes, strides,
dtypes and options then find a ready `Forward` or `Backward` under the problem's key and only
allocate and launch.
"""

from collections.abc import Callable
from typing import Any

from numflash.calls.backward import Backward
from numflash.calls.forward import Forward
from numflash.calls.fp8_forward import AutoForward, Fp8Forward
from numflash.calls.fp8_options import (
    expect_recipe_is_used,
    has_fp8,
    refuse_backward,
    take_apart,
    with_budget,
)
from numflash.problem.fp8 import Fp8Array, PrecisionDecision
from numflash.problem.options import AttentionOptions, GradientOptions, expect_bool
from numflash.problem.sequences import expect_inside
from numflash.runtime.arrays import library_of, on_stream, stream_address, to_numpy
from numflash.runtime.views import Operand
from numflash.selection.store import generation

# Objects made ready; emptied when it grows past this, so that varying shapes cannot leak.
_MAX_READY = 4096
_ready: dict[tuple, Any] = {}


class Bound:
    """A call that is checked, allocated and bound.

    Attributes:
        stream: the address of the one that it was allocated on.
        kernel: which kernel computes the result; of a backward, the names of those that run.
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
    q,
    k,
    v,
    out,
    options: AttentionOptions,
    stream,
    descales: tuple | None = None,
    check_lengths: bool = False,
) -> Bound:
    """Check a forward call, allocate and bind it.

    Its `hand_back` gives (out, lse, decision or None) as objects of q's library. `descales` are
    those of q, k and v, if there are any; `check_lengths` reads lengths back and checks them, too.
    """
    expect_bool("check_lengths", check_lengths)
    arrays, kind, more = {"q": q, "k": k, "v": v}, Forward, ()
    if options.precision == "auto" or options.max_rel_error is not None:
        options = with_budget(options)
    if descales is not None or options.precision in ("fp8", "auto") or has_fp8(q, k, v):
        kind, q = Fp8Forward, q.data if isinstance(q, Fp8Array) else q
        arrays, options, *more = take_apart(arrays, descales or (None,) * 3, options)
        if options.precision == "auto":
            kind = AutoForward
    else:
        expect_recipe_is_used(options)
    if out is not None:
        arrays["out"] = out
    forward, operands, stream = prepare(kind, arrays, options, stream, *more)
    if check_lengths:
        _expect_inside(forward, arrays, operands, stream, ("q",))
    library = library_of(q, "q")

    def work(stream: int) -> tuple:
        add_schedule(operands, options)
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

    return Bound(tuple(launches.values()), stream, forward.kernel, hand_back)


def bind_backward(
    dout,
    q,
    k,
    v,
    out,
    lse,
    options: AttentionOptions,
    asked: GradientOptions,
    stream,
    check_lengths: bool = False,
) -> Bound:
    """Check a backward call, allocate and bind it.

    Its `hand_back` gives the gradients, a tuple of objects of q's library. `check_lengths` as of
    `bind_forward`.
    """
    expect_bool("check_lengths", check_lengths)
    refuse_backward(q, k, v, options.precision)
    arrays = {"q": q, "k": k, "v": v, "dout": dout, "lse": lse} | asked.arrays()
    if asked.delta is None:
        arrays["out"] = out
    backward, operands, stream = prepare(Backward, arrays, options, stream, asked.without_arrays())
    if check_lengths:
        _expect_inside(backward, arrays, operands, stream, ("q", "k"))
    library = library_of(q, "q")

    def work(stream: int) -> tuple:
        add_schedule(operands, options)
        return stream, *backward.bind(operands, library)

    stream, gradients, launches = on_stream(work, stream, backward.device, arrays, operands)

    def hand_back(stream: int) -> tuple:
        return tuple(library.hand_back(x, q, stream) for x in gradients)

    return Bound(tuple(launches.values()), stream, backward.kernel, hand_back)


def _expect_inside(ready, arrays: dict, operands: dict, stream, sides: tuple[str, ...]) -> None:
    """Read the lengths of a call's sequences back, and check them. Raises ValueError."""
    lengths = getattr(ready, "lengths", None)
    if lengths is None:
        return

    def work(stream: int) -> dict:
        return {name: to_numpy(arrays[name]) for name in lengths.given}

    expect_inside(lengths, on_stream(work, stream, ready.device, arrays, operands), sides)


def add_schedule(operands: dict[str, Any], options: AttentionOptions) -> None:
    """Add to operands the `Schedule` of the caller's, if there is one."""
    if options.schedule is not None:
        operands["schedule"] = options.schedule


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
