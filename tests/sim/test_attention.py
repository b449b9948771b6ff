"""Forward and all three gradients of every kernel, against float64, in the simulator."""

from collections import Counter

import numpy as np
import pytest

import numflash
from numflash.runtime.numpy_arrays import NumPy
from tests.support.attention_cases import (
    SIM_CASES,
    SMALL_CONFIGS,
    halved,
    is_of_masks,
    masks_of,
    on_tensor_cores,
)
from tests.support.covering import ALL, FULL, covering, thorough, whole

_OPTIONS = sorted({name for case in SIM_CASES for name in case.options})


def _cases():
    """(case, configs): all cases on all kernels, whose configs take turns.

    sm75 and tf32 share all but instructions with sm80. Each of them has masks on each form, each
    other kernel each mask, too, and each form has each mask; of the other cases sm75 has a third,
    tf32 a sixth. Where not all tests run, each form, mask, option and kind of inputs is there, and
    of the other cases a sixth on sm80.
    """
    steps = {} if FULL else {"sm75": 3, "tf32": 6}
    table = [
        (implementation, case)
        for implementation in SMALL_CONFIGS
        if implementation != "sm90"
        for case in (
            SIM_CASES
            if implementation == "portable"
            else on_tensor_cores(SIM_CASES, implementation)
        )
    ]
    masked = [(implementation, case) for implementation, case in table if is_of_masks(case)]

    def labels(row):
        implementation, (form, mask) = row[0], masks_of(row[1])
        of_mask = None if implementation in ("sm75", "tf32") else mask
        return implementation, form, of_mask, row[1].dtype

    chosen = covering(masked, labels, together=2 if ALL else 1)
    others = {
        implementation: [row for row in table if row[0] == implementation and row not in masked]
        for implementation in SMALL_CONFIGS
    }
    if ALL:
        for implementation, rows in others.items():
            chosen += rows[:: steps.get(implementation, 1)]
    else:
        every = [row for rows in others.values() for row in rows]
        chosen += covering(every, _said, together=1)
        chosen += [row for row in others["sm80"][::6] if row not in chosen]
    turns, found = Counter(), []
    for implementation, case in chosen:
        configs = SMALL_CONFIGS[implementation]
        turn = configs[turns[implementation] % len(configs)]
        turns[implementation] += 1
        if implementation == "portable":
            case = halved(case)
        found.append(pytest.param(case, turn, id=f"{implementation}-{case}"))
    return found


def _said(row) -> tuple:
    """Of (implementation, case): it, the kind of inputs, and each option."""
    implementation, case = row
    return (implementation, case.inputs, *(x if x in case.options else None for x in _OPTIONS))


@pytest.fixture
def poisoned_results(monkeypatch):
    """Fill what the library allocates with NaN, so that what a kernel leaves out shows."""
    empty = NumPy.empty

    def poisoned(self, shape, dtype, device):
        array = empty(self, shape, dtype, device)
        array.fill(np.nan)
        return array

    monkeypatch.setattr(NumPy, "empty", poisoned)


@whole
@pytest.mark.parametrize(("case", "configs"), _cases())
def test_errors_are_within_budget(case, configs, poisoned_results):
    report = numflash.check(**case.arrays(), config=configs, **case.call_options())
    gradients = ["dq", "dk", "dv", *(["dsinks"] if "sinks" in case.options else [])]
    assert [error.name for error in report.errors] == ["out", "lse", *gradients]
    assert report.passed, f"\n{report}"


@thorough
@pytest.mark.parametrize("implementation", ["sm80", "sm75"])
def test_no_order_of_threads_changes_a_bit(implementation, monkeypatch):
    from numflash.simulator import SEED

    cases = on_tensor_cores(SIM_CASES, implementation)
    (case,) = (case for case in cases if case.name == "square-causal-window")
    configs = SMALL_CONFIGS[implementation][1]
    q, k, v, dout = case.arrays().values()
    backward = {family: config for family, config in configs.items() if "backward" in family}

    def run(seed):
        monkeypatch.setattr(SEED, "value", seed)
        forward = dict(case.options, config=configs["forward"], return_lse=True)
        out, lse = numflash.attention(q, k, v, **forward)
        gradients = numflash.attention_backward(
            dout, q, k, v, out, lse, config=backward, **case.options
        )
        return [x.tobytes() for x in (out, lse, *gradients)]

    assert run(1) == run(2) == run(3)


@thorough
@pytest.mark.usefixtures("shipped_kernels")
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_default_configs_are_within_budget(head_dim, dtype, poisoned_results):
    rng = np.random.default_rng(head_dim)
    q, k, v, dout = (rng.standard_normal((1, 9, 1, head_dim)).astype(dtype) for _ in "qkvd")
    report = numflash.check(q, k, v, dout=dout, causal=True)
    assert report.passed, f"\n{report}"


def test_a_wrong_result_is_not_within_budget():
    q = np.random.default_rng(0).standard_normal((1, 9, 1, 32)).astype(np.float32)
    exact, _ = numflash.reference.attention(q, q, q)
    right = numflash.check(q, q, q).errors[0]
    assert right.passed
    from numflash.api.comparison import measure

    naive, _ = numflash.reference.naive(q, q, q, precision="float32")
    wrong = exact.copy()
    wrong[0, 3, 0, 5] += 20 * right.budget
    assert not measure("out", wrong, exact, naive, 2.0**-24).passed
    wrong[0, 3, 0, 5] = np.nan
    assert not measure("out", wrong, exact, naive, 2.0**-24).passed
