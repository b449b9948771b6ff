"""CuTe's layouts and copies, in kernels that we write: the executor must run them rightly.

CuTe compiles them without a GPU, in a process of its own, and says how operands lie in shared
memory, what a descriptor holds, and which lane has which element. They are witnesses: see
`witnesses`.

Opt-in: NUMFLASH_TEST_PEERS=1, with `nvidia-cutlass-dsl` installed (some 400 MB on disk).
"""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from numflash.problem.tensor_maps import TensorLayout
from numflash.simulator import SimulatedTensorMap, tensor_maps, warpgroup
from tests.executed import witnesses
from tests.executed.conftest import normal
from tests.executed.witnesses import body, function, rows_exchanged, text

witnesses.need(cutlass="nvidia-cutlass-dsl")

_WORKER = Path(__file__).with_name("cute_kernels.py")
_TYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
}
witness = witnesses.witness("CuTe", "nvidia-cutlass-dsl")


def compiled(kernel: str, **parameters) -> str:
    """The PTX of `cute_kernels.compiled`, made in a process of its own."""
    return witnesses.answer(_WORKER, "nvidia-cutlass-dsl", kernel=kernel, **parameters)["ptx"]


def run(ptx: str, threads: int, *arguments) -> set[str]:
    """Run a kernel of one block; the opcodes that were executed."""
    return witnesses.run(ptx, None, 1, threads, arguments, 64 * 1024)


def multiplied(dtype, n, k, a_kind, b_kind, a_order=(0, 1), b_order=(0, 1)) -> set[str]:
    """Check a product of `cute_kernels.Product`; the opcodes."""
    ptx = compiled(
        "Product",
        **dict(dtype=dtype, n=n, k=k, a_kind=a_kind, b_kind=b_kind),
        **dict(a_order=a_order, b_order=b_order),
    )
    a, b = normal((64, k), _TYPES[dtype], 1), normal((n, k), _TYPES[dtype], 2)
    d = np.full((64, n), np.nan, np.float32)
    opcodes = run(ptx, 128, a, b, d, 0)  # 0: the state of the product
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    np.testing.assert_allclose(d, exact, atol=1e-4)
    return opcodes


_K = ("K_SW128", "K_SW64", "K_SW32", "K_INTER")
_MN = ("MN_SW128", "MN_SW64", "MN_SW32", "MN_INTER")


@pytest.mark.parametrize("kind", _K)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@witness
def test_k_major_operands(kind, order):
    """The stride offset is 8 rows of 128, 64, 32 or 16 bytes; in order (1, 0) a multiple of it."""
    multiplied("float16", 40, 128, kind, kind, order, order)


@pytest.mark.parametrize("kind", _MN)
@witness
def test_mn_major_operands(kind):
    multiplied("bfloat16", 192, 32, kind, kind, (0, 1), (1, 0))


@pytest.mark.parametrize("kind", _K)
@witness
def test_operands_of_e4m3(kind):
    multiplied("e4m3", 24, 128, kind, kind, (1, 0), (0, 1))


@pytest.mark.parametrize("dtype, n", [("float16", 48), ("bfloat16", 104), ("e4m3", 56)])
@witness
def test_a_in_registers(dtype, n):
    multiplied(dtype, n, 128, None, "K_SW128")


@pytest.mark.parametrize("n", [8, 80, 160, 176])
@witness
def test_sizes_of_products(n):
    multiplied("float16", n, 64, "K_SW128", "K_SW128")


# Type, bits of the swizzle, tile, its number, tensor. Enough rows lie inside to tell a swizzle
# from the others.
TILES = [
    ("float16", 3, (2, 8, 64), (1, 1, 1), (4, 20, 104)),
    ("float16", 2, (2, 8, 32), (1, 1, 1), (3, 20, 64)),
    ("bfloat16", 1, (32, 16), (1, 2), (70, 40)),
    ("float16", 3, (1, 2, 2, 4, 64), (1, 0, 1, 1, 1), (2, 2, 5, 8, 104)),
]


@pytest.mark.parametrize("dtype, bits, tile, number, shape", TILES)
@witness
def test_tiles_of_tensor_maps(dtype, bits, tile, number, shape):
    """Every element is read where CuTe says it is; what lies outside the tensor is 0."""
    ptx = compiled("Tile", dtype=dtype, bits=bits, tile=tile, first=number, shape=shape)
    x, y = normal(shape, _TYPES[dtype], 1), np.full(shape, -1, _TYPES[dtype])
    seen = np.full(tile, -1, _TYPES[dtype])
    maps = [
        SimulatedTensorMap(
            array,
            TensorLayout(
                dtype, shape[::-1], array.strides[-2::-1], tile[::-1], swizzle_bytes=swizzle
            ),
        )
        for array, swizzle in ((x, 16 << bits), (y, 0))
    ]
    opcodes = run(ptx, 128, *maps, seen.reshape(-1))
    first = [i * n for i, n in zip(number, tile, strict=True)]
    where = tuple(slice(i, i + n) for i, n in zip(first, tile, strict=True))
    inside = x[where]
    expected = np.zeros_like(seen)
    expected[tuple(slice(n) for n in inside.shape)] = inside
    np.testing.assert_array_equal(seen, expected)
    stored = np.full_like(y, -1)
    stored[where] = inside
    np.testing.assert_array_equal(y, stored)
    for direction in ("shared", "global"):
        name = f"cp.async.bulk.tensor.{len(tile)}d.{direction}"
        assert any(opcode.startswith(name) for opcode in opcodes)


@pytest.mark.parametrize("dtype, step", [("float16", 8), ("float16", 16), ("bfloat16", 16)])
@witness
def test_products_of_a_warp(dtype, step):
    ptx = compiled("WarpProduct", arch="sm_80", dtype=dtype, k=32, step=step)
    a, b = normal((16, 32), _TYPES[dtype], 1), normal((8, 32), _TYPES[dtype], 2)
    d = np.full((16, 8), np.nan, np.float32)
    opcodes = run(ptx, 32, a, b, d)
    np.testing.assert_allclose(d, a.astype(np.float64) @ b.astype(np.float64).T, atol=1e-4)
    assert any(f"m16n8k{step}." in opcode for opcode in opcodes)


@witness
def test_single_elements():
    ptx = compiled("Scalars")
    x, halves = normal(128, np.float32, 1), normal(1024, np.float16, 2)
    x[:64] = (x[:64].view(np.uint32) & 0xFFFFE000 | 0x1000).view(np.float32)  # ties
    y = np.arange(128, dtype=np.int32)
    turned, words = np.zeros(128, np.float32), np.zeros(128, np.int32)
    squares, cut = np.zeros(1024, np.float16), np.zeros(128, np.int32)
    run(ptx, 128, x, y, halves, turned, words, squares, cut)
    np.testing.assert_array_equal(turned, 2 * x[::-1])
    np.testing.assert_array_equal(words, y[::-1] + 1)
    np.testing.assert_array_equal(squares, (halves.astype(np.float64) ** 2).astype(np.float16))
    # To 11 bits, ties away from zero.
    fraction, exponent = np.frexp(x.astype(np.float64))
    nearest = np.copysign(np.floor(np.abs(fraction) * 2**11 + 0.5), fraction) * 2.0**-11
    np.testing.assert_array_equal(cut.view(np.float32), np.ldexp(nearest, exponent))


def _registers_exchanged(a_index):
    """Of a in registers: the second and the third."""

    def wrong(per_register):
        rows, columns = a_index(per_register)
        return rows[:, [0, 2, 1, 3]], columns[:, [0, 2, 1, 3]]

    return wrong


def _only(right: int, wrong: int):
    """A swizzle of `right` bytes is one of `wrong`."""
    return lambda swizzled: lambda chunks, n: swizzled(chunks, wrong if n == right else n)


_SINGLE, _TURNED = (test_single_elements,), (test_k_major_operands, "K_SW128", (1, 0))
_ANY_K = "wgmma_m64n40k16_f16_a_shared_b_k"
_PRODUCTS = {
    **{
        f"wgmma_m64n{n}k16_f16_a_shared_b_k": (test_sizes_of_products, n)
        for n in (8, 80, 160, 176)
    },
    "wgmma_m64n40k16_f16_a_shared_b_k": (test_k_major_operands, "K_SW64", (0, 1)),
    "wgmma_m64n192k16_bf16_a_shared_b_mn_a_mn": (test_mn_major_operands, "MN_SW64"),
    "wgmma_m64n24k32_e4m3_a_shared_b_k": (test_operands_of_e4m3, "K_SW32"),
    "wgmma_m64n48k16_f16_a_registers_b_k": (test_a_in_registers, "float16", 48),
    "wgmma_m64n104k16_bf16_a_registers_b_k": (test_a_in_registers, "bfloat16", 104),
    "wgmma_m64n56k32_e4m3_a_registers_b_k": (test_a_in_registers, "e4m3", 56),
}
WRONG = {
    **{
        f"{name}: rows in reverse": (name, rows_exchanged(name), row)
        for name, row in _PRODUCTS.items()
    },
    **{
        f"{name}: registers of a exchanged": (
            name,
            function(warpgroup, "_a_index", _registers_exchanged),
            row,
        )
        for name, row in _PRODUCTS.items()
        if "registers" in name
    },
    "K-major: every stride is 1024 bytes": (
        _ANY_K,
        function(warpgroup, "_k_major", lambda right: lambda *given: right(*given[:3], 64)),
        _TURNED,
    ),
    "K-major, no swizzle: every leading offset is 128 bytes": (
        _ANY_K,
        function(
            warpgroup, "_k_major", lambda right: lambda n, bits, _, to: right(n, bits, 8, to)
        ),
        (test_k_major_operands, "K_INTER", (0, 1)),
    ),
    "MN-major, no swizzle: leading and stride offset exchanged": (
        "wgmma_m64n192k16_bf16_a_shared_b_mn_a_mn",
        function(warpgroup, "_mn_major", lambda right: lambda n, bits, x, y: right(n, bits, y, x)),
        (test_mn_major_operands, "MN_INTER"),
    ),
    **{
        f"wgmma: a swizzle of {right} bytes is one of {wrong}": (
            _ANY_K,
            function(warpgroup, "swizzled", _only(right, wrong)),
            (test_k_major_operands, f"K_SW{right}", (0, 1)),
        )
        for right, wrong in ((128, 64), (64, 128), (32, 64))
    },
    **{
        f"{len(tile[2])}-D: a swizzle of {right} bytes is one of {wrong}": (
            f"cp_async_bulk_tensor_{len(tile[2])}d",
            function(tensor_maps, "swizzled", _only(right, wrong)),
            (test_tiles_of_tensor_maps, *tile),
        )
        for right, wrong, tile in (
            (64, 32, TILES[1]),
            (32, 64, TILES[2]),
            (128, 64, TILES[3]),
        )
    },
    **{
        f"{name}: 0 where a loop begins": (
            name,
            text(r"(mov\.b32\s+%r\w+), %r\w+;", r"\1, 0;"),
            _TURNED,
        )
        for name in ("float_as_bits", "bits_as_float")
    },
    "f16, k = 8: registers of a exchanged": (
        "mma_m16n8k8_f16",
        body("mma_m16n8k8_f16", lambda right: lambda d, a, b: right(d, a[:, ::-1], b)),
        (test_products_of_a_warp, "float16", 8),
    ),
    **{
        f"{array} is stored a word farther": (
            name,
            text(rf"(st\.shared\.b32\s+\[%\w+){at}\]", rf"\1+{4 + offset}]"),
            _SINGLE,
        )
        for name, array, at, offset in (
            ("st_shared_f32", "a float", "", 0),
            ("st_shared_u32", "an integer", r"\+512", 512),
        )
    },
    "f16x2: a sum": ("mul_rn_f16x2", text(r"mul\.f16x2", "add.f16x2"), _SINGLE),
    "tf32 is not rounded": (
        "cvt_rna_tf32_f32",
        text(r"cvt\.rna\.tf32\.f32", "mov.b32"),
        _SINGLE,
    ),
    "nobody waits for bulk stores to read": (
        "cp_async_bulk_wait_group_read",
        text(r"cp\.async\.bulk\.wait_group\.read\s+0;", ""),
        (test_tiles_of_tensor_maps, *TILES[0]),
    ),
}
record = witnesses.recorder(__name__, WRONG)


@pytest.mark.parametrize("meaning", WRONG)
def test_cute_notices_a_wrong_meaning(meaning, monkeypatch):
    witnesses.check_noticed(meaning, WRONG[meaning], monkeypatch)
