"""Hopper's backward in two kernels against float64 in the simulator, on small configs in turn.

And against the kernels on `mma`, whose sums have the same order where sums are exact.
"""

from collections import Counter

import numpy as np
import pytest

import numflash
from numflash.calls.launch import Launcher
from numflash.configs import parse_config
from numflash.runtime.errors import UnsupportedError
from numflash.simulator import SEED
from tests.support.attention_cases import SIM_CASES, AttentionCase, is_of_masks, masks_of
from tests.support.covering import ALL, covering, some, thorough
from tests.support.hopper_cases import on_hopper

CONFIGS = (
    {"backward-dq": "sm90-m64n32w4s2", "backward-dkdv": "sm90-m32n64w4s2"},
    {"backward-dq": "sm90-m64n64w4s1", "backward-dkdv": "sm90-m64n64w4s1"},
    {"backward-dq": "sm90-m64n16w4s3", "backward-dkdv": "sm90-m32n64w4s3"},
    {"backward-dq": "sm90-m128n32w8s2", "backward-dkdv": "sm90-m64n128w8s2"},
    {"backward-dq": "sm90-m64n32w4s2", "backward-dkdv": "sm90-m32n64w8s2-roles"},
    {"backward-dq": "sm90-m64n64w4s1", "backward-dkdv": "sm90-m64n64w8s1-roles"},
)
# Several tiles each way, edges within tiles, several slabs; name, configs, shape, options.
LARGER = (
    ("causal", 3, (1, 140, 150, 1, 1, 64, 64), {"causal": True}),
    ("window", 0, (1, 150, 130, 2, 1, 32, 32), {"window_size": (40, 9)}),
    ("d96", 1, (1, 70, 100, 1, 1, 96, 96), {"causal": True, "causal_align": "top_left"}),
    ("d128-64", 3, (1, 70, 140, 1, 1, 128, 64), {"softcap": 3.0}),
    ("three-groups", None, (1, 130, 200, 2, 1, 64, 64), {"causal": True}),
    ("dropout", 1, (1, 100, 140, 2, 1, 64, 64), {"dropout_p": 0.4, "seed": 11, "softcap": 2.0}),
)
# Head dims above 128, for dK and dV by roles: the smallest, those that are padded, the largest.
WIDE = (
    ("d136", (1, 40, 70, 2, 1, 136, 136), "float16", {"softcap": 3.0, "alibi_slopes": (2,)}),
    ("d192-128", (1, 70, 70, 1, 1, 192, 128), "bfloat16", {"causal": True}),
    ("d128-192", (1, 70, 40, 1, 1, 128, 192), "float16", {"window_size": (30, 5)}),
    ("d200", (1, 40, 70, 1, 1, 200, 200), "bfloat16", {"dropout_p": 0.3, "seed": 5}),
    ("d256", (1, 70, 40, 1, 1, 256, 256), "bfloat16", {"causal": True}),
)
_WIDE = {"backward-dq": "sm90-m64n48w4s1", "backward-dkdv": "sm90-m64n64w8s1-roles"}
_THREE_GROUPS = {"backward-dq": "sm90-m192n64w12s1", "backward-dkdv": "sm90-m64n192w12s2"}


def _cases() -> list:
    """(configs, case): masks as far as they cover forms and masks, other cases by turns."""
    small = on_hopper(SIM_CASES)
    masked = covering([case for case in small if is_of_masks(case)], masks_of, together=1)
    others = [case for case in small if not is_of_masks(case)]
    turns, found = Counter(), []
    for case in [*masked, *others[:: 1 if ALL else 3]]:
        found.append((CONFIGS[turns["small"] % len(CONFIGS)], case))
        turns["small"] += 1
    for number, (name, turn, shape, options) in enumerate(LARGER if ALL else ()):
        dtype = ("float16", "bfloat16")[number % 2]
        configs = _THREE_GROUPS if turn is None else CONFIGS[turn]
        found.append((configs, AttentionCase(name, shape, dtype, options=options)))
    wide = WIDE if ALL else WIDE[-1:]
    found += [(_WIDE, AttentionCase(*case[:3], options=case[3])) for case in wide]
    return [pytest.param(*each, id=f"{each[1]}-{number}") for number, each in enumerate(found)]


@pytest.fixture(autouse=True)
def hopper(on):
    """A simulated GPU that is a Hopper, and results that hold NaN before they are written."""
    on("sm_90a")


@pytest.fixture
def launched(monkeypatch):
    """The configs of the kernels launched, in order."""
    found, bind = [], Launcher.bind

    def counted(self, operands):
        found.append(str(self._config))
        return bind(self, operands)

    monkeypatch.setattr(Launcher, "bind", counted)
    return found


@pytest.mark.parametrize(("configs", "case"), some(_cases(), every=5))
def test_errors_are_within_budget(configs, case, launched):
    report = numflash.check(**case.arrays(), config=configs, **case.call_options())
    gradients = ["dq", "dk", "dv", *(["dsinks"] if "sinks" in case.options else [])]
    assert [error.name for error in report.errors] == ["out", "lse", *gradients]
    assert report.passed, f"\n{report}"
    assert set(configs.values()) <= set(launched)


def gradients_of(case, configs, **more):
    arrays = case.arrays()
    dout = arrays.pop("dout")
    out, lse = numflash.attention(**arrays, **case.options, return_lse=True)
    given = dict(case.options, config=configs, **more)
    return numflash.attention_backward(dout, *arrays.values(), out, lse, **given)


OF_BITS = {"plain": {}, "dropout": {"dropout_p": 0.3, "seed": 2**40 + 1}}


@thorough
@pytest.mark.parametrize("name", some(OF_BITS, "dropout"))
def test_bits_are_those_of_mma_and_no_order_of_threads_changes_them(name, monkeypatch):
    options = {"causal": True, **OF_BITS[name]}
    case = AttentionCase("bits", (1, 100, 90, 2, 1, 64, 64), "float16", options=options)
    on_mma = {"backward-dq": "sm80-m16n16w1s2", "backward-dkdv": "sm80-m16n16w1s2"}

    def run(configs, seed):
        monkeypatch.setattr(SEED, "value", seed)
        return [x.tobytes() for x in gradients_of(case, configs)]

    expected = run(on_mma, 0)
    for seed in range(10 if ALL else 3):
        assert run(CONFIGS[seed % 2], seed) == expected


# P comes rounded to dS, but where it goes with its slope; and dK is of that dS.
BY_ROLES = {"plain": ({}, "v"), "softcap": ({"softcap": 2.0}, "kv")}


@thorough
@pytest.mark.parametrize("name", some(BY_ROLES, "plain"))
def test_by_roles_bits_are_those_of_mma_where_nothing_is_rounded_more(name, monkeypatch):
    more, same = BY_ROLES[name]
    options = {"causal": True, **more}
    case = AttentionCase("bits", (1, 70, 90, 2, 1, 64, 64), "float16", options=options)

    def run(config, seed=0):
        monkeypatch.setattr(SEED, "value", seed)
        found = gradients_of(case, {"backward-dkdv": config}, wrt=("k", "v"))
        return dict(zip("kv", found, strict=True))

    expected, first = run("sm80-m16n16w1s2"), run(CONFIGS[4]["backward-dkdv"])
    for name, got in first.items():
        if name in same:
            assert got.tobytes() == expected[name].tobytes()
        else:
            np.testing.assert_allclose(got, expected[name], rtol=4e-3, atol=4e-3)
    for seed in range(1, 6 if ALL else 3):
        again = run(CONFIGS[4 + seed % 2]["backward-dkdv"], seed)
        assert {name: x.tobytes() for name, x in again.items()} == {
            name: x.tobytes() for name, x in first.items()
        }


@thorough
def test_gradients_in_float32_and_of_lse():
    case = AttentionCase("float32", (1, 70, 66, 2, 1, 32, 32), "bfloat16")
    dlse = np.random.default_rng(3).standard_normal((1, 2, 70)).astype(np.float32)
    on_mma = {"backward-dq": "sm80-m16n16w1s2", "backward-dkdv": "sm80-m16n16w1s2"}
    more = {"grad_dtype": "float32", "dlse": dlse}
    expected = gradients_of(case, on_mma, **more)
    for got, exact in zip(gradients_of(case, CONFIGS[0], **more), expected, strict=True):
        assert got.dtype == np.float32 and (got == exact).all()
    _, dk, dv = gradients_of(case, CONFIGS[4], **more)
    assert dk.dtype == dv.dtype == np.float32 and (dv == expected[2]).all()
    np.testing.assert_allclose(dk, expected[1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("configs", (CONFIGS[1], CONFIGS[5]), ids=("rows", "roles"))
def test_lse_far_below_zero_makes_nothing_infinite(configs):
    """Keys past the end are zeros, whose P may be as large as lse makes it."""
    q = np.full((1, 48, 1, 32), 8, np.float16)
    k, v = -q[:, :40], np.ones((1, 40, 1, 32), np.float16)
    out, lse = numflash.attention(q, k, v, return_lse=True)
    assert lse.max() < -300
    gradients = numflash.attention_backward(v[:, :1].repeat(48, 1), q, k, v, out, lse,
                                            config=configs)  # fmt: skip
    assert all(np.isfinite(x).all() for x in gradients)


# What is refused


@pytest.mark.parametrize(
    ("family", "text", "message"),
    [
        ("backward-dq", "sm90-m128n32w4s2", "tile_m must be 16 x num_warps, 4, 8 or 12"),
        ("backward-dkdv", "sm90-m64n128w4s2", "tile_n must be 16 x num_warps, 4, 8 or 12"),
        (
            "backward-dkdv",
            "sm90-m64n128w8s2-roles",
            "with roles tile_n must be 64 and num_warps 8",
        ),
        ("backward-dkdv", "sm90-m64n64w4s2-roles", "with roles tile_n must be 64 and num_warps 8"),
        ("backward-dq", "sm90-m64n64w8s2-roles", "a backward-dq config must look like"),
        ("backward-dkdv", "sm90-m48n64w4s2", "tile_m must be a multiple of 32"),
        ("backward-dq", "sm90-m64n272w4s2", "has at most 256 rows"),
        ("backward-dkdv", "sm90-m64n64w4s2-apart", "neither b, nor x, nor -apart"),
        ("backward-dq", "sm90-m64n64w4s2-linear", "tiles are always swizzled"),
    ],
)
def test_a_config_that_cannot_be_is_refused(family, text, message):
    with pytest.raises(ValueError, match=message):
        parse_config(family, text)


def test_a_config_that_cannot_run_is_refused():
    wide = AttentionCase("wide", (1, 9, 9, 1, 1, 192, 192), "float16")
    odd = AttentionCase("odd", (1, 9, 9, 2, 2, 33, 33), "float16")
    fat = AttentionCase("fat", (1, 9, 9, 1, 1, 256, 256), "float16")
    for case, configs, message in (
        (wide, CONFIGS[0], "at most 128 columns, there are 192; with -roles it keeps one of them"),
        (odd, CONFIGS[0], "cannot be described to bulk copies"),
        (fat, {"backward-dq": "sm90-m128n128w8s1"}, "bytes of shared memory per block"),
        (fat, {"backward-dkdv": "sm90-m64n64w8s3-roles"}, "bytes of shared memory per block"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            gradients_of(case, configs)
