"""dQ = dS K of one tile, by warpgroups that hold dS^T: a kernel, and its arrays."""

from functools import cache

import numpy as np

from numflash.kernels.kernel import Kernel
from numflash.ptx import (
    cuda,
    device_function,
    f32,
    fence_proxy_async,
    i32,
    make_wgmma_wait_group,
    mov_shared_address,
    mov_tid_x,
    u32,
)
from numflash.runtime.views import Pointer
from numflash.tiles.wgmma.products import SLAB_BYTES, make_operand, make_pack, make_product_kn
from numflash.tiles.wgmma.transposition import make_store_transposed, transposed_place
from tests.support.wgmma_cases import ELEMENTS, registers_of_d, slabs

QUERIES = 64
_SLAB_WORDS = QUERIES * SLAB_BYTES // 4


@cache
def make_kernel(dtype, groups, head_dim, without=None, store=None, make_product=make_product_kn):
    """dq = dS K; each of `groups` warpgroups has 64 keys of dS^T, and computes all of dQ.

    `without` is "fence" or "barrier", which is left out; `store` and `make_product` replace the
    transposed store and the factory of the product.
    """
    keys, columns = 64 * groups, -(-head_dim // 64) * 64
    k_words = keys * columns // 2
    n_ds, n_packed, n_dq = QUERIES // 2, QUERIES // 4, head_dim // 2
    threads = 128 * groups
    operand, k_operand = make_operand(QUERIES * SLAB_BYTES), make_operand(keys * SLAB_BYTES)
    product = make_product(dtype, QUERIES, keys, head_dim)
    pack, wait = make_pack(dtype, QUERIES // 8), make_wgmma_wait_group(0, n_dq)
    store_transposed = store or make_store_transposed(QUERIES)
    fences, meets = without != "fence", without != "barrier"

    @device_function
    def multiply(smem, ds_acc, dq_acc):
        packed = cuda.local.array(n_packed, u32)
        pack(packed, ds_acc)
        slab = k_words + i32(mov_tid_x() // 128) * _SLAB_WORDS
        store_transposed(packed, smem, i32(slab + transposed_place()))
        if fences:
            # Hazard: products would not see these writes.
            fence_proxy_async()
        if meets:
            # Hazard: products would read what other warps have not written yet.
            cuda.syncthreads()
        ds = operand(mov_shared_address(smem, k_words))
        product(dq_acc, ds, k_operand(mov_shared_address(smem, 0)))
        wait(dq_acc)

    def kernel(ds: Pointer(f32), k: Pointer(u32), dq: Pointer(f32)):
        smem = cuda.shared.array(0, u32, alignment=1024)
        ds_acc, dq_acc = cuda.local.array(n_ds, f32), cuda.local.array(n_dq, f32)
        t = mov_tid_x()
        for i in range(t, k_words, threads):
            smem[i] = k[i]
        for i in range(n_ds):
            ds_acc[i] = ds[n_ds * t + i]
        fence_proxy_async()
        cuda.syncthreads()
        multiply(smem, ds_acc, dq_acc)
        for i in range(n_dq):
            dq[n_dq * t + i] = dq_acc[i]

    return Kernel("dq of a tile", kernel, threads, 4 * (k_words + groups * _SLAB_WORDS))


def arrays(dtype, groups, head_dim):
    """dS^T as registers, K as slabs, and the registers of dQ that must come out."""
    rng = np.random.default_rng(2)
    ds = rng.integers(-3, 4, (QUERIES, 64 * groups)).astype(np.float64)
    k = rng.integers(-3, 4, (64 * groups, head_dim)).astype(np.float64)
    of_groups = [registers_of_d(ds[:, 64 * g : 64 * g + 64].T) for g in range(groups)]
    dq = registers_of_d(ds @ k)
    k_slabs = slabs(k.astype(ELEMENTS[dtype])).view(np.uint32)
    return np.concatenate(of_groups), k_slabs, np.tile(dq, groups)
