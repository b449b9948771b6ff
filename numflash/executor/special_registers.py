"""The special registers of a warp: the values of %tid.x and its like in each lane."""

import numpy as np

from numflash.executor.arithmetic import u4

_LANES = np.arange(32)
_PLACES = (
    *("tid", "ntid", "ctaid", "nctaid"),
    *("clusterid", "nclusterid", "cluster_ctaid", "cluster_nctaid"),
)

NAMES = frozenset(
    [f"%{name}.{axis}" for name in _PLACES for axis in "xyz"]
    + [f"%lanemask_{name}" for name in ("eq", "lt", "le", "gt", "ge")]
    + ["%laneid", "%warpid", "%nwarpid", "WARP_SZ", "%dynamic_smem_size"]
    + ["%cluster_ctarank", "%cluster_nctarank"]
)
"""Those that the executor knows."""


def special_registers(
    warp: int, grid: tuple, block: tuple, position: tuple, cluster: tuple, dynamic_bytes: int
) -> dict[str, np.ndarray]:
    """(32,) of each of NAMES, for the warp of this number.

    The grid, the block and the cluster are given by their extents, the block's place by position.
    """
    thread = 32 * warp + _LANES
    width, height, _ = block
    threads = thread % width, thread // width % height, thread // (width * height)
    values, rank, size = {}, 0, 1
    for axis, *of_axis, extent in zip("xyz", threads, block, position, grid, cluster, strict=True):
        _, _, place, blocks = of_axis
        within = place // extent, blocks // extent, place % extent, extent
        for name, value in zip(_PLACES, (*of_axis, *within), strict=True):
            values[f"%{name}.{axis}"] = value
        rank, size = rank + place % extent * size, size * extent
    below = (1 << _LANES.astype(np.uint64)) - 1
    own = below + 1
    values |= {
        "%laneid": _LANES,
        "%warpid": warp,
        "%nwarpid": -(-width * height * block[2] // 32),
        "WARP_SZ": 32,
        "%dynamic_smem_size": dynamic_bytes,
        "%cluster_ctarank": rank,
        "%cluster_nctarank": size,
        "%lanemask_eq": own,
        "%lanemask_lt": below,
        "%lanemask_le": below | own,
        "%lanemask_gt": ~(below | own) & 0xFFFFFFFF,
        "%lanemask_ge": ~below & 0xFFFFFFFF,
    }
    return {name: np.broadcast_to(value, 32).astype(u4) for name, value in values.items()}
