"""Forward and all three gradients of every kernel, against float64, in the simulator."""

from collections import Counter

import numpy as np
import pytest

import numflash
from numflash.runtime.arrays import _NumPy
from tests.support.attention_cases import (
    SIM_CASES,
    SMALL_CONFIGS,
    halved,
    is_of_masks,
    masks_of,
    on_tensor_cores,
)
from tests.support.covering import FULL, covering


def _cases():
    """(case, configs): all cases on all kernels, whose configs take turns.

    sm75 and tf32 share all but instructions with sm80. Each of them has masks on each form, each
    other kernel each mask, too, and each form has each mask; of the other cases sm75 has a third,
    tf32 a sixth.
    """
    some = {} if FULL else {"sm75": 3, "tf32": 6}
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
        return implementation, form, None if implementation in some else mask, row[1].dtype

    chosen = covering(masked, labels)
    for implementation in SMALL_CONFIGS:
        others = [row for row in table if row[0] == implementation and not is_of_masks(row[1])]
        chosen += others[:: some.get(implementation, 1)]
    turns, found = Counter(), []
    for implementation, case in chosen:
        configs = SMALL_CONFIGS[implementation]
        turn = configs[turns[implementation] % len(configs)]
        turns[implementation] += 1
        if implementation == "portable" and turn is not configs[0]:
            case = halved(case)
        found.append(pytest.param(case, turn, id=f"{implementation}-{case}"))
    return found


@pytest.fixture
def poisoned_results(monkeypatch):
    """Fill what the library allocates with NaN, so that what a kernel leaves out shows."""
    empty = _NumPy.empty

    def poisoned(self, shape, dtype, device):
        array = empty(self, shape, dtype, device)
        array.fill(np.nan)
        return array

    monkeypatch.setattr(_NumPy, "empty", poisoned)


@pytest.mark.parametrize(("case", "configs"), _cases())
def test_errors_are_within_budget(case, configs, poisoned_results):
    report = numflash.check(**case.arrays(), config=configs, **case.call_options())
    gradients = ["dq", "dk", "dv", *(["dsinks"] if "sinks" in case.options else [])]
    assert [error.name for error in report.errors] == ["out", "lse", *gradients]
    assert report.passed, f"\n{report}"


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
    from numflash.api.check import measure

    naive, _ = numflash.reference.naive(q, q, q, precision="float32")
    wrong = exact.copy()
    wrong[0, 3, 0, 5] += 20 * right.budget
    assert not measure("out", wrong, exact, naive, 2.0**-24).passed
    wrong[0, 3, 0, 5] = np.nan
    assert not measure("out", wrong, exact, naive, 2.0**-24).passed
