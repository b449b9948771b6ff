"""Shared, local and global memory: where it begins, who shares it, where it ends."""

import ml_dtypes
import numpy as np
import pytest
from numba import cuda as numba_cuda

from numflash.ptx import (
    cuda,
    f32,
    i32,
    ld_global_v4_f32,
    ld_global_v4_u32,
    u16,
    u32,
)
from numflash.simulator import GlobalPointer, launch

LANES = np.arange(32)


def run(kernel, *args, grid=1, block=32, smem=0):
    """Launch and return the first argument, the kernel's output."""
    launch(kernel, grid, block, args, smem)
    return args[0] if args else None


# Shared and local memory

FLOATS = [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
FLOATS += [np.float32, np.float64]


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("space", ["shared", "local", "dynamic"])
def test_memory_begins_as_nan(space, dtype):
    def kernel(seen):
        if space == "shared":
            memory = cuda.shared.array((2, 3), dtype)
        elif space == "local":
            memory = cuda.local.array((2, 3), dtype)
        else:
            memory = cuda.shared.array(0, dtype)
        seen.append(memory.copy())

    (memory,) = run(kernel, [], block=1, smem=6 * np.dtype(dtype).itemsize)
    assert memory.dtype == dtype and memory.shape == ((6,) if space == "dynamic" else (2, 3))
    assert np.isnan(memory.astype(np.float64)).all()


def test_numba_types_name_the_same_memory_as_numpy_types():
    types = numba_cuda.types

    def kernel(dtypes):
        for numba_type in (types.float32, types.int64, types.uint16, types.boolean):
            dtypes.append(cuda.local.array(3, numba_type).dtype)
        dtypes.append(cuda.shared.array(3, types.bfloat16).dtype)

    expected = [np.float32, np.int64, np.uint16, np.bool_, ml_dtypes.bfloat16]
    assert run(kernel, [], block=1) == [np.dtype(dtype) for dtype in expected]


def test_shared_memory_begins_anew_in_every_block():
    def kernel(out):
        tile = cuda.shared.array(1, f32)
        dynamic = cuda.shared.array(0, f32)
        out[cuda.blockIdx.x] = tile[0], dynamic[0]
        tile[0] = dynamic[0] = 1

    assert np.isnan(run(kernel, np.zeros((3, 2)), grid=3, block=1, smem=4)).all()


def test_two_shared_arrays_on_one_line_are_two(each_seed):
    def kernel(out):
        # fmt: off
        a, b = cuda.shared.array(32, i32), cuda.shared.array(32, i32)
        # fmt: on
        t = cuda.threadIdx.x
        a[t], b[t] = t, 100 + t
        cuda.syncthreads()
        out[t] = a[31 - t], b[31 - t]

    out = run(kernel, np.zeros((32, 2), int))
    assert (out[:, 0] == LANES[::-1]).all() and (out[:, 1] == 100 + LANES[::-1]).all()


def test_one_declaration_is_one_array_for_all_threads_and_every_turn_of_a_loop():
    def tile_of():
        return cuda.shared.array(32, i32)

    def kernel(out):
        t = cuda.threadIdx.x
        for step in range(3):
            tile = tile_of()
            if step:
                assert tile[31 - t] == 31 - t + step - 1
            cuda.syncthreads()
            tile[t] = t + step
            cuda.syncthreads()
        out[t] = tile_of()[31 - t]

    assert (run(kernel, np.zeros(32, int)) == LANES[::-1] + 2).all()


def make_tile(size, dtype):
    """A device function from a factory, as tiles are built."""

    def tile():
        return cuda.shared.array(size, dtype)

    return tile


def test_functions_of_one_factory_have_their_own_shared_arrays():
    small, large, bits = make_tile(4, f32), make_tile(8, f32), make_tile(8, u32)

    def kernel(shapes):
        small()[:], large()[:], bits()[:] = 1, 2, 3
        shapes += [small().tolist(), large().tolist(), bits().tolist()]

    assert run(kernel, [], block=1) == [[1.0] * 4, [2.0] * 8, [3] * 8]


def test_local_arrays_belong_to_one_thread(each_seed):
    def kernel(out):
        mine = cuda.local.array(2, i32)
        mine[0] = cuda.threadIdx.x
        cuda.syncthreads()
        out[cuda.threadIdx.x] = mine[0]

    assert (run(kernel, np.zeros(32, int)) == LANES).all()


def test_dynamic_shared_memory_has_many_views_of_the_same_bytes(each_seed):
    def kernel(out):
        floats, words = cuda.shared.array(0, f32, alignment=16), cuda.shared.array(0, u32)
        halves = cuda.shared.array(0, u16)
        t = cuda.threadIdx.x
        floats[t] = t
        cuda.syncthreads()
        out[t] = words[31 - t], halves[2 * t] + 0x10000 * u32(halves[2 * t + 1])
        assert floats.size == 33 and halves.size == 67 and words.size == 33

    out = run(kernel, np.zeros((32, 2), np.uint32), smem=134 + 1)
    expected = LANES.astype(np.float32).view(np.uint32)
    assert (out[:, 0] == expected[::-1]).all() and (out[:, 1] == expected).all()


def test_without_dynamic_shared_memory_there_is_none():
    def kernel(sizes):
        sizes.append(cuda.shared.array(0, f32).size)

    assert run(kernel, [], block=1) == [0]


def test_dynamic_shared_memory_is_aligned():
    def kernel(addresses):
        addresses.append(cuda.shared.array(0, f32).__array_interface__["data"][0])

    addresses = run(kernel, [], grid=10, block=1, smem=100)
    assert all(address % 1024 == 0 for address in addresses)


# Global memory


def aligned(shape, dtype=np.float32, offset_bytes=0):
    """An array `offset_bytes` after an address that 256 divides."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    whole = np.zeros(n_bytes + 512, np.uint8)
    start = -whole.__array_interface__["data"][0] % 256 + offset_bytes
    return whole[start : start + n_bytes].view(dtype).reshape(shape)


def test_a_pointer_reads_and_writes_the_array_it_points_to():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    pointer = GlobalPointer(array, f32)
    assert [pointer[i] for i in range(6)] == array.ravel().tolist()
    pointer[4] = 10
    assert array[1, 1] == 10
    assert pointer[np.int64(4)] == 10 and pointer[i32(4)] == 10


def test_a_pointer_sees_other_types_as_their_storage():
    array = np.array([1, -2], np.float16)
    pointer = GlobalPointer(array, np.dtype(u16))
    assert [pointer[0], pointer[1]] == [0x3C00, 0xC000] and pointer[0].dtype == u16
    pointer[1] = 0x3C00
    assert array.tolist() == [1, 1]


@pytest.mark.parametrize("offset", [6, 7, 2**31, 2**40, -1, -6, -(2**40)])
def test_a_pointer_refuses_to_leave_its_array(offset):
    pointer = GlobalPointer(np.zeros((2, 3), np.float32), f32, "q")
    with pytest.raises(IndexError, match=rf"q: elements {offset} .*\(elements 0 to 5\)"):
        pointer[offset]
    with pytest.raises(IndexError, match=f"q: elements {offset} "):
        pointer[offset] = 1


def test_a_pointer_to_a_slice_reaches_from_its_first_to_its_last_element():
    whole = np.arange(100, dtype=np.float32).reshape(10, 10)
    view = whole[2:5, 3:7]
    pointer = GlobalPointer(view, f32)
    assert pointer[0] == 23 and pointer[2 * 10 + 3] == whole[4, 6] == 46
    for outside in (-1, 24):
        with pytest.raises(IndexError):
            pointer[outside]


@pytest.mark.parametrize(
    "view",
    [
        np.s_[::-1],
        np.s_[:, ::-1],
        np.s_[::-1, ::-1],
        np.s_[4:1:-2, ::-3],
        np.s_[::2, ::-1],
    ],
    ids=str,
)
def test_strides_of_a_pointer_may_have_any_sign(view):
    array = np.arange(60, dtype=np.float32).reshape(6, 10)[view]
    pointer = GlobalPointer(array, f32)
    rows, columns = (stride // 4 for stride in array.strides)
    offsets = rows * np.arange(array.shape[0])[:, None] + columns * np.arange(array.shape[1])
    assert (np.vectorize(pointer.__getitem__)(offsets) == array).all()
    for outside in (offsets.min() - 1, offsets.max() + 1):
        with pytest.raises(IndexError):
            pointer[outside]


def test_a_pointer_to_a_broadcast_array_has_one_element_to_read():
    pointer = GlobalPointer(np.broadcast_to(f32(3), (4, 5)), f32)
    assert pointer[0] == 3
    with pytest.raises(IndexError):
        pointer[1]


def test_a_pointer_to_an_array_that_is_read_only_cannot_write():
    array = np.zeros(3, np.float32)
    array.flags.writeable = False
    pointer = GlobalPointer(array, f32)
    assert pointer[2] == 0
    with pytest.raises(ValueError, match="read-only"):
        pointer[2] = 1


@pytest.mark.parametrize("shape", [0, (0, 5), (5, 0)], ids=str)
def test_a_pointer_to_an_empty_array_reaches_nothing(shape):
    pointer = GlobalPointer(np.zeros(shape, np.float32), f32)
    for offset in (0, -1, 1):
        with pytest.raises(IndexError):
            pointer[offset]
    with pytest.raises(IndexError):
        pointer.block(0, 16)


def test_a_vector_access_must_lie_inside_and_be_aligned():
    pointer = GlobalPointer(aligned(10), f32, "k")
    frag = np.zeros(4, np.float32)
    ld_global_v4_f32(frag, pointer, 4)
    for offset in (1, 2, 3, 5):
        with pytest.raises(ValueError, match=f"k: a 16-byte access at element {offset} is misal"):
            ld_global_v4_f32(frag, pointer, offset)
    for offset in (-4, 8, 12):
        with pytest.raises(IndexError, match=f"k: elements {offset} to {offset + 3} lie outside"):
            ld_global_v4_f32(frag, pointer, offset)


def test_a_vector_access_is_aligned_by_address_not_by_offset():
    frag = np.zeros(4, np.uint32)
    pointer = GlobalPointer(aligned(20, np.float16, offset_bytes=4), np.dtype(u16))
    ld_global_v4_u32(frag, pointer, 6)
    with pytest.raises(ValueError, match="misaligned"):
        ld_global_v4_u32(frag, pointer, 8)
