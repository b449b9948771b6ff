"""Every kernel on a GPU: forward and gradients within budget, at full size.

By default 16-bit inputs run on the tensor cores and float32 on the portable kernels. The other
kernels that a case can run on are forced: portable ones, tf32, Turing's instructions, splits.
"""

import pytest

import numflash
from tests.attention_cases import GPU_CASES, SMALL_CONFIGS, on_tensor_cores

_FORCED = {
    "portable": {
        "forward": "m64n32w4",
        "backward-dq": "m32n16w4",
        "backward-dkdv": "m16n32w4",
    },
    "turing": {
        "forward": "sm75-m64n32w4s1",
        "backward-dq": "sm75-m64n16w4s1",
        "backward-dkdv": "sm75-m16n64w4s1-apart",
    },
    "stages": {
        "forward": "sm80-m128n32w4s2",
        "backward-dq": "sm80-m64n32w4s3",
        "backward-dkdv": "sm80-m16n64w4s3",
    },
    "split": {"forward": "sm80-m64n32w4s1x7"},
    "fused": {"forward": "sm80-m64n32w4s1", "backward": "sm80-m64n64w4s1x3"},
}


def _forced():
    """(case, configs): every fifth case of a dtype that a set of configs is for."""
    sixteen_bit = on_tensor_cores([c for c in GPU_CASES if c.dtype != "float32"], "sm80")
    sets = {
        "portable": [c for c in GPU_CASES if c.dtype != "float32"],
        "turing": on_tensor_cores(GPU_CASES, "sm75"),
        "stages": [c for c in sixteen_bit if max(c.shape[5:]) <= 128],
        "split": sixteen_bit,
        "fused": [c for c in sixteen_bit if max(c.shape[5:]) <= 128],
        "tf32": on_tensor_cores([c for c in GPU_CASES if c.dtype == "float32"], "tf32"),
    }
    for name, configs in _FORCED.items():
        for case in sets[name][::5]:
            yield pytest.param(case, configs, id=f"{name}-{case}")
    for case in sets["tf32"][::3]:
        yield pytest.param(case, None, id=f"tf32-{case}")
    for i, case in enumerate(sixteen_bit[::7]):
        configs = SMALL_CONFIGS["sm80"][i % len(SMALL_CONFIGS["sm80"])]
        yield pytest.param(case, configs, id=f"small-{case}")


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


@pytest.mark.parametrize(("case", "configs"), list(_forced()))
def test_gradients_of_forced_kernels(case, configs, poisoned_pool):
    arrays, options = _on_device(case)
    try:
        report = numflash.check(**arrays, config=configs, **options)
    except numflash.UnsupportedError as error:
        pytest.skip(str(error))
    assert report.passed, f"\n{report}"
