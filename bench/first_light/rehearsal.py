"""A rehearsal of first light without a GPU: the simulator for a device, and a clock that is fake.

The clock stands still but for what `spend` adds; it is the parent's, so no child's death stops it.
No time that this device reports means anything, and none goes into a record: `without_times` takes
them out.
"""

import numpy as np

from numflash.runtime.devices import ARCHITECTURES
from numflash.runtime.views import numpy_dtype

ARCH = "sm_90a"
LIMITS = ARCHITECTURES[ARCH]
MACHINE = {"device": "simulator", "driver": None, "rehearsal": True}
"""What a record of a rehearsal says instead of a GPU."""
DEVICE = "simulator"
"""What a worker is told instead of the ordinal of a GPU."""
PREDICTED_GPU = "NVIDIA H200"
"""Whose best configs the tuner's model is asked for."""
_TIMES = (
    "median_ms", "quartiles_ms", "samples_ms", "rounds", "tflops", "gbps", "prepare_s",
    "sm_clock_mhz", "power_w",
)  # fmt: skip


class FakeClock:
    """Seconds that only `spend` adds to."""

    def __init__(self):
        self._seconds = 0.0

    def __call__(self) -> float:
        """Seconds so far."""
        return self._seconds

    def spend(self, seconds: float) -> None:
        """Go on by so many seconds."""
        self._seconds += seconds


class SimulatedDevice:
    """A `bench.measuring.device.Device` whose arrays are NumPy's; it times nothing."""

    xp = np

    def describe(self):
        """There is nothing to say."""
        return {}

    def normal(self, shape, dtype, seed):
        """As `Device.normal`."""
        x = np.random.default_rng(seed).standard_normal(shape, np.float32)
        return x.astype(numpy_dtype(dtype))

    def upload(self, array):
        """As `Device.upload`."""
        return array

    def download(self, array):
        """As `Device.download`."""
        return array

    def round_to(self, dtype):
        """As `Device.round_to`."""
        return lambda x: x.astype(numpy_dtype(dtype)).astype(np.float32)

    def time_method(self, method):
        """Nothing runs, and the answer means nothing."""
        return 1.0

    def synchronize(self):
        """The simulator has always finished."""

    def peak_bytes(self, method):
        """Memory is not counted."""
        return 0

    def release(self):
        """There is nothing to give back."""

    def copy(self, size):
        """As `Device.copy`, of nothing."""
        return lambda: None

    def ceilings(self):
        """None are known."""
        return {}


def without_times(result):
    """A result without anything that could be taken for a measured time."""
    if isinstance(result, dict):
        kept = {n: without_times(x) for n, x in result.items() if n not in (*_TIMES, "ratios")}
        return kept | ({"rehearsed": True} if "median_ms" in result else {})
    return result


def environment() -> dict[str, str]:
    """What a child process runs under beside `checks.child_environment`."""
    return {"NUMBA_ENABLE_CUDASIM": "1", "NUMFLASH_SIM_ARCH": ARCH}
