"""FlashAttention-4's cubins: one file for each shape, though CuTe calls all of them alike."""

import os
from pathlib import Path

import pytest

from bench.peers import flash_attention_4


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that writes the files that CuTe does, under the names of its kernels."""
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def compile_one(direction, head_dim, causal, dtype):
        if head_dim == 512:
            raise AssertionError("head_dim 512\nis too large")
        dumps = Path(os.environ["CUTE_DSL_DUMP_DIR"])
        for part in ("bwd_preprocess", "bwd_sm90") if direction == "backward" else ("fwd_sm90",):
            path = dumps / f"cutlass_{part}_object_at_.sm_90a.cubin"
            path.write_text(f"{direction} {head_dim} {causal} {dtype}")

    monkeypatch.setattr(flash_attention_4, "_compile", compile_one)


def test_each_shape_has_a_file(tmp_path, compiler, capsys):
    out = tmp_path / "fa4"
    arguments = [str(out), "--head-dims", "64", "128", "--directions", "forward", "backward"]
    assert flash_attention_4.main(arguments) == 0
    found = {path.name: path.read_text() for path in out.iterdir()}
    assert found == {
        f"fa4-{direction}-d{head_dim}{'-causal' * causal}.cubin": (
            f"{direction} {head_dim} {causal} bfloat16"
        )
        for direction in ("forward", "backward")
        for head_dim in (64, 128)
        for causal in (False, True)
    }
    assert capsys.readouterr().out == f"8 cubins in {out}\n"


def test_a_shape_that_fails_is_named_and_others_are_written(tmp_path, compiler, capsys):
    assert flash_attention_4.main([str(tmp_path), "--head-dims", "512", "64"]) == 1
    out = capsys.readouterr().out
    assert "fa4-backward-d512-causal.cubin: head_dim 512 is too large" in out
    assert "2 cubins in" in out


def test_a_compiler_that_writes_nothing_is_told(tmp_path, compiler, monkeypatch, capsys):
    monkeypatch.setattr(flash_attention_4, "_compile", lambda *of_it: None)
    assert flash_attention_4.main([str(tmp_path), "--head-dims", "64"]) == 1
    assert "CuTe wrote 0 cubins whose names hold bwd_sm90, not one" in capsys.readouterr().out
