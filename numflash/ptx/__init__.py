"""Layer 0: one function = one instruction, with its meaning in the simulator.

Kernels take `cuda`, scalar types, `device_function` and instructions from here and touch nothing
of Numba directly, so that the same source means GPU code or a simulation, and a second compiler
back end can be added below.
"""

from numflash.ptx.arithmetic import (
    bits_as_float,
    cvt_f32_f16,
    cvt_rn_bf16x2_f32,
    cvt_rn_f16_f32,
    cvt_rn_f16x2_f32,
    cvt_rna_tf32_f32,
    ex2_approx_ftz_f32,
    float_as_bits,
    fma_rn_f32,
    lop3_select_b32,
    max_f32,
    min_f32,
    mov_b32_halves,
    mul_rn_f16x2,
    mul_rn_f32,
    prmt_b32,
)
from numflash.ptx.async_copies import (
    CP_ASYNC_WAIT_GROUP,
    cp_async_4,
    cp_async_16,
    cp_async_commit_group,
)
from numflash.ptx.barriers import bar_arrive, bar_sync
from numflash.ptx.bulk_copies import (
    EVICT_FIRST,
    EVICT_LAST,
    EVICT_NORMAL,
    cp_async_bulk_commit_group,
    cp_async_bulk_tensor_2d,
    cp_async_bulk_tensor_2d_store,
    cp_async_bulk_tensor_3d,
    cp_async_bulk_tensor_3d_store,
    cp_async_bulk_tensor_4d,
    cp_async_bulk_tensor_4d_store,
    cp_async_bulk_tensor_5d,
    cp_async_bulk_tensor_5d_store,
    cp_async_bulk_wait_group_read,
    prefetch_tensormap,
)
from numflash.ptx.control_flow import bra_over_store
from numflash.ptx.float8 import (
    cvt_rn_f16x2_e4m3x2,
    cvt_rn_f16x2_e5m2x2,
    cvt_rn_satfinite_e4m3x2_f32,
    cvt_rn_satfinite_e5m2x2_f32,
)
from numflash.ptx.instruction import (
    INSTRUCTIONS,
    Accumulator,
    Global,
    Instruction,
    Regs,
    Shared,
    instruction,
)
from numflash.ptx.mbarriers import (
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_wait_parity,
)
from numflash.ptx.memory import (
    ld_global_v4_f32,
    ld_global_v4_u32,
    ld_shared_u32,
    ld_shared_v2_f32,
    ld_shared_v4_f32,
    mov_shared_address,
    st_global_v2_f32,
    st_global_v2_u32,
    st_global_v4_f32,
    st_global_v4_u32,
    st_shared_f32,
    st_shared_u32,
    st_shared_v4_f32,
    st_shared_v4_u32,
)
from numflash.ptx.scalars import TensorMap, f32, i32, i64, u8, u16, u32, u64
from numflash.ptx.special_registers import mov_ctaid_x, mov_nctaid_x, mov_tid_x
from numflash.ptx.tensor_cores import (
    ldmatrix_x4,
    ldmatrix_x4_trans,
    mma_m16n8k8_f16,
    mma_m16n8k8_tf32,
    mma_m16n8k16_bf16,
    mma_m16n8k16_f16,
    mma_m16n8k32_e4m3,
    stmatrix_x4,
)
from numflash.ptx.warpgroups import (
    elect_sync,
    fence_mbarrier_init,
    fence_proxy_async,
    fence_proxy_tensormap,
    make_setmaxnreg,
)
from numflash.ptx.wgmma import (
    make_wgmma,
    make_wgmma_wait_group,
    wgmma_commit_group,
    wgmma_fence,
)
from numflash.runtime.mode import SIMULATED

CODE_OPTIONS = {"debug": False, "opt": True, "lineinfo": False, "fastmath": False}
"""Options given to Numba with each function, so that none of its settings decides machine code."""

if SIMULATED:
    from numflash.simulator import cuda, install

    install()

    def device_function(function):
        """A function that kernels call; inlined into them on the GPU."""
        return function
else:
    from numba import cuda

    device_function = cuda.jit(device=True, forceinline=True, **CODE_OPTIONS)

__all__ = [
    "CODE_OPTIONS",
    "CP_ASYNC_WAIT_GROUP",
    "EVICT_FIRST",
    "EVICT_LAST",
    "EVICT_NORMAL",
    "INSTRUCTIONS",
    "SIMULATED",
    "Accumulator",
    "Global",
    "Instruction",
    "Regs",
    "Shared",
    "TensorMap",
    "bar_arrive",
    "bar_sync",
    "bits_as_float",
    "bra_over_store",
    "cp_async_4",
    "cp_async_16",
    "cp_async_bulk_commit_group",
    "cp_async_bulk_tensor_2d",
    "cp_async_bulk_tensor_2d_store",
    "cp_async_bulk_tensor_3d",
    "cp_async_bulk_tensor_3d_store",
    "cp_async_bulk_tensor_4d",
    "cp_async_bulk_tensor_4d_store",
    "cp_async_bulk_tensor_5d",
    "cp_async_bulk_tensor_5d_store",
    "cp_async_bulk_wait_group_read",
    "cp_async_commit_group",
    "cuda",
    "cvt_f32_f16",
    "cvt_rn_bf16x2_f32",
    "cvt_rn_f16_f32",
    "cvt_rn_f16x2_e4m3x2",
    "cvt_rn_f16x2_e5m2x2",
    "cvt_rn_f16x2_f32",
    "cvt_rn_satfinite_e4m3x2_f32",
    "cvt_rn_satfinite_e5m2x2_f32",
    "cvt_rna_tf32_f32",
    "device_function",
    "elect_sync",
    "ex2_approx_ftz_f32",
    "f32",
    "fence_mbarrier_init",
    "fence_proxy_async",
    "fence_proxy_tensormap",
    "float_as_bits",
    "fma_rn_f32",
    "i32",
    "i64",
    "instruction",
    "ld_global_v4_f32",
    "ld_global_v4_u32",
    "ld_shared_u32",
    "ld_shared_v2_f32",
    "ld_shared_v4_f32",
    "ldmatrix_x4",
    "ldmatrix_x4_trans",
    "lop3_select_b32",
    "make_setmaxnreg",
    "make_wgmma",
    "make_wgmma_wait_group",
    "max_f32",
    "mbarrier_arrive",
    "mbarrier_arrive_expect_tx",
    "mbarrier_init",
    "mbarrier_wait_parity",
    "min_f32",
    "mma_m16n8k8_f16",
    "mma_m16n8k8_tf32",
    "mma_m16n8k16_bf16",
    "mma_m16n8k16_f16",
    "mma_m16n8k32_e4m3",
    "mov_b32_halves",
    "mov_ctaid_x",
    "mov_nctaid_x",
    "mov_shared_address",
    "mov_tid_x",
    "mul_rn_f16x2",
    "mul_rn_f32",
    "prefetch_tensormap",
    "prmt_b32",
    "st_global_v2_f32",
    "st_global_v2_u32",
    "st_global_v4_f32",
    "st_global_v4_u32",
    "st_shared_f32",
    "st_shared_u32",
    "st_shared_v4_f32",
    "st_shared_v4_u32",
    "stmatrix_x4",
    "u8",
    "u16",
    "u32",
    "u64",
    "wgmma_commit_group",
    "wgmma_fence",
]
