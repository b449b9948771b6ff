"""The blocks of a cluster, compiled into a kernel.

They are then part of its code, `.reqnctapercluster` in PTX, and an ordinary launch makes clusters,
if the grid is a multiple of them: as with `__cluster_dims__` in CUDA C++.

Source: CUDA C++ Programming Guide, "Thread Block Clusters"; PTX ISA 11.7.1.
"""

from numflash.machine_code.annotations import annotate, changed_kernels


def clusters_of(blocks: int):
    """Compile kernels whose grid is of clusters of so many blocks, neighbours in x."""

    def change(kernel):
        if blocks > 1:
            annotate(kernel, {"cluster_dim_x": blocks, "cluster_dim_y": 1, "cluster_dim_z": 1})

    return changed_kernels(change)
