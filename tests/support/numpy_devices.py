"""Devices whose arrays are NumPy's, and whose times are made up."""

import numpy as np

from numflash.runtime.views import numpy_dtype


class FakeDevice:
    """A `tuner.measuring.gpu.Device`. `trouble` is raised when timing."""

    ordinal, memory = 0, 2**30

    def __init__(self, trouble=None, stays_broken=False):
        self.trouble, self.stays_broken, self.launches = trouble, stays_broken, 0
        self.is_broken = False

    def describe(self):
        return {"name": "NumPy", "arch": "sm_80", "num_sms": 1, "bus": "none"}

    def empty(self, shape, dtype):
        return np.full(shape, np.nan, numpy_dtype(dtype))

    def fill_normal(self, array, seed):
        array[...] = np.random.default_rng(seed).standard_normal(array.shape).astype(array.dtype)

    def upload(self, array):
        return array

    def total_bytes(self):
        return self.memory

    def time(self, launch):
        print("a kernel prints")
        launch()
        self.launches += 1
        if self.trouble is not None:
            self.is_broken = self.stays_broken
            raise self.trouble
        return 0.25

    def synchronize(self):
        if self.is_broken:
            raise RuntimeError("the CUDA driver reports CUDA_ERROR_ILLEGAL_ADDRESS")

    def release(self):
        pass


class NumpyDevice:
    """A `bench.measuring.device.Device`; a call takes what `milliseconds` says, by its name."""

    xp = np

    def __init__(self, milliseconds=None):
        self.milliseconds, self.is_broken, self.timed = milliseconds or {}, False, []

    def normal(self, shape, dtype, seed):
        return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)

    def upload(self, array):
        return array

    def round_to(self, dtype):
        return lambda x: x.astype(dtype).astype(np.float32)

    def time_method(self, method):
        with method.context():
            method.call()
        self.timed.append(method.name)
        return self.milliseconds.get(method.name, 1.0)

    def synchronize(self):
        if self.is_broken:
            raise RuntimeError("an illegal memory access was encountered")

    def peak_bytes(self, method):
        return 123

    def release(self):
        pass
