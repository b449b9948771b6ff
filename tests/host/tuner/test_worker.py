"""A worker that runs numflash in the simulator, on a device that is NumPy."""

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest

import numflash
from numflash.api import check as check_module
from numflash.problem.classes import ProblemClass
from numflash.runtime.views import numpy_dtype
from tests.support.covering import thorough
from tests.support.numpy_devices import FakeDevice
from tuner.measuring import launches, representative, worker
from tuner.measuring.measurer import DeviceMeasurer, Limits

ROOT = Path(__file__).parents[3]
PROBLEM = ProblemClass.parse("forward float16-d64-dv64-vec causal q4096 k4096 bh64 g1")
SMALL = ProblemClass.parse("forward float32-d32-dv32-vec full q8 k8 bh1 g1")
CONFIG = "m16n32w1"


def _roomy(device, num_sms):
    """The device with arrays that take no memory, all zero."""
    device.describe = lambda: {"num_sms": num_sms}
    device.empty = lambda shape, dtype: np.broadcast_to(np.zeros((), numpy_dtype(dtype)), shape)
    device.fill_normal = lambda array, seed: None
    return device


def test_no_class_takes_longer_than_the_watchdog_waits():
    # A T4, whose 40 SMs multiply 64 float32 numbers a clock, at 40 percent of that.
    device = _roomy(FakeDevice(), num_sms=40)
    device.memory = 16 * 2**30
    largest = "full q131072 k131072 bh4096 g1"
    for traits, rate in (("float32-d128-dv128-vec", 64), ("float16-d128-dv128-vec", 512)):
        problem = ProblemClass.parse(f"forward {traits} {largest}")
        call = worker.Worker(device)._make_inputs(problem)
        seconds = call.multiply_adds(None) / (0.4 * rate * 40 * 1.5e9)
        # One kernel of a backward takes 2.5 times as long; the slowest may take twice that.
        assert seconds * 2.5 * 2 < Limits().sample_s
        # It still fills the machine, with 128 rows a block.
        assert call.batch * call.num_heads_q * 131072 / 128 > 8 * 40


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setenv("NUMFLASH_TUNED", "0")  # as in a child
    return worker.Worker(FakeDevice(), check_seqlens=(3, 5))


def _small(family, traits="float32-d32-dv32-vec"):
    return f"{family} {traits} causal q4 k8 bh2 g2"


@pytest.mark.parametrize(
    "problem, config, launched",
    [
        pytest.param(_small("forward"), CONFIG, ["forward"], marks=thorough),
        (_small("forward", "float16-d32-dv32-softcap-alibi"), CONFIG, ["forward"]),
        (_small("backward-dkdv"), CONFIG, ["backward-dkdv"]),
        pytest.param(_small("backward-dq"), CONFIG, ["backward-dq"], marks=thorough),
        (
            _small("backward", "float16-d32-dv32-vec"),
            "sm80-m16n16w1s1x2",
            ["backward", "reduce-dq"],
        ),
    ],
    ids=lambda value: value.partition(" full")[0] if isinstance(value, str) else None,
)
def test_a_worker_checks_and_times_a_kernel(served, monkeypatch, problem, config, launched):
    ran = _ran(monkeypatch)
    assert served.prepare(problem, config) == {"batch_heads": 2, "warm_ms": 0.25}
    assert served.device.launches == 2
    # Everything ran in the check and, before the first warm-up, to make what the kernel reads.
    backward = [family for family, _ in ran if family != "forward"]
    if backward:
        half = (len(backward) - 2 * len(launched)) // 2
        assert backward == 2 * backward[:half] + 2 * launched and "delta" in backward[:half]
    ran.clear()
    assert served.time(config) == {"ms": 0.25}
    assert [family for family, _ in ran] == launched
    assert ran[0][1] == config


@thorough
@pytest.mark.parametrize(
    "problem, config, launched",
    [
        (_small("forward", "float16-d64-dv64-vec-fp8"), "fp8-sm80-m16n32w1s1", ["forward"]),
        (
            _small("forward", "bfloat16-d64-dv64-softcap-fp8-keyscales"),
            "fp8-sm80-m16n32w1s2x2-packed",
            ["forward", "combine"],
        ),
    ],
    ids=lambda value: value.partition(" full")[0] if isinstance(value, str) else None,
)
def test_a_worker_checks_8_bit_floats_and_times_the_kernel_that_reads_codes(
    served, monkeypatch, problem, config, launched
):
    ran = _ran(monkeypatch)
    assert served.prepare(problem, config) == {"batch_heads": 2, "warm_ms": 0.25}
    # In the check, and before the first warm-up, q, k and v are quantised; never when timed.
    made = [family for family, _ in ran if family not in launched]
    assert made and len(made) % 2 == 0 and all("quantize" in each for each in made)
    ran.clear()
    assert served.time(config) == {"ms": 0.25}
    assert [family for family, _ in ran] == launched
    assert ran[0][1] == config


@thorough
def test_a_kernel_on_8_bit_floats_that_is_off_is_refused(served, monkeypatch):
    api = importlib.import_module("numflash.api.attention")
    right = api.attention

    def attention(*args, **options):
        out, lse = right(*args, **options)
        return out + np.float16(0.5), lse

    monkeypatch.setattr(api, "attention", attention)
    with pytest.raises(worker.RefusedError, match="out is off by") as caught:
        served.prepare(_small("forward", "float16-d64-dv64-vec-fp8"), "fp8-sm80-m16n32w1s1")
    assert caught.value.args[0] == "wrong_result" and served.device.launches == 0


@thorough
@pytest.mark.parametrize(
    "problem, config, launched",
    [
        pytest.param(
            "forward float32-d32-dv32-vec-ragged causal q8 k8 bh4 g2",
            *(CONFIG, ["forward"]),
            marks=thorough,
        ),
        (
            "forward float16-d32-dv32-vec-ragged full q1 k40 bh4 g2",
            "sm80-m16n16w1s1x2",
            ["forward", "combine"],
        ),
        ("combine float16-d32-dv32-vec-ragged full q1 k40 bh4 g2", "w2", ["combine"]),
        pytest.param(
            "backward-dkdv float32-d32-dv32-vec-ragged causal q8 k8 bh4 g2",
            *(CONFIG, None),
            marks=thorough,
        ),
        pytest.param(
            "backward-dq float16-d32-dv32-vec-ragged full q8 k8 bh4 g1",
            *("sm80-m16n16w1s1", None),
            marks=thorough,
        ),
        pytest.param(
            "forward float16-d32-dv32-vec-ragged-paged full q1 k40 bh4 g2 p16",
            *(CONFIG, ["forward"]),
            marks=thorough,
        ),
        (
            "forward float16-d32-dv32-vec-ragged-paged causal q4 k40 bh4 g2 p7",
            "sm80-m16n16w1s2x2",
            ["forward", "combine"],
        ),
    ],
    ids=lambda value: value.partition(" full")[0] if isinstance(value, str) else None,
)
def test_a_worker_checks_and_times_sequences(served, monkeypatch, problem, config, launched):
    served.check_seqlens = (3, 70)
    ran = _ran(monkeypatch)
    monkeypatch.setattr("tuner.lengths._HEADS", 2)
    assert served.prepare(problem, config) == {"batch_heads": 4, "warm_ms": 0.25}
    call, arrays = served._inputs[1:]
    assert call.sequences is not None and (call.page_size > 0) == ("page_table" in arrays)
    ran.clear()
    assert served.time(config) == {"ms": 0.25}
    assert [family for family, _ in ran] == (launched or [problem.split()[0]])


def test_a_wrong_page_is_a_wrong_result(served, monkeypatch):
    served.check_seqlens = (1, 40)
    made = worker.make_arrays

    def swapped(*args, **options):
        arrays = made(*args, **options)
        arrays["page_table"] = arrays["page_table"][:, ::-1].copy()
        return arrays

    read = check_module._gathered
    monkeypatch.setattr(check_module, "_gathered", lambda x, table: read(x, table[:, ::-1]))
    monkeypatch.setattr(worker, "make_arrays", swapped)
    problem = "forward float16-d32-dv32-vec-ragged-paged full q1 k32 bh2 g1 p16"
    with pytest.raises(worker.RefusedError, match="out is off by"):
        served.prepare(problem, CONFIG)


def test_a_wrong_result_is_refused(served, monkeypatch):
    api = importlib.import_module("numflash.api.attention")
    right = api.attention

    def attention(*args, **options):
        out, lse = right(*args, **options)
        return out + 1, lse

    monkeypatch.setattr(api, "attention", attention)
    with pytest.raises(worker.RefusedError) as caught:
        served.prepare(str(SMALL), CONFIG)
    outcome, reason = caught.value.args
    assert outcome == "wrong_result"
    assert reason.startswith("out is off by 1") and "allowed" in reason and "lse" not in reason
    assert served.device.launches == 0


def test_every_check_has_numbers_of_its_own(served, monkeypatch):
    seen = []
    checked = worker.check

    def check(q, k, v, **options):
        seen.append(q.copy())
        return checked(q, k, v, **options)

    monkeypatch.setattr(worker, "check", check)
    served.prepare(str(SMALL), CONFIG)
    served.prepare(str(SMALL), CONFIG)
    assert np.isfinite(seen[0]).all() and not (seen[0] == seen[1]).any()


def test_a_compiler_error_is_its_own_outcome(served, monkeypatch):
    def get_cubin(*args):
        raise RuntimeError("ptxas: syntax error")

    monkeypatch.setattr(worker, "SIMULATED", False)
    monkeypatch.setattr(worker, "get_cubin", get_cubin)
    with pytest.raises(worker.RefusedError) as caught:
        served.prepare(str(SMALL), CONFIG)
    assert caught.value.args == ("compile_failed", "RuntimeError: ptxas: syntax error")


@pytest.mark.parametrize(
    "error, outcome",
    [
        (MemoryError("too much"), "launch_failed"),
        (ValueError("no config"), "invalid"),
        (RuntimeError("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"), "launch_failed"),
        (worker.RefusedError("wrong_result", "off"), "wrong_result"),
    ],
)
def test_outcomes_of_errors(error, outcome):
    assert worker._failure(error)[0] == outcome


class OutOfMemoryError(RuntimeError):
    """As CuPy and PyTorch call theirs."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        OutOfMemoryError("no room"),
        RuntimeError("the CUDA driver reports CUDA_ERROR_OUT_OF_MEMORY"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_others_hold_does_not_condemn_the_machine_code(error):
    outcome, reason = worker._failure(error)
    assert outcome == "launch_failed"
    assert reason.startswith("out of memory: ") and str(error) in reason


def test_the_size_follows_from_the_whole_memory():
    needed = representative.timed(PROBLEM).num_bytes("forward")
    device = _roomy(FakeDevice(), num_sms=108)
    for memory, heads in ((math.ceil(needed / 0.35), 64), (needed / 0.35 - 8, 32)):
        device.memory = memory
        call = worker.Worker(device)._make_inputs(PROBLEM)
        assert call.batch * call.num_heads_q == heads


def test_where_memory_is_short_configs_are_bound_one_at_a_time(served, monkeypatch):
    bound = []

    def bind(family, config, *args):
        bound.append(config)
        if served._launches:
            raise MemoryError("the results of another config are in the way")
        return lambda: None

    monkeypatch.setattr(worker, "bind", bind)
    configs = [CONFIG, "m32n32w1"]
    for config in configs:
        served.prepare(str(SMALL), config)
    assert bound == [CONFIG, *["m32n32w1"] * 2]
    bound.clear()
    for config in (*configs, configs[1]):
        assert served.time(config) == {"ms": 0.25}
    assert bound == [CONFIG] * 2 + ["m32n32w1"] * 2
    served.drop()
    monkeypatch.setattr(worker, "bind", lambda *args: (_ for _ in ()).throw(MemoryError("no")))
    with pytest.raises(MemoryError):
        served.prepare(str(SMALL), CONFIG)


def test_what_a_backward_reads_is_made_once(served, monkeypatch):
    made = []
    attention = numflash.attention
    monkeypatch.setattr(
        launches.numflash, "attention", lambda *a, **o: (made.append(1), attention(*a, **o))[1]
    )
    problem = ProblemClass.parse(_small("backward-dq"))
    assert served._make_inputs(problem) == served._make_inputs(problem)
    assert len(made) == 1
    assert served._inputs[2].keys() == {"q", "k", "v", "dout", "out", "lse"}


def test_a_config_that_is_none_is_invalid(served):
    with pytest.raises(ValueError):
        served.prepare(str(SMALL), "m16")
    with pytest.raises(worker.RefusedError, match="delta"):
        served.prepare(str(SMALL).replace("forward", "delta"), "w8")


def _ran(monkeypatch):
    """The kernels that run from now on, by family."""
    ran = []
    launcher = importlib.import_module("numflash.calls.launch").Launcher
    original = launcher.bind

    def bind(self, operands):
        launch = original(self, operands)
        return lambda stream: (ran.append(str(self).split()[:2]), launch(stream))

    monkeypatch.setattr(launcher, "bind", bind)
    return ran


def test_a_combine_is_timed_alone_after_a_forward_in_parts(served, monkeypatch):
    problem = "combine float16-d32-dv32-vec full q8 k8 bh1 g1"
    ran = _ran(monkeypatch)
    assert served.prepare(problem, "w2")["warm_ms"] == 0.25
    # In the check, to make the parts, and to warm up twice.
    assert [family for family, _ in ran] == ["forward", "combine"] * 2 + ["combine"] * 2
    assert all("x2" in config for family, config in ran if family == "forward")
    ran.clear()
    served.time("w2")
    assert ran == [["combine", "w2"]]
    with pytest.raises(worker.RefusedError, match="does not split its keys"):
        served.prepare(str(SMALL).replace("forward", "combine"), "w2")


def test_a_split_forward_is_timed_with_its_combine(served, monkeypatch):
    problem, config = "forward float16-d32-dv32-vec full q8 k8 bh1 g1", "sm80-m16n16w1s1x2"
    ran = _ran(monkeypatch)
    served.prepare(problem, config)
    ran.clear()
    served.time(config)
    assert [family for family, _ in ran] == ["forward", "combine"]
    assert ran[0][1] == config


SERVER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.support.numpy_devices import FakeDevice
from tuner.measuring import worker
worker.serve(FakeDevice(), check_seqlens=(3, 5))
"""


@thorough
def test_a_worker_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path))
    limits, command = Limits(max_repeats=5), [sys.executable, "-c", SERVER]
    with DeviceMeasurer(command=command, limits=limits) as measurer:
        record = measurer.measure(SMALL, CONFIG, lambda samples: False)
        assert (record.outcome, record.samples_ms) == ("measured", (0.25,) * 5)
        wrong = measurer.measure(SMALL, "m16", lambda samples: False)
        assert wrong.outcome == "invalid"
        assert measurer.remeasure(SMALL, [CONFIG, "m16"], 2) == {CONFIG: [0.25] * 2, "m16": []}
