"""The calls that are timed and checked for a class are of that class, and fit."""

import math
from dataclasses import replace

import numpy as np
import pytest

from numflash.calls.forward import selection_of
from numflash.calls.fp8_forward import fp8_request_of
from numflash.problem.classes import ProblemClass
from numflash.problem.options import AttentionOptions
from numflash.problem.problem import describe
from numflash.runtime.arrays import library_of
from tests.support.numpy_devices import FakeDevice
from tuner import lengths
from tuner.measuring import representative
from tuner.measuring.launches import make_arrays

PROBLEM = ProblemClass.parse("forward float16-d64-dv64-vec causal q4096 k4096 bh64 g1")


def _arrays(call, family="forward"):
    return make_arrays(FakeDevice(), family, call, seed=0)


def _describe(call, arrays):
    views = {name: library_of(x, name).view(x, name) for name, x in arrays.items()}
    if call.is_fp8:
        request, _ = fp8_request_of(views, AttentionOptions(**call.options))
        return request.problem, selection_of(request, None).forward.traits
    problem, tensors = describe(views, AttentionOptions(**call.options))
    return problem, problem.traits(all(tensor.is_vectorizable for tensor in tensors.values()))


CLASSES = [
    "forward float16-d64-dv64-vec full q64 k64 bh2 g1",
    "forward float16-d64-dv64-vec causal q64 k64 bh64 g1",
    "forward bfloat16-d128-dv64-vec causal q1 k256 bh8 g4".replace("causal q1", "full q1"),
    "forward float32-d32-dv32-vec-tf32 full q32 k64 bh1 g1",
    "forward float32-d32-dv32 window16 q128 k128 bh4 g2",
    "forward float16-d32-dv64-softcap-alibi-vec window32 q128 k64 bh4 g4",
    "forward float16-d32-dv32-alibi causal q64 k64 bh4 g1",
    "forward float16-d64-dv64-alibi-sinks-vec full q64 k64 bh4 g1",
    "backward-dq float16-d64-dv64-sinks-vec causal q64 k64 bh4 g2",
    "forward float16-d64-dv64-sinks-dropout-vec full q64 k64 bh4 g2",
    "forward float16-d32-dv32 window128 q64 k64 bh2 g1",
    "backward-dq float16-d32-dv32-vec window1 q64 k64 bh2 g1",
    "forward float16-d64-dv64-vec-ragged causal q64 k64 bh256 g2",
    "forward float16-d64-dv64-softcap-ragged full q64 k128 bh64 g1",
    "forward bfloat16-d64-dv64-vec-ragged full q1 k128 bh128 g4",
    "backward-dkdv float16-d64-dv64-vec-ragged window16 q64 k64 bh128 g1",
    "forward float16-d64-dv64-vec-ragged-paged full q1 k128 bh256 g8 p16",
    "forward float16-d32-dv64-ragged-paged causal q4 k128 bh64 g1 p7",
    "forward float16-d64-dv128-vec-fp8 causal q64 k64 bh4 g2",
    "forward bfloat16-d64-dv64-softcap-fp8 window16 q128 k128 bh4 g1",
    "forward bfloat16-d64-dv64-vec-fp8-keyscales full q64 k64 bh2 g1",
]


@pytest.mark.parametrize("text", CLASSES)
def test_the_timed_call_is_of_its_class(text):
    wanted = ProblemClass.parse(text)
    call = representative.timed(wanted)
    problem, traits = _describe(call, _arrays(call))
    assert str(ProblemClass.of(wanted.family, problem, traits)) == text


@pytest.mark.parametrize("text", CLASSES)
def test_the_checked_call_is_of_the_same_kernel_and_odd(text):
    wanted = ProblemClass.parse(text)
    call = representative.checked(wanted)
    problem, traits = _describe(call, _arrays(call))
    assert traits == wanted.traits
    assert ProblemClass.of(wanted.family, problem, traits).mask.rstrip("0123456789") == (
        wanted.mask.rstrip("0123456789")
    )
    assert call.head_dim < traits.head_dim and call.head_dim_v < traits.head_dim_v
    if call.sequences is None:
        assert call.seqlen_q % 2 == call.seqlen_k % 2 == 1
    else:
        assert 0 in call.sequences.seqlens_k and max(call.sequences.seqlens_k) % 2 == 1
    assert traits.vectorized or call.head_dim % 2 == call.head_dim_v % 2 == 1


def test_the_checked_call_is_large_where_the_class_is():
    call = representative.checked(PROBLEM)
    assert (call.seqlen_q, call.seqlen_k) == (113, 257)


@pytest.mark.parametrize("batch_heads, group, heads", [(64, 1, 32), (64, 64, 64), (4, 2, 4)])
def test_heads_of_the_timed_call(batch_heads, group, heads):
    text = f"forward float16-d64-dv64-vec full q64 k64 bh{batch_heads} g{group}"
    call = representative.timed(ProblemClass.parse(text))
    assert (call.num_heads_q, call.num_heads_kv) == (heads, heads // group)
    assert call.batch * call.num_heads_q == batch_heads


def test_sequences_of_a_class_are_long_tailed_and_always_the_same():
    packed = ProblemClass.parse("forward float16-d64-dv64-vec-ragged causal q64 k256 bh2048 g2")
    q, k = representative.timed(packed).sequences
    assert sum(q) == 64 * 64 and sum(k) == 64 * 256 and min(q + k) >= 1
    assert max(k) > 4 * sorted(k)[32] and [a <= b for a, b in zip(q, k, strict=True)].count(0) == 0
    assert lengths.long_tailed.__wrapped__(64, 256) == k
    assert lengths.long_tailed(3, 1) == (1, 1, 1)
    paged = replace(packed, traits=replace(packed.traits, paged=True), page_size=48)
    call = representative.timed(paged)
    assert call.sequences.seqlens_q == (64,) * 64
    assert call.seqlen_k == max(call.sequences.seqlens_k) == 240
    table = call.of_sequences()["page_table"]
    assert sorted(table.ravel()) == list(range(64 * 5)) and (np.diff(table) != 1).any()


def test_work_of_sequences_is_that_of_each():
    text = "forward float16-d64-dv64-vec-ragged full q64 k64 bh128 g1"
    call = representative.timed(ProblemClass.parse(text))
    squares = sum(n * n for n in call.sequences.seqlens_k)
    assert call.multiply_adds(None) == 32 * squares * 128 > 1.1 * 32 * 4 * 64 * 64 * 128


def test_a_group_must_divide_the_heads():
    odd = ProblemClass.parse("forward float16-d64-dv64-vec full q64 k64 bh4 g8")
    with pytest.raises(ValueError, match="group size, 8, got 4"):
        representative.timed(odd)


def test_a_call_is_made_smaller_until_it_fits():
    whole = representative.timed(PROBLEM)
    needed = whole.num_bytes("forward")
    assert needed == 64 * 4096 * (4 * 64 * 2 + 4)
    assert representative.fitting(PROBLEM, needed, math.inf) == whole
    halved = representative.fitting(PROBLEM, needed - 1, math.inf)
    assert halved.batch * halved.num_heads_q == 32
    grouped = ProblemClass.parse("forward float16-d64-dv64-vec full q4096 k4096 bh64 g16")
    assert representative.fitting(grouped, needed / 4, math.inf).num_heads_q == 16
    with pytest.raises(MemoryError, match="16 heads"):
        representative.fitting(grouped, 1000, math.inf)


def test_a_call_is_made_smaller_until_it_is_quick():
    work = 64 * 4096 * 4096 * 128
    assert representative.timed(PROBLEM).multiply_adds(PROBLEM.window) == work
    assert representative.fitting(PROBLEM, math.inf, work) == representative.timed(PROBLEM)
    halved = representative.fitting(PROBLEM, math.inf, work - 1)
    assert halved.batch * halved.num_heads_q == 32
    assert representative.fitting(PROBLEM, math.inf, 1).num_heads_q == 1
    window = replace(PROBLEM, mask="window256")
    assert representative.fitting(window, math.inf, work / 16) == representative.timed(window)


def test_gradients_take_memory_too():
    backward = ProblemClass.parse("backward-dq float16-d64-dv64-vec full q64 k64 bh1 g1")
    call = representative.timed(backward)
    arrays = 8 * 64 * 64 * 2
    assert call.num_bytes("backward-dq") == arrays + 3 * 4 * 64


def test_memory_holds_codes_and_scales_beside_the_arrays_that_are_quantised():
    text = "forward float16-d64-dv64-vec{} full q512 k1024 bh4 g2"
    plain, fp8 = (
        representative.timed(ProblemClass.parse(text.format(each))) for each in ("", "-fp8")
    )
    codes = 4 * 512 * 64 + 2 * 1024 * (64 + 64)
    more = fp8.num_bytes("forward") - plain.num_bytes("forward")
    assert codes < more <= codes + 4 * (4 * 512 + 2 * 2 * 1024)
