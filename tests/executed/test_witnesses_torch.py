"""PyTorch's conversions against the bodies of ours, bit by bit; NaNs only have to be NaNs.

What a conversion rounds to depends on the bits that it keeps, on the next one, and on whether any
of the others is set: all of these are tried. They are witnesses: see `witnesses`.

Opt-in: NUMFLASH_TEST_PEERS=1, with `torch` installed.
"""

import numpy as np
import pytest

from numflash.ptx import INSTRUCTIONS
from tests.executed import witnesses
from tests.executed.witnesses import body

witnesses.need(torch="torch")

import torch  # noqa: E402

# NumPy warns of what the bodies do on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
_FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def vouch(*instructions: str):
    """A witness for these instructions."""
    return witnesses.witness("PyTorch", "torch", *instructions)


def float32s(kept: int) -> np.ndarray:
    """Each sign, exponent and `kept` bits of a significand, without and with a bit behind them."""
    first = np.arange(1 << 9 + kept, dtype=np.uint32) << np.uint32(23 - kept)
    return np.stack([first, first | np.uint32(1)], 1).reshape(-1).view(np.float32)


def drawn(x: np.ndarray, n: int) -> np.ndarray:
    """n of the elements."""
    return x[np.random.default_rng(0).permutation(len(x))[:n]]


def converted(x: np.ndarray, dtype, bits) -> np.ndarray:
    """The bits of what PyTorch makes of an array."""
    return torch.from_numpy(x).to(dtype).view(getattr(torch, bits)).numpy()


def in_pairs(name: str, x: np.ndarray, bits) -> np.ndarray:
    """What an instruction of two numbers makes of an array: of each as the high and the low."""
    instruction, others = INSTRUCTIONS[name].body, np.roll(x, 1)
    packed = np.array([instruction(*pair) for pair in zip(x, others, strict=True)])
    halves = packed.astype(np.dtype(f"u{2 * np.dtype(bits).itemsize}")).view(bits).reshape(-1, 2)
    np.testing.assert_array_equal(halves[:, 0], np.roll(halves[:, 1], 1))
    return halves[:, 1]


def check(ours: np.ndarray, right: np.ndarray, are_nan: np.ndarray, nan: int) -> None:
    """Bits alike, but for NaNs: one code stands for all of them."""
    np.testing.assert_array_equal(ours[~are_nan], right[~are_nan])
    assert (ours[are_nan] == nan).all() and are_nan.any()


@vouch("cvt_rn_f16_f32")
def test_float16_of_float32():
    """A quarter of them: they are two million."""
    x = drawn(float32s(11), 1 << 19)
    instruction = INSTRUCTIONS["cvt_rn_f16_f32"].body
    ours = np.array([instruction(value) for value in x], np.uint16)
    check(ours, converted(x, torch.float16, "uint16"), np.isnan(x), 0x7FFF)


@vouch("cvt_rn_f16x2_f32")
def test_pairs_of_float16_of_float32():
    x = drawn(float32s(11), 1 << 16)
    ours = in_pairs("cvt_rn_f16x2_f32", x, np.uint16)
    check(ours, converted(x, torch.float16, "uint16"), np.isnan(x), 0x7FFF)


@vouch("cvt_rn_bf16x2_f32")
def test_pairs_of_bfloat16_of_float32():
    x = float32s(8)
    ours = in_pairs("cvt_rn_bf16x2_f32", x, np.uint16)
    check(ours, converted(x, torch.bfloat16, "uint16"), np.isnan(x), 0x7FFF)


@vouch("cvt_f32_f16")
def test_float32_of_float16():
    codes = np.arange(1 << 16, dtype=np.uint16)
    instruction = INSTRUCTIONS["cvt_f32_f16"].body
    ours = np.array([instruction(code) for code in codes], np.float32).view(np.uint32)
    halves = codes.view(np.float16)
    check(ours, converted(halves, torch.float32, "uint32"), np.isnan(halves), 0x7FFFFFFF)


@pytest.mark.parametrize("kind", _FP8)
@vouch("cvt_rn_f16x2_e4m3x2", "cvt_rn_f16x2_e5m2x2")
def test_float16_of_8_bits(kind):
    pairs = np.arange(1 << 16, dtype=np.uint16)
    instruction = INSTRUCTIONS[f"cvt_rn_f16x2_{kind}x2"].body
    ours = np.array([instruction(pair) for pair in pairs], np.uint32).view(np.uint16)
    codes = torch.from_numpy(pairs.view(np.uint8).copy()).view(_FP8[kind])
    right = codes.to(torch.float16)
    are_nan = torch.isnan(right).numpy()
    check(ours, right.view(torch.uint16).numpy(), are_nan, 0x7FFF)


@pytest.mark.parametrize("kind", _FP8)
@vouch("cvt_rn_satfinite_e4m3x2_f32", "cvt_rn_satfinite_e5m2x2_f32")
def test_8_bits_of_float32(kind):
    """PyTorch does not saturate: it is given the largest number for what lies outside."""
    x = float32s(4)
    largest = torch.finfo(_FP8[kind]).max
    inside = np.where(np.isnan(x), x, np.clip(x, -largest, largest)).astype(np.float32)
    ours = in_pairs(f"cvt_rn_satfinite_{kind}x2_f32", x, np.uint8)
    check(ours, converted(inside, _FP8[kind], "uint8"), np.isnan(x), 0x7F)


def _cut(right):
    """Towards zero: of float32 the bits behind the 11th are cut off first."""
    cell = np.zeros(1, np.float32)

    def wrong(*values):
        kept = []
        for value in values:
            cell[0] = value
            kept.append((cell.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)[0])
        return right(*kept)

    return wrong


def _other_code(right):
    """The number next to the right one where the code is 1."""
    return lambda codes: right(codes + (codes & 0xFF == 1))


def _ulp(right):
    return lambda *given: right(*given) + (given[0] == 1.5)


WRONG = {
    "float16: bits are cut off": (
        "cvt_rn_f16_f32",
        body("cvt_rn_f16_f32", _cut),
        (test_float16_of_float32,),
    ),
    "pairs of float16: bits are cut off": (
        "cvt_rn_f16x2_f32",
        body("cvt_rn_f16x2_f32", _cut),
        (test_pairs_of_float16_of_float32,),
    ),
    "bfloat16 of 1.5 is the next one": (
        "cvt_rn_bf16x2_f32",
        body("cvt_rn_bf16x2_f32", _ulp),
        (test_pairs_of_bfloat16_of_float32,),
    ),
    "the smallest float16 is the second": (
        "cvt_f32_f16",
        body("cvt_f32_f16", _other_code),
        (test_float32_of_float16,),
    ),
    **{
        f"the smallest {kind} is the second": (
            f"cvt_rn_f16x2_{kind}x2",
            body(f"cvt_rn_f16x2_{kind}x2", _other_code),
            (test_float16_of_8_bits, kind),
        )
        for kind in _FP8
    },
    **{
        f"the {kind} of 1.5 is the next one": (
            f"cvt_rn_satfinite_{kind}x2_f32",
            body(f"cvt_rn_satfinite_{kind}x2_f32", _ulp),
            (test_8_bits_of_float32, kind),
        )
        for kind in _FP8
    },
}
record = witnesses.recorder(__name__, WRONG)


@pytest.mark.parametrize("meaning", WRONG)
def test_pytorch_notices_a_wrong_meaning(meaning, monkeypatch):
    witnesses.check_noticed(meaning, WRONG[meaning], monkeypatch)
