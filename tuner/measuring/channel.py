"""The child's end of the pipes to its parent; `child.Child` is the other end.

Requests come as lines of JSON on standard input, replies leave on what was standard output;
whatever else is printed goes to standard error. The process ends when its input does, also in the
middle of a kernel that hangs, and after a fault that leaves the device unusable.
"""

import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

BROKEN = 3
"""The exit status after a fault that the device does not recover from."""
_ORPHAN_SECONDS = 5


class Channel:
    """The pipes to the parent. Takes over standard input and output."""

    def __init__(self):
        requests, replies = os.dup(0), os.dup(1)
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(2, 1)
        self._requests = os.fdopen(requests, encoding="utf-8")
        self._replies = os.fdopen(replies, "w", encoding="utf-8")
        self._queue: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def requests(self) -> Iterator[dict]:
        """Requests as they come, until the parent is gone."""
        while (line := self._queue.get()) is not None:
            yield json.loads(line)

    def send(self, **message) -> None:
        """Write a line."""
        self._replies.write(json.dumps(message) + "\n")
        self._replies.flush()

    def _read(self) -> None:
        for line in self._requests:
            self._queue.put(line)
        self._queue.put(None)
        # Without a parent nobody would end a kernel that hangs.
        time.sleep(_ORPHAN_SECONDS)
        os._exit(1)


def serve(
    channel: Channel,
    device: Any,
    methods: dict[str, Callable[..., dict]],
    failure: Callable[[Exception, dict], tuple[str, str]],
) -> None:
    """Answer requests until the parent is gone.

    Args:
        channel: to the parent, which is told first what `device.describe` says.
        device: what the methods run on; its `synchronize` and `release` fail if it is broken.
        methods: name -> function; it takes what is in a request, and returns the reply.
        failure: (outcome, reason) of an error and of the request that it came from.
    """
    channel.send(hello=device.describe())
    for request in channel.requests():
        number, method = request.pop("id"), methods[request.pop("do")]
        try:
            reply = method(**request)
        except Exception as error:
            outcome, reason = failure(error, request)
            reply = {"failed": outcome, "reason": reason}
        if "failed" in reply and not recovers(device):
            channel.send(id=number, broken=True, **reply)
            # Nothing that runs at exit could succeed.
            os._exit(BROKEN)
        channel.send(id=number, **reply)


def recovers(device: Any) -> bool:
    """Whether a device still works after an error."""
    try:
        device.synchronize()
        device.release()
    except Exception:
        return False
    return True
