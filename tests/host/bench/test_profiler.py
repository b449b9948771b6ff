"""Bytes as the profiler counts them, and what is said where it cannot."""

import os

import pytest

from bench.measuring import profiler
from bench.points.points import gpt2_medium


def test_profiler_output_is_summed():
    output = """==PROF== Connected
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","forward","dram__bytes_read.sum","byte","1,000"
"0","forward","dram__bytes_write.sum","byte","20"
"1","combine","dram__bytes_read.sum","byte","5"
"""
    assert profiler.parse(output) == {"read_bytes": 1005.0, "written_bytes": 20.0}
    assert profiler.parse("==ERROR== ERR_NVGPUCTRPERM") == {}


def test_without_a_profiler_there_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="no profiler"):
        profiler.count(gpt2_medium("forward"), 1)


def test_a_profiler_that_is_refused_says_why(monkeypatch, tmp_path):
    program = tmp_path / "ncu"
    program.write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM'; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(RuntimeError, match="ERR_NVGPUCTRPERM"):
        profiler.count(gpt2_medium("forward"), 10)
