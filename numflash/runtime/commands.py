"""Commands end quietly when nothing reads their output, as in `| head`."""

import os
import select
import sys
from collections.abc import Callable
from functools import wraps

UNREAD = 128 + 13
"""The exit status then: what a shell reports of a program that SIGPIPE ended."""


def command(main: Callable) -> Callable:
    """A `main` that returns `UNREAD` where its output is a pipe that was closed.

    All that was printed is written before `main` returns: the interpreter would do so only when it
    ends, and report the closed pipe itself.
    """

    @wraps(main)
    def run(*args, **options):
        try:
            try:
                return main(*args, **options)
            finally:
                if sys.stdout is not None:  # None where there is no output at all
                    sys.stdout.flush()
        except BrokenPipeError:
            streams = filter(None, (sys.stdout, sys.stderr))
            if not any([_drop_if_closed(stream) for stream in streams]):
                raise  # of another pipe
            return UNREAD

    return run


def _drop_if_closed(stream) -> bool:
    """Discard the text that a stream still holds, if it is a closed pipe; whether it is one."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):
        return False  # no file, but a test's stand-in for one
    if not hasattr(select, "poll"):
        return False  # Windows, whose closed pipes are another error
    poll = select.poll()
    poll.register(number, 0)  # poll reports errors without being asked
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
    return True
