"""Wrong meanings on purpose: Triton's kernels notice them."""

from dataclasses import replace

import numpy as np
import pytest

from numflash.ptx import INSTRUCTIONS, tensor_cores
from numflash.simulator import tensor_maps, warpgroup
from numflash.simulator.bulk_copies import BulkCopies
from tests.executed import test_witnesses_triton as triton
from tests.executed import witnesses
from tests.executed.witnesses import body, exchanged, function, rows_exchanged, text


def _in_other_order(body):
    """Of a product: the second and third register of a are exchanged."""
    return lambda d, a, b: body(d, a[:, [0, 2, 1, 3]], b)


def _rows_in_other_order(body):
    def wrong(frag, source, offset):
        body(frag, source, offset)
        frag[...] = frag[:, [0, 2, 1, 3]]

    return wrong


def _not_transposed(body):
    return INSTRUCTIONS["ldmatrix_x4"].body


def _stored_in_other_order(body):
    return lambda target, offset, frag: body(target, offset, frag[:, [0, 2, 1, 3]])


def _same(swizzled):
    return lambda chunks, *rest: chunks


def _offsets_exchanged(mn_major):
    return lambda n_rows, swizzle, leading, stride: mn_major(n_rows, swizzle, stride, leading)


def _first_two_exchanged(transfer):
    """Of a bulk copy: the slowest dimensions' coordinates."""
    return lambda *given: transfer(*given[:-1], (*given[-1][:-2], *given[-1][:-3:-1]))


def _shifted(body):
    """Of a bulk store: one row farther."""
    return lambda tensor_map, c0, c1, *rest: body(tensor_map, c0, c1 + 1, *rest)


def _loaded_shifted(body):
    return lambda *given: body(*given[:7], given[7] + 1, *given[8:])


def _uncut(tf32):
    return lambda x: np.ascontiguousarray(x, np.uint32).view(np.float32).astype(np.float64)


def _nothing(body):
    return lambda *given: None


def _sources_next_door(body):
    """Of a copy: the source is one element farther."""
    return lambda target, to, source, at, n_bytes: body(target, to ^ 1, source, at, n_bytes)


def _all_of_it(body):
    """Of a copy: its size is ignored."""
    return lambda target, to, source, at, n_bytes: body(target, to, source, at, 16)


def _one_more(body):
    return lambda barriers, index, n: body(barriers, index, n + 1)


def _half(body):
    return lambda barriers, index, n: body(barriers, index, n // 2)


def _all_elected(body):
    return lambda: np.ones(32, np.uint32)


def _never(test):
    return lambda *given: True


def _a_group_less(pending: int):
    """Wait for one group less than asked for."""

    def change(m):
        other = INSTRUCTIONS.get(f"cp_async_wait_group_{pending + 1}")
        body = other.body if other else lambda: None
        name = f"cp_async_wait_group_{pending}"
        m.setitem(INSTRUCTIONS, name, replace(INSTRUCTIONS[name], body=body))

    return change


def _one_group_fewer(pending: int):
    """Wait for one group of products fewer than asked for."""
    opcode = r"(wgmma\.wait_group\.sync\.aligned\s+)"
    return text(rf"{opcode}{pending};", rf"\g<1>{pending + 1};")


_FLOAT16, _TF32 = ("fp16", "f16", 0, 0), ("fp32", "tf32", 0, 0)
_MAPS = (triton.test_a_matmul_of_tensor_maps, "fp16", 0, 64)
_SM80, _SM90 = (triton.test_attention, 80, 64), (triton.test_attention, 90, 64)
_COPIES = {n: (triton.test_copies_of_several_groups, n + 2) for n in range(5)}
_SCALARS = (triton.test_scalars, 512)
_GROUPS, _PLACES = (triton.test_a_matmul_of_sm90, "fp16", 0, 1), (triton.test_places,)
_WGMMA = "wgmma_m64n128k16_f16_a_shared_b_"
# Which witness has which product.
_PRODUCTS = {
    **{
        f"wgmma_m64n128k16_{type_}_a_shared_b_{'k' if tb else 'mn'}{'_a_mn' * ta}": (
            triton.test_a_matmul_of_sm90,
            type_.replace("f16", "fp16").replace("bfp", "bf"),
            ta,
            tb,
        )
        for type_ in ("f16", "bf16")
        for ta in (0, 1)
        for tb in (0, 1)
    },
    **{
        f"wgmma_m64n{n}k16_f16_a_shared_b_{major}": (triton.test_sizes_of_wgmma, n)
        for n, major in ((16, "k"), (32, "k"), (256, "mn"))
    },
    "wgmma_m64n128k32_e4m3_a_shared_b_k": (triton.test_fp8_of_sm90,),
    "wgmma_m64n64k8_tf32_a_shared_b_k": (triton.test_tf32_of_sm90,),
    "wgmma_m64n64k16_f16_a_shared_b_k": _SM90,
    "wgmma_m64n64k16_f16_a_registers_b_mn": _SM90,
}
# Name of the wrong meaning -> (instruction, what makes it wrong, (witness, its arguments)).
WRONG = {
    "f16: registers of a exchanged": (
        "mma_m16n8k16_f16",
        body("mma_m16n8k16_f16", _in_other_order),
        (triton.test_a_matmul_of_sm80, *_FLOAT16),
    ),
    "bf16: registers of a exchanged": (
        "mma_m16n8k16_bf16",
        body("mma_m16n8k16_bf16", _in_other_order),
        (triton.test_a_matmul_of_sm80, "bf16", "bf16", 0, 0),
    ),
    "tf32: registers of a exchanged": (
        "mma_m16n8k8_tf32",
        body("mma_m16n8k8_tf32", _in_other_order),
        (triton.test_a_matmul_of_sm80, *_TF32),
    ),
    "low 13 bits not cut": (
        "mma_m16n8k8_tf32",
        function(tensor_cores, "_tf32", _uncut),
        (triton.test_a_matmul_of_sm80, *_TF32),
    ),
    "e4m3: registers of a exchanged": (
        "mma_m16n8k32_e4m3",
        body("mma_m16n8k32_e4m3", _in_other_order),
        (triton.test_fp8_of_sm89,),
    ),
    "matrices exchanged": (
        "ldmatrix_x4",
        body("ldmatrix_x4", _rows_in_other_order),
        (triton.test_a_matmul_of_sm80, "fp16", "f16", 0, 1),
    ),
    "not transposed": (
        "ldmatrix_x4_trans",
        body("ldmatrix_x4_trans", _not_transposed),
        (triton.test_a_matmul_of_sm80, "fp16", "f16", 1, 0),
    ),
    "matrices stored in another order": (
        "stmatrix_x4",
        body("stmatrix_x4", _stored_in_other_order),
        _MAPS,
    ),
    "a size of 0 copies, too": ("cp_async_16", body("cp_async_16", _all_of_it), _SM80),
    "a word next door": (
        "cp_async_4",
        body("cp_async_4", _sources_next_door),
        (triton.test_copies_of_four_bytes,),
    ),
    "no group is made": (
        "cp_async_commit_group",
        body("cp_async_commit_group", _nothing),
        _COPIES[1],
    ),
    **{
        f"one group more than {n} is left": (
            f"cp_async_wait_group_{n}",
            _a_group_less(n),
            _COPIES[n],
        )
        for n in range(5)
    },
    "threads do not wait for each other": (
        "bar_sync",
        text(r"bar\.sync\s+0;", ""),
        (triton.test_a_matmul_of_sm80, *_FLOAT16),
    ),
    "wgmma: no swizzle": (
        _WGMMA + "k",
        function(warpgroup, "swizzled", _same),
        (triton.test_a_matmul_of_sm90, "fp16", 0, 1),
    ),
    "wgmma: leading and stride offset exchanged": (
        _WGMMA + "mn_a_mn",
        function(warpgroup, "_mn_major", _offsets_exchanged),
        (triton.test_a_matmul_of_sm90, "fp16", 1, 0),
    ),
    "wgmma: no fence": ("wgmma_fence", body("wgmma_fence", _nothing), _SM90),
    "wgmma: no group is made": (
        "wgmma_commit_group",
        body("wgmma_commit_group", _nothing),
        _SM90,
    ),
    "no wait for products": (
        "wgmma_wait_group_0",
        text(r"wgmma\.wait_group\.sync\.aligned\s+0;", ""),
        _SM90,
    ),
    "the generic proxy's stores stay unseen": (
        "fence_proxy_async",
        body("fence_proxy_async", _nothing),
        _SM90,
    ),
    "tensor maps: no swizzle": (
        "cp_async_bulk_tensor_2d",
        function(tensor_maps, "swizzled", _same),
        _MAPS,
    ),
    "stored one row farther": (
        "cp_async_bulk_tensor_2d_store",
        body("cp_async_bulk_tensor_2d_store", _shifted),
        _MAPS,
    ),
    **{
        f"{rank}-D: loaded one row farther": (
            f"cp_async_bulk_tensor_{rank}d",
            body(f"cp_async_bulk_tensor_{rank}d", _loaded_shifted),
            (triton.test_tiles_of_several_dimensions, *triton.TILES[rank - 3]),
        )
        for rank in (3, 4, 5)
    },
    **{
        f"{rank}-D: stored one row farther": (
            f"cp_async_bulk_tensor_{rank}d_store",
            body(f"cp_async_bulk_tensor_{rank}d_store", _shifted),
            (triton.test_tiles_of_several_dimensions, *triton.TILES[rank - 3]),
        )
        for rank in (3, 4, 5)
    },
    "bulk stores: no group is made": (
        "cp_async_bulk_commit_group",
        body("cp_async_bulk_commit_group", _nothing),
        _MAPS,
    ),
    "one arrival too many is expected": (
        "mbarrier_init",
        body("mbarrier_init", _one_more),
        _MAPS,
    ),
    "half of the bytes are expected": (
        "mbarrier_arrive_expect_tx",
        body("mbarrier_arrive_expect_tx", _half),
        _MAPS,
    ),
    "does not wait": (
        "mbarrier_wait_parity",
        function(BulkCopies, "test", _never),
        _MAPS,
    ),
    "all lanes are elected": ("elect_sync", body("elect_sync", _all_elected), _MAPS),
    **{
        f"{type_}, halves exchanged": (
            f"cvt_rn_satfinite_{type_}x2_f32",
            text(rf"(cvt\.rn\.satfinite\.{type_}x2\.f32\s+%\w+, )(%\w+), (%\w+)", r"\1\3, \2"),
            (triton.test_conversions_of_fp8, name, True),
        )
        for type_, name in (("e4m3", "fp8e4nv"), ("e5m2", "fp8e5"))
    },
    **{
        f"{type_} is read as {other}": (
            f"cvt_rn_f16x2_{type_}x2",
            text(rf"cvt\.rn\.f16x2\.{type_}x2", f"cvt.rn.f16x2.{other}x2"),
            (triton.test_conversions_of_fp8, name, False),
        )
        for type_, other, name in (("e4m3", "e5m2", "fp8e4nv"), ("e5m2", "e4m3", "fp8e5"))
    },
    "minus x": (
        "ex2_approx_ftz_f32",
        text(r"ex2\.approx\.ftz\.f32", "neg.f32"),
        _SM80,
    ),
    "min for max": ("max_f32", text(r"max\.f32", "min.f32"), _SM80),
    "max for min": ("min_f32", text(r"min\.f32", "max.f32"), _SCALARS),
    "a sum": ("mul_rn_f32", text(r"mul\.f32", "add.f32"), _SCALARS),
    "an fma adds its factors": (
        "fma_rn_f32",
        text(r"(fma\.rn\.f32\s+%\w+), (%\w+), ([^,;]+), ([^;]+);", r"\1, \2, \4, \3;"),
        _SM80,
    ),
    # To exchange a and b is not noticed: it does the same to both factors' order of k.
    "every byte is the first of a": (
        "prmt_b32",
        text(r"(prmt\.b32\s+%\w+, %\w+, %\w+), \w+;", r"\1, 0;"),
        (triton.test_fp8_of_sm89,),
    ),
    "f16x2, halves exchanged": (
        "cvt_rn_f16x2_f32",
        text(r"(cvt\.rn\.f16x2\.f32\s+%\w+, )(%\w+), (%\w+)", r"\1\3, \2"),
        _SCALARS,
    ),
    "bf16x2, halves exchanged": (
        "cvt_rn_bf16x2_f32",
        text(r"(cvt\.rn\.bf16x2\.f32\s+%\w+, )(%\w+), (%\w+)", r"\1\3, \2"),
        _SCALARS,
    ),
    "float16 read as bfloat16": (
        "cvt_f32_f16",
        text(r"cvt\.f32\.f16", "cvt.f32.bf16"),
        _SCALARS,
    ),
    "the bfloat16 nearest": (
        "cvt_rn_f16_f32",
        text(r"cvt\.rn\.f16\.f32", "cvt.rn.bf16.f32"),
        (triton.test_scalars, 128),
    ),
    # Triton types loads and stores by their size: what it says of one, it says of the other.
    **{
        f"{name}_{type_}: registers exchanged": (
            f"{name}_{type_}",
            exchanged(f"{name.replace('_', '.')}.b32"),
            noticed,
        )
        for name, types, noticed in (
            ("ld_global_v4", ("u32", "f32"), _SCALARS),
            ("st_global_v4", ("u32", "f32"), _SCALARS),
            ("st_global_v2", ("u32", "f32"), _SCALARS),
            ("ld_shared_v4", ("f32",), (triton.test_a_matmul_of_sm80, *_FLOAT16)),
            ("ld_shared_v2", ("f32",), (triton.test_sizes_of_wgmma, 16)),
            ("st_shared_v4", ("u32", "f32"), (triton.test_a_matmul_of_sm80, *_FLOAT16)),
        )
        for type_ in types
    },
    "a word farther is read": (
        "ld_shared_u32",
        text(r"(ld\.shared\.b32\s+%\w+, \[%\w+)\]", r"\1+4]"),
        _SM80,
    ),
    "wgmma: one group more is left": ("wgmma_wait_group_1", _one_group_fewer(1), _GROUPS),
    **{
        f"{name}: rows in reverse": (name, rows_exchanged(name), row)
        for name, row in _PRODUCTS.items()
    },
    # Moves
    "the thread is the block": ("mov_tid_x", text("%tid\\.x", "%ctaid.x"), _PLACES),
    "the block is the thread": ("mov_ctaid_x", text("%ctaid\\.x", "%tid.x"), _PLACES),
    "the blocks are the threads": ("mov_nctaid_x", text("%nctaid\\.x", "%ntid.x"), _PLACES),
    "halves exchanged": (
        "mov_b32_halves",
        text(r"(mov\.b32\s+%\w+, \{)(%\w+), (%\w+)\}", r"\1\3, \2}"),
        _SCALARS,
    ),
    "an address 1024 bytes farther": (
        "mov_shared_address",
        text(r"(mov\.b32\s+%\w+, global_smem);", r"\1+1024;"),
        _SM80,
    ),
    "a and b exchanged": (
        "lop3_select_b32",
        text(r"(lop3\.b32\s+%\w+), (%?\w+), (%?\w+), (%?\w+),", r"\1, \4, \3, \2,"),
        (triton.test_fp8_of_a_format_of_triton,),
    ),
}

record = witnesses.recorder(triton.__name__, WRONG)


@pytest.mark.parametrize("meaning", WRONG)
def test_a_wrong_meaning_is_noticed(meaning, monkeypatch):
    witnesses.check_noticed(meaning, WRONG[meaning], monkeypatch)
