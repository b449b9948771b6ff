"""The GPU that is tuned: one of this machine, or one that is only known by name."""

import re
from dataclasses import dataclass

from numflash.runtime import driver
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.mode import SIMULATED
from numflash.selection.entries import DeviceKey

from . import machines
from .machines import Machine

_MAX_ORDINAL = 63


@dataclass(frozen=True)
class Target:
    """A GPU to tune for.

    Attributes:
        key: under which the config cache knows it.
        machine: its figures for the model.
        ordinal: of the CUDA device that measures; None if the model judges.
    """

    key: DeviceKey
    machine: Machine
    ordinal: int | None


def find_target(device: str | None, offline: bool) -> Target:
    """The GPU that the user means.

    Args:
        device: the ordinal of a GPU of this machine, the name of a GPU, or an architecture; None
            is the first GPU of this machine.
        offline: judge by the model, whether the GPU is here or not.

    Raises:
        ValueError: nothing has this name, or it cannot be measured here.
        UnsupportedError: this machine has no GPU that can be used.
    """
    if device is None or (re.fullmatch(r"\d+", device) and int(device) <= _MAX_ORDINAL):
        return _local(int(device or 0), offline)
    machine = machines.find(device)
    if offline:
        return _named(machine)
    here = _local_names()
    for ordinal, name in enumerate(here):
        if name == machine.name:
            return _local(ordinal, offline)
    found = f"its GPUs are {', '.join(here)}" if here else "it has no GPU"
    raise ValueError(f"{machine.name} cannot be measured on this machine: {found}; use --offline")


def _named(machine: Machine) -> Target:
    """A GPU that is not here. An architecture by itself has no number of SMs."""
    is_architecture = machine.name.startswith("sm_")
    num_sms = 0 if is_architecture else machine.num_sms
    return Target(DeviceKey(machine.name, machine.arch, num_sms), machine, None)


def _local(ordinal: int, offline: bool) -> Target:
    if SIMULATED:
        raise UnsupportedError("there is no GPU in the simulator; name one with --device NAME")
    machine = local_machine(ordinal)
    key = DeviceKey(machine.name, machine.arch, machine.num_sms)
    return Target(key, machine, None if offline else ordinal)


def local_machine(ordinal: int) -> Machine:
    """A GPU of this machine. Raises UnsupportedError if there is none of this ordinal."""
    name, limits = driver.device_name(ordinal), driver.limits_of_device(ordinal)
    num_sms, l2_bytes = driver.multiprocessors(ordinal)
    try:
        known = machines.find(name)
        if (known.arch, known.num_sms) == (limits.arch, num_sms):
            return known
    except ValueError:
        pass
    clock_mhz, memory_gbps = driver.clocks(ordinal)
    return machines.of_device(name, limits.arch, num_sms, clock_mhz, memory_gbps, l2_bytes)


def _local_names() -> list[str]:
    """The driver's names of this machine's GPUs."""
    if SIMULATED:
        return []
    try:
        return [driver.device_name(ordinal) for ordinal in range(driver.num_devices())]
    except UnsupportedError:
        return []
