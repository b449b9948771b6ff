"""The meaning of `cuda.*` inside a simulated kernel.

`SimulatedCuda` is Numba's own stand-in for the `cuda` module with the block engine under it:
thread indices, barriers, shared and local arrays, and the warp shuffles, votes and matches that
Numba's simulator lacks. Everything else (atomics, fp16, vector types, ...) is Numba's.
"""

import numpy as np
from numba.cuda.simulator.kernelapi import Dim3, FakeCUDAModule

from numflash.simulator.engine import WARP_SIZE, SimulationError, current_thread
from numflash.simulator.local_arrays import local_array
from numflash.simulator.memory import POISON, calling_site


class _Shared:
    def array(self, shape, dtype, alignment=None):
        shared = current_thread().block.shared
        return shared.array(shape, dtype, alignment, site=calling_site(1))


class _GridGroup:
    def sync(self):
        # Numba allows cooperative grids of one block only.
        current_thread().sync_block("grid.sync")


class _CooperativeGroups:
    def this_grid(self):
        return _GridGroup()


class _Local:
    array = staticmethod(local_array)


def _of_block(attribute: str) -> property:
    """A property of the running block. The setter exists because Numba's constructor assigns."""
    return property(
        lambda self: getattr(current_thread().block, attribute), lambda self, value: None
    )


class SimulatedCuda(FakeCUDAModule):
    """The `cuda` of a simulated kernel; all state lies with the running thread and its block."""

    def __init__(self, grid_dim=(1, 1, 1), block_dim=(1, 1, 1), dynamic_smem_bytes=0):
        super().__init__(grid_dim, block_dim, 0)
        self.dynamic_smem_bytes = dynamic_smem_bytes
        self._shared = _Shared()
        self._local = _Local()
        self._cg = _CooperativeGroups()

    gridDim = _of_block("gridDim")
    blockDim = _of_block("blockDim")
    blockIdx = _of_block("blockIdx")

    @property
    def threadIdx(self):
        return current_thread().threadIdx

    @property
    def laneid(self):
        return current_thread().lane

    # Barriers

    def syncthreads(self):
        current_thread().sync_block()

    def syncthreads_count(self, predicate):
        return self._reduced("syncthreads_count", predicate, sum)

    def syncthreads_and(self, predicate):
        return self._reduced("syncthreads_and", predicate, lambda values: int(all(values)))

    def syncthreads_or(self, predicate):
        return self._reduced("syncthreads_or", predicate, lambda values: int(any(values)))

    @staticmethod
    def _reduced(name, predicate, reduction):
        def together(predicates):
            return [reduction(predicates)] * len(predicates)

        return current_thread().sync_block(name, bool(predicate), together)

    def syncwarp(self, mask=0xFFFFFFFF):
        current_thread().warp_collective("syncwarp", mask, None, lambda payloads: payloads)

    # Shuffles: what a lane gets from a lane that does not take part is poison. The hardware uses
    # the low five bits of a source lane, mask or distance.

    def shfl_sync(self, mask, value, src_lane):
        return _shuffle("shfl_sync", mask, value, int(src_lane) % WARP_SIZE)

    def shfl_xor_sync(self, mask, value, lane_mask):
        return _shuffle(
            "shfl_xor_sync", mask, value, current_thread().lane ^ int(lane_mask) % WARP_SIZE
        )

    def shfl_up_sync(self, mask, value, delta):
        return _shuffle(
            "shfl_up_sync", mask, value, current_thread().lane - int(delta) % WARP_SIZE
        )

    def shfl_down_sync(self, mask, value, delta):
        return _shuffle(
            "shfl_down_sync", mask, value, current_thread().lane + int(delta) % WARP_SIZE
        )

    # Votes and matches

    def all_sync(self, mask, predicate):
        return _vote("all_sync", mask, predicate, lambda lanes, values: [all(values)] * len(lanes))

    def any_sync(self, mask, predicate):
        return _vote("any_sync", mask, predicate, lambda lanes, values: [any(values)] * len(lanes))

    def eq_sync(self, mask, predicate):
        return _vote(
            "eq_sync", mask, predicate, lambda lanes, values: [len(set(values)) == 1] * len(lanes)
        )

    def ballot_sync(self, mask, predicate):
        def ballot(lanes, values):
            bits = sum(1 << lane for lane, value in zip(lanes, values, strict=True) if value)
            return [bits] * len(lanes)

        return _vote("ballot_sync", mask, predicate, ballot)

    def match_any_sync(self, mask, value):
        def match(lanes, values):
            bits = [_bits(v) for v in values]
            return [
                sum(1 << lane for lane, b in zip(lanes, bits, strict=True) if b == own)
                for own in bits
            ]

        return _together("match_any_sync", mask, value, match)

    def match_all_sync(self, mask, value):
        def match(lanes, values):
            same = len({_bits(v) for v in values}) == 1
            members = sum(1 << lane for lane in lanes)
            return [(members if same else 0, same)] * len(lanes)

        return _together("match_all_sync", mask, value, match)

    def lanemask_lt(self):
        return (1 << current_thread().lane) - 1


def _together(name, mask, value, function):
    """`function(lanes, values)` once for the lanes of the warp in `mask`."""
    thread = current_thread()

    def together(payloads):
        return function([lane for lane, _ in payloads], [value for _, value in payloads])

    return thread.warp_collective(name, int(mask), (thread.lane, value), together)


def _vote(name, mask, predicate, function):
    return _together(name, mask, bool(predicate), function)


def _shuffle(name, mask, value, source):
    thread = current_thread()
    return thread.warp_collective(name, int(mask), (thread.lane, value, source), _exchange)


def _exchange(payloads):
    """What each lane gets, of (lane, its value, the lane that it reads)."""
    values = {lane: value for lane, value, _ in payloads}
    return [
        values[source] if source in values else _from_outside(value, source)
        for _, value, source in payloads
    ]


def _from_outside(own, source):
    # Past either end of the warp a lane keeps its own value.
    return _poison(own) if 0 <= source < WARP_SIZE else own


def _bits(value):
    """The bits that a match compares: -0.0 differs from 0.0, a NaN equals itself."""
    return np.float64(value).tobytes() if isinstance(value, float | np.floating) else value


def _poison(like):
    """A value for an undefined register of the type of `like`."""
    if isinstance(like, np.generic):
        return np.frombuffer(bytes([POISON]) * like.itemsize, like.dtype)[0]
    if isinstance(like, float):
        return float("nan")
    if isinstance(like, int):
        return -1
    raise SimulationError(f"cannot shuffle a {type(like).__name__}")


cuda = SimulatedCuda()

__all__ = ["Dim3", "SimulatedCuda", "cuda"]
