"""The special registers of a warp: the values of %tid.x and its like in each lane."""

import numpy as np

from numflash.executor.arithmetic import u4

_LANES = np.arange(32)
_CLUSTERS_OF_ONE = {
    "%cluster_ctarank": 0,
    "%cluster_nctarank": 1,
    **{f"%cluster_ctaid.{axis}": 0 for axis in "xyz"},
    **{f"%cluster_nctaid.{axis}": 1 for axis in "xyz"},
}
_PLACES = ("tid", "ntid", "ctaid", "nctaid", "clusterid", "nclusterid")

NAMES = frozenset(
    [f"%{name}.{axis}" for name in _PLACES for axis in "xyz"]
    + [f"%lanemask_{name}" for name in ("eq", "lt", "le", "gt", "ge")]
    + ["%laneid", "%warpid", "%nwarpid", "WARP_SZ", "%dynamic_smem_size", *_CLUSTERS_OF_ONE]
)
"""Those that the executor knows."""


def special_registers(
    warp: int, grid: tuple, block: tuple, position: tuple, dynamic_bytes: int
) -> dict[str, np.ndarray]:
    """(32,) of each of NAMES, for the warp of this number."""
    thread = 32 * warp + _LANES
    width, height, _ = block
    threads = thread % width, thread // width % height, thread // (width * height)
    values = dict(_CLUSTERS_OF_ONE)
    for axis, *of_axis in zip("xyz", threads, block, position, grid, strict=True):
        # The last two: each block is a cluster.
        for name, value in zip(_PLACES, (*of_axis, *of_axis[2:]), strict=True):
            values[f"%{name}.{axis}"] = value
    below = (1 << _LANES.astype(np.uint64)) - 1
    own = below + 1
    values |= {
        "%laneid": _LANES,
        "%warpid": warp,
        "%nwarpid": -(-width * height * block[2] // 32),
        "WARP_SZ": 32,
        "%dynamic_smem_size": dynamic_bytes,
        "%lanemask_eq": own,
        "%lanemask_lt": below,
        "%lanemask_le": below | own,
        "%lanemask_gt": ~(below | own) & 0xFFFFFFFF,
        "%lanemask_ge": ~below & 0xFFFFFFFF,
    }
    return {name: np.broadcast_to(value, 32).astype(u4) for name, value in values.items()}
