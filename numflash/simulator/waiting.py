"""Words for a deadlock's message: which threads wait on which line of a kernel."""

import sys
from collections import defaultdict


def who_waits(threads) -> list[str]:
    """A line for each place at which some of the suspended `threads` wait."""
    places = defaultdict(list)
    for thread in threads:
        places[_place(thread)].append(thread.index)
    by_thread = sorted(places.items(), key=lambda place: min(place[1]))
    return [f"    threads {_ranges(who)} wait at {at}" for at, who in by_thread]


def _place(thread) -> str:
    """File and line of the kernel code in which a thread waits, or the running one is."""
    frame = thread.greenlet.gr_frame or sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith(("numflash.simulator", "numflash.ptx", "numba.")):
            return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "an unknown place"


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    parts, numbers = [], sorted(numbers)
    start = previous = numbers[0]
    for number in [*numbers[1:], None]:
        if number is None or number != previous + 1:
            parts.append(str(start) if start == previous else f"{start}-{previous}")
            start = number
        previous = number
    return ", ".join(parts)
