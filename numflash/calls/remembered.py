"""Calls around attention: the object made ready for an equal call is found, bound and launched."""

from collections.abc import Callable
from typing import Any

from numflash.runtime.arrays import library_of, on_stream, stream_address
from numflash.runtime.views import Operand

# Emptied when it grows past this, so that varying shapes cannot leak.
_MAX_READY = 1024
_ready: dict[tuple, Any] = {}


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
