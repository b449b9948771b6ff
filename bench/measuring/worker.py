"""The child process that measures: `python -P -m bench.measuring.worker ORDINAL`.

`bench.measuring.supervisor` gives it one task after another. It is told of a method before that
runs, so that it knows what to leave out when the method takes the process down.
"""

import sys
from collections.abc import Callable
from functools import partial

from bench.measuring import measure, quantize
from bench.measuring.device import Device, open_device
from bench.peers import methods as peers
from bench.points.points import Point
from numflash.runtime.errors import in_one_line
from tuner.measuring import channel as channels

Begin = Callable[[str | None], None]
Kind = Callable[[Device, dict, dict, Begin], dict]
"""Runs a task with these settings; told a method before it runs, it returns the task's result."""


def _ceilings(device: Device, task: dict, settings: dict, begin: Begin) -> dict:
    return device.ceilings()


def _host(device: Device, task: dict, settings: dict, begin: Begin) -> dict:
    names = [name for name in task["peers"] if name not in task["exclude"]]
    return measure.host_microseconds(device, names, begin)


def _quantize(device: Device, task: dict, settings: dict, begin: Begin) -> dict:
    return quantize.measure(device, begin, task["exclude"], settings["budget_ms"])


def _point(device: Device, task: dict, settings: dict, begin: Begin) -> dict:
    point = Point.from_dict(task["point"])
    result = measure.measure_point(
        device,
        point,
        task["peers"],
        exclude=task["exclude"],
        begin=begin,
        deadline=settings["deadline"],
        budget_ms=settings["budget_ms"],
    )
    begin(peers.OURS)
    return {**result, "kernel": measure.kernels_of(device, point)}


KINDS: dict[str, Kind] = {
    "ceilings": _ceilings,
    "host": _host,
    "quantize": _quantize,
    "point": _point,
}


def serve(
    open_it: Callable[[], Device],
    kinds: dict[str, Kind],
    channel: channels.Channel | None = None,
) -> int:
    """Run tasks as they come, until the parent is gone; 1 if there is no device.

    Args:
        open_it: opens the device.
        kinds: what tasks may be of.
        channel: to the parent; standard input and output by default.
    """
    channel = channel or channels.Channel()
    try:
        device = open_it()
    except RuntimeError as error:
        channel.send(no_device=str(error))
        return 1

    def begin(method: str | None) -> None:
        channel.send(note=method)

    def run(task: dict, settings: dict) -> dict:
        begin(None)
        return {"done": kinds[task["kind"]](device, task, settings, begin)}

    channels.serve(channel, device, {"task": run}, _failure)
    return 0


def _failure(error: Exception, request: dict) -> tuple[str, str]:
    if isinstance(error, measure.BrokenDeviceError):
        return "failed", str(error)
    return "failed", in_one_line(error)


if __name__ == "__main__":
    sys.exit(serve(partial(open_device, int(sys.argv[1])), KINDS))
