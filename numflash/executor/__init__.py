"""An executor of PTX on a CPU: a compiler's code of a kernel, run on NumPy arrays.

`text` reads PTX, `one_lane/` makes Python of the instructions of one lane and `arithmetic` says
what they compute; `together` and `bodies` are what lanes and warps execute together, whose
meanings are the bodies of `numflash.ptx`; `program` cuts an entry into pieces, `warps` and
`block` run them, `memory` holds what they reach. `cluster` is blocks that run together, and the
order of their warps; `launch` is a grid of clusters.

The scheduler is adversarial and seeded as that of `numflash.simulator`, whose copies, mbarriers
and products it uses. An instruction that is not known is refused, by its name and line.
"""

from numflash.executor.run import Profile, run_ptx

__all__ = ["Profile", "run_ptx"]
