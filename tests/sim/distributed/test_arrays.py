"""Arrays that travel: cut, joined, in one piece of memory; NumPy's, and PyTorch's on the CPU."""

import numpy as np
import pytest

from numflash.distributed import Layout
from numflash.distributed.arrays import Arrays
from tests.support.ranks import late, on_ranks

LAYOUTS = {
    "zigzag": Layout.zigzag(23, 3),
    "contiguous": Layout.contiguous(23, 3),
    "documents": Layout.zigzag_documents([11, 2, 10], 3),
    "one rank has none": Layout.contiguous(2, 3),
    "own order": Layout.of_segments([23], [[(0, 9, 14)], [(0, 4, 5), (0, 0, 4)], []]),
}


@pytest.fixture(params=["numpy", "torch"])
def made(request):
    """(array, dtype) -> an array of a library."""
    if request.param == "numpy":
        return lambda array, dtype="float32": array.astype(dtype)
    torch = pytest.importorskip("torch", reason="needs torch")
    return lambda array, dtype="float32": torch.from_numpy(array).to(getattr(torch, dtype))


def values(array):
    """As nested lists of float32."""
    return (array.float() if hasattr(array, "float") else array.astype("float32")).tolist()


@pytest.mark.parametrize("axis", [1, 0, -1])
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_gathered_is_what_was_cut(name, axis, made):
    layout = LAYOUTS[name]
    shape = [2, 3, 2]
    shape[axis] = layout.seqlen
    whole = made(np.arange(np.prod(shape), dtype="float32").reshape(shape))

    def work(comm):
        part = layout.shard(whole, comm.rank, axis)
        own = np.take(np.asarray(values(whole)), layout.indices(comm.rank), axis)
        assert values(part) == own.tolist()
        return values(layout.gather(part, comm, axis))

    assert on_ranks(3, work, late(3, seed=1)) == [values(whole)] * 3


@pytest.mark.parametrize("name", LAYOUTS)
def test_arrays_of_another_library_are_cut(name, monkeypatch):
    """As NumPy's outside of the simulator, of whoever reads data."""
    monkeypatch.setattr("numflash.distributed.arrays.SIMULATED", False)
    layout, x = LAYOUTS[name], np.arange(2 * LAYOUTS[name].seqlen).reshape(2, -1)
    for rank in range(layout.ranks):
        assert layout.shard(x, rank).tolist() == x[:, layout.indices(rank)].tolist()


def test_a_part_of_one_segment_is_a_view(made):
    whole = made(np.zeros((1, 12, 2), "float32"))
    part = Layout.contiguous(12, 3).shard(whole, 1)
    part[...] = 3
    assert [row[0] for row in values(whole)[0]] == [0] * 4 + [3] * 4 + [0] * 4


def errors(work):
    """What each of 3 ranks raised."""
    found = []

    def one(comm):
        with pytest.raises(ValueError) as error:
            work(comm)
        found.append(str(error.value))

    on_ranks(3, one)
    return found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, rank: x[:, rank == 2 :], "rank 2 refuses the call: x must have 8 tokens along"),
        (lambda x, rank: x.astype("int8") if rank else x, "dtype of x: rank 0 has float32 where"),
        (
            lambda x, rank: x[..., rank > 1 :],
            "shape of x: rank 2 has (2, tokens, 1) where ranks 0",
        ),
    ],
    ids=["tokens", "dtype", "shape"],
)
def test_parts_that_do_not_fit_together_are_refused_on_all_ranks(change, words):
    layout = LAYOUTS["contiguous"]
    x = np.zeros((2, 23, 2), "float32")

    def work(comm):
        layout.gather(change(layout.shard(x, comm.rank), comm.rank), comm)

    found = errors(work)
    assert len(found) == 3 and len(set(found)) == 1 and words in found[0]


def test_wrong_arguments():
    layout, x = LAYOUTS["zigzag"], np.zeros((2, 23), "float32")
    for arguments, words in (
        ((x, 3), "rank must be from 0 to 2, got 3"),
        ((x, 0, 2), r"axis must be one of x of shape \(2, 23\), got 2"),
        ((x, 0, 0), r"x must have 23 tokens along axis 0, as the layout has, got shape \(2, 23\)"),
    ):
        with pytest.raises(ValueError, match=words):
            layout.shard(*arguments)
    with pytest.raises(TypeError, match="x must be a CuPy array or a PyTorch tensor"):
        Arrays.of([1.0], "x")
    four = errors(lambda comm: Layout.zigzag(23, 4).gather(x, comm))
    assert set(four) == {"layout and comm must have as many ranks, got 4 and 3"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_bundle_is_one_message(dtype, made):
    arrays = Arrays.of(made(np.zeros(1, "float32")), "x")
    parts = {"k": ((3, 5), dtype), "nothing": ((0, 4), "float32"), "scale": ((7,), "float32")}
    one, other = arrays.bundle(parts), arrays.bundle(parts)
    one["k"][...] = 2.5
    one["scale"][...] = -1
    other.memory[...] = one.memory
    assert values(other["k"]) == [[2.5] * 5] * 3 and values(other["scale"]) == [-1] * 7
    assert arrays.dtype_of(other["k"]) == dtype and tuple(other["nothing"].shape) == (0, 4)
    size = 3 * 5 * (4 if dtype == "float32" else 2)
    assert one.memory.nbytes == 128 + 7 * 4 and size < 128
    # What travels is the memory of the views.
    assert arrays.as_bytes(one["k"]).nbytes == size


def test_arrays_of_a_library(made):
    array = made(np.arange(6, dtype="float32").reshape(2, 3))
    arrays = Arrays.of(array, "x")
    assert arrays == Arrays.of(array, "y") and hash(arrays) == hash(Arrays.of(array, "y"))
    half = arrays.astype(array, "float16")
    assert arrays.dtype_of(half) == "float16" and arrays.astype(half, "float16") is half
    again = arrays.typed(arrays.as_bytes(arrays.contiguous(array[:, 1:])), "float32", (2, 2))
    assert values(again) == [[1, 2], [4, 5]]
    assert values(arrays.zeros((2,), "bfloat16")) == [0, 0]
    assert values(arrays.from_host(np.array([3, 4], "int32"))) == [3, 4]
