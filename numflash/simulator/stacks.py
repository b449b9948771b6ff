"""What simulated threads run on: greenlets, which outlive a thread and serve the next one.

To make one takes ten times as long as to hand one over, most of it for the memory of its frames.
"""

import threading
from contextvars import Context

from greenlet import getcurrent, greenlet


class _Stacks(threading.local):
    """Idle greenlets of an OS thread, which cannot run those of another one."""

    def __init__(self):
        self._idle: list[greenlet] = []

    def take(self, context: Context) -> greenlet:
        """A greenlet whose next `switch(kernel, args)` runs kernel(*args), in this context.

        It switches to its parent, the greenlet that called `take`, with True when the kernel has
        returned; what the kernel raises is raised there.
        """
        if not self._idle:
            begun = greenlet(_serve)
            begun.switch()
            self._idle.append(begun)
        taken = self._idle.pop()
        taken.parent, taken.gr_context = getcurrent(), context
        return taken

    def give_back(self, idle: greenlet) -> None:
        """Keep a greenlet whose kernel has returned."""
        self._idle.append(idle)


def _serve():
    """Run one kernel after another; a kernel that fails, or is ended, ends this, too."""
    me = getcurrent()
    while True:
        # Nothing of a launch may live longer than it.
        kernel = args = me.gr_context = None
        kernel, args = me.parent.switch(True)
        kernel(*args)


STACKS = _Stacks()
