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
from numflash.runtime.arrays import library_of, on_stream, stream_address
from numflash.selection.store import generation

# Ready launches by problem; emptied when it grows past this, so that varying shapes cannot leak.
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
    q, k, v, out, options: dict, stream, descales: tuple = (None, None, None)
) -> BoundForward:
    """Check a forward call, allocate and bind it.

    Its `hand_back` gives (out, lse, decision or None) as objects of q's library.
    """
    arrays, kind = {"q": q, "k": k, "v": v}, Forward
    if options["precision"] == "auto" or options["max_rel_error"] is not None:
        options = with_budget(options)
    is_fp8 = options["precision"] in ("fp8", "auto") or any(x is not None for x in descales)
    if is_fp8 or has_fp8(q, k, v):
        kind, q = Fp8Forward, q.data if isinstance(q, Fp8Array) else q
        arrays, options = take_apart(arrays, descales, options)
        if options["precision"] == "auto":
            kind = AutoForward
    elif options["fp8"] is not None:
        raise ValueError(
            f'fp8 says how to quantise with precision="fp8"; precision is {options["precision"]!r}'
        )
    if out is not None:
        arrays["out"] = out
    forward, operands, stream = prepare(kind, arrays, options, stream)
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


def prepare(kind: type, arrays: dict[str, Any], options: dict, stream):
    """Check a call.

    Returns:
        The `kind`, Forward or Backward, for this call: found, or made now; the call's arrays as
        operands; the address of `stream`, or None.
    """
    if options["alibi_slopes"] is not None:
        arrays["alibi_slopes"] = options["alibi_slopes"]
    # What this process tunes changes what is ready.
    key, operands = [kind, generation()], {}
    for name, array in arrays.items():
        operands[name], identity = library_of(array, name).glance(array)
        key += name, identity
    if stream is not None:
        stream = stream_address(stream)
    try:
        key = (*key, *_option_key(**options))
        ready = _ready.get(key)
    except TypeError:
        ready = None  # an option cannot even be hashed: `kind` finds what is wrong with it
    if ready is None:
        views = {name: library_of(x, name).view(x, name) for name, x in arrays.items()}
        ready = kind(views, options)
        if len(_ready) >= _MAX_READY:
            _ready.clear()
        _ready[key] = ready
    return ready, operands, stream


def _option_key(
    softmax_scale,
    causal,
    causal_align,
    window_size,
    softcap,
    alibi_slopes,
    layout,
    precision,
    config,
    fp8,
    max_rel_error,
    described=None,
) -> tuple:
    """A key of the options; the slopes' is that of an array."""
    values = softmax_scale, causal, softcap, *window_size
    # With their types: what an equal 1 made ready must not let a wrong True pass.
    kind = type(config)
    if isinstance(config, dict):
        config = tuple(config.items())
    kinds = *map(type, values), type(window_size), kind
    described = tuple(described.items()) if described else None
    return *values, *kinds, causal_align, layout, precision, config, fp8, max_rel_error, described
