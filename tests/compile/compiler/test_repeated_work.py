"""Work that Numba would repeat is left out, and the machine code stays the same."""

import gc
from contextlib import nullcontext
from weakref import WeakKeyDictionary

import pytest

from numflash.kernels.kernel import Kernel
from numflash.machine_code import compiler, repeated_work
from numflash.machine_code.compiler import compile_kernel
from numflash.ptx import cuda, device_function, ex2_approx_ftz_f32, f32, i32
from numflash.runtime.views import Pointer
from tests.support.compilations import CONFIG, LIMITS, TRAITS, instructions


def make_exponentials():
    """A small kernel whose device function no other compilation has compiled."""

    @device_function
    def exponentials(array, scale):
        for i in range(8):
            array[i] = ex2_approx_ftz_f32(array[i] * scale + i)

    def kernel(x: Pointer(f32), n: i32):
        array = cuda.local.array(8, f32)
        for i in range(8):
            array[i] = x[i * n]
        exponentials(array, x[n])
        total = x[n + 1]
        for i in range(8):
            total += array[i] if i < n else x[i]
        x[n // 2] = total

    return Kernel("exponentials", kernel, 32, 0)


def numbas_own():
    """The functions that `without_repeated_work` replaces."""
    from numba import types
    from numba.cuda.core.postproc import PostProcessor

    return types.Function.get_call_type, PostProcessor.run


@pytest.fixture
def numbas_work(monkeypatch):
    """Counts Numba's own answers to what `without_repeated_work` saves."""
    from numba import types
    from numba.cuda.core import analysis

    work = {"signatures": 0, "live variables": 0}

    def count(owner, name, what):
        own = getattr(owner, name)

        def counted(*args):
            work[what] += 1
            return own(*args)

        monkeypatch.setattr(owner, name, counted)

    count(types.Function, "get_call_type", "signatures")
    count(analysis, "compute_live_variables", "live variables")
    monkeypatch.setattr(repeated_work, "_signatures", WeakKeyDictionary())
    return work


def test_less_work_makes_the_same_machine_code(numbas_work, monkeypatch):
    def work_of(context):
        numbas_work.update(dict.fromkeys(numbas_work, 0))
        monkeypatch.setattr(repeated_work, "without_repeated_work", context)
        return instructions(compile_kernel(make_exponentials, LIMITS)), dict(numbas_work)

    less = repeated_work.without_repeated_work
    code, everything = work_of(nullcontext)
    first_code, first = work_of(less)
    second_code, second = work_of(less)
    assert len(code) > 50
    assert code == first_code == second_code
    assert everything["live variables"] > 0 == first["live variables"]
    assert 0 < first["signatures"] < everything["signatures"] / 2
    # Function types that nothing holds, like that of cuda.local.array, are asked again.
    assert second["signatures"] < first["signatures"] / 4


def test_what_is_remembered_does_not_grow():
    def kernel(x: Pointer(f32), n: i32):
        x[n] = f32(n) + f32(1)

    def remembered():
        compile_kernel(lambda: Kernel("conversions", kernel, 32, 0), LIMITS)
        gc.collect()
        return sum(map(len, repeated_work._signatures.values()))

    assert 0 < remembered() == remembered() == remembered()


def test_numba_is_left_as_it_was(good, monkeypatch):
    from numba import cuda as numba_cuda

    own, during = numbas_own(), []

    def compile_all(*args, **kwargs):
        during.append(numbas_own())
        raise ZeroDivisionError

    monkeypatch.setattr(numba_cuda, "compile_all", compile_all)
    with pytest.raises(ZeroDivisionError):
        compiler.compile_cubin(CONFIG, TRAITS, LIMITS)
    assert during[0][0] is not own[0]
    assert during[0][1] is not own[1]
    assert numbas_own() == own


def test_numba_with_other_internals_is_only_slower(numbas_work, monkeypatch):
    def refuse():
        raise ImportError("no module named so")

    monkeypatch.setattr(repeated_work, "_KNOWN_NAMES", {"something", "else"})
    monkeypatch.setattr(repeated_work, "_remember_signatures", refuse)
    own = numbas_own()
    with repeated_work.without_repeated_work():
        assert numbas_own() == own
    assert compile_kernel(make_exponentials, LIMITS).stack_bytes == 0
    assert numbas_work["live variables"] > 0
