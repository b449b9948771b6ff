"""The portable kernels on a GPU: forward and gradients within budget, at full size."""

import pytest

import numflash
from tests.attention_cases import GPU_CASES


def _on_device(case):
    """The case's arrays as CuPy arrays with the same strides, and its options."""
    import cupy

    def upload(array):
        # A strided view: move what it is a view of, then take the same view of that.
        base = array if array.base is None else array.base
        while base.base is not None:
            base = base.base
        moved = cupy.asarray(base)
        offset = array.__array_interface__["data"][0] - base.__array_interface__["data"][0]
        memory = cupy.cuda.MemoryPointer(
            moved.data.mem, moved.data.ptr - moved.data.mem.ptr + offset
        )
        return cupy.ndarray(array.shape, array.dtype, memptr=memory, strides=array.strides)

    arrays = {name: upload(array) for name, array in case.arrays().items()}
    options = case.call_options()
    if "alibi_slopes" in options:
        options["alibi_slopes"] = cupy.asarray(options["alibi_slopes"])
    return arrays, options


@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_forward(case, poisoned_pool):
    arrays, options = _on_device(case)
    arrays.pop("dout")
    report = numflash.check(**arrays, **options)
    assert report.passed, f"\n{report}"


@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gradients(case, poisoned_pool):
    arrays, options = _on_device(case)
    report = numflash.check(**arrays, **options)
    assert report.passed, f"\n{report}"
