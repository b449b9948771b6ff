"""A missing library of the compiler is named, with the way to get it."""

import pytest

from numflash.machine_code import compiler, linker
from numflash.machine_code.compiler import get_cubin
from numflash.runtime.errors import UnsupportedError
from tests.support.compilations import CONFIG, LIMITS, TRAITS, missing


def test_numba_is_missing(monkeypatch, cache_directory):
    missing(monkeypatch, "numba")
    with pytest.raises(UnsupportedError, match=r'Numba .* pip install "numflash\[cu13\]"'):
        get_cubin(CONFIG, TRAITS, LIMITS)


def test_numba_cuda_is_missing(monkeypatch, cache_directory):
    # Numba then offers the CUDA target that it once had itself.
    from numba import cuda as numba_cuda

    monkeypatch.delattr(numba_cuda, "compile_all")
    with pytest.raises(UnsupportedError, match=r'without numba-cuda\. .* pip install "numflash'):
        get_cubin(CONFIG, TRAITS, LIMITS)


def test_nvjitlink_is_missing(monkeypatch):
    import cuda.bindings

    missing(monkeypatch, "cuda.bindings.nvjitlink")
    monkeypatch.delattr(cuda.bindings, "nvjitlink", raising=False)
    with pytest.raises(UnsupportedError, match=r'nvJitLink .* pip install "numflash\[cu13\]"'):
        linker.link(b"", "sm_80")


class DynamicLibNotFoundError(RuntimeError):
    """Named like the one of cuda-pathfinder."""


def not_found(*args, **kwargs):
    raise DynamicLibNotFoundError('Failure finding "libnvrtc.so.13"\n  No such file\n')


def test_a_library_of_the_front_end_is_missing(monkeypatch, cache_directory):
    from numba import cuda as numba_cuda

    monkeypatch.setattr(numba_cuda, "compile_all", not_found)
    with pytest.raises(UnsupportedError, match=r"libnvrtc.so.13.* pip install") as raised:
        get_cubin(CONFIG, TRAITS, LIMITS)
    assert "\n" not in str(raised.value)
    assert not cache_directory.exists()


def test_a_library_of_the_linker_is_missing(monkeypatch):
    from cuda.bindings import nvjitlink

    monkeypatch.setattr(nvjitlink, "create", not_found)
    with pytest.raises(UnsupportedError, match=r"libnvrtc.so.13.* pip install"):
        linker.link(b"", "sm_80")


def test_errors_of_ones_own_are_not_disguised(monkeypatch):
    from numba import cuda as numba_cuda

    ask_driver = compiler_asks()
    monkeypatch.setattr(numba_cuda, "compile_all", lambda *a, **k: [][0])
    with pytest.raises(IndexError):
        compiler.compile_cubin(CONFIG, TRAITS, LIMITS)
    assert compiler_asks() is ask_driver


def compiler_asks():
    """The function by which Numba learns the current device; compiling borrows it."""
    from numba.cuda import dispatcher

    return dispatcher.get_current_device
