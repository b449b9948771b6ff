"""Fixtures: a machine that is stubbed, and an empty config cache."""

import logging

import pytest

from numflash.api import plans
from numflash.calls import launch
from tests.support import fake_gpu
from tests.support.fake_gpu import DV, HKV, SK, SQ, B, D, H


@pytest.fixture
def gpu(monkeypatch):
    """A fake Turing."""
    return fake_gpu.install(monkeypatch)


@pytest.fixture
def hopper(monkeypatch):
    """A fake H200."""
    return fake_gpu.install(monkeypatch, (9, 0), num_sms=132, l2_bytes=50 * 2**20)


@pytest.fixture
def qkv(gpu):
    """Contiguous float16 arrays of the usual sizes."""
    return gpu.array((B, SQ, H, D)), gpu.array((B, SK, HKV, D)), gpu.array((B, SK, HKV, DV))


@pytest.fixture
def compiled(monkeypatch):
    """The kernels that are compiled, each once, in order."""
    compiled = {}

    def get_cubin(config, traits, limits):
        code = getattr(config, "compiled", config)
        compiled[f"{config.family}|{code}|{traits}"] = True
        return fake_gpu.fake_get_cubin(config, traits, limits)

    for module in (plans, launch):
        monkeypatch.setattr(module, "get_cubin", get_cubin)
    return compiled


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, whose folder does not exist."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def warnings(caplog):
    """The messages of warnings so far."""
    caplog.set_level(logging.WARNING, logger="numflash")
    return lambda: [record.getMessage() for record in caplog.records]
