"""The measurement of a point, with NumPy for a device: order, statistics, checks, failures."""

import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from bench.measuring import agreement, measure
from bench.peers import methods as peers
from bench.peers import standard
from bench.peers.methods import Peer
from bench.points import interleave
from bench.points.interleave import Method
from bench.points.points import Point
from bench.records.entries import is_right
from numflash import reference
from tests.support.numpy_devices import NumpyDevice

FORWARD = Point("forward", "grid", "float16", 2, 40, 40, 2, 2, 16, True)
BACKWARD = replace(FORWARD, direction="backward")


def _exact(point, inputs):
    """A method that is right."""
    q, k, v = (inputs[name] for name in "qkv")
    if point.direction == "backward":
        names, call = ("dq", "dk", "dv"), reference.attention_backward
        found = call(inputs["dout"], q, k, v, causal=point.causal)
    else:
        names, found = ("out",), reference.attention(q, k, v, causal=point.causal)[:1]
    results = {n: x.astype(np.float16) for n, x in zip(names, found, strict=True)}
    return Method("exact", lambda: results)


def _wrong(point, inputs):
    results = _exact(point, inputs).call()
    name = list(results)[-1]
    results[name] = results[name].copy()
    results[name][-1, -1, -1] += np.float16(0.25)
    return Method("wrong", lambda: results)


class OutOfMemoryError(Exception):
    pass


def _raise(error):
    def prepare(point, inputs):
        raise error

    return prepare


@pytest.fixture
def fakes(monkeypatch):
    """Peers of the tests' own; a function that adds one."""
    monkeypatch.setattr(peers, "PEERS", {})

    def add(name, prepare, modules=()):
        peers.PEERS[name] = Peer(name, modules, prepare)

    add("numflash", _exact)
    return add


def _measure(point, device=None, exclude=None, deadline=None, begun=None):
    return measure.measure_point(
        device or NumpyDevice(),
        point,
        list(peers.PEERS),
        exclude=exclude or {},
        begin=(begun if begun is not None else []).append,
        deadline=deadline or time.monotonic() + 60,
        budget_ms=0,
    )


# Order and statistics


def test_every_round_runs_every_method_in_another_order():
    clock = iter(range(10_000))
    order = []

    def timer(method):
        order.append(method.name)
        return float(next(clock))

    methods = [Method(name, lambda: None) for name in "abc"]
    samples = interleave.time_interleaved(
        methods, timer, budget_ms=0, on_failure=pytest.fail, rounds=8
    )
    assert order[:6] == ["a", "a", "b", "b", "c", "c"], "warm-ups"
    rounds = [tuple(order[i : i + 3]) for i in range(6, len(order), 3)]
    assert len(rounds) == 8 and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 1
    assert {len(times) for times in samples.values()} == {8}
    assert min(map(min, samples.values())) == 6, "no warm-up is a sample"


def test_a_method_that_fails_is_not_run_again():
    calls, failures = [], {}

    def timer(method):
        calls.append(method.name)
        if method.name == "bad" and len(calls) > 6:
            raise ValueError("no more")
        return 2.0

    methods = [Method(name, lambda: None) for name in ("good", "bad")]
    samples = interleave.time_interleaved(
        methods, timer, budget_ms=0, on_failure=failures.setdefault, rounds=9
    )
    assert list(samples) == ["good"] and len(samples["good"]) == 9
    assert str(failures["bad"]) == "no more"
    # Twice to warm up, two or three rounds, and never after it failed.
    assert calls.count("bad") in (4, 5)


@pytest.mark.parametrize(
    "warm, budget, rounds",
    [({"a": 1.0, "b": 1.0}, 30, 15), ({"a": 100.0}, 30, 7), ({"a": 0.01}, 30, 25), ({}, 30, 25)],
)
def test_rounds_fit_the_time(warm, budget, rounds):
    assert interleave.num_rounds(warm, budget) == rounds


def test_statistics_by_hand():
    summary = interleave.summarise([5.0, 1.0, 2.0, 4.0, 3.0])
    assert summary == {"median_ms": 3.0, "quartiles_ms": [2.0, 4.0], "rounds": 5}
    # Round by round 2, 2 and 8 times: a drift that both share does not matter.
    assert interleave.paired_ratio([1.0, 10.0, 1.0], [2.0, 20.0, 8.0]) == 2.0
    assert interleave.geometric_mean([2.0, 0.5, 8.0]) == pytest.approx(2.0)
    with pytest.raises(ValueError):
        interleave.geometric_mean([])


# Whether results are right


@pytest.mark.parametrize("causal", [False, True])
def test_the_float32_reference_is_the_float64_one(monkeypatch, causal):
    monkeypatch.setattr(agreement, "_ROWS", 16)  # several blocks of rows, the last one short
    rng = np.random.default_rng(0)
    q, do = (rng.standard_normal((1, 40, 1, 16)).astype(np.float32) for _ in range(2))
    k, v = (rng.standard_normal((1, 56, 1, 16)).astype(np.float32) for _ in range(2))
    heads = q[0, :, 0], k[0, :, 0], v[0, :, 0]
    out = agreement.forward(np, *heads, causal)
    np.testing.assert_allclose(
        out, reference.attention(q, k, v, causal=causal)[0][0, :, 0], atol=1e-5
    )
    found = agreement.backward(np, do[0, :, 0], *heads, causal)
    expected = reference.attention_backward(do, q, k, v, causal=causal)
    for got, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, exact[0, :, 0], atol=1e-5)


def _samples(point):
    device = NumpyDevice()
    shapes = {"q": point.q_shape, "k": point.kv_shape, "v": point.kv_shape}
    if point.direction == "backward":
        shapes["dout"] = point.q_shape
    inputs = {n: device.normal(s, point.dtype, i) for i, (n, s) in enumerate(shapes.items())}
    samples = agreement.make_samples(np, point, device.round_to(point.dtype), **inputs)
    return inputs, samples


@pytest.mark.parametrize("point", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_right_results_pass_and_wrong_ones_do_not(point):
    inputs, samples = _samples(point)
    assert [(s.batch, s.head) for s in samples] == [(0, 0), (1, 1)]
    results = _exact(point, inputs).call()
    right = agreement.compare(results, samples)
    assert right["outcome"] == "checked"
    assert all(right["errors"][n] <= right["budgets"][n] for n in results)
    for name in results:
        for where, value in (((0, 3, 0, 5), 0.25), ((-1, -1, -1, -1), np.nan)):
            changed = results[name].copy()
            changed[where] += np.float16(value)
            checked = agreement.compare({**results, name: changed}, samples)
            assert checked["outcome"] == "failed", (name, where)
    assert checked["errors"][name] == "not finite"


def test_without_a_budget_nothing_passes():
    # As where the naive implementation overflows.
    inputs, samples = _samples(FORWARD)
    samples = [replace(sample, budgets={"out": np.nan}) for sample in samples]
    results = _exact(FORWARD, inputs).call()
    assert agreement.compare(results, samples)["outcome"] == "failed"


def test_a_wrong_shape_fails():
    inputs, samples = _samples(FORWARD)
    out = _exact(FORWARD, inputs).call()["out"]
    assert agreement.compare({"out": out[:, :-1]}, samples)["outcome"] == "failed"


def test_the_sample_of_grouped_heads_takes_their_own_keys():
    point = replace(FORWARD, num_heads_q=4, num_heads_kv=2)
    inputs, samples = _samples(point)
    assert [(s.head, s.head_kv) for s in samples] == [(0, 0), (3, 1)]
    results = _exact(point, inputs).call()
    assert agreement.compare(results, samples)["outcome"] == "checked"
    with pytest.raises(ValueError, match="one head of K and V"):
        _samples(replace(BACKWARD, num_heads_q=4, num_heads_kv=2))


# The implementations without FlashAttention's ideas


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["whole_matrix", "whole_rows", "two_passes", "one_pass"])
def test_each_cupy_forward_is_attention(monkeypatch, name, causal):
    monkeypatch.setattr(standard, "ROWS", 16)
    monkeypatch.setattr(standard, "KEYS", 12)
    point = replace(FORWARD, causal=causal, seqlen_k=48)
    inputs, samples = _samples(point)
    heads_first = {n: x.transpose(0, 2, 1, 3) for n, x in inputs.items()}
    results = getattr(standard, name)(point, **heads_first)()
    assert agreement.compare(results, samples)["outcome"] == "checked"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["whole_matrix", "whole_matrix_recomputed"])
def test_each_cupy_backward_is_the_gradient(name, causal):
    point = replace(BACKWARD, causal=causal)
    inputs, samples = _samples(point)
    heads_first = {n: x.transpose(0, 2, 1, 3) for n, x in inputs.items()}
    call = getattr(standard, name)(point, **heads_first)
    assert agreement.compare(call(), samples)["outcome"] == "checked"
    assert agreement.compare(call(), samples)["outcome"] == "checked", "a second call"


# A point


def test_what_is_right_is_timed_and_compared(fakes):
    fakes("slow", _exact)
    result = _measure(FORWARD, NumpyDevice({"numflash": 2.0, "slow": 3.0}))
    ours = result["methods"]["numflash"]
    assert (ours["status"], ours["median_ms"], ours["peak_bytes"]) == ("measured", 2.0, 123)
    assert ours["check"]["outcome"] == "checked"
    assert len(ours["samples_ms"]) == ours["rounds"] == 7
    assert ours["tflops"] == pytest.approx(4 * 2 * 2 * 40 * 20 * 16 / 2e9)
    assert result["ratios"] == {"slow": 1.5}
    assert result["timed"][0] <= result["timed"][1]


@pytest.mark.parametrize("point", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_a_wrong_result_has_no_ratio(fakes, monkeypatch, point):
    monkeypatch.setattr(measure._Run, "_add_forward", lambda self, name: None)
    fakes("wrong", _wrong)
    result = _measure(point)
    assert result["methods"]["wrong"]["check"]["outcome"] == "failed"
    assert not is_right(result["methods"]["wrong"])
    assert result["ratios"] == {}


def test_every_failure_is_an_entry_with_its_reason(fakes):
    fakes("absent", _exact, ("a_package_that_does_not_exist",))
    fakes("unable", _raise(NotImplementedError("head_dim 16")))
    fakes("greedy", _raise(OutOfMemoryError("tried to allocate 17 GiB")))
    fakes("fine", _exact)
    begun = []
    methods = _measure(FORWARD, begun=begun)["methods"]
    assert {name: m["status"] for name, m in methods.items()} == {
        "numflash": "measured",
        "absent": "unavailable",
        "unable": "failed",
        "greedy": "out of memory",
        "fine": "measured",
    }
    assert "a_package_that_does_not_exist" in methods["absent"]["reason"]
    assert methods["unable"]["reason"] == "NotImplementedError: head_dim 16"
    assert "17 GiB" in methods["greedy"]["reason"]
    assert begun[:5] == list(methods)


def test_a_method_that_fails_while_timed_is_an_entry_too(fakes):
    calls = []

    def prepare(point, inputs):
        method = _exact(point, inputs)

        def call():
            calls.append(1)
            if len(calls) > 4:
                raise OutOfMemoryError("later")
            return method.call()

        return Method("late", call)

    fakes("late", prepare)
    methods = _measure(FORWARD)["methods"]
    assert methods["numflash"]["rounds"] == 7
    assert methods["late"]["status"] == "out of memory"
    assert not is_right(methods["late"])


def test_what_had_no_memory_next_to_the_others_is_tried_alone(fakes):
    alone = []

    def prepare(point, inputs):
        alone.append(1)
        if len(alone) == 1:
            raise OutOfMemoryError("the others hold it")
        return _exact(point, inputs)

    fakes("large", prepare)
    fakes("other", _exact)
    device = NumpyDevice({"numflash": 1.0, "large": 4.0})
    result = _measure(FORWARD, device)
    assert result["methods"]["large"]["status"] == "measured"
    assert result["methods"]["large"]["alone"] is True
    assert result["ratios"]["large"] == 4.0


def test_a_broken_device_ends_the_process(fakes):
    device = NumpyDevice()

    def prepare(point, inputs):
        device.is_broken = True
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    fakes("fatal", prepare)
    with pytest.raises(measure.BrokenDeviceError, match="ILLEGAL_ADDRESS"):
        _measure(FORWARD, device)


def test_what_has_crashed_is_left_out(fakes):
    fakes("crasher", _raise(AssertionError("must not run")))
    methods = _measure(FORWARD, exclude={"crasher": "the process died"})["methods"]
    assert methods["crasher"] == {"status": "crashed", "reason": "the process died"}


def test_after_the_deadline_methods_are_left_out(fakes):
    methods = _measure(FORWARD, deadline=time.monotonic() - 1)["methods"]
    assert methods["numflash"] == {"status": "left out", "reason": "out of time"}


def test_the_context_is_entered_for_every_call(fakes):
    inside = []

    @contextmanager
    def context():
        inside.append(True)
        yield
        inside.pop()

    def prepare(point, inputs):
        method = _exact(point, inputs)

        def call():
            assert inside
            return method.call()

        return Method("guarded", call, context)

    fakes("guarded", prepare)
    assert _measure(FORWARD)["methods"]["guarded"]["status"] == "measured"


def test_host_time_has_a_reason_where_it_fails(fakes):
    fakes("absent", _exact, ("a_package_that_does_not_exist",))
    fakes("unable", _raise(ValueError("no")))
    peers.PEERS["numflash"] = Peer(
        "numflash", (), lambda point, inputs: Method("m", lambda: time.sleep(1e-4))
    )
    device = NumpyDevice()
    device.normal = lambda shape, dtype, seed: np.zeros(shape)
    found = measure.host_microseconds(device, list(peers.PEERS), lambda name: None)
    assert found["numflash"]["median_us"] >= 100
    assert "not importable" in found["absent"]["reason"]
    assert found["unable"]["reason"] == "ValueError: no"


# Names of peers


def test_peers_by_name():
    assert peers.chosen("all") == list(peers.PEERS)
    assert peers.chosen("triton, cupy") == ["numflash", "triton", "cupy"]
    assert peers.find("numflash:sm80-m64n64w4s1").modules == ("numflash",)
    assert peers.find("cupy:two_passes").modules == ("cupy",)
    for wrong in ("nobody", "numflash:", "torch:x"):
        with pytest.raises(ValueError, match="peer must be one of"):
            peers.chosen(wrong)


def test_a_variant_passes_its_config(monkeypatch):
    import numflash

    seen = []
    monkeypatch.setattr(numflash, "attention", lambda *a, **o: seen.append(o))
    monkeypatch.setattr(
        numflash, "attention_backward", lambda *a, **o: seen.append(o) or (0, 0, 0)
    )
    inputs = dict.fromkeys(("q", "k", "v", "dout", "out", "lse"), 0)
    peers.find("numflash:m64n64w4").prepare(FORWARD, inputs).call()
    both = "numflash:backward-dkdv=m32n64w4,backward-dq=m64n32w4"
    peers.find(both).prepare(BACKWARD, inputs).call()
    peers.find("numflash").prepare(FORWARD, inputs).call()
    assert seen == [
        {"causal": True, "config": "m64n64w4"},
        {"causal": True, "config": {"backward-dkdv": "m32n64w4", "backward-dq": "m64n32w4"}},
        {"causal": True},
    ]
