"""Loads and stores: the bytes that they touch, and misaligned or outside vectors refused."""

import numpy as np
import pytest

from numflash.ptx import (
    f32,
    ld_global_v4_f32,
    ld_global_v4_u32,
    ld_shared_u32,
    ld_shared_v2_f32,
    ld_shared_v4_f32,
    ld_shared_v4_u32,
    st_global_v2_f32,
    st_global_v2_u32,
    st_global_v4_f32,
    st_global_v4_u32,
    st_shared_f32,
    st_shared_u32,
    st_shared_v4_f32,
    st_shared_v4_u32,
    u32,
)
from numflash.simulator import GlobalPointer


def memory(n, dtype=np.float32, offset_bytes=0):
    """n elements that lie `offset_bytes` after an address that 256 divides."""
    itemsize = np.dtype(dtype).itemsize
    whole = np.zeros(n * itemsize + 512, np.uint8)
    start = -whole.__array_interface__["data"][0] % 256 + offset_bytes
    array = whole[start : start + n * itemsize].view(dtype)
    array[...] = np.arange(n)
    return array


GLOBAL_VECTORS = {
    "ld_global_v4_u32": lambda pointer, i: ld_global_v4_u32(np.zeros(4, u32), pointer, i),
    "ld_global_v4_f32": lambda pointer, i: ld_global_v4_f32(np.zeros(4, f32), pointer, i),
    "st_global_v4_f32": lambda pointer, i: st_global_v4_f32(pointer, i, np.zeros(4, f32)),
    "st_global_v4_u32": lambda pointer, i: st_global_v4_u32(pointer, i, np.zeros(4, u32)),
    "st_global_v2_f32": lambda pointer, i: st_global_v2_f32(pointer, i, np.zeros(2, f32)),
    "st_global_v2_u32": lambda pointer, i: st_global_v2_u32(pointer, i, np.zeros(2, u32)),
}
SHARED_VECTORS = {
    "ld_shared_v4_f32": lambda array, i: ld_shared_v4_f32(np.zeros(4, f32), array, i),
    "ld_shared_v4_u32": lambda array, i: ld_shared_v4_u32(np.zeros(4, u32), array, i),
    "ld_shared_v2_f32": lambda array, i: ld_shared_v2_f32(np.zeros(2, f32), array, i),
    "st_shared_v4_f32": lambda array, i: st_shared_v4_f32(array, i, np.zeros(4, f32)),
    "st_shared_v4_u32": lambda array, i: st_shared_v4_u32(array, i, np.zeros(4, u32)),
}


@pytest.mark.parametrize("name", GLOBAL_VECTORS)
@pytest.mark.parametrize("storage", [np.float32, np.uint16], ids=lambda dtype: dtype.__name__)
def test_a_global_vector_lies_inside_its_array_and_aligned(name, storage):
    access = GLOBAL_VECTORS[name]
    n_bytes = 8 if "v2" in name else 16
    step = n_bytes // np.dtype(storage).itemsize
    pointer = GlobalPointer(memory(4 * step - 1, storage), storage, "x")
    for i in (0, step, 2 * step):
        access(pointer, i)
    for i in (-step, -1, 3 * step, 4 * step, 2**40):
        with pytest.raises(IndexError, match=rf"x: elements {i} to {i + step - 1} lie outside"):
            access(pointer, i)
    for i in (1, step - 1, step + 1, step // 2):
        with pytest.raises(ValueError, match=f"x: a {n_bytes}-byte access at element {i} is misa"):
            access(pointer, i)
    access(GlobalPointer(memory(2 * step, storage, offset_bytes=n_bytes), storage), 0)
    with pytest.raises(ValueError, match="misaligned"):
        access(GlobalPointer(memory(2 * step, storage, offset_bytes=n_bytes // 2), storage), 0)


@pytest.mark.parametrize("name", SHARED_VECTORS)
def test_a_shared_vector_lies_inside_its_array_and_aligned(name):
    access = SHARED_VECTORS[name]
    n = 2 if "v2" in name else 4
    array = memory(4 * n - 1)
    for i in (0, n, 2 * n, np.int64(2 * n), np.int32(n)):
        access(array, i)
    for i in (-n, 3 * n, 4 * n, 2**40):
        text = f"shared memory: words {i} to {i + n - 1} of {4 * n - 1}"
        with pytest.raises(IndexError, match=text):
            access(array, i)
    for i in (1, n - 1, n + 1, -1):
        with pytest.raises(ValueError, match=f"a {4 * n}-byte access at word {i} is misaligned"):
            access(array, i)


@pytest.mark.parametrize(
    ("store", "scalar", "unit"), [(st_shared_f32, f32, "float"), (st_shared_u32, u32, "word")]
)
def test_a_shared_store_does_not_wrap_around(store, scalar, unit):
    array = memory(4, scalar)
    store(array, 3, scalar(10))
    assert array.tolist() == [0, 1, 2, 10]
    for i in (-1, 4):
        with pytest.raises(IndexError, match=f"shared memory: {unit} {i} of 4"):
            store(array, i, scalar(1))


def test_a_shared_load_does_not_wrap_around():
    array = memory(4, u32)
    assert ld_shared_u32(array, 3) == 3 and type(ld_shared_u32(array, 0)) is u32
    for i in (-1, 4):
        with pytest.raises(IndexError, match=f"shared memory: word {i} of 4"):
            ld_shared_u32(array, i)


def test_a_vector_of_floats_comes_from_words_of_any_type():
    words = memory(4, u32)
    words[2:] = np.array([1.5, np.nan], f32).view(u32)
    frag = np.zeros(2, f32)
    ld_shared_v2_f32(frag, words, 2)
    assert frag.view(u32).tolist() == words[2:].tolist()


def test_vectors_touch_nothing_else():
    array = memory(12)
    st_global_v4_f32(GlobalPointer(array, f32), 4, np.full(4, 100, f32))
    assert array.tolist() == [0, 1, 2, 3, 100, 100, 100, 100, 8, 9, 10, 11]
    frag = np.full(6, -1, np.float32)
    ld_shared_v4_f32(frag[1:5], array, 8)
    assert frag.tolist() == [-1, 8, 9, 10, 11, -1]
    st_shared_v4_f32(array, 0, np.arange(4, dtype=f32) + 50)
    assert array[:5].tolist() == [50, 51, 52, 53, 100]
