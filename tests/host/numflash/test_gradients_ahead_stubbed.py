"""Kernels of gradients explained, compiled ahead and planned are those that calls launch."""

import pytest

import numflash
from numflash.runtime.mode import SIMULATED
from tests.support.fake_gpu import DV, HKV, SK, SQ, B, D, H

pytestmark = pytest.mark.skipif(SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM unset")


def table(score, batch, head, q_idx, kv_idx, of_distances):
    return score + of_distances[head, abs(q_idx - kv_idx)]


def gate(score, batch, head, q_idx, kv_idx, of_heads):
    return score * of_heads[head]


def of_lse(dtype="float32"):
    return (B, H, SQ), dtype


# Options of the forward, options of gradients, and families that must be among the kernels; pairs
# (shape, dtype) are arrays.
CASES = {
    "default": ({}, {}, ["delta", "backward-dkdv", "backward-dq"]),
    "dq": ({}, {"wrt": ("q",)}, ["delta", "backward-dq"]),
    "given delta": ({}, {"delta": of_lse(), "dlse": of_lse()}, ["delta"]),
    "slopes": (
        {"alibi_slopes": ((H,), "float32")},
        {"wrt": ("alibi_slopes",)},
        ["backward-rows", "array-sums"],
    ),
    "slopes by batch": (
        {"alibi_slopes": ((B, H + 2), "float32"), "origin": (0, 0, 1)},
        {"wrt": ["alibi_slopes", "q"]},
        ["backward-rows", "backward-dq", "clear-sums", "array-sums"],
    ),
    "sinks": ({"sinks": ((H,), "float32"), "out_dtype": "float32"}, {}, ["array-sums"]),
    "bias of keys": (
        {"bias": ((1, H, 1, SK), "float16"), "causal": True},
        {"wrt": ("bias", "v")},
        ["backward-columns", "backward-dkdv", "array-sums"],
    ),
    "bias of queries": (
        {"bias": ((SQ, 1), "float32"), "dropout_p": 0.5, "seed": 3},
        {"wrt": ("bias",), "grad_dtype": "float32"},
        ["backward-rows", "array-sums"],
    ),
    "bias of scores": ({"bias": ((H, SQ, SK), "float16")}, {"wrt": ("bias",)}, ["backward-tiles"]),
    "gate": (
        {"score_mod": gate, "aux": (((H,), "float32"),), "softcap": 5.0},
        {"wrt": ("aux0",)},
        ["backward-rows", "array-sums"],
    ),
    "table": (
        {"score_mod": table, "aux": (((H, SQ + SK), "float32"),)},
        {"wrt": ("q", "aux0"), "grad_dtype": "float32"},
        ["backward-rows", "clear-sums", "backward-scatter", "round-sums"],
    ),
    "forced": (
        {},
        {"config": {"forward": "sm75-m64n32w4s1", "backward": "sm75-m32n32w2s2"}},
        ["delta", "backward", "reduce-dq"],
    ),
}
each_case = pytest.mark.parametrize(
    ("options", "asked", "families"), CASES.values(), ids=CASES.keys()
)


@pytest.fixture
def made(gpu):
    """A function that makes arrays of the pairs among options."""

    def of(value):
        if not isinstance(value, tuple):
            return value
        is_array = len(value) == 2 and isinstance(value[0], tuple)
        return gpu.array(*value) if is_array else tuple(map(of, value))

    return lambda options: {name: of(value) for name, value in options.items()}


@pytest.fixture
def run(gpu, qkv):
    """A function that runs a call and its gradients."""

    def both(options, asked):
        asked = dict(asked)
        configs = asked.pop("config", {})
        forward = {n: x for n, x in configs.items() if n == "forward"}
        backward = {n: x for n, x in configs.items() if n != "forward"}
        out, lse = numflash.attention(*qkv, return_lse=True, config=forward, **options)
        dout = gpu.array((B, SQ, H, DV))
        gpu.driver.launches.clear()
        options = {n: x for n, x in options.items() if n != "out_dtype"}
        return numflash.attention_backward(
            dout, *qkv, out, lse, config=backward, **options, **asked
        )

    return both


def launched(gpu) -> list[str]:
    return [f"{each.family} {each.config} {each.traits}" for each in gpu.driver.launches]


@each_case
def test_kernels_of_gradients_are_explained(gpu, qkv, made, run, options, asked, families):
    options, asked = made(options), made(asked)
    explanation = numflash.explain_dispatch(*qkv, **options, **asked)
    assert not gpu.driver.kernels
    run(options, asked)
    found = explanation.of_backward.values()
    assert [f"{x.family} {x.config} {x.traits}" for x in found] == launched(gpu)
    assert {x.family for x in found} >= {*families}
    for name, choice in explanation.of_backward.items():
        assert f"\n{name}: {choice.config} ({choice.config.implementation})" in str(explanation)


@each_case
def test_kernels_of_gradients_are_compiled_ahead(
    gpu, made, compiled, run, options, asked, families
):
    options, asked = made(options), made(asked)
    sizes = {"seqlen_q": SQ, "seqlen_k": SK, "batch": B, "num_heads": H, "num_heads_kv": HKV}
    numflash.warmup("float16", D, DV, backward=True, **sizes, **options, **asked)
    ahead = list(compiled)
    assert {kernel.split("|")[0] for kernel in ahead} >= {*families, "forward"}
    gpu.driver.calls.clear()
    run(options, asked)
    assert list(compiled) == ahead
    assert {name for name, *_ in gpu.driver.calls} == {"cuLaunchKernel"}
    assert {kernel for _, kernel in gpu.driver.calls} == {*ahead}


@each_case
def test_a_plan_launches_the_kernels_of_gradients(gpu, qkv, made, run, options, asked, families):
    options, asked = made(options), made(asked)
    gradients = run(options, asked)
    expected = launched(gpu)
    plan = numflash.plan(*qkv, dout=gpu.array((B, SQ, H, DV)), **options, **asked)
    assert [(x.shape, x.dtype) for x in plan.gradients] == [(x.shape, x.dtype) for x in gradients]
    for stream in (None, 7):
        gpu.driver.launches.clear()
        gpu.cupy.allocations.clear()
        plan.launch()
        of_forward = len(gpu.driver.launches)
        assert plan.launch_backward(stream) is plan.gradients
        assert launched(gpu)[of_forward:] == expected and not gpu.cupy.allocations
        if stream is not None:
            assert {x.stream for x in gpu.driver.launches[of_forward:]} == {stream}
    begins = [x for x in gpu.driver.launches if x.family == "delta"]
    assert all(x.arguments["of_rows.delta" if "delta" in asked else "out"] for x in begins)


def test_flags_stand_for_arrays_of_any_numbers(gpu, qkv, compiled, run):
    """By True the same kernels are compiled as for arrays."""
    flags = {"alibi": True, "sinks": True, "softcap": True, "dropout": True}
    asked = {"dlse": True, "delta": True, "wrt": ("k", "sinks", "alibi_slopes")}
    sizes = {"seqlen_q": SQ, "seqlen_k": SK, "batch": B}
    numflash.warmup("float16", D, DV, backward=True, **sizes, **flags, **asked)
    ahead = {*compiled}
    heads, of_rows = gpu.array((H,), "float32"), gpu.array((B, H, SQ), "float32")
    options = {"alibi_slopes": heads, "sinks": heads, "softcap": 3.0, "dropout_p": 0.1, "seed": 4}
    run(options, asked | {"dlse": of_rows, "delta": of_rows})
    assert {*compiled} == ahead
    compiled.clear()
    numflash.warmup("float16", D, DV, alibi=False, sinks=False, softcap=False, dropout=False)
    assert list(compiled) and not any("alibi" in kernel for kernel in compiled)


def test_few_queries_of_a_group_have_kernels_of_their_own(hopper, compiled):
    """Heads that share K and V are packed into a tile, and keys are split."""
    sizes = {"seqlen_q": 8, "seqlen_k": 65536, "num_heads": 32, "num_heads_kv": 4}
    numflash.warmup("float16", 128, **sizes)
    ahead = {*compiled}
    for batch in (1, 2, 256):
        q, k = hopper.array((batch, 8, 32, 128)), hopper.array((batch, 65536, 4, 128))
        numflash.attention(q, k, k)
    assert {*compiled} == ahead and any(kernel.startswith("combine") for kernel in ahead)


def test_what_is_compiled_ahead_is_neither_captured_nor_tuned(gpu, monkeypatch):
    from numflash.selection import choice

    def refuse(*_):
        raise AssertionError("sizes that nobody asked for were noted")

    monkeypatch.setattr(choice.capture, "note", refuse)
    monkeypatch.setattr(choice.autotune, "tune", refuse)
    numflash.warmup("float16", D, backward=True)
