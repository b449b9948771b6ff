"""Kernels of another compiler, proven on hardware by others: the executor must run them rightly.

Triton compiles them without a GPU, in a process of its own. That what they compute is right with
our meanings of the instructions is evidence for these: what passes is entered into
`docs/evidence.json`, of which `python -m tests.executed.evidence` draws `docs/evidence.md`.

Opt-in: NUMFLASH_TEST_PEERS=1, with `triton` installed (some 290 MB to load, 1 GB on disk).
"""

import importlib.util
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache, wraps
from importlib.metadata import version
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import numflash
from numflash.executor import bodies
from numflash.executor.program import program_of
from numflash.problem.tensor_maps import TensorLayout
from numflash.ptx import INSTRUCTIONS, tensor_cores
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.switches import is_on
from numflash.simulator import (
    DeadlockError,
    SimulatedTensorMap,
    SimulationError,
    tensor_maps,
    warpgroup,
)
from numflash.simulator.bulk_copies import BulkCopies
from tests.executed import evidence
from tests.executed.conftest import normal

if not is_on("NUMFLASH_TEST_PEERS"):
    pytest.skip("set NUMFLASH_TEST_PEERS=1 to run Triton's kernels", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed (pip install triton)", allow_module_level=True)

_WORKER = Path(__file__).with_name("triton_kernels.py")
_SIZES = {"M": "i32", "N": "i32", "K": "i32"}
_TYPES = {
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp32": np.dtype(np.float32),
    "fp8e4nv": np.dtype(ml_dtypes.float8_e4m3fn),
    "fp8e5": np.dtype(ml_dtypes.float8_e5m2),
}
# Where Triton and our checks differ: it sets no fence between `mbarrier.init` and copies, and of
# stores that `wgmma` reads the reader fences, after the barrier. We want it of the writer, before.
_FENCES = {
    r"(mbarrier\.init[^;]*;)": r"\1 fence.mbarrier_init.release.cluster;",
    r"(bar\.sync\s+0;)": r"fence.proxy.async.shared::cta; \1",
}
# Templates of several statements, by the one that does it.
_BY_HEART = {
    "bar.sync": "bar_sync",
    "elect.sync": "elect_sync",
    "mbarrier.try_wait.parity.shared.b64": "mbarrier_wait_parity",
}
_TRANSPOSES = [(0, 0), (0, 1), (1, 0), (1, 1)]


# What passed in this run: see `evidence.enter`. And what the running test has executed.
_WITNESSES: dict[str, dict] = {}
_NOTICED: dict[str, dict] = {}
_EXECUTED: set[str] = set()
# Changes of the text that a wrong meaning stands for: pattern -> replacement.
_CHANGES: dict[str, str] = {}


@pytest.fixture(scope="module", autouse=True)
def _record():
    yield
    evidence.enter(_WITNESSES, _NOTICED, WRONG)


def witness(test):
    """A test that, where it passes, vouches for the instructions that it executed."""

    @wraps(test)
    def observed(*args, **named):
        _EXECUTED.clear()
        test(*args, **named)
        entry = _WITNESSES.setdefault(
            test.__name__, {"compiler": f"Triton {version('triton')}", "instructions": []}
        )
        entry["instructions"] = sorted({*entry["instructions"], *_EXECUTED})

    return observed


@cache
def _templates() -> dict[str, list[bodies.Template]]:
    """Those of single statements, by opcode, with loads and stores typed by their bits."""
    found: dict[str, list] = {}
    for name, instruction in INSTRUCTIONS.items():
        template = bodies.read_template(instruction)
        if template is not None and name not in evidence.WITHOUT:
            found.setdefault(_untyped(template.opcode), []).append(template)
    return found


def _untyped(opcode: str) -> str:
    if opcode.startswith(("ld.", "st.")):
        return re.sub(r"[uf]32$", "b32", opcode)
    return {"mul.f32": "mul.rn.f32"}.get(opcode, opcode)


def _names(statement) -> set[str]:
    """Our instructions that a statement is; those of `wgmma` without how the sum begins."""
    opcode, operands = bodies.plain(statement.opcode, statement.operands)
    if opcode in _BY_HEART:
        return {_BY_HEART[opcode]}
    if opcode.startswith("wgmma.mma"):
        operands = (*operands[:3], bodies.Immediate("1"), *operands[4:])
    statement = replace(statement, operands=operands, opcode=opcode)
    made = bodies._made_for(statement) if opcode.startswith("wgmma") else []
    if made:
        return {re.sub("_more|_of_1$", "", made[0].instruction.name)}
    return {
        template.instruction.name
        for template in _templates().get(_untyped(opcode), [])
        if replace(template, opcode=opcode).bindings(statement) is not None
    }


def compiled(kernel: str, target: int, signature: dict, constants: dict, **options) -> dict:
    """What `triton_kernels.compiled` answers, in a process of its own."""
    request = dict(
        kernel=kernel, target=target, signature=signature, constants=constants, **options
    )
    return _answer(pickle.dumps(request))


@cache
def _answer(request: bytes) -> dict:
    worker = subprocess.run([sys.executable, str(_WORKER)], input=request, capture_output=True)
    assert worker.returncode == 0, worker.stderr.decode()[-2000:]
    return pickle.loads(worker.stdout)


def run(kernel: dict, grid, *arguments, fenced: bool = True) -> set[str]:
    """Run a compiled kernel; the opcodes that were executed."""
    # Triton appends pointers to scratch memory, which these kernels have none of.
    scratch = [None, None]
    ptx = kernel["ptx"]
    if ".target sm_90" in ptx and fenced:
        for before, after in _FENCES.items():
            ptx = re.sub(before, after, ptx)
    for meant, wrong in _CHANGES.items():
        assert re.search(meant, ptx), f"{meant} is not in the kernel"
        ptx = re.sub(meant, wrong, ptx)
    profile = numflash.run_ptx(
        ptx,
        kernel["entry"],
        grid,
        kernel["threads"],
        [*arguments, *scratch],
        shared_bytes=kernel["shared_bytes"],
        profile=True,
    )
    for piece in program_of(ptx, kernel["entry"], kernel["shared_bytes"]).pieces:
        for statement in piece:
            if profile.by_line[statement.line]:
                _EXECUTED.update(_names(statement))
    return set(profile.by_opcode)


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


def test_what_is_not_known_is_refused_by_name():
    """tf32 of sm_90 has a `wgmma` that no kernel of ours uses."""
    with pytest.raises(UnsupportedError, match=r"m64n64k8\.f32\.tf32\.tf32"):
        multiplied(90, "fp32", 0, 1, (64, 64, 64), (64, 64, 32))


# Wrong meanings on purpose: a witness notices


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
    return lambda chunks: chunks


def _offsets_exchanged(mn_major):
    return lambda n_rows, leading, stride: mn_major(n_rows, stride, leading)


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


def _body(name: str, make):
    """A patch of an instruction's body."""
    return lambda m: m.setitem(
        INSTRUCTIONS, name, replace(INSTRUCTIONS[name], body=make(INSTRUCTIONS[name].body))
    )


def _function(owner, name: str, make):
    """A patch of a function."""
    return lambda m: m.setattr(owner, name, make(getattr(owner, name)))


def _text(meant: str, wrong: str):
    """A patch of the kernel's text: the instruction means what another one does."""
    return lambda m: m.setitem(_CHANGES, meant, wrong)


def _exchanged(opcode: str):
    """The first two registers of a vector are exchanged."""
    vector = r"(\{ *)(%\w+), (%\w+)"
    if opcode.startswith("ld"):
        return _text(rf"({re.escape(opcode)}\s+){vector}", r"\1\2\4, \3")
    return _text(rf"({re.escape(opcode)}\s+\[[^\]]*\], ){vector}", r"\1\2\4, \3")


_FLOAT16, _TF32 = ("fp16", "f16", 0, 0), ("fp32", "tf32", 0, 0)
_MAPS = (test_a_matmul_of_tensor_maps, "fp16", 0, 64)
_SM80, _SM90 = (test_attention, 80, 64), (test_attention, 90, 64)
_COPIES = {n: (test_copies_of_several_groups, n + 2) for n in range(5)}
_SCALARS = (test_scalars, 512)
_WGMMA = "wgmma_m64n128k16_f16_a_shared_b_"
# Name of the wrong meaning -> (instruction, what makes it wrong, (witness, its arguments)).
WRONG = {
    "f16: registers of a exchanged": (
        "mma_m16n8k16_f16",
        _body("mma_m16n8k16_f16", _in_other_order),
        (test_a_matmul_of_sm80, *_FLOAT16),
    ),
    "bf16: registers of a exchanged": (
        "mma_m16n8k16_bf16",
        _body("mma_m16n8k16_bf16", _in_other_order),
        (test_a_matmul_of_sm80, "bf16", "bf16", 0, 0),
    ),
    "tf32: registers of a exchanged": (
        "mma_m16n8k8_tf32",
        _body("mma_m16n8k8_tf32", _in_other_order),
        (test_a_matmul_of_sm80, *_TF32),
    ),
    "low 13 bits not cut": (
        "mma_m16n8k8_tf32",
        _function(tensor_cores, "_tf32", _uncut),
        (test_a_matmul_of_sm80, *_TF32),
    ),
    "e4m3: registers of a exchanged": (
        "mma_m16n8k32_e4m3",
        _body("mma_m16n8k32_e4m3", _in_other_order),
        (test_fp8_of_sm89,),
    ),
    "matrices exchanged": (
        "ldmatrix_x4",
        _body("ldmatrix_x4", _rows_in_other_order),
        (test_a_matmul_of_sm80, "fp16", "f16", 0, 1),
    ),
    "not transposed": (
        "ldmatrix_x4_trans",
        _body("ldmatrix_x4_trans", _not_transposed),
        (test_a_matmul_of_sm80, "fp16", "f16", 1, 0),
    ),
    "matrices stored in another order": (
        "stmatrix_x4",
        _body("stmatrix_x4", _stored_in_other_order),
        _MAPS,
    ),
    "a size of 0 copies, too": ("cp_async_16", _body("cp_async_16", _all_of_it), _SM80),
    "a word next door": (
        "cp_async_4",
        _body("cp_async_4", _sources_next_door),
        (test_copies_of_four_bytes,),
    ),
    "no group is made": (
        "cp_async_commit_group",
        _body("cp_async_commit_group", _nothing),
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
        _text(r"bar\.sync\s+0;", ""),
        (test_a_matmul_of_sm80, *_FLOAT16),
    ),
    "wgmma: no swizzle": (
        _WGMMA + "k",
        _function(warpgroup, "swizzled", _same),
        (test_a_matmul_of_sm90, "fp16", 0, 1),
    ),
    "wgmma: leading and stride offset exchanged": (
        _WGMMA + "mn_a_mn",
        _function(warpgroup, "_mn_major", _offsets_exchanged),
        (test_a_matmul_of_sm90, "fp16", 1, 0),
    ),
    "wgmma: no fence": ("wgmma_fence", _body("wgmma_fence", _nothing), _SM90),
    "wgmma: no group is made": (
        "wgmma_commit_group",
        _body("wgmma_commit_group", _nothing),
        _SM90,
    ),
    "no wait for products": (
        "wgmma_wait_group_0",
        _text(r"wgmma\.wait_group\.sync\.aligned\s+0;", ""),
        _SM90,
    ),
    "the generic proxy's stores stay unseen": (
        "fence_proxy_async",
        _body("fence_proxy_async", _nothing),
        _SM90,
    ),
    "tensor maps: no swizzle": (
        "cp_async_bulk_tensor_2d",
        _function(tensor_maps, "swizzled", _same),
        _MAPS,
    ),
    "stored one row farther": (
        "cp_async_bulk_tensor_2d_store",
        _body("cp_async_bulk_tensor_2d_store", _shifted),
        _MAPS,
    ),
    **{
        f"{rank}-D: loaded one row farther": (
            f"cp_async_bulk_tensor_{rank}d",
            _body(f"cp_async_bulk_tensor_{rank}d", _loaded_shifted),
            (test_tiles_of_several_dimensions, *TILES[rank - 3]),
        )
        for rank in (3, 4, 5)
    },
    **{
        f"{rank}-D: stored one row farther": (
            f"cp_async_bulk_tensor_{rank}d_store",
            _body(f"cp_async_bulk_tensor_{rank}d_store", _shifted),
            (test_tiles_of_several_dimensions, *TILES[rank - 3]),
        )
        for rank in (3, 4, 5)
    },
    "bulk stores: no group is made": (
        "cp_async_bulk_commit_group",
        _body("cp_async_bulk_commit_group", _nothing),
        _MAPS,
    ),
    "one arrival too many is expected": (
        "mbarrier_init",
        _body("mbarrier_init", _one_more),
        _MAPS,
    ),
    "half of the bytes are expected": (
        "mbarrier_arrive_expect_tx",
        _body("mbarrier_arrive_expect_tx", _half),
        _MAPS,
    ),
    "does not wait": (
        "mbarrier_wait_parity",
        _function(BulkCopies, "test", _never),
        _MAPS,
    ),
    "all lanes are elected": ("elect_sync", _body("elect_sync", _all_elected), _MAPS),
    **{
        f"{type_}, halves exchanged": (
            f"cvt_rn_satfinite_{type_}x2_f32",
            _text(rf"(cvt\.rn\.satfinite\.{type_}x2\.f32\s+%\w+, )(%\w+), (%\w+)", r"\1\3, \2"),
            (test_conversions_of_fp8, name, True),
        )
        for type_, name in (("e4m3", "fp8e4nv"), ("e5m2", "fp8e5"))
    },
    **{
        f"{type_} is read as {other}": (
            f"cvt_rn_f16x2_{type_}x2",
            _text(rf"cvt\.rn\.f16x2\.{type_}x2", f"cvt.rn.f16x2.{other}x2"),
            (test_conversions_of_fp8, name, False),
        )
        for type_, other, name in (("e4m3", "e5m2", "fp8e4nv"), ("e5m2", "e4m3", "fp8e5"))
    },
    "minus x": (
        "ex2_approx_ftz_f32",
        _text(r"ex2\.approx\.ftz\.f32", "neg.f32"),
        _SM80,
    ),
    "min for max": ("max_f32", _text(r"max\.f32", "min.f32"), _SM80),
    "max for min": ("min_f32", _text(r"min\.f32", "max.f32"), _SCALARS),
    "a sum": ("mul_rn_f32", _text(r"mul\.f32", "add.f32"), _SCALARS),
    "an fma adds its factors": (
        "fma_rn_f32",
        _text(r"(fma\.rn\.f32\s+%\w+), (%\w+), ([^,;]+), ([^;]+);", r"\1, \2, \4, \3;"),
        _SM80,
    ),
    # To exchange a and b is not noticed: it does the same to both factors' order of k.
    "every byte is the first of a": (
        "prmt_b32",
        _text(r"(prmt\.b32\s+%\w+, %\w+, %\w+), \w+;", r"\1, 0;"),
        (test_fp8_of_sm89,),
    ),
    "f16x2, halves exchanged": (
        "cvt_rn_f16x2_f32",
        _text(r"(cvt\.rn\.f16x2\.f32\s+%\w+, )(%\w+), (%\w+)", r"\1\3, \2"),
        _SCALARS,
    ),
    "bf16x2, halves exchanged": (
        "cvt_rn_bf16x2_f32",
        _text(r"(cvt\.rn\.bf16x2\.f32\s+%\w+, )(%\w+), (%\w+)", r"\1\3, \2"),
        _SCALARS,
    ),
    "float16 read as bfloat16": (
        "cvt_f32_f16",
        _text(r"cvt\.f32\.f16", "cvt.f32.bf16"),
        _SCALARS,
    ),
    "the bfloat16 nearest": (
        "cvt_rn_f16_f32",
        _text(r"cvt\.rn\.f16\.f32", "cvt.rn.bf16.f32"),
        (test_scalars, 128),
    ),
    **{
        f"{name}: registers exchanged": (name, _exchanged(opcode), _SCALARS)
        for name, opcode in (
            ("ld_global_v4_u32", "ld.global.v4.b32"),
            ("st_global_v4_u32", "st.global.v4.b32"),
            ("st_global_v2_u32", "st.global.v2.b32"),
        )
    },
}


@pytest.mark.parametrize("meaning", WRONG)
def test_a_wrong_meaning_is_noticed(meaning, monkeypatch):
    instruction, make_wrong, (noticed, *given) = WRONG[meaning]
    make_wrong(monkeypatch)
    _forget()
    try:
        with pytest.raises((AssertionError, SimulationError, DeadlockError, IndexError)) as caught:
            noticed.__wrapped__(*given)
    finally:
        _forget()
    # Not the change itself, which has to be there.
    assert "is not in the kernel" not in str(caught.value)
    _NOTICED[meaning] = {"instruction": instruction, "witness": noticed.__name__}


def _forget():
    """Programs are made of bodies, and remembered."""
    program_of.cache_clear()
    bodies._table.cache_clear()
