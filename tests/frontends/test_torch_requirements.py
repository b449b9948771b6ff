"""What numflash.torch asks of PyTorch is said when it is imported."""

import runpy
import sys

import pytest

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install "numflash[torch]"')

from numflash.frontends import torch as room  # noqa: E402


def test_an_old_pytorch_is_named(monkeypatch):
    monkeypatch.delattr(torch.library, "get_kernel")
    monkeypatch.setattr(torch, "__version__", "2.4.1")
    with pytest.raises(ImportError, match=r"torch\.library\.get_kernel .* got PyTorch 2\.4\.1"):
        runpy.run_path(room.__file__)


def test_no_pytorch_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"numflash\.torch needs PyTorch: pip install"):
        runpy.run_path(room.__file__)
