"""Triton's kernels: the executor must run them rightly.

Triton compiles them without a GPU, in a process of its own. They are witnesses: see `witnesses`.

Opt-in: NUMFLASH_TEST_PEERS=1, with `triton` installed (some 290 MB to load, 1 GB on disk).
"""

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from numflash.problem.tensor_maps import TensorLayout
from numflash.simulator import SimulatedTensorMap, SimulationError
from tests.executed import witnesses
from tests.executed.conftest import normal

witnesses.need(triton="triton")

_WORKER = Path(__file__).with_name("triton_kernels.py")
_SIZES = {"M": "i32", "N": "i32", "K": "i32"}
_TYPES = {
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp32": np.dtype(np.float32),
    "fp8e4nv": np.dtype(ml_dtypes.float8_e4m3fn),
    "fp8e5": np.dtype(ml_dtypes.float8_e5m2),
}
# Triton sets no fence between `mbarrier.init` and copies; we want one.
_FENCES = {r"(mbarrier\.init[^;]*;)": r"\1 fence.mbarrier_init.release.cluster;"}
_TRANSPOSES = [(0, 0), (0, 1), (1, 0), (1, 1)]

witness = witnesses.witness("Triton", "triton")
record = witnesses.recorder(__name__)


def compiled(kernel: str, target: int, signature: dict, constants: dict, **options) -> dict:
    """What `triton_kernels.compiled` answers, in a process of its own."""
    request = dict(
        kernel=kernel, target=target, signature=signature, constants=constants, **options
    )
    return witnesses.answer(_WORKER, "triton", **request)


def run(kernel: dict, grid, *arguments, fenced: bool = True) -> set[str]:
    """Run a compiled kernel; the opcodes that were executed."""
    # Triton appends pointers to scratch memory, which these kernels have none of.
    scratch = [None, None]
    ptx = kernel["ptx"]
    if ".target sm_90" in ptx and fenced:
        for before, after in _FENCES.items():
            ptx = re.sub(before, after, ptx)
    return witnesses.run(
        ptx,
        kernel["entry"],
        grid,
        kernel["threads"],
        [*arguments, *scratch],
        kernel["shared_bytes"],
    )


def multiplied(target, type_, ta, tb, sizes, tile, out="fp32", **options):
    """(opcodes, c, float64 of a b) of Triton's `matmul` of M, N, K in tiles."""
    m, n, k = sizes
    kernel = compiled(
        "matmul",
        target,
        {"a": f"*{type_}", "b": f"*{type_}", "c": f"*{out}", **_SIZES},
        {"TA": ta, "TB": tb, **dict(zip(("BM", "BN", "BK"), tile, strict=True))},
        **options,
    )
    a, b = normal((m, k), _TYPES[type_], 1), normal((k, n), _TYPES[type_], 2)
    c = np.full((m, n), np.nan, _TYPES[out])
    memory = [np.ascontiguousarray(x.T) if flag else x for x, flag in ((a, ta), (b, tb))]
    opcodes = run(kernel, (m // tile[0], n // tile[1]), *memory, c, m, n, k)
    a, b = (cut_to_tf32(x).astype(np.float64) for x in (a, b))
    return opcodes, c.astype(np.float64), a @ b


def cut_to_tf32(x: np.ndarray) -> np.ndarray:
    """What a product of tf32 sees of float32: Triton does not round."""
    if x.dtype != np.float32:
        return x
    return (x.view(np.uint32) & 0xFFFFE000).view(np.float32)


@witness
def test_vectors_are_added():
    kernel = compiled("add", 80, dict(x="*fp32", y="*fp32", z="*fp32", n="i32"), {"BLOCK": 256})
    x, y = normal(1000, np.float32, 1), normal(1000, np.float32, 2)
    z = np.full(1000, np.nan, np.float32)
    run(kernel, 4, x, y, z, 1000)
    np.testing.assert_array_equal(z, x + y)


@witness
def test_places():
    kernel = compiled("places", 80, {"z": "*i32"}, {"BLOCK": 128})
    z = np.zeros(3 * 128, np.int32)
    run(kernel, 3, z)
    np.testing.assert_array_equal(z, 3000 + np.arange(3).repeat(128))


@pytest.mark.parametrize("ta, tb", _TRANSPOSES)
@pytest.mark.parametrize("type_, mma", [("fp16", "f16"), ("bf16", "bf16"), ("fp32", "tf32")])
@witness
def test_a_matmul_of_sm80(type_, mma, ta, tb):
    opcodes, c, exact = multiplied(80, type_, ta, tb, (128, 64, 96), (64, 64, 32), stages=3)
    np.testing.assert_allclose(c, exact, atol=1e-4)
    k = 8 if mma == "tf32" else 16
    assert f"mma.sync.aligned.m16n8k{k}.row.col.f32.{mma}.{mma}.f32" in opcodes
    assert "cp.async.cg.shared.global" in opcodes
    transposes = ["", ".trans"] if mma != "tf32" else []
    used = {x for x in opcodes if x.startswith("ldmatrix")}
    needed = {transposes[ta], transposes[not tb]} if transposes else set()
    assert {f"ldmatrix.sync.aligned.m8n8.x4{x}.shared.b16" for x in needed} <= used


@pytest.mark.parametrize("ta, tb", _TRANSPOSES)
@pytest.mark.parametrize("type_", ["fp16", "bf16"])
@witness
def test_a_matmul_of_sm90(type_, ta, tb):
    opcodes, c, exact = multiplied(90, type_, ta, tb, (128, 128, 192), (64, 128, 64), stages=3)
    np.testing.assert_allclose(c, exact, atol=1e-4)
    name = type_.replace("fp", "f")
    assert f"wgmma.mma_async.sync.aligned.m64n128k16.f32.{name}.{name}" in opcodes


@witness
def test_fp8_of_sm89():
    opcodes, c, exact = multiplied(89, "fp8e4nv", 0, 1, (64, 64, 128), (64, 64, 64))
    np.testing.assert_allclose(c, exact, atol=1e-4)
    assert "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32" in opcodes


@witness
def test_fp8_of_sm90():
    opcodes, c, exact = multiplied(90, "fp8e4nv", 0, 1, (64, 128, 256), (64, 128, 128))
    np.testing.assert_allclose(c, exact, atol=1e-4)
    assert "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3" in opcodes


@witness
def test_tf32_of_sm90():
    opcodes, c, exact = multiplied(90, "fp32", 0, 1, (64, 64, 64), (64, 64, 32))
    np.testing.assert_allclose(c, exact, atol=1e-4)
    assert "wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32" in opcodes


@pytest.mark.parametrize("target, head_dim", [(80, 64), (90, 64)])
@witness
def test_attention(target, head_dim):
    signature = dict.fromkeys(("q", "k", "v", "out"), "*fp16")
    signature |= {"lse": "*fp32", "n": "i32", "scale_log2": "fp32"}
    kernel = compiled("attention", target, signature, {"D": head_dim, "BM": 64, "BN": 64})
    heads, n = 2, 150
    q, k, v = (normal((heads, n, head_dim), np.float16, seed) for seed in range(3))
    out, lse = np.full_like(q, np.nan), np.full((heads, n), np.nan, np.float32)
    opcodes = run(kernel, (3, heads), q, k, v, out, lse, n, np.log2(np.e) / head_dim**0.5)
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = q @ k.transpose(0, 2, 1) / head_dim**0.5
    weights = np.exp(scores) * np.tri(n)
    total = weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(out, weights / total @ v, atol=2e-3)
    np.testing.assert_allclose(lse, np.log(total[..., 0]), atol=1e-5)
    assert any(x.startswith("wgmma.mma" if target == 90 else "mma.sync") for x in opcodes)


@witness
def test_copies_of_four_bytes():
    """Pointers that are multiples of 4 only."""
    signature = {"a": "*fp32", "b": "*fp32", "c": "*fp32", **_SIZES}
    constants = {"TA": 0, "TB": 0, "BM": 64, "BN": 64, "BK": 32}
    kernel = compiled("matmul", 80, signature, constants, stages=3, aligned=False)
    a, b = (normal(64 * 65 + 1, np.float32, seed)[1:] for seed in (1, 2))
    a, b = a[: 64 * 64].reshape(64, 64), b[: 64 * 64].reshape(64, 64)
    c = np.full((64, 64), np.nan, np.float32)
    opcodes = run(kernel, (1, 1), a, b, c, 64, 64, 64)
    assert "cp.async.ca.shared.global" in opcodes
    exact = cut_to_tf32(a).astype(np.float64) @ cut_to_tf32(b).astype(np.float64)
    np.testing.assert_allclose(c, exact, atol=1e-4)


@pytest.mark.parametrize("stages", [2, 3, 4, 5, 6])
@witness
def test_copies_of_several_groups(stages):
    """All but the newest stages - 2 groups are waited for."""
    signature = {"a": "*fp16", "b": "*fp16", "c": "*fp32", "K": "i32"}
    kernel = compiled("kept", 80, signature, {"BM": 16, "BN": 32, "BK": 32}, stages=stages)
    a, b = normal((16, 32), np.float16, 1), normal((32 * 8, 32), np.float16, 2)
    c = np.full((16, 32), np.nan, np.float32)
    run(kernel, 1, a, b, c, len(b))
    exact = a.astype(np.float64) @ b.astype(np.float64).reshape(8, 32, 32).sum(0)
    np.testing.assert_allclose(c, exact, atol=1e-4)


@pytest.mark.parametrize("n", [16, 32, 256])
@witness
def test_sizes_of_wgmma(n):
    _, c, exact = multiplied(90, "fp16", 0, 0 if n > 32 else 1, (64, n, 128), (64, n, 64))
    np.testing.assert_allclose(c, exact, atol=1e-4)


@pytest.mark.parametrize("block", [128, 512])
@witness
def test_scalars(block):
    """One element in each lane, and four."""
    types = dict(x="fp32", y="fp32", low="fp32", halves="fp16", product="fp16", wide="fp32")
    types |= dict(narrow="fp16", brain="bf16")
    signature = {name: f"*{type_}" for name, type_ in types.items()}
    kernel = compiled("scalars", 80, {**signature, "chosen": "*i32", "n": "i32"}, {"BLOCK": block})
    n = 1000
    x, y = normal(n, np.float32, 1), normal(n, np.float32, 2)
    halves = normal(n, np.float16, 3)
    results = {name: np.zeros(n, _TYPES[types[name]]) for name in list(types)[2:]}
    results["halves"], results["chosen"] = halves, np.zeros(n, np.int32)
    run(kernel, -(-n // block), x, y, *results.values(), n)
    expected = {
        "low": np.where(x < y, x, y),
        "product": (halves.astype(np.float64) ** 2).astype(np.float16),
        "wide": (halves.astype(np.float64) * x).astype(np.float32),
        "narrow": x.astype(np.float64).astype(np.float16),
        "brain": y.astype(ml_dtypes.bfloat16),
        "chosen": x.view(np.int32) & 0x00FFFF00 | y.view(np.int32) & ~0x00FFFF00,
    }
    for name, right in expected.items():
        np.testing.assert_array_equal(results[name], right, err_msg=name)


def saturated(x: np.ndarray, dtype) -> np.ndarray:
    largest = float(ml_dtypes.finfo(dtype).max)
    return np.where(np.isnan(x), x, np.clip(x, -largest, largest)).astype(dtype)


@pytest.mark.parametrize("type_", ["fp8e4nv", "fp8e5"])
@pytest.mark.parametrize("to_fp8", [True, False])
@witness
def test_conversions_of_fp8(type_, to_fp8):
    other = "fp32" if to_fp8 else "fp16"
    dtype, wide = _TYPES[type_], _TYPES[other]
    types = (other, type_) if to_fp8 else (type_, other)
    signature = {"x": f"*{types[0]}", "y": f"*{types[1]}", "n": "i32"}
    kernel = compiled("convert", 90, signature, {"BLOCK": 512})
    if to_fp8:
        scale = 2.0 ** np.random.default_rng(0).integers(-20, 20, 1024)
        x = (normal(1024, np.float64, 1) * scale).astype(wide)
        expected = saturated(x, dtype)
    else:
        x = np.resize(np.arange(256, dtype=np.uint8).view(dtype), 1024)
        expected = x.astype(wide)
    y = np.zeros(1024, _TYPES[types[1]])
    opcodes = run(kernel, 2, x, y, 1024)
    same = (y == expected) | np.isnan(y.astype("f4")) & np.isnan(expected.astype("f4"))
    assert same.all(), (x[~same][:4], y[~same][:4], expected[~same][:4])
    ours = {"fp8e4nv": "e4m3x2", "fp8e5": "e5m2x2"}[type_]
    used = f"cvt.rn.satfinite.{ours}.f32" if to_fp8 else f"cvt.rn.f16x2.{ours}"
    assert used in opcodes


@witness
def test_fp8_of_a_format_of_triton():
    """e4b15, which is float16 of four bits of exponent and three of significand."""
    kernel = compiled("convert", 80, {"x": "*fp8e4b15", "y": "*fp16", "n": "i32"}, {"BLOCK": 512})
    codes = np.arange(1024, dtype=np.uint32).astype(np.uint8)
    y = np.full(1024, np.nan, np.float16)
    opcodes = run(kernel, 2, codes, y, 1024)
    bits = codes.astype(np.uint16)
    np.testing.assert_array_equal(y.view(np.uint16), (bits & 0x80) << 8 | (bits & 0x7F) << 7)
    assert "lop3.b32" in opcodes


def tensor_map(array: np.ndarray, box) -> list:
    """The parameters that Triton makes of a descriptor: the map, extents and strides."""
    dtype = {1: "uint8", 2: "float16"}[array.itemsize]
    layout = TensorLayout(dtype, array.shape[::-1], array.strides[-2::-1], tuple(box[::-1]))
    steps = [stride // array.itemsize for stride in array.strides]
    return [SimulatedTensorMap(array, layout), *array.shape, *steps]


# Shape, box, first element.
TILES = [
    ((3, 20, 72), (1, 16, 64), (0, 8, 16)),
    ((3, 20, 3, 72), (1, 8, 2, 64), (0, 8, 1, 16)),
    ((3, 20, 3, 2, 72), (1, 8, 2, 2, 64), (0, 8, 1, 0, 16)),
]


@pytest.mark.parametrize("shape, box, first", TILES)
@witness
def test_tiles_of_several_dimensions(shape, box, first):
    rank = len(shape)
    kind = f"tensordesc<fp16[{', '.join(map(str, box))}]>"
    constants = {"B": first[1], "C": first[-1]}
    kernel = compiled(f"copy_{rank}d", 90, {"x": kind, "y": kind}, constants)
    x, y = normal(shape, np.float16, 1), np.full(shape, -1, np.float16)
    parameters = [
        p
        for array, given in zip((x, y), kernel["maps"], strict=True)
        for p in tensor_map(array, given["block_size"])
    ]
    opcodes = run(kernel, shape[0], *parameters)
    expected = np.full_like(y, -1)
    inside = (slice(None), *(slice(i, i + n) for i, n in zip(first[1:], box[1:], strict=True)))
    expected[inside] = x[inside]
    np.testing.assert_array_equal(y, expected)
    for direction in ("shared", "global"):
        assert any(o.startswith(f"cp.async.bulk.tensor.{rank}d.{direction}") for o in opcodes)


@pytest.mark.parametrize("type_, tb, bk", [("fp16", 0, 64), ("fp16", 1, 64), ("fp8e4nv", 1, 128)])
@witness
def test_a_matmul_of_tensor_maps(type_, tb, bk):
    of_b = (128, bk) if tb else (bk, 128)
    signature = {
        "a": f"tensordesc<{type_}[128, {bk}]>",
        "b": f"tensordesc<{type_}[{of_b[0]}, {of_b[1]}]>",
        "c": "tensordesc<fp16[128, 128]>",
        "K": "i32",
    }
    constants = {"TB": tb, "BM": 128, "BN": 128, "BK": bk}
    kernel = compiled("matmul_of_tiles", 90, signature, constants, stages=3)
    m, n, k = 136, 120, 3 * bk + 16  # no tile divides them
    a, b = normal((m, k), _TYPES[type_], 1), normal((k, n), _TYPES[type_], 2)
    c = np.full((m, n), np.nan, np.float16)
    arrays = a, np.ascontiguousarray(b.T) if tb else b, c
    parameters = [
        x
        for array, given in zip(arrays, kernel["maps"], strict=True)
        for x in tensor_map(array, given["block_size"])
    ]
    opcodes = run(kernel, (2, 1), *parameters, k)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(c, exact, atol=0.05)
    assert any(x.startswith("cp.async.bulk.tensor.2d.shared") for x in opcodes)
    assert any(x.startswith("cp.async.bulk.tensor.2d.global") for x in opcodes)


def test_where_we_ask_for_more_fences_than_triton_sets():
    kind = "tensordesc<fp16[1, 16, 64]>"
    kernel = compiled("copy_3d", 90, {"x": kind, "y": kind}, {"B": 0, "C": 0})
    x = normal((1, 16, 64), np.float16)
    boxes = [given["block_size"] for given in kernel["maps"]]
    parameters = [p for box in boxes for p in tensor_map(x.copy(), box)]
    with pytest.raises(SimulationError, match="without a fence_mbarrier_init after it"):
        run(kernel, 1, *parameters, fenced=False)
