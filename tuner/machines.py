"""GPUs by name, as the offline model needs them: multiprocessors, clocks, rates, with sources.

The table is `machines.toml`. All rates are per clock and multiprocessor, so that a machine's are
its architecture's.
"""

from dataclasses import dataclass

from numflash.devices import Architecture, architecture


@dataclass(frozen=True)
class Machine:
    """A GPU.

    Attributes:
        name: as the driver gives it, "NVIDIA A100-SXM4-80GB"; or that of an architecture, "sm_80".
        arch: as in `devices.ARCHITECTURES`.
        num_sms: multiprocessors.
        clock_mhz: boost clock of the SMs.
        memory_gbps: bandwidth of the device memory, 1e9 bytes per second.
        l2_bytes: L2 cache.
        l2_bytes_per_clock: read bandwidth of the L2 for the whole GPU, bytes per SM clock.
        mma_f16: multiply-adds per clock and SM that `mma.sync` reaches, float16 or bfloat16
            operands, float32 accumulators.
        mma_tf32: likewise for tf32; 0 where there is none.
        fp32_lanes: float32 multiply-adds per clock and SM.
        source: where these figures are from.
    """

    name: str
    arch: str
    num_sms: int
    clock_mhz: float
    memory_gbps: float
    l2_bytes: int
    l2_bytes_per_clock: float
    mma_f16: float
    mma_tf32: float
    fp32_lanes: int
    source: str

    @property
    def limits(self) -> Architecture:
        """Registers, shared memory and threads of an SM."""
        return architecture(self.arch)
