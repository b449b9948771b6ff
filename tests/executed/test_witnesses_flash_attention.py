"""FlashAttention-4's kernels for Hopper, run by the executor against float64.

CuTe compiles them without a GPU, in a process of its own. They are witnesses: see `witnesses`.

Opt-in: NUMFLASH_TEST_PEERS=1, with `flash-attn-4` and its torch installed (some 5 GB on disk).
"""

import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from numflash.problem.tensor_maps import TensorLayout
from numflash.simulator import SimulatedTensorMap, tensor_maps
from tests.executed import witnesses
from tests.executed.conftest import normal
from tests.executed.witnesses import body, function, rows_exchanged, text

witnesses.need(
    flash_attn="--no-deps flash-attn-4 quack-kernels einops apache-tvm-ffi",
    cutlass="nvidia-cutlass-dsl",
    torch="torch",
)

_WORKER = Path(__file__).with_name("flash_attention_kernels.py")
_TYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_SHARED_BYTES = 227 * 1024
# Of the machine, for the order of tiles: `SingleTileLPTScheduler.Params.create`.
_L2_BYTES = 50 * 1024 * 1024
witness = witnesses.witness("FlashAttention-4", "flash-attn-4")


def compiled(head_dim, causal, dtype, backward=False) -> dict:
    """What `flash_attention_kernels.compiled` answers, in a process of its own."""
    request = dict(head_dim=head_dim, causal=causal, dtype=dtype, backward=backward)
    return witnesses.answer(_WORKER, "flash-attn-4", **request)


def words(*numbers: int) -> bytes:
    """32-bit integers, one behind the other."""
    return np.array(numbers, np.int32).tobytes()


def tensor(array: np.ndarray, *axes: int) -> tuple:
    """A CuTe tensor of an array with its axes in this order; a stride of 1 is not stored."""
    shape = [array.shape[i] for i in axes]
    strides = [array.strides[i] // array.itemsize for i in axes]
    wide = np.array([stride for stride in strides if stride != 1], np.int64)
    return array, words(*shape, *[0] * (len(shape) % 2)), wide.tobytes()


def tensor_map(array: np.ndarray, rows: int) -> SimulatedTensorMap:
    """Of (1, seqlen, heads, head_dim) as {head_dim, seqlen, heads, batch}."""
    by_batch, by_row, by_head, _ = array.strides
    batch, n, heads, head_dim = array.shape
    extents, strides = (head_dim, n, heads, batch), (by_row, by_head, by_batch)
    layout = TensorLayout(array.dtype.name, extents, strides, (64, rows, 1, 1))
    return SimulatedTensorMap(array, layout)


def divisor(d: int) -> list:
    """How CuTe passes a number to divide by: the factor and shifts of the fast way, and itself."""
    bits = (d - 1).bit_length()
    factor = ((1 << 32) * ((1 << bits) - d)) // d + 1
    shifts = bytes([min(bits, 1), max(bits - 1, 0), 0, 0])
    return [np.array([d, factor & 0xFFFFFFFF], np.uint32).tobytes() + shifts, d]


def one_tile_each(blocks: int, heads: int) -> list:
    """`SingleTileScheduler.Params`: blocks, heads, batch, splits."""
    return [blocks, heads, 1, *divisor(1)]


def longest_first(blocks: int, heads: int, n: int, head_dim: int) -> list:
    """`SingleTileLPTScheduler.Params`."""
    fitting = _L2_BYTES // (n * 2 * head_dim * 2)
    section = 1 << fitting.bit_length() - 1
    sections, rest = divmod(heads, section)
    return [
        *(blocks * heads, blocks, heads, 1, section),
        *(*divisor(heads), *divisor(section), *divisor(section * blocks)),
        *(*divisor(max(rest, 1)), sections, *divisor(1)),
    ]


def inputs(n: int, heads: int, head_dim: int, dtype: str, count: int) -> list[np.ndarray]:
    """Arrays of shape (1, n, heads, head_dim)."""
    return [normal((1, n, heads, head_dim), _TYPES[dtype], seed) for seed in range(count)]


def by_heads(array: np.ndarray) -> np.ndarray:
    """(heads, n, head_dim)."""
    return array[0].transpose(1, 0, 2)


@pytest.mark.parametrize(
    "head_dim, causal, dtype, n, heads",
    [
        (64, False, "float16", 200, 1),
        (64, True, "bfloat16", 200, 2),
        (128, True, "float16", 300, 2),
        (128, False, "bfloat16", 150, 1),
    ],
)
@witness
def test_a_forward_of_flash_attention_4(head_dim, causal, dtype, n, heads):
    kernel = compiled(head_dim, causal, dtype)
    q, k, v = inputs(n, heads, head_dim, dtype, 3)
    out, lse = np.full_like(q, np.nan), np.full((1, heads, n), np.nan, np.float32)
    rows, keys = kernel["tiles"]
    blocks = -(-n // rows)
    order = longest_first(blocks, heads, n, head_dim) if causal else one_tile_each(blocks, heads)
    arguments = [
        *[words(n, head_dim, heads, 1)] * 4,
        tensor(lse, 2, 1, 0),
        *(tensor_map(x, size) for x, size in ((q, rows), (k, keys), (v, keys), (out, rows))),
        math.log2(math.e) / head_dim**0.5,
        *(0, 0),  # the state of two products
        *order,
    ]
    grid = (blocks * heads,) if causal else (blocks, heads)
    threads = 128 * (1 + rows // 64)
    opcodes = witnesses.run(kernel["forward"], None, grid, threads, arguments, _SHARED_BYTES)
    exact, exact_lse, _ = witnesses.float64_attention(*map(by_heads, (q, k, v)), causal)
    error = {"float16": 2e-3, "bfloat16": 1.2e-2}[dtype]
    np.testing.assert_allclose(by_heads(out).astype(np.float64), exact, atol=error)
    np.testing.assert_allclose(lse[0], exact_lse, atol=2e-6)
    for used in ("wgmma.mma_async", "setmaxnreg.dec", "bar.arrive", "mbarrier.arrive.shared"):
        assert any(opcode.startswith(used) for opcode in opcodes), used


@pytest.mark.parametrize(
    "head_dim, causal, dtype, n, heads",
    [
        (64, False, "float16", 200, 1),
        (128, True, "bfloat16", 200, 2),
        (128, False, "float16", 150, 1),
    ],
)
@witness
def test_a_backward_of_flash_attention_4(head_dim, causal, dtype, n, heads):
    kernel = compiled(head_dim, causal, dtype, backward=True)
    q, k, v, dout = inputs(n, heads, head_dim, dtype, 4)
    exact, lse, gradients = witnesses.float64_attention(
        *map(by_heads, (q, k, v)), causal, by_heads(dout)
    )
    out = np.ascontiguousarray(exact.transpose(1, 0, 2)[None]).astype(q.dtype)
    lse = lse[None].astype(np.float32)
    rows, keys = kernel["tiles"]
    row_blocks, key_blocks = -(-n // rows), -(-n // keys)
    padded = row_blocks * rows
    dpsum, lse_log2 = (np.full((1, heads, padded), np.nan, np.float32) for _ in range(2))
    # Of each tile, in an order of its own.
    sums = np.full((1, heads, padded * head_dim), np.nan, np.float32)
    scale, log2_e = head_dim**-0.5, math.log2(math.e)
    opcodes = witnesses.run(
        kernel["preprocess"],
        None,
        (row_blocks, heads),
        256,
        [
            *(tensor(x, 1, 3, 2, 0) for x in (out, dout)),
            *(tensor(x, 2, 1, 0) for x in (dpsum, lse, lse_log2, sums)),
            log2_e,
            *one_tile_each(row_blocks, heads),
        ],
        0,
    )
    np.testing.assert_array_equal(sums, 0)
    dq, dk, dv = (np.full_like(x, np.nan) for x in (q, k, v))
    tiles = ((q, rows), (k, keys), (v, keys), (dout, rows), (dk, keys), (dv, keys))
    opcodes |= witnesses.run(
        kernel["main"],
        None,
        (key_blocks, heads),
        384,
        [
            *[words(n, head_dim, heads, 1)] * 6,
            *(tensor_map(x, size) for x, size in tiles),
            *(tensor(x, 2, 1, 0) for x in (lse_log2, dpsum, sums)),
            *(0, 0, 0, 0),  # the state of four products
            *(log2_e * scale, scale),
            *one_tile_each(key_blocks, heads),
        ],
        _SHARED_BYTES,
    )
    opcodes |= witnesses.run(
        kernel["postprocess"],
        None,
        (row_blocks, heads),
        256,
        [
            tensor(sums, 0, 1, 2),
            tensor(dq, 0, 1, 2, 3),
            scale,
            0,
            *one_tile_each(row_blocks, heads),
        ],
        _SHARED_BYTES,
    )
    error = {"float16": 3e-3, "bfloat16": 2.5e-2}[dtype]
    for name, found, right in zip("qkv", (dq, dk, dv), gradients, strict=True):
        found = by_heads(found).astype(np.float64)
        np.testing.assert_allclose(found, right, atol=error, err_msg=f"d{name}")
    for used in ("cp.reduce.async.bulk", "stmatrix", "cp.async.bulk.shared::cluster.global"):
        assert any(opcode.startswith(used) for opcode in opcodes), used


def _nothing(right):
    return lambda *given: None


def _shifted(right):
    """Of a bulk load: one row farther."""
    return lambda *given: right(*given[:7], given[7] + 1, *given[8:])


def _stored_shifted(right):
    return lambda tensor_map, c0, c1, *rest: right(tensor_map, c0, c1 + 1, *rest)


_FORWARD = (test_a_forward_of_flash_attention_4, 64, False, "float16", 100, 1)
_CAUSAL = (test_a_forward_of_flash_attention_4, 64, True, "bfloat16", 100, 1)
_WIDE = (test_a_forward_of_flash_attention_4, 128, True, "float16", 100, 1)
_WIDE_BF16 = (test_a_forward_of_flash_attention_4, 128, False, "bfloat16", 100, 1)
_BACKWARD = (test_a_backward_of_flash_attention_4, 64, False, "float16", 150, 1)
_BACKWARD_BF16 = (test_a_backward_of_flash_attention_4, 128, True, "bfloat16", 100, 1)
_BACKWARD_80 = (test_a_backward_of_flash_attention_4, 128, False, "float16", 100, 1)
_PRODUCTS = {
    "wgmma_m64n128k16_f16_a_shared_b_k": _FORWARD,
    "wgmma_m64n64k16_f16_a_registers_b_mn": _FORWARD,
    "wgmma_m64n128k16_bf16_a_shared_b_k": _CAUSAL,
    "wgmma_m64n64k16_bf16_a_registers_b_mn": _CAUSAL,
    "wgmma_m64n128k16_f16_a_registers_b_mn": _WIDE,
    "wgmma_m64n128k16_bf16_a_registers_b_mn": _WIDE_BF16,
    "wgmma_m64n64k16_f16_a_shared_b_mn": _BACKWARD,
    "wgmma_m64n64k16_bf16_a_shared_b_k": _BACKWARD_BF16,
    "wgmma_m64n64k16_bf16_a_shared_b_mn": _BACKWARD_BF16,
    "wgmma_m64n80k16_f16_a_shared_b_k": _BACKWARD_80,
    "wgmma_m64n80k16_f16_a_shared_b_k_a_mn": _BACKWARD_80,
}
WRONG = {
    **{
        f"{name} of FlashAttention-4: rows in reverse": (name, rows_exchanged(name), row)
        for name, row in _PRODUCTS.items()
    },
    "nobody arrives": ("mbarrier_arrive", body("mbarrier_arrive", _nothing), _FORWARD),
    "nobody arrives at a named barrier": (
        "bar_arrive",
        text(r"bar\.arrive\s+[^;]*;", ""),
        _FORWARD,
    ),
    "copies see no mbarrier": (
        "fence_mbarrier_init",
        body("fence_mbarrier_init", _nothing),
        _FORWARD,
    ),
    "no register is given back": (
        "setmaxnreg_dec",
        text(r"setmaxnreg\.dec[^;]*;", ""),
        _FORWARD,
    ),
    "registers are taken away": (
        "setmaxnreg_inc",
        text(r"setmaxnreg\.inc", "setmaxnreg.dec"),
        _FORWARD,
    ),
    "4-D of FlashAttention-4: loaded one row farther": (
        "cp_async_bulk_tensor_4d",
        body("cp_async_bulk_tensor_4d", _shifted),
        _FORWARD,
    ),
    "4-D of FlashAttention-4: stored one row farther": (
        "cp_async_bulk_tensor_4d_store",
        body("cp_async_bulk_tensor_4d_store", _stored_shifted),
        _FORWARD,
    ),
    "4-D of FlashAttention-4: no swizzle": (
        "cp_async_bulk_tensor_4d",
        function(tensor_maps, "swizzled", lambda right: lambda chunks, n: chunks),
        _FORWARD,
    ),
    "a bulk reduction does not add": (
        "cp_reduce_async_bulk_add_f32",
        text(
            r"cp\.reduce\.async\.bulk\.global\.shared::cta\.bulk_group\.add\.f32",
            "cp.async.bulk.global.shared::cta.bulk_group",
        ),
        _BACKWARD,
    ),
    "a bulk copy begins 16 bytes farther": (
        "cp_async_bulk",
        text(r"(bytes \[%\w+\], \[%\w+)(\], %\w+, \[)", r"\1+16\2"),
        _BACKWARD,
    ),
    "stored as it is": (
        "stmatrix_x4_trans",
        text(r"(stmatrix\.sync\.aligned\.m8n8\.x4)\.trans", r"\1"),
        _BACKWARD,
    ),
}
record = witnesses.recorder(__name__, WRONG)


@pytest.mark.parametrize("meaning", WRONG)
def test_flash_attention_4_notices_a_wrong_meaning(meaning, monkeypatch):
    witnesses.check_noticed(meaning, WRONG[meaning], monkeypatch)
