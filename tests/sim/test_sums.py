"""Cut sums of tensor cores: models, instructions under them, and programs that vouch for them."""

import importlib.util
import itertools
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

import numflash
from numflash.calls import ready
from numflash.runtime import sums
from numflash.runtime.driver import limits_of_device
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.switches import is_on
from tests.support.covering import ALL, covering, thorough
from tests.support.instruction_harness import run_simulated
from tests.support.tensor_core_cases import TENSOR_CORE_CASES
from tests.support.wgmma_cases import WGMMA_CASES

TYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "tf32": np.dtype(np.float32),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
}
HARDWARE = [(model, *key) for model, instructions in sums.MODELS.items() for key in instructions]
LOWEST = {"float16": -14, "bfloat16": -126, "tf32": -126, "e4m3": -6}
K = {"float16": 16, "bfloat16": 16, "tf32": 8, "e4m3": 32}


@pytest.fixture
def model(monkeypatch):
    """Chooses the model of the sums."""
    return lambda name: monkeypatch.setattr(sums.SUMS, "model", name)


def numbers(rng, shape, dtype: str, exponents) -> np.ndarray:
    """float64 that hold numbers of a type, about 2 ** exponents; a tenth is zero."""
    values = np.clip(np.ldexp(rng.standard_normal(shape), exponents), -448, 448)
    values[rng.random(shape) < 0.1] = 0
    if dtype == "tf32":
        words = values.astype(np.float32).view(np.uint32) & 0xFFFFE000
        return words.view(np.float32).astype(np.float64)
    return values.astype(TYPES[dtype]).astype(np.float64)


def operands(seed: int, dtype: str, spread: int, m=16, n=24):
    """a, b and c as `add_products` takes them, of so many exponents; -1: a is mostly subnormal.

    c is sometimes what the products cancel, and sometimes zero.
    """
    rng, k, around = np.random.default_rng(seed), K[dtype], 0
    if spread < 0:
        spread, around = 1, LOWEST[dtype] - 1
    a = numbers(rng, (m, k), dtype, around + rng.integers(-spread, spread + 1, (m, k)))
    b = numbers(rng, (k, n), dtype, rng.integers(-spread, spread + 1, (k, n)))
    c = rng.standard_normal((m, n))
    c = np.ldexp(c, around + rng.integers(-spread - 4, spread + 8, (m, n)))
    c = np.where(rng.random((m, n)) < 0.2, -(a @ b), c)
    c[rng.random((m, n)) < 0.1] = 0
    return a, b, c.astype(np.float32)


# The models, as the papers say them: one number at a time, in integers and fractions


def exponent(x: Fraction, lowest: int) -> int:
    """Of 1.xxx times a power of two, or the lowest."""
    return max(lowest, abs(x.numerator).bit_length() - x.denominator.bit_length())


def cut(x: Fraction, unit: Fraction) -> Fraction:
    """Towards zero, to a multiple of the unit."""
    return int(x / unit) * unit


def one_sum(a, b, c, dtype: str, products: int, term_bits: int, result_bits: int) -> Fraction:
    lowest, c = LOWEST[dtype], Fraction(float(c))
    a, b = [Fraction(x) for x in a], [Fraction(x) for x in b]
    for first in range(0, len(a), products):
        pairs = list(zip(a, b, strict=True))[first : first + products]
        tops = [exponent(x, lowest) + exponent(y, lowest) for x, y in pairs if x * y != 0]
        tops += [exponent(c, -126)] if c != 0 else []
        unit = Fraction(2) ** (max(tops, default=-132) - term_bits)
        total = cut(c, unit) + sum(cut(x * y, unit) for x, y in pairs)
        c = cut(total, Fraction(2) ** (exponent(total, -126) - result_bits))
    return c


# GPU, instruction, type -> products at a time, bits of a term, bits of the result
PUBLISHED = {
    ("ampere", "mma", "float16"): (8, 24, 23),
    ("ampere", "mma", "bfloat16"): (8, 24, 23),
    ("ampere", "mma", "tf32"): (4, 24, 23),
    ("ada", "mma", "float16"): (8, 24, 23),
    ("ada", "mma", "bfloat16"): (8, 24, 23),
    ("ada", "mma", "tf32"): (4, 24, 23),
    ("ada", "mma", "e4m3"): (16, 13, 13),
    ("hopper", "mma", "float16"): (16, 25, 23),
    ("hopper", "mma", "bfloat16"): (16, 25, 23),
    ("hopper", "mma", "tf32"): (8, 25, 23),
    ("hopper", "wgmma", "float16"): (16, 25, 23),
    ("hopper", "wgmma", "bfloat16"): (16, 25, 23),
    ("hopper", "wgmma", "tf32"): (8, 25, 23),
    ("hopper", "wgmma", "e4m3"): (32, 13, 13),
}


@pytest.mark.parametrize("spread", [-1, 0, 3, 9])
@pytest.mark.parametrize("gpu", [*PUBLISHED, ("hopper", "mma", "e4m3")], ids="-".join)
def test_sums_are_those_of_the_papers(gpu, spread, model):
    name, instruction, dtype = gpu
    a, b, c = operands(4, dtype, spread, m=8, n=12)
    model(name)
    got = sums.add_products(instruction, dtype, a, b, c)
    assert got.dtype == np.float32 and not np.signbit(got[got == 0]).any()
    for i, j in itertools.product(range(8), range(12)):
        if gpu in PUBLISHED:
            expected = float(one_sum(a[i], b[:, j], c[i, j], dtype, *PUBLISHED[gpu]))
        else:
            # Two products of float16, the second on the result of the first, and an addition.
            total = 0.0
            for k in (0, 1), (2, 3):
                chosen = np.isin(np.arange(32) % 4, k)
                row, column = a[i, chosen], b[chosen, j]
                total = float(one_sum(row, column, total, "float16", 16, 25, 23))
            expected = c[i, j] + np.float32(total)
        assert got[i, j] == expected, (i, j)


def test_every_model_is_checked():
    assert set(HARDWARE) == {*PUBLISHED, ("hopper", "mma", "e4m3")}


@pytest.mark.parametrize(("name", "instruction", "dtype"), HARDWARE)
def test_a_term_below_the_last_bit_is_lost(name, instruction, dtype, model):
    """1 with c: what is kept of it depends on the GPU alone, and not on how often it comes."""
    kept = {"ampere": 24, "ada": 24, "hopper": 25}[name]
    late = (name, instruction, dtype) == ("hopper", "mma", "e4m3")
    if dtype == "e4m3" and not late:
        kept = 13
    ones = np.ones((1, K[dtype])), np.ones((K[dtype], 1))
    model(name)
    for power in (kept, kept + 1):
        c = np.float32([[2.0**power]])
        together = 2.0**power + (K[dtype] if power == kept or late else 0)
        bits = 13 if kept == 13 else 23
        unit = 2.0 ** (power - bits)
        expected = together // unit * unit
        assert sums.add_products(instruction, dtype, *ones, c)[0, 0] == expected
    model("exact")
    c = np.float32([[2.0**kept]])
    exact = np.float32(2.0**kept + K[dtype])
    assert sums.add_products(instruction, dtype, *ones, c)[0, 0] == exact


@pytest.mark.parametrize("instruction", ["mma", "wgmma"])
@pytest.mark.parametrize("dtype", TYPES)
def test_exact_sums_are_rounded_once(instruction, dtype):
    assert sums.SUMS.model == "exact"
    a, b, c = operands(1, dtype, 4)
    expected = (a @ b + c).astype(np.float32)
    assert (sums.add_products(instruction, dtype, a, b, c) == expected).all()


@pytest.mark.parametrize(("name", "instruction", "dtype"), [("exact", "mma", "tf32"), *HARDWARE])
def test_infinities_and_nan_survive(name, instruction, dtype, model):
    a, b, c = operands(2, dtype, 1, 4, 8)
    model(name)
    before = sums.add_products(instruction, dtype, a, b, c)
    b[0] = 1
    b[0, 1], c[1, 2], c[2, 3], c[2, 4] = np.nan, np.inf, -np.inf, np.nan
    a[3, 0], c[3, 6] = np.inf, -np.inf
    got = sums.add_products(instruction, dtype, a, b, c)
    nan = np.zeros(got.shape, bool)
    nan[:, 1], nan[2, 4], nan[3, 6] = True, True, True
    assert (np.isnan(got) == nan).all()
    assert got[1, 2] == np.inf and got[2, 3] == -np.inf
    assert (np.delete(got[3], [1, 6]) == np.inf).all()
    b[0, 0] = 0
    assert np.isnan(sums.add_products(instruction, dtype, a, b, c)[3, 0])
    assert np.isfinite(before).all()


@pytest.mark.parametrize("name", ["exact", "ampere", "ada", "hopper"])
def test_what_float32_does_not_hold_is_infinite(name, model):
    a, b = np.full((1, 16), 2.0**100), np.full((16, 1), 2.0**100)
    a[0, 8:] *= -0.5
    model(name)
    assert sums.add_products("mma", "bfloat16", a, b, np.float32([[0]]))[0, 0] == np.inf
    # Terms may be larger than any float32, if their sum is not.
    a[0, 1::2] = -a[0, ::2]
    assert sums.add_products("mma", "bfloat16", a, b, np.float32([[3]]))[0, 0] in (0, 3)


# Instructions and kernels under the models

PRODUCTS = [x for x in (*TENSOR_CORE_CASES, *WGMMA_CASES) if "mma" in x.instruction]
OF_16_BITS = {"f16": "float16", "bf16": "bfloat16"}


def has(name: str, case) -> bool:
    """Whether a model has the products of a case."""
    instruction = "wgmma" if "wgmma" in case.instruction else "mma"
    used = {x for x in case.instruction.split("_") if x in {*OF_16_BITS, "tf32", "e4m3"}}
    return any((name, instruction, OF_16_BITS.get(x, x)) in HARDWARE for x in used)


@thorough
@pytest.mark.parametrize("name", ["ampere", "ada", "hopper"])
def test_what_instructions_may_differ_by_on_hardware_is_enough(name, model):
    """The tolerances of tests/gpu: exact cases stay exact, others are within theirs."""
    cases, differing = [case for case in PRODUCTS if has(name, case)], set()
    for case in cases:
        model("exact")
        exact = run_simulated(case)
        model(name)
        got = run_simulated(case)
        assert (difference := case.difference(exact, got)) is None, difference
        if any((x != y).any() for x, y in zip(exact, got, strict=True) if np.isfinite(x).all()):
            differing.add(case.instruction)
    assert len(differing) >= 4 and len(cases) > len(differing), "cases show the model"


@pytest.mark.parametrize(
    ("name", "case"),
    [
        (name, next(case for case in PRODUCTS if instruction in case.instruction))
        for name, instruction in (("ampere", "e4m3"), ("ampere", "wgmma"), ("ada", "wgmma"))
    ],
    ids=str,
)
def test_an_instruction_that_the_gpus_do_not_have_is_refused(name, case, model):
    model(name)
    with pytest.raises(UnsupportedError, match=f"NUMFLASH_SIM_SUMS={name}.* no (wg)?mma of"):
        run_simulated(case)


SM80 = {"forward": "sm80-m32n32w2s1"}
BACKWARD = {"backward-dq": "sm80-m32n16w1s2", "backward-dkdv": "sm80-m32n16w1s2"}
# Family -> dtype, precision, configs, architecture, and the models that have its products.
FAMILIES = {
    "mma-f16": ("float16", None, SM80 | BACKWARD, "sm_80", ("ampere", "ada", "hopper")),
    "mma-bf16": ("bfloat16", None, SM80 | BACKWARD, "sm_80", ("ampere", "ada", "hopper")),
    "mma-tf32": ("float32", "tf32", SM80 | BACKWARD, "sm_80", ("ampere", "ada", "hopper")),
    "mma-e4m3": ("float16", "fp8", "fp8-sm89-m32n64w2s2", "sm_89", ("ada", "hopper")),
    "wgmma-f16": ("float16", None, "sm90-m64n32w4s2", "sm_90a", ("hopper",)),
    "wgmma-bf16": ("bfloat16", None, "sm90-m64n32w4s2-overlap", "sm_90a", ("hopper",)),
    "wgmma-e4m3": ("bfloat16", "fp8", "fp8-sm90-m64n64w4s2", "sm_90a", ("hopper",)),
}


FAMILIES_AND_MODELS = [(family, name) for family in FAMILIES for name in FAMILIES[family][-1]]


@pytest.mark.parametrize(
    ("family", "name"),
    covering(FAMILIES_AND_MODELS, lambda row: row, together=1, full=ALL),
)
def test_errors_stay_within_their_budgets(family, name, model, monkeypatch):
    dtype, precision, config, arch, _ = FAMILIES[family]
    monkeypatch.setenv("NUMFLASH_SIM_ARCH", arch)
    monkeypatch.setattr(ready, "_ready", {})
    limits_of_device.cache_clear()
    rng = np.random.default_rng(11)
    element = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    q, k, v, dout = (
        rng.standard_normal((1, seqlen, 1, 32)).astype(element) for seqlen in (17, 40, 40, 17)
    )
    dout = dout if isinstance(config, dict) else None
    model(name)
    try:
        report = numflash.check(
            q, k, v, dout=dout, causal=True, precision=precision, config=config
        )
    finally:
        limits_of_device.cache_clear()
    assert report.passed, f"\n{report}"


# Who else computes them so. Opt-in: both programs need PyTorch


def witness(package: str):
    """The module, or a skip that says what is missing."""
    if not is_on("NUMFLASH_TEST_PEERS"):
        pytest.skip(f"set NUMFLASH_TEST_PEERS=1 to compare with {package}")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (pip install {package}; it needs torch)")
    return pytest.importorskip(package)


def in_torch(x: np.ndarray, dtype: str):
    import torch

    element = TYPES[dtype]
    names = {"e4m3": "float8_e4m3fn", "tf32": "float32"}
    words = x.astype(element).view(f"i{element.itemsize}")
    return torch.from_numpy(words).view(getattr(torch, names.get(dtype, dtype)))


@pytest.mark.parametrize("spread", [-1, 0, 2, 6])
@pytest.mark.parametrize(("name", "instruction"), [("hopper", "wgmma"), ("ada", "mma")])
def test_mmaemu_gives_the_same_bits(name, instruction, spread, model):
    """mmaemu was compared with an H100 PCIe and an RTX 4060, bit for bit."""
    mmaemu = witness("mmaemu")
    import torch
    from mmaemu.model.chain import dot

    model(name)
    for seed in range(4):
        a, b, c = operands(seed, "e4m3", spread, 32, 48)
        got = sums.add_products(instruction, "e4m3", a, b, c)
        rows = np.broadcast_to(a[:, None], (32, 48, 32)).copy()
        columns = np.broadcast_to(b.T, (32, 48, 32)).copy()
        theirs = dot(
            in_torch(rows, "e4m3"),
            in_torch(columns, "e4m3"),
            torch.from_numpy(c),
            preset=mmaemu.get_preset(name),
        )
        assert (got.view(np.uint32) == theirs.numpy().view(np.uint32)).all()


@pytest.mark.parametrize("spread", [-1, 0, 2, 6])
@pytest.mark.parametrize(
    ("name", "instruction", "dtype"), [x for x in HARDWARE if x != ("hopper", "mma", "e4m3")]
)
def test_mmasim_gives_the_same_bits(name, instruction, dtype, spread, model):
    """MMA-Sim was compared with ten GPUs, bit for bit; it has no e4m3 of Hopper's `mma`."""
    witness("mmasim")
    import torch
    from mmasim.nv_ptx import sim

    element = {"float16": "f16", "bfloat16": "bf16"}.get(dtype, dtype)
    shape = f"m{16 if instruction == 'mma' else 64}n8k{K[dtype]}"
    gpu = {"ampere": "Ampere", "ada": "Ada Lovelace", "hopper": "Hopper"}[name]
    theirs = {"mma": sim.MMA, "wgmma": sim.WGMMA}[instruction](
        gpu, f"{shape}.f32.{element}.{element}" + ".f32" * (instruction == "mma")
    )
    model(name)
    for seed in range(4):
        a, b, c = operands(seed, dtype, spread, 16 if instruction == "mma" else 64, 8)
        got = sums.add_products(instruction, dtype, a, b, c)
        expected = theirs(in_torch(a, dtype), in_torch(b, dtype), torch.from_numpy(c)).numpy()
        assert (got.view(np.uint32) == expected.view(np.uint32)).all()
