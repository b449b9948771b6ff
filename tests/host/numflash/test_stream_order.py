"""All that a call does comes in the order of its stream, whatever libraries its arrays are of.

Arrays of a library that is seen through CuPy are taken before the launches, and results given to
it after them: at each exchange the other library is told of CuPy's current stream, which must be
the call's then. See `tests.fake_gpu`.
"""

import sys
import types

import pytest

import numflash
from numflash.runtime.mode import SIMULATED
from tests.support import fake_arrays, fake_gpu

pytestmark = pytest.mark.skipif(SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM unset")

B, S, H, D = 2, 100, 4, 128
# The stub's current streams of CuPy and PyTorch, and one of the caller's.
CUPYS, TORCHS, OWN = 0x5000, 0x6000, 0xABC0


@pytest.fixture
def gpu(monkeypatch):
    """A fake H200."""
    return fake_gpu.install(monkeypatch, (9, 0), num_sms=132, l2_bytes=50 * 2**20)


@pytest.fixture
def log():
    """The exchanges so far."""
    return []


@pytest.fixture
def foreign(gpu, log):
    """Makes an array of a library that speaks DLPack."""

    def make(shape, dtype="float16", device=0):
        return fake_arrays.ForeignArray(gpu.array(shape, dtype, device), gpu, log)

    return make


def forward(make, **options):
    q = make((B, S, H, D))
    return numflash.attention(q, q, q, return_lse=True, **options)


def decode(make, **options):
    """Split keys: a forward and a combine."""
    q, k = make((1, 1, H, D)), make((1, 65536, H, D))
    return numflash.attention(q, k, k, return_lse=True, **options)


def backward(make, **options):
    q = make((B, S, H, D))
    lse = make((B, H, S), "float32")
    return numflash.attention_backward(q, q, q, q, q, lse, **options)


def fused_backward(make, **options):
    q = make((B, S, H, D))
    lse = make((B, H, S), "float32")
    options["config"] = {"backward": "sm80-m32n128w8s2"}
    return numflash.attention_backward(q, q, q, q, q, lse, **options)


def fp8(make, **options):
    return forward(make, precision="fp8", **options)


def fp8_cache(make, **options):
    k8 = numflash.quantize_fp8(make((B, S, H, D)), **options)
    return numflash.attention(make((B, S, H, D)), k8, make((B, S, H, D)), **options)


def auto(make, **options):
    q = make((B, S, H, D))
    options |= {"precision": "auto", "return_lse": True, "return_decision": True}
    out, lse, decision = numflash.attention(q, q, q, **options)
    return out, lse, decision.in_fp8, decision.estimated_error


def quantize(make, **options):
    x = numflash.quantize_fp8(make((B, S, H, D)), "tensor", **options)
    return x.data, x.descale


def dequantize(make, **options):
    x = numflash.quantize_fp8(make((B, S, H, D)), **options)
    return numflash.dequantize_fp8(x, **options)


def rotary(make, **options):
    q = make((B, S, H, D))
    cos, sin, offsets = make((S, 8), "float32"), make((S, 8), "float32"), make((B,), "int32")
    return (numflash.apply_rotary(q, cos, sin, offsets=offsets, **options),)


def planned(make, **options):
    """A plan gives its results once when it is made, and after each launch."""
    q = make((B, S, H, D))
    plan = numflash.plan(q, q, q, precision="auto", **options)
    for _ in range(2):
        assert plan.launch() is plan.out
        yield plan.out, plan.lse, plan.decision.in_fp8, plan.decision.estimated_error


CALLS = [forward, decode, backward, fused_backward, fp8, fp8_cache, auto, quantize, dequantize]
CALLS += [rotary]


@pytest.mark.parametrize("device", [0, 1])
@pytest.mark.parametrize("stream", [None, OWN])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_results_are_given_after_the_launches_and_on_their_stream(
    gpu, foreign, log, call, stream, device
):
    gpu.driver.device = 0
    call(lambda *a: foreign(*a, device=device), stream=stream)
    launches = gpu.driver.launches
    assert {run.stream for run in launches} == {stream or CUPYS}
    given = [each for each in log if each.kind == "given"]
    assert given and {(each.stream, each.device) for each in given} == {(stream or CUPYS, device)}
    # A call of two functions gives between their launches, too.
    assert given[-1].launches == len(launches)
    assert given[0].launches > 0
    taken = [each for each in log if each.kind == "taken"]
    assert (taken[-1].stream, taken[-1].device) == (stream or CUPYS, device)
    assert gpu.cupy.current.device == 0 and gpu.cupy.current.stream == CUPYS


@pytest.mark.parametrize("call", [forward, decode, backward, fused_backward, fp8, auto, quantize])
@pytest.mark.parametrize("stream", [None, OWN])
def test_nothing_is_given_before_the_last_launch_of_a_call(gpu, foreign, log, call, stream):
    results = call(foreign, stream=stream)
    assert all(isinstance(result, fake_arrays.ForeignArray) for result in results)
    given = [each for each in log if each.kind == "given"]
    assert [each.launches for each in given] == [len(gpu.driver.launches)] * len(results)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_arrays_are_taken_on_the_stream_that_reads_them(gpu, foreign, log, call):
    """The last time that each is taken: what is only looked at may be taken anywhere."""
    call(foreign, stream=OWN)
    launches = [0, *(run for run, _ in enumerate(gpu.driver.launches, 1))]
    for number in launches:
        taken = [each for each in log if each.kind == "taken" and each.launches == number]
        if taken:
            assert taken[-1].stream == OWN


@pytest.mark.parametrize("stream", [None, OWN])
def test_each_launch_of_a_plan_gives_its_results_anew(gpu, foreign, log, stream):
    before = 0
    for results in planned(foreign, stream=stream):
        launches = len(gpu.driver.launches)
        assert launches > before
        before = launches
        given = [each for each in log if each.kind == "given"][-4:]
        assert given == [("given", stream or CUPYS, 0, launches)] * 4
        assert all(isinstance(result, fake_arrays.ForeignArray) for result in results)


def test_a_launch_of_a_plan_gives_on_its_own_stream(gpu, foreign, log):
    q = foreign((B, S, H, D))
    plan = numflash.plan(q, q, q)
    made = plan.out
    assert plan.launch(stream=OWN) is plan.out
    assert log[-1] == ("given", OWN, 0, 1)
    assert plan.out.seen is made.seen


def test_an_array_of_numba_is_given_with_its_stream_and_not_waited_for(gpu, monkeypatch):
    """A wait of Numba's own would end a graph capture."""
    given = []

    class NumbaArray:
        def __init__(self, seen):
            self.as_cupy = seen

        __cuda_array_interface__ = None

    NumbaArray.__module__ = "numba.cuda.cudadrv.devicearray"

    def as_cuda_array(array, sync=True):
        given.append((array, sync, gpu.cupy.current.stream, len(gpu.driver.launches)))
        return NumbaArray(array)

    numba = types.ModuleType("numba")
    numba.cuda = types.SimpleNamespace(as_cuda_array=as_cuda_array)
    monkeypatch.setitem(sys.modules, "numba", numba)
    q = NumbaArray(gpu.array((B, S, H, D)))
    out = numflash.attention(q, q, q, stream=OWN)
    assert isinstance(out, NumbaArray)
    assert [each[1:] for each in given] == [(False, OWN, 1)] * 2


# Arrays of several libraries


def test_copies_of_another_librarys_arrays_are_made_on_the_stream_of_the_launch(gpu):
    """v has no contiguous rows; PyTorch's current stream is not CuPy's."""
    copies = []

    class Spread(gpu.torch.Tensor):
        def stride(self):
            return tuple(2 * step for step in super().stride())

        def contiguous(self):
            copies.append(gpu.torch.current_stream)
            return gpu.tensor(self.shape)

    q, v = (
        gpu.array((B, S, H, D)),
        Spread((B, S, H, D), gpu.torch.float16, gpu.torch.device("cuda", 0)),
    )
    for options in ({}, {"precision": "fp8"}):
        for stream in (None, OWN):
            copies.clear()
            gpu.driver.launches.clear()
            numflash.attention(q, q, v, stream=stream, **options)
            assert copies == [stream or CUPYS]
            assert {run.stream for run in gpu.driver.launches} == {stream or CUPYS}
    assert gpu.torch.current_stream == TORCHS


def test_a_foreign_array_next_to_tensors_is_taken_on_their_stream(gpu, foreign, log):
    q, k = gpu.tensor((B, S, H, D)), foreign((B, S, H, D))
    numflash.attention(q, k, k)
    (run,) = gpu.driver.launches
    assert run.stream == TORCHS
    assert log[-2:] == [("taken", TORCHS, 0, 0)] * 2
