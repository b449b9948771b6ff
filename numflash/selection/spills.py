"""Configs whose registers spill with the caller's functions, which give way to the next.

Shipped configs do not spill by themselves, but nobody knows what a function needs until it is
compiled. A call compiles the preferred config, which it would do anyway, and looks: the machine
code says how much it spills. It is kept in memory and in the cache, and with it the answer.
"""

from numflash.configs import Config, Traits
from numflash.machine_code.compiler import get_cubin, known_cubin
from numflash.runtime.devices import Architecture
from numflash.runtime.mode import SIMULATED


def spilled_bytes(config: Config, traits: Traits, limits: Architecture, compiles: bool) -> int:
    """Bytes that each thread spills because of the caller's functions; 0 if none is known of.

    Args:
        config, traits, limits: the kernel. Without a program, and in the simulator, it is 0.
        compiles: whether what is not known yet is compiled; not for a question.
    """
    if not traits.program or SIMULATED:
        return 0
    cubin = (get_cubin if compiles else known_cubin)(config, traits, limits)
    return 0 if cubin is None else max(cubin.spill_store_bytes, cubin.spill_load_bytes)
