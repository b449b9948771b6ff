"""Kernels for CuTe, and the process that compiles them: no GPU is needed, no simulator wanted.

    python cute_kernels.py < request

reads the pickled arguments of `compiled`, and answers with what it returns, pickled, too. Every
extent is a constant of its kernel, so that tensors are pointers.
"""

import math
import os
import pickle
import sys
import tempfile
from pathlib import Path

_ARCH = "sm_90a"
_DUMPS = tempfile.TemporaryDirectory()
# Read when the package is imported.
request = pickle.load(sys.stdin.buffer) if __name__ == "__main__" else {}
os.environ["CUTE_DSL_ARCH"] = request.get("arch", _ARCH)
os.environ.update(CUTE_DSL_KEEP_PTX="1", CUTE_DSL_DUMP_DIR=_DUMPS.name)

import cutlass  # noqa: E402
from cutlass import cute  # noqa: E402
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup  # noqa: E402
from cutlass.cute.runtime import make_fake_compact_tensor  # noqa: E402
from cutlass.memory import SmemAllocator  # noqa: E402

_TYPES = {
    "float16": cutlass.Float16,
    "bfloat16": cutlass.BFloat16,
    "e4m3": cutlass.Float8E4M3FN,
    "float32": cutlass.Float32,
    "int32": cutlass.Int32,
}


def _major(kind: str | None) -> OperandMajorMode:
    is_mn = kind is not None and kind.startswith("MN")
    return OperandMajorMode.MN if is_mn else OperandMajorMode.K


class Product:
    """d (64, n) = a (64, k) b^T with b (n, k): one warpgroup, one product a step of k.

    Operands in shared memory have the layouts that CuTe calls a_kind and b_kind ("K_SW64"), tiled
    in the order of a_order and b_order; a_kind None keeps a in registers.
    """

    def __init__(self, dtype, n, k, a_kind, b_kind, a_order=(0, 1), b_order=(0, 1)):
        self.dtype, self.n, self.k = _TYPES[dtype], n, k
        self.a_kind, self.b_kind, self.a_order, self.b_order = a_kind, b_kind, a_order, b_order

    def tensors(self):
        """Types and shapes of the parameters."""
        return [
            (self.dtype, (64, self.k)),
            (self.dtype, (self.n, self.k)),
            (cutlass.Float32, (64, self.n)),
        ]

    def _mma(self):
        source = warpgroup.OperandSource
        source = source.RMEM if self.a_kind is None else source.SMEM
        majors = _major(self.a_kind), _major(self.b_kind)
        if self.dtype.width == 16:
            shape = 64, self.n, 16
            op = warpgroup.MmaF16BF16Op(self.dtype, cutlass.Float32, shape, source, *majors)
        else:
            shape, types = (64, self.n, 32), (self.dtype, self.dtype, cutlass.Float32)
            op = warpgroup.MmaF8Op(*types, shape, source, *majors)
        return cute.make_tiled_mma(op)

    def _layout(self, kind, rows, order):
        atom = getattr(warpgroup.SmemLayoutAtomKind, kind)
        atom = warpgroup.make_smem_layout_atom(atom, self.dtype)
        return cute.tile_to_shape(atom, (rows, self.k), order)

    @cute.jit
    def __call__(self, a: cute.Tensor, b: cute.Tensor, d: cute.Tensor):
        of_a = None
        if cutlass.const_expr(self.a_kind is not None):
            of_a = self._layout(self.a_kind, 64, self.a_order)
        of_b = self._layout(self.b_kind, self.n, self.b_order)
        kernel = self.kernel(a, b, d, self._mma(), of_a, of_b)
        kernel.launch(grid=(1, 1, 1), block=(128, 1, 1))

    @cute.kernel
    def kernel(
        self, a: cute.Tensor, b: cute.Tensor, d: cute.Tensor, mma: cute.TiledMma, of_a, of_b
    ):
        thread, _, _ = cute.arch.thread_idx()
        mine, smem = mma.get_slice(thread), SmemAllocator()
        sb = smem.allocate_tensor(self.dtype, of_b.outer, 1024, swizzle=of_b.inner)
        for i in cutlass.range(thread, self.n * self.k, 128):
            sb[i // self.k, i % self.k] = b[i // self.k, i % self.k]
        if cutlass.const_expr(of_a is not None):
            sa = smem.allocate_tensor(self.dtype, of_a.outer, 1024, swizzle=of_a.inner)
            for i in cutlass.range(thread, 64 * self.k, 128):
                sa[i // self.k, i % self.k] = a[i // self.k, i % self.k]
            ra = mma.make_fragment_A(mine.partition_A(sa))
        else:
            ga = mine.partition_A(a)
            ra = mma.make_fragment_A(ga)
            cute.autovec_copy(ga, ra)
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_threads()
        rb, gd = mma.make_fragment_B(mine.partition_B(sb)), mine.partition_C(d)
        total = cute.make_rmem_tensor(gd.shape, cutlass.Float32)
        warpgroup.fence()
        mma.set(warpgroup.Field.ACCUMULATE, False)
        for step in cutlass.range_constexpr(cute.size(rb, mode=[2])):
            cute.gemm(mma, total, ra[None, None, step], rb[None, None, step], total)
            mma.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()
        warpgroup.wait_group(0)
        cute.autovec_copy(total, gd)


class Tile:
    """A tile of x, loaded by a tensor map, read by all threads, and stored by another map to y.

    In shared memory it is swizzled with `bits` bits where it arrives, and not where it leaves. The
    tile has the number `first`; `seen` gets it element by element, and y in its place.
    """

    def __init__(self, dtype, bits, tile, first, shape):
        self.dtype, self.bits, self.tile, self.first = _TYPES[dtype], bits, tile, first
        self.shape = shape

    def tensors(self):
        """Types and shapes of the parameters."""
        size = math.prod(self.tile)
        return [(self.dtype, self.shape), (self.dtype, self.shape), (self.dtype, (size,))]

    @cute.jit
    def __call__(self, x: cute.Tensor, y: cute.Tensor, seen: cute.Tensor):
        order = tuple(range(len(self.tile)))[::-1]
        plain = cute.make_ordered_layout(self.tile, order)
        layout = cute.make_composed_layout(cute.make_swizzle(self.bits, 4, 3), 0, plain)
        load, x = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(), x, layout, self.tile
        )
        store, y = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileS2GOp(), y, plain, self.tile
        )
        kernel = self.kernel(load, x, store, y, seen, layout, plain)
        kernel.launch(grid=(1, 1, 1), block=(128, 1, 1))

    @cute.kernel
    def kernel(
        self,
        load: cute.CopyAtom,
        x: cute.Tensor,
        store: cute.CopyAtom,
        y: cute.Tensor,
        seen: cute.Tensor,
        layout: cute.ComposedLayout,
        plain: cute.Layout,
    ):
        thread, _, _ = cute.arch.thread_idx()
        smem, rank = SmemAllocator(), cutlass.const_expr(len(self.tile))
        barrier = smem.allocate_array(cutlass.Int64, 1)
        arrived = smem.allocate_tensor(self.dtype, layout.outer, 1024, swizzle=layout.inner)
        leaving = smem.allocate_tensor(self.dtype, plain, 1024)
        if thread == 0:
            cute.arch.mbarrier_init(barrier, 1)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        one = cute.make_layout(1)
        to, source = cpasync.tma_partition(
            load,
            0,
            one,
            cute.group_modes(arrived, 0, rank),
            cute.group_modes(cute.local_tile(x, self.tile, self.first), 0, rank),
        )
        out, target = cpasync.tma_partition(
            store,
            0,
            one,
            cute.group_modes(leaving, 0, rank),
            cute.group_modes(cute.local_tile(y, self.tile, self.first), 0, rank),
        )
        if thread < 32:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(
                    barrier, cute.size_in_bytes(self.dtype, plain)
                )
            cute.copy(load, source, to, tma_bar_ptr=barrier)
        cute.arch.mbarrier_wait(barrier, 0)
        for i in cutlass.range(thread, math.prod(self.tile), 128):
            # Row-major as the tensors are: the last coordinate is the fastest.
            where = cute.idx2crd(i, self.tile[::-1])[::-1]
            leaving[where] = arrived[where]
            seen[i] = arrived[where]
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_threads()
        if thread < 32:
            cute.copy(store, out, target)
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0, read=True)


class WarpProduct:
    """d (16, 8) = a (16, k) b^T with b (8, k): one warp, by products of `step` columns."""

    def __init__(self, dtype, k, step):
        self.dtype, self.k, self.step = _TYPES[dtype], k, step

    def tensors(self):
        """Types and shapes of the parameters."""
        return [
            (self.dtype, (16, self.k)),
            (self.dtype, (8, self.k)),
            (cutlass.Float32, (16, 8)),
        ]

    def _mma(self):
        op = warp.MmaF16BF16Op(self.dtype, cutlass.Float32, (16, 8, self.step))
        return cute.make_tiled_mma(op)

    @cute.jit
    def __call__(self, a: cute.Tensor, b: cute.Tensor, d: cute.Tensor):
        self.kernel(a, b, d, self._mma()).launch(grid=(1, 1, 1), block=(32, 1, 1))

    @cute.kernel
    def kernel(self, a: cute.Tensor, b: cute.Tensor, d: cute.Tensor, mma: cute.TiledMma):
        lane, _, _ = cute.arch.thread_idx()
        mine = mma.get_slice(lane)
        ga, gb, gd = mine.partition_A(a), mine.partition_B(b), mine.partition_C(d)
        ra, rb = mma.make_fragment_A(ga), mma.make_fragment_B(gb)
        cute.autovec_copy(ga, ra)
        cute.autovec_copy(gb, rb)
        total = cute.make_rmem_tensor(gd.shape, cutlass.Float32)
        total.fill(0.0)
        for step in cutlass.range_constexpr(cute.size(ra, mode=[2])):
            cute.gemm(mma, total, ra[None, None, step], rb[None, None, step], total)
        cute.autovec_copy(total, gd)


class Scalars:
    """What one thread computes with single elements, 128 threads; of halves eight each.

    turned = 2 x and words = y + 1 come from the thread at the other end, by shared memory.
    """

    def tensors(self):
        """Types and shapes of the parameters: x, y, halves, turned, words, squares, cut."""
        single, word, half = _TYPES["float32"], _TYPES["int32"], _TYPES["float16"]
        types = [single, word, half, single, word, half, word]
        return [(dtype, (1024 if dtype is half else 128,)) for dtype in types]

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        y: cute.Tensor,
        halves: cute.Tensor,
        turned: cute.Tensor,
        words: cute.Tensor,
        squares: cute.Tensor,
        cut: cute.Tensor,
    ):
        kernel = self.kernel(x, y, halves, turned, words, squares, cut)
        kernel.launch(grid=(1, 1, 1), block=(128, 1, 1))

    @cute.kernel
    def kernel(
        self,
        x: cute.Tensor,
        y: cute.Tensor,
        halves: cute.Tensor,
        turned: cute.Tensor,
        words: cute.Tensor,
        squares: cute.Tensor,
        cut: cute.Tensor,
    ):
        thread, _, _ = cute.arch.thread_idx()
        smem = SmemAllocator()
        floats = smem.allocate_tensor(cutlass.Float32, cute.make_layout(128), 16)
        integers = smem.allocate_tensor(cutlass.Int32, cute.make_layout(128), 16)
        floats[thread], integers[thread] = x[thread] * 2.0, y[thread] + 1
        cute.arch.sync_threads()
        turned[thread], words[thread] = floats[127 - thread], integers[127 - thread]
        eight = cute.make_rmem_tensor((8,), cutlass.Float16)
        cute.autovec_copy(cute.local_tile(halves, (8,), (thread,)), eight)
        eight.store(eight.load() * eight.load())
        cute.autovec_copy(eight, cute.local_tile(squares, (8,), (thread,)))
        cut[thread] = cute.arch.cvt_f32_tf32(x[thread])


def compiled(kernel: str, arch: str = _ARCH, **parameters) -> dict:
    """What `tests/executed/test_witnesses_cute.py` runs.

    Args:
        kernel: its name here.
        arch: what it is compiled for; read before the first import of CuTe.
        parameters: of the kernel.
    """
    function = globals()[kernel](**parameters)
    tensors = [
        make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=128)
        for dtype, shape in function.tensors()
        for order in [tuple(range(len(shape)))[::-1]]
    ]
    cute.compile(function, *tensors)
    (path,) = Path(_DUMPS.name).glob("*.ptx")
    return {"ptx": path.read_text()}


if __name__ == "__main__":
    # What CuTe prints is none of the answer.
    answer_to, sys.stdout = sys.stdout.buffer, sys.stderr
    answer_to.write(pickle.dumps(compiled(**request)))
